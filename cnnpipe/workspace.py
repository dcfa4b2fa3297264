"""The repository's root, files that are whole or not there, locks, and signals that can wait."""

import fcntl
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from cnnpipe.errors import RunFailed, UserError


def repository_root() -> Path:
    """The absolute path of the repository, also from within an experiment's own workspace.

    DVC runs queued experiments in a temporary copy of the repository and names the repository
    itself in DVC_ROOT. Outside of DVC it is the current folder.
    """
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


@contextmanager
def signals_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block is done, which is not to be left half-way."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is ever interrupted
        return
    caught: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: caught.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if caught:
            signal.raise_signal(caught[0])


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to, which takes the file's place when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def named_file(path: str) -> Iterator[TextIO]:
    """A text file that the user named, to write to; it takes its place when the block ends well.

    File names need not be text: bytes that are no UTF-8 come out as they went in.

    Raises:
        UserError: it cannot be written there.
    """
    try:
        with (
            whole_file(path) as part,
            part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder to fill, which takes the folder's place when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    before = temporary.with_name(f"{temporary.name}.before")
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's are the user's alone
        if path.exists():  # out of the way first: a folder can be renamed at once, not removed
            os.replace(path, before)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)


@contextmanager
def locked(path: str | Path, what: str, wait: bool = False) -> Iterator[None]:
    """Holds the lock file for the block; it is free as soon as this process has ended, however.

    Args:
        path: of the lock file, which stays, or may be removed with its folder within the block.
        what: is running if the lock is held, for the error.
        wait: until the lock is free, and say on stderr for whom.

    Raises:
        RunFailed: another process holds it, and `wait` is false; the message names that.
    """
    path = Path(path)
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            try:
                # Not flock, whose locks a process shares with those that it forks.
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):  # whichever the system has for it
                holder = os.read(descriptor, 20).decode()
                running = f"{what} is running already as process {holder}"
                if not wait:
                    raise RunFailed(
                        f"{running}: wait for it, or stop it with `kill {holder}`"
                    ) from None
                print(f"{running}: waits for it", file=sys.stderr)
                fcntl.lockf(descriptor, fcntl.LOCK_EX)
            # The holder before may just have removed the file that was opened here.
            if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
                os.truncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                yield
                return
        finally:
            os.close(descriptor)  # and so the lock
