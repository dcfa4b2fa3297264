"""What the paths of a command stand for: image files, folders of them, archives, standard input.

Files, folders and archives may be on an object storage, at s3://bucket/key.
"""

import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from cnnpipe.addresses import WHERE_CREDENTIALS_BELONG, has_secret
from cnnpipe.data import object_storage
from cnnpipe.data.decode import UnreadableImage
from cnnpipe.data.raw import (
    HEAD_BYTES,
    RawImage,
    Tar,
    Zip,
    is_archive,
    is_archive_head,
    is_hidden,
    open_archive,
)
from cnnpipe.errors import UserError

_CONNECTIONS = 8
"""Objects that are read at a time: of a small one most time is waiting for its first byte."""


@dataclass(frozen=True, slots=True)
class File:
    """A file to classify."""

    path: str
    """As it is shown; of one in an archive ARCHIVE/MEMBER."""
    named: bool
    """Whether the user named it itself, and not what holds it."""
    read: Callable[[], bytes]
    """Its bytes; raises `OSError` or `UnreadableImage`."""
    is_object: bool = False
    """Whether it is read from an object storage; several can be at a time."""


def find_files(paths: list[str], stack: ExitStack, may_be_empty: bool = False) -> list[File]:
    """The files that the paths stand for; hidden ones in folders and archives are left out.

    Args:
        paths: image files, folders or zip or tar archives of them, also as addresses s3://...,
            or "-" for standard input.
        stack: archives can be read until it closes.
        may_be_empty: whether a folder or an archive may hold no files.

    Raises:
        UserError: a path does not exist, holds no files, or is an archive that cannot be read.
        RunFailed: the object storage does not answer.
    """
    files: list[File] = []
    for path in paths:
        if path == "-":
            found = [File(path, True, sys.stdin.buffer.read)]
        elif path.startswith(object_storage.SCHEME):
            found = _in_storage(path, stack, may_be_empty)
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
            raise UserError(f"{path}: holds no files")
        files += found
    return files


def read_ahead(files: Iterable[File]) -> Iterator[tuple[File, Callable[[], bytes]]]:
    """Each file with what gives its bytes, as `File.read`; the next few objects are under way."""
    with ThreadPoolExecutor(_CONNECTIONS, "objects") as pool:
        begun: deque[tuple[File, Callable[[], bytes]]] = deque()
        for file in files:
            begun.append((file, pool.submit(file.read).result if file.is_object else file.read))
            if len(begun) > _CONNECTIONS:
                yield begun.popleft()
        yield from begun


def _in_folder(folder: str) -> Iterator[File]:
    for file in sorted(Path(folder).rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.is_file() and not hidden:
            yield File(str(file), False, file.read_bytes)


def _in_storage(address: str, stack: ExitStack, may_be_empty: bool) -> list[File]:
    """As `find_files`, of one address. A folder is what ends with a slash, or is begun by keys."""
    if has_secret(address):
        raise UserError(
            f"an address {object_storage.SCHEME}... holds credentials: they belong in "
            f"{WHERE_CREDENTIALS_BELONG}"
        )
    try:
        there = object_storage.find(address)
        if there.is_folder:
            return list(_in_bucket(address.rstrip("/")))
        head = object_storage.read(address, HEAD_BYTES) if there.size else b""
        if not is_archive_head(head):
            return [File(address, True, partial(object_storage.read, address), is_object=True)]
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        copy = scratch / PurePosixPath(address).name
        object_storage.copy(address, copy)
    except object_storage.Refused as error:
        if may_be_empty and address.endswith("/"):  # a folder is there as soon as a file is in it
            return []
        raise UserError(f"{address}: {error.strerror}") from None
    return list(_in_archive(address, stack.enter_context(open_archive(copy, scratch, address))))


def _in_bucket(folder: str) -> Iterator[File]:
    # In the order of a local folder's paths, of which a slash comes first.
    for address in sorted(object_storage.addresses(folder), key=lambda found: found.split("/")):
        relative = address.removeprefix(f"{folder}/")
        if not any(part.startswith(".") for part in relative.split("/")):
            yield File(address, False, partial(object_storage.read, address), is_object=True)


def _in_archive(path: str, archive: Zip | Tar) -> Iterator[File]:
    for member, entry in sorted(archive.members.items()):
        if not is_hidden(member):
            image = RawImage(member, "", "", entry)
            yield File(f"{path}/{member.lstrip('/')}", False, partial(_member, archive, image))


def _member(archive: Zip | Tar, image: RawImage) -> bytes:
    if isinstance(image.entry, str):
        raise UnreadableImage(image.entry)
    return archive.read(image)
