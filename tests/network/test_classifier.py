"""Tests of the classifier: its probabilities, and a file that keeps all of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cnnpipe.errors import UserError
from cnnpipe.network.classifier import Classifier, Preparation, _checksum

CLASS_NAMES = ("Hund, groß", '"猫"', "a\nb", "\udcff", "🐕")


def stored_images(count: int = 6, channels: int = 3, size: int = 8) -> torch.Tensor:
    """(count, C, H, W) uint8, channels last in memory, as `Batches` gives them."""
    torch.manual_seed(1)
    pixels = torch.randint(0, 256, (count, size, size, channels), dtype=torch.uint8)
    return pixels.permute(0, 3, 1, 2)


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize("architecture", ["article", "deep", "residual", "mlp"])
def test_saved_and_loaded_it_gives_the_same_logits_to_the_bit(
    make_classifier: Any, tmp_path: Path, architecture: str, head: str
) -> None:
    classifier = make_classifier(
        architecture=architecture, head=head, dense_units=5, dropout=0.3, batch_norm=True
    )
    inputs = classifier.preparation.normalise(stored_images())
    classifier.network.train()
    classifier.class_logits(inputs)  # moves the running statistics of batch normalisation
    classifier.network.eval()
    classifier.save(tmp_path / "model.safetensors")
    again = Classifier.load(tmp_path / "model.safetensors")
    with torch.inference_mode():
        assert torch.equal(again.class_logits(inputs), classifier.class_logits(inputs))


def test_the_file_keeps_everything_that_a_prediction_needs(
    make_classifier: Any, tmp_path: Path
) -> None:
    classifier = make_classifier(
        class_names=CLASS_NAMES, color="grey", architecture="deep", padding=1, flip_average=True
    )
    preparation = Preparation(8, "pad", "grey", (1 / 3,), (0.1,), 99)
    classifier = replace(classifier, preparation=preparation, run_id="0123")
    classifier.save(tmp_path / "model.safetensors")
    again = Classifier.load(tmp_path / "model.safetensors")
    assert again.class_names == CLASS_NAMES
    assert again.preparation == preparation
    assert again.model == classifier.model
    assert again.run_id == "0123"
    assert again.preparation.input_shape == (1, 8, 8)
    assert not again.network.training


def test_the_file_appears_whole_or_not_at_all(
    make_classifier: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "models" / "model.safetensors"
    make_classifier().save(path)
    before = path.read_bytes()

    write_bytes = Path.write_bytes

    def interrupted(part: Path, data: bytes) -> None:
        write_bytes(part, data[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_classifier(seed=1).save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_the_sigmoid_heads_cross_entropy_is_binary_cross_entropy(make_classifier: Any) -> None:
    classifier = make_classifier(head="sigmoid")
    inputs, labels = torch.randn(50, 3, 8, 8), torch.arange(50) % 2
    with torch.inference_mode():
        unit = classifier.network(inputs)[:, 0]
        logits = classifier.class_logits(inputs)
    assert logits.shape == (50, 2)
    torch.testing.assert_close(
        F.cross_entropy(logits, labels),
        F.binary_cross_entropy_with_logits(unit, labels.float()),
    )
    torch.testing.assert_close(logits.softmax(dim=1)[:, 1], unit.sigmoid())


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_probabilities_are_float32_and_sum_to_1(make_classifier: Any, head: str) -> None:
    with torch.inference_mode():
        result = make_classifier(head=head).probabilities(stored_images())
    assert result.shape == (6, 2)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.sum(dim=1), torch.ones(6))


def test_flip_average_is_the_mean_over_an_image_and_its_mirror_image(make_classifier: Any) -> None:
    plain, averaged = make_classifier(), make_classifier(flip_average=True)
    stored = stored_images()
    with torch.inference_mode():
        straight, mirrored = plain.probabilities(stored), plain.probabilities(stored.flip(3))
        result = averaged.probabilities(stored)
    assert not torch.allclose(straight, mirrored)
    torch.testing.assert_close(result, (straight + mirrored) / 2)


def test_normalise_takes_the_mean_away_and_divides_by_the_deviation() -> None:
    preparation = Preparation(2, "stretch", "rgb", (10.0, 20.0, 30.0), (1.0, 2.0, 4.0), 9)
    images = torch.full((1, 3, 2, 2), 50, dtype=torch.uint8)
    expected = torch.tensor([40.0, 15.0, 5.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    torch.testing.assert_close(preparation.normalise(images), expected)
    torch.testing.assert_close(preparation.normalise(images.float()), expected)


def test_a_missing_model_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"m\.safetensors: no such file: run `dvc repro train`"):
        Classifier.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_model_file_is_refused(
    make_classifier: Any, tmp_path: Path, share: float
) -> None:
    path = tmp_path / "m.safetensors"
    make_classifier().save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"m\.safetensors: not a whole cnnpipe model file: "):
        Classifier.load(path)


@pytest.mark.parametrize("data", [b"garbage" * 100, b"\x00" * 64, b"PK\x03\x04" + b"x" * 64])
def test_garbage_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"m\.safetensors: not a whole cnnpipe model file: "):
        Classifier.load(tmp_path / "m.safetensors")


def test_a_folder_is_no_model_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a whole cnnpipe model file"):
        Classifier.load(tmp_path)


def test_a_model_file_of_another_program_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "m.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="a safetensors file, but not one that cnnpipe wrote"):
        Classifier.load(tmp_path / "m.safetensors")


def test_a_flipped_bit_anywhere_in_a_model_file_is_found(
    make_classifier: Any, tmp_path: Path
) -> None:
    path = tmp_path / "m.safetensors"
    make_classifier(dense_units=3, dropout=0.5).save(path)
    whole = path.read_bytes()
    for position in range(0, len(whole), len(whole) // 300):
        data = bytearray(whole)
        data[position] ^= 1
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"m\.safetensors: "):
            Classifier.load(path)


def signed(header: str, weights: dict[str, torch.Tensor]) -> dict[str, str]:
    return {"cnnpipe": header, "sha256": _checksum(header, weights)}


@pytest.mark.parametrize("lacking", [True, False])
def test_a_weight_too_few_or_too_many_is_refused(
    make_classifier: Any, tmp_path: Path, lacking: bool
) -> None:
    path = tmp_path / "m.safetensors"
    make_classifier().save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    weights = load_file(path)
    if lacking:
        del weights["dense.bias"]
    else:
        weights["dense_2.bias"] = torch.zeros(2)
    save_file(weights, path, signed(metadata["cnnpipe"], weights))
    with pytest.raises(UserError, match=r"not a whole cnnpipe model file: .*dense"):
        Classifier.load(path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format": "9"}, "model file of format 9, this is 2"),
        ({"class_names": ["a", "b", "c"]}, "not a whole .* size mismatch"),
        ({"class_names": None}, "not a whole cnnpipe model file"),
        ({"model": {"filters": 11, "kernel_size": 3}}, "not a whole .* size mismatch"),
        ({"model": {"kernel_size": 9}}, "not a whole .* smaller than 1 x 1"),
        ({"model": {"kernel_sise": 3}}, "not a whole cnnpipe model file: 1 validation error"),
        ({"preparation": {}}, "not a whole cnnpipe model file: 'mean'"),
        ({"preparation": 5}, "not a whole cnnpipe model file"),
    ],
)
def test_a_header_that_does_not_fit_the_weights_is_refused(
    make_classifier: Any, tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    path = tmp_path / "m.safetensors"
    classifier = make_classifier()
    classifier.save(path)
    header = {
        "format": "2",
        "model": classifier.model.model_dump(),
        "preparation": vars(classifier.preparation),
        "class_names": classifier.class_names,
        "run_id": "",
    }
    weights = load_file(path)
    save_file(weights, path, signed(json.dumps(header), weights))
    Classifier.load(path)  # unchanged, it is a model file
    save_file(weights, path, signed(json.dumps({**header, **change}), weights))
    with pytest.raises(UserError, match=expected) as error:
        Classifier.load(path)
    assert "\n" not in str(error.value)
