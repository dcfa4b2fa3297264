"""Copies of an image, found whatever was done to them: re-encoded, resized, mirrored, or cropped.

A copy in the test split of an image in the training split makes the test score a lie.

All is done on grey thumbnails, at a cost that grows with the number of images and not with that of
their pairs. An image is described by its lowest frequencies, once whole and once for each of some
windows, as it is and mirrored. Where the signs of a few of them agree with those of another whole
image, the two are compared by all frequencies, and at last, aligned to a fraction of a pixel, by
their pixels.
"""

import hashlib
from collections.abc import Iterator
from itertools import product

import numpy as np
import scipy.fft
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cnnpipe.data.resizer import grey, resize

SIDE = 32
"""Height and width of a thumbnail, pixels."""

# The thresholds were measured on 1,399 photos of cats and dogs at 96 pixels, a third of them also
# as copies, see benchmarks/duplicates.py. There, of crops by up to a tenth, the signs differ in at
# most 10 of 63 and the correlation is 0.96 or more; of random pairs one in a thousand has as few
# as 15 that differ.
_MOST_SIGNS = 12
_LEAST_CORRELATION = 0.93
# Root mean square difference of the aligned thumbnails over the copy's standard deviation: at most
# 0.11 of copies, 0.37 and more of different photos, 0.30 of different drawn-pets.
_MOST_DIFFERENCE = 0.2
# And in grey levels where nothing had to be aligned. scikit-learn's handwritten digits, of which
# none is a copy, are above 7.
_MOST_LEVELS = 6.0
# How much the tenth nearest of the other images correlates with an image, in the median: 0.59 among
# the photos, 0.72 among drawn-pets, and 0.93 among the digits. In data as these an image shifted a
# little is as likely another one, and no crops are looked for.
_ALIKE = 0.8
_NEAREST = 10

_FREQUENCIES = 8
"""In each direction, the constant one left out later."""
_SCALES = (0.95, 0.9)
_TABLES = 4
_STEADY = 27
"""Of the 63, those that a small shift leaves alone."""
_LEAST_CERTAIN = 2
"""So many of the signs that decide where a table is looked up may be wrong."""
_MOST_NEIGHBOURS = 64
"""That one look-up may give: of a burst of images of one look not all pairs are needed."""
_CHUNK = 512
_BLUR = sum(np.eye(SIDE, k=k, dtype=np.float32) * (2 - abs(k)) / 4 for k in (-1, 0, 1))
_MIRROR = np.tile((-1.0) ** np.arange(_FREQUENCIES), _FREQUENCIES)[1:].astype(np.float32)
"""A mirrored image's frequencies over the image's: those odd across change their signs."""


def thumbnail(image: np.ndarray) -> np.ndarray:
    """A small grey copy: (H, W, 1 or 3) uint8 to (32, 32) uint8."""
    shades = grey(image) if image.shape[2] == 3 else image
    return resize(shades, SIDE, SIDE)[:, :, 0]


def duplicate_groups(thumbnails: np.ndarray) -> np.ndarray:
    """The group of each image, (N,) int64: equal numbers for copies of each other.

    A group's number is the row of its first image.

    Args:
        thumbnails: (N, 32, 32) uint8, of each image.
    """
    # By checksums, as sorting the thumbnails themselves would take their memory once more.
    looks = np.array([hashlib.sha256(each.data).digest() for each in thumbnails], "S32")
    _, first, by_look = np.unique(looks, return_index=True, return_inverse=True)
    # Each image is joined to the first of its look, and then looks are.
    edges = [np.stack([np.arange(len(looks)), first[by_look]])]
    edges += _alike(thumbnails, first)
    return _first_connected(np.concatenate(edges, axis=1), len(looks))


def _alike(thumbnails: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Pairs, (2, n), of these rows that show the same, enough of them to connect all that do."""
    # What is of one shade has nothing to compare.
    deviations = [thumbnails[part].std(axis=(1, 2)) for part in _parts(rows)]
    rows = rows[np.concatenate([np.empty(0), *deviations]) >= 1]
    if len(rows) < 2:
        return
    # Of the thumbnails a part at a time: a copy of all would take their memory once more.
    frequencies = [_frequencies(thumbnails[part], _spans(1.0)) for part in _parts(rows)]
    whole = np.concatenate(frequencies)[:, 0]
    crops = not _are_all_alike(whole)
    spans = _spans(1.0, *_SCALES) if crops else _spans(1.0)
    windows = _windows(spans)
    index = _Index(whole)
    group = np.arange(len(rows))
    found = np.empty((2, 0), np.int64)
    for start in range(0, len(rows), _CHUNK):
        some = thumbnails[rows[start : start + _CHUNK]]
        a, b, window, mirrored = index.candidates(some, start, spans)
        new = group[a] != group[b]
        a, b, window, mirrored = a[new], b[new], window[new], mirrored[new]
        for part in _parts(np.arange(len(a))):
            copies = _are_copies(
                thumbnails[rows[a[part]]], thumbnails[rows[b[part]]],
                windows[window[part]], mirrored[part], crops,
            )  # fmt: skip
            found = np.append(found, np.stack([a[part], b[part]])[:, copies], axis=1)
        if found.size > len(rows) / 10:  # so many that it pays to know what is connected by now
            yield rows[found]
            before = np.stack([np.arange(len(rows)), group])
            group = _first_connected(np.append(found, before, axis=1), len(rows))
            found = np.empty((2, 0), np.int64)
    yield rows[found]


def _first_connected(edges: np.ndarray, number: int) -> np.ndarray:
    """For each row the first of those that the edges, (2, n), connect it with, (number,)."""
    graph = coo_array((np.ones(edges.shape[1], bool), (edges[0], edges[1])), (number, number))
    component = connected_components(graph, directed=False)[1]
    return np.asarray(np.unique(component, return_index=True)[1][component], np.int64)


def _parts(array: np.ndarray) -> list[np.ndarray]:
    return [array[start : start + _CHUNK] for start in range(0, len(array), _CHUNK)]


def _spans(*scales: float) -> np.ndarray:
    """Spans of these shares of a side, at both its ends and amid it, (n, 2): begin, length."""
    spans = {(edge * (1 - scale), scale) for scale in scales for edge in (0, 0.5, 1)}
    return np.array(sorted(spans, key=lambda span: (-span[1], span[0])), np.float32)


def _windows(spans: np.ndarray) -> np.ndarray:
    """All windows of these spans, (n * n, 4): left, width, top, height, in sides."""
    return np.array([[*across, *down] for down, across in product(spans, spans)])


def _sampling(begin: np.ndarray, length: np.ndarray) -> np.ndarray:
    """(n, 32, 32) float32: the operators from an axis to the pixels of each span of it."""
    centres = (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE
    positions = (begin[:, None] + length[:, None] * centres) * SIDE - 0.5
    positions = positions.clip(0, SIDE - 1)
    weights = 1 - np.abs(positions[:, :, None] - np.arange(SIDE))
    return np.asarray(np.maximum(0, weights), np.float32)


def _frequencies(thumbnails: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """The lowest frequencies of all windows, (n, windows, 63) float32, without the constant one."""
    cosines = scipy.fft.dct(np.eye(SIDE), norm="ortho", axis=0)[:_FREQUENCIES]
    operator = (cosines @ _sampling(*spans.T)).reshape(-1, SIDE).astype(np.float32)
    result = operator @ thumbnails.astype(np.float32) @ operator.T
    shape = (len(thumbnails), len(spans), _FREQUENCIES, len(spans), _FREQUENCIES)
    windows = result.reshape(shape).transpose(0, 1, 3, 2, 4)
    return np.asarray(windows.reshape(len(thumbnails), len(spans) ** 2, -1)[..., 1:])


def _are_all_alike(whole: np.ndarray) -> bool:
    """Whether the images of this data are like each other anyway, though none is a copy."""
    if len(whole) < 2 * _NEAREST:
        return False
    unit = _unit(whole)
    order = np.random.default_rng(0).permutation(len(unit))
    correlation = unit[order[:500]] @ unit[order[:5000]].T
    rank = min(_NEAREST, len(unit) // 5) + 1  # the first is the image itself
    return bool(np.median(np.partition(correlation, -rank, axis=1)[:, -rank]) > _ALIKE)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True).clip(1e-6))


def _signs(frequencies: np.ndarray) -> np.ndarray:
    """(..., 63) to (...) uint64, a bit each."""
    padded = np.zeros((*frequencies.shape[:-1], 64), bool)
    padded[..., 1:] = frequencies > 0
    return np.packbits(padded, axis=-1).view(np.uint64)[..., 0]


class _Index:
    """Whole images by the signs of some of their frequencies, a different choice for each table."""

    def __init__(self, whole: np.ndarray) -> None:
        self._unit = _unit(whole)
        self._signs = _signs(whole)
        self._scale = np.abs(whole).mean(axis=0).clip(1e-6)
        order = np.add.outer(np.arange(_FREQUENCIES), np.arange(_FREQUENCIES)).ravel()[1:]
        steady = np.argsort(order, kind="stable")  # the lowest are the surest
        self._tables = []
        for table in range(_TABLES):
            choice = np.random.default_rng(table).permutation(steady[:_STEADY])
            choice = np.append(choice, steady[_STEADY:])
            # More of them where images are many, or alike, so that a look-up gives few.
            for bits in range(min(_STEADY, len(whole).bit_length() + 1), 48, 3):
                keys = _keys(whole[:, choice[:bits]])
                values, counts = np.unique(keys, return_counts=True)
                if np.square(counts, dtype=float).sum() <= 8 * len(whole):
                    break
            rows = np.lexsort((self._signs, keys))
            self._tables.append((choice[:bits], values, np.cumsum(counts) - counts, counts, rows))

    def candidates(
        self, thumbnails: np.ndarray, start: int, spans: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Pairs that may be copies: the row, the row of its copy, the window, and if mirrored.

        Args:
            thumbnails: (n, 32, 32) uint8.
            start: the row of the first.
            spans: (s, 2), of whose windows one may be what the copy shows.
        """
        straight = _frequencies(thumbnails, spans)
        num_queries = 2 * straight.shape[1]  # of an image
        queries = np.stack([straight, straight * _MIRROR], axis=2).reshape(-1, straight.shape[-1])
        signs = _signs(queries)
        own_row = start + np.arange(len(queries)) // num_queries
        found = [np.empty((2, 0), np.int64)]
        for choice, values, begins, counts, rows in self._tables:
            chosen = queries[:, choice]
            certainty = np.abs(chosen) / self._scale[choice]
            doubtful = np.argpartition(certainty, _LEAST_CERTAIN, axis=1)[:, :_LEAST_CERTAIN]
            for flipped in product((0, 1), repeat=_LEAST_CERTAIN):
                key = _keys(chosen) ^ ((1 << doubtful) * np.array(flipped)).sum(axis=1)
                place = np.searchsorted(values, key).clip(max=len(values) - 1)
                query = np.flatnonzero(values[place] == key)
                begin, count = begins[place[query]], counts[place[query]]
                number = np.minimum(count, _MOST_NEIGHBOURS)
                # Of too many some, others for each image.
                begin = begin + own_row[query] * 7919 % (count - number + 1)
                ends = np.cumsum(number)
                other = np.arange(number.sum()) + np.repeat(begin - ends + number, number)
                query, other = np.repeat(query, number), rows[other]
                near = np.bitwise_count(signs[query] ^ self._signs[other]) <= _MOST_SIGNS
                near &= other != own_row[query]
                found.append(np.stack([query[near], other[near]]))
        query, other = np.unique(np.concatenate(found, axis=1), axis=1)
        correlation = np.sum(_unit(queries[query]) * self._unit[other], axis=1)
        like = correlation >= _LEAST_CORRELATION
        query, other, correlation = query[like], other[like], correlation[like]
        # Of each pair the best window.
        order = np.lexsort((-correlation, other, own_row[query]))
        query, other = query[order], other[order]
        best = np.diff(own_row[query], prepend=-1) != 0
        best |= np.diff(other, prepend=-1) != 0
        query, other = query[best], other[best]
        return own_row[query], other, query % num_queries // 2, query % 2 == 1


def _keys(frequencies: np.ndarray) -> np.ndarray:
    """The signs as one number each, (n, up to 63) to (n,) int64."""
    return (frequencies > 0) @ (1 << np.arange(frequencies.shape[1], dtype=np.int64))


def _are_copies(
    images: np.ndarray,
    copies: np.ndarray,
    windows: np.ndarray,
    mirrored: np.ndarray,
    crops: bool,
) -> np.ndarray:
    """Whether each copy shows its image, (n,) bool.

    Args:
        images: (n, 32, 32) uint8.
        copies: (n, 32, 32) uint8.
        windows: (n, 4) left, width, top, height of the image, or of its mirror image.
        mirrored: (n,) whether it is the mirror image.
        crops: whether it may also show the window, or one nearby.
    """
    image, copy = images.astype(np.float32), copies.astype(np.float32)
    place = windows.astype(np.float64)
    image[mirrored] = image[mirrored, :, ::-1]
    place[mirrored, 0] = 1 - place[mirrored, 0] - place[mirrored, 1]
    deviation = copy.std(axis=(1, 2))
    levels = np.sqrt(np.mean((image - copy) ** 2, axis=(1, 2)))
    same = levels <= np.minimum(_MOST_LEVELS, _MOST_DIFFERENCE * deviation)
    if crops:
        rest = np.flatnonzero(~same)
        difference = _difference(image[rest], copy[rest], place[rest])
        same[rest] = difference <= _MOST_DIFFERENCE * deviation[rest]
    return np.asarray(same)


def _difference(image: np.ndarray, copy: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Root mean square difference of each copy to the best window near the given one, (n,).

    Source: Lucas and Kanade, "An iterative image registration technique" (1981), here for the four
    numbers of a window.
    """
    steps = ((np.arange(SIDE) + 0.5) / SIDE).astype(np.float32)
    slope_across, slope_down = (np.gradient(image, axis=axis) * SIDE for axis in (2, 1))
    least = np.full(len(image), np.inf)
    for _ in range(6):
        across = _sampling(place[:, 0], place[:, 1]).transpose(0, 2, 1)
        down = _sampling(place[:, 2], place[:, 3])
        difference = copy - down @ image @ across
        # Smoothed: what is finer than a thumbnail's pixel falls into it this way or that.
        smooth = _BLUR @ difference @ _BLUR
        least = np.minimum(least, np.sqrt(np.mean(smooth**2, axis=(1, 2))))
        horizontal, vertical = down @ slope_across @ across, down @ slope_down @ across
        jacobian = np.stack(
            [horizontal, horizontal * steps, vertical, vertical * steps[:, None]], axis=1
        ).reshape(-1, 4, SIDE * SIDE)
        normal = jacobian @ jacobian.transpose(0, 2, 1) + np.eye(4) * SIDE
        gradient = jacobian @ difference.reshape(-1, SIDE * SIDE, 1)
        place = place + np.linalg.solve(normal, gradient)[:, :, 0].clip(-0.05, 0.05)
        place[:, 1::2] = place[:, 1::2].clip(0.8, 1)
        place[:, ::2] = place[:, ::2].clip(0, 1 - place[:, 1::2])
    return least
