"""What the paths of a command stand for: image files, folders of them, archives, standard input."""

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cnnpipe.data.decode import UnreadableImage
from cnnpipe.data.raw import RawImage, Tar, Zip, is_archive, is_hidden, open_archive
from cnnpipe.errors import UserError


@dataclass(frozen=True, slots=True)
class File:
    """A file to classify."""

    path: str
    """As it is shown; of one in an archive ARCHIVE/MEMBER."""
    named: bool
    """Whether the user named it itself, and not what holds it."""
    read: Callable[[], bytes]
    """Its bytes; raises `OSError` or `UnreadableImage`."""


def find_files(paths: list[str], stack: ExitStack, may_be_empty: bool = False) -> list[File]:
    """The files that the paths stand for; hidden ones in folders and archives are left out.

    Args:
        paths: image files, folders or zip or tar archives of them, or "-" for standard input.
        stack: archives can be read until it closes.
        may_be_empty: whether a folder or an archive may hold no files.

    Raises:
        UserError: a path does not exist, holds no files, or is an archive that cannot be read.
    """
    files: list[File] = []
    for path in paths:
        if path == "-":
            found = [File(path, True, sys.stdin.buffer.read)]
        elif Path(path).is_dir():
            found = list(_in_folder(path))
        elif not Path(path).exists():
            raise UserError(f"{path}: no such file or folder")
        elif Path(path).is_file() and is_archive(Path(path)):
            scratch = Path(tempfile.gettempdir())
            found = list(_in_archive(path, stack.enter_context(open_archive(Path(path), scratch))))
        else:
            found = [File(path, True, Path(path).read_bytes)]
        if not found and not may_be_empty:
            kind = "folder" if Path(path).is_dir() else "archive"
            raise UserError(f"{path}: the {kind} holds no files")
        files += found
    return files


def _in_folder(folder: str) -> Iterator[File]:
    for file in sorted(Path(folder).rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.is_file() and not hidden:
            yield File(str(file), False, file.read_bytes)


def _in_archive(path: str, archive: Zip | Tar) -> Iterator[File]:
    for member, entry in sorted(archive.members.items()):
        if not is_hidden(member):
            image = RawImage(member, "", "", entry)
            yield File(f"{path}/{member.lstrip('/')}", False, partial(_member, archive, image))


def _member(archive: Zip | Tar, image: RawImage) -> bytes:
    if isinstance(image.entry, str):
        raise UnreadableImage(image.entry)
    return archive.read(image)
