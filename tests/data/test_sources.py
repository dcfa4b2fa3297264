"""Tests of where images come from: the real download code against a server on loopback."""

import errno
import gzip
import hashlib
import io
import json
import os
import socket
import struct
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnnpipe.data import sources
from cnnpipe.data.decode import decode
from cnnpipe.data.raw import RawImage, Source, open_raw
from cnnpipe.data.sources import PUBLISHED, Published, obtain, source_folder
from cnnpipe.errors import UserError
from cnnpipe.params import Download

Files = dict[str, bytes]
PETS: Files = {
    f"{label}/{i}.jpg": f"{label} {i}".encode() for label in ("cat", "dog") for i in "12"
}


def write(folder: Path, files: Files) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def zip_bytes(files: Files) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


def tar_gz_bytes(files: Files) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def obtained(**settings: Any) -> Path:
    """The folder data/raw after `obtain` with these settings of the section download."""
    folder = Path("data/raw")
    folder.mkdir(parents=True)
    source = obtain(Download(**settings), 42, folder)
    assert Source.read(folder) == source
    return folder


def contents(folder: Path) -> Files:
    with open_raw(folder) as (raw, images):
        return {image.path: raw.read(image) for image in images}


def downloads() -> list[Path]:
    """Every file under .cnnpipe/, hidden ones as well."""
    return sorted(path for path in Path(".cnnpipe").rglob("*") if path.is_file())


@pytest.fixture(autouse=True)
def _in_a_workspace(workspace: Path) -> None:
    pass


# The published data sets.


def test_the_published_checksums_are_the_authors() -> None:
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")

    def md5(*digests: str) -> dict[str, str]:
        return {
            f"{name}-ubyte.gz": f"md5:{digest}" for name, digest in zip(names, digests, strict=True)
        }

    cats_dogs, mnist, fashion = (
        PUBLISHED[name] for name in ("cats-dogs", "mnist", "fashion-mnist")
    )
    assert cats_dogs.address == (
        "https://download.microsoft.com/download/3/E/1/3E1C3F21-ECDB-4869-8368-6DEBA77B919F/"
    )
    assert cats_dogs.checksums == {
        "kagglecatsanddogs_5340.zip": "sha256:"
        "b7974bd00a84a99921f36ee4403f089853777b5ae8d151c76a86e64900334af9"
    }
    assert mnist.address == "https://ossci-datasets.s3.amazonaws.com/mnist/"
    assert mnist.checksums == md5(
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    )
    assert mnist.class_names == tuple("0123456789")
    assert fashion.address == "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    assert fashion.checksums == md5(
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    )
    assert len(set(fashion.class_names)) == 10
    assert (fashion.class_names[0], fashion.class_names[9]) == ("T-shirt/top", "Ankle boot")


def publish(monkeypatch: pytest.MonkeyPatch, server: Any, name: str, files: Files) -> None:
    """Puts small files in the place of a published data set, each with its true checksum."""
    kinds = {file: text.split(":")[0] for file, text in PUBLISHED[name].checksums.items()}
    assert set(kinds) == set(files)
    checksums = {
        file: f"{kinds[file]}:{hashlib.new(kinds[file], data).hexdigest()}"
        for file, data in files.items()
    }
    names = PUBLISHED[name].class_names
    monkeypatch.setitem(PUBLISHED, name, Published(f"{server.address}/at/", checksums, names))
    server.files |= {f"/at/{file}": data for file, data in files.items()}


def test_cats_dogs_end_to_end(monkeypatch: pytest.MonkeyPatch, server: Any) -> None:
    photos = {
        "PetImages/Cat/0.jpg": b"cat 0",
        "PetImages/Cat/666.jpg": b"",
        "PetImages/Cat/Thumbs.db": b"thumbs",
        "PetImages/Dog/0.jpg": b"dog 0",
    }
    archive = zip_bytes({**photos, "readme[1].txt": b"Asirra", "CDLA-Permissive-2.0.pdf": b"%PDF"})
    publish(monkeypatch, server, "cats-dogs", {"kagglecatsanddogs_5340.zip": archive})
    folder = obtained(source="cats-dogs")
    assert contents(folder) == photos  # what is no image goes to quarantine, later
    assert (folder / "kagglecatsanddogs_5340.zip").read_bytes() == archive
    with open_raw(folder) as (_, images):
        assert images[0] == RawImage("PetImages/Cat/0.jpg", "Cat", "")
        assert {image.label for image in images} == {"Cat", "Dog"}
    assert Source.read(folder).origin == f"{server.address}/at/"


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_mnist_end_to_end_with_its_official_test_split(
    monkeypatch: pytest.MonkeyPatch, server: Any, name: str
) -> None:
    def idx(values: np.ndarray) -> bytes:
        header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
        return gzip.compress(header + values.astype(np.uint8).tobytes())

    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 256, (40, 28, 28)), rng.integers(0, 256, (20, 28, 28))
    values = (train, np.arange(40) % 10, test, np.arange(20) % 10)
    files = dict(zip(PUBLISHED[name].checksums, map(idx, values), strict=True))
    publish(monkeypatch, server, name, files)
    folder = obtained(source=name)
    with open_raw(folder) as (raw, images):
        assert Counter(image.official for image in images) == {"train": 40, "test": 20}
        assert {image.label for image in images} == set(PUBLISHED[name].class_names)
        by_path = {image.path: image for image in images}
        assert by_path["train/00013.png"].label == PUBLISHED[name].class_names[3]
        np.testing.assert_array_equal(
            decode(raw.read(by_path["train/00013.png"]))[:, :, 0], train[13]
        )
        np.testing.assert_array_equal(decode(raw.read(by_path["test/00007.png"]))[:, :, 2], test[7])


def test_the_limit_is_written_down(monkeypatch: pytest.MonkeyPatch, server: Any) -> None:
    archive = zip_bytes({f"PetImages/{label}/{i}.jpg": b"" for label in "ab" for i in range(9)})
    publish(monkeypatch, server, "cats-dogs", {"kagglecatsanddogs_5340.zip": archive})
    with open_raw(obtained(source="cats-dogs", limit_per_class=4)) as (_, images):
        assert Counter(image.label for image in images) == {"a": 4, "b": 4}


# Any archive by its URL.


@pytest.mark.parametrize(
    ("name", "pack"), [("pets.zip", zip_bytes), ("pets%20v1.tar.gz", tar_gz_bytes)]
)
def test_any_archive_can_be_downloaded(
    server: Any, name: str, pack: Callable[[Files], bytes]
) -> None:
    data = pack(PETS)
    server.files[f"/{name}"] = data
    url = f"{server.address}/{name}?version=1#x"
    folder = obtained(source="url", url=url, sha256=sha256(data))
    assert contents(folder) == PETS
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [name.replace("%20", " "), "source.json"]
    )
    assert json.loads((folder / "source.json").read_text())["origin"] == url


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<html>sign in</html>", "neither a zip nor a tar archive"),
        (zip_bytes({"1.jpg": b""}), "no class folders"),
        (zip_bytes({"cat/1.jpg": b""}), "only one class, 'cat'"),
        (tar_gz_bytes(PETS)[:-30], "damaged"),
    ],
)
def test_an_archive_that_is_none_is_refused(server: Any, data: bytes, reason: str) -> None:
    server.files["/pets.zip"] = data
    with pytest.raises(UserError, match=f"^pets.zip: .*{reason}"):
        obtained(source="url", url=f"{server.address}/pets.zip", sha256=sha256(data))
    assert not list(Path("data/raw").iterdir())


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://127.0.0.1/pets.zip", "pets.zip", "http://", "http://[pets.zip"],
)
def test_what_is_no_web_address_is_refused(url: str) -> None:
    with pytest.raises(UserError, match=r"^download.url = '"):
        obtained(source="url", url=url, sha256=64 * "0")
    assert {path.suffix for path in downloads()} <= {".lock"}


# The user's own folder.


def test_a_folder_is_packed_as_it_is(workspace: Path) -> None:
    write(workspace / "data/inbox", {**PETS, "notes.txt": b"", ".hidden/x/1.jpg": b""})
    folder = obtained(source="folder")
    assert contents(folder) == PETS
    assert Source.read(folder).origin == str(workspace / "data/inbox")
    assert (workspace / "data/inbox/cat/1.jpg").read_bytes() == b"cat 1"


def test_the_same_images_give_the_same_archive_whatever_their_dates(workspace: Path) -> None:
    files = {f"{label}/{i * 37 % 100}": str(i).encode() for label in ("b", "a") for i in range(50)}
    write(workspace / "a", files)
    write(workspace / "b", dict(reversed(files.items())))
    os.utime(workspace / "b/a/37", (1e9, 1e9))
    (workspace / "b/a/37").chmod(0o600)
    archives = []
    for name in "ab":
        (workspace / f"raw-{name}").mkdir()
        obtain(Download(source="folder", folder=name), 42, workspace / f"raw-{name}")
        archives.append((workspace / f"raw-{name}" / "images.zip").read_bytes())
    assert archives[0] == archives[1]
    with zipfile.ZipFile(workspace / "raw-a" / "images.zip") as archive:
        assert archive.namelist() == sorted(files)
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_official_splits_of_a_folder_are_kept(workspace: Path) -> None:
    names = ("train/cat/1", "train/dog/1", "valid/cat/2", "test/dog/2")
    write(workspace / "pets", {name: b"" for name in names})
    with open_raw(obtained(source="folder", folder="pets")) as (_, images):
        assert {image.path: (image.label, image.official) for image in images} == {
            "train/cat/1": ("cat", "train"),
            "train/dog/1": ("dog", "train"),
            "valid/cat/2": ("cat", "val"),
            "test/dog/2": ("dog", "test"),
        }


def test_a_folder_may_lie_anywhere(workspace: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", PETS)
    folder = obtained(source="folder", folder=str(tmp_path / "elsewhere"))
    assert contents(folder) == PETS


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (None, "no such folder"),
        ({}, "no class folders"),
        ({"1.jpg": b"", "2.jpg": b""}, "no class folders"),
        ({"cat/1.jpg": b""}, "only one class, 'cat'"),
    ],
)
def test_a_folder_without_classes_is_named(
    workspace: Path, files: Files | None, reason: str
) -> None:
    if files is not None:
        (workspace / "my pets").mkdir()
        write(workspace / "my pets", files)
    with pytest.raises(UserError, match=f"^download.folder = my pets: .*{reason}"):
        obtained(source="folder", folder="my pets")
    assert not list(Path("data/raw").iterdir())


def test_a_file_is_no_folder(workspace: Path) -> None:
    write(workspace, {"pets.zip": b""})
    with pytest.raises(UserError, match=r"^download.folder = pets.zip: no such folder"):
        obtained(source="folder", folder="pets.zip")


def test_links_are_followed_and_loops_are_not(workspace: Path, tmp_path: Path) -> None:
    write(tmp_path / "real", {"x/1.jpg": b"linked", "2.jpg": b"linked, too"})
    write(workspace / "data/inbox", PETS)
    (workspace / "data/inbox/owl").symlink_to(tmp_path / "real/x")
    (workspace / "data/inbox/cat/3.jpg").symlink_to(tmp_path / "real/2.jpg")
    (workspace / "data/inbox/cat/loop").symlink_to(workspace / "data/inbox")
    linked = {"owl/1.jpg": b"linked", "cat/3.jpg": b"linked, too"}
    assert contents(obtained(source="folder")) == {**PETS, **linked}


def test_files_that_cannot_be_read_are_skipped_with_the_reason(workspace: Path) -> None:
    write(workspace / "data/inbox", PETS)
    (workspace / "data/inbox/cat/gone.jpg").symlink_to("nowhere")
    os.mkfifo(workspace / "data/inbox/dog/pipe.jpg")
    (workspace / "data/inbox/pipe").symlink_to("nowhere")  # beside the classes: not of interest
    folder = obtained(source="folder")
    assert contents(folder) == PETS
    assert Source.read(folder).skipped == {
        "cat/gone.jpg": "cannot be read: No such file or directory",
        "dog/pipe.jpg": "not a file",
    }


def test_loops_sockets_and_huge_files_are_skipped_with_the_reason(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox = workspace / "data/inbox"
    write(inbox, PETS)
    (inbox / "cat/loop.jpg").symlink_to("loop.jpg")
    (inbox / "cat/there.jpg").symlink_to("back.jpg")
    (inbox / "cat/back.jpg").symlink_to("there.jpg")
    monkeypatch.chdir(inbox / "dog")  # a socket's path has to be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.jpg")
    monkeypatch.chdir(workspace)
    with (inbox / "dog/film.mp4").open("wb") as film:
        film.truncate((1 << 30) + 1)  # without a byte of it on the disk
    folder = obtained(source="folder")
    assert contents(folder) == PETS
    loop = f"cannot be read: {os.strerror(errno.ELOOP)}"
    assert Source.read(folder).skipped == {
        "cat/back.jpg": loop,
        "cat/loop.jpg": loop,
        "cat/there.jpg": loop,
        "dog/film.mp4": "1,073,741,825 bytes, more than 1,073,741,824",
        "dog/socket.jpg": "not a file",
    }


def test_a_file_that_may_not_be_read_is_skipped(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(workspace / "data/inbox", PETS)
    read_bytes = Path.read_bytes

    def guarded(path: Path) -> bytes:
        if path.match("cat/1.jpg"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", guarded)
    assert Source.read(obtained(source="folder")).skipped == {
        "cat/1.jpg": "cannot be read: Permission denied"
    }


def test_a_file_whose_name_is_not_utf_8_is_skipped(workspace: Path) -> None:
    write(workspace / "data/inbox", PETS)
    try:
        (workspace / "data/inbox/cat" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system has no such names")
    folder = obtained(source="folder")
    assert contents(folder) == PETS
    assert Source.read(folder).skipped == {r"cat/caf\xe9.jpg": "its name is not UTF-8"}


def test_a_class_of_which_no_file_can_be_read_is_named(workspace: Path) -> None:
    write(workspace / "data/inbox", PETS)
    (workspace / "data/inbox/owl").mkdir()
    (workspace / "data/inbox/owl/1.jpg").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"class 'owl': none .* owl/1.jpg: .*No such file"):
        obtained(source="folder")


def test_a_folder_that_may_not_be_listed_is_named(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(workspace / "data/inbox", {**PETS, "owl/1.jpg": b""})
    scandir = os.scandir

    def guarded(path: Any) -> Any:
        if str(path).endswith("owl"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(UserError, match=r"^download.folder.*owl.*: Permission denied"):
        obtained(source="folder")


@pytest.fixture
def experiment(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, where DVC runs an experiment: a workspace of its own."""
    folder = workspace / ".dvc" / "tmp" / "exps" / "tmp1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DVC_ROOT", str(workspace))
    return folder


def test_an_experiment_finds_the_repositorys_images_by_links(
    workspace: Path, experiment: Path, tmp_path: Path
) -> None:
    write(tmp_path, {"real.jpg": b"linked"})
    write(workspace / "data/inbox", PETS)
    (workspace / "data/inbox/cat/3.jpg").symlink_to("../../../../real.jpg")
    (workspace / "data/inbox/cat/gone.jpg").symlink_to("nowhere")
    folder = source_folder("data/inbox")
    assert folder.resolve() == (experiment / "data/inbox").resolve()
    here, there = (top / "data/inbox/cat/1.jpg" for top in (experiment, workspace))
    assert here.stat().st_ino == there.stat().st_ino
    assert (experiment / "data/inbox/cat/3.jpg").read_bytes() == b"linked"
    raw = obtained(source="folder")
    assert contents(raw) == {**PETS, "cat/3.jpg": b"linked"}
    assert Source.read(raw).origin == str(workspace / "data/inbox")


def test_an_experiment_sees_an_image_that_has_been_replaced(
    workspace: Path, experiment: Path
) -> None:
    write(workspace / "data/inbox", PETS)
    write(experiment / "data/inbox", {"cat/1.jpg": b"old"})
    assert (source_folder("data/inbox") / "cat/1.jpg").read_bytes() == b"cat 1"
    assert (workspace / "data/inbox/cat/1.jpg").read_bytes() == b"cat 1"


def test_an_experiment_uses_an_absolute_folder_as_it_is(tmp_path: Path, experiment: Path) -> None:
    write(tmp_path / "elsewhere", PETS)
    assert source_folder(str(tmp_path / "elsewhere")) == tmp_path / "elsewhere"
    assert list(experiment.iterdir()) == []


def test_an_experiment_names_a_missing_folder_too(experiment: Path) -> None:
    with pytest.raises(UserError, match=r"^download.folder = data/inbox: no such folder"):
        source_folder("data/inbox")
    assert list(experiment.iterdir()) == []


def test_images_are_copied_where_they_cannot_be_linked(
    workspace: Path, experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    write(workspace / "data/inbox", PETS)
    assert contents(obtained(source="folder")) == PETS
    assert (experiment / "data/inbox/dog/2.jpg").read_bytes() == b"dog 2"


# The built-in sources.


def test_the_digits_are_scikit_learns_and_the_same_bytes_each_time(workspace: Path) -> None:
    archives = []
    for name in "ab":
        (workspace / name).mkdir()
        obtain(Download(source="digits"), 42, workspace / name)
        archives.append((workspace / name / "images.zip").read_bytes())
    assert archives[0] == archives[1]
    with open_raw(workspace / "a") as (raw, images):
        assert len(images) == 1797
        assert Counter(image.label for image in images)["0"] == 178
        assert {image.label for image in images} == set("0123456789")
        first = decode(raw.read(images[0]))
    assert first.shape == (8, 8, 3)
    assert first[0].tolist() == [[v] * 3 for v in (0, 0, 80, 207, 143, 16, 0, 0)]


def test_drawn_pets_depend_on_the_seed_alone(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources.drawn_pets, "NUM_IMAGES", 6)
    archives = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (workspace / name).mkdir()
        obtain(Download(source="drawn-pets"), seed, workspace / name)
        archives[name] = (workspace / name / "images.zip").read_bytes()
    assert archives["a"] == archives["b"] != archives["c"]
    with open_raw(workspace / "a") as (raw, images):
        assert Counter(image.label for image in images) == {"cat": 3, "dog": 3}
        assert decode(raw.read(images[0])).shape[2] == 3
