"""Checkpoints: what a training needs to go on where it stood, in files that are whole or not there.

They lie in `.cnnpipe/checkpoints/FINGERPRINT/`, outside of what DVC removes before a rerun; the
fingerprint is of all that the training depends on, so that none is resumed by another. A file's
name has its checksum: a damaged one is told from a whole one, and the one before is taken.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from cnnpipe.workspace import locked, repository_root, whole_file

_KEPT = 2
_STATE = "state"


class Checkpoints:
    """The checkpoints of one training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_id = ""
        """The tracker's run, which a resumed training goes on with."""
        self.last = b""
        """The one that there was at the beginning, for `unpacked`; empty where there was none."""
        self._number = 0
        self._load()

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Writes a checkpoint, whole or not at all, and forgets those before the last."""
        # As a tensor, so that one checksum is of all.
        text = bytearray(json.dumps({**state, "run_id": self.run_id}).encode())
        data = safetensors.torch.save(
            {**tensors, _STATE: torch.frombuffer(text, dtype=torch.uint8)}
        )
        self._number += 1
        name = f"{self._number:08d}.{hashlib.sha256(data).hexdigest()[:32]}.safetensors"
        with whole_file(self.folder / name) as part, part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or, after a power cut, the name could be there alone
        for path in self._files()[:-_KEPT]:
            path.unlink()

    def _load(self) -> None:
        for path in reversed(self._files()):
            self._number = max(self._number, int(path.name.split(".")[0]))
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest()[:32] != path.name.split(".")[1]:
                print(
                    f"warning: {path}: the checkpoint is damaged and removed; the training goes on "
                    "from the one before, or where there is none, begins anew",
                    file=sys.stderr,
                )
                path.unlink()  # or it would take the place of a whole one among the last
                continue
            self.last = data
            self.run_id = unpacked(data)[2]
            return

    def _files(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("[0-9]*.safetensors"))


def unpacked(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """The tensors, the state and the run's id in a checkpoint; all empty where that is."""
    if not data:
        return {}, {}, ""
    tensors = safetensors.torch.load(data)
    state = json.loads(tensors.pop(_STATE).numpy().tobytes())
    return tensors, state, state.pop("run_id")


@contextmanager
def open_checkpoints(fingerprint: str) -> Iterator[Checkpoints]:
    """The checkpoints of a training, which has them for itself, and needs none once it ends well.

    Args:
        fingerprint: of all that the training depends on; a name of a folder.

    Raises:
        RunFailed: the same training is running already.
    """
    folder = repository_root() / ".cnnpipe" / "checkpoints" / fingerprint
    with locked(folder / "lock", "the same training, of the same settings, data and code,"):
        yield Checkpoints(folder)
        shutil.rmtree(folder)
