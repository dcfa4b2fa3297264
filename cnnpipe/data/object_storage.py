"""Objects on S3-compatible storage, by their address, such as s3://bucket/photos/cat.jpg.

Endpoint and credentials come from where every program for S3 has them: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_ENDPOINT_URL, AWS_PROFILE and ~/.aws.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cnnpipe.addresses import without_secrets
from cnnpipe.errors import RunFailed, UserError

SCHEME = "s3://"

_BLOCK_BYTES = 8 << 20
"""What one request asks for: enough to hide its latency, little to hold or to lose."""


class Refused(OSError):
    """There is no such object, or it may not be read."""

    def __init__(self, reason: str) -> None:
        super().__init__(errno.EIO, reason)


class Unavailable(RunFailed):
    """The storage does not answer, or not now: another attempt may help."""


@dataclass(frozen=True)
class Found:
    """What is at an address."""

    is_folder: bool
    """Whether no object, but some whose keys begin with it and a slash."""
    size: int
    """In bytes."""
    version: str
    """The object's ETag, which another content has not."""


def find(address: str) -> Found:
    """What is at the address.

    Raises:
        Refused: nothing, or what may not be seen.
        UserError: the storage cannot be used with these settings, or s3fs is not installed.
        Unavailable: the storage does not answer.
    """
    with _storage(address) as storage:
        found = storage.info(address)
    return Found(found["type"] == "directory", found["size"] or 0, found.get("ETag") or "")


def addresses(address: str) -> list[str]:
    """The addresses of all objects in the folder or bucket, in no order; raises as `find`."""
    with _storage(address) as storage:
        return [f"{SCHEME}{key}" for key in storage.find(address) if not key.endswith("/")]


def read(address: str, num_bytes: int | None = None) -> bytes:
    """The object, or its first bytes; raises as `find`."""
    with _storage(address) as storage:
        start = None if num_bytes is None else 0
        data: bytes = storage.cat_file(address, start=start, end=num_bytes)
    return data


def copy(address: str, path: Path) -> None:
    """Makes a file of the object, and shows how far it is; raises as `blocks`."""
    found = find(address)
    with (
        path.open("wb") as file,
        tqdm(
            total=found.size, desc=path.name, unit="B", unit_scale=True, disable=None
        ) as progress,
    ):  # fmt: skip
        for block in blocks(address, 0, found.version):
            file.write(block)
            progress.update(len(block))


def blocks(address: str, start: int, version: str) -> Iterator[bytes]:
    """What the object holds from that position on; raises as `find`, also where it has changed."""
    with _storage(address) as storage:
        file = storage.open(address, block_size=_BLOCK_BYTES, cache_type="none")
    if (file.details.get("ETag") or "") != version:
        raise Unavailable("it has changed meanwhile")
    file.seek(start)
    while True:
        with _storage(address):
            block: bytes = file.read(_BLOCK_BYTES)
        if not block:
            return
        yield block


@contextmanager
def _storage(address: str) -> Iterator[Any]:
    """The file system, for calls of it alone: what it and botocore raise is told in one line."""
    try:
        import fsspec
        from aiohttp import ClientError
        from botocore import exceptions
        from botocore.parsers import ResponseParserError
        from s3fs.utils import FileExpired
    except ImportError:
        raise UserError(
            f"{SCHEME} addresses need s3fs: install it by `pip install -e '.[s3]'` in this project"
        ) from None
    try:
        yield fsspec.filesystem("s3", use_listings_cache=False)
    except FileExpired:
        raise Unavailable("it has changed meanwhile") from None
    except (exceptions.ConnectionError, exceptions.HTTPClientError, ResponseParserError,
            ClientError, TimeoutError) as error:  # fmt: skip
        raise _away(error) from None
    except exceptions.NoCredentialsError:
        raise UserError(
            f"{address}: there are no credentials for the object storage: set AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE to a profile in ~/.aws"
        ) from None
    except (exceptions.BotoCoreError, ValueError) as error:  # of the settings, or the address
        line = _line(error).partition(": Bucket name must match")[0]  # a long regular expression
        raise UserError(f"{address}: the object storage cannot be used: {line}") from None
    except OSError as error:
        raise _told(address, error) from None


def _told(address: str, error: OSError) -> Exception:
    """What the storage has answered, as the exception to raise."""
    response = getattr(error.__cause__, "response", None) or {}
    code = response.get("Error", {}).get("Code", "")
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if isinstance(error, FileNotFoundError):
        return Refused("no such bucket" if code == "NoSuchBucket" else "no such object")
    if code in ("AccessDenied", "AllAccessDisabled", "InvalidObjectState", "403"):
        return Refused(
            f"access denied ({_line(error)}): the credentials are wrong, or not of somebody who "
            "may read it"
        )
    if status in (301, 307) or (400 <= status < 500 and status not in (408, 429)):
        return UserError(f"{address}: the object storage refuses: {code}: {_line(error)}")
    return _away(error)


def _away(error: Exception) -> Unavailable:
    return Unavailable(f"the object storage does not answer as it should: {_line(error)}")


def _line(error: Exception) -> str:
    return without_secrets(" ".join(str(error.args[-1] if error.args else error).split()))
