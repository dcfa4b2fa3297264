"""The order of an epoch's images: shuffled, and yet one in which a disk can be read.

Images that follow each other in the store make a block; the blocks are shuffled and dealt to
windows, and the images of each window are shuffled. So a window has images from all over the store,
and is read in long runs. A set of a single window is shuffled as a whole.

Source: Xu et al., "In-database machine learning with CorgiPile" (2022).
"""

from collections.abc import Iterator

import numpy as np

_BLOCK_BYTES = 1 << 20
"""Which a disk reads nearly as fast as as much of a long file."""
_WINDOW_BLOCKS = 512
"""Half a GiB, for the system's cache to hold; of a store sorted by class, a share of each class."""


def shuffled(
    total: int, num_bytes: int, seed: int, epoch: int, start: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The numbers below `total` once each, in an order that depends on the arguments alone.

    Args:
        total: the number of images.
        num_bytes: of one image.
        seed: of all epochs.
        epoch: which.
        start: the place in the order to begin at; what is before it is not drawn.

    Yields:
        The next numbers; and, ascending, those of a block that comes soon: before the first window
        all of its blocks, and along each window those of the next. Either may be empty.
    """
    size = max(1, _BLOCK_BYTES // num_bytes)
    num_blocks = -(-total // size)
    num_windows = max(1, -(-num_blocks // _WINDOW_BLOCKS))
    order = np.random.default_rng([seed, epoch, num_windows]).permutation(num_blocks)
    # All of about one length, or the last could be a single block, and so of one class.
    windows = [np.sort(window) for window in np.array_split(order, num_windows)]

    def blocks(window: int) -> list[np.ndarray]:
        return [np.arange(i, min(i + size, total)) for i in (windows[window] * size).tolist()]

    # Only the last block of all may be shorter.
    lengths = [len(window) * size - (num_blocks * size - total) * (num_blocks - 1 in window)
               for window in windows]  # fmt: skip
    ends = np.cumsum(lengths)
    none = np.empty(0, np.int64)
    first = int(np.searchsorted(ends, start, side="right"))
    if num_windows > 1 and first < num_windows:
        yield from ((none, block) for block in blocks(first))
    for window in range(first, num_windows):
        # Zeros at the end of NumPy's seeds change nothing: where there is one window, its order is
        # the plain permutation by (seed, epoch).
        generator = np.random.default_rng([seed, epoch, window])
        drawn = generator.permutation(np.concatenate(blocks(window)))
        drawn = drawn[max(0, start - (ends[window] - lengths[window])) :]
        following = blocks(window + 1) if window + 1 < num_windows else [none]
        yield from zip(np.array_split(drawn, len(following)), following, strict=True)
