"""Files by their URL: verified, kept in `.cnnpipe/downloads/`, and gone on with where they stopped.

What has come of an interrupted download stays beside the file's final place as `NAME.part`, with
the server's mark of its version as `NAME.part.version`: a file that has changed begins anew.
"""

import hashlib
import os
import re
import time
from pathlib import Path

import requests
from tqdm import tqdm
from urllib3.exceptions import HTTPError

from cnnpipe.errors import RunFailed, UserError
from cnnpipe.workspace import locked, repository_root

_CHUNK_BYTES = 1 << 16


def fetch(url: str, name: str, checksum: str) -> Path:
    """The path of the downloaded file, its checksum verified; downloaded only if not there yet.

    Args:
        url: http or https.
        name: the file's name.
        checksum: `sha256:...` or `md5:...`.

    Raises:
        UserError: the file is not the one with that checksum, or the URL cannot be one.
        RunFailed: the server refused, or could not be reached four times in a row.
        OSError: the file cannot be written, as where the disk is full.
    """
    if not url.lower().startswith(("http://", "https://")):
        raise UserError(f"download.url = {url!r}: must begin with http:// or https://")
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
            raise UserError(f"download.url = {url!r}: {error}") from None
        except (requests.RequestException, HTTPError) as error:
            response = getattr(error, "response", None)
            status = 500 if response is None else response.status_code
            hopeless = isinstance(error, ValueError) or (status < 500 and status not in (408, 429))
            if pause_s is None or hopeless:  # a ValueError: an address that cannot be one
                kept = _size(part)
                raise RunFailed(
                    f"{url}: cannot be downloaded: {' '.join(str(error).split())}"
                    + (f"; {kept:,} bytes are there, the next run goes on from them" * (kept > 0))
                ) from None
            time.sleep(pause_s)
    raise AssertionError  # the last attempt returns or raises


def _receive(url: str, part: Path) -> bool:
    """Adds to the part what is missing of it, or all, where the server does not go on with it.

    Returns:
        Whether it went on.

    Raises:
        requests.RequestException: the server refused, or is not there.
        urllib3.exceptions.HTTPError: the connection was lost.

    Source: RFC 9110, sections 13.1.5 (If-Range) and 14 (ranges).
    """
    version, there = _version_of(part), _size(part)
    headers = {"Accept-Encoding": "identity"}
    if there:
        headers["Range"] = f"bytes={there}-"
        if version.exists():
            headers["If-Range"] = version.read_text()
    with requests.get(url, headers=headers, stream=True, timeout=30) as response:
        if there and response.status_code == 416:
            if response.headers.get("Content-Range") == f"bytes */{there}":
                return True  # all of it had come
            part.unlink()
            return _receive(url, part)
        response.raise_for_status()
        start, total = _extent(response)
        if start > there:
            part.unlink(missing_ok=True)
            raise requests.ConnectionError(f"it sent bytes from {start:,} on, not from {there:,}")
        with (
            part.open("r+b" if there else "wb") as file,
            tqdm(
                total=total, initial=start, desc=part.stem, unit="B", unit_scale=True, disable=None
            ) as progress,
        ):
            file.truncate(start)
            file.seek(start)
            if not start:
                _keep_version(response, version)
            # As they are sent: an archive served with `Content-Encoding: gzip` stays an archive.
            for chunk in response.raw.stream(_CHUNK_BYTES, decode_content=False):
                file.write(chunk)
                progress.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
    if total is not None and size < total:
        raise requests.ConnectionError(f"it sent {size:,} of {total:,} bytes")
    return start > 0


def _extent(response: requests.Response) -> tuple[int, int | None]:
    """The position of the answer's first byte in the file, and the file's size where it is told."""
    length = response.headers.get("Content-Length", "")
    if response.status_code != 206:
        return 0, int(length) if length.isdecimal() else None
    told = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if not told:
        raise requests.ConnectionError("it sent a part of the file without saying which")
    return int(told[1]), None if told[2] == "*" else int(told[2])


def _keep_version(response: requests.Response, version: Path) -> None:
    """A weak tag says no more than that the contents mean the same, and If-Range forbids it."""
    tag = response.headers.get("ETag", "W/")
    if tag.startswith("W/"):
        tag = response.headers.get("Last-Modified", "")
    if tag:
        version.write_text(tag)
    else:
        version.unlink(missing_ok=True)
