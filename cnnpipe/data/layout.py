"""From the paths of image files to their classes: how people lay folders out."""

from collections import Counter
from collections.abc import Mapping
from functools import cache
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
    """There are not at least two classes with files to read; the message says what is there."""


def places(paths: list[str]) -> dict[str, Place]:
    """The class, and the official split where there is one, of each file in a class folder.

    The folders at the top are the classes, or train, val (or valid, validation) and test folders
    of class folders. A folder around all that is looked through. Files in folders below a class
    belong to the class. Hidden files and folders, and files outside class folders, are left out;
    so a folder of folders stays one with a Thumbs.db or a list of labels in it.

    Args:
        paths: with forward slashes; where one begins with a slash, that is left out.

    Raises:
        NoClasses: fewer than two classes.
    """
    folder_of: dict[str, tuple[str, ...]] = {}
    for path in paths:
        parent, _, name = path.rpartition("/")
        if name and not name.startswith(".") and (parts := _parts(parent)):
            folder_of[path] = parts
    num_files = Counter(folder_of.values())
    depth = 0
    while True:
        # Of each folder at this depth, how many files lie below it, and how many in it.
        tops, direct = Counter[str](), Counter[str]()
        for folder, number in num_files.items():
            if len(folder) > depth:
                tops[folder[depth]] += number
            if len(folder) == depth + 1:
                direct[folder[depth]] += number
        # Folders of folders, but for a few files; a class may well be called train, or test.
        outer = {top for top in tops if 2 * direct[top] < tops[top]}
        named = {top: _SPLITS.get(top.lower()) for top in tops}
        if all(named.values()) and any(named[top] == "train" for top in outer):
            place_of = {
                folder: Place(folder[depth + 1], _SPLITS[folder[depth].lower()])
                for folder in num_files
                if len(folder) > depth + 1
            }
            break
        if len(tops) == 1 and outer:
            depth += 1
            continue
        place_of = {folder: Place(folder[depth], "") for folder in num_files if len(folder) > depth}
        break
    found = {path: place_of[folder] for path, folder in folder_of.items() if folder in place_of}
    labels = sorted({place.label for place in found.values()})
    if not labels:
        raise NoClasses(
            "holds no class folders: put each class's images in a folder of their own, "
            "such as cat/1.jpg and dog/1.jpg"
        )
    if len(labels) == 1:
        raise NoClasses(f"holds only one class, {labels[0]!r}: there must be two or more")
    return found


def check_readable(found: Mapping[str, Place], reasons: Mapping[str, str]) -> None:
    """Passes where each class has a file that can be read.

    Args:
        found: the place of each file.
        reasons: why files cannot be read, by their paths.

    Raises:
        NoClasses: a class has none.
    """
    left = {place.label for path, place in found.items() if path not in reasons}
    for path, place in sorted(found.items()):
        if place.label not in left:
            raise NoClasses(
                f"class {place.label!r}: none of its files can be read, the first is "
                f"{path}: {reasons[path]}"
            )


@cache  # one tuple for all files of a folder
def _parts(folder: str) -> tuple[str, ...]:
    """The folders from the top down; none where one of them is hidden."""
    parts = PurePosixPath(folder.lstrip("/")).parts
    if any(part.startswith(".") or part == "__MACOSX" for part in parts):
        return ()
    return parts
