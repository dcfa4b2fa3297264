"""Tests of the explanation: its numbers are the network's own, and any image or name has a page."""

import re
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cnnpipe.errors import UserError
from cnnpipe.evaluation import explain, explanation, lessons
from cnnpipe.network import geometry
from cnnpipe.params import Model

Make = Callable[..., Any]
NETWORKS: dict[str, dict[str, Any]] = {
    "article": {},
    "deep": {"architecture": "deep", "blocks": 2, "filters": 20, "padding": "same"},
    "deep, normalised": {"architecture": "deep", "batch_norm": True, "pooling": "l2",
                         "dropout": 0.5},
    "average, stride 2": {"pooling": "average", "stride": 2, "padding": 1, "flip_average": True},
    "residual": {"architecture": "residual", "blocks": 2, "filters": 4},
    "mlp": {"architecture": "mlp"},
    "hidden units": {"dense_units": 5},
    "mlp of hidden units": {"architecture": "mlp", "dense_units": 5, "blocks": 2},
}  # fmt: skip
LINEAR = [name for name in NETWORKS if "hidden" not in name]


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(autouse=True)
def a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def picture(size: int = 16, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, channels), dtype=np.uint8)


def save(path: str, size: tuple[int, int] = (30, 20)) -> str:
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="png")
    return path


def randomised(classifier: Any) -> Any:
    """With biases and statistics that are not zero and one, as after a training."""
    torch.manual_seed(1)
    for name, values in classifier.network.state_dict().items():
        if values.dtype == torch.float32 and values.ndim == 1:
            low = 0.5 if "var" in name else -0.5
            values.uniform_(low, low + 1)
    return classifier


@pytest.mark.parametrize("settings", [
    {}, {"kernel_size": 4, "padding": "same"}, {"stride": 2}, {"stride": 3, "padding": 2},
    {"kernel_size": 16}, {"kernel_size": 1}, {"architecture": "residual", "blocks": 2},
])  # fmt: skip
@pytest.mark.parametrize("color", ["rgb", "grey"])
def test_the_worked_convolution_is_the_networks_own_activation(
    settings: dict[str, Any], color: str, make_classifier: Make
) -> None:
    pooling = {} if settings.get("kernel_size") != 16 else {"pool_size": 1}
    classifier = randomised(make_classifier(16, color, **settings, **pooling))
    image = picture(channels=1 if color == "grey" else 3)
    pixels = explanation.normalised(classifier, image)
    filters = explanation.first_filters(classifier)
    assert filters is not None
    worked = explanation.worked_convolution(pixels, filters)
    activation = explanation.activations(classifier, image)[0].values[worked.index]

    def of_network(position: explanation.Position) -> float:
        row, column = position.top + filters.before, position.left + filters.before
        assert row % filters.stride == column % filters.stride == 0
        return float(activation[row // filters.stride, column // filters.stride])

    assert worked.here.total == pytest.approx(of_network(worked.here), rel=1e-4, abs=1e-5)
    by_hand = (worked.here.patch * filters.weights[worked.index]).sum()
    assert worked.here.total == pytest.approx(by_hand + filters.bias[worked.index])
    if filters.stride <= 2 and filters.stride in worked.next:
        step = worked.next[filters.stride]
        assert step.left == worked.here.left + filters.stride
        assert step.total == pytest.approx(of_network(step), rel=1e-4, abs=1e-5)


def test_the_worked_place_is_where_the_pattern_is_and_not_where_it_is_bright() -> None:
    pixels = np.zeros((1, 12, 12))
    pixels[0, :, 8:] = 3  # bright from column 8 on: the edge is there
    weights = explanation.SOBEL[None, None] + 2  # it likes what is bright even better
    filters = explanation.Filters(weights, np.zeros(1), stride=1, before=0, after=0)
    worked = explanation.worked_convolution(pixels, filters)
    assert (worked.here.left, worked.here.total) in [(6, 4 * 3 + 2 * 9), (7, 4 * 3 + 2 * 18)]
    assert [worked.next[step].left - worked.here.left for step in (1, 2)] == [1, 2]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_layers_in_the_order_of_the_description_come_to_the_networks_own_output(
    name: str, make_classifier: Make
) -> None:
    classifier = randomised(make_classifier(16, **NETWORKS[name]))
    image = picture()
    own: dict[str, np.ndarray] = {}  # in the order in which the network computes
    hooks = [
        module.register_forward_hook(lambda m, i, o, key=key: own.update({key: o[0].numpy()}))
        for key, module in classifier.network.named_children()
    ]
    with torch.inference_mode():
        classifier.network(torch.from_numpy(explanation.normalised(classifier, image))[None])
    for hook in hooks:
        hook.remove()
    layers = explanation.activations(classifier, image)
    assert {one.layer.name for one in layers} == set(own)
    for i, one in enumerate(layers):
        name = one.layer.name
        if isinstance(one.layer, geometry.Relu) and isinstance(
            layers[i + 1].layer, geometry.Pooling
        ):
            # In the network it may come after the pooling; here it is of the size before.
            np.testing.assert_array_equal(one.values, np.maximum(layers[i - 1].values, 0))
            continue
        before = layers[i - 1].layer
        if isinstance(one.layer, geometry.Pooling) and isinstance(before, geometry.Relu):
            name = max((name, before.name), key=list(own).index)  # computed last
        np.testing.assert_allclose(one.values.ravel(), own[name].ravel(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "head"), [*product(LINEAR, ["softmax", "sigmoid"])])
@pytest.mark.parametrize("index", [0, 1])
def test_the_evidence_adds_up_to_the_lead(
    name: str, head: str, index: int, make_classifier: Make
) -> None:
    classifier = randomised(make_classifier(16, head=head, **NETWORKS[name]))
    image = picture()
    pixels = explanation.normalised(classifier, image)
    layers = explanation.activations(classifier, image)
    found = explanation.evidence(classifier, pixels, layers, index)
    assert found is not None
    logits = layers[-1].values.ravel()
    if head == "sigmoid":
        expected = float(logits[0]) * (1 if index else -1)
    else:
        expected = float(logits[index] - logits[1 - index]) / 2
    assert found.maps.sum() + found.bias == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_evidence_of_many_classes_is_relative_to_their_mean(make_classifier: Make) -> None:
    classifier = randomised(make_classifier(16, class_names=tuple("abcde")))
    image = picture()
    pixels = explanation.normalised(classifier, image)
    layers = explanation.activations(classifier, image)
    logits = layers[-1].values.ravel()
    for index in range(5):
        found = explanation.evidence(classifier, pixels, layers, index)
        assert found is not None and found.after == "pooling"
        lead = logits[index] - logits.mean()
        assert found.maps.sum() + found.bias == pytest.approx(lead, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", [name for name in NETWORKS if "hidden" in name])
def test_a_hidden_layer_leaves_no_exact_evidence(name: str, make_classifier: Make) -> None:
    classifier = make_classifier(16, **NETWORKS[name])
    image = picture()
    layers = explanation.activations(classifier, image)
    pixels = explanation.normalised(classifier, image)
    assert explanation.evidence(classifier, pixels, layers, 0) is None


@pytest.mark.parametrize(("settings", "extent"), [
    # 16 px, F = 3: the first value's centre is pixel 1, a pooled one's 1.5.
    ({}, (0.5, 14.5, 14.5, 0.5)),
    ({"padding": "same"}, (-0.5, 15.5, 15.5, -0.5)),
    ({"stride": 2}, (0.0, 12.0, 12.0, 0.0)),
    ({"architecture": "mlp"}, (-0.5, 15.5, 15.5, -0.5)),
    ({"architecture": "residual", "blocks": 2}, (-0.5, 15.5, 15.5, -0.5)),
])  # fmt: skip
def test_the_evidence_lies_on_the_pixels_that_it_comes_from(
    settings: dict[str, Any], extent: tuple[float, ...], make_classifier: Make
) -> None:
    classifier = make_classifier(16, **settings)
    image = picture()
    pixels = explanation.normalised(classifier, image)
    found = explanation.evidence(classifier, pixels, explanation.activations(classifier, image), 0)
    assert found is not None and found.extent == extent


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_integrated_gradients_of_a_linear_network_are_its_exact_evidence(
    head: str, make_classifier: Make
) -> None:
    classifier = randomised(make_classifier(16, architecture="mlp", head=head))
    image = picture()
    pixels = explanation.normalised(classifier, image)
    for index in (0, 1):
        layers = explanation.activations(classifier, image)
        exact = explanation.evidence(classifier, pixels, layers, index)
        found = explanation.integrated_gradients(classifier, image, index)
        assert exact is not None
        np.testing.assert_allclose(found.map, exact.maps.sum(axis=0), atol=1e-5)
        assert found.missing == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_integrated_gradients_say_how_much_is_missing(name: str, make_classifier: Make) -> None:
    classifier = randomised(make_classifier(16, **NETWORKS[name]))
    found = explanation.integrated_gradients(classifier, picture(), 1)
    difference = found.lead - found.lead_of_mean
    assert found.map.shape == (16, 16) and np.isfinite(found.map).all()
    assert found.map.sum() + found.missing == pytest.approx(difference)
    assert abs(found.missing) < 0.1 * max(1, abs(difference))
    assert all(p.grad is None for p in classifier.network.parameters())


def test_the_answer_is_that_of_predict_also_where_the_mirror_image_counts(
    make_classifier: Make,
) -> None:
    classifier = make_classifier(16, flip_average=True)
    image = picture()
    found = explanation.answer(classifier, image)
    with torch.inference_mode():
        tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
        expected = classifier.probabilities(tensor)[0].numpy()
    np.testing.assert_array_equal(found.probabilities, expected)
    assert found.index == expected.argmax()


def test_classic_filters_on_a_step() -> None:
    image = np.zeros((20, 20, 3), np.uint8)
    image[:, 10:] = 100  # grey to the right
    by_name = {one.name: one.response for one in explanation.classic_filters(image)}
    vertical = by_name["vertical edges"]
    assert (vertical[:, 9:11] == 400).all()  # (1 + 2 + 1) * 100, on both sides of the step
    assert (np.delete(vertical, (9, 10), axis=1) == 0).all()
    assert (by_name["horizontal edges"] == 0).all()
    np.testing.assert_array_equal(by_name["blur"][5, 6:14, 0], np.rint(np.arange(0, 8) * 100 / 7))
    assert by_name["sharpen"][5, 8:12, 0].tolist() == [0, 0, 200, 100]  # -100 is cut off at 0
    assert (by_name["red against the rest"] == 0).all()
    turned = {one.name: one.response for one in explanation.classic_filters(image.swapaxes(0, 1))}
    np.testing.assert_array_equal(turned["horizontal edges"], vertical.T)


def test_red_is_told_from_green_and_grey_has_no_colours() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    image[0, 0], image[1, 1] = (200, 0, 0), (0, 200, 0)
    response = explanation.classic_filters(image)[-1].response
    assert (response[0, 0], response[1, 1], response[2, 2]) == (200, -100, 0)
    assert len(explanation.classic_filters(image[:, :, :1])) == 4


def test_more_blocks_have_the_parameters_that_a_hand_counts() -> None:
    rows = list(explanation.more_blocks(Model(), (3, 300, 300), 2))
    assert [row.features for row in rows] == [
        (10, 148, 148), (20, 72, 72), (40, 34, 34), (80, 15, 15), (160, 5, 5)
    ]  # fmt: skip
    assert rows[0].parameters == 438_842  # the article's
    # Two blocks: (25*3 + 1)*10 + (25*10 + 1)*20, and (72*72*20 + 1)*2.
    assert (rows[1].in_convolutions, rows[1].in_dense) == (760 + 5_020, 207_362)
    small = list(explanation.more_blocks(Model(kernel_size=3), (1, 12, 12), 2))
    assert [row.features for row in small] == [(10, 5, 5), (20, 1, 1)]
    assert list(explanation.more_blocks(Model(), (1, 4, 4), 2)) == []


def test_the_liveliest_square_is_found_wherever_it_is() -> None:
    image = np.full((30, 40, 1), 100, np.uint8)
    image[20:24, 30:34] = np.indices((4, 4)).sum(axis=0)[:, :, None] % 2 * 255
    assert explanation.liveliest(image, 4) == (20, 30)
    assert explanation.liveliest(image[:5, :5], 5) == (0, 0)
    corner = np.zeros((9, 9, 1), np.uint8)
    corner[-1, -1] = 255
    assert explanation.liveliest(corner, 3) == (6, 6)


def test_cells_keep_the_sum() -> None:
    values = np.random.default_rng(0).normal(size=(61, 61))
    cells = explanation.in_cells(values, 60)
    assert cells.shape == (31, 31)
    assert cells.sum() == pytest.approx(values.sum())
    np.testing.assert_array_equal(explanation.in_cells(values, 61), values)


def test_what_happens_inside_a_residual_block_adds_up(make_classifier: Make) -> None:
    classifier = randomised(make_classifier(16, architecture="residual", blocks=1, filters=4))
    layers = {one.layer.name: one.values for one in
              explanation.activations(classifier, picture())}  # fmt: skip
    parts = explanation.inside_residual(classifier, "residual_1", layers["pooling_1"])
    np.testing.assert_allclose(np.maximum(parts["sum"], 0), layers["residual_1"], atol=1e-5)
    block = classifier.network.get_submodule("residual_1")
    assert not any(part._forward_hooks for part in block.modules())


def test_probabilities_are_never_shown_as_certain() -> None:
    shown = map(lessons.percent, (0, 0.0004, 0.0006, 0.5, 0.9994, 0.99951, 1))
    assert list(shown) == ["< 0.1%", "< 0.1%", "0.1%", "50.0%", "99.9%", "> 99.9%", "> 99.9%"]


ARCHITECTURES = ["article", "deep", "residual", "mlp"]


@pytest.mark.parametrize(("name", "color", "num_classes"), [
    *product(ARCHITECTURES, ["rgb", "grey"], [2, 12]),
    *((name, "rgb", 2) for name in NETWORKS if name not in ARCHITECTURES),
])  # fmt: skip
def test_every_network_has_a_whole_page(
    name: str, color: str, num_classes: int, make_classifier: Make
) -> None:
    names = tuple(f"class {i}" for i in range(num_classes))
    classifier = make_classifier(24, color, names, **NETWORKS[name])
    line = explain.explain(classifier, save("a.png"), "out")
    assert re.fullmatch(r"class \d+ \([<>]? ?\d+\.\d%\): out/explanation\.html", line)
    html = Path("out/explanation.html").read_text()
    files = sorted(file.name for file in Path("out").glob("*.png"))
    assert len(list(Path("out").iterdir())) == len(files) + 1
    assert {file[0] for file in files} == set("123456")
    assert html.count("<img ") == html.count('src="data:image/png;base64,') == len(files)
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", html) and "<script" not in html
    assert "nan" not in re.sub(r"base64,[^\"]*", "", html).lower().replace("explanation", "")
    for file in files:
        pixels = np.asarray(Image.open(Path("out", file)).convert("L"))
        assert pixels.min() < 128 < pixels.max()
    assert "5-evidence.png" in files or "hidden" in name
    assert ("3-red-against-the-rest.png" in files) == (color == "rgb")


@pytest.mark.parametrize(("size", "settings"), [
    (1, {"architecture": "mlp"}), (2, {"kernel_size": 1}), (3, {"kernel_size": 2}),
    (40, {"kernel_size": 31}), (7, {"kernel_size": 5, "padding": 4, "stride": 3}),
    (5, {"pool_size": 3}),
])  # fmt: skip
def test_odd_sizes_have_a_page(size: int, settings: dict[str, Any], make_classifier: Make) -> None:
    explain.explain(make_classifier(size, **settings), save("a.png"), "out")
    assert Path("out/explanation.html").exists()


HOSTILE = ["<script>alert(1)</script>", "$x$", "two\nlines", "\udcff\udcfe", "\U0001f408", "_^{$"]


def test_names_are_only_names(make_classifier: Make) -> None:
    classifier = make_classifier(16, class_names=tuple(HOSTILE), architecture="mlp")
    name = "<b>$x$\n\udcff.png"
    line = explain.explain(classifier, save(name), "\udcff")
    assert line.isprintable() and line.endswith(r": \xff/explanation.html")
    Path("\udcff").rename("out")
    html = Path("out/explanation.html").read_text()
    assert "<script" not in html and "<b>" not in html
    assert "&lt;b&gt;$x$\n\\xff.png" in html or "&lt;b&gt;$x$\\n\\xff.png" in html


@pytest.mark.parametrize("kind", ["jpeg", "gif", "tiff", "webp", "grey", "alpha"])
def test_any_format_has_a_page(kind: str, make_classifier: Make) -> None:
    mode = {"grey": "L", "alpha": "RGBA"}.get(kind, "RGB")
    form = "png" if kind in ("grey", "alpha") else kind
    Image.fromarray(picture(20)).convert(mode).save("image", format=form)
    explain.explain(make_classifier(16, architecture="mlp"), "image", "out")
    assert "The file has 20 x 20 pixels" in Path("out/explanation.html").read_text()


def test_the_next_explanation_replaces_the_last(make_classifier: Make) -> None:
    explain.explain(make_classifier(16, architecture="residual"), save("a.png"), "out")
    assert Path("out/4-residual_1.png").exists()
    explain.explain(make_classifier(16), save("b.png"), "out")
    assert not Path("out/4-residual_1.png").exists()
    assert "b.png" in Path("out/explanation.html").read_text()
    assert sorted(p.name for p in Path().iterdir()) == ["a.png", "b.png", "out"]


def note(path: Path) -> None:
    path.write_text("mine")


def holiday(path: Path) -> None:
    save(str(path.with_name("2-holiday.png")))


def folder(path: Path) -> None:
    path.with_name("more").mkdir()


def page(path: Path) -> None:
    path.with_name("explanation.html").write_text("<p>my own")


def link(path: Path) -> None:
    info = PngInfo()
    info.add_text("Software", "cnnpipe explain")
    Image.new("L", (1, 1)).save("1-image.png", pnginfo=info)  # of an explanation somewhere else
    path.with_name("1-image.png").symlink_to("../1-image.png")


@pytest.mark.parametrize(("leave", "after_another"), [
    *product([note, holiday, folder, page, link], [False]), (note, True), (holiday, True),
])  # fmt: skip
def test_nothing_of_the_users_is_lost(
    leave: Callable[[Path], None], after_another: bool, make_classifier: Make
) -> None:
    classifier = make_classifier(16, architecture="mlp")
    save("a.png")
    if after_another:
        explain.explain(classifier, "a.png", "out")
        Path("out/1-image.png").unlink()
    Path("out").mkdir(exist_ok=True)
    leave(Path("out/note.txt"))
    before = {p: p.read_bytes() for p in Path("out").iterdir() if p.is_file()}
    with pytest.raises(UserError, match=r"--out out: holds .* would be lost: name another"):
        explain.explain(classifier, "a.png", "out")
    assert {p: p.read_bytes() for p in Path("out").iterdir() if p.is_file()} == before


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_the_current_folder_is_not_replaced(out: str, make_classifier: Make) -> None:
    with pytest.raises(UserError, match="the folder that you are in"):
        explain.explain(make_classifier(16), save("a.png"), out)
    assert Path("a.png").exists()


def test_a_file_is_no_folder_to_write_to(make_classifier: Make) -> None:
    save("a.png")
    for out in ("a.png", "a.png/more"):
        with pytest.raises(UserError, match=re.escape(f"--out {out}: ")):
            explain.explain(make_classifier(16), "a.png", out)


def test_a_failure_leaves_the_last_explanation(
    make_classifier: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    explain.explain(make_classifier(16), save("a.png"), "out")
    before = {p: p.read_bytes() for p in Path("out").iterdir()}
    Path("bad.png").write_bytes(Path("a.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"bad\.png: "):
        explain.explain(make_classifier(16), "bad.png", "out")
    assert {p: p.read_bytes() for p in Path("out").iterdir()} == before
