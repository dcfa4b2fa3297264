"""From the bytes of a photo to 300 x 300 pixels, on one core: scikit-image, OpenCV, cnnpipe."""

import os
from pathlib import Path

import numpy as np
import skimage.io
import skimage.transform

from benchmarks.harness import at_most, faster, in_turn, needs, photos, report
from cnnpipe.data.decode import decode
from cnnpipe.data.resizer import resize

SIZE = (300, 300)


def by_scikit_image(path: Path) -> np.ndarray:
    """(300, 300, 3) float64 of 0-255."""
    image = skimage.io.imread(path)
    return skimage.transform.resize(
        image, SIZE, order=1, anti_aliasing=True, preserve_range=True
    )  # fmt: skip


def by_cnnpipe(path: Path) -> np.ndarray:
    """(300, 300, 3) uint8."""
    return resize(decode(path.read_bytes()), *SIZE)


def main() -> None:
    """Runs the benchmark."""
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
    with photos() as folder:
        paths = sorted(folder.rglob("*.jpg"))
        paths = paths[:: max(1, len(paths) // 150)]
        cases = {
            "cnnpipe": lambda: [by_cnnpipe(path) for path in paths],
            "scikit-image": lambda: [by_scikit_image(path) for path in paths[::5] * 2],
        }
        if needs("opencv-python-headless"):
            import cv2

            cv2.setNumThreads(1)
            cases["opencv"] = lambda: [
                cv2.resize(cv2.imread(str(path)), SIZE, interpolation=cv2.INTER_AREA)
                for path in paths
            ]
        seconds = {name: value / len(paths) for name, value in in_turn(cases, rounds=15).items()}
        off = np.concatenate(
            [
                np.abs(np.rint(by_scikit_image(path)) - by_cnnpipe(path)).ravel()
                for path in paths[::5]
            ]
        )
    seconds["scikit-image"] *= len(paths) / (2 * len(paths[::5]))
    what, ours = "decode and resize", seconds["cnnpipe"] * 1e3
    rows = [
        faster(what, "scikit-image", seconds["scikit-image"] * 1e3, ours, "ms", 9),
        at_most("values not the same", "all values", off.size, int((off > 0).sum()), "", 0.001),
        at_most("largest difference", "a grey level", 1, float(off.max()), "", 1),
    ]
    if "opencv" in seconds:
        rows.append(faster(what, "OpenCV, INTER_AREA", seconds["opencv"] * 1e3, ours, "ms", 1.0))
    report("pixels", rows, ["numpy", "scipy", "scikit-image", "simplejpeg"])


if __name__ == "__main__":
    main()
