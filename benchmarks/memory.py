"""Peak memory of resize, train and evaluate with 2,000 and with 20,000 images of 300 x 300."""

from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.harness import CNNPIPE, at_most, command, peak_memory, photos, report, workspace

FEW, MANY = 2_000, 20_000


def main() -> None:
    """Runs the benchmark."""
    peaks: dict[tuple[str, int], float] = {}
    with photos() as images, TemporaryDirectory() as folder:
        for count in (FEW, MANY):
            place = Path(folder) / str(count)
            place.mkdir()
            workspace(place, images, count, train__epochs=1)
            for stage in ("resize", "split", "train", "evaluate"):
                if stage == "split":
                    command([CNNPIPE, stage], place)()
                else:
                    peaks[stage, count] = peak_memory([CNNPIPE, stage], place)
    rows = [
        at_most(f"{stage}, {MANY:,} images", f"{FEW:,} images", few, peaks[stage, MANY], "MB", 1.15)
        for (stage, count), few in peaks.items()
        if count == FEW
    ]
    # The tutorial's: numpy.array of what skimage.transform.resize returns, float64.
    array = MANY * 300 * 300 * 3 * 8 / 1e6
    most = max(peak for (_, count), peak in peaks.items() if count == MANY)
    rows.append(
        at_most(f"the most of them, {MANY:,} images", "one float64 array", array, most, "MB", 1 / 8)
    )
    rows.append(
        at_most(
            f"the most of them, {MANY:,} images", "one float32 array", array / 2, most, "MB", 1 / 8
        )
    )
    report("memory", rows, ["torch"])


if __name__ == "__main__":
    main()
