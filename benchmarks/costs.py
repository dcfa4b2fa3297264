"""What an image costs in each stage, and from that what a million and a billion cost.

    python -m benchmarks.costs [FEW MANY]

Each stage runs on FEW and on MANY photos: what it takes for an image more is the slope, what it
takes for none the rest. Prints the tables of docs/scaling.md and writes results/costs.json.
"""

import hashlib
import json
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.harness import CNNPIPE, RESULTS, machine, peak_memory, photos, workspace

STAGES = ("download", "resize", "split", "train", "evaluate")
WRITES = {"download": "data/raw", "resize": "data/resized", "split": "data/split.csv",
          "train": "models", "evaluate": "reports/test"}  # fmt: skip
TRAIN, TEST = 0.7, 0.15
EPOCHS = 5
GPU_MS = 0.0615
"""Of training the same network on one H200, an image: benchmarks/README.md, "On a GPU"."""
TRAIN_MEMORY_BYTES = 390
"""Of `train`, an image: benchmarks.scale, from 2,000 to 100,000. Here its buffers, which depend on
the batch, drown that; likewise in `evaluate`."""


@dataclass
class Cost:
    """Of one stage: `fixed` once, and the rest for each image of the set."""

    fixed_s: float
    """Of the processor."""
    cpu_ms: float
    """Of the processor, summed over the cores; `train` for one epoch."""
    bytes_written: float
    fixed_mb: float
    """Of memory."""
    memory_bytes: float


def measured(place: Path) -> dict[str, tuple[float, float, int]]:
    """Of each stage, run there: seconds of the processor, peak memory in MB, bytes written."""
    found = {}
    for stage in STAGES:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        peak = peak_memory([CNNPIPE, stage], place)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found[stage] = (seconds, peak, _size(place / WRITES[stage]))
    return found


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def costs(few: int, many: int) -> tuple[dict[str, Cost], float]:
    """Of each stage; and the seconds of the processor that MD5 takes for a GB, as DVC hashes."""
    found = {}
    with photos() as images, TemporaryDirectory() as folder:
        for count in (few, many):
            place = Path(folder) / str(count)
            place.mkdir()
            workspace(place, images, count, train__epochs=1)
            found[count] = measured(place)
        archive = max((place / "data/raw").iterdir(), key=lambda file: file.stat().st_size)
        started = time.process_time()
        with archive.open("rb") as file:
            hashlib.file_digest(file, "md5")
        md5 = (time.process_time() - started) / archive.stat().st_size * 1e9
    result = {}
    for stage in STAGES:
        (s1, m1, b1), (s2, m2, b2) = found[few][stage], found[many][stage]
        a_second, a_mb, a_byte = ((y - x) / (many - few) for x, y in ((s1, s2), (m1, m2), (b1, b2)))
        result[stage] = Cost(
            s1 - a_second * few, a_second * 1e3, a_byte, m1 - a_mb * few, a_mb * 1e6
        )
    return result, md5


def needs(cost: dict[str, Cost], md5: float, count: float) -> dict[str, str]:
    """What so many images need, by name."""
    epochs = dict.fromkeys(STAGES, 1) | {"train": EPOCHS}
    core_hours = {stage: cost[stage].cpu_ms * count * epochs[stage] / 3.6e6 for stage in STAGES}
    raw, resized = (cost[stage].bytes_written * count for stage in ("download", "resize"))
    result = {
        f"{stage}{f', {EPOCHS} epochs' if stage == 'train' else ''}: core hours": f"{hours:,.1f}"
        for stage, hours in core_hours.items()
    }
    return result | {
        "hashing by DVC, of what is written: hours": f"{(raw + resized) / 1e9 * md5 / 3600:,.1f}",
        f"train, {EPOCHS} epochs: GPU hours": f"{GPU_MS * TRAIN * count * EPOCHS / 3.6e6:,.2f}",
        "disk, raw: TB": f"{raw / 1e12:,.3f}",
        "disk, resized: TB": f"{resized / 1e12:,.3f}",
        "read by an epoch: TB": f"{resized * (TRAIN + TEST) / 1e12:,.3f}",
        **{
            f"memory of {stage}: GB": f"{cost[stage].fixed_mb / 1e3 + a_byte * count / 1e9:,.1f}"
            for stage, a_byte in {
                "resize": cost["resize"].memory_bytes,
                "split": cost["split"].memory_bytes,
                "train": TRAIN_MEMORY_BYTES,
            }.items()
        },
    }


def main(few: int = 2_000, many: int = 12_000) -> None:
    """Runs the benchmark."""
    cost, md5 = costs(few, many)
    print("| stage | once, s | an image, ms | writes, bytes | memory once, MB | an image, bytes |")
    print("|---|---|---|---|---|---|")
    for stage, of in cost.items():
        print(
            f"| {stage} | {of.fixed_s:.1f} | {of.cpu_ms:.2f} | {of.bytes_written:,.0f} | "
            f"{of.fixed_mb:,.0f} | {of.memory_bytes:,.0f} |"
        )
    print(f"\nMD5: {md5:.2f} s a GB\n\n| | a million | a billion |\n|---|---|---|")
    million, billion = (needs(cost, md5, count) for count in (1e6, 1e9))
    for name in million:
        print(f"| {name} | {million[name]} | {billion[name]} |")
    RESULTS.mkdir(exist_ok=True)
    content = {
        "machine": machine(["torch", "dvc"]),
        "costs": {stage: asdict(of) for stage, of in cost.items()},
        "md5_s_a_gb": md5, "million": million, "billion": billion,
    }  # fmt: skip
    (RESULTS / "costs.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
