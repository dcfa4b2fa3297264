"""Tests of resizing: scikit-image's own pixels, whatever the sizes, and what becomes of aspects."""

from collections.abc import Callable

import numpy as np
import pytest
import skimage.color
import skimage.transform
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnpipe.data import resizer
from cnnpipe.data.resizer import _precision, grey, operator, prepare, resize

Photo = Callable[..., np.ndarray]
sides = st.integers(1, 160)


def by_scikit_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    resized = skimage.transform.resize(
        image, (height, width), order=1, anti_aliasing=True, preserve_range=True
    )
    return np.rint(resized).astype(np.uint8)


def levels_off(image: np.ndarray, height: int, width: int) -> np.ndarray:
    ours, theirs = resize(image, height, width), by_scikit_image(image, height, width)
    assert ours.shape == (height, width, image.shape[2])
    assert ours.dtype == np.uint8
    return np.abs(ours.astype(int) - theirs)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(sides, sides, sides, sides, st.sampled_from([1, 3]), st.sampled_from(["noise", "edges"]))
def test_no_pixel_is_more_than_a_level_from_scikit_images(
    rows: int, columns: int, height: int, width: int, channels: int, content: str
) -> None:
    rng = np.random.default_rng([rows, columns, height, width])
    image = rng.integers(0, 256, (rows, columns, channels), np.uint8)
    if content == "edges":
        image = np.where(image > 127, 255, 0).astype(np.uint8)
    assert levels_off(image, height, width).max() <= 1


def test_hardly_any_pixel_of_a_photo_differs_from_scikit_images_at_all(photo: Photo) -> None:
    rng = np.random.default_rng(0)
    differing = total = 0
    for seed in range(60):
        rows, columns, height, width = rng.integers(20, 300, 4)
        off = levels_off(
            photo(rows, columns, channels=1 + 2 * (seed % 2), seed=seed), height, width
        )
        assert off.max() <= 1
        differing += np.count_nonzero(off)
        total += off.size
    assert total > 1_000_000
    assert differing < 0.001 * total


@pytest.mark.parametrize(
    "shape",
    [(400, 360), (400, 400), (375, 400), (310, 330), (240, 240), (375, 500), (299, 301)],
)
def test_values_midway_between_two_levels_are_rounded_as_scikit_images_too(
    photo: Photo, shape: tuple[int, int]
) -> None:
    # Between sizes of simple ratios there are many; in float32 up to 4 % would be a level off.
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    for image in (photo(*shape), noise):
        off = levels_off(image, 300, 300)
        assert off.max() <= 1
        assert np.count_nonzero(off) < 0.001 * off.size


def test_float64_is_taken_only_where_it_matters() -> None:
    assert _precision(400, 360, 300, 300) is np.float64
    assert _precision(240, 240, 300, 300) is np.float64
    assert _precision(375, 500, 300, 300) is np.float32  # the Gaussian is wide in one direction
    assert _precision(357, 411, 300, 300) is np.float32  # no simple ratio


@pytest.mark.parametrize("stripe", [1, 7, 50, 1000])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_stripes_that_an_image_is_worked_on_in_do_not_show(
    photo: Photo, monkeypatch: pytest.MonkeyPatch, stripe: int, channels: int
) -> None:
    image = photo(90, 120, channels)
    whole = resize(image, 40, 50)
    monkeypatch.setattr(resizer, "_STRIPE", stripe)
    resizer._stripes.cache_clear()
    np.testing.assert_array_equal(resize(image, 40, 50), whole)
    resizer._stripes.cache_clear()


@pytest.mark.parametrize(
    ("shape", "target"),
    [
        ((375, 500), (300, 300)),
        ((400, 400), (300, 300)),  # a simple ratio: many values halfway between two levels
        ((8, 8), (32, 32)),
        ((1, 1), (5, 7)),
        ((1, 640), (300, 1)),
        ((640, 480), (1, 1)),
        ((2000, 3), (20, 30)),
    ],
)
def test_usual_and_extreme_sizes_are_scikit_images_too(
    photo: Photo, shape: tuple[int, int], target: tuple[int, int]
) -> None:
    assert levels_off(photo(*shape), *target).max() <= 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.integers(1, 300))
def test_the_operator_is_scikit_images_answer_to_each_lit_pixel(size: int, target: int) -> None:
    answers = skimage.transform.resize(np.eye(size), (target, size), order=1, anti_aliasing=True)
    np.testing.assert_allclose(operator(size, target).toarray(), answers, atol=1e-7)


def test_a_side_of_a_large_photo_takes_a_small_operator() -> None:
    matrix = operator(12_000, 300)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-5)
    assert matrix.nnz < 300 * 250


@pytest.mark.parametrize("mode", ["stretch", "crop", "pad"])
def test_the_same_size_gives_an_equal_copy(photo: Photo, mode: str) -> None:
    image = photo(30, 40)
    result = resize(image, 30, 40, mode)
    np.testing.assert_array_equal(result, image)
    assert not np.shares_memory(result, image)


def test_any_part_of_an_image_can_be_resized_whatever_its_memory_layout(photo: Photo) -> None:
    image = photo(60, 80)
    part = image[5:50:2, ::-1]
    np.testing.assert_array_equal(resize(part, 20, 20), resize(part.copy(), 20, 20))


@pytest.mark.parametrize(
    ("shape", "target", "kept"),
    [
        ((60, 100), (30, 30), (slice(None), slice(20, 80))),
        ((100, 60), (30, 30), (slice(20, 80), slice(None))),
        ((60, 100), (15, 50), (slice(15, 45), slice(None))),
        ((20, 30), (40, 40), (slice(None), slice(5, 25))),
    ],
)
def test_crop_keeps_the_middle_of_the_longer_side(
    photo: Photo,
    shape: tuple[int, int],
    target: tuple[int, int],
    kept: tuple[slice, slice],
) -> None:
    image = photo(*shape)
    np.testing.assert_array_equal(resize(image, *target, "crop"), resize(image[kept], *target))


@pytest.mark.parametrize(
    ("shape", "target", "filled"),
    [
        ((60, 100), (50, 50), (slice(10, 40), slice(None))),
        ((100, 60), (50, 50), (slice(None), slice(10, 40))),
        ((10, 20), (40, 40), (slice(10, 30), slice(None))),
        ((30, 30), (20, 60), (slice(None), slice(20, 40))),
    ],
)
def test_pad_keeps_the_whole_image_in_the_middle_between_black_bars(
    photo: Photo,
    shape: tuple[int, int],
    target: tuple[int, int],
    filled: tuple[slice, slice],
) -> None:
    image = photo(*shape)
    expected = np.zeros((*target, 3), np.uint8)
    height, width = expected[filled].shape[:2]
    expected[filled] = resize(image, height, width)
    np.testing.assert_array_equal(resize(image, *target, "pad"), expected)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sides, sides, sides, sides, st.sampled_from(["crop", "pad"]))
def test_every_mode_gives_the_size_asked_for_even_of_a_line(
    rows: int, columns: int, height: int, width: int, mode: str
) -> None:
    white = np.full((rows, columns, 1), 255, np.uint8)
    result = resize(white, height, width, mode)
    assert result.shape == (height, width, 1)
    assert result.max() == 255
    if mode == "crop":
        assert result.min() == 255


def test_an_unknown_mode_is_refused(photo: Photo) -> None:
    with pytest.raises(ValueError, match="'squeeze', not stretch, crop or pad"):
        resize(photo(4, 4), 2, 2, "squeeze")


def test_grey_is_scikit_images_luminance(photo: Photo) -> None:
    image = photo(50, 70)
    expected = np.rint(skimage.color.rgb2gray(image) * 255)
    assert grey(image).shape == (50, 70, 1)
    assert np.abs(grey(image)[:, :, 0] - expected).max() <= 1
    for shade in (0, 1, 128, 255):
        np.testing.assert_array_equal(grey(np.full((2, 2, 3), shade, np.uint8)), shade)


@pytest.mark.parametrize(("color", "channels"), [("rgb", 3), ("grey", 1)])
def test_the_network_is_shown_a_square_of_one_or_three_channels(
    photo: Photo, color: str, channels: int
) -> None:
    image = photo(40, 60)
    shown = prepare(image, 24, "pad", color)
    assert shown.shape == (24, 24, channels)
    source = grey(image) if color == "grey" else image
    np.testing.assert_array_equal(shown, resize(source, 24, 24, "pad"))
