"""The resized images: a few .npy shards, uint8, mapped into memory and never read whole."""

from pathlib import Path

import numpy as np
import pandas as pd

from cnnpipe.data import manifest
from cnnpipe.errors import UserError


class Images:
    """All images of data/resized/, in the manifest's order, as one array that stays on disk.

    `images[i]` is (H, W, C) uint8; `images[rows]`, with an array of n rows, (n, H, W, C) uint8.
    """

    def __init__(self, shards: list[np.ndarray]) -> None:
        self._shards = shards
        self._ends = np.cumsum([len(shard) for shard in shards]).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, C)."""
        height, width, channels = self._shards[0].shape[1:]
        return len(self), height, width, channels

    def __getitem__(self, rows: int | slice | np.ndarray) -> np.ndarray:
        chosen = np.arange(len(self))[rows]
        images = self._gather(np.atleast_1d(chosen))
        return images.squeeze(0) if chosen.ndim == 0 else images

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        result = np.empty((len(rows), *self.shape[1:]), np.uint8)
        of_shard = np.searchsorted(self._ends, rows, side="right")
        for shard in np.unique(of_shard):
            mine = np.flatnonzero(of_shard == shard)
            # Positions relative to the end are negative, and so count from it.
            result[mine] = self._shards[shard][rows[mine] - self._ends[shard]]
        return result


def open_images(folder: str | Path) -> tuple[Images, pd.DataFrame]:
    """The images of data/resized/, memory-mapped, and the manifest: row i describes image i.

    Raises:
        UserError: the folder is not a whole data/resized/.
    """
    path = Path(folder) / "manifest.csv"
    table = manifest.read(path, manifest.COLUMNS, "resize")
    sizes = table.groupby("shard", sort=False).size()
    in_order = [(str(name), row) for name, size in sizes.items() for row in range(size)]
    if not in_order or in_order != list(zip(table["shard"], table["row"], strict=True)):
        raise UserError(f"{path}: its rows are not those of the shards: run `cnnpipe resize` again")
    shards: list[np.ndarray] = []
    for name, size in sizes.items():
        shards.append(_shard(Path(folder) / str(name), size, shards[0].shape[1:] if shards else ()))
    return Images(shards), table


def _shard(path: Path, num_images: int, image_shape: tuple[int, ...]) -> np.ndarray:
    try:
        shard: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read, run `cnnpipe resize` again: {error}") from None
    fits = shard.ndim == 4 and shard.dtype == np.uint8 and len(shard) == num_images
    if not fits or (image_shape and shard.shape[1:] != image_shape):
        raise UserError(
            f"{path}: {shard.shape} {shard.dtype}, not the manifest's {num_images} images: "
            "run `cnnpipe resize` again"
        )
    return shard
