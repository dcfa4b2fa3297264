"""The resized images: a few .npy shards, uint8, of which only what is asked for is read."""

import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd

from cnnpipe.data import manifest
from cnnpipe.errors import UserError

_ANNOUNCED_BYTES = 128 << 10
"""At a time: of more, Linux may leave out what is beyond its read-ahead."""


@dataclass(frozen=True)
class Shard:
    """One .npy file of images."""

    file: BinaryIO
    offset: int
    """Where in the file the first image begins, in bytes."""
    shape: tuple[int, int, int, int]
    """(N, H, W, C)."""

    def announce(self, position: int, num_bytes: int) -> None:
        """Has the system begin to read bytes from a position on; where it can, without waiting."""
        if hasattr(os, "posix_fadvise"):
            end = position + num_bytes
            for at in range(position, end, _ANNOUNCED_BYTES):
                length = min(_ANNOUNCED_BYTES, end - at)
                os.posix_fadvise(self.file.fileno(), at, length, os.POSIX_FADV_WILLNEED)

    def read(self, rest: memoryview, position: int) -> None:
        """Fills the bytes with those of the file from a position on."""
        while rest:
            # At a position of its own, so that several threads can read the file at once.
            num_bytes = os.preadv(self.file.fileno(), [rest], position)
            if not num_bytes:
                raise UserError(
                    f"{self.file.name}: ends amid its images: run `cnnpipe resize` again"
                )
            rest, position = rest[num_bytes:], position + num_bytes


class Images:
    """All images of data/resized/, in the manifest's order, as one array that stays on disk.

    `images[i]` is (H, W, C) uint8; `images[rows]`, with an array of n rows, (n, H, W, C) uint8.

    They are read, not mapped into memory: pages of a map that were once touched count as the
    process's own, which so seems to grow to the size of the data.
    """

    def __init__(self, shards: Sequence[Shard], checksums: np.ndarray | None = None) -> None:
        """The images in the shards.

        Args:
            shards: one after another.
            checksums: (N,) the CRC-32 of each image's bytes; it is compared when an image is read
                for the first time.
        """
        self._shards = shards
        lengths = [shard.shape[0] for shard in shards]
        self._ends = np.cumsum(lengths)
        self._begins = self._ends - lengths
        self._offsets = np.array([shard.offset for shard in shards])
        self._size = math.prod(shards[0].shape[1:])
        self._checksums = checksums
        self._unchecked = np.full(len(self), checksums is not None)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, C)."""
        _, height, width, channels = self._shards[0].shape
        return len(self), height, width, channels

    def __getitem__(self, rows: int | slice | np.ndarray) -> np.ndarray:
        chosen = np.arange(len(self))[rows]
        images = np.empty((chosen.size, *self.shape[1:]), np.uint8)
        self.read(np.atleast_1d(chosen), images)
        return images.squeeze(0) if chosen.ndim == 0 else images

    def announce(self, rows: np.ndarray) -> None:
        """Has the system begin to read the images of these ascending rows, in long runs."""
        # Short gaps are read, too: that is faster than to leave them out.
        for shard, position, num_bytes in self._runs(rows, _ANNOUNCED_BYTES // self._size + 1):
            self._shards[shard].announce(position, num_bytes)

    def read(self, rows: np.ndarray, images: np.ndarray) -> None:
        """Fills a contiguous (n, H, W, C) uint8 array with the images of n rows, from 0 up.

        Raises:
            UserError: an image is not what `resize` wrote.
        """
        rest = images.reshape(-1, copy=False).data
        for shard, position, num_bytes in self._runs(rows):
            self._shards[shard].read(rest[:num_bytes], position)
            rest = rest[num_bytes:]
        for i in np.flatnonzero(self._unchecked[rows]):
            row = rows[i]
            assert self._checksums is not None
            if zlib.crc32(images[i].data) != self._checksums[row]:
                shard = np.searchsorted(self._ends, row, side="right")
                raise UserError(
                    f"{self._shards[shard].file.name}: image {row - self._begins[shard]} is "
                    "damaged, its checksum is another: run `cnnpipe resize` again"
                )
            self._unchecked[row] = False

    def _runs(self, rows: np.ndarray, step: int = 1) -> Iterator[tuple[int, int, int]]:
        """The shard, position and number of bytes of each run of rows at most `step` apart."""
        of_shard = np.searchsorted(self._ends, rows, side="right")
        steps = np.diff(rows, prepend=-1)
        begins = np.flatnonzero((steps < 1) | (steps > step) | np.diff(of_shard, prepend=-1))
        lasts = np.append(begins, len(rows))[1:] - 1
        shards, first = of_shard[begins], rows[begins]
        positions = self._offsets[shards] + (first - self._begins[shards]) * self._size
        num_bytes = (rows[lasts] - first + 1) * self._size
        # As lists: NumPy's numbers, one by one, would take longer than reading a small image.
        return zip(shards.tolist(), positions.tolist(), num_bytes.tolist(), strict=True)


@contextmanager
def shard_writer(path: Path) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that appends an (H, W, C) uint8 image to a new shard, all of one shape.

    Only one image is in memory at a time. Where nothing is appended there is no file afterwards.
    """
    shape: tuple[int, ...] = (0,)

    def write_header() -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)

    def append(image: np.ndarray) -> None:
        nonlocal shape
        if len(shape) == 1:
            shape = (0, *image.shape)
            write_header()
        if image.shape != shape[1:] or image.dtype != np.uint8:
            raise ValueError(f"{image.shape} {image.dtype} in a shard of {shape[1:]} uint8")
        file.write(np.ascontiguousarray(image).data)
        shape = (shape[0] + 1, *shape[1:])

    with path.open("wb") as file:
        yield append
        if shape[0]:
            file.seek(0)
            write_header()  # of the same length: NumPy leaves room for the number to grow
    if not shape[0]:
        path.unlink()


def open_images(folder: str | Path) -> tuple[Images, pd.DataFrame]:
    """The images of data/resized/, which stay on disk, and the manifest: row i describes image i.

    Raises:
        UserError: the folder is not a whole data/resized/.
    """
    path = Path(folder) / "manifest.csv"
    table = manifest.read(path, manifest.COLUMNS, "resize")
    numbers, names = pd.factorize(table["shard"])
    sizes = np.bincount(numbers)
    rows = np.concatenate([np.empty(0, np.int64), *map(np.arange, sizes)])
    if not len(table) or (np.diff(numbers) < 0).any() or (table["row"] != rows).any():
        raise UserError(f"{path}: its rows are not those of the shards: run `cnnpipe resize` again")
    shards: list[Shard] = []
    for name, size in zip(names, sizes.tolist(), strict=True):
        shards.append(_shard(Path(folder) / str(name), size, shards[0].shape[1:] if shards else ()))
    return Images(shards, table["crc32"].to_numpy()), table


def _shard(path: Path, num_images: int, image_shape: tuple[int, ...]) -> Shard:
    try:
        # It checks that the file is as long as its header says.
        mapped: np.memmap = np.load(path, mmap_mode="r", allow_pickle=False)
        file = path.open("rb", buffering=0)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read, run `cnnpipe resize` again: {error}") from None
    fits = mapped.ndim == 4 and mapped.dtype == np.uint8 and len(mapped) == num_images
    if (
        not fits
        or not mapped.flags.c_contiguous
        or (image_shape and mapped.shape[1:] != image_shape)
    ):
        raise UserError(
            f"{path}: {mapped.shape} {mapped.dtype}, not the manifest's {num_images} images: "
            "run `cnnpipe resize` again"
        )
    return Shard(file, mapped.offset, mapped.shape)
