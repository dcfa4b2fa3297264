"""scikit-image's own resized pixels, many times as fast.

Along one axis `skimage.transform.resize` (order 1, anti-aliasing) is linear, and the two axes
separate. So there is an operator from n to m pixels, what scikit-image makes of the n x n identity
matrix; it is banded, a few entries a row, and an image is resized by two sparse products. Of the
rounded values hardly any is a level off, none more. `resize` stage and prediction both go through
`prepare`, so that a model sees the same pixels in both.
"""

from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

import numpy as np
import scipy.sparse

# skimage.color.rgb2gray's weights: ITU-R BT.709 luminance for contemporary CRT phosphors.
_LUMINANCE = np.array([0.2125, 0.7154, 0.0721], dtype=np.float32)
_STRIPE = 64
"""Pixels of the result worked on at a time, so that what is between stays in the processor's cache.
Whole, a photo of 500 x 375 takes 1.1 times as long, and one of 12 million pixels twice the memory.
"""


def operator(size: int, target: int) -> scipy.sparse.csr_array:
    """The (target, size) float64 matrix that resizes one axis as scikit-image does.

    That is a Gaussian against aliasing, of standard deviation (size / target - 1) / 2 and cut off
    at four of these, and then the linear interpolation between two of its values; beyond the ends
    the axis is mirrored. An entry is computed only where it is not zero, about 4 x size of them:
    a strip of 65,535 x 1 pixels is resized like any other image.

    Source: `skimage.transform.resize` with order 1 and anti-aliasing, which calls SciPy's
    `gaussian_filter` and `zoom`.
    """
    ratio = size / target
    sigma = max(0.0, (ratio - 1) / 2)
    radius = int(4 * sigma + 0.5)
    taps = np.arange(-radius, radius + 2)
    gaussian = np.exp(-0.5 * (taps[:-1] / sigma) ** 2) if radius else np.ones(1)
    gaussian /= gaussian.sum()
    centres = (np.arange(target) + 0.5) * ratio - 0.5
    below = np.floor(centres).astype(int)
    share = (centres - below)[:, None]
    values = (1 - share) * np.append(gaussian, 0) + share * np.insert(gaussian, 0, 0)
    period = max(1, 2 * (size - 1))
    columns = np.abs(below[:, None] + taps) % period  # (target, taps): the pixels that count
    columns = np.minimum(columns, period - columns) if size > 1 else columns * 0
    rows = np.broadcast_to(np.arange(target)[:, None], columns.shape)
    kept = values > 1e-15  # less is below what float64 resolves
    return scipy.sparse.coo_array(
        (values[kept], (rows[kept], columns[kept])), shape=(target, size)
    ).tocsr()


def resize(image: np.ndarray, height: int, width: int, mode: str = "stretch") -> np.ndarray:
    """The image at another size: (H, W, C) uint8 to (height, width, C) uint8.

    Args:
        image: (H, W, C) uint8.
        height: pixels, at least 1.
        width: pixels, at least 1.
        mode: `stretch` ignores the aspect; `crop` keeps it and cuts the longer side's ends off;
            `pad` keeps it and fills the shorter side up with black, the image in the middle.

    Raises:
        ValueError: the mode is none of these.
    """
    if mode == "stretch":
        return _stretch(image, height, width)
    rows, columns = image.shape[:2]
    if mode == "crop":
        scale = min(rows / height, columns / width)
        cut_rows = max(1, min(rows, round(height * scale)))
        cut_columns = max(1, min(columns, round(width * scale)))
        top, left = (rows - cut_rows) // 2, (columns - cut_columns) // 2
        return _stretch(image[top : top + cut_rows, left : left + cut_columns], height, width)
    if mode == "pad":
        scale = min(height / rows, width / columns)
        inner_height = max(1, min(height, round(rows * scale)))
        inner_width = max(1, min(width, round(columns * scale)))
        top, left = (height - inner_height) // 2, (width - inner_width) // 2
        padded = np.zeros((height, width, image.shape[2]), np.uint8)
        inner = _stretch(image, inner_height, inner_width)
        padded[top : top + inner_height, left : left + inner_width] = inner
        return padded
    raise ValueError(f"mode is {mode!r}, not stretch, crop or pad")


def prepare(image: np.ndarray, size: int, mode: str, color: str) -> np.ndarray:
    """What the network is shown of an image: (H, W, 3) uint8 to (size, size, 3 or 1) uint8."""
    return resize(grey(image) if color == "grey" else image, size, size, mode)


def grey(image: np.ndarray) -> np.ndarray:
    """The luminance: (H, W, 3) uint8 to (H, W, 1) uint8, with `skimage.color.rgb2gray`'s weights.

    Source: Poynton, "Frequently asked questions about colour", question 9.
    """
    return np.asarray(np.rint(image @ _LUMINANCE), dtype=np.uint8)[:, :, None]


def _stretch(image: np.ndarray, height: int, width: int) -> np.ndarray:
    rows, columns, channels = image.shape
    if (rows, columns) == (height, width):
        return image.copy()
    _keep_freed_buffers()
    dtype = _precision(rows, columns, height, width)
    flat = np.ascontiguousarray(image).reshape(rows, columns * channels)
    turned = np.empty((columns * channels, height), dtype)
    for target, source, stripe in _stripes(rows, height, dtype):
        turned[:, target] = (stripe @ flat[source].astype(dtype)).T
    # The channels of a pixel are neighbours: what was a column of pixels is now one row.
    turned = turned.reshape(columns, channels * height)
    result = np.empty((height, width * channels), np.uint8)
    for target, source, stripe in _stripes(columns, width, dtype):
        # Weights are not negative and sum to 1: no value leaves 0-255 by more than rounding.
        part = np.rint(stripe @ turned[source]).astype(np.uint8).reshape(-1, height)
        result[:, target.start * channels : target.stop * channels] = part.T
    return result.reshape(height, width, channels)


@cache
def _keep_freed_buffers() -> None:
    """Makes glibc keep buffers of up to 31 MB that are freed, for the next image.

    It would give those of a few megabytes back to the system and get them again as untouched pages,
    each of which costs a fault: 240 an image of 500 x 375, and 1.3 times the time. What it keeps
    follows from the largest buffer that was ever freed, and 32 MB is the most it heeds.
    """
    np.empty(31 << 20, np.uint8)


@lru_cache(maxsize=1024)  # an operator takes about 15 KB; photos come in a few hundred sizes
def _stripes(
    size: int, target: int, dtype: Any
) -> list[tuple[slice, slice, scipy.sparse.csr_array]]:
    """The operator in stripes: (pixels of the result, pixels they come from, what lies between)."""
    matrix = operator(size, target)
    if dtype == np.float32:  # what it does not resolve would cost up to half of the time
        matrix.data[matrix.data < 1e-9] = 0
        matrix.eliminate_zeros()
    stripes = []
    for start in range(0, target, _STRIPE):
        stop = min(start + _STRIPE, target)
        ends = matrix.indptr[start : stop + 1]
        entries = slice(ends[0], ends[-1])
        columns = matrix.indices[entries]
        first, last = int(columns.min()), int(columns.max()) + 1
        stripe = scipy.sparse.csr_array(
            (matrix.data[entries].astype(dtype), columns - first, ends - ends[0]),
            shape=(stop - start, last - first),
        )
        stripes.append((slice(start, stop), slice(first, last), stripe))
    return stripes


@lru_cache(maxsize=1024)
def _precision(rows: int, columns: int, height: int, width: int) -> Any:
    """The type to compute in: float32, or float64 where many values lie midway between two levels.

    That is so between sizes of simple ratios, such as 400 to 300 pixels, as long as the Gaussian is
    so narrow that its outer weights, though they decide which way such a value is rounded, are
    below what float32 resolves. There up to 4 % of float32's values would be a level off; elsewhere
    at most 0.05 % are, and float32 takes 0.7 times as long.
    """
    ratios = Fraction(rows, height), Fraction(columns, width)
    simple = ratios[0].denominator * ratios[1].denominator < 2000
    return np.float64 if simple and max(ratios) < 1.4 else np.float32
