"""Tests of the predictor: from a file's bytes to what the network says of the stored image."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stored import stored

from cnnpipe.data.decode import UnreadableImage, decode
from cnnpipe.data.resizer import prepare
from cnnpipe.errors import UserError
from cnnpipe.serving import Predictor, predictor
from cnnpipe.training.batches import Batches
from cnnpipe.training.loop import predict


def encoded(seed: int, kind: str = "png") -> bytes:
    """An image file of a size of its own."""
    chance = np.random.default_rng(seed)
    height, width = chance.integers(9, 40, 2)
    pixels = chance.integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("color", ["rgb", "grey"])
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_probabilities_of_a_file_are_those_of_the_stored_image(
    make_classifier: Any, tmp_path: Path, head: str, color: str
) -> None:
    classifier = make_classifier(color=color, head=head, flip_average=True)
    classifier.save(tmp_path / "m.safetensors")
    predictor = Predictor.load(tmp_path / "m.safetensors")
    files = [encoded(i, kind) for i, kind in enumerate(["png", "jpeg", "webp", "bmp"] * 3)]
    result = predictor.predict(files)
    images = stored(np.stack([prepare(decode(data), 8, "stretch", color) for data in files]))
    rows = np.arange(len(files))
    evaluated = predict(classifier, Batches(images, rows, rows, 64, torch.device("cpu")))
    assert result.dtype == np.float32
    assert result.shape == (12, 2)
    np.testing.assert_allclose(result, evaluated, rtol=1e-6)  # in batches sums differ a little
    assert len(np.unique(result[:, 0])) == 12  # every image has its own


@pytest.mark.parametrize(
    "settings", [{"size": 100}, {"architecture": "residual", "blocks": 2, "flip_average": True}]
)
def test_an_image_has_the_same_bits_alone_among_others_and_on_any_number_of_threads(
    make_classifier: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = make_classifier(**settings)
    files = [encoded(i) for i in range(40)]
    monkeypatch.setattr(predictor, "num_cores", lambda: 3)
    torch.set_num_threads(2)
    try:
        together = Predictor(classifier).predict(files)
        monkeypatch.setattr(predictor, "num_cores", lambda: 1)
        torch.set_num_threads(3)
        alone = Predictor(classifier)
        for i, file in enumerate(files):
            np.testing.assert_array_equal(alone.predict([file])[0], together[i])
    finally:
        torch.set_num_threads(1)


def test_images_are_taken_as_they_are_needed_and_answered_in_their_order(
    make_classifier: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor, "num_cores", lambda: 2)
    taken: list[int] = []

    def images() -> Iterator[bytes]:
        for i in range(70):
            taken.append(i)
            yield b"" if i == 3 else encoded(i)

    one = Predictor(make_classifier())
    answers = one.each(images())
    for i in range(70):
        answer = next(answers)
        assert len(taken) <= i + 5
        if i == 3:
            assert str(answer) == "empty file"
        else:
            np.testing.assert_array_equal(answer, one.predict([encoded(i)])[0])
    assert next(answers, None) is None


def test_no_images_give_no_rows(make_classifier: Any) -> None:
    result = Predictor(make_classifier(class_names=("a", "b", "c"))).predict([])
    assert result.shape == (0, 3)
    assert result.dtype == np.float32


@pytest.mark.parametrize("data", [b"", b"no image", encoded(0)[:40]])
def test_what_is_no_image_is_refused_with_the_reason(make_classifier: Any, data: bytes) -> None:
    with pytest.raises(UnreadableImage, match=r"empty file|not an image|damaged"):
        Predictor(make_classifier()).predict([encoded(0), data])


def test_class_names_are_the_models(make_classifier: Any) -> None:
    assert Predictor(make_classifier(class_names=("x", "y"))).class_names == ("x", "y")


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"m\.safetensors: no such file"):
        Predictor.load(tmp_path / "m.safetensors")
