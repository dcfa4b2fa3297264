"""Tests of the search for copies: whatever was done to one it is found, what looks alike is not."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from cnnpipe.data import duplicates as module
from cnnpipe.data.decode import decode
from cnnpipe.data.drawn_pets import draw
from cnnpipe.data.duplicates import SIDE, duplicate_groups, thumbnail
from cnnpipe.data.resizer import resize

Photo = Callable[..., np.ndarray]
Encoded = Callable[..., bytes]


def thumbnails(images: Sequence[np.ndarray]) -> np.ndarray:
    """Of images of any size."""
    return np.stack([thumbnail(resize(image, 96, 96)) for image in images])


def groups_of(images: Sequence[np.ndarray]) -> list[int]:
    """The groups of images of any size."""
    return duplicate_groups(thumbnails(images)).tolist()


def half(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    return np.asarray(Image.fromarray(image).resize((width // 2, height // 2)))


def cropped(image: np.ndarray, seed: int = 0) -> np.ndarray:
    """A twentieth to a tenth of the height and of the width cut off, some at each end."""
    rng = np.random.default_rng(seed)
    rows, columns = (int(length * rng.uniform(0.05, 0.1)) for length in image.shape[:2])
    top, left = rng.integers(0, rows + 1), rng.integers(0, columns + 1)
    return image[top : image.shape[0] - rows + top, left : image.shape[1] - columns + left]


@pytest.fixture
def made(encoded: Encoded) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Kinds of copies, by what is done to the image."""

    def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
        return decode(encoded(np.ascontiguousarray(image), "JPEG", quality=quality))

    return {
        "exact": lambda image: image,
        "re-encoded": lambda image: jpeg(image, 30),
        "halved": half,
        "mirrored": lambda image: image[:, ::-1],
        "cropped": cropped,
        "cropped at one side": lambda image: image[:, : int(0.91 * image.shape[1])],
        "cropped a little": lambda image: image[2:, :-3],
        "all of it": lambda image: jpeg(half(cropped(image)[:, ::-1]), 60),
    }


KINDS = ["exact", "re-encoded", "halved", "mirrored", "cropped", "cropped at one side",
         "cropped a little", "all of it"]  # fmt: skip


@pytest.fixture(scope="module")
def originals(photo: Photo) -> list[np.ndarray]:
    return [photo(200, 260, seed=seed) for seed in range(60)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_copy_is_grouped(originals: list[np.ndarray], made: dict, kind: str) -> None:
    small = thumbnails(originals)
    copies = thumbnails([made[kind](image) for image in originals])
    for both in ([small, copies], [copies, small]):  # whichever comes first
        assert duplicate_groups(np.concatenate(both)).tolist() == [*range(60)] * 2


def test_different_images_are_not_grouped(photo: Photo) -> None:
    images = [photo(90, 90, seed=seed) for seed in range(300)]
    assert groups_of(images) == list(range(300))


def test_an_upside_down_or_inverted_image_is_no_copy(photo: Photo) -> None:
    image = photo(90, 90)
    assert groups_of([image, image[::-1], 255 - image]) == [0, 1, 2]


@pytest.mark.parametrize("size", [16, 28, 64])
def test_handwritten_digits_are_no_copies_of_each_other(size: int) -> None:
    digits = (load_digits().images * (255 / 16)).round().astype(np.uint8)[..., None]
    small = np.stack([thumbnail(resize(digit, size, size)) for digit in digits])
    assert duplicate_groups(small).tolist() == [*range(len(small))]
    # Yet whole copies are found there, too, and mirror images.
    both = np.concatenate([small[:300], small[:300, :, ::-1]])
    assert duplicate_groups(both).tolist() == [*range(300)] * 2


def test_drawn_pets_are_no_copies_of_each_other() -> None:
    assert groups_of([draw(42, i)[1] for i in range(300)]) == [*range(300)]


def test_groups_are_transitive(photo: Photo) -> None:
    # Each shows a little less than the one before; the last is too far from the first.
    steps = [photo(200, 200)[:, : 200 - 12 * i] for i in range(5)]
    assert groups_of([steps[0], steps[4]]) == [0, 1]
    assert groups_of(steps) == [0] * 5
    assert groups_of([steps[i] for i in (3, 0, 4, 2, 1)]) == [0] * 5


def test_a_grey_image_and_the_same_in_three_channels_are_copies(photo: Photo) -> None:
    grey = photo(96, 96, 1)
    assert (thumbnail(grey) == thumbnail(np.repeat(grey, 3, axis=2))).mean() > 0.95


@pytest.mark.parametrize("number", [0, 1, 2])
def test_hardly_any_images_are_fine(photo: Photo, number: int) -> None:
    small = np.empty((number, SIDE, SIDE), np.uint8)
    for i in range(number):
        small[i] = thumbnail(photo(40, 40, seed=i))
    assert duplicate_groups(small).tolist() == [*range(number)]


def test_images_of_one_shade_are_grouped_by_that_shade() -> None:
    shades = np.repeat(np.arange(3, dtype=np.uint8), 1000)[:, None, None]
    small = np.broadcast_to(shades, (3000, SIDE, SIDE)).copy()
    groups = duplicate_groups(small)
    assert groups.tolist() == [0] * 1000 + [1000] * 1000 + [2000] * 1000


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pairs are compared by their pixels, at each time."""
    numbers: list[int] = []
    are_copies = module._are_copies

    def count(images: np.ndarray, *arguments: np.ndarray) -> np.ndarray:
        numbers.append(len(images))
        return are_copies(images, *arguments)

    monkeypatch.setattr(module, "_are_copies", count)
    return numbers


def test_of_many_images_few_pairs_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of random noise, smoothed to what photos have of each frequency.
    rng = np.random.default_rng(0)
    spectrum = 1 / (1 + np.add.outer(np.arange(8), np.arange(8)))
    noise = rng.normal(size=(6000, 8, 8)) * spectrum
    cosines = np.cos(np.pi * np.outer(np.arange(8), (np.arange(SIDE) + 0.5) / SIDE))
    small = (128 + 40 * (cosines.T @ noise @ cosines)).clip(0, 255).astype(np.uint8)
    numbers = counted(monkeypatch)
    groups = duplicate_groups(small)
    assert groups.tolist() == [*range(6000)]
    assert sum(numbers) < 6000


def test_a_burst_of_one_scene_is_one_group_without_comparing_all_its_pairs(
    photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = np.stack([thumbnail(photo(96, 96, seed=seed)) for seed in range(4)])
    rng = np.random.default_rng(0)
    burst = np.repeat(scenes, 1500, axis=0) + rng.normal(0, 3, (6000, SIDE, SIDE))
    numbers = counted(monkeypatch)
    groups = duplicate_groups(burst.clip(0, 255).round().astype(np.uint8))
    assert groups.tolist() == [*np.repeat([0, 1500, 3000, 4500], 1500)]
    assert sum(numbers) < 6000 * 200  # of 4.5 million


@pytest.mark.skipif("CNNPIPE_PHOTOS" not in os.environ, reason="CNNPIPE_PHOTOS names no folder")
@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_real_photos_are_grouped_and_the_photos_are_not(made: dict, kind: str) -> None:
    paths = sorted(Path(os.environ["CNNPIPE_PHOTOS"]).rglob("*.jpg"))[::14][:100]
    photos = [decode(path.read_bytes()) for path in paths]
    assert len(photos) >= 10
    assert groups_of([*photos, *map(made[kind], photos)]) == [*range(len(photos))] * 2
