"""Tests of the drawn data set: reproducible, varied, and no way to cheat."""

import numpy as np
import pytest
from numpy.typing import NDArray

from cnnpipe.data.drawn_pets import CLASS_NAMES, NUM_IMAGES, draw

Picture = tuple[str, NDArray[np.uint8]]


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return [draw(3, index) for index in range(200)]


def _best_threshold_accuracy(values: NDArray[np.float64], is_dog: NDArray[np.bool_]) -> float:
    """Accuracy of the best rule `value > threshold`, either way round."""
    guesses = values[:, None] > np.quantile(values, np.linspace(0.05, 0.95, 19))
    accuracy = (guesses == is_dog[:, None]).mean(axis=0)
    return float(np.maximum(accuracy, 1 - accuracy).max())


@pytest.mark.parametrize("index", [0, 1, NUM_IMAGES - 1])
def test_same_arguments_give_the_same_bytes(index: int) -> None:
    first, again = draw(7, index), draw(7, index)
    assert first[0] == again[0]
    np.testing.assert_array_equal(first[1], again[1])


def test_global_random_state_has_no_influence() -> None:
    np.random.seed(1)
    first = draw(7, 4)[1]
    np.random.seed(2)
    np.testing.assert_array_equal(first, draw(7, 4)[1])


@pytest.mark.parametrize("other", [(7, 6), (8, 4)])
def test_other_arguments_give_another_picture(other: tuple[int, int]) -> None:
    assert not np.array_equal(draw(7, 4)[1], draw(*other)[1])


def test_pictures_are_rgb_bytes_with_sides_in_range(pictures: list[Picture]) -> None:
    for _, image in pictures:
        assert image.dtype == np.uint8
        assert image.ndim == 3 and image.shape[2] == 3
        assert min(image.shape[:2]) >= 120 and max(image.shape[:2]) <= 640
        assert image.std() > 10


def test_aspect_ratios_and_sizes_differ(pictures: list[Picture]) -> None:
    aspects = np.array([image.shape[1] / image.shape[0] for _, image in pictures])
    long_sides = np.array([max(image.shape) for _, image in pictures])
    assert aspects.min() < 0.85 and aspects.max() > 1.15
    assert long_sides.min() < 160 and long_sides.max() > 400


def test_classes_alternate(pictures: list[Picture]) -> None:
    assert [name for name, _ in pictures] == list(CLASS_NAMES) * 100


@pytest.mark.parametrize("measure", ["width", "height", "red", "green", "blue", "brightness"])
def test_size_and_background_do_not_give_the_class_away(
    pictures: list[Picture], measure: str
) -> None:
    def measured(image: NDArray[np.uint8]) -> float:
        if measure in ("height", "width"):
            return float(image.shape[measure == "width"])
        corners = np.concatenate([image[:12, :12], image[:12, -12:]]).reshape(-1, 3).mean(axis=0)
        colours = dict(zip(("red", "green", "blue"), corners, strict=True))
        return float(colours.get(measure, corners.mean()))

    values = np.array([measured(image) for _, image in pictures])
    is_dog = np.array([name == "dog" for name, _ in pictures])
    # By chance the best of 19 thresholds on 200 pictures stays under 0.62 or so.
    assert _best_threshold_accuracy(values, is_dog) < 0.62
