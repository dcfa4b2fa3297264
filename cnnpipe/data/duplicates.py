"""Copies and near-copies of an image, found by a perceptual hash and confirmed by the pixels.

A copy in the test split of an image in the training split makes the test score a lie.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations, product

import numpy as np
import scipy.fft

from cnnpipe.data.resizer import grey, resize
from cnnpipe.data.store import Images

# Measured on 1,399 photos of cats and dogs at 96 pixels: copies (of 400 of them) re-encoded as JPEG
# of quality 30, halved or doubled in size differ in at most 4 of the 64 bits; of different photos,
# no pair is within 10.
_MAX_DISTANCE = 5
# Root mean square difference of 32 x 32 grey thumbnails, in grey levels. On the same photos: 2.3
# at most re-encoded, 4.5 halved, 15.8 quartered (97 % are within 6); different photos above 20.
# scikit-learn's handwritten digits are above 7, and above 12 where their hashes are similar.
_MAX_DIFFERENCE = 6.0
_THUMBNAIL = 32


def perceptual_hash(image: np.ndarray) -> str:
    """16 hexadecimal digits that hardly change when an image is re-encoded or resized.

    Each bit says whether one of the 64 lowest frequencies of a 32 x 32 grey thumbnail is above
    their median.

    Args:
        image: (H, W, 1 or 3) uint8.

    Source: Zauner, "Implementation and benchmarking of perceptual image hash functions" (2010),
    section 3.2.1.
    """
    frequencies = scipy.fft.dctn(_thumbnail(image), norm="ortho")[:8, :8].ravel()
    bits = frequencies > np.median(frequencies[1:])  # the first is the mean brightness alone
    return np.packbits(bits).tobytes().hex()


def duplicate_groups(sha256: Sequence[str], hashes: Sequence[str], images: Images) -> np.ndarray:
    """The group of each image, (N,) int64: equal numbers for copies and near-copies.

    A group's number is the row of its first image.

    Args:
        sha256: of each file's bytes.
        hashes: `perceptual_hash` of each image.
        images: the images, to confirm what the hashes suggest.
    """
    leader = list(range(len(sha256)))

    def find(row: int) -> int:
        while leader[row] != row:
            leader[row] = leader[leader[row]]
            row = leader[row]
        return row

    def join(a: int, b: int) -> None:
        low, high = sorted((find(a), find(b)))
        leader[high] = low

    @cache
    def thumbnail(row: int) -> np.ndarray:
        return _thumbnail(images[row])

    def join_if_alike(a: int, b: int) -> None:
        if find(a) != find(b):
            difference = np.sqrt(np.mean((thumbnail(a) - thumbnail(b)) ** 2))
            if difference <= _MAX_DIFFERENCE:
                join(a, b)

    first: dict[str, int] = {}
    for row, digest in enumerate(sha256):
        join(first.setdefault(digest, row), row)
    rows_of: dict[int, list[int]] = defaultdict(list)
    for row in first.values():
        rows_of[int(hashes[row], 16)].append(row)
    for rows in rows_of.values():
        if len(rows) > 1:  # of thousands of black images, one is compared with the others
            looks: dict[bytes, int] = {}
            for row in rows:
                join(looks.setdefault(thumbnail(row).tobytes(), row), row)
            rows[:] = looks.values()
        for a, b in combinations(rows, 2):
            join_if_alike(a, b)
    for code, near in _similar(list(rows_of)):
        for a, b in product(rows_of[code], rows_of[near]):
            join_if_alike(a, b)
    return np.array([find(row) for row in range(len(leader))], np.int64)


def _similar(codes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Pairs of 64-bit codes, all different, that differ in at most `_MAX_DISTANCE` bits.

    Two such codes agree in at least one of `_MAX_DISTANCE` + 1 bands, so only codes that share a
    band are compared.
    """
    bands = _MAX_DISTANCE + 1
    width = -(-64 // bands)
    for band in range(bands):
        buckets: dict[int, list[int]] = defaultdict(list)
        for code in codes:
            buckets[(code >> (band * width)) & ((1 << width) - 1)].append(code)
        for bucket in buckets.values():
            for a, b in combinations(bucket, 2):
                if (a ^ b).bit_count() <= _MAX_DISTANCE:
                    yield a, b


def _thumbnail(image: np.ndarray) -> np.ndarray:
    shades = grey(image) if image.shape[2] == 3 else image
    return resize(shades, _THUMBNAIL, _THUMBNAIL)[:, :, 0].astype(np.float32)
