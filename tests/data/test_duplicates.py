"""Tests of the search for copies: what a re-encoder makes is found, what looks alike is not."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from stored import stored

from cnnpipe.data.decode import decode
from cnnpipe.data.duplicates import duplicate_groups, perceptual_hash
from cnnpipe.data.resizer import resize
from cnnpipe.data.store import Images

Photo = Callable[..., np.ndarray]
Encoded = Callable[..., bytes]
SIDE = 64


def groups_of(images: Sequence[np.ndarray], sha256: Sequence[str] | None = None) -> list[int]:
    """The groups of images of any size, each file's bytes different where nothing else is said."""
    resized = np.stack([resize(image, SIDE, SIDE) for image in images])
    names = sha256 or [str(i) for i in range(len(images))]
    return duplicate_groups(names, list(map(perceptual_hash, resized)), stored(resized)).tolist()


def bits_between(a: np.ndarray, b: np.ndarray) -> int:
    return (int(perceptual_hash(a), 16) ^ int(perceptual_hash(b), 16)).bit_count()


def test_a_hash_is_sixteen_hexadecimal_digits(photo: Photo) -> None:
    for image in (photo(50, 60), photo(1, 1, 1), np.zeros((8, 8, 3), np.uint8)):
        assert len(perceptual_hash(image)) == 16
        assert 0 <= int(perceptual_hash(image), 16) < 2**64


def test_hashes_of_copies_are_near_and_of_different_images_far(
    photo: Photo, encoded: Encoded
) -> None:
    images = [photo(120, 150, seed=seed) for seed in range(30)]
    for image in images:
        assert bits_between(image, decode(encoded(image, "JPEG", quality=50))) <= 5
        assert bits_between(image, resize(image, 60, 75)) <= 5
    assert min(bits_between(a, b) for i, a in enumerate(images) for b in images[:i]) > 5


def test_the_hash_does_not_depend_on_brightness(photo: Photo) -> None:
    image = photo(80, 80) // 2
    assert bits_between(image, image + 60) <= 2


def test_exact_copies_are_grouped_by_their_bytes_alone(photo: Photo) -> None:
    images = [photo(40, 40, seed=seed) for seed in range(4)]
    assert groups_of(images, ["a", "b", "a", "c"]) == [0, 1, 0, 3]


def test_reencoded_and_resized_copies_are_grouped(photo: Photo, encoded: Encoded) -> None:
    originals = [photo(200, 260, seed=seed) for seed in range(40)]
    reencoded = [decode(encoded(image, "JPEG", quality=50)) for image in originals]
    halved = [np.asarray(Image.fromarray(image).resize((130, 100))) for image in originals]
    assert groups_of([*originals, *reencoded, *halved]) == [*range(40)] * 3


def test_different_images_are_not_grouped(photo: Photo) -> None:
    images = [photo(90, 90, seed=seed) for seed in range(200)]
    assert groups_of(images) == list(range(200))


def test_a_mirrored_or_inverted_image_is_no_copy(photo: Photo) -> None:
    image = photo(90, 90)
    assert groups_of([image, image[:, ::-1], image[::-1], 255 - image]) == [0, 1, 2, 3]


def test_handwritten_digits_are_no_copies_of_each_other() -> None:
    digits = (load_digits().images * (255 / 16)).round().astype(np.uint8)[..., None]
    images = np.stack([resize(digit, 32, 32) for digit in digits])
    hashes = list(map(perceptual_hash, images))
    groups = duplicate_groups([str(i) for i in range(len(images))], hashes, stored(images))
    assert len(set(groups.tolist())) >= len(images) - 5


def test_groups_are_transitive(photo: Photo) -> None:
    # Each is 4 levels brighter than the one before; the last is too far from the first.
    steps = [photo(SIDE, SIDE) // 2 + 4 * i for i in range(4)]
    assert groups_of([steps[0], steps[3]]) == [0, 1]
    assert groups_of(steps) == [0, 0, 0, 0]
    assert groups_of([steps[i] for i in (3, 0, 2, 1)]) == [0, 0, 0, 0]


def test_a_stranger_of_the_same_hash_does_not_hide_a_copy(photo: Photo) -> None:
    image = photo(SIDE, SIDE, 1, seed=1)
    stranger = photo(SIDE, SIDE, 1, seed=2)
    near = image + (image < 250)
    code = perceptual_hash(image)
    images = stored(np.stack([image, stranger, near.astype(np.uint8)]))
    assert duplicate_groups(["a", "b", "c"], [code] * 3, images).tolist() == [0, 1, 0]
    other = f"{int(code, 16) ^ 0b111:016x}"
    order = stored(np.stack([stranger, image, near.astype(np.uint8)]))
    assert duplicate_groups(["a", "b", "c"], [code, code, other], order).tolist() == [0, 1, 1]


def test_hashes_up_to_five_bits_apart_are_compared_wherever_the_bits_are(photo: Photo) -> None:
    image = photo(SIDE, SIDE, 1)
    images = stored(np.stack([image, image]))
    rng = np.random.default_rng(0)
    for distance, expected in [(5, [0, 0])] * 50 + [(6, [0, 1])] * 20:
        code = int(rng.integers(2**63))
        other = code
        for bit in rng.choice(64, distance, replace=False).tolist():
            other ^= 1 << bit
        groups = duplicate_groups(["a", "b"], [f"{code:016x}", f"{other:016x}"], images)
        assert groups.tolist() == expected


def test_a_grey_image_and_the_same_in_three_channels_are_copies(photo: Photo) -> None:
    grey = photo(SIDE, SIDE, 1)
    assert bits_between(grey, np.repeat(grey, 3, axis=2)) <= 1


def test_25_000_images_are_compared_by_few_pairs() -> None:
    rng = np.random.default_rng(0)
    n = 25_000
    hashes = [f"{code:016x}" for code in rng.integers(0, 2**63, n).tolist()]
    thumbnails = rng.integers(0, 256, (n, 2, 2, 1), np.uint8)
    groups = duplicate_groups([str(i) for i in range(n)], hashes, stored(thumbnails))
    assert groups.tolist() == list(range(n))


class CountedImages(Images):
    """Images that count how often one is looked at."""

    looks = 0

    def __getitem__(self, rows: int | slice | np.ndarray) -> np.ndarray:
        self.looks += 1
        return super().__getitem__(rows)


def test_thousands_of_equal_flat_images_are_each_looked_at_once() -> None:
    black = np.zeros((2000, 28, 28, 1), np.uint8)
    images = CountedImages(stored(black)._shards)
    code = perceptual_hash(black[0])
    groups = duplicate_groups([str(i) for i in range(2000)], [code] * 2000, images)
    assert set(groups.tolist()) == {0}
    assert images.looks <= 2000


@pytest.mark.skipif("CNNPIPE_PHOTOS" not in os.environ, reason="CNNPIPE_PHOTOS names no folder")
def test_copies_of_real_photos_are_grouped_and_the_photos_are_not(encoded: Encoded) -> None:
    paths = sorted(Path(os.environ["CNNPIPE_PHOTOS"]).rglob("*.jpg"))[::14][:100]
    photos = [decode(path.read_bytes()) for path in paths]
    n = len(photos)
    reencoded = [decode(encoded(image, "JPEG", quality=50)) for image in photos]
    halved = [resize(image, image.shape[0] // 2, image.shape[1] // 2) for image in photos]
    assert n >= 10
    assert groups_of([*photos, *reencoded, *halved]) == [*range(n)] * 3
