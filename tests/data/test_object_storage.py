"""Objects by their address: what is found and read, and what is said where that cannot be."""

import builtins
import socket
from pathlib import Path
from typing import Any

import pytest
from object_storage import Storage

from cnnpipe.data import object_storage
from cnnpipe.data.object_storage import Refused, Unavailable, addresses, blocks, copy, find, read
from cnnpipe.errors import UserError

ADDRESS = "s3://photos/pets/cat 1.jpg"


@pytest.fixture(autouse=True)
def _blocks_of_a_kilobyte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_storage, "_BLOCK_BYTES", 1000)


@pytest.fixture(autouse=True)
def _with_a_cat(storage: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    storage.put("pets/cat 1.jpg", b"meow")


def test_objects_and_folders_are_found(storage: Storage) -> None:
    found = find(ADDRESS)
    assert (found.is_folder, found.size) == (False, 4)
    assert found.version
    storage.put("pets/cat 1.jpg", b"purr")
    assert find(ADDRESS).version != found.version
    for folder in ("s3://photos", "s3://photos/", "s3://photos/pets", "s3://photos/pets/"):
        assert find(folder).is_folder


def test_a_folder_has_the_addresses_of_all_that_is_below_it(storage: Storage) -> None:
    storage.put("pets/", b"")  # as some programs mark a folder
    storage.put("pets/dogs/1.jpg", b"wau")
    storage.put("petshop/1.jpg", b"")
    expected = {ADDRESS, "s3://photos/pets/dogs/1.jpg"}
    assert set(addresses("s3://photos/pets")) == set(addresses("s3://photos/pets/")) == expected
    assert set(addresses("s3://photos")) == {*expected, "s3://photos/petshop/1.jpg"}


def test_an_object_is_read_whole_in_part_and_block_by_block(storage: Storage) -> None:
    assert read(ADDRESS) == b"meow"
    assert read(ADDRESS, 2) == b"me"
    data = bytes(range(250)) * 9
    storage.put("large", data)
    version = find("s3://photos/large").version
    assert list(blocks("s3://photos/large", 0, version)) == [
        data[:1000],
        data[1000:2000],
        data[2000:],
    ]
    assert b"".join(blocks("s3://photos/large", 1999, version)) == data[1999:]
    assert list(blocks("s3://photos/large", len(data), version)) == []


def test_a_copy_is_the_object(storage: Storage, tmp_path: Path) -> None:
    storage.put("large", bytes(range(250)) * 9)
    copy("s3://photos/large", tmp_path / "large")
    assert (tmp_path / "large").read_bytes() == bytes(range(250)) * 9


def test_an_object_that_changes_while_it_is_read_is_not_put_together(storage: Storage) -> None:
    storage.put("large", bytes(3000))
    reading = blocks("s3://photos/large", 0, find("s3://photos/large").version)
    next(reading)
    storage.put("large", bytes(2999))
    with pytest.raises(Unavailable, match="it has changed meanwhile"):
        list(reading)
    with pytest.raises(Unavailable, match="it has changed meanwhile"):
        list(blocks("s3://photos/large", 0, '"another version"'))


@pytest.mark.parametrize(
    ("address", "reason"),
    [("s3://photos/dog.jpg", "no such object"), ("s3://fotos/cat.jpg", "no such bucket")],
)
def test_what_is_not_there_is_refused(address: str, reason: str) -> None:
    for ask in (find, read):
        with pytest.raises(Refused) as failure:
            ask(address)
        assert failure.value.strerror == reason


def test_what_may_not_be_read_is_refused(storage: Storage) -> None:
    storage.refuse_keys(True)
    for ask in (find, read):
        with pytest.raises(
            Refused, match=r"access denied \(Forbidden\): the credentials are wrong"
        ):
            ask(ADDRESS)
    with pytest.raises(UserError, match=r"^s3://photos: the object storage refuses: Inv"):
        addresses("s3://photos")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "there are no credentials for"),
        ({"AWS_SECRET_ACCESS_KEY": ""}, "cannot be used: Partial credentials found in env"),
        ({"AWS_PROFILE": "nobody"}, r"cannot be used: The config profile \(nobody\) could not"),
        ({"AWS_ENDPOINT_URL": "nonsense"}, "cannot be used: Invalid endpoint: nonsense"),
    ],
)
def test_settings_with_which_it_cannot_be_used_are_told_in_a_line(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
        if not value:
            monkeypatch.delenv(name)
    with pytest.raises(UserError, match=f"^{ADDRESS}: .*{said}") as failure:
        find(ADDRESS)
    assert "\n" not in str(failure.value)
    assert "secret-of-the-tests" not in str(failure.value)


def test_a_bucket_that_cannot_be_one_is_told_without_the_rules(storage: Storage) -> None:
    with pytest.raises(UserError, match=r'Invalid bucket name "a!"$'):
        find("s3://a!/b")


def test_a_storage_that_does_not_answer_is_unavailable(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.failures = 1
    with pytest.raises(Unavailable, match="does not answer as it should: Service Unavailable"):
        find(ADDRESS)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers there
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        from s3fs import S3FileSystem

        S3FileSystem.clear_instance_cache()
        with pytest.raises(
            Unavailable, match=f'Could not connect to the endpoint URL: "{endpoint}'
        ):
            find(ADDRESS)


def test_credentials_can_be_those_of_a_profile(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "tests")
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "config").write_text(
        f"[profile tests]\nendpoint_url = {storage.endpoint}\n"
        "aws_access_key_id = x\naws_secret_access_key = y\n"
    )
    assert read(ADDRESS) == b"meow"


def test_without_s3fs_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("s3fs"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"need s3fs: install it by `pip install -e '.\[s3\]'`"):
        find(ADDRESS)
