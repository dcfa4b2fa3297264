"""Copies planted among photos: how many are found, what is taken for one, and what it costs."""

import io
import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from benchmarks.harness import Row, at_most, photos, report
from cnnpipe.data.decode import decode
from cnnpipe.data.drawn_pets import NUM_IMAGES, draw
from cnnpipe.data.duplicates import SIDE, duplicate_groups, thumbnail
from cnnpipe.data.resizer import resize

SIZE = 300
COUNTS = (5_000, 10_000, 25_000, 50_000)

Rng = np.random.Generator


def encoded(image: np.ndarray, quality: int) -> np.ndarray:
    """What is left of an image as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return decode(file.getvalue())


def scaled(image: np.ndarray, factor: float) -> np.ndarray:
    """At another size."""
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def cropped(image: np.ndarray, rng: Rng, both: bool = False) -> np.ndarray:
    """5 to 10 % less, cut off the four sides at random; or as much of each axis."""
    height, width = image.shape[:2]
    if both:
        shares = rng.uniform(0.05, 0.1, 2).repeat(2)
        shares[::2] *= rng.random(2)
        shares[1::2] -= shares[::2]
    else:
        shares = rng.uniform(0.05, 0.1) * rng.dirichlet(np.ones(4))
    top, bottom, left, right = shares
    return image[
        round(top * height) : height - round(bottom * height),
        round(left * width) : width - round(right * width),
    ]


KINDS: dict[str, Callable[[np.ndarray, Rng], np.ndarray]] = {
    "exact": lambda image, rng: image,
    "JPEG, quality 30": lambda image, rng: encoded(image, 30),
    "JPEG, quality 30 to 95": lambda image, rng: encoded(image, int(rng.integers(30, 96))),
    "half the size": lambda image, rng: scaled(image, 0.5),
    "twice the size": lambda image, rng: scaled(image, 2),
    "a quarter of the size": lambda image, rng: scaled(image, 0.25),
    "mirrored": lambda image, rng: image[:, ::-1],
    "5 to 10 % cut off": lambda image, rng: cropped(image, rng),
    "as much off each axis": lambda image, rng: cropped(image, rng, both=True),
    "cut, mirrored, JPEG": lambda image, rng: encoded(
        cropped(image[:, ::-1], rng), int(rng.integers(30, 96))
    ),
    "off each axis, mirrored, half, JPEG": lambda image, rng: encoded(
        scaled(cropped(image[:, ::-1], rng, both=True), 0.5), int(rng.integers(30, 96))
    ),
}


def look(image: np.ndarray) -> np.ndarray:
    """What the resize stage keeps of an image to find its copies by."""
    return thumbnail(resize(np.ascontiguousarray(image), SIZE, SIZE))


def strangers(looks: np.ndarray, count: int) -> np.ndarray:
    """(count, SIDE, SIDE) uint8: parts of two photos each, one shining through the other."""
    rng = np.random.default_rng(1)
    result = np.empty((count, SIDE, SIDE, 1), np.uint8)
    for image in result:
        parts = []
        for photo in looks[rng.integers(len(looks), size=2), :, :, None]:
            side = int(rng.integers(16, 29))
            top, left = rng.integers(0, SIDE - side, 2)
            parts.append(resize(photo[top : top + side, left : left + side], SIDE, SIDE))
        image[:] = np.average(parts, axis=0, weights=rng.uniform(0.3, 1, 2)).round()
    return result[:, :, :, 0]


def joined(looks: np.ndarray) -> int:
    """How many images are in a group with another one."""
    groups = duplicate_groups(looks)
    return int((np.bincount(groups)[groups] > 1).sum())


def main() -> None:
    """Runs the benchmark."""
    with photos() as folder:
        paths = sorted(folder.rglob("*.jpg"))
        originals = np.empty((len(paths), SIDE, SIDE), np.uint8)
        copies = np.empty((len(KINDS), *originals.shape), np.uint8)
        for i, path in enumerate(paths):
            image = decode(path.read_bytes())
            originals[i] = look(image)
            for kind, make in enumerate(KINDS.values()):
                copies[kind, i] = look(make(image, np.random.default_rng([i, kind])))
    n = len(paths)
    groups = duplicate_groups(originals)
    for first, other in enumerate(groups):
        if first != other:
            print(f"taken for copies: {paths[other]} and {paths[first]}")
    rows = [at_most("joined, originals", "all", n, joined(originals), "images", 0.005)]
    for kind, planted in zip(KINDS, copies, strict=True):
        of_all = duplicate_groups(np.concatenate([originals, planted]))
        found = int((of_all[:n] == of_all[n:]).sum())
        rows.append(Row(f"found, {kind}", "planted", n, found, "images", found / n, ">= 0.99"))
        assert len(set(of_all[:n])) == len(set(groups)), "copies have joined different originals"
    many = strangers(originals, max(COUNTS))
    chosen = copies[np.arange(n) % len(KINDS), np.arange(n)]
    of_all = duplicate_groups(np.concatenate([originals, chosen, many[:25_000]]))
    found = int((of_all[:n] == of_all[n : 2 * n]).sum())
    rows.append(Row("found, among 25,000", "planted", n, found, "images", found / n, ">= 0.99"))
    digits = (load_digits().images * (255 / 16)).round().astype(np.uint8)[..., None]
    for name, images in (
        ("digits", digits),
        ("drawn pets", (draw(42, i)[1] for i in range(NUM_IMAGES))),
    ):
        looks = np.stack([look(image) for image in images])
        rows.append(at_most(f"joined, {name}", "all", len(looks), joined(looks), "images", 0))
    seconds = {}
    for count in COUNTS:
        started = time.process_time()  # of all threads, whatever else the machine does
        num_joined = joined(many[:count])
        seconds[count] = time.process_time() - started
    # In a few pairs nearly the same part of one photo outweighs the other photo in both.
    rows.append(at_most("joined, strangers", "all", count, num_joined, "images", 0))
    for few, more in pairwise(COUNTS):
        what, limit = f"grouping {more:,} images", 1.25 * more / few
        rows.append(at_most(what, f"{few:,}", seconds[few], seconds[more], "CPU s", limit))
    report("duplicates", rows, ["numpy", "scipy"])


if __name__ == "__main__":
    main()
