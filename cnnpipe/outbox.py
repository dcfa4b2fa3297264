"""What could not be sent yet: entries in files, kept in their order until they are sent.

The outbox of a run is the folder `.cnnpipe/outbox/RUN/`, and each entry a folder in it, whole or
not there: `entry.json`, and the file that it is about, if any. What tracking.py could not tell
MLflow waits there, whatever becomes of the process.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnpipe.workspace import locked, repository_root, whole_folder


@dataclass(frozen=True)
class Entry:
    """One thing to be sent."""

    folder: Path
    content: dict[str, Any]
    """Of JSON's types."""

    @property
    def path(self) -> Path | None:
        """The file that it is about."""
        name = self.content.get("file")
        return self.folder / name if name else None


class Outbox:
    """The entries of one run, for one receiver."""

    def __init__(self, folder: Path, receiver: str) -> None:
        self.folder = folder
        self._receiver = receiver

    def add(self, content: dict[str, Any], path: Path | None = None) -> None:
        """Keeps an entry, with a copy of the file that it is about."""
        number = 1 + max((int(folder.name) for folder in self._folders()), default=0)
        with whole_folder(self.folder / f"{number:06d}") as part:
            if path is not None:
                shutil.copyfile(path, part / path.name)
                content = {**content, "file": path.name}
            whole = {**content, "receiver": self._receiver}
            (part / "entry.json").write_text(json.dumps(whole))
            for file in part.iterdir():
                with file.open("rb") as written:
                    os.fsync(written.fileno())  # or a power cut could leave the name alone

    def entries(self) -> list[Entry]:
        """In the order in which they were added."""
        found = [
            Entry(folder, json.loads((folder / "entry.json").read_text()))
            for folder in self._folders()
        ]
        return [entry for entry in found if entry.content.pop("receiver") == self._receiver]

    def remove(self, entry: Entry) -> None:
        """Forgets an entry that was sent."""
        # First what makes it one: the rest may be left half-removed.
        (entry.folder / "entry.json").unlink()
        shutil.rmtree(entry.folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob("[0-9]*/entry.json"))


@contextmanager
def open_outbox(run: str, receiver: str, wait: bool = True) -> Iterator[Outbox]:
    """The outbox of a run, for this process alone; an empty one is removed in the end.

    Args:
        run: the run's id, a name of a folder.
        receiver: the address that its entries are for, without a password; those for another are
            left alone.
        wait: until another process is done with it.

    Raises:
        RunFailed: another process has it open, and `wait` is false.
    """
    folder = _root() / run
    with locked(folder / "lock", f"the sending for run {run}", wait):
        outbox = Outbox(folder, receiver)
        try:
            yield outbox
        finally:
            if not list(folder.glob("[0-9]*/entry.json")):
                shutil.rmtree(folder, ignore_errors=True)


def waiting() -> list[str]:
    """The runs of which something may wait."""
    return sorted(path.name for path in _root().glob("*") if path.is_dir())


def _root() -> Path:
    return repository_root() / ".cnnpipe" / "outbox"
