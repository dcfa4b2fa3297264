"""Copies and near-copies of an image, found by a perceptual hash and confirmed by the pixels.

A copy in the test split of an image in the training split makes the test score a lie.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import numpy as np
import scipy.fft

from cnnpipe.data.resizer import grey, resize
from cnnpipe.data.store import Images

# Re-encoded and resized copies of photos differ in 0 to 5 of the 64 bits.
_MAX_DISTANCE = 5
# Root mean square difference of 32 x 32 grey thumbnails, in grey levels: copies re-encoded as
# JPEG of quality 30 stay below 3, different photos and different handwritten digits are above 15.
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
    leader = np.arange(len(sha256))

    def find(row: int) -> int:
        while leader[row] != row:
            leader[row] = leader[leader[row]]
            row = leader[row]
        return row

    def join(a: int, b: int) -> None:
        low, high = sorted((find(a), find(b)))
        leader[high] = low

    first: dict[str, int] = {}
    for row, digest in enumerate(sha256):
        join(first.setdefault(digest, row), row)
    thumbnails: dict[int, np.ndarray] = {}
    for a, b in _similar(hashes):
        if find(a) != find(b):
            for row in (a, b):
                if row not in thumbnails:
                    thumbnails[row] = _thumbnail(images[row])
            if np.sqrt(np.mean((thumbnails[a] - thumbnails[b]) ** 2)) <= _MAX_DIFFERENCE:
                join(a, b)
    return np.array([find(row) for row in range(len(leader))])


def _similar(hashes: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs of rows whose hashes differ in at most `_MAX_DISTANCE` bits.

    Two such hashes agree in at least one of `_MAX_DISTANCE` + 1 bands, so only rows that share a
    band are compared.
    """
    codes = [int(text, 16) for text in hashes]
    rows_of: dict[int, list[int]] = defaultdict(list)
    for row, code in enumerate(codes):
        rows_of[code].append(row)
    for same in rows_of.values():
        yield from pairwise(same)
    distinct = list(rows_of)
    bands = _MAX_DISTANCE + 1
    width = -(-64 // bands)
    for band in range(bands):
        buckets: dict[int, list[int]] = defaultdict(list)
        for code in distinct:
            buckets[(code >> (band * width)) & ((1 << width) - 1)].append(code)
        for bucket in buckets.values():
            for a, b in combinations(bucket, 2):
                if (a ^ b).bit_count() <= _MAX_DISTANCE:
                    yield rows_of[a][0], rows_of[b][0]


def _thumbnail(image: np.ndarray) -> np.ndarray:
    shades = grey(image) if image.shape[2] == 3 else image
    return resize(shades, _THUMBNAIL, _THUMBNAIL)[:, :, 0].astype(np.float32)
