"""A store for tests."""

import tempfile

import numpy as np

from cnnpipe.data.store import Images, Shard


def stored(*arrays: np.ndarray) -> Images:
    """The (n, H, W, C) uint8 arrays as the shards of a store, in files that go when it does."""
    shards = []
    for array in arrays:
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - the store's, as long as it lives
        file.write(array.tobytes())
        shards.append(Shard(file, 0, array.shape))
    return Images(shards)
