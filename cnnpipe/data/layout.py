"""From the paths of image files to their classes: how people lay folders out."""

from collections import Counter
from pathlib import PurePosixPath
from typing import NamedTuple

_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


class Place(NamedTuple):
    """What an image's path says of it."""

    label: str
    official: str
    """The split the data set's author put it in: train, val, test, or empty."""


class NoClasses(ValueError):
    """The files do not lie in at least two class folders; the message says what is there."""


def places(paths: list[str]) -> dict[str, Place]:
    """The class, and the official split where there is one, of each file in a class folder.

    The folders at the top are the classes, or train, val (or valid, validation) and test folders
    of class folders. A folder around all that is looked through. Files in folders below a class
    belong to the class. Hidden files and folders, and files outside class folders, are left out;
    so a folder of folders stays one with a Thumbs.db or a list of labels in it.

    Args:
        paths: relative, with forward slashes.

    Raises:
        NoClasses: fewer than two classes.
    """
    files = {path: parts for path in paths if (parts := _visible_parts(path))}
    depth = 0
    while True:
        tops = Counter(parts[depth] for parts in files.values() if len(parts) > depth + 1)
        direct = Counter(parts[depth] for parts in files.values() if len(parts) == depth + 2)
        # Folders of folders, but for a few files; a class may well be called train, or test.
        outer = {top for top in tops if 2 * direct[top] < tops[top]}
        named = {top: _SPLITS.get(top.lower()) for top in tops}
        if all(named.values()) and any(named[top] == "train" for top in outer):
            found = {
                path: Place(parts[depth + 1], _SPLITS[parts[depth].lower()])
                for path, parts in files.items()
                if len(parts) > depth + 2
            }
            break
        if len(tops) == 1 and outer:
            depth += 1
            continue
        found = {
            path: Place(parts[depth], "") for path, parts in files.items() if len(parts) > depth + 1
        }
        break
    labels = sorted({place.label for place in found.values()})
    if not labels:
        raise NoClasses(
            "holds no class folders: put each class's images in a folder of their own, "
            "such as cat/1.jpg and dog/1.jpg"
        )
    if len(labels) == 1:
        raise NoClasses(f"holds only one class, {labels[0]!r}: there must be two or more")
    return found


def _visible_parts(path: str) -> tuple[str, ...]:
    parts = PurePosixPath(path).parts
    if any(part.startswith(".") or part == "__MACOSX" for part in parts):
        return ()
    return parts
