"""Tests of data/raw: every kind of archive is read the same way, and damage is named."""

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnnpipe.data.decode import UnreadableImage
from cnnpipe.data.raw import (
    Idx,
    RawImage,
    Source,
    Zip,
    check_archive,
    jpeg,
    open_raw,
    png,
    read_idx,
)
from cnnpipe.errors import UserError

FILES = {f"pets/{label}/{i}.jpg": f"{label} {i}".encode() for label in ("dog", "cat") for i in "12"}


def zip_of(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("pets/cat/old")
        for name, data in files.items():
            archive.writestr(name, data)


def tar_of(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, f"w:{path.suffix[1:].replace('tar', '')}") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        folder = tarfile.TarInfo("./pets/cat/old")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)


def idx_of(values: np.ndarray) -> bytes:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    return gzip.compress(header + values.astype(np.uint8).tobytes())


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "raw"
    folder.mkdir(parents=True)
    return folder


MAKERS: dict[str, Callable[[Path, dict[str, bytes]], None]] = {
    "images.zip": zip_of,
    "images.tar": tar_of,
    "images.tar.gz": tar_of,
    "images.tar.bz2": tar_of,
    "images.tar.xz": tar_of,
}


@pytest.mark.parametrize("name", MAKERS)
def test_every_archive_gives_its_images_sorted_by_path(raw: Path, name: str) -> None:
    MAKERS[name](raw / name, {**FILES, "readme.txt": b"pets", "pets/Thumbs.db": b"?"})
    Source("url", "http://x", (name,)).write(raw)
    with open_raw(raw) as (archive, images):
        read = {image.path.removeprefix("./"): archive.read(image) for image in images}
    assert read == FILES
    assert list(read) == sorted(FILES)
    assert [image.label for image in images] == ["cat", "cat", "dog", "dog"]
    assert {image.official for image in images} == {""}
    assert [path.name for path in raw.parent.iterdir()] == ["raw"]  # no copy is left


@pytest.mark.parametrize("name", MAKERS)
def test_an_archive_travels_to_another_process(raw: Path, name: str) -> None:
    MAKERS[name](raw / name, FILES)
    Source("url", "http://x", (name,)).write(raw)
    with open_raw(raw) as (archive, images):
        archive.read(images[0])  # a file that is open already must not travel
        copy = pickle.loads(pickle.dumps(archive))
        assert copy.images == images
        assert copy.read(images[3]) == b"dog 2"


def test_of_two_entries_of_one_name_the_last_counts(raw: Path) -> None:
    with tarfile.open(raw / "images.tar", "w") as archive:
        for name, data in [("cat/1", b"old"), ("dog/1", b"dog"), ("cat/1", b"newer")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    Source("url", "http://x", ("images.tar",)).write(raw)
    with open_raw(raw) as (archive, images):
        assert [archive.read(image) for image in images] == [b"newer", b"dog"]


def test_official_splits_are_read_from_the_folders(raw: Path) -> None:
    zip_of(raw / "images.zip", {"train/cat/1": b"", "train/dog/1": b"", "test/cat/1": b""})
    Source("folder", "x", ("images.zip",)).write(raw)
    with open_raw(raw) as (_, images):
        assert images == [
            RawImage("test/cat/1", "cat", "test"),
            RawImage("train/cat/1", "cat", "train"),
            RawImage("train/dog/1", "dog", "train"),
        ]


@pytest.fixture
def idx(raw: Path) -> Path:
    """MNIST's four files, of 30 and 10 images of 4 x 5 pixels, of the classes zero, one, two."""
    rng = np.random.default_rng(0)
    names = []
    for split, n in (("train", 30), ("t10k", 10)):
        images = rng.integers(0, 256, (n, 4, 5))
        images[:, 0, 0] = np.arange(n)
        for kind, values in (("images", images), ("labels", np.arange(n) % 3)):
            names.append(f"{split}-{kind}.gz")
            (raw / names[-1]).write_bytes(idx_of(values))
    Source("mnist", "http://x", tuple(names), class_names=("zero", "one", "two")).write(raw)
    return raw


def test_mnists_files_give_every_image_with_its_label_and_official_split(idx: Path) -> None:
    with open_raw(idx) as (archive, images):
        assert isinstance(archive, Idx)
        assert len(images) == 40
        assert Counter(image.official for image in images) == {"train": 30, "test": 10}
        assert [image.path for image in images] == sorted(image.path for image in images)
        copy = pickle.loads(pickle.dumps(archive))
        for image in images:
            number = int(image.path.split("/")[1].removesuffix(".png"))
            pixels = np.asarray(Image.open(io.BytesIO(copy.read(image))))
            assert pixels.shape == (4, 5)
            assert pixels[0, 0] == number
            assert image.label == ("zero", "one", "two")[number % 3]


def test_an_idx_file_is_read_in_its_shape(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (3, 4, 5), np.uint8)
    (tmp_path / "x.gz").write_bytes(idx_of(values))
    np.testing.assert_array_equal(read_idx(tmp_path / "x.gz"), values)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no gzip",
        gzip.compress(b""),
        gzip.compress(b"\0\0"),
        gzip.compress(b"<html>not found</html>"),
        gzip.compress(struct.pack(">HBBI", 0, 9, 1, 4) + b"1234"),  # signed
        idx_of(np.zeros((9, 9)))[:-12],
        idx_of(np.zeros((9, 9)))[:14] + b"\xff" * 20,
        gzip.compress(gzip.decompress(idx_of(np.zeros((9, 9))))[:-1]),
        gzip.compress(gzip.decompress(idx_of(np.zeros((9, 9)))) + b"1"),
    ],
    ids=range(10),  # gzip writes the time, and pytest's own would be the bytes
)
def test_what_is_no_idx_file_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "labels.gz").write_bytes(data)
    with pytest.raises(UserError, match=r"^labels.gz: not an IDX file: \S"):
        read_idx(tmp_path / "labels.gz")


def test_source_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    source = Source(
        "mnist", "http://x", ("a.gz", "b.gz"), 7, ("T-shirt/top", "NA"), {"cat/1": "not a file"}
    )
    source.write(tmp_path)
    assert Source.read(tmp_path) == source
    assert json.loads((tmp_path / "source.json").read_text())["origin"] == "http://x"
    assert [path.name for path in tmp_path.iterdir()] == ["source.json"]


def test_a_missing_source_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"source.json: no such file: run `cnnpipe download` first"):
        Source.read(tmp_path / "raw")


def test_a_limit_takes_so_many_of_each_class_or_all_there_are(raw: Path) -> None:
    files = {f"{label}/{i:03d}": b"" for label, n in (("a", 50), ("b", 3)) for i in range(n)}
    zip_of(raw / "images.zip", files)

    def limited(limit: int | None) -> list[str]:
        Source("folder", "x", ("images.zip",), limit).write(raw)
        with open_raw(raw) as (_, images):
            return [image.path for image in images]

    assert Counter(path[0] for path in limited(10)) == {"a": 10, "b": 3}
    assert limited(10) == limited(10) == sorted(limited(10))
    assert set(limited(5)) < set(limited(10)) < set(limited(None)) == set(files)
    assert limited(10)[:10] != sorted(files)[:10]  # not the first by name, which may be all alike


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"1.jpg": b""}, "no class folders"),
        ({"cat/1.jpg": b""}, "only one class, 'cat'"),
        ({}, "no class folders"),
    ],
)
def test_an_archive_without_classes_is_named(
    raw: Path, files: dict[str, bytes], reason: str
) -> None:
    zip_of(raw / "pets.zip", files)
    Source("url", "http://x", ("pets.zip",)).write(raw)
    with pytest.raises(UserError, match=rf"pets.zip: .*{reason}"), open_raw(raw):
        pass
    with pytest.raises(UserError, match=rf"^pets.zip: .*{reason}"):
        check_archive(raw / "pets.zip")


@pytest.mark.parametrize("name", MAKERS)
def test_a_good_archive_passes_the_check(raw: Path, name: str) -> None:
    MAKERS[name](raw / name, FILES)
    check_archive(raw / name)


@pytest.mark.parametrize("data", [b"", b"<html>", bytes(4000)])
def test_what_is_no_archive_is_named(raw: Path, data: bytes) -> None:
    (raw / "pets.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"^pets.zip: "):
        check_archive(raw / "pets.zip")


@pytest.mark.parametrize("name", MAKERS)
def test_an_archive_cut_short_is_refused_and_no_half_data_set(raw: Path, name: str) -> None:
    noise = np.random.default_rng(0).bytes(40_000)
    MAKERS[name](raw / name, {**FILES, "pets/dog/3.jpg": noise})
    (raw / name).write_bytes((raw / name).read_bytes()[:30_000])
    with pytest.raises(UserError, match=f"^{name}: "):
        check_archive(raw / name)


@pytest.mark.parametrize("name", ["images.tar.gz", "images.tar.bz2", "images.tar.xz"])
def test_a_compressed_archive_with_wrong_bytes_is_refused(raw: Path, name: str) -> None:
    noise = np.random.default_rng(0).bytes(400_000)
    MAKERS[name](raw / name, {"cat/0.jpg": noise, **FILES})
    data = bytearray((raw / name).read_bytes())
    data[200_000:200_100] = bytes(100)
    (raw / name).write_bytes(data)
    Source("url", "http://x", (name,)).write(raw)
    with pytest.raises(UserError, match=name), open_raw(raw):
        pass


@pytest.mark.parametrize("content", [None, b"", b"damaged"])
def test_an_archive_that_is_gone_or_damaged_names_the_command_that_brings_it(
    raw: Path, content: bytes | None
) -> None:
    Source("digits", "x", ("images.zip",)).write(raw)
    if content is not None:
        (raw / "images.zip").write_bytes(content)
    with (
        pytest.raises(UserError, match=r"images.zip: .*run `cnnpipe download` again"),
        open_raw(raw),
    ):
        pass


def test_a_damaged_entry_of_a_zip_is_an_unreadable_image_and_an_encrypted_one_is_skipped(
    raw: Path,
) -> None:
    with zipfile.ZipFile(raw / "images.zip", "w") as archive:
        archive.writestr("cat/1.jpg", b"whole content")
        archive.writestr("dog/1.jpg", b"secret")
    data = (raw / "images.zip").read_bytes().replace(b"whole", b"wrong")
    position = data.rindex(b"PK\x01\x02") + 8  # the flags of dog/1.jpg in the central directory
    local = data.index(b"PK\x03\x04", 4) + 6
    changed = bytearray(data)
    changed[position] |= 1
    changed[local] |= 1
    (raw / "images.zip").write_bytes(changed)
    archive = Zip(raw / "images.zip")
    (image,) = archive.images
    with pytest.raises(UnreadableImage, match=r"^damaged in the archive: .*CRC"):
        archive.read(image)
    assert archive.skipped == {"dog/1.jpg": "encrypted"}


def test_the_programs_own_image_files_give_their_pixels_back() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (8, 9), np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png(grey)))), grey)
    colour = np.full((16, 24, 3), (200, 100, 50), np.uint8)
    decoded = np.asarray(Image.open(io.BytesIO(jpeg(colour))))
    assert np.abs(decoded.astype(int) - colour).max() <= 3
