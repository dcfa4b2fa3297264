"""Credentials in addresses are found, and left out of what libraries say."""

import pytest

from cnnpipe.addresses import has_secret, without_secrets


@pytest.mark.parametrize(
    "address",
    [
        "https://me:pw@host/a.zip", "https://token@host/a.zip", "s3://key:secret@bucket/a.zip",
        "https:/me:pw@host/a.zip", "me:pw@host/a.zip", "//me@host",
        "https://h/a.zip?X-Amz-Algorithm=A&X-Amz-Signature=1", "https://h/a?X-Amz-Credential=1",
        "https://h/a?x-amz-security-token=1", "https://h/a?AWSAccessKeyId=1&Expires=2",
        "https://h/a?Expires=1&Signature=2", "https://h/a?X-Goog-Signature=1",
        "https://h/a?GoogleAccessId=1", "https://h/a?Key-Pair-Id=1", "https://h/a?Policy=1",
        "https://h/a?sv=2024&sig=1", "https://h/a?token=1", "https://h/a?access_token=1",
        "https://h/a?private_token=1", "https://h/a?api_key=1", "https://h/a?apikey=1",
        "https://h/a?key=1", "https://h/a?password=1", "https://h/a?client_secret=1",
        "https://h/a#access_token=1", "https://h/a?b;sig=1", "https://h/a?si%67=1",
    ],
)  # fmt: skip
def test_credentials_are_found(address: str) -> None:
    assert has_secret(address)


@pytest.mark.parametrize(
    "address",
    [
        "https://host/a.zip", "https://host:8080/@me/a.zip", "s3://bucket/a@b.zip",
        "https://h/a.zip?dl=1", "https://h/a?export=download&id=1a-B", "https://h/a?version=1#x",
        "https://h/a?id=token", "https://h/signature/token.zip", "https://h/a?sigma=1&monkey=2",
        "x", "",
    ],
)  # fmt: skip
def test_an_address_without_them_is_none(address: str) -> None:
    assert not has_secret(address)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("403 for url: https://h/a?X-Amz-Signature=1&b", "403 for url: https://h/a?..."),
        ("with url: /a?sig=1 (Caused by X('no'))", "with url: /a?... (Caused by X('no'))"),
        ("'http://me:p@h/a' and \"s3://k:s@b\"", "'http://h/a' and \"s3://b\""),
        ("is it there? yes: a@b.org", "is it there? yes: a@b.org"),
    ],
)
def test_what_is_told_is_told_without_them(text: str, expected: str) -> None:
    assert without_secrets(text) == expected
