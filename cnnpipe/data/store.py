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
    table = manifest.read(Path(folder) / "manifest.csv", manifest.COLUMNS, "resize")
    shards = [
        _shard(Path(folder) / str(name), rows)
        for name, rows in table.groupby("shard", sort=False).size().items()
    ]
    return Images(shards), table


def _shard(path: Path, num_images: int) -> np.ndarray:
    try:
        shard: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read, run `cnnpipe resize` again: {error}") from None
    if shard.ndim != 4 or shard.dtype != np.uint8 or len(shard) != num_images:
        raise UserError(
            f"{path}: {shard.shape} {shard.dtype}, but the manifest says {num_images} images: "
            "run `cnnpipe resize` again"
        )
    return shard
