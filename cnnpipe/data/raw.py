"""data/raw/: the images as obtained, an archive still an archive, and how they are read from it.

`source.json` says what is there. Every kind of archive is read the same way: a list of images,
each with its path, class and official split, and the bytes of any of them.
"""

import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
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

_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError)
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
        with tarfile.open(archive) as tar, ExitStack() as stack:
            stream: Any = tar.fileobj
            if not isinstance(stream, io.BufferedReader):
                # A compressed tar can only be read from the front, a plain copy from anywhere.
                scratch = tempfile.TemporaryDirectory(dir=folder.parent, prefix=".untar.")
                archive = Path(stack.enter_context(scratch)) / "plain.tar"
                stream.seek(0)
                with archive.open("wb") as plain:
                    shutil.copyfileobj(stream, plain, 1 << 20)
            yield Tar(archive)


def check_archive(path: Path) -> None:
    """Passes where the file is a zip or tar archive whose files lie in class folders.

    Raises:
        UserError: it is not.
    """
    try:
        if zipfile.is_zipfile(path):
            names = list(Zip(path).files)
        elif tarfile.is_tarfile(path):
            with tarfile.open(path) as tar:
                names = [member.name for member in tar if member.isfile()]
        else:
            raise UserError(f"{path.name}: neither a zip nor a tar archive")
        places(names)
    except _DAMAGED as error:
        raise UserError(f"{path.name}: the archive is damaged: {error}") from None
    except NoClasses as error:
        raise UserError(f"{path.name}: {error}") from None


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
            UnreadableImage: it is encrypted, damaged, or compressed in an unknown way.
        """
        try:
            return self._archive.read(image.entry)
        except (*_DAMAGED, RuntimeError) as error:  # RuntimeError: encrypted; or not implemented
            raise UnreadableImage(f"damaged in the archive: {error}") from None


class Tar:
    """An uncompressed tar archive of class folders, read by offset."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with tarfile.open(path) as tar:
            # The last of several entries of one name counts, as when unpacking.
            self._extents = {m.name: (m.offset_data, m.size) for m in tar if m.isreg()}

    @property
    def images(self) -> list[RawImage]:
        """All files in class folders, sorted by path."""
        return _images(self._extents)

    def read(self, image: RawImage) -> bytes:
        """The bytes of the image file."""
        offset, size = image.entry
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(size)


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
