"""Where the servers are that `cnnpipe up` runs for this repository, and what it tells of them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from cnnpipe.workspace import repository_root, whole_file

PREFECT_API = "http://127.0.0.1:4200/api"
"""Where `cnnpipe up` starts Prefect's server unless it is told another port."""

MLFLOW = "http://127.0.0.1:5000"
"""Where it starts MLflow's."""


@dataclass(frozen=True)
class Running:
    """What `cnnpipe up` runs, or uses where it is somebody else's."""

    pid: int
    """Of `cnnpipe up` itself."""
    started: float
    """Of that process, seconds since 1970: one of the same number may be another."""
    mlflow: str
    """The server's address."""
    prefect_api: str
    """The address of the other server's API."""
    processes: dict[str, int]
    """The ids of those that it has started, by name."""


def note(mlflow: str, prefect_api: str, processes: dict[str, int]) -> None:
    """Leaves word for `find` that this process runs them, as long as it lives."""
    me = psutil.Process()
    running = Running(me.pid, me.create_time(), mlflow, prefect_api, processes)
    with whole_file(_path()) as part:
        part.write_text(json.dumps(asdict(running)))


def find() -> Running | None:
    """What runs now; None where nothing does."""
    try:
        running = Running(**json.loads(_path().read_text()))
        process = psutil.Process(running.pid)
        is_it = process.create_time() == running.started
    except (OSError, ValueError, TypeError, psutil.Error):
        return None  # it was killed, and could not take its word back
    return running if is_it and process.status() != psutil.STATUS_ZOMBIE else None


def forget() -> None:
    """Takes the word back."""
    _path().unlink(missing_ok=True)


def prefect_api() -> str:
    """The address of the API of the Prefect server that `cnnpipe up` runs, or would run."""
    running = find()
    return running.prefect_api if running else PREFECT_API


def mlflow_server() -> str:
    """The address of the MLflow server that `cnnpipe up` runs, or would run."""
    running = find()
    return running.mlflow if running else MLFLOW


def shown_address(address: str) -> str:
    """It without user and password, which nobody need see, and which may change."""
    parts = urlsplit(address)
    if not parts.netloc:  # a file, of which it would drop a slash
        return address
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")


def _path() -> Path:
    return repository_root() / ".cnnpipe" / "up.json"
