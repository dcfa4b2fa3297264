"""Training on more images, and on more than the memory holds.

Without arguments it compares. With an order, a folder and a control group it reads as many images
as it can in a while within that group's memory, in a process of its own.
"""

import csv
import hashlib
import os
import statistics
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from benchmarks.harness import (
    CNNPIPE,
    Row,
    alone,
    at_most,
    faster,
    medians,
    peak_memory,
    report,
    write_params,
)
from cnnpipe.data import manifest
from cnnpipe.data.store import Images, Shard, shard_writer

COUNTS = (2_000, 20_000, 100_000)
ROUNDS = 3
SIDE = 32
"""Pixels, of those."""
LARGE_SIDE = 96
SET_BYTES, MEMORY_BYTES = 4 << 30, 3 << 29
READING_S = 6


def prepared(folder: Path, count: int) -> None:
    """Makes the folder one to train in: `count` images of noise, a little brighter for a class."""
    # So small a network that what is measured is all around it.
    write_params(folder, resize__size=SIDE, model__filters=2, train__epochs=2)
    resized = folder / "data" / "resized"
    resized.mkdir(parents=True)
    rng = np.random.default_rng(0)
    splits = ("train",) * 7 + ("val",) * 2 + ("test",)
    rows = []
    with shard_writer(resized / "images-00000.npy") as append:
        for i in range(count):
            label = "cat" if i < count // 2 else "dog"
            pixels = rng.integers(0, 200, (SIDE, SIDE, 3), np.uint8)
            pixels += np.uint8(50) * (label == "cat")
            append(pixels)
            sha256 = hashlib.sha256(pixels.data).hexdigest()
            name, crc = f"{label}/{i:06d}.jpg", zlib.crc32(pixels.data)
            rows.append((name, label, "", 400, 360, 1, sha256, "images-00000.npy", i, crc, i))
    table = pd.DataFrame(rows, columns=list(manifest.COLUMNS))
    manifest.write(table, resized / "manifest.csv", manifest.COLUMNS)
    manifest.write(table[:0], resized / "conflicts.csv", manifest.CONFLICT_COLUMNS)
    none = table[:0].assign(reason="", size="")
    manifest.write(none, resized / "quarantine.csv", manifest.QUARANTINE_COLUMNS)
    manifest.write_class_names(["cat", "dog"], resized)
    table["split"] = [splits[i % 10] for i in range(count)]
    manifest.write(table, folder / "data" / "split.csv", manifest.SPLIT_COLUMNS)


def growth(folder: Path) -> list[Row]:
    """The peak memory of `cnnpipe train`, and the time of an image in the second of two epochs."""
    peaks: dict[int, list[float]] = {count: [] for count in COUNTS}
    times: dict[int, list[float]] = {count: [] for count in COUNTS}
    for count in COUNTS:
        prepared(folder / str(count), count)
    os.environ["OMP_NUM_THREADS"] = "1"  # more have nothing to do here, and disturb each other
    for _ in range(ROUNDS):
        for count in COUNTS:
            place = folder / str(count)
            peaks[count].append(peak_memory([CNNPIPE, "train"], place))
            with (place / "reports" / "train" / "history.csv").open() as file:
                *_, last = csv.DictReader(file)
            times[count].append(float(last["seconds"]) / (0.9 * count) * 1e6)
    few, *more = COUNTS
    peer = f"{few:,} images"
    memory, microseconds = (
        {count: statistics.median(found) for count, found in each.items()}
        for each in (peaks, times)
    )
    return [
        at_most(f"peak memory, {count:,} images", peer, memory[few], memory[count], "MB", 1.15)
        for count in more
    ] + [
        faster(
            f"an image, {count:,} images", peer, microseconds[few], microseconds[count], "us", 0.85
        )
        for count in more
    ]


@contextmanager
def control_group(num_bytes: int) -> Iterator[Path | None]:
    """A control group of Linux of so much memory, page cache and all; None where there can be none.

    Those of version 1 and of version 2 are where systemd mounts them.
    """
    for root, limit in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
        group = Path("/sys/fs/cgroup", root, f"cnnpipe-{os.getpid()}")
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(num_bytes))
        except OSError:
            group.rmdir()
            continue
        try:
            yield group
        finally:
            group.rmdir()
        return
    yield None


def opened(folder: Path) -> Images:
    """The set that is too large, of which nothing is in the system's cache."""
    size = LARGE_SIDE**2 * 3
    shards = []
    for path in sorted(folder.iterdir()):
        file = path.open("rb", buffering=0)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        shards.append(Shard(file, 0, (path.stat().st_size // size, LARGE_SIDE, LARGE_SIDE, 3)))
    return Images(shards)


def reading(kind: str, folder: Path, group: Path) -> float:
    """Microseconds an image, of batches that are read and nothing else.

    Args:
        kind: `windows`, or `whole` for a permutation of the whole set.
        folder: of the set.
        group: which this process joins.
    """
    (group / "cgroup.procs").write_text(str(os.getpid()))
    import torch

    from cnnpipe.training import order
    from cnnpipe.training.batches import Batches

    if kind == "whole":
        order._WINDOW_BLOCKS = sys.maxsize
    images = opened(folder)
    rows = np.flatnonzero(np.arange(len(images)) % 10 < 7)
    batches = Batches(images, rows, np.zeros(len(rows), np.int64), 128, torch.device("cpu"))
    count = 0
    started = time.perf_counter()
    for _, labels in batches.shuffled(0, 1):
        count += len(labels)
        if time.perf_counter() - started > READING_S:
            break
    return (time.perf_counter() - started) / count * 1e6


def more_than_memory(folder: Path) -> list[Row]:
    """Reading in the order of training against a permutation of all, where the memory is short."""
    with control_group(MEMORY_BYTES) as group:
        if group is None:
            print("no control group can be made here, so the short memory is left out")
            return []
        images_bytes = LARGE_SIDE**2 * 3 * 2048
        rng = np.random.default_rng(0)
        for i in range(SET_BYTES // images_bytes):
            with (folder / f"{i:05d}").open("wb") as file:
                file.write(rng.bytes(images_bytes))
                os.fsync(file.fileno())  # or it could not be put out of the cache
        cases = {
            kind: alone("benchmarks.scale", kind, str(folder), str(group))
            for kind in ("whole", "windows")
        }
        found = medians(cases, ROUNDS)
    what = f"reading {SET_BYTES >> 20:,} MiB of {LARGE_SIDE} px with {MEMORY_BYTES >> 20:,} MiB"
    return [faster(what, "shuffled as a whole", found["whole"], found["windows"], "us", 2)]


def main() -> None:
    """Runs the benchmark, or a case."""
    if sys.argv[1:]:
        kind, folder, group = sys.argv[1:]
        print(reading(kind, Path(folder), Path(group)))
        return
    rows = []
    for measure in (growth, more_than_memory):
        with TemporaryDirectory() as place:
            rows += measure(Path(place))
    report("scale", rows, ["torch"])


if __name__ == "__main__":
    main()
