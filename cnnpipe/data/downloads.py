"""Files by their URL: verified, kept in `.cnnpipe/downloads/`, and gone on with where they stopped.

What has come of an interrupted download stays beside the file's final place as `NAME.part`, with
the server's mark of its version as `NAME.part.version`: a file that has changed begins anew.
"""

import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests
from tqdm import tqdm
from urllib3.exceptions import HTTPError

from cnnpipe.addresses import without_secrets
from cnnpipe.data import object_storage
from cnnpipe.errors import RunFailed, UserError
from cnnpipe.workspace import locked, repository_root

_CHUNK_BYTES = 1 << 16


def fetch(url: str, name: str, checksum: str) -> Path:
    """The path of the downloaded file, its checksum verified; downloaded only if not there yet.

    Args:
        url: https, http or s3.
        name: the file's name.
        checksum: `sha256:...` or `md5:...`.

    Raises:
        UserError: the file is not the one with that checksum, or the URL cannot be one.
        RunFailed: the server refused, or could not be reached four times in a row.
        OSError: the file cannot be written, as where the disk is full.
    """
    if not url.lower().startswith(("http://", "https://", object_storage.SCHEME)):
        raise UserError(f"download.url = {url!r}: must begin with https://, http:// or s3://")
    path = repository_root() / ".cnnpipe" / "downloads" / checksum.split(":")[1][:16] / name
    part = path.with_name(f"{name}.part")
    with locked(path.with_name(f".{name}.lock"), f"the download of {name}", wait=True):
        if path.exists() and _has(path, checksum):
            return path
        resumed = _download(url, part)
        sound = _has(part, checksum)
        if resumed and not sound:  # the server may have gone on with another file
            part.unlink()
            _download(url, part)
            sound = _has(part, checksum)
        if not sound:
            part.unlink()
        _version_of(part).unlink(missing_ok=True)
        if not sound:
            raise UserError(
                f"{url}: what was downloaded does not have the checksum {checksum}: the file has "
                "changed, or was damaged on the way, or the checksum is mistyped"
            )
        os.replace(part, path)
    return path


def _has(path: Path, checksum: str) -> bool:
    kind, digest = checksum.split(":")
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest() == digest


def _version_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.version")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _download(url: str, part: Path) -> bool:
    """Completes the part, in up to four attempts where waiting may help.

    Returns:
        Whether it was put together from several answers.
    """
    for pause_s in (1, 2, 3, None):
        try:
            return _receive(url, part)
        except requests.exceptions.InvalidURL as error:
            raise UserError(f"download.url = {url!r}: {without_secrets(str(error))}") from None
        except object_storage.Refused as error:
            raise UserError(f"download.url = {url!r}: {error.strerror}") from None
        except (requests.RequestException, HTTPError, object_storage.Unavailable) as error:
            response = getattr(error, "response", None)
            status = 500 if response is None else response.status_code
            hopeless = isinstance(error, ValueError) or (status < 500 and status not in (408, 429))
            if pause_s is None or hopeless:  # a ValueError: an address that cannot be one
                kept = _size(part)
                raise RunFailed(
                    f"{url}: cannot be downloaded: {without_secrets(' '.join(str(error).split()))}"
                    + (f"; {kept:,} bytes are there, the next run goes on from them" * (kept > 0))
                ) from None
            time.sleep(pause_s)
    raise AssertionError  # the last attempt returns or raises


@dataclass(frozen=True)
class _Answer:
    """What has been sent for a file, or is about to be."""

    start: int
    """The position of the first byte in the file."""
    total: int | None
    """The file's size, where it is told."""
    version: str
    """The mark of the file's version; empty where there is none."""
    chunks: Iterator[bytes]


def _receive(url: str, part: Path) -> bool:
    """Adds to the part what is missing of it, or all, where the server does not go on with it.

    Returns:
        Whether it went on.

    Raises:
        requests.RequestException: the server refused, or is not there.
        urllib3.exceptions.HTTPError: the connection was lost.
        object_storage.Refused: likewise, of an object.
        object_storage.Unavailable: likewise.
    """
    version, there = _version_of(part), _size(part)
    known = version.read_text() if there and version.exists() else ""
    ask = _ask_storage if url.startswith(object_storage.SCHEME) else _ask_server
    with ask(url, there, known) as answer:
        if answer.start > there:
            part.unlink(missing_ok=True)
            raise requests.ConnectionError(
                f"it sent bytes from {answer.start:,} on, not from {there:,}"
            )
        with (
            part.open("r+b" if there else "wb") as file,
            tqdm(
                total=answer.total, initial=answer.start, desc=part.stem, unit="B",
                unit_scale=True, disable=None,
            ) as progress,
        ):  # fmt: skip
            file.truncate(answer.start)
            file.seek(answer.start)
            if not answer.start:
                version.write_text(answer.version)
            for chunk in answer.chunks:
                file.write(chunk)
                progress.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
    if answer.total is not None and size < answer.total:
        raise requests.ConnectionError(f"it sent {size:,} of {answer.total:,} bytes")
    return answer.start > 0


@contextmanager
def _ask_storage(url: str, there: int, version: str) -> Iterator[_Answer]:
    """The object, from that position on if it is still of that version."""
    found = object_storage.find(url)
    if found.is_folder:
        raise object_storage.Refused("a folder, not an archive")
    start = there if version == found.version and there <= found.size else 0
    chunks = object_storage.blocks(url, start, found.version)
    yield _Answer(start, found.size, found.version, chunks)


@contextmanager
def _ask_server(url: str, there: int, version: str) -> Iterator[_Answer]:
    """The file, from that position on if the server can tell that it is still of that version.

    Source: RFC 9110, sections 13.1.5 (If-Range) and 14 (ranges).
    """
    headers = {"Accept-Encoding": "identity"}
    if there:
        headers["Range"] = f"bytes={there}-"
        if version:
            headers["If-Range"] = version
    with requests.get(url, headers=headers, stream=True, timeout=30) as response:
        all_there = response.headers.get("Content-Range") == f"bytes */{there}"
        if there and response.status_code == 416:
            if all_there:
                yield _Answer(there, there, version, iter(()))
                return
            with _ask_server(url, 0, "") as answer:
                yield answer
            return
        response.raise_for_status()
        # As they are sent: an archive served with `Content-Encoding: gzip` stays an archive.
        chunks = response.raw.stream(_CHUNK_BYTES, decode_content=False)
        yield _Answer(*_extent(response), _version(response), chunks)


def _extent(response: requests.Response) -> tuple[int, int | None]:
    """The position of the answer's first byte in the file, and the file's size where it is told."""
    length = response.headers.get("Content-Length", "")
    if response.status_code != 206:
        return 0, int(length) if length.isdecimal() else None
    told = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if not told:
        raise requests.ConnectionError("it sent a part of the file without saying which")
    return int(told[1]), None if told[2] == "*" else int(told[2])


def _version(response: requests.Response) -> str:
    """A weak tag says no more than that the contents mean the same, and If-Range forbids it."""
    tag = response.headers.get("ETag", "W/")
    return response.headers.get("Last-Modified", "") if tag.startswith("W/") else tag
