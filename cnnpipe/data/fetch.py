"""Downloads that go on where they stopped, and are used only if their checksum is right."""

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

import requests
from tqdm import tqdm

from cnnpipe.errors import RunFailed, UserError
from cnnpipe.workspace import locked, repository_root

_PAUSES_S = (1, 2, 3)
_TIMEOUT_S = 30


def fetch(url: str, name: str, checksum: str) -> Path:
    """The path of the downloaded file, its checksum verified; downloaded only if not there yet.

    What a download got before it was interrupted, by whatever it was, stays in `.cnnpipe/downloads`
    and is not asked for again, if the server can send a part of a file.

    Args:
        url: http or https.
        name: the file's name.
        checksum: `sha256:...` or `md5:...`.

    Raises:
        UserError: the file is not the one with that checksum, or the URL cannot be one.
        RunFailed: the server refused, or four times in a row sent nothing.
    """
    if not url.lower().startswith(("http://", "https://")):
        raise UserError(f"download.url = {url!r}: must begin with http:// or https://")
    folder = repository_root() / ".cnnpipe" / "downloads" / checksum.split(":")[1][:16]
    path, part = folder / name, folder / f"{name}.part"
    with locked(folder / "lock", f"the download of {url}", wait=True):
        try:
            if path.exists() and _checksum(path, checksum) == checksum:
                return path
            is_pieced = _download(url, part)
            if is_pieced and _checksum(part, checksum) != checksum:
                _remove(part)  # pieces of two files, if the server exchanged one for the other
                _download(url, part)
            if _checksum(part, checksum) != checksum:
                _remove(part)
                raise UserError(
                    f"{url}: what was downloaded does not have the checksum {checksum}: the file "
                    "has changed, or was damaged on the way, or the checksum is mistyped"
                )
            os.replace(part, path)
            _remove(part)
        except requests.exceptions.InvalidURL as error:
            raise UserError(f"download.url = {url!r}: {error}") from None
        except requests.RequestException as error:
            reason = " ".join(str(error).split())
            raise RunFailed(f"{url}: cannot be downloaded: {reason}") from None
        finally:
            (folder / "lock").unlink()
            with suppress(OSError):  # unless there is something in it
                folder.rmdir()
    return path


def _download(url: str, part: Path) -> bool:
    """Completes the part, in as many attempts as it takes; whether it was sent in pieces."""
    is_pieced = False
    pauses = iter(_PAUSES_S)
    while True:
        size = part.stat().st_size if part.exists() else 0
        try:
            return _get(url, part) or is_pieced
        except requests.RequestException as error:
            status = 500 if error.response is None else error.response.status_code
            hopeless = isinstance(error, ValueError) or (status < 500 and status not in (408, 429))
            if part.exists() and part.stat().st_size > size:
                pauses = iter(_PAUSES_S)  # it goes on, however slowly
                is_pieced = True
            pause_s = next(pauses, None)
            if pause_s is None or hopeless:  # a ValueError: the URL cannot be one
                raise
            time.sleep(pause_s)


def _get(url: str, part: Path) -> bool:
    """One request, for what is missing of the part; whether that was sent alone.

    Source: RFC 9110, sections 13.1.5 (If-Range) and 14 (Range Requests).
    """
    size = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}  # or the bytes would not be the file's
    if size:
        headers["Range"] = f"bytes={size}-"
        with suppress(FileNotFoundError):
            headers["If-Range"] = _validator(part).read_text()
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as answer:
        told = answer.headers
        if answer.status_code == 416:  # there is nothing behind the part
            if told.get("Content-Range") == f"bytes */{size}":
                return True
            _remove(part)
            raise requests.ConnectionError("the server's file is another than before")
        answer.raise_for_status()
        goes_on = answer.status_code == 206
        if goes_on and not told.get("Content-Range", "").startswith(f"bytes {size}-"):
            _remove(part)
            raise requests.ConnectionError("the server sent another part than it was asked for")
        if not goes_on:
            size = 0
            _remove(part)
            etag = told.get("ETag", "")
            if validator := told.get("Last-Modified") if etag.startswith("W/") else etag:
                _validator(part).write_text(validator)
        length = told.get("Content-Length")
        total = size + int(length) if length else None
        with (
            part.open("ab") as file,
            tqdm(total=total, initial=size, desc="downloading", unit="B", unit_scale=True,
                 disable=None) as progress,
        ):  # fmt: skip
            for chunk in answer.iter_content(1 << 16):
                file.write(chunk)
                progress.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and part.stat().st_size < total:
        raise requests.ConnectionError("the connection was lost midway")
    return goes_on


def _validator(part: Path) -> Path:
    """The file with what the server calls this state of its file."""
    return part.with_name(f"{part.name}.validator")


def _remove(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator(part).unlink(missing_ok=True)


def _checksum(path: Path, like: str) -> str:
    """The file's checksum, of the kind of the other."""
    kind = like.split(":")[0]
    with path.open("rb") as file:
        return f"{kind}:{hashlib.file_digest(file, kind).hexdigest()}"
