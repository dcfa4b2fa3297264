"""A full disk in each stage: one clear line, what was there stays, and a rerun works with room."""

import hashlib
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.drills.drill import Drill, change_settings, compared, repository, run

STAGES = ("download", "resize", "split", "train", "evaluate")
OUTPUTS = {
    "download": ["data/raw"],
    "resize": ["data/resized"],
    "split": ["data/split.csv"],
    "train": ["models", "reports/train"],
    "evaluate": ["reports/test"],
}
# Another result, so that the stage has something to write; a few kilobytes less than it needs.
CHANGES: dict[str, dict[str, object]] = {
    "download": {"download__limit_per_class": 30},
    "resize": {"resize__color": "rgb"},
    "split": {"base__seed": 7},
    "train": {"train__learning_rate": 0.002},
    "evaluate": {"evaluate__mistakes": 5},
}
LEFT = {"download": 50, "resize": 100, "split": 0, "train": 200, "evaluate": 30}
"""Kilobytes on the disk when the stage begins."""


def in_a_namespace(stage: str) -> str:
    """Practises in a process that may mount a file system of its own."""
    with repository(train__epochs=3) as place:
        command = ["unshare", "--user", "--map-root-user", "--mount"] if os.getuid() else [
            "unshare", "--mount"]  # fmt: skip
        ended = subprocess.run(
            [*command, sys.executable, "-m", "benchmarks.drills.disk", stage, str(place)],
            capture_output=True, text=True,
        )  # fmt: skip
        return ended.stdout.strip() or ended.stderr


def content(place: Path, outputs: list[str]) -> str:
    """A checksum of the files and their names."""
    total = hashlib.sha256()
    for output in outputs:
        for path in sorted([place / output, *(place / output).rglob("*")]):
            total.update(str(path.relative_to(place)).encode())
            total.update(path.read_bytes() if path.is_file() else b"")
    return total.hexdigest()


def full(stage: str, original: Path) -> str:
    """Fills a small disk up, runs the stage, makes room, and runs it again."""
    with TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=True)
        try:
            place = Path(folder) / "repository"
            shutil.copytree(original, place, symlinks=True)
            for each in STAGES:
                run(place, "cnnpipe", each).check_returncode()
            before = content(place, OUTPUTS[stage])
            change_settings(place, **CHANGES[stage])
            filler = Path(folder) / "filler"
            free = shutil.disk_usage(folder).free - (LEFT[stage] << 10)
            with filler.open("wb") as file:
                file.write(bytes(free))
            refused = run(place, "cnnpipe", stage)
            kept = content(place, OUTPUTS[stage])
            leftovers = [str(p) for p in place.glob("**/.*.part") if ".cnnpipe" not in str(p)]
            filler.unlink()
            again = run(place, "cnnpipe", stage)
            errors = [line for line in refused.stderr.splitlines() if line.startswith("cnnpipe: ")]
            return compared(
                **{f"code 1 but {refused.returncode}": refused.returncode == 1},
                **{f"one line about space but {refused.stderr!r}": len(errors) == 1
                   and "No space left" in errors[0] and "Traceback" not in refused.stderr},
                as_it_was=kept == before,
                **{f"nothing half-written but {leftovers}": not leftovers},
                **{f"well once there is room but {again.stderr}": again.returncode == 0},
                new_result=content(place, OUTPUTS[stage]) != before,
            )  # fmt: skip
        finally:
            subprocess.run(["umount", folder], check=True)


DRILLS = [
    Drill(
        f"full-{stage}",
        f"the disk is full in {stage}",
        "code 1, one line, old outputs intact, a rerun with room works",
        partial(in_a_namespace, stage),
    )
    for stage in STAGES
]

if __name__ == "__main__":
    print(full(sys.argv[1], Path(sys.argv[2])))
