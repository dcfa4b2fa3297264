"""Archives that are damaged, or that mean harm: refused in one line, or taken safely."""

import gzip
import io
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cnnpipe.data import raw as module
from cnnpipe.data.decode import UnreadableImage
from cnnpipe.data.raw import Source, check_archive, open_raw
from cnnpipe.errors import UserError

GOOD = {"pets/cat/1.jpg": b"cat 1", "pets/dog/1.jpg": b"dog 1"}
Read = dict[str, bytes | str]


def write_zip(path: Path, files: dict[str | zipfile.ZipInfo, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def write_tar(path: Path, members: list[tarfile.TarInfo], kind: str = "") -> None:
    with tarfile.open(path, f"w:{kind}") as archive:
        for name, data in GOOD.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for member in members:
            archive.addfile(member, io.BytesIO(bytes(member.size)))


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def read_all(path: Path) -> Read:
    """What each file of the archive gives: its bytes, or the reason why not."""
    check_archive(path)
    Source("url", "http://x", (path.name,)).write(path.parent)
    found: Read = {}
    with open_raw(path.parent) as (archive, images):
        for image in images:
            try:
                found[image.path] = archive.read(image)
            except UnreadableImage as error:
                found[image.path] = str(error)
    return found


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "raw"
    folder.mkdir(parents=True)
    return folder


ODD_NAMES = [
    "../../cat/1.jpg", "../evil.jpg", "/etc/passwd", "/abs/cat/1.jpg", "C:\\cat\\1.jpg",
    "cat\\1.jpg", "./cat/./2.jpg", "cat//3.jpg", "cat/", "cat/..", "cat/new\nline.jpg",
    "cat/" + "x" * 300 + ".jpg", "cat/\u202egpj.exe", "cat/\x1b[31m.jpg", "~/cat/1.jpg", ".", "-",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_nothing_is_ever_written_outside_whatever_a_member_is_called(
    raw: Path, tmp_path: Path, kind: str, name: str
) -> None:
    path = raw / f"images.{kind}"
    if kind == "zip":
        write_zip(path, {**GOOD, name: b"x"})
    else:
        info = tarfile.TarInfo(name)
        info.size = 1
        write_tar(path, [info], kind.removeprefix("tar").lstrip("."))
    found = read_all(path)
    assert {key: found[key] for key in GOOD} == GOOD
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == sorted(
        [path, raw / "source.json"]
    )


@pytest.mark.parametrize("target", ["/etc/passwd", "../../../../etc/passwd", "1.jpg"])
def test_links_are_quarantined_and_never_followed(raw: Path, target: str) -> None:
    link = zipfile.ZipInfo("pets/cat/link.jpg")
    link.create_system = 3
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    write_zip(raw / "images.zip", {**GOOD, link: target.encode()})
    assert read_all(raw / "images.zip") == {**GOOD, "pets/cat/link.jpg": "a link, not a file"}
    links = [
        member("pets/cat/hard.jpg", tarfile.LNKTYPE, target),
        member("pets/dog/soft.jpg", tarfile.SYMTYPE, target),
    ]
    write_tar(raw / "images.tar", links)
    assert read_all(raw / "images.tar") == {
        **GOOD,
        "pets/cat/hard.jpg": "a link, not a file",
        "pets/dog/soft.jpg": "a link, not a file",
    }


def test_devices_fifos_and_folders_called_like_images_are_none(raw: Path) -> None:
    kinds = [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE]
    odd = [member(f"pets/cat/{i}.jpg", kind) for i, kind in enumerate(kinds, start=2)]
    write_tar(raw / "images.tar", [*odd, member("pets/dog/folder.jpg", tarfile.DIRTYPE)])
    assert read_all(raw / "images.tar") == {
        **GOOD,
        **{f"pets/cat/{i}.jpg": "not a file" for i in (2, 3, 4)},
        "pets/cat/5.jpg": b"",  # contiguous, a regular file of old systems
    }


def test_an_encrypted_archive_is_refused_at_once(raw: Path) -> None:
    write_zip(raw / "images.zip", dict(GOOD))
    data = bytearray((raw / "images.zip").read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        position = data.find(signature)
        while position >= 0:
            data[position + offset] |= 1
            position = data.find(signature, position + 1)
    (raw / "images.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"^images.zip: is encrypted"):
        check_archive(raw / "images.zip")


@pytest.mark.parametrize("inner", ["photos.zip", "data/photos.tar.gz"])
def test_an_archive_in_an_archive_is_named(raw: Path, inner: str) -> None:
    write_zip(raw / "outer.zip", {inner: b"PK", "readme.txt": b""})
    with pytest.raises(UserError, match=f"^outer.zip: holds another archive, {inner}, .*unpack it"):
        check_archive(raw / "outer.zip")


# Bombs.


def test_what_claims_to_be_huge_is_not_read(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_BYTES", 1000)
    bomb = {"pets/cat/bomb.jpg": bytes(1001), "pets/cat/large.jpg": bytes(1000)}
    write_zip(raw / "images.zip", {**GOOD, **bomb})
    info = tarfile.TarInfo("pets/cat/bomb.jpg")
    info.size = 1001
    write_tar(raw / "images.tar", [info])
    for name in ("images.zip", "images.tar"):
        found = read_all(raw / name)
        assert found["pets/cat/bomb.jpg"] == "1,001 bytes, more than 1,000"
        assert {key: found[key] for key in GOOD} == GOOD


def test_a_size_that_lies_gives_no_more_than_it_says(raw: Path) -> None:
    write_zip(raw / "images.zip", {**GOOD, "pets/cat/bomb.jpg": bytes(50_000_000)})
    data = (raw / "images.zip").read_bytes()
    lie = data.replace(struct.pack("<I", 50_000_000), struct.pack("<I", 10))
    assert lie != data
    (raw / "images.zip").write_bytes(lie)
    found = read_all(raw / "images.zip")
    assert str(found["pets/cat/bomb.jpg"]).startswith("damaged in the archive: Bad CRC-32")


def test_entries_that_share_their_bytes_are_refused(raw: Path) -> None:
    # Fifield, "A better zip bomb" (2019): many entries, one after another within the same bytes.
    write_zip(raw / "images.zip", {**GOOD, "pets/dog/2.jpg": b"dog 1"})
    with zipfile.ZipFile(raw / "images.zip") as archive:
        first, second = (archive.getinfo(f"pets/dog/{i}.jpg").header_offset for i in (1, 2))
    data = (raw / "images.zip").read_bytes()
    at = data.index(b"PK\x01\x02")
    changed = data[:at] + data[at:].replace(struct.pack("<I", second), struct.pack("<I", first))
    (raw / "images.zip").write_bytes(changed)
    found = read_all(raw / "images.zip")
    assert found["pets/cat/1.jpg"] == b"cat 1"
    assert "damaged in the archive" in str(found["pets/dog/2.jpg"])


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_tar_that_unpacks_to_far_more_than_its_size_is_refused(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    info = tarfile.TarInfo("pets/cat/bomb.jpg")
    info.size = 20_000_000
    path = raw / f"images.tar.{kind}"
    write_tar(path, [info], kind)
    Source("url", "http://x", (path.name,)).write(raw)
    assert len(read_all(path)) == 3  # so much is always allowed
    monkeypatch.setattr(module, "_ALWAYS_UNPACKED", 100_000)
    most = max(100_000, 100 * path.stat().st_size)
    for use in (lambda: check_archive(path), lambda: open_raw(raw).__enter__()):
        with pytest.raises(UserError, match=f"unpacks to more than {most:,} bytes"):
            use()
    assert [p.name for p in raw.parent.iterdir()] == ["raw"]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_claims_to_be_huge_takes_no_memory(
    raw: Path, monkeypatch: pytest.MonkeyPatch, kind: bytes
) -> None:
    monkeypatch.setattr(module, "_ALWAYS_UNPACKED", 1 << 20)
    info = tarfile.TarInfo("header")
    info.type, info.size = kind, 6 << 30
    (raw / "images.tar.gz").write_bytes(gzip.compress(info.tobuf() + bytes(100_000)))
    (raw / "images.tar").write_bytes(info.tobuf() + bytes(100_000))
    for name in ("images.tar", "images.tar.gz"):
        with pytest.raises(UserError, match=f"^{name}: .*a header of 6,442,450,944 bytes"):
            check_archive(raw / name)


@pytest.mark.parametrize("size", [-1, -1000])
def test_a_negative_size_ends_the_archive_and_reads_nothing(raw: Path, size: int) -> None:
    info = tarfile.TarInfo("pets/cat/2.jpg")
    write_tar(raw / "images.tar", [info])
    data = (raw / "images.tar").read_bytes()
    start = data.rindex(b"pets/cat/2.jpg")
    header = bytearray(data[start : start + 512])
    header[124:136] = size.to_bytes(12, "big", signed=True)  # GNU's numbers to the base of 256
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (raw / "images.tar").write_bytes(data[:start] + header + data[start + 512 :])
    with pytest.raises(UserError, match=f"^images.tar: .*a size of {size}"):
        check_archive(raw / "images.tar")


def test_a_sparse_member_is_no_image(raw: Path) -> None:
    info = member("pets/cat/2.jpg", tarfile.GNUTYPE_SPARSE)
    info.size = 512
    write_tar(raw / "images.tar", [info])
    assert read_all(raw / "images.tar") == {**GOOD, "pets/cat/2.jpg": "not a file"}


# Damage.


def idx_files(folder: Path) -> list[Path]:
    images = b"\0\0\x08\x03" + struct.pack(">3I", 4, 2, 2) + bytes(range(16))
    labels = b"\0\0\x08\x01" + struct.pack(">I", 4) + bytes([0, 1, 0, 1])
    paths = [folder / f"{i}.gz" for i in range(4)]
    for path, data in zip(paths, (images, labels, images, labels), strict=True):
        path.write_bytes(gzip.compress(data))
    return paths


def everything(folder: Path, names: list[str], class_names: tuple[str, ...] = ()) -> None:
    Source("url", "http://x", tuple(names), None, class_names).write(folder)
    with open_raw(folder) as (archive, images):
        for image in images:
            try:
                assert isinstance(archive.read(image), bytes)
            except UnreadableImage as error:
                assert str(error)


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz", "idx"])
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8),
       st.floats(0.1, 1))  # fmt: skip
def test_whatever_bytes_are_wrong_it_is_one_line_or_an_unreadable_image(
    tmp_path_factory: pytest.TempPathFactory, kind: str, flips: list[tuple[float, int]],
    share: float,
) -> None:  # fmt: skip
    raw = tmp_path_factory.mktemp("raw")
    if kind == "idx":
        paths = idx_files(raw)
        damaged, class_names = paths[len(flips) % 4], ("zero", "one")
    else:
        paths, class_names = [raw / f"images.{kind}"], ()
        damaged = paths[0]
        if kind == "zip":
            write_zip(damaged, {**GOOD, "pets/cat/2.jpg": bytes(1000)})
        else:
            info = tarfile.TarInfo("pets/cat/2.jpg")
            info.size = 1000
            write_tar(damaged, [info], kind.removeprefix("tar").lstrip("."))
    data = bytearray(damaged.read_bytes())
    for place, value in flips:
        data[int(place * (len(data) - 1))] = value
    damaged.write_bytes(data[: int(share * len(data))] if len(flips) % 2 else data)
    for use in (check_archive, lambda _: everything(raw, [p.name for p in paths], class_names)):
        try:
            if kind != "idx" or use is not check_archive:
                use(damaged)
        except UserError as error:
            assert "\n" not in str(error)


def test_a_member_cut_short_after_the_index_was_read_is_unreadable(raw: Path) -> None:
    info = tarfile.TarInfo("pets/cat/2.jpg")
    info.size = 5000
    path = raw / "images.tar"
    write_tar(path, [info])
    Source("url", "http://x", (path.name,)).write(raw)
    with open_raw(raw) as (archive, images):
        path.write_bytes(path.read_bytes()[:4000])
        (last,) = [image for image in images if image.path == "pets/cat/2.jpg"]
        with pytest.raises(UnreadableImage, match="cut short"):
            archive.read(last)
