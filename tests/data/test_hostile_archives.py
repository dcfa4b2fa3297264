"""Archives that mean harm: each is refused with one clear line, or taken and does none."""

import bz2
import errno
import gzip
import hashlib
import io
import lzma
import os
import re
import stat
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cnnpipe.data import raw as raw_module
from cnnpipe.data.decode import UnreadableImage
from cnnpipe.data.raw import Source, Zip, check_archive, open_raw, read_idx
from cnnpipe.data.sources import _file_name, obtain
from cnnpipe.errors import UserError
from cnnpipe.params import Download

PETS = {f"{label}/{i}.jpg": f"{label} {i}".encode() for label in ("cat", "dog") for i in "12"}

Member = tuple[str, bytes | bytearray, dict[str, Any]]


def zip_of(members: Iterable[Member]) -> bytes:
    """A zip archive; the third of a member sets attributes of its `ZipInfo`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data, attributes in members:
            info = zipfile.ZipInfo("x")
            info.filename = name
            for key, value in attributes.items():
                setattr(info, key, value)
            archive.writestr(info, data)
    return file.getvalue()


def tar_of(members: Iterable[Member], mode: str = "w") -> bytes:
    """A tar archive; the third of a member sets attributes of its `TarInfo`."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=tarfile.GNU_FORMAT) as archive:  # type: ignore[call-overload]
        for name, data, attributes in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in attributes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def plain(files: dict[str, bytes]) -> list[Member]:
    return [(name, data, {}) for name, data in files.items()]


BOTH = pytest.mark.parametrize("pack", [zip_of, tar_of])


@pytest.fixture
def take(
    server: Any, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[bytes], tuple[dict[str, bytes], dict[str, str]]]:
    """Downloads an archive into data/raw; the images' bytes by path, and what was skipped."""
    before = {path for path in workspace.parent.rglob("*")}

    def take(data: bytes) -> tuple[dict[str, bytes], dict[str, str]]:
        server.files["/pets.zip"] = data
        folder = Path("data/raw")
        folder.mkdir(parents=True)
        digest = hashlib.sha256(data).hexdigest()
        try:
            url = f"{server.address}/pets.zip"
            obtain(Download(source="url", url=url, sha256=digest), 42, folder)
            with open_raw(folder) as (raw, images):
                return {image.path: raw.read(image) for image in images}, Source.read(
                    folder
                ).skipped
        finally:
            # Nothing is ever written elsewhere.
            made = {path for path in workspace.parent.rglob("*")} - before
            homes = (workspace / "data", workspace / ".cnnpipe")
            assert all(path in homes or path.is_relative_to(homes[0])
                       or path.is_relative_to(homes[1]) for path in made)  # fmt: skip
            assert {path.name for path in folder.rglob("*")} <= {
                "pets.zip", "source.json", "images.zip", "images.tar", "images.tar.gz",
            }  # fmt: skip
            assert not [path for path in made if path.name.startswith(".untar")]

    return take


# Names.


@BOTH
@pytest.mark.parametrize("name", ["../../cat/3.jpg", "cat/../../../etc/3.jpg", "cat/.."])
def test_a_path_that_leads_out_is_refused(take: Any, pack: Any, name: str) -> None:
    with pytest.raises(UserError, match=r"^pets.zip: \S+ leads out of the archive: pack it again"):
        take(pack([*plain(PETS), (name, b"evil", {})]))


@BOTH
def test_absolute_paths_lie_where_they_would_without_the_slash(take: Any, pack: Any) -> None:
    names = ("/cat/3.jpg", "//dog/3.jpg", "./cat/./4.jpg", "cat//5.jpg")
    images, _ = take(pack([*plain(PETS), *((name, b"3", {}) for name in names)]))
    assert images == PETS | dict.fromkeys(names, b"3")
    with open_raw("data/raw") as (_, files):
        assert {file.label for file in files} == {"cat", "dog"}


def test_the_separators_of_windows_are_separators_where_there_are_no_others(take: Any) -> None:
    names = [r"C:\pets\cat\1.jpg", r"C:\pets\dog\1.jpg"]
    assert take(zip_of([(name, b"1", {}) for name in names]))[0] == {
        "C:/pets/cat/1.jpg": b"1",
        "C:/pets/dog/1.jpg": b"1",
    }
    with open_raw("data/raw") as (_, files):
        assert [file.label for file in files] == ["cat", "dog"]


def test_a_path_of_windows_that_leads_out_is_refused(take: Any) -> None:
    with pytest.raises(UserError, match=r"leads out of the archive"):
        take(zip_of([*plain(PETS), (r"..\..\cat\3.jpg", b"evil", {})]))


@BOTH
def test_odd_names_are_names(take: Any, pack: Any) -> None:
    odd = (
        "a\nb",
        "a\tb\r",
        "x" * 300,
        "-rf",
        "%s{}",
        "\x1b[2J",
        "\u202egpj.exe",
        "e\u0301",
        "a\\b",
    )
    files = PETS | {f"cat/{name}.jpg": name.encode() for name in odd}
    assert take(pack(plain(files))) == (files, {})


def test_a_name_that_is_not_text_is_skipped(take: Any) -> None:
    pax = {"path": "dog/a\0b.jpg"}
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in PETS:
            archive.addfile(tarfile.TarInfo(name))
        latin = tarfile.TarInfo("cat/caf\udce9.jpg")
        archive.addfile(latin)
        named = tarfile.TarInfo("dog/3.jpg")
        named.pax_headers = pax
        archive.addfile(named)
    images, skipped = take(file.getvalue())
    assert images == dict.fromkeys(PETS, b"")
    assert skipped == dict.fromkeys([r"cat/caf\xe9.jpg", r"dog/a\x00b.jpg"], "its name is not text")


def test_a_zip_whose_names_claim_to_be_utf_8_and_are_not_is_refused(take: Any) -> None:
    data = zip_of(plain({**PETS, "cat/é.jpg": b""})).replace("é".encode(), b"\xff\xff")
    with pytest.raises(UserError, match=r"^pets.zip: the archive is damaged: .*utf-8"):
        take(data)


@BOTH
def test_classes_that_differ_in_case_alone_are_two(take: Any, pack: Any) -> None:
    files = {"Cat/1.jpg": b"1", "cat/1.jpg": b"2"}
    assert take(pack(plain(files)))[0] == files


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/pets.zip", "pets.zip"), ("a%2Fb.zip", "b.zip"), ("..", "archive"), ("", "x"),
        ("a/%2E%2E", "archive"), ("source.json", "archive"), ("a%00b", "archive"),
        ("a%0Ab", "archive"), ("x" * 201, "archive"), ("%F0%9F%90%B1.zip", "🐱.zip"),
    ],
)  # fmt: skip
def test_a_download_has_a_name_that_a_file_can_have(path: str, name: str) -> None:
    assert _file_name(f"http://x/{path}?y=/z") == name


# What is no file.


LINKS = ("/etc/passwd", "../../../etc/passwd", "dog/1.jpg")


@pytest.mark.parametrize("target", LINKS)
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_a_tar_are_skipped_and_not_followed(take: Any, kind: bytes, target: str) -> None:
    link = ("cat/link.jpg", b"", {"type": kind, "linkname": target})
    beside = ("link.jpg", b"", {"type": kind, "linkname": target})
    assert take(tar_of([*plain(PETS), link, beside])) == (
        PETS,
        {"cat/link.jpg": "a link, not a file"},
    )


@pytest.mark.parametrize("target", LINKS)
def test_links_in_a_zip_are_skipped_and_not_followed(take: Any, target: str) -> None:
    link = ("cat/link.jpg", target.encode(), {"external_attr": (stat.S_IFLNK | 0o777) << 16})
    assert take(zip_of([*plain(PETS), link])) == (PETS, {"cat/link.jpg": "a link, not a file"})


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"Z"])
def test_devices_and_pipes_are_skipped(take: Any, kind: bytes) -> None:
    members = [*plain(PETS), ("cat/odd.jpg", b"", {"type": kind})]
    assert take(tar_of(members)) == (PETS, {"cat/odd.jpg": "not a file"})


def test_a_pipe_in_a_zip_is_skipped_and_a_folder_called_as_an_image_is_a_folder(take: Any) -> None:
    pipe = ("cat/odd.jpg", b"", {"external_attr": (stat.S_IFIFO | 0o644) << 16})
    folder = ("cat/9.jpg/", b"", {"external_attr": (stat.S_IFDIR | 0o755) << 16})
    assert take(zip_of([*plain(PETS), pipe, folder])) == (PETS, {"cat/odd.jpg": "not a file"})


def test_of_a_file_and_a_link_of_one_name_the_last_counts(take: Any) -> None:
    link = ("cat/1.jpg", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"})
    images, skipped = take(tar_of([*plain(PETS), link]))
    assert set(images) == set(PETS) - {"cat/1.jpg"} and set(skipped) == {"cat/1.jpg"}


def test_a_class_of_links_alone_is_named(take: Any) -> None:
    link = ("owl/1.jpg", b"", {"type": tarfile.SYMTYPE, "linkname": "../cat/1.jpg"})
    with pytest.raises(UserError, match=r"^pets.zip: class 'owl': none .* owl/1.jpg: a link"):
        take(tar_of([*plain(PETS), link]))


# Passwords.


def encrypted(data: bytes, *names: str) -> bytes:
    """The archive with those entries marked as encrypted."""
    changed = bytearray(data)
    for name in names:
        local = data.index(b"PK\x03\x04", data.index(name.encode()) - 30)
        central = data.rindex(b"PK\x01\x02", 0, data.rindex(name.encode()))
        changed[local + 6] |= 1
        changed[central + 8] |= 1
    return bytes(changed)


def test_an_encrypted_archive_is_refused_when_it_is_downloaded(take: Any) -> None:
    with pytest.raises(UserError, match=r"^pets.zip: is encrypted: .* without the password"):
        take(encrypted(zip_of(plain(PETS)), *PETS))


def test_some_encrypted_files_are_skipped(take: Any) -> None:
    images, skipped = take(encrypted(zip_of(plain(PETS)), "cat/1.jpg"))
    assert set(images) == set(PETS) - {"cat/1.jpg"}
    assert skipped == {"cat/1.jpg": "encrypted"}


# Archives in archives.


@BOTH
@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("pets.zip", zip_of(plain(PETS))),
        ("a/b/pets v1.TAR", tar_of(plain(PETS))),
        ("pets.tar.gz", tar_of(plain(PETS), "w:gz")),
    ],
    ids=["zip", "tar", "tar.gz"],
)
def test_an_archive_that_holds_another_alone_is_that_one(
    take: Any, pack: Any, name: str, inner: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"README": b"pets", "licence.md": b"", ".DS_Store": b"", "__MACOSX/x.jpg": b""}
    assert take(pack(plain({**texts, name: inner}))) == (PETS, {})
    assert capsys.readouterr().out == f"pets.zip: holds {name} alone, which is taken instead\n"
    suffix = name.lower()[name.index(".") :]
    assert {path.name for path in Path("data/raw").iterdir()} == {f"images{suffix}", "source.json"}


@BOTH
@pytest.mark.parametrize(
    "files",
    [
        {"train.zip": b"", "test.zip": b""},
        {"in.zip": zip_of(plain({"in.zip": zip_of(plain(PETS))}))},
        {"in.zip": zip_of(plain({"in.tar": tar_of(plain(PETS), "w:gz")}))},
    ],
    ids=["several", "zip in zip", "tar.gz in zip"],
)
def test_several_archives_or_more_than_one_in_another_are_refused(
    take: Any, pack: Any, files: dict[str, bytes]
) -> None:
    with pytest.raises(UserError, match=r"^pets.zip: .*archives, such as \S+: unpack them, and "):
        take(pack(plain(files)))


def test_an_archive_of_images_and_an_archive_is_judged_by_its_images(take: Any) -> None:
    assert take(zip_of(plain({**PETS, "more.zip": b""})))[0] == PETS


@pytest.mark.parametrize(
    "inner", [b"no archive", zip_of(plain({"1.jpg": b""})), b"PK\x03\x04"], ids=range(3)
)
def test_an_inner_archive_that_is_none_is_named_with_the_outer(take: Any, inner: bytes) -> None:
    with pytest.raises(UserError, match=r"^pets.zip: images.zip: "):
        take(tar_of(plain({"in.zip": inner})))


# Bombs.


def with_sizes(data: bytes, name: str, stated: int) -> bytes:
    """The zip archive with another size of that entry in both headers."""
    changed = bytearray(data)
    local = data.index(name.encode()) - 30
    central = data.rindex(name.encode()) - 46
    struct.pack_into("<I", changed, local + 22, stated)
    struct.pack_into("<I", changed, central + 24, stated)
    return bytes(changed)


def test_a_file_of_a_huge_stated_size_is_skipped(take: Any) -> None:
    data = zip_of([*plain(PETS), ("cat/3.jpg", b"3", {})])
    images, skipped = take(with_sizes(data, "cat/3.jpg", (1 << 30) + 1))
    assert images == PETS
    assert skipped == {"cat/3.jpg": "1,073,741,825 bytes, more than 1,073,741,824"}


@pytest.mark.parametrize("name", ["cat/1.jpg", "cat/3.jpg"])
def test_an_entry_longer_than_it_says_is_read_as_far_as_it_says(tmp_path: Path, name: str) -> None:
    bomb = {"compress_type": zipfile.ZIP_DEFLATED, "_compresslevel": 9}
    data = with_sizes(zip_of([*plain(PETS), ("cat/3.jpg", bytes(300 << 20), bomb)]), "cat/3.jpg", 9)
    (tmp_path / "x.zip").write_bytes(data)
    archive = Zip(tmp_path / "x.zip")
    image = next(image for image in archive.images if image.path == name)
    tracemalloc.start()
    try:
        if name == "cat/3.jpg":
            with pytest.raises(UnreadableImage, match=r"^damaged in the archive: .*CRC"):
                archive.read(image)
        else:
            assert archive.read(image) == PETS[name]
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_python_unpacks_without_a_limit_are_not_unpacked(
    take: Any, method: int
) -> None:
    images, skipped = take(zip_of([*plain(PETS), ("cat/3.jpg", b"3", {"compress_type": method})]))
    assert images == PETS
    assert skipped == {"cat/3.jpg": "compressed by another method than deflate"}


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_module, "_MAX_PLAIN_BYTES", 1 << 20)


BOMBS = {
    "gz": lambda: gzip.compress(tar_of([*plain(PETS), ("cat/3", bytes(30 << 20), {})])),
    "bz2": lambda: bz2.compress(tar_of([*plain(PETS), ("cat/3", bytes(30 << 20), {})])),
    "xz": lambda: lzma.compress(tar_of([*plain(PETS), ("cat/3", bytes(30 << 20), {})])),
    "after the end": lambda: gzip.compress(tar_of(plain(PETS)) + bytes(30 << 20)),
    "zip": lambda: zip_of(
        [*plain(PETS), ("cat/3", bytes(30 << 20), {"compress_type": zipfile.ZIP_DEFLATED})]
    ),
}


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("kind", BOMBS)
def test_an_archive_that_unpacks_to_far_more_than_its_size_is_refused(take: Any, kind: str) -> None:
    with pytest.raises(UserError, match=r"^pets.zip: unpacks to more than 100 times its \S+ bytes"):
        take(BOMBS[kind]())


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_archive_may_unpack_to_much_more_than_its_size(take: Any, kind: str) -> None:
    assert set(take(BOMBS[kind]())[0]) >= set(PETS)


@pytest.mark.usefixtures("small_limits")
def test_an_archive_whose_entries_overlap_is_refused(take: Any) -> None:
    """All of 400 entries are one and the same."""
    data = zip_of([("cat/0001.jpg", bytes(9000), {})])
    start = data.index(b"PK\x01\x02")
    central, end = data[start : data.index(b"PK\x05\x06")], data[data.index(b"PK\x05\x06") :]
    names = [f"{label}/{i:04d}.jpg" for label in ("cat", "dog") for i in range(200)]
    directory = b"".join(central.replace(b"cat/0001.jpg", name.encode()) for name in names)
    end = end[:8] + struct.pack("<HHI", len(names), len(names), len(directory)) + end[16:]
    with pytest.raises(UserError, match=r"^pets.zip: unpacks to more than 100 times"):
        take(data[:start] + directory + end)


# Damage.


def header(name: str, size_field: bytes, kind: bytes = b"0") -> bytes:
    """A tar header with that size field of 12 bytes."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size_field
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


NEGATIVE = b"\xff" * 10 + b"\xfc\x00"  # -1024
ONE_BACK = b"\xff" * 10 + b"\xfe\x00"  # -512: the header itself would be the next
MINUS_ONE = b"\xff" * 12
HUGE = b"\x80" + bytes(5) + b"\x7f" + bytes(5)


@pytest.mark.parametrize("size", [NEGATIVE, ONE_BACK, MINUS_ONE, HUGE, b"77777777777\0"])
@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L", b"K", b"S", b"5"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_impossible_sizes_in_a_tar_are_refused_or_do_no_harm(
    take: Any, size: bytes, kind: bytes, compress: Callable[[bytes], bytes]
) -> None:
    pets = tar_of(plain(PETS))
    pets = pets[: -(-len(pets.rstrip(b"\0")) // 512) * 512]
    data = pets + header("cat/3.jpg", size, kind) + bytes(4096)
    tracemalloc.start()
    try:
        images, _ = take(compress(data))
        # Of these tarfile does not use the size.
        assert kind in b"5S" and images == PETS
    except UserError as error:
        assert re.match(r"pets.zip: the archive is damaged: \w", str(error))
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 32 << 20


def test_a_chain_of_long_names_is_refused(take: Any) -> None:
    data = tar_of(plain(PETS)).rstrip(b"\0")
    data += bytes(-len(data) % 512)
    data += (header("x", b"00000000001\0", b"L") + bytes(512)) * 3000
    with pytest.raises(UserError, match=r"^pets.zip: the archive is damaged: "):
        take(data)


def test_a_damaged_header_is_not_taken_for_the_end(take: Any) -> None:
    data = bytearray(tar_of(plain(PETS)))
    data[2048 + 5] ^= 1  # in the name of the third file
    with pytest.raises(UserError, match=r"^pets.zip: .*damaged header at byte 2,048"):
        take(bytes(data))


def test_a_sparse_file_is_skipped(take: Any) -> None:
    pax = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": "cat/3.jpg",
           "GNU.sparse.size": "1099511627776", "GNU.sparse.map": "0,3"}  # fmt: skip
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in PETS.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo("cat/x")
        info.size = 3
        info.pax_headers = pax
        archive.addfile(info, io.BytesIO(b"abc"))
    assert take(file.getvalue()) == (PETS, {"cat/3.jpg": "a sparse file"})


def test_a_tar_cut_short_after_it_was_opened_gives_no_short_files(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    path = tmp_path / "raw" / "x.tar"
    path.write_bytes(tar_of(plain({**PETS, "dog/9.jpg": bytes(4000)})))
    Source("url", "http://x", ("x.tar",)).write(tmp_path / "raw")
    with open_raw(tmp_path / "raw") as (raw, images):
        os.truncate(path, 6000)
        with pytest.raises(UnreadableImage, match=r"^damaged in the archive: .*cut short"):
            raw.read(images[-1])
        assert raw.read(images[0]) == b"cat 1"


def test_a_zip_at_the_end_of_a_tar_does_not_make_it_a_zip(take: Any) -> None:
    evil = zip_of(plain({"cat/evil.jpg": b"", "dog/evil.jpg": b""}))
    assert take(tar_of(plain({**PETS, "evil.zip": evil})))[0] == PETS


NOISE = {name: np.random.default_rng(i).bytes(300) for i, name in enumerate(PETS)}
SMALL = {
    "zip": zip_of(plain(NOISE)),
    "deflated": zip_of(
        [(name, data, {"compress_type": zipfile.ZIP_DEFLATED}) for name, data in NOISE.items()]
    ),
    "tar": tar_of(plain(NOISE)),
    "tar.gz": tar_of(plain(NOISE), "w:gz"),
    "tar.bz2": tar_of(plain(NOISE), "w:bz2"),
    "tar.xz": tar_of(plain(NOISE), "w:xz"),
}


@pytest.mark.parametrize("kind", SMALL)
@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_archive_is_refused_or_sound(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    whole = SMALL[kind]
    position = st.integers(0, len(whole) - 1)
    flips = data.draw(st.lists(st.tuples(position, st.integers(1, 255)), max_size=4), "flips")
    end = data.draw(st.one_of(st.just(len(whole)), position), "end")
    damaged = bytearray(whole)
    for at, bits in flips:
        damaged[at] ^= bits
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "raw").mkdir()
    (folder / "raw" / "x").write_bytes(damaged[:end])
    Source("url", "http://x", ("x",)).write(folder / "raw")
    for look in (lambda: check_archive(folder / "raw" / "x"), lambda: _read_all(folder / "raw")):
        try:
            look()
        except UserError as error:
            assert str(error)


def _read_all(folder: Path) -> None:
    with open_raw(folder) as (raw, images):
        for image in images:
            try:
                assert len(raw.read(image)) <= 1 << 20
                assert image.label
            except UnreadableImage:
                pass


IDX = struct.pack(">HBBI", 0, 8, 1, 40) + bytes(range(40))


@given(
    st.integers(0, 200), st.lists(st.tuples(st.integers(0, 43), st.integers(1, 255)), max_size=3)
)
@example(200, [(0, 1)])
@example(200, [(3, 254)])
def test_a_damaged_idx_file_is_refused_or_sound(
    tmp_path_factory: pytest.TempPathFactory, end: int, flips: list[tuple[int, int]]
) -> None:
    damaged = bytearray(IDX)
    for at, bits in flips:
        damaged[at] ^= bits
    path = tmp_path_factory.mktemp("fuzz") / "x.gz"
    for content in (gzip.compress(bytes(damaged[:end])), gzip.compress(IDX)[:end]):
        path.write_bytes(content)
        try:
            assert read_idx(path).dtype == np.uint8
        except UserError as error:
            assert str(error).startswith("x.gz: not an IDX file: ")


@pytest.mark.parametrize("name", ["PKLot", "BZh"])
def test_a_tar_may_begin_with_a_name_like_another_archives_first_bytes(
    take: Any, name: str
) -> None:
    files = {f"{name}/{path}": data for path, data in PETS.items()}
    assert take(tar_of(plain(files))) == (files, {})


def test_a_disk_that_is_full_while_an_archive_is_unpacked_is_told_as_it_is(
    take: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(raw_module, "_check_size", full)  # after each piece that is written
    with pytest.raises(OSError, match="No space left"):
        take(tar_of(plain(PETS), "w:gz"))


@pytest.mark.parametrize(
    ("labels", "reason"), [([0, 1], "not the labels"), ([0, 1, 9], "a label 9, of no class")]
)
def test_labels_that_do_not_belong_to_the_images_are_refused(
    tmp_path: Path, labels: list[int], reason: str
) -> None:
    def idx(values: np.ndarray) -> bytes:
        sizes = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
        return gzip.compress(sizes + values.astype(np.uint8).tobytes())

    names = ("a.gz", "b.gz", "c.gz", "d.gz")
    values = (np.zeros((3, 2, 2)), np.array(labels), np.zeros((1, 2, 2)), np.zeros(1))
    for name, array in zip(names, values, strict=True):
        (tmp_path / name).write_bytes(idx(array))
    Source("mnist", "http://x", names, class_names=("cat", "dog")).write(tmp_path)
    with pytest.raises(UserError, match=f"b.gz: {reason}"), open_raw(tmp_path):
        pass


def test_images_of_no_pixels_are_refused(tmp_path: Path) -> None:
    names = ("a.gz", "b.gz", "c.gz", "d.gz")
    for name, shape in zip(names, ((3, 0, 2), (3,), (1, 2, 2), (1,)), strict=True):
        sizes = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
        (tmp_path / name).write_bytes(gzip.compress(sizes + bytes(int(np.prod(shape)))))
    Source("mnist", "http://x", names, class_names=("cat", "dog")).write(tmp_path)
    with pytest.raises(UserError, match=r"b.gz: not the labels of the images"), open_raw(tmp_path):
        pass
