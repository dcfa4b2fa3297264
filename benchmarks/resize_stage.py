"""The whole resize stage on two cores, with hashing and writing, against the same on one."""

from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.harness import CNNPIPE, command, faster, in_turn, photos, report, workspace

COUNT = 10_000


def main() -> None:
    """Runs the benchmark."""
    with photos() as images, TemporaryDirectory() as folder:
        cases = {}
        for workers in (1, 2):
            place = Path(folder) / str(workers)
            place.mkdir()
            workspace(place, images, COUNT, resize__workers=workers)
            cases[str(workers)] = command([CNNPIPE, "resize"], place)
        seconds = in_turn(cases, rounds=2)
    row = faster(
        f"resize stage, {COUNT:,} images", "on one core", seconds["1"], seconds["2"], "s", 1.7
    )
    report("resize_stage", [row])


if __name__ == "__main__":
    main()
