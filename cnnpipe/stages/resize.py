"""resize: from data/raw/ to data/resized/, every image at one size, in a few uint8 arrays.

The unit of work is a shard: a process decodes, hashes and resizes the shard's images and writes
them one by one, so that no pixels travel between processes and memory stays at an image a process.
"""

import csv
import hashlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from cnnpipe.data import manifest
from cnnpipe.data.decode import UnreadableImage, decode
from cnnpipe.data.duplicates import perceptual_hash
from cnnpipe.data.raw import Raw, RawImage, Source, open_raw
from cnnpipe.data.resizer import prepare
from cnnpipe.data.store import shard_writer
from cnnpipe.errors import UserError
from cnnpipe.params import Params, Resize
from cnnpipe.processes import num_cores, process_pool
from cnnpipe.workspace import whole_folder

# Large enough for few files.
_SHARD_BYTES = 64 << 20
# Their number is a multiple of this, so that up to so many cores finish together.
_CORES = 16


def run(params: Params) -> None:
    """Fills data/resized/.

    Raises:
        UserError: there is no data/raw/, or a class has no readable image.
    """
    settings = params.resize
    with open_raw("data/raw") as (raw, files), whole_folder("data/resized") as folder:
        shards = _shards(files, params.input_shape)
        jobs = [(folder / f"images-{i:05d}.npy", shard) for i, shard in enumerate(shards)]
        num_found = Counter[str]()
        quarantined = [
            {"path": path, "reason": reason}
            for path, reason in Source.read("data/raw").skipped.items()
        ]
        num_workers = num_cores() if settings.workers == "auto" else settings.workers
        with (
            process_pool(min(num_workers, len(jobs)), _open, (raw,)) as pool,
            (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as table,
            tqdm(total=len(files), desc="resizing", unit="image", disable=None) as progress,
        ):
            writer = csv.DictWriter(
                table,
                list(manifest.COLUMNS),
                lineterminator="\n",
                quoting=manifest.quoting(file.path for file in files),
            )
            writer.writeheader()
            for kept, refused in pool.map(partial(_write_shard, settings), jobs):
                writer.writerows(kept)  # at once: 20,000 of them would take 40 MB
                num_found.update(row["label"] for row in kept)
                quarantined += refused
                progress.update(len(kept) + len(refused))
        class_names = _check_classes(files, num_found, quarantined)
        manifest.write(
            pd.DataFrame(quarantined, columns=list(manifest.QUARANTINE_COLUMNS)),
            folder / "quarantine.csv",
            manifest.QUARANTINE_COLUMNS,
        )
        manifest.write_class_names(class_names, folder)
    size = f"{settings.size} x {settings.size}"
    print(f"{num_found.total():,} images of {len(class_names)} classes at {size}, {settings.color}")
    if quarantined:
        print(f"{len(quarantined):,} files quarantined, see data/resized/quarantine.csv")


def _shards(files: list[RawImage], shape: tuple[int, int, int]) -> list[list[RawImage]]:
    """The files in runs of equal length; it depends on nothing but their number and size."""
    fitting = max(1, _SHARD_BYTES // int(np.prod(shape)))
    turns = -(-len(files) // (fitting * _CORES))
    length = -(-len(files) // (turns * _CORES))
    return [files[i : i + length] for i in range(0, len(files), length)]


_raw: Raw  # in each worker process


def _open(raw: Raw) -> None:
    global _raw
    _raw = raw


def _write_shard(
    settings: Resize, job: tuple[Path, list[RawImage]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Writes one shard of the readable images; the rows of the manifest and of the quarantine."""
    path, files = job
    kept: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    with shard_writer(path) as append:
        for file in files:
            try:
                data = _raw.read(file)
                image = decode(data)
            except UnreadableImage as error:
                refused.append({"path": file.path, "reason": str(error)})
                continue
            pixels = prepare(image, settings.size, settings.mode, settings.color)
            append(pixels)
            kept.append(
                {
                    "path": file.path,
                    "label": file.label,
                    "official": file.official,
                    "width": image.shape[1],
                    "height": image.shape[0],
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "phash": perceptual_hash(pixels),
                    "shard": path.name,
                    "row": len(kept),
                }
            )
    return kept, refused


def _check_classes(
    files: list[RawImage], found: Counter[str], quarantined: list[dict[str, Any]]
) -> list[str]:
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
