"""MLflow's store: which it is, whether it answers, and what to say where it does not.

Files are the truth and MLflow is the view of them. On this rest tracking.py, which writes runs,
records.py, which reads them, and registry.py, which keeps the models; nothing else, but for the
served model, imports MLflow, and these import it after this module, which sets it up.
"""

import fcntl
import logging
import os
import platform
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from urllib.parse import urlsplit

# Before MLflow is imported: it reads them then.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "true"
# By default a server that is down is tried for several minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
# A training of the built-in data takes seconds.
os.environ.setdefault("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "2")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

import mlflow
import psutil
import requests
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from cnnpipe import sweep_view
from cnnpipe.errors import RunFailed, UserError
from cnnpipe.running import shown_address
from cnnpipe.workspace import repository_root, signals_held

for _name in ("mlflow", "alembic"):  # what they do well is no news
    logging.getLogger(_name).setLevel(logging.WARNING)

for _name in ("mlflow.store.db", "mlflow.system_metrics"):  # what fails is told by us, once
    logging.getLogger(_name).setLevel(logging.CRITICAL)

EXPERIMENT = "cnnpipe"

FAILURES = (RunFailed, MlflowException, requests.RequestException, SQLAlchemyError, OSError)
"""What it raises to call a tracker that is not there, or not well."""
PROCESS = "process"
"""The key of `process_tag`."""
SLOW_S = 5
"""From so many seconds for an answer on, nothing more is sent while a stage is at work."""
_LOCKED_S = 3
"""For somebody else's transaction. MLflow itself would wait for 20."""


def process_tag() -> dict[str, str]:
    """Of a run: which machine and process writes to it, and since when that runs."""
    started = psutil.Process().create_time()
    return {PROCESS: f"{platform.node()} {os.getpid()} {started:.2f}"}


def prepare_store() -> str:
    """Makes the default store, the experiment and its view where they are missing; the store's URI.

    Raises:
        RunFailed: the tracker cannot be reached.
    """
    experiment_id = connect()
    client = mlflow.MlflowClient()
    if sweep_view.KEY not in client.get_experiment(experiment_id).tags:
        client.set_experiment_tag(experiment_id, sweep_view.KEY, sweep_view.view())
    return str(mlflow.get_tracking_uri())


def local_store() -> str:
    """The default store: a database at the repository's root, by absolute path.

    Experiments run in temporary workspaces, where a relative path would lead to a store that
    disappears with the workspace.
    """
    return f"sqlite:///{repository_root() / 'mlflow.db'}"


def local_artifacts() -> Path:
    """The folder of the default store's artifacts."""
    return repository_root() / "mlartifacts"


def connect(make: bool = True) -> str:
    """Points MLflow to its store; the experiment's id.

    Args:
        make: the experiment where there is none; else the id is empty then.

    Raises:
        RunFailed: the tracker cannot be reached.
        UserError: MLflow has no such kind of store, or the experiment was deleted.
    """
    uri = address()
    check_answers()
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        # Several processes that make a database's tables at once get in each other's way.
        with _lock():
            experiment = mlflow.get_experiment_by_name(EXPERIMENT)
            if experiment is None and not make:
                return ""
            if experiment is None:
                # Fixed here for good: artifacts of the local store are written to the same folder
                # with and without a server in between.
                location = local_artifacts().as_uri() if uri == local_store() else None
                tags = {sweep_view.KEY: sweep_view.view()}
                return str(mlflow.create_experiment(EXPERIMENT, location, tags))
            if experiment.lifecycle_stage == "deleted":
                raise UserError(
                    f"{shown_address(uri)}: the MLflow experiment {EXPERIMENT!r} was deleted: "
                    f"restore it with `mlflow experiments restore -x {experiment.experiment_id}`"
                )
            return str(experiment.experiment_id)
    except FAILURES as error:
        kind = UserError if is_refusal(error) else RunFailed
        raise kind(f"the MLflow store {shown_address(uri)} cannot be used: {line(error)}") from None


def connect_to_read() -> str:
    """Points MLflow to its store without making anything there; empty where there is no run yet."""
    _, is_file, path = address().partition("sqlite:///")
    if is_file and not Path(path).exists():
        return ""
    return connect(make=False)


@contextmanager
def reading() -> Iterator[None]:
    """What cannot be read in the block is one line for the user.

    Raises:
        RunFailed: the tracker cannot be reached.
    """
    try:
        yield
    except FAILURES as error:
        if isinstance(error, RunFailed):
            raise
        raise RunFailed(
            f"the MLflow store {shown_address(address())} cannot be read: {line(error)}"
        ) from None


def check_unlocked() -> None:
    """Raises `RunFailed` where another process keeps the store, a SQLite file, locked."""
    _, is_file, path = address().partition("sqlite:///")
    if not is_file or not Path(path).exists():
        return
    try:
        connection = sqlite3.connect(path, timeout=_LOCKED_S, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        finally:
            connection.close()
    except sqlite3.OperationalError as error:
        raise RunFailed(f"the MLflow store {path} cannot be used: {error}") from None


def check_answers() -> None:
    """Raises `RunFailed` where the store does not answer."""
    uri = address()
    if is_remote():
        try:
            # Which is less after an interrupt.
            timeout_s = min(SLOW_S, int(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]))
            requests.get(uri.rstrip("/") + "/health", timeout=timeout_s).raise_for_status()
        except requests.RequestException as error:
            raise RunFailed(
                f"MLFLOW_TRACKING_URI = {shown_address(uri)}: no MLflow server answers there: "
                f"{type(error).__name__}; start one with `cnnpipe up`, or unset the variable"
            ) from None
    check_unlocked()


def address() -> str:
    """Of the store: what MLFLOW_TRACKING_URI says, or else the default store's URI."""
    return os.environ.get("MLFLOW_TRACKING_URI") or local_store()


def is_remote() -> bool:
    """Whether a server is asked, and no database."""
    return urlsplit(address()).scheme in ("http", "https")


def held() -> AbstractContextManager[None]:
    """Signals wait where the store is a database, which an exception amid a transaction locks."""
    return nullcontext() if is_remote() else signals_held()


def is_refusal(error: Exception) -> bool:
    """Whether MLflow would not take it however often it is told."""
    code = getattr(error, "error_code", None)
    return code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")


def line(error: BaseException) -> str:
    """What it says, in one line."""
    return " ".join(str(error).split())[:200]


@contextmanager
def _lock() -> Iterator[None]:
    path = repository_root() / ".cnnpipe" / "mlflow.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
