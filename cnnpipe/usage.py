"""What each stage has taken, time and memory: kept outside DVC's outputs, since no result is it."""

import json
import os
import platform
import resource
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path

import psutil

from cnnpipe.workspace import repository_root

OUTPUTS = {
    "download": "data/raw/source.json",
    "resize": "data/resized/manifest.csv",
    "split": "data/split.csv",
    "train": "models/model.safetensors",
    "evaluate": "reports/test/metrics.json",
}
"""By which file of its output the usage of a stage is found again."""


@dataclass(frozen=True)
class Usage:
    """Of one stage, once."""

    stage: str
    seconds: float
    """From the start of its process, imports included."""
    peak_bytes: int
    """The most memory of the process, or of one of its workers, whichever took more."""
    gpu_bytes: int
    """The most that tensors took of the GPU; 0 without one."""
    machine: str
    ended: str
    """The local time, ISO 8601."""


def so_far(stage: str) -> Usage:
    """What this process has taken until now."""
    return Usage(
        stage,
        time.time() - psutil.Process().create_time(),
        max(_own_peak(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * _MAXRSS_BYTES),
        _gpu_peak(),
        _machine(),
        datetime.now().isoformat(" ", "seconds"),
    )


def keep(usage: Usage) -> None:
    """Adds it to the log, beside the digest of what the stage has made."""
    entry = {"output": _digest(usage.stage), **asdict(usage)}
    path = _log()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:  # at once, and at the end: several may be writing
        file.write(json.dumps(entry) + "\n")


def last(stage: str) -> Usage | None:
    """Of the run that made what is there now; None where that came from elsewhere.

    From DVC's cache, for example, or from another machine.
    """
    path, digest = _log(), _digest(stage)
    lines = path.read_text().splitlines() if path.exists() else []
    for line in reversed(lines):
        try:
            entry = json.loads(line)
            if (entry.pop("stage"), entry.pop("output")) == (stage, digest):
                return Usage(stage, **entry)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # of a process that was killed amid it
    return None


def _machine() -> str:
    """The processor, its cores, the memory and the GPU, in a line."""
    cores = os.cpu_count() or 1
    parts = [
        _processor(),
        f"{cores} core{'s' if cores > 1 else ''}",
        f"{psutil.virtual_memory().total / 2**30:.0f} GB",
    ]
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024


def _log() -> Path:
    return repository_root() / ".cnnpipe" / "usage.jsonl"


def _digest(stage: str) -> str:
    path = Path(OUTPUTS[stage])
    return sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else ""


def _own_peak() -> int:
    # getrusage's also counts the process before it that became this one: DVC's.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES


def _gpu_peak() -> int:
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return 0


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
