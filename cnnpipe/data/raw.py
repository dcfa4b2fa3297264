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
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from cnnpipe.data.decode import UnreadableImage
from cnnpipe.data.layout import NoClasses, places
from cnnpipe.errors import UserError
from cnnpipe.workspace import whole_file

SOURCE_FILE = "source.json"

_MOST_BYTES = 1 << 30
"""Of an image file: what the largest picture that is decoded takes in 16 bits a colour. What claims
to be larger is not read."""
_ALWAYS_UNPACKED = 1 << 30
_MOST_UNPACKED = 100
"""A compressed tar may unpack to so many bytes, or so many times its size."""
_MOST_HEADER = 16 << 20
"""What is read of a tar at once: extended headers are a few hundred bytes."""
_ENCRYPTED = 1
"""The flag of a zip's entry. Source: PKWARE, "APPNOTE.TXT", section 4.4.4."""
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")

_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError,
            ValueError, OverflowError, NotImplementedError)  # fmt: skip
"""What reading a damaged archive, or one that is none, raises."""


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
def open_raw(folder: str | Path) -> Iterator[tuple[Raw, list[RawImage]]]:
    """The data set in data/raw, and its images under `limit_per_class`, sorted by path.

    Raises:
        UserError: there is no data set, or its files do not lie in class folders.
    """
    folder = Path(folder)
    source = Source.read(folder)
    archive = folder / source.archives[0]
    with ExitStack() as stack:
        try:
            raw = stack.enter_context(_open(folder, source))
            images = raw.images
        except NoClasses as error:
            raise UserError(f"{archive}: {error}") from None
        except _DAMAGED as error:
            if getattr(error, "errno", None) == errno.ENOSPC:  # for the plain copy
                raise
            raise UserError(
                f"{archive}: cannot be read, run `cnnpipe download` again: {error}"
            ) from None
        yield raw, _limited(images, source.limit_per_class)


@contextmanager
def _open(folder: Path, source: Source) -> Iterator[Raw]:
    archive = folder / source.archives[0]
    if source.class_names:
        yield Idx(tuple(folder / name for name in source.archives), source.class_names)
    elif zipfile.is_zipfile(archive):
        yield Zip(archive)
    else:
        with ExitStack() as stack, _tar_stream(archive) as (stream, is_compressed):
            if is_compressed:
                # A compressed tar can only be read from the front, a plain copy from anywhere.
                scratch = tempfile.TemporaryDirectory(dir=folder.parent, prefix=".untar.")
                archive = Path(stack.enter_context(scratch)) / "plain.tar"
                with archive.open("wb") as plain:
                    shutil.copyfileobj(stream, plain, 1 << 20)
            yield Tar(archive)


def check_archive(path: Path) -> None:
    """Passes where the file is a zip or tar archive whose files lie in class folders.

    Raises:
        UserError: it is not.
    """
    names: list[str] = []
    try:
        if zipfile.is_zipfile(path):
            files = Zip(path).files
            names = list(files)
            if files and all(info.flag_bits & _ENCRYPTED for info in files.values()):
                raise UserError(f"{path.name}: is encrypted: take the password off it")
        else:
            names = list(_members(path))
        places(names)
    except NoClasses as error:
        inner = [name for name in names if name.lower().endswith(_ARCHIVES)]
        if inner:
            raise UserError(
                f"{path.name}: holds another archive, {inner[0]}, and no class folders: unpack it "
                "once, and give the one within"
            ) from None
        raise UserError(f"{path.name}: {error}") from None
    except _DAMAGED as error:
        raise UserError(
            f"{path.name}: neither a zip nor a tar archive, or a damaged one: {error}"
        ) from None


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
        size = os.fstat(self._descriptor).st_size
        self._position = (0, self._position, size)[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        num_bytes = os.preadv(self._descriptor, [buffer], self._position)
        self._position += num_bytes
        return num_bytes

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


class _TarStream(io.RawIOBase):
    """The bytes of a tar, uncompressed, that ends with an error before it fills disk or memory.

    A few megabytes can stand for terabytes of zeros, though image files hardly shrink; and tarfile
    reads a header of any length at once.
    """

    def __init__(self, stream: Any, most: int) -> None:
        self._stream = stream
        self._most = most

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._stream.tell())

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._check(offset)
        return int(self._stream.seek(offset, whence))

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MOST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        self._check(self.tell() + size)
        return bytes(self._stream.read(size))

    def _check(self, position: int) -> None:
        if position > self._most:
            raise tarfile.ReadError(f"it unpacks to more than {self._most:,} bytes")


@contextmanager
def _tar_stream(path: Path) -> Iterator[tuple[_TarStream, bool]]:
    """The bytes of a tar, and whether it is a compressed one."""
    openers: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
    with path.open("rb") as file:
        opener = openers.get(file.read(2))
        file.seek(0)
        size = path.stat().st_size
        if opener is None:
            yield _TarStream(file, size + _MOST_HEADER), False
            return
        with opener(file) as stream:
            yield _TarStream(stream, max(_ALWAYS_UNPACKED, _MOST_UNPACKED * size)), True


def _members(path: Path) -> dict[str, tuple[int, int] | str]:
    """Where each file of a tar lies, (offset, size) in bytes, or why it cannot be used, by path.

    The last of several of one name counts, as when unpacking.
    """
    found: dict[str, tuple[int, int] | str] = {}
    with _tar_stream(path) as (stream, _), tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            if member.size < 0:  # from there tarfile would go back, and so for ever
                raise tarfile.ReadError(f"{member.name}: a size of {member.size}")
            if member.isdir():
                continue
            if member.issym() or member.islnk():
                found[member.name] = "a link, not a file"
            elif not member.isreg() or member.issparse():
                found[member.name] = "not a file"
            elif member.size > _MOST_BYTES:
                found[member.name] = _too_large(member.size)
            else:
                found[member.name] = member.offset_data, member.size
    return found


def _too_large(size: int) -> str:
    return f"{size:,} bytes, more than {_MOST_BYTES:,}"


class Zip:
    """A zip archive of class folders."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive = zipfile.ZipFile(_File(path))

    def __reduce__(self) -> tuple[type["Zip"], tuple[Path]]:
        return Zip, (self.path,)

    @property
    def files(self) -> dict[str, zipfile.ZipInfo]:
        """The entries of all files by path; of several of one name the last counts."""
        return {info.filename: info for info in self._archive.infolist() if not info.is_dir()}

    @property
    def images(self) -> list[RawImage]:
        """All files in class folders, sorted by path."""
        return _images(self.files)

    def read(self, image: RawImage) -> bytes:
        """The bytes of the image file.

        Raises:
            UnreadableImage: it is encrypted, damaged, compressed in an unknown way, too large, or
                a link.
        """
        info = image.entry
        if stat.S_ISLNK(info.external_attr >> 16):
            raise UnreadableImage("a link, not a file")
        if info.file_size > _MOST_BYTES:
            raise UnreadableImage(_too_large(info.file_size))
        try:
            return self._archive.read(info)
        except (*_DAMAGED, RuntimeError) as error:  # RuntimeError: encrypted; or not implemented
            raise UnreadableImage(f"damaged in the archive: {error}") from None


class Tar:
    """An uncompressed tar archive of class folders, read by offset."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._members = _members(path)

    @property
    def images(self) -> list[RawImage]:
        """All files in class folders, sorted by path."""
        return _images(self._members)

    def read(self, image: RawImage) -> bytes:
        """The bytes of the image file.

        Raises:
            UnreadableImage: it is a link or a device, too large, or cut short.
        """
        if isinstance(image.entry, str):
            raise UnreadableImage(image.entry)
        offset, size = image.entry
        with self.path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise UnreadableImage("damaged in the archive: cut short")
        return data


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
        data = gzip.decompress(path.read_bytes())
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


def _images(files: Mapping[str, Any]) -> list[RawImage]:
    return [
        RawImage(path, place.label, place.official, files[path])
        for path, place in sorted(places(list(files)).items())
    ]


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
