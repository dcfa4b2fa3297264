"""data/raw/: the images as obtained, an archive still an archive, and how they are read from it.

`source.json` says what is there. Every kind of archive is read the same way: a list of images,
each with its path, class and official split, and the bytes of any of them.
"""

import bz2
import errno
import gzip
import hashlib
import io
import json
import lzma
import os
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from PIL import Image

from cnnpipe.data.decode import UnreadableImage
from cnnpipe.data.layout import NoClasses, check_readable, places
from cnnpipe.errors import UserError, printable
from cnnpipe.workspace import whole_file

SOURCE_FILE = "source.json"

HEAD_BYTES = tarfile.BLOCKSIZE
"""So much of a file tells an archive from an image."""

# Larger files are no images of any use, and are not read.
_MAX_FILE_BYTES = 1 << 30

# Archives made to fill the disk are refused. Images hardly compress, even plain ones of one colour
# not so much, and a small archive does no harm.
_MAX_PLAIN_BYTES = 1 << 30
_MAX_RATIO = 100

_CHUNK_BYTES = 1 << 20

_DAMAGED = (
    *(zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, struct.error),
    # Of fields that cannot be: the standard library does not check all of them itself.
    *(EOFError, OSError, ValueError, NotImplementedError, OverflowError, RecursionError),
)
"""What reading a damaged archive raises."""

# By what the file says, since tarfile would look into a compressed one without a limit.
_COMPRESSED: tuple[tuple[bytes, Any], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\0", lzma.open),
    (b"]\0\0", lzma.open),
)
_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_TEXTS = ("", ".txt", ".md", ".rst", ".pdf", ".html", ".csv", ".json", ".xml")

_LINK, _NOT_A_FILE, _ENCRYPTED = "a link, not a file", "not a file", "encrypted"


@dataclass(frozen=True, slots=True)
class RawImage:
    """One file of the data set that lies in a class folder; whether it is an image is not known."""

    path: str
    label: str
    official: str
    """The split the data set's author put it in: train, val, test, or empty."""
    entry: Any = field(default=None, compare=False, repr=False)
    """Where it is in its archive, for `Raw.read`.

    It travels with the image, so that no worker looks it up in the index: Python counts references
    inside the objects, and each forked process would soon have a copy of all of them.
    """


@dataclass(frozen=True)
class Source:
    """What `source.json` holds."""

    source: str
    """The value of download.source."""
    origin: str
    """Where it came from: a URL, a folder, or the program's own generator."""
    archives: tuple[str, ...]
    """The files in the folder, in the order in which they are to be read."""
    limit_per_class: int | None = None
    class_names: tuple[str, ...] = ()
    """For archives that number their classes."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Files that could not even be read, with the reason."""

    def write(self, folder: Path) -> None:
        """Puts `source.json` into the folder."""
        with whole_file(folder / SOURCE_FILE) as part:
            part.write_text(json.dumps(vars(self), indent=2) + "\n")

    @staticmethod
    def read(folder: str | Path) -> "Source":
        """The folder's `source.json`.

        Raises:
            UserError: there is none.
        """
        path = Path(folder) / SOURCE_FILE
        try:
            content: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(f"{path}: no such file: run `cnnpipe download` first") from None
        lists = {key: tuple(content[key]) for key in ("archives", "class_names")}
        return Source(**{**content, **lists})


class Raw(Protocol):
    """The images of data/raw. Other processes can read from it at the same time."""

    @property
    def images(self) -> list[RawImage]:
        """All files in class folders, sorted by path."""

    def read(self, image: RawImage) -> bytes:
        """The bytes of the image file."""


@contextmanager
def open_raw(folder: str | Path, plain: Path | None = None) -> Iterator[tuple[Raw, list[RawImage]]]:
    """The data set in data/raw, and its images under `limit_per_class`, sorted by path.

    Args:
        folder: data/raw.
        plain: the copy of its compressed tar that another process has made, and still has.

    Raises:
        UserError: there is no data set, or its files do not lie in class folders.
    """
    folder = Path(folder)
    source = Source.read(folder)
    archive = folder / source.archives[0]
    with ExitStack() as stack:
        try:
            raw = stack.enter_context(_open(folder, source, plain))
            images = raw.images
        except NoClasses as error:
            raise UserError(f"{archive}: {error}") from None
        except _DAMAGED as error:
            if getattr(error, "errno", None) == errno.ENOSPC:  # for the copy of an archive
                raise
            raise UserError(
                f"{archive}: cannot be read, run `cnnpipe download` again: {error}"
            ) from None
        yield raw, _limited(images, source.limit_per_class)


@contextmanager
def _open(folder: Path, source: Source, plain: Path | None) -> Iterator[Raw]:
    paths = tuple(folder / name for name in source.archives)
    if source.class_names:
        yield Idx(paths, source.class_names)
    else:
        with _open_archive(plain or paths[0], folder.parent) as archive:
            yield archive


def is_archive(path: Path) -> bool:
    """Whether the file begins as a zip or tar archive does, compressed or not; no image does.

    One that cannot be read is none: whoever reads it finds out why.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return False
    return is_archive_head(head)


def is_archive_head(head: bytes) -> bool:
    """Whether a file that begins with these `HEAD_BYTES` is a zip or tar archive."""
    return _is_tar(head) or head.startswith((b"PK", *(magic for magic, _ in _COMPRESSED)))


@contextmanager
def open_archive(path: Path, scratch: Path, name: str = "") -> "Iterator[Zip | Tar]":
    """A zip or tar archive of any files, for as long as the block.

    Args:
        path: the archive.
        scratch: a folder for the plain copy of a compressed tar, which goes with the block.
        name: what an error calls the archive, if not by its path.

    Raises:
        UserError: it is damaged, or made to do harm.
    """
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(_open_archive(path, scratch))
        except _DAMAGED as error:
            if getattr(error, "errno", None) == errno.ENOSPC:  # for the copy
                raise
            raise UserError(f"{name or path}: the archive is damaged: {error}") from None
        yield archive


class _NoArchive(ValueError):
    def __init__(self) -> None:
        super().__init__("neither a zip nor a tar archive")


@contextmanager
def _open_archive(path: Path, scratch: Path) -> "Iterator[Zip | Tar]":
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    # First, since a tar begins with a name, such as PKLot/1.jpg; and zip's test is content with a
    # zip archive at its end.
    if _is_tar(head):
        yield Tar(path)
    elif head.startswith(b"PK"):
        yield Zip(path)
    elif openers := [opener for magic, opener in _COMPRESSED if head.startswith(magic)]:
        # A compressed tar can only be read from the front, a plain copy from anywhere.
        with tempfile.TemporaryDirectory(dir=scratch, prefix=".untar.") as folder:
            plain = Path(folder) / "plain.tar"
            with openers[0](path) as stream, plain.open("wb") as copy:
                while chunk := stream.read(_CHUNK_BYTES):
                    if not copy.tell() and not _is_tar(chunk):
                        raise _NoArchive
                    copy.write(chunk)
                    _check_size(path, copy.tell())
            yield Tar(plain)
    elif zipfile.is_zipfile(path):
        yield Zip(path)
    else:
        raise _NoArchive


def _is_tar(data: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(data[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
        return True
    except (tarfile.TarError, ValueError):
        return False


def _check_size(path: Path, num_bytes: int) -> None:
    packed = path.stat().st_size
    if num_bytes > max(_MAX_PLAIN_BYTES, _MAX_RATIO * packed):
        raise UserError(
            f"{path.name}: unpacks to more than {_MAX_RATIO} times its {packed:,} bytes, which no "
            "archive of images does"
        )


def check_archive(path: Path, outer: str = "") -> tuple[Path, dict[str, str]]:
    """The archive to keep, and which files in its class folders cannot be read, with the reasons.

    Where an archive holds another and no images, the inner one is kept; it is copied to the folder
    `NAME.inner` beside the outer one.

    Args:
        path: the archive.
        outer: what the archive came out of.

    Raises:
        UserError: it is no zip or tar archive of class folders, or one that does harm.
        OSError: the disk is full.
    """
    name = printable(f"{outer}: {path.name}" if outer else path.name)
    try:
        with _open_archive(path, path.parent) as archive:
            members = archive.members
            if members and all(entry == _ENCRYPTED for entry in members.values()):
                raise UserError(f"{name}: is encrypted: pack it again without the password")
            try:
                check_readable(places(list(members)), archive.reasons)
                return path, archive.skipped
            except NoClasses:
                inner = _inner_archive(members)
                if not inner:
                    raise
            if outer or len(inner) > 1 or isinstance(members[inner[0]], str):
                raise UserError(
                    f"{name}: holds no class folders but archives, such as "
                    f"{printable(inner[0])}: unpack them, and set download.source=folder"
                )
            suffix = next(suffix for suffix in _SUFFIXES if inner[0].lower().endswith(suffix))
            kept = path.with_name(f"{path.name}.inner") / f"images{suffix}"
            with whole_file(kept) as part, part.open("wb") as file:
                file.writelines(archive.chunks(members[inner[0]]))
        print(f"{name}: holds {printable(inner[0])} alone, which is taken instead")
        return check_archive(kept, name)
    except NoClasses as error:
        raise UserError(f"{name}: {error}") from None
    except _NoArchive as error:
        raise UserError(f"{name}: {error}") from None
    except _DAMAGED as error:
        if getattr(error, "errno", None) == errno.ENOSPC:  # for what is unpacked or taken out
            raise
        raise UserError(f"{name}: the archive is damaged: {error}") from None


def _inner_archive(paths: Iterable[str]) -> list[str]:
    """The archives among the paths; none where there are other files, but for texts."""
    visible = [path for path in paths if not is_hidden(path)]
    inner = [path for path in visible if path.lower().endswith(_SUFFIXES)]
    others = {PurePosixPath(path).suffix.lower() for path in set(visible) - set(inner)}
    return inner if others <= set(_TEXTS) else []


def is_hidden(path: str) -> bool:
    """Whether a file of an archive, or a folder that it lies in, is hidden, or macOS's own."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/") if part)


class _File(io.RawIOBase):
    """A file to read from, with a position of its own.

    The position of an ordinary file is the system's, and forked processes move it for each other.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_CUR:
            offset += self._position
        elif whence == os.SEEK_END:
            offset += os.fstat(self._descriptor).st_size
        self._position = offset
        return offset

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        num_bytes = os.preadv(self._descriptor, [buffer], self._position)
        self._position += num_bytes
        return num_bytes

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


class _Headers(_File):
    """A tar archive whose headers alone are read, each after the one before.

    A header can say that it is gigabytes long, or that the next one lies before it; tarfile would
    read it whole, or run in circles.
    """

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        before = self._position
        if super().seek(offset, whence) < before:
            raise tarfile.ReadError("a header of negative size")
        return self._position

    def read(self, size: int = -1, /) -> bytes:
        if not 0 <= size <= _CHUNK_BYTES:
            raise tarfile.ReadError("a header without end")
        return super().read(size) or b""


class _Archive:
    """What zip and tar archives of class folders share."""

    path: Path
    members: dict[str, Any]
    """By path, of several of one name the last: where to read a file, or why it cannot be (str)."""

    @property
    def reasons(self) -> dict[str, str]:
        """Why members cannot be read, wherever they lie."""
        return {path: entry for path, entry in self.members.items() if isinstance(entry, str)}

    @property
    def images(self) -> list[RawImage]:
        """All files in class folders that can be read, sorted by path."""
        return [
            RawImage(path, place.label, place.official, self.members[path])
            for path, place in sorted(places(list(self.members)).items())
            if not isinstance(self.members[path], str)
        ]

    @property
    def skipped(self) -> dict[str, str]:
        """What else lies in class folders, sorted by path, with the reasons."""
        found, reasons = places(list(self.members)), self.reasons
        return {path: reasons[path] for path in sorted(reasons) if path in found}

    def _add(self, path: str, entry: Any) -> None:
        if ".." in path.split("/"):
            raise UserError(
                f"{self.path.name}: {printable(path)} leads out of the archive: pack it again, "
                "from within its folder"
            )
        if "\0" in path or any("\ud800" <= c <= "\udfff" for c in path):
            path, entry = printable(path), "its name is not text"
        self.members[path] = entry


class Zip(_Archive):
    """A zip archive of class folders."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.members = {}
        self._archive = zipfile.ZipFile(_File(path))
        for info in self._archive.infolist():
            if not info.is_dir():
                # Info-ZIP's rule: some programs of Windows write its own separators.
                name = info.filename
                self._add(name if "/" in name else name.replace("\\", "/"), _zip_entry(info))
        # Entries can share their bytes, so that each is small and all together are endless.
        readable = (entry for entry in self.members.values() if not isinstance(entry, str))
        _check_size(path, sum(entry.file_size for entry in readable))

    def __reduce__(self) -> tuple[type["Zip"], tuple[Path]]:
        return Zip, (self.path,)

    def chunks(self, entry: zipfile.ZipInfo) -> Iterator[bytes]:
        """The file's bytes, no more of them than the archive says."""
        with self._archive.open(entry) as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk

    def read(self, image: RawImage) -> bytes:
        """The bytes of the image file.

        Raises:
            UnreadableImage: it is damaged, or compressed in an unknown way.
        """
        try:
            return b"".join(self.chunks(image.entry))
        except _DAMAGED as error:
            raise UnreadableImage(f"damaged in the archive: {error}") from None


def _zip_entry(info: zipfile.ZipInfo) -> zipfile.ZipInfo | str:
    kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where it was packed without one
    if kind not in (0, stat.S_IFREG):
        return _LINK if kind == stat.S_IFLNK else _NOT_A_FILE
    if info.flag_bits & 1:
        return _ENCRYPTED
    # Python unpacks bzip2 and LZMA without a limit, whatever the size that is stated.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "compressed by another method than deflate"
    return too_large(info.file_size) or info


def too_large(num_bytes: int) -> str:
    """Why a file of that size is not read; empty where it is."""
    return f"{num_bytes:,} bytes, more than {_MAX_FILE_BYTES:,}" * (num_bytes > _MAX_FILE_BYTES)


class Tar(_Archive):
    """An uncompressed tar archive of class folders, read by offset."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.members = {}
        with _Headers(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                tar.members = []  # type: ignore[attr-defined] # it would keep them all
                if not member.isdir():
                    self._add(member.name, _tar_entry(member))
                if member.size < 0:
                    raise tarfile.ReadError("a file of negative size")
        # tarfile takes a damaged header for the end.
        with path.open("rb") as plain:
            plain.seek(tar.offset)
            if plain.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"a damaged header at byte {tar.offset:,}")

    def chunks(self, entry: tuple[int, int]) -> Iterator[bytes]:
        """The file's bytes.

        Raises:
            EOFError: the archive ends before them.
        """
        offset, left = entry
        with self.path.open("rb") as file:
            file.seek(offset)
            while left:
                chunk = file.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise EOFError("the archive is cut short")
                left -= len(chunk)
                yield chunk

    def read(self, image: RawImage) -> bytes:
        """The bytes of the image file.

        Raises:
            UnreadableImage: the archive has been cut short.
        """
        try:
            return b"".join(self.chunks(image.entry))
        except (EOFError, OSError) as error:
            raise UnreadableImage(f"damaged in the archive: {error}") from None


def _tar_entry(member: tarfile.TarInfo) -> tuple[int, int] | str:
    if member.issym() or member.islnk():
        return _LINK
    if member.issparse():
        return "a sparse file"  # its bytes do not lie in one piece
    if not member.isreg():
        return _NOT_A_FILE
    return too_large(member.size) or (member.offset_data, member.size)


class Idx:
    """The four files of MNIST's format: images and labels to train with, images and labels to test.

    Source: LeCun, Cortes and Burges, "The MNIST database of handwritten digits", "File formats".
    """

    def __init__(self, paths: tuple[Path, ...], class_names: tuple[str, ...]) -> None:
        self.paths = paths
        self.class_names = class_names

    def __reduce__(self) -> tuple[type["Idx"], tuple[tuple[Path, ...], tuple[str, ...]]]:
        return Idx, (self.paths, self.class_names)

    @cached_property
    def _arrays(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        arrays = [read_idx(path) for path in self.paths]
        for images, labels, path in zip(arrays[::2], arrays[1::2], self.paths[1::2], strict=True):
            if images.ndim != 3 or 0 in images.shape[1:] or labels.shape != images.shape[:1]:
                raise UserError(f"{path.name}: not the labels of the images beside it")
            if labels.size and labels.max() >= len(self.class_names):
                raise UserError(f"{path.name}: a label {labels.max()}, of no class")
        return {"train": (arrays[0], arrays[1]), "test": (arrays[2], arrays[3])}

    @property
    def images(self) -> list[RawImage]:
        """Every image, by its number in its file: train/00000.png."""
        return sorted(
            (
                RawImage(f"{split}/{i:05d}.png", self.class_names[label], split, i)
                for split, (_, labels) in self._arrays.items()
                for i, label in enumerate(labels)
            ),
            key=lambda image: image.path,
        )

    def read(self, image: RawImage) -> bytes:
        """The image as the bytes of a PNG file, so that it goes the way of any other image."""
        return png(self._arrays[image.official][0][image.entry])


def read_idx(path: Path) -> np.ndarray:
    """The array in a gzipped IDX file: (N, H, W) uint8 images or (N,) uint8 labels.

    Raises:
        UserError: the file is not one.
    """
    try:
        with gzip.open(path) as stream:
            data = stream.read(_MAX_PLAIN_BYTES + 1)
        if len(data) > _MAX_PLAIN_BYTES:
            raise ValueError(f"it unpacks to more than {_MAX_PLAIN_BYTES:,} bytes")
        if data[:3] != b"\0\0\x08":
            raise ValueError("it does not begin as one of bytes")
        dimensions = data[3]
        shape = struct.unpack_from(f">{dimensions}I", data, 4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (*_DAMAGED, ValueError, IndexError, struct.error) as error:
        raise UserError(f"{path.name}: not an IDX file: {error}") from None


def jpeg(pixels: np.ndarray) -> bytes:
    """A JPEG file of quality 90: (H, W, 3) uint8 to its bytes."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=90)
    return file.getvalue()


def png(pixels: np.ndarray) -> bytes:
    """A PNG file: (H, W) or (H, W, 3) uint8 to its bytes."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", compress_level=1)
    return file.getvalue()


def _limited(images: list[RawImage], limit: int | None) -> list[RawImage]:
    """At most `limit` images a class, chosen by the hash of the path: no order of names biases."""
    if limit is None:
        return images
    chosen: set[str] = set()
    counts: dict[str, int] = {}
    for image in sorted(images, key=lambda i: hashlib.sha256(i.path.encode()).digest()):
        if counts.get(image.label, 0) < limit:
            counts[image.label] = counts.get(image.label, 0) + 1
            chosen.add(image.path)
    return [image for image in images if image.path in chosen]
