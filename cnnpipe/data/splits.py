"""Which images are trained on, which choose the checkpoint, and which are kept for the end."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

SPLITS = ("train", "val", "test")


def assign_splits(
    labels: Sequence[str],
    keys: Sequence[str],
    groups: np.ndarray,
    official: Sequence[str],
    val: float,
    test: float,
    seed: int,
) -> np.ndarray:
    """The split of each image, (N,) of "train", "val" or "test".

    Each class gives the same shares, and a group goes to one split whole. The order in which
    images are drawn is that of a hash of the seed and the image's bytes: neither names nor the
    order of the files matter, and an image added later moves hardly any other.

    An official test or validation split is kept as it is, also where a copy of one of its images
    is in the official training split; only what is missing is drawn from the rest.

    Args:
        labels: the class name of each image.
        keys: what the order is drawn from, the SHA-256 of each file.
        groups: (N,) equal numbers for images that must stay together.
        official: train, val, test or empty, for each image.
        val: the share of each class for validation.
        test: the share of each class for the test.
        seed: base.seed.
    """
    splits = np.array([name or "train" for name in official], dtype="<U5")
    given = set(official)
    free = [row for row in range(len(labels)) if official[row] in ("", "train")]
    shares = {split: share for split, share in (("test", test), ("val", val)) if split not in given}
    members: dict[int, list[int]] = defaultdict(list)
    for row in free:
        members[int(groups[row])].append(row)
    of_class: dict[str, list[list[int]]] = defaultdict(list)
    for rows in members.values():
        # A group of contradicting labels counts for one class, whatever the order of the rows.
        _, label = min((keys[row], labels[row]) for row in rows)
        of_class[label].append(rows)
    for class_groups in of_class.values():
        class_groups.sort(key=lambda rows: _order(seed, min(keys[row] for row in rows)))
        _draw(class_groups, shares, splits)
    return splits


def _draw(class_groups: list[list[int]], shares: dict[str, float], splits: np.ndarray) -> None:
    """Marks the images of one class that are held out, in place; at least one group stays."""
    sizes = sorted(map(len, class_groups))
    # Where groups are so few or so large that none fits a share, the smallest are held out.
    least = sizes if len(sizes) > len(shares) else [0] * len(shares)
    wanted = {
        split: max(round(share * sum(sizes)), size)
        for (split, share), size in zip(shares.items(), least, strict=False)
    }
    left = len(class_groups)
    for rows in class_groups:
        for split in wanted:
            if left > 1 and len(rows) <= wanted[split]:
                splits[rows] = split
                wanted[split] -= len(rows)
                break
        else:
            continue
        left -= 1


def _order(seed: int, key: str) -> bytes:
    return hashlib.blake2b(f"{seed} {key}".encode(), digest_size=16).digest()
