"""Tests of downloads: the real code against a server on loopback, and what interrupts it."""

import errno
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from object_storage import Storage

from cnnpipe.data import downloads, object_storage
from cnnpipe.data.downloads import fetch
from cnnpipe.errors import RunFailed, UserError

PHOTOS = np.random.default_rng(0).bytes(2 << 20)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def arguments(server: Any, data: bytes = PHOTOS) -> tuple[str, str, str]:
    return f"{server.address}/pets.zip", "pets.zip", f"sha256:{sha256(data)}"


def left() -> dict[str, int]:
    """The size of every file under .cnnpipe/ but the locks, hidden ones as well."""
    files = (path for path in Path(".cnnpipe").rglob("*") if path.is_file())
    return {path.name: path.stat().st_size for path in files if not path.name.endswith(".lock")}


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise TimeoutError


@pytest.fixture(autouse=True)
def _in_a_workspace(workspace: Path) -> None:
    pass


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the code would have waited for."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


def test_a_file_is_downloaded_once(server: Any, pauses: list[float]) -> None:
    server.files["/a/pets.zip"] = b"pets"
    checksum = f"sha256:{sha256(b'pets')}"
    path = fetch(f"{server.address}/a/pets.zip", "pets.zip", checksum)
    assert path.read_bytes() == b"pets"
    assert path.is_relative_to(Path(".cnnpipe/downloads").resolve())
    assert fetch(f"{server.address}/a/pets.zip", "pets.zip", checksum) == path
    assert server.requests == ["/a/pets.zip"]
    assert pauses == []


def test_an_experiment_in_a_workspace_of_its_own_does_not_download_again(
    server: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/pets.zip"] = b"pets"
    arguments = (f"{server.address}/pets.zip", "pets.zip", f"sha256:{sha256(b'pets')}")
    path = fetch(*arguments)
    experiment = workspace / ".dvc" / "tmp" / "exps" / "tmp1"
    experiment.mkdir(parents=True)
    monkeypatch.chdir(experiment)
    monkeypatch.setenv("DVC_ROOT", str(workspace))
    assert fetch(*arguments) == path
    assert len(server.requests) == 1


def test_files_of_one_name_and_different_contents_do_not_meet(server: Any) -> None:
    server.files |= {"/a/pets.zip": b"a", "/b/pets.zip": b"b"}
    paths = [
        fetch(f"{server.address}/{x}/pets.zip", "pets.zip", f"sha256:{sha256(x.encode())}")
        for x in "ab"
    ]
    assert [path.read_bytes() for path in paths] == [b"a", b"b"]


def test_a_download_damaged_afterwards_is_fetched_again(server: Any) -> None:
    server.files["/pets.zip"] = b"pets"
    arguments = (f"{server.address}/pets.zip", "pets.zip", f"sha256:{sha256(b'pets')}")
    fetch(*arguments).write_bytes(b"damaged")
    assert fetch(*arguments).read_bytes() == b"pets"
    assert len(server.requests) == 2


@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_a_wrong_checksum_names_the_url_and_leaves_nothing_behind(
    server: Any, kind: str, pauses: list[float]
) -> None:
    server.files["/pets.zip"] = b"other pets"
    url = f"{server.address}/pets.zip"
    checksum = f"{kind}:{hashlib.new(kind, b'pets').hexdigest()}"
    with pytest.raises(UserError, match=rf"^{url}: .*does not have the checksum {checksum}"):
        fetch(url, "pets.zip", checksum)
    assert left() == {}
    assert server.requests == ["/pets.zip"]  # not four times: it may be large
    assert pauses == []


def test_a_missing_file_fails_the_run_at_once(server: Any, pauses: list[float]) -> None:
    url = f"{server.address}/pets.zip"
    with pytest.raises(RunFailed, match=f"^{url}: cannot be downloaded: 404") as failure:
        fetch(url, "pets.zip", "sha256:" + 64 * "0")
    assert "\n" not in str(failure.value)
    assert len(server.requests) == 1 and pauses == []
    assert left() == {}


def test_a_server_that_fails_at_first_is_asked_again(server: Any, pauses: list[float]) -> None:
    server.files["/pets.zip"] = b"pets"
    server.failures["/pets.zip"] = 3
    path = fetch(f"{server.address}/pets.zip", "pets.zip", f"sha256:{sha256(b'pets')}")
    assert path.read_bytes() == b"pets"
    assert len(server.requests) == 4
    assert pauses == [1, 2, 3]


def test_a_server_that_keeps_failing_fails_the_run(server: Any, pauses: list[float]) -> None:
    server.failures["/pets.zip"] = 99
    with pytest.raises(RunFailed, match=r"/pets.zip: cannot be downloaded: 503"):
        fetch(f"{server.address}/pets.zip", "pets.zip", "sha256:" + 64 * "0")
    assert len(server.requests) == 4
    assert left() == {}


def test_a_server_that_does_not_answer_fails_the_run(pauses: list[float], server: Any) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers there
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/pets.zip"
        with pytest.raises(RunFailed, match=f"^{url}: cannot be downloaded: .+") as failure:
            fetch(url, "pets.zip", "sha256:" + 64 * "0")
    assert "\n" not in str(failure.value)
    assert pauses == [1, 2, 3]
    assert left() == {}


# Going on.


def test_a_connection_lost_midway_is_gone_on_with(server: Any, pauses: list[float]) -> None:
    server.files["/pets.zip"] = PHOTOS
    server.cuts = [1_000_000, 500_000]
    assert fetch(*arguments(server)).read_bytes() == PHOTOS
    assert server.sent == [1_000_000, 500_000, len(PHOTOS) - 1_500_000]
    assert [asked.get("Range") for asked in server.asked] == [
        None, "bytes=1000000-", "bytes=1500000-",
    ]  # fmt: skip
    assert pauses == [1, 2]
    assert left() == {"pets.zip": len(PHOTOS)}


def test_what_four_attempts_have_brought_is_gone_on_with_by_the_next_run(server: Any) -> None:
    server.files["/pets.zip"] = PHOTOS
    server.cuts = [100_000] * 4
    with pytest.raises(RunFailed, match=r"; 400,000 bytes are there, the next run goes on"):
        fetch(*arguments(server))
    assert left()["pets.zip.part"] == 400_000
    assert fetch(*arguments(server)).read_bytes() == PHOTOS
    assert server.sent[4:] == [len(PHOTOS) - 400_000]


def test_a_download_killed_midway_is_gone_on_with_by_the_next_run(
    server: Any, workspace: Path
) -> None:
    server.files["/pets.zip"] = PHOTOS
    server.hold.clear()
    code = "import sys; from cnnpipe.data.downloads import fetch; fetch(*sys.argv[1:])"
    with subprocess.Popen([sys.executable, "-c", code, *arguments(server)]) as process:
        wait_for(lambda: left().get("pets.zip.part") == len(PHOTOS) // 2)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    server.hold.set()
    assert fetch(*arguments(server)).read_bytes() == PHOTOS
    assert server.sent[-1] == len(PHOTOS) // 2
    assert left() == {"pets.zip": len(PHOTOS)}


def test_an_interrupted_download_is_gone_on_with(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/pets.zip"] = PHOTOS
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(downloads.os, "fsync", lambda descriptor: signal.raise_signal(signal.SIGINT))
        fetch(*arguments(server))
    assert left()["pets.zip.part"] == len(PHOTOS)
    assert fetch(*arguments(server)).read_bytes() == PHOTOS
    assert server.sent == [len(PHOTOS)]  # the server said that nothing is missing


@pytest.mark.parametrize("validators", [("ETag", "Last-Modified"), ("Last-Modified",), ()])
@pytest.mark.parametrize("honest", [True, False])
def test_a_file_that_has_changed_on_the_server_begins_anew(
    server: Any, validators: tuple[str, ...], honest: bool
) -> None:
    server.validators = validators
    server.files["/pets.zip"] = bytes(len(PHOTOS))
    server.cuts = [300_000] * 4
    with pytest.raises(RunFailed):
        fetch(*arguments(server))
    server.files["/pets.zip"] = PHOTOS
    if not honest:  # it goes on whatever the mark
        server.validators = ()
        for path in Path(".cnnpipe").rglob("*.version"):
            path.unlink()
    assert fetch(*arguments(server)).read_bytes() == PHOTOS
    if honest and validators:
        assert "If-Range" in server.asked[-1]
        assert server.sent[4:] == [len(PHOTOS)]
    else:  # only the checksum could tell
        assert len(server.sent) == 6 and server.sent[5] == len(PHOTOS)
    assert left() == {"pets.zip": len(PHOTOS)}


def test_a_weak_tag_is_not_sent_back(server: Any) -> None:
    server.files["/pets.zip"] = PHOTOS
    server.validators = ()
    server.headers = {"ETag": 'W/"1"'}
    server.cuts = [1_000_000]
    assert fetch(*arguments(server)).read_bytes() == PHOTOS
    assert "If-Range" not in server.asked[1]
    assert server.sent[1] == len(PHOTOS) - 1_000_000


def test_a_server_that_knows_no_ranges_sends_all_of_it_again(server: Any) -> None:
    server.files["/pets.zip"] = PHOTOS
    server.ranges = False
    server.cuts = [1_500_000]
    assert fetch(*arguments(server)).read_bytes() == PHOTOS
    assert server.sent == [1_500_000, len(PHOTOS)]


def test_a_part_longer_than_the_file_begins_anew(server: Any) -> None:
    server.files["/pets.zip"] = PHOTOS
    server.cuts = [300_000] * 4
    with pytest.raises(RunFailed):
        fetch(*arguments(server))
    part = next(Path(".cnnpipe").rglob("*.part"))
    part.write_bytes(bytes(len(PHOTOS) + 1))
    assert fetch(*arguments(server)).read_bytes() == PHOTOS


@pytest.mark.parametrize("damage", [b"?", bytes(1_000_000)])
def test_a_part_damaged_on_the_disk_is_fetched_anew_once(server: Any, damage: bytes) -> None:
    server.files["/pets.zip"] = PHOTOS
    server.cuts = [250_000] * 4
    with pytest.raises(RunFailed):
        fetch(*arguments(server))
    next(Path(".cnnpipe").rglob("*.part")).write_bytes(damage)
    assert fetch(*arguments(server)).read_bytes() == PHOTOS
    assert server.sent[4:] == [len(PHOTOS) - len(damage), len(PHOTOS)]


def test_a_resumed_file_of_another_checksum_is_refused_after_one_more_try(server: Any) -> None:
    server.files["/pets.zip"] = PHOTOS
    server.cuts = [1_000_000]
    with pytest.raises(UserError, match="does not have the checksum"):
        fetch(*arguments(server, b"other pets"))
    assert server.sent == [1_000_000, len(PHOTOS) - 1_000_000, len(PHOTOS)]
    assert left() == {}


@pytest.mark.parametrize("told", ["bytes 1500000-1/2", "bytes 0-9", "bytes */9", "items 1-2/3"])
def test_an_answer_that_belongs_elsewhere_is_not_appended(server: Any, told: str) -> None:
    server.files["/pets.zip"] = PHOTOS
    server.cuts = [1_000_000, 500_000, 500_000, 500_000]
    server.headers = {"Content-Range": told}
    with pytest.raises(RunFailed, match="cannot be downloaded: it sent "):
        fetch(*arguments(server))
    server.headers = {}
    server.cuts = []
    assert fetch(*arguments(server)).read_bytes() == PHOTOS


def test_an_answer_that_begins_earlier_is_put_where_it_belongs(server: Any) -> None:
    server.files["/pets.zip"] = PHOTOS
    server.cuts = [1_000_000]
    server.overlap = 1000
    assert fetch(*arguments(server)).read_bytes() == PHOTOS
    assert server.sent == [1_000_000, len(PHOTOS) - 999_000]


def test_an_answer_that_ends_early_without_a_stated_length_is_gone_on_with(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/pets.zip"] = PHOTOS
    server.cuts = [1_000_000, 300_000]
    get = downloads.requests.get

    def without_length(*args: Any, **options: Any) -> Any:
        server.headers = {"Content-Length": None} if "Range" in options["headers"] else {}
        return get(*args, **options)

    monkeypatch.setattr(downloads.requests, "get", without_length)
    assert fetch(*arguments(server)).read_bytes() == PHOTOS
    assert server.sent == [1_000_000, 300_000, len(PHOTOS) - 1_300_000]


def test_an_archive_served_as_an_encoded_file_stays_an_archive(server: Any) -> None:
    server.files["/pets.zip"] = PHOTOS
    server.headers = {"Content-Encoding": "gzip"}
    assert fetch(*arguments(server)).read_bytes() == PHOTOS
    assert server.asked[0]["Accept-Encoding"] == "identity"


def test_a_full_disk_is_told_as_it_is_and_the_part_stays(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/pets.zip"] = PHOTOS

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(downloads.os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device") as failure:
            fetch(*arguments(server))
    assert failure.value.errno == errno.ENOSPC
    assert server.requests == ["/pets.zip"]  # another attempt would not make room
    assert left()["pets.zip.part"] == len(PHOTOS)
    assert fetch(*arguments(server)).read_bytes() == PHOTOS


def test_of_two_processes_one_downloads_and_the_other_waits(
    server: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    server.files["/pets.zip"] = PHOTOS
    server.hold.clear()
    code = "import sys; from cnnpipe.data.downloads import fetch; fetch(*sys.argv[1:])"
    command = [sys.executable, "-c", code, *arguments(server)]
    with subprocess.Popen(command) as first:
        wait_for(lambda: left().get("pets.zip.part") == len(PHOTOS) // 2)
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as second:
            assert second.stderr is not None
            told = f"pets.zip is running already as process {first.pid}: waits for it\n"
            assert second.stderr.readline().endswith(told)
            server.hold.set()
    assert (first.returncode, second.returncode) == (0, 0)
    assert server.sent == [len(PHOTOS)]
    assert left() == {"pets.zip": len(PHOTOS)}


# What a server may not make known.


@pytest.mark.parametrize(
    "location", ["/signed?X-Amz-Signature=hidden", "//me:hidden@127.0.0.1:9/x"]
)
def test_the_signed_address_to_which_a_server_sends_on_is_not_told(
    server: Any, location: str
) -> None:
    server.files["/pets.zip"] = b""
    server.status = 302
    server.headers = {"Location": location}
    with pytest.raises(RunFailed, match=r"/pets.zip: cannot be downloaded: ") as failure:
        fetch(*arguments(server))
    assert "hidden" not in str(failure.value)


def test_user_and_password_of_a_web_server_come_from_netrc(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hidden\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server.files["/pets.zip"] = PHOTOS
    assert fetch(*arguments(server)).read_bytes() == PHOTOS
    assert server.asked[0]["Authorization"].startswith("Basic ")


# From an object storage.


@pytest.fixture
def pets(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str, str]:
    """The arguments that fetch the photos, which are there, in blocks of a MiB."""
    monkeypatch.setattr(object_storage, "_BLOCK_BYTES", 1 << 20)
    storage.put("pets.zip", PHOTOS)
    return "s3://photos/pets.zip", "pets.zip", f"sha256:{sha256(PHOTOS)}"


def test_an_object_is_downloaded_once(storage: Storage, pets: Any) -> None:
    path = fetch(*pets)
    assert path.read_bytes() == PHOTOS
    assert fetch(*pets) == path
    assert storage.ranges() == ["bytes=0-1048575", "bytes=1048576-2097151"]
    assert left() == {"pets.zip": len(PHOTOS)}


def test_an_object_is_gone_on_with_by_the_next_run(
    storage: Storage, pets: Any, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(pets, monkeypatch)
    assert left()["pets.zip.part"] == 1 << 20
    storage.asked.clear()
    assert fetch(*pets).read_bytes() == PHOTOS
    assert storage.ranges() == ["bytes=1048576-2097151"]
    assert pauses == []


def test_an_object_of_which_all_has_come_is_not_read_again(
    storage: Storage, pets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(downloads.os, "fsync", lambda descriptor: signal.raise_signal(signal.SIGINT))
        fetch(*pets)
    storage.asked.clear()
    assert fetch(*pets).read_bytes() == PHOTOS
    assert storage.ranges() == []


def test_an_object_that_has_changed_begins_anew(
    storage: Storage, pets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.put("pets.zip", bytes(len(PHOTOS)))
    interrupt(pets, monkeypatch)
    storage.put("pets.zip", PHOTOS)
    storage.asked.clear()
    assert fetch(*pets).read_bytes() == PHOTOS
    assert storage.ranges() == ["bytes=0-1048575", "bytes=1048576-2097151"]


def interrupt(pets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that ends after its first block."""
    real = object_storage.blocks

    def first(*arguments: Any) -> Any:
        yield next(real(*arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(object_storage, "blocks", first)
        fetch(*pets)


def test_an_object_of_another_checksum_is_refused_and_not_kept(storage: Storage, pets: Any) -> None:
    with pytest.raises(UserError, match=r"^s3://photos/pets.zip: .*does not have the checksum"):
        fetch(*pets[:2], "sha256:" + 64 * "0")
    assert left() == {}


def test_a_storage_that_fails_at_first_is_asked_again(
    storage: Storage, pets: Any, pauses: list[float]
) -> None:
    storage.failures = 3
    assert fetch(*pets).read_bytes() == PHOTOS
    assert pauses == [1, 2, 3]


def test_a_storage_that_keeps_failing_fails_the_run(
    storage: Storage, pets: Any, pauses: list[float]
) -> None:
    storage.failures = 99
    with pytest.raises(RunFailed, match=r"^s3://photos/pets.zip: cannot be downloaded: the object"):
        fetch(*pets)
    assert pauses == [1, 2, 3]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://photos/dogs.zip", "no such object"),
        ("s3://fotos/pets.zip", "no such bucket"),
        ("s3://photos/", "a folder, not an archive"),
    ],
)
def test_what_is_no_object_is_the_users_mistake(
    pets: Any, url: str, reason: str, pauses: list[float]
) -> None:
    with pytest.raises(UserError, match=f"^download.url = '{url}': {reason}$"):
        fetch(url, *pets[1:])
    assert pauses == []
    assert left() == {}


def test_an_object_that_may_not_be_read_is_asked_for_once(
    storage: Storage, pets: Any, pauses: list[float]
) -> None:
    storage.refuse_keys(True)
    with pytest.raises(UserError, match=r"^download.url = 's3://photos/pets.zip': access denied"):
        fetch(*pets)
    assert pauses == []
