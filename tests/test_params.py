"""Tests of the settings: what is allowed, and that every mistake is one clear line."""

import re
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from ruamel.yaml import YAML

from cnnpipe.data.decode import MAX_PIXELS, MOST_PIXELS
from cnnpipe.errors import UserError
from cnnpipe.network import summarize
from cnnpipe.params import Params, Resize, load

ROOT = Path(__file__).parents[1]


@pytest.fixture
def loaded(tmp_path: Path) -> Any:
    """A function from the text of a params.yaml to its settings."""

    def load_text(text: str) -> Params:
        path = tmp_path / "params.yaml"
        path.write_text(text, encoding="utf-8")
        return load(path)

    return load_text


@pytest.fixture
def message(loaded: Any) -> Any:
    """A function from the text of a params.yaml to the complaint about it."""

    def message_of(text: str) -> str:
        with pytest.raises(UserError) as error:
            loaded(text)
        assert "\n" not in str(error.value)
        return re.sub(r"^.*?params\.yaml", "params.yaml", str(error.value))

    return message_of


def test_the_repositorys_params_yaml_is_the_schemas_defaults() -> None:
    assert load(ROOT / "params.yaml") == Params()


def test_the_repositorys_params_yaml_names_every_setting() -> None:
    written = YAML(typ="safe").load(ROOT / "params.yaml")
    assert written == Params().model_dump()


def test_the_limits_on_pixels_are_the_decoders() -> None:
    (limit,) = (m.le for m in Resize.model_fields["max_pixels"].metadata if hasattr(m, "le"))
    assert (Resize().max_pixels, limit) == (MAX_PIXELS, MOST_PIXELS)
    assert int(2 * (Image.MAX_IMAGE_PIXELS or 0)) == MOST_PIXELS


def test_flat_has_every_setting_by_its_dotted_name() -> None:
    flat = Params().flat()
    assert flat["base.seed"] == 42
    assert flat["model.kernel_size"] == 5
    stages = Params().model_dump(exclude={"promote"})
    spread = {
        "resize.workers",
        "resize.scheduler",
        "train.num_processes",
    }  # which no result depends on
    assert len(flat) == sum(len(section) for section in stages.values()) - len(spread)
    assert not spread & set(flat)


def test_settings_left_out_are_the_defaults(loaded: Any) -> None:
    assert loaded("model: {filters: 3}").model.filters == 3
    assert loaded("model: {filters: 3}").train == Params().train


def test_numbers_are_read_as_yaml_1_2_has_them(loaded: Any) -> None:
    # YAML 1.1, PyYAML's, reads 1e-3 as text and 010 as 8.
    assert loaded("train: {learning_rate: 1e-3}").train.learning_rate == 0.001
    assert loaded("base: {seed: 010}").base.seed == 10
    assert loaded("train: {learning_rate: 1}").train.learning_rate == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {kernel_sise: 3}", "model.kernel_sise: unknown, did you mean kernel_size?"),
        ("modle: {}", "modle: unknown, did you mean model?"),
        ("split: {zebra: 1}", "split.zebra: unknown; known are val, test"),
        ("split: {1: 1}", "split.1: unknown; known are val, test"),
        ("model: {filters: ten}", "model.filters = 'ten': must be a valid integer"),
        ("model: {filters: '10'}", "model.filters = '10': must be a valid integer"),
        ("model: {filters: true}", "model.filters = True: must be a valid integer"),
        ("model: {filters: 10.0}", "model.filters = 10.0: must be a valid integer"),
        ("model: {filters: null}", "model.filters = null: must be a valid integer"),
        ("model: {filters: 0}", "model.filters = 0: must be greater than or equal to 1"),
        ("model: {dropout: 1}", "model.dropout = 1: must be less than 1"),
        ("model: {batch_norm: 'yes'}", "model.batch_norm = 'yes': must be a valid boolean"),
        ("train: {learning_rate: .nan}", "train.learning_rate = nan: must be a finite number"),
        ("train: {learning_rate: .inf}", "train.learning_rate = inf: must be a finite number"),
        ("train: {learning_rate: 0}", "train.learning_rate = 0: must be greater than 0"),
        (
            "model: {pooling: min}",
            "model.pooling = 'min': must be 'max', 'average' or 'l2'",
        ),
        (
            "model: {padding: vaild}",
            "model.padding = 'vaild': must be 'valid' or 'same' or must be a valid integer",
        ),
        (
            "download: {sha256: ABC}",
            "download.sha256 = 'ABC': must be 64 hexadecimal digits, in small letters",
        ),
        ("model: 5", "model = 5: must be the section's settings, such as architecture: article"),
        ("base:", "base = null: must be the section's settings, such as seed: 42"),
    ],
)
def test_a_mistake_is_named_with_its_value_and_what_is_allowed(
    message: Any, text: str, expected: str
) -> None:
    assert message(text) == f"params.yaml: {expected}"


def test_all_mistakes_are_in_the_one_message(message: Any) -> None:
    text = message(
        "model: {filters: 0, kernel_sise: 3}\ntrain: {epochs: 1.5, optimizer: adma}\nresise: {}"
    )
    for expected in (
        "model.filters = 0: must be greater than or equal to 1",
        "model.kernel_sise: unknown, did you mean kernel_size?",
        "train.epochs = 1.5: must be a valid integer",
        "train.optimizer = 'adma': must be 'adam', 'adamw' or 'sgd'",
        "resise: unknown, did you mean resize?",
    ):
        assert expected in text.removeprefix("params.yaml: ").split("; ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "model: {filters: 3, filters: 4}",
            'line 1: not valid YAML: found duplicate key "filters"',
        ),
        ("model: {}\nmodel: {}", 'line 2: not valid YAML: found duplicate key "model"'),
        ('{"a\\nb": 1, "a\\nb": 2}', 'found duplicate key "a b"'),
        ("base:\n  seed: [", "line 2: not valid YAML: "),
        ("base: {seed: 1}\n\tmodel: {}", "line 2: not valid YAML: "),
        ("base: {}\n--- \nbase: {}", "line 2: not valid YAML: "),
        ("base: \x01", "not valid YAML: unacceptable character"),
        ("base: !!python/name:os.system x", "not valid YAML: could not determine a constructor"),
        ("- base", "must hold the sections base, download, resize, split, model, train, evaluate"),
        ("", "must hold the sections base"),
        ("base", "must hold the sections base"),
    ],
)
def test_what_is_no_mapping_of_sections_is_refused(message: Any, text: str, expected: str) -> None:
    assert expected in message(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such file: run cnnpipe in the folder"):
        load(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match=r"cannot be read: .*directory"):
        load(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match=r"bytes\.yaml: not valid YAML"):
        load(tmp_path / "bytes.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("download: {source: url}", "download.url is null: the source url needs it"),
        ("download: {source: url, url: x}", "download.sha256 is null: the source url needs it"),
        ("split: {val: 0.5, test: 0.5}", "split.val + split.test = 1: must leave images"),
        ("model: {blocks: 3}", "model.blocks = 3: the article's network has one block"),
        ("model: {padding: 5}", "model.padding = 5: must be less than model.kernel_size, 5"),
        (
            "train: {batch_size: 1}\nmodel: {batch_norm: true}",
            "train.batch_size = 1: batch normalisation needs at least 2 images",
        ),
        (
            "train: {crop_size: 64, augment: flip}\nmodel: {architecture: residual}",
            "train.crop_size = 64: train.augment is flip, which does not crop",
        ),
        (
            "train: {crop_size: 64, augment: crop}",
            "train.crop_size = 64: the network article takes one size only",
        ),
        (
            "train: {crop_size: 301, augment: photo}\nmodel: {architecture: residual}",
            "train.crop_size = 301: must be at most resize.size, 300",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    message: Any, text: str, expected: str
) -> None:
    assert message(text).startswith(f"params.yaml: {expected}")


@pytest.mark.parametrize(
    "text",
    [
        f"download: {{source: url, url: 'https://example.org/a.zip', sha256: '{'0a' * 32}'}}",
        "split: {val: 0.5, test: 0.49}",
        "model: {padding: 4}",
        "train: {crop_size: 300, augment: crop}\nmodel: {architecture: residual}",
        "model: {architecture: deep, blocks: 5}",
        "model: {architecture: residual, blocks: 8}",
        "model: {head: sigmoid}",
    ],
)
def test_what_stays_within_the_rules_is_accepted(loaded: Any, text: str) -> None:
    loaded(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("resize: {size: 4}", "convolution: (W - F + 2P)/S + 1 = (4 - 5 + 2·0)/1 + 1 = 0, "),
        (
            "resize: {size: 6}\nmodel: {pool_size: 3}",
            "pooling: (W - F + 2P)/S + 1 = (2 - 3 + 2·0)/3 + 1 = 0.667, ",
        ),
        (
            "model: {architecture: deep, blocks: 8}",
            "pooling_6: (W - F + 2P)/S + 1 = (1 - 2 + 2·0)/2 + 1 = 0.5, ",
        ),
        (
            "model: {architecture: residual, blocks: 9}",
            "pooling_9: (W - F + 2P)/S + 1 = (1 - 2 + 2·0)/2 + 1 = 0.5, ",
        ),
    ],
)
def test_an_impossible_network_is_refused_with_its_layer_and_sum(
    message: Any, text: str, expected: str
) -> None:
    complaint = message(text)
    assert complaint.startswith(f"params.yaml: {expected}which is smaller than 1 x 1: use a larger")
    assert "resize.size" in complaint


def test_a_crop_too_small_for_the_network_is_named(message: Any) -> None:
    complaint = message(
        "resize: {size: 64}\nmodel: {architecture: residual, blocks: 5}\n"
        "train: {augment: crop, crop_size: 16}"
    )
    assert "pooling_5: " in complaint and "use a larger train.crop_size" in complaint


@pytest.mark.parametrize("digits", ["9" * 400, "9" * 5000, "0x" + "f" * 5000])
@pytest.mark.parametrize("key", ["filters", "kernel_size", "stride", "padding", "pool_size"])
def test_numbers_of_any_size_are_refused_in_one_line(message: Any, key: str, digits: str) -> None:
    assert len(message(f"model: {{{key}: {digits}}}")) < 300


def test_input_shape_follows_from_size_and_color(loaded: Any) -> None:
    assert Params().input_shape == (3, 300, 300)
    assert loaded("resize: {size: 28, color: grey}").input_shape == (1, 28, 28)


_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(max_size=8)
    | st.dates()
    | st.binary(max_size=4)
    | st.sampled_from(["valid", "same", "article", "deep", "residual", "mlp", "crop", "url", "l2"])
)
_KEYS = st.sampled_from([key for key in Params().flat()]).map(lambda key: key.split(".")[1])
_SECTIONS = st.dictionaries(_KEYS | st.text(max_size=5) | st.integers(), _SCALARS, max_size=4)
_NESTED = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_SCALARS, inner, max_size=3),
)


@settings(max_examples=300)
@given(
    st.dictionaries(
        st.sampled_from([*Params.model_fields]) | _SCALARS, _SECTIONS | _NESTED, max_size=4
    )
)
def test_whatever_yaml_can_say_is_settings_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    try:
        YAML(typ="safe", pure=True).dump(content, path)
    except Exception:  # not everything can be written as YAML
        return
    _settings_or_one_line(path)


_POSITIVE = st.integers(1, 60)


@settings(max_examples=500)
@given(
    st.fixed_dictionaries(
        {
            "resize": st.fixed_dictionaries({"size": _POSITIVE}),
            "model": st.fixed_dictionaries(
                {"architecture": st.sampled_from(["article", "deep", "residual", "mlp"])},
                optional={
                    "kernel_size": _POSITIVE,
                    "stride": _POSITIVE,
                    "padding": st.sampled_from(["valid", "same"]) | _POSITIVE,
                    "pool_size": st.integers(1, 5),
                    "blocks": st.integers(1, 16),
                },
            ),
            "train": st.fixed_dictionaries(
                {"augment": st.sampled_from(["flip", "crop"])}, optional={"crop_size": _POSITIVE}
            ),
        }
    )
)
def test_settings_of_the_right_kinds_make_a_network_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    YAML(typ="safe", pure=True).dump(content, path)
    if _settings_or_one_line(path):
        params = load(path)
        assert summarize(params.model, params.input_shape, 2).parameters > 0


@settings(max_examples=300)
@given(st.text() | st.text(alphabet=" \n\t:-[]{}&*!|>'\"%#,?a1", max_size=30))
def test_whatever_text_is_settings_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    _settings_or_one_line(path)


def _settings_or_one_line(path: Path) -> bool:
    """Whether it is settings; fails where it is neither."""
    try:
        return isinstance(load(path), Params)
    except UserError as error:
        assert str(error).startswith(str(path))
        assert len(str(error).splitlines()) == 1
        return False


@pytest.mark.parametrize(
    "url", ["https://me:hidden@host/a.zip", "s3://me:hidden@photos/a.zip", "https://h/a?sig=hidden"]
)
def test_credentials_in_the_url_are_refused_and_not_repeated(tmp_path: Path, url: str) -> None:
    path = tmp_path / "params.yaml"
    for content in (f"{{url: '{url}'}}", f"'{url}'", f"{{folder: ['{url}']}}"):
        path.write_text(f"download: {content}\n")
        with pytest.raises(UserError) as failure:
            load(path)
        assert "hidden" not in "".join(traceback.format_exception(failure.value))
    path.write_text("download:\n")
    with pytest.raises(UserError, match=r"params.yaml: download.url: holds .*~/.netrc"):
        load(path, {"download.url": url})


@pytest.mark.parametrize("url", ["s3://photos/cats.zip", "https://h/cats.zip?dl=1"])
def test_a_url_without_credentials_is_taken(tmp_path: Path, url: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(f"download: {{url: '{url}'}}\n")
    assert load(path).download.url == url
