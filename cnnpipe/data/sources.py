"""Where images come from: each source fills data/raw with archives and a `source.json`.

Downloads are kept in `.cnnpipe/downloads/`, so that a rerun, or an experiment in a workspace of its
own, does not fetch them again.
"""

import os
import re
import shutil
import stat
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from tqdm import tqdm

from cnnpipe.data import drawn_pets
from cnnpipe.data.downloads import fetch
from cnnpipe.data.layout import NoClasses, check_readable, places
from cnnpipe.data.raw import SOURCE_FILE, Source, check_archive, jpeg, png, too_large
from cnnpipe.errors import UserError, printable
from cnnpipe.params import Download
from cnnpipe.processes import num_cores, process_pool
from cnnpipe.workspace import repository_root


@dataclass(frozen=True)
class Published:
    """A published data set: files under an address, each with its checksum."""

    address: str
    checksums: dict[str, str]
    """File name to `sha256:...` or `md5:...`; the authors publish either."""
    class_names: tuple[str, ...] = ()
    """For archives that number their classes."""


_IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def _idx_checksums(*md5: str) -> dict[str, str]:
    return {name: f"md5:{digest}" for name, digest in zip(_IDX_FILES, md5, strict=True)}


PUBLISHED = {
    # Microsoft Research's Asirra photos, as the tutorial uses them; about 1,700 of its 25,000
    # files are mislabelled, odd or no images at all, and go to quarantine where unreadable.
    "cats-dogs": Published(
        "https://download.microsoft.com/download/3/E/1/3E1C3F21-ECDB-4869-8368-6DEBA77B919F/",
        {
            "kagglecatsanddogs_5340.zip": "sha256:"
            "b7974bd00a84a99921f36ee4403f089853777b5ae8d151c76a86e64900334af9"
        },
    ),
    "mnist": Published(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        _idx_checksums(
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
        tuple("0123456789"),
    ),
    # Xiao, Rasul and Vollgraf, "Fashion-MNIST" (2017), table 2, in the order of the numbers.
    "fashion-mnist": Published(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        _idx_checksums(
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
        (
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
    ),
}


def obtain(settings: Download, seed: int, folder: Path) -> Source:
    """Fills the folder, which exists and is empty, with the data set that the settings name.

    Returns:
        What was obtained, as in the folder's `source.json`.

    Raises:
        UserError: there is no such folder, it holds no class folders, or what was downloaded is
            not the archive that the settings describe.
        RunFailed: the server could not be reached.
        OSError: the disk is full.
    """
    limit = settings.limit_per_class
    if settings.source == "drawn-pets":
        names = _pack(_draw_pets(seed), folder)
        source = Source(settings.source, f"drawn by cnnpipe from seed {seed}", names, limit)
    elif settings.source == "digits":
        names = _pack(_digits(), folder)
        source = Source(settings.source, "scikit-learn's load_digits", names, limit)
    elif settings.source == "folder":
        source = _obtain_folder(settings, folder)
    elif settings.source == "url":
        assert settings.url is not None and settings.sha256 is not None  # params.load's work
        archive = fetch(settings.url, _file_name(settings.url), f"sha256:{settings.sha256}")
        archive, skipped = check_archive(archive)
        names = _take([archive], folder)
        source = Source(settings.source, settings.url, names, limit, skipped=skipped)
    else:
        published = PUBLISHED[settings.source]
        files = [
            fetch(published.address + name, name, checksum)
            for name, checksum in published.checksums.items()
        ]
        names = _take(files, folder)
        source = Source(settings.source, published.address, names, limit, published.class_names)
    source.write(folder)
    return source


def _file_name(url: str) -> str:
    """The URL's own, where a file beside source.json can have it."""
    name = PurePosixPath(unquote(re.split("[?#]", url)[0])).name
    usable = (
        name.isprintable() and len(name.encode()) <= 200 and name not in ("", "..", SOURCE_FILE)
    )
    return name if usable else "archive"


def source_folder(folder: str) -> Path:
    """download.folder as a path that exists where the stage runs.

    DVC runs queued experiments in a workspace of their own, to which only files known to git are
    copied. There data/inbox is filled with links to the repository's own, so that the experiment
    finds its images and DVC, which hashes the folder once more after the stage, records what was
    really used.

    Raises:
        UserError: there is no such folder.
    """
    here, there = Path(folder), repository_root() / folder
    if not there.is_dir():
        raise UserError(f"download.folder = {folder}: no such folder")
    if not here.is_absolute() and here.resolve() != there.resolve():
        for path in _files_under(there, {}):
            (here / path).parent.mkdir(parents=True, exist_ok=True)
            _link(there / path, here / path)
    return here


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)  # of a symbolic link, what it points to
    except OSError:  # another file system
        shutil.copy2(source, target)


def _obtain_folder(settings: Download, folder: Path) -> Source:
    origin = source_folder(settings.folder)
    skipped: dict[str, str] = {}
    paths = list(_files_under(origin, skipped))
    try:
        found = places([*paths, *skipped])
    except NoClasses as error:
        raise UserError(f"download.folder = {settings.folder}: {error}") from None
    wanted = sorted(found)

    def contents() -> Iterator[tuple[str, bytes]]:
        for path in wanted:
            if path not in skipped:
                try:
                    yield path, (origin / path).read_bytes()
                except OSError as error:
                    skipped[path] = f"cannot be read: {error.strerror}"

    names = _pack(tqdm(contents(), "packing", len(wanted), unit="image", disable=None), folder)
    skipped = {path: skipped[path] for path in wanted if path in skipped}
    try:
        check_readable(found, skipped)
    except NoClasses as error:
        raise UserError(f"download.folder = {settings.folder}: {error}") from None
    where = str((repository_root() / settings.folder).resolve())
    return Source("folder", where, names, settings.limit_per_class, skipped=skipped)


def _files_under(top: Path, skipped: dict[str, str]) -> Iterator[str]:
    """The relative paths of all files; what is none goes to `skipped`. Links are followed once.

    Raises:
        UserError: a folder may not be listed; passed over, its class would be missing unnoticed.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"download.folder: {error.filename}: cannot be listed: {error.strerror}")

    seen = set()
    for parent, folders, files in os.walk(top, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for name in files:
            path = Path(parent, name)
            relative = path.relative_to(top).as_posix()
            try:
                relative.encode()
                status = path.stat()
            except UnicodeEncodeError:
                skipped[printable(relative)] = "its name is not UTF-8"
                continue
            except OSError as error:
                skipped[relative] = f"cannot be read: {error.strerror}"
                continue
            if not stat.S_ISREG(status.st_mode):
                skipped[relative] = "not a file"
            elif reason := too_large(status.st_size):
                skipped[relative] = reason
            else:
                yield relative


def _pack(contents: Iterable[tuple[str, bytes]], folder: Path) -> tuple[str, ...]:
    """One archive of the files, the same bytes each time: DVC hashes one file faster than many.

    Stored, not deflated, since images are compressed already.
    """
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_STORED) as archive:
        for path, data in contents:
            info = zipfile.ZipInfo(path, date_time=(1980, 1, 1, 0, 0, 0))  # zip's first day
            info.external_attr = 0o644 << 16
            archive.writestr(info, data)
    return ("images.zip",)


def _take(files: list[Path], folder: Path) -> tuple[str, ...]:
    for file in files:
        _link(file, folder / file.name)
    return tuple(file.name for file in files)


def _draw_pets(seed: int) -> Iterator[tuple[str, bytes]]:
    with process_pool(num_cores()) as pool:
        drawn = pool.map(partial(_drawn_pet, seed), range(drawn_pets.NUM_IMAGES), chunksize=16)
        yield from tqdm(drawn, "drawing", drawn_pets.NUM_IMAGES, unit="image", disable=None)


def _drawn_pet(seed: int, index: int) -> tuple[str, bytes]:
    label, image = drawn_pets.draw(seed, index)
    return f"{label}/{index:04d}.jpg", jpeg(image)


def _digits() -> Iterator[tuple[str, bytes]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 8 x 8 values of 0 to 16, scaled to the whole range of a pixel.
    images = (digits.images * (255 / 16)).round().astype("uint8")
    for i, (image, label) in enumerate(zip(images, digits.target, strict=True)):
        yield f"{label}/{i:04d}.png", png(image)
