"""Batches of the stored images, in an order that follows from the seed and the epoch."""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cnnpipe.data.store import Images
from cnnpipe.training.distributed import ALONE, ProcessGroup
from cnnpipe.training.order import shuffled

Batch = tuple[Tensor, Tensor]
_Read = tuple[Tensor, Tensor, torch.cuda.Event | None]


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
        resident: bool = False,
        group: ProcessGroup = ALONE,
    ) -> None:
        """The batches of `images[rows]`.

        Args:
            images: the store.
            rows: (n,) the rows to use.
            labels: (n,) int64, the label of each of these rows.
            batch_size: at most so many images a batch; a last one of a single image joins the
                one before.
            device: where they are wanted.
            resident: whether all images are copied to the device once and stay there, instead of
                being read from the store in every epoch.
            group: the processes between which each batch is divided; this one gets its share.
        """
        self.images = images
        self.rows = rows
        self.labels = labels
        self.batch_size = batch_size
        self.device = device
        self.resident = resident
        self.group = group

    def in_order(self) -> Iterator[Batch]:
        """All images once, in the order of the rows."""
        return self._batches(self._parts([np.arange(len(self.rows))], 0))

    def shuffled(self, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
        """All images once, in an order that depends on nothing but the seed and the epoch.

        Args:
            seed: of all epochs.
            epoch: which.
            start: the batch to begin with; those before it are not read.
        """
        num_bytes = math.prod(self.images.shape[1:])
        place = start * self.batch_size
        order = shuffled(len(self.rows), num_bytes, seed, epoch, place)
        pieces = (piece for piece, _ in order) if self.resident else self._announced(order)
        return self._batches(self._parts(pieces, start))

    @property
    def num_steps(self) -> int:
        """Batches an epoch."""
        whole, rest = divmod(len(self.rows), self.batch_size)
        # Batch normalisation cannot take the variance of one image.
        return whole + (rest > (whole > 0))

    def num_images(self, step: int) -> int:
        """Images in the batch of that step, those of all processes together."""
        is_last = step == self.num_steps - 1
        return len(self.rows) - step * self.batch_size if is_last else self.batch_size

    def _announced(self, order: Iterator[tuple[np.ndarray, np.ndarray]]) -> Iterator[np.ndarray]:
        """The pieces of the order, while what comes soon is read into the system's cache."""
        announcer = ThreadPoolExecutor(1)
        try:
            for piece, block in order:
                if len(block):
                    announcer.submit(self.images.announce, self.rows[block])
                yield piece
        finally:
            announcer.shutdown(cancel_futures=True)

    def _parts(self, order: Iterable[np.ndarray], start: int) -> Iterator[np.ndarray]:
        """The positions of each batch, from batch `start` on.

        Args:
            order: the positions from that batch on, in arrays of any lengths.
            start: its number.
        """
        arrays = iter(order)
        left = np.empty(0, np.int64)
        for step in range(start, self.num_steps):
            size = self.num_images(step)
            while len(left) < size:
                left = np.append(left, next(arrays))
            part, left = left[:size], left[size:]
            yield part

    def _batches(self, parts: Iterator[np.ndarray]) -> Iterator[Batch]:
        own = (part[self.group.share(len(part))] for part in parts)
        batches = self._chosen(own) if self.resident else self._streamed(own)
        for images, labels in batches:
            yield images.permute(0, 3, 1, 2), labels  # (N, H, W, C) -> (N, C, H, W), no copy

    @cached_property
    def _whole(self) -> Batch:
        """Everything, on the device: (N, H, W, C) and (N,)."""
        images = torch.empty(
            (len(self.rows), *self.images.shape[1:]), dtype=torch.uint8, device=self.device
        )
        done = 0
        for part, _ in self._streamed(self._parts([np.arange(len(self.rows))], 0)):
            images[done : done + len(part)] = part
            done += len(part)
        return images, torch.from_numpy(self.labels).to(self.device)

    def _chosen(self, parts: Iterator[np.ndarray]) -> Iterator[Batch]:
        images, labels = self._whole
        epoch = list(parts)
        if not epoch:
            return
        # One copy for the epoch, so that no step waits for one.
        order = torch.from_numpy(np.concatenate(epoch)).to(self.device)
        for positions in torch.split(order, [len(part) for part in epoch]):
            yield images[positions], labels[positions]

    def _streamed(self, parts: Iterator[np.ndarray]) -> Iterator[Batch]:
        """Reads ahead, so that reading hides behind the steps before.

        On a CPU one batch ahead suffices: a step takes longer than reading the next batch. A GPU
        is fed from pinned memory by several threads, and copies on a stream of its own.
        """
        on_gpu = self.device.type == "cuda"
        ahead = 4 if on_gpu else 1
        stream = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]
        with ThreadPoolExecutor(ahead) as readers:
            pending: deque[Future[_Read]] = deque()
            for part in parts:
                pending.append(readers.submit(self._read, part, stream))
                if len(pending) > ahead:
                    yield self._arrived(pending.popleft().result())
            while pending:
                yield self._arrived(pending.popleft().result())

    def _arrived(self, read: _Read) -> Batch:
        images, labels, copied = read
        if copied is not None:
            # The device waits for the copy, the host does not.
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            images.record_stream(current)
            labels.record_stream(current)
        return images, labels

    def _read(self, positions: np.ndarray, stream: torch.cuda.Stream | None) -> _Read:
        shape = (len(positions), *self.images.shape[1:])
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=stream is not None)
        self.images.read(self.rows[positions], images.numpy())
        labels = torch.from_numpy(self.labels[positions])
        if stream is None:
            return images, labels, None
        with torch.cuda.stream(stream):
            # PyTorch does not use the pinned memory again before the copies are done.
            return (
                images.to(self.device, non_blocking=True),
                labels.pin_memory().to(self.device, non_blocking=True),
                stream.record_event(),
            )


def channel_statistics(
    images: Images, rows: np.ndarray, group: ProcessGroup = ALONE
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and standard deviation of each channel over some rows, 0-255.

    Exact: sums of integers, one batch in memory at a time. A channel that never varies gets the
    standard deviation 1, so that it can be divided by.

    Args:
        images: the store.
        rows: which of them.
        group: the processes that share the work.
    """
    _, height, width, channels = images.shape
    sums = np.zeros(channels)
    squares = np.zeros(channels)
    values = np.arange(256)
    own = rows[group.share(len(rows))]
    for start in range(0, len(own), 64):
        batch = images[own[start : start + 64]].reshape(-1, channels)
        for channel in range(channels):
            counts = np.bincount(batch[:, channel], minlength=256)
            sums[channel] += counts @ values
            squares[channel] += counts @ values**2
    group.sum(torch.from_numpy(sums), torch.from_numpy(squares))
    count = len(rows) * height * width
    mean = sums / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return tuple(mean.tolist()), tuple(np.where(std > 0, std, 1.0).tolist())
