"""Batches of the stored images, in an order that follows from the seed and the epoch."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from cnnpipe.data.store import Images


class Batches:
    """The images of some rows of the store, batch by batch on the device.

    A batch is (images, labels): (n, C, H, W) uint8 and (n,) int64. The images lie in memory as
    they do on disk, channels last, which is the faster layout for convolutions.
    """

    def __init__(
        self,
        images: Images,
        rows: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        device: torch.device,
    ) -> None:
        """The batches of `images[rows]`.

        Args:
            images: the store.
            rows: (n,) the rows to use.
            labels: (n,) int64, the label of each of these rows.
            batch_size: at most so many images a batch; a last one of a single image joins the
                one before.
            device: where they are wanted.
        """
        self.images = images
        self.rows = rows
        self.labels = labels
        self.batch_size = batch_size
        self.device = device

    def in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once, in the order of the rows."""
        return self._batches(np.arange(len(self.rows)))

    def shuffled(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once, in an order that depends on nothing but the seed and the epoch."""
        return self._batches(np.random.default_rng([seed, epoch]).permutation(len(self.rows)))

    @property
    def num_steps(self) -> int:
        """Batches an epoch."""
        return len(self._cuts(len(self.rows)))

    def _cuts(self, total: int) -> list[slice]:
        cuts = [
            slice(start, min(start + self.batch_size, total))
            for start in range(0, total, self.batch_size)
        ]
        # Batch normalisation cannot take the variance of one image.
        if len(cuts) > 1 and self.batch_size > 1 and cuts[-1].stop - cuts[-1].start == 1:
            cuts[-2:] = [slice(cuts[-2].start, total)]
        return cuts

    def _batches(self, order: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        # One batch ahead, so that reading it hides behind the step before.
        with ThreadPoolExecutor(1) as reader:
            cuts = self._cuts(len(order))
            pending = reader.submit(self._read, order[cuts[0]])
            for cut in cuts[1:]:
                images, labels = pending.result()
                pending = reader.submit(self._read, order[cut])
                yield self._to_device(images, labels)
            yield self._to_device(*pending.result())

    def _read(self, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(self.images[self.rows[positions]])
        labels = torch.from_numpy(self.labels[positions])
        if self.device.type == "cuda":
            images, labels = images.pin_memory(), labels.pin_memory()
        return images, labels

    def _to_device(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        return images.permute(0, 3, 1, 2), labels  # (N, H, W, C) -> (N, C, H, W), no copy


def channel_statistics(
    images: Images, rows: np.ndarray
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and standard deviation of each channel over some rows, 0-255.

    Exact: sums of integers, one batch in memory at a time. A channel that never varies gets the
    standard deviation 1, so that it can be divided by.
    """
    _, height, width, channels = images.shape
    sums = np.zeros(channels)
    squares = np.zeros(channels)
    values = np.arange(256)
    for start in range(0, len(rows), 64):
        batch = images[rows[start : start + 64]].reshape(-1, channels)
        for channel in range(channels):
            counts = np.bincount(batch[:, channel], minlength=256)
            sums[channel] += counts @ values
            squares[channel] += counts @ values**2
    count = len(rows) * height * width
    mean = sums / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return tuple(mean.tolist()), tuple(np.where(std > 0, std, 1.0).tolist())
