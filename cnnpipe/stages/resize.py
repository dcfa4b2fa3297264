"""resize: from data/raw/ to data/resized/, every image at one size, in a few uint8 arrays.

The unit of work is a shard: a process decodes, hashes and resizes the shard's images and writes
them one by one, so that no pixels travel between processes and memory stays at an image a process.
With `resize.scheduler` the workers of a Dask cluster have one shard after another written likewise.
"""

import csv
import hashlib
import os
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from cnnpipe import cluster
from cnnpipe.data import manifest
from cnnpipe.data.decode import Decoded, UnreadableImage, decode_frame, glimpse
from cnnpipe.data.duplicates import SIDE, duplicate_groups, thumbnail
from cnnpipe.data.raw import Raw, RawImage, Source, Tar, open_raw
from cnnpipe.data.resizer import prepare
from cnnpipe.data.store import shard_writer
from cnnpipe.errors import RunFailed, UserError
from cnnpipe.params import Params, Resize
from cnnpipe.processes import WorkerDied, computing_limit, num_cores, process_pool
from cnnpipe.workspace import whole_folder

_SHARD_NAME = "images-{:05d}.npy"
# Large enough for few files.
_SHARD_BYTES = 64 << 20
# Their number is a multiple of this, so that up to so many cores finish together.
_CORES = 16
# Glimpses of quarantined files for the report: of so many, of at most so many pixels a side.
_GLIMPSES, _GLIMPSE_SIDE = 48, 160
# Of a processor, for one file: a JPEG 2000 of 100 million pixels takes about 25.
_DECODING_S = 60

Job = tuple[Path, list[RawImage]]
"""The file of a shard, and what goes into it."""
Row = dict[str, Any]
Written = tuple[list[Row], list[Row], np.ndarray]
"""Of a shard: rows of the manifest and of the quarantine, and (n, 32, 32) uint8 thumbnails."""


def run(params: Params) -> None:
    """Fills data/resized/.

    Raises:
        UserError: there is no data/raw/, or a class has no readable image.
    """
    settings = params.resize
    scheduler = settings.scheduler or os.environ.get("DASK_SCHEDULER_ADDRESS")
    with open_raw("data/raw") as (raw, files), whole_folder("data/resized") as folder:
        shards = _shards(files, params.input_shape)
        jobs = [(folder / _SHARD_NAME.format(i), shard) for i, shard in enumerate(shards)]
        num_found = Counter[str]()
        num_animated = 0
        quarantined: list[Row] = [
            {"path": path, "reason": reason, "size": ""}
            for path, reason in Source.read("data/raw").skipped.items()
        ]
        with (
            # Not held while the workers need memory, 1 KB an image.
            (folder / "thumbnails").open("w+b") as thumbnails,
            (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file,
            tqdm(total=len(files), desc="resizing", unit="image", disable=None) as progress,
            closing(
                _written_by_cluster(scheduler, raw, settings, jobs)
                if scheduler
                else _written(raw, settings, jobs)
            ) as written,
        ):
            writer = csv.DictWriter(
                file,
                list(manifest.COLUMNS),
                "",
                lineterminator="\n",
                quoting=manifest.quoting(image.path for image in files),
            )
            writer.writeheader()
            for kept, refused, small in written:
                writer.writerows(kept)  # at once: 20,000 of them would take 40 MB
                thumbnails.write(small.data)
                num_found.update(row["label"] for row in kept)
                num_animated += sum(row["frames"] > 1 for row in kept)
                quarantined += refused
                progress.update(len(kept) + len(refused))
        class_names = _check_classes(files, num_found, quarantined)
        for i, row in enumerate(quarantined[:_GLIMPSES]):
            seen: np.ndarray | None = row.get("glimpse")
            if seen is not None:
                (folder / "quarantine").mkdir(exist_ok=True)
                Image.fromarray(seen).save(folder / "quarantine" / f"{i}.png")
        manifest.write(
            pd.DataFrame(quarantined, columns=list(manifest.QUARANTINE_COLUMNS)),
            folder / "quarantine.csv",
            manifest.QUARANTINE_COLUMNS,
        )
        manifest.write_class_names(class_names, folder)
        conflicts = _group(folder)
    size = f"{settings.size} x {settings.size}"
    print(f"{num_found.total():,} images of {len(class_names)} classes at {size}, {settings.color}")
    if num_animated:
        print(f"of {num_animated:,} with several frames or pages the first is taken")
    if quarantined:
        print(f"{len(quarantined):,} files quarantined, see data/resized/quarantine.csv")
    if len(conflicts):
        first = conflicts[conflicts["group"] == conflicts["group"].iloc[0]]
        one, other = first.drop_duplicates("label").iloc[:2].itertuples(index=False)
        print(
            f"warning: {len(conflicts):,} images are copies of each other with contradicting "
            f"labels, in {conflicts['group'].nunique():,} groups, see data/resized/conflicts.csv: "
            f"{one.path!r} is {one.label!r}, {other.path!r} is {other.label!r}",
            file=sys.stderr,
        )


def _group(folder: Path) -> pd.DataFrame:
    """Completes the manifest by the groups of copies; the table of those with several labels."""
    path = folder / "thumbnails"
    groups = duplicate_groups(np.fromfile(path, np.uint8).reshape(-1, SIDE, SIDE))
    path.unlink()
    table = manifest.read(folder / "manifest.csv", dict.fromkeys(manifest.COLUMNS, str), "resize")
    table["group"] = groups
    manifest.write(table, folder / "manifest.csv", manifest.COLUMNS)
    num_labels = table.groupby("group")["label"].transform("nunique")
    conflicts = table[num_labels > 1].sort_values(["group", "path"])
    manifest.write(conflicts, folder / "conflicts.csv", manifest.CONFLICT_COLUMNS)
    return conflicts[list(manifest.CONFLICT_COLUMNS)]


def _shards(files: list[RawImage], shape: tuple[int, int, int]) -> list[list[RawImage]]:
    """The files in runs of equal length; it depends on nothing but their number and size."""
    fitting = max(1, _SHARD_BYTES // int(np.prod(shape)))
    turns = -(-len(files) // (fitting * _CORES))
    length = -(-len(files) // (turns * _CORES))
    return [files[i : i + length] for i in range(0, len(files), length)]


def _written(raw: Raw, settings: Resize, jobs: list[Job]) -> Generator[Written]:
    """Writes the shards, several at a time; what there is to say of each, in order.

    A file whose decoding ends its worker process costs that file alone: it is found among those
    that the workers were at, each tried once more by itself, and the shards are begun again.
    """
    num_workers = num_cores() if settings.workers == "auto" else settings.workers
    at = RawArray("q", len(jobs))
    fatal: dict[str, Row] = {}
    done: dict[int, Written] = {}
    written = 0
    while written < len(jobs):
        undone = [number for number in range(written, len(jobs)) if number not in done]
        try:
            with process_pool(min(num_workers, len(undone)), _open, (raw, at)) as pool:
                futures = {
                    number: pool.submit(_write_shard, settings, number, jobs[number], fatal)
                    for number in undone
                }
                for number in range(written, len(jobs)):
                    yield done.pop(number) if number in done else futures.pop(number).result()
                    written += 1
        except WorkerDied:
            for number, future in futures.items():
                if future.done() and not future.cancelled() and future.exception() is None:
                    done[number] = future.result()
            found = [
                row
                for number in undone
                if number not in done and at[number]
                if (row := _if_fatal(settings, raw, jobs[number][1][at[number] - 1]))
            ]
            if not found:  # it was something else, such as want of memory
                raise
            fatal |= {row["path"]: row for row in found}


def _if_fatal(settings: Resize, raw: Raw, file: RawImage) -> Row | None:
    """The row of the quarantine for a file that ends the process which decodes it, or None."""
    with suppress(UnreadableImage):
        data = raw.read(file)
        try:
            with process_pool(1) as pool:
                pool.submit(_try, settings, data).result()
        except WorkerDied:
            reason = f"its decoder crashes, or computes for more than {_DECODING_S} s"
            return {"path": file.path, "reason": reason, "size": len(data)}
    return None


_raw: Raw  # in each worker process
_at: Any
"""Likewise, and shared by all: which file of each shard is being decoded, counted from 1."""


def _open(raw: Raw, at: Any) -> None:
    global _raw, _at
    _raw, _at = raw, at


def _write_shard(settings: Resize, number: int, job: Job, fatal: dict[str, Row]) -> Written:
    """Writes one shard of the readable images."""
    path, files = job
    kept: list[Row] = []
    refused: list[Row] = []
    thumbnails = [np.empty((0, SIDE, SIDE), np.uint8)]
    with shard_writer(path) as append:
        for position, file in enumerate(files):
            if file.path in fatal:
                refused.append(fatal[file.path])
                continue
            _at[number] = position + 1
            size: int | str = ""
            try:
                data = _raw.read(file)
                size = len(data)
                decoded, pixels = _pixels(settings, data)
            except UnreadableImage as error:
                refused.append({"path": file.path, "reason": str(error), "size": size})
                if size and len(refused) <= _GLIMPSES:
                    refused[-1]["glimpse"] = _glimpse(settings, data)
                continue
            append(pixels)
            thumbnails.append(thumbnail(pixels)[None])
            kept.append(
                {
                    "path": file.path,
                    "label": file.label,
                    "official": file.official,
                    "width": decoded.pixels.shape[1],
                    "height": decoded.pixels.shape[0],
                    "frames": decoded.num_frames,
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "shard": path.name,
                    "row": len(kept),
                    "crc32": zlib.crc32(pixels.data),
                }
            )
    return kept, refused, np.concatenate(thumbnails)


def _pixels(settings: Resize, data: bytes) -> tuple[Decoded, np.ndarray]:
    """An image file decoded, and prepared: (size, size, C) uint8."""
    with computing_limit(_DECODING_S):
        decoded = decode_frame(data, settings.max_pixels)
        pixels = prepare(decoded.pixels, settings.size, settings.mode, settings.color)
    return decoded, np.ascontiguousarray(pixels)


def _glimpse(settings: Resize, data: bytes) -> np.ndarray | None:
    with computing_limit(_DECODING_S):
        return glimpse(data, settings.max_pixels, _GLIMPSE_SIDE)


def _try(settings: Resize, data: bytes) -> None:
    """All that is ever done with the bytes of a file."""
    try:
        _pixels(settings, data)
    except UnreadableImage:
        _glimpse(settings, data)


def _written_by_cluster(
    scheduler: str, raw: Raw, settings: Resize, jobs: list[Job]
) -> Generator[Written]:
    """Likewise, by the workers of a Dask cluster.

    A worker that is taken for lost may go on writing, so each writes to a folder of its own, out of
    which the shards are taken as they are answered for.
    """
    folder = jobs[0][0].parent.absolute()
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=".shards.", ignore_cleanup_errors=True
    ) as attempts:
        plain = raw.path if isinstance(raw, Tar) else None
        paths = _digest([file for _, files in jobs for file in files])
        answers = cluster.answers(
            scheduler,
            "cnnpipe.stages.resize",
            attempts,
            (attempts, settings.model_dump(), plain, paths),
            range(len(jobs)),
        )
        for (path, _), (attempt, written) in zip(jobs, answers, strict=True):
            if written[0]:
                os.replace(Path(attempts, attempt, path.name), folder / path.name)
            yield written


@contextmanager
def _writer(
    arguments: tuple[str, dict[str, Any], Path | None, str],
) -> Iterator[Callable[[int], tuple[str, Written]]]:
    """A function that writes the shard of a number into a new folder, whose name comes with it."""
    attempts, settings, plain, paths = arguments
    params = Params(resize=Resize(**settings))
    with open_raw("data/raw", plain) as (raw, files):
        if _digest(files) != paths:
            raise RunFailed("has other files in data/raw: that folder must be shared, too")
        shards = _shards(files, params.input_shape)

        def write(number: int) -> tuple[str, Written]:
            folder = Path(tempfile.mkdtemp(dir=attempts))
            job = (folder / _SHARD_NAME.format(number), shards[number])
            (written,) = _written(raw, params.resize, [job])
            return folder.name, written

        yield write


def _digest(files: list[RawImage]) -> str:
    return hashlib.sha256("\n".join(file.path for file in files).encode()).hexdigest()


def _check_classes(files: list[RawImage], found: Counter[str], quarantined: list[Row]) -> list[str]:
    """The class names, sorted; a class of which nothing is left ends the run."""
    reasons = {row["path"]: row["reason"] for row in quarantined}
    for label, number in sorted(Counter(file.label for file in files).items()):
        if not found[label]:
            first = next(file.path for file in files if file.label == label)
            raise UserError(
                f"class {label!r}: none of its {number:,} files can be read as an image, the first "
                f"is {first}: {reasons[first]}; remove the class or repair its files"
            )
    return sorted(found)


if __name__ == "__main__":
    cluster.serve(_writer)
