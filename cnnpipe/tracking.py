"""The only module that knows MLflow: open a run, log to it, open it again, register its model.

Files are the truth and MLflow is the view of them. A tracker that cannot be reached, that dies, or
that takes too long costs a warning and never a training: what it misses waits in cnnpipe.outbox,
and is sent once it answers, as if it had never been away.
"""

import fcntl
import hashlib
import importlib.metadata
import logging
import os
import platform
import re
import sqlite3
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
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

import mlflow
import pandas as pd
import requests
from matplotlib.figure import Figure
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelStatus,
    Metric,
    Param,
    ViewType,
)
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking.context.registry import resolve_tags
from sqlalchemy.exc import SQLAlchemyError

import cnnpipe
from cnnpipe import sweep_view
from cnnpipe.errors import RunFailed, UserError
from cnnpipe.outbox import Outbox, open_outbox, waiting
from cnnpipe.running import shown_address as _shown
from cnnpipe.workspace import repository_root, signals_held

for _name in ("mlflow", "alembic"):  # what they do well is no news
    logging.getLogger(_name).setLevel(logging.WARNING)

for _name in ("mlflow.store.db", "mlflow.system_metrics"):  # what fails is told by us, once
    logging.getLogger(_name).setLevel(logging.CRITICAL)

EXPERIMENT = "cnnpipe"
MODEL_NAME = "cnnpipe"

_FAILURES = (RunFailed, MlflowException, requests.RequestException, SQLAlchemyError, OSError)
"""What it raises to call a tracker that is not there, or not well."""
_SLOW_S = 5
"""From so many seconds for an answer on, nothing more is sent while a stage is at work."""
_SENDING_S = 30
"""For sending what has waited; the rest waits on."""
_SENDING_FIRST_S = 10
"""For that before a stage begins."""
_LOCKED_S = 3
"""For somebody else's transaction. MLflow itself would wait for 20."""
_MOST_POINTS = 1000
"""That MLflow takes at once."""


class Run:
    """A run of MLflow's that is being written to.

    While MLflow does not answer, what is logged is kept in the run's outbox, and sent by whichever
    stage reaches MLflow next, this one's end included. Each thing is sent once: what is there
    already is not sent again, so it does not matter where a sender was killed.
    """

    def __init__(self, outbox: Outbox, run_id: str, experiment_id: str, target: "_Target | None"):
        self.id = run_id
        """MLflow's, or one of our own while MLflow has not been told of the run."""
        self.experiment_id = experiment_id
        """Empty as long."""
        self._outbox = outbox
        self._target = target
        self._warned: set[str] = set()

    def log_params(self, params: dict[str, Any]) -> None:
        """Parameters, by their dotted names."""
        self._log("params", values={key: str(value) for key, value in params.items()})

    def log_metrics(self, metrics: dict[str, float | None], step: int | None = None) -> None:
        """Metrics, at an epoch or once; those that are not defined (None) are left out.

        So are those that the run has at that step: MLflow would keep a second point beside it.
        """
        values = {key: value for key, value in metrics.items() if value is not None}
        self._log("metrics", values=values, step=step or 0)

    def log_figure(self, figure: Figure, path: str) -> None:
        """A picture, under that path of the run's artifacts."""
        with TemporaryDirectory() as folder:
            picture = Path(folder) / Path(path).name
            figure.savefig(picture)
            self.log_file(picture, str(Path(path).parent))

    def log_image(self, path: str | Path, key: str) -> None:
        """A PNG file for MLflow's image grid, which shows those of one key side by side."""
        self._log("image", Path(path), key=key)

    def log_tag(self, key: str, value: str) -> None:
        """A tag of the run."""
        self._log("tag", key=key, value=value)

    def log_file(self, path: str | Path, folder: str) -> None:
        """A file, in that folder of the run's artifacts, or beside all folders for ""."""
        self._log("file", Path(path), folder=folder)

    def warn(self, stage: str, warnings: Sequence[str]) -> None:
        """Warnings: said on stderr, and kept as the run's tag `warnings.STAGE`."""
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        if warnings:
            self.log_tag(f"warnings.{stage}", "; ".join(warnings))

    def log_data(
        self, table: pd.DataFrame, source: str, name: str, digest: str, context: str
    ) -> None:
        """A data set as an input of the run: its digest, and the class counts as tags.

        Args:
            table: one row an image, with the column `label`.
            source: where it came from.
            name: what it is called.
            digest: 8 to 36 characters that change when the data does.
            context: train, val or test.
        """
        data = mlflow.data.from_pandas(
            table,
            source=CodeDatasetSource({"source": source}),
            targets="label",
            name=name,
            digest=digest,
        )
        counts = table["label"].value_counts().sort_index()
        # MLflow takes no longer names.
        tags = {f"images.{label}"[:250]: str(n) for label, n in counts.head(100).items()}
        self._log("data", data=data.to_dict(), tags={"mlflow.data.context": context, **tags})

    def log_model(self, path: str | Path, class_names: Sequence[str]) -> None:
        """The model file as a servable model, a new version of the registered model `cnnpipe`.

        It takes the bytes of image files and needs nothing from this repository. A model file that
        the run has registered already is not registered again.
        """
        self._log("model", Path(path), class_names=list(class_names))

    def deliver(self) -> None:
        """Sends what has been kept back, if MLflow answers now."""
        if self._target is not None and not self._outbox.entries():
            return
        with suppress(*_FAILURES, UserError):  # whose experiment it is may have been deleted
            experiment_id = _connect()
            deadline = time.monotonic() + _SENDING_S
            self._target = _send_all(self._outbox, self.id, experiment_id, deadline)
            self.id, self.experiment_id = self._target.run_id, experiment_id

    def keep_back(self, reason: object) -> None:
        """Sends nothing from now on, and says why, once."""
        self._target = None
        self._warn(
            "kept", f"{' '.join(str(reason).split())[:300]}; what is logged is kept in "
            ".cnnpipe/outbox and sent by the next stage that reaches MLflow"
        )  # fmt: skip

    def _warn(self, of: str, message: str) -> None:
        if of not in self._warned:
            print(f"warning: {message}", file=sys.stderr)
        self._warned.add(of)

    def _log(self, kind: str, path: Path | None = None, **content: Any) -> None:
        entry = {"kind": kind, "time": _now(), **content}
        if self._target is not None:
            started = time.monotonic()
            try:
                _check_unlocked()
                self._target.send(entry, path)
            except _FAILURES as error:
                if _is_refusal(error):
                    self._warn("refused", f"MLflow refuses a {kind}: {_line(error)}")
                    return
                self.keep_back(f"MLflow does not take what is logged: {_line(error)}")
            except KeyboardInterrupt:
                if _is_remote(_uri()):  # out of a wait: nobody knows whether it was taken
                    self._target = None
                    self._outbox.add(entry, path)
                raise
            else:
                seconds = time.monotonic() - started
                if path is None and seconds > _SLOW_S:
                    self.keep_back(f"MLflow takes {seconds:.0f} s to answer")
                return
        self._outbox.add(entry, path)

    def _end(self, status: str) -> None:
        if status == "KILLED":  # whoever stops a run waits for it
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "2"
        self._log("end", status=status)
        if status != "KILLED":
            self.deliver()


class _Target:
    """A run in MLflow's store, and what is known to be there."""

    def __init__(self, run_id: str, is_new: bool) -> None:
        self.run_id = run_id
        self.is_new = is_new
        self._steps: dict[str, set[int]] = {}

    def send(self, entry: dict[str, Any], path: Path | None) -> None:
        """Tells MLflow; once more, it changes nothing."""
        if entry["kind"] == "metrics":
            self.send_metrics([entry])
        else:
            with _held():
                self._send(entry, path)

    def _send(self, entry: dict[str, Any], path: Path | None) -> None:
        client, kind = mlflow.MlflowClient(), entry["kind"]
        if kind == "params":
            params = [Param(key, value) for key, value in entry["values"].items()]
            client.log_batch(self.run_id, params=params)
        elif kind == "tag":
            client.set_tag(self.run_id, entry["key"], entry["value"])
        elif kind == "file":
            client.log_artifact(self.run_id, str(path), entry["folder"] or None)
        elif kind == "image":
            assert path is not None
            self._send_image(path, entry["key"], entry["time"])
        elif kind == "data":
            tags = [InputTag(key, value) for key, value in entry["tags"].items()]
            client.log_inputs(self.run_id, [DatasetInput(Dataset(**entry["data"]), tags)])
        elif kind == "model":
            assert path is not None
            _register(self.run_id, path, entry["class_names"])
        elif kind == "end":
            client.set_terminated(self.run_id, entry["status"], entry["time"])

    def _send_image(self, path: Path, key: str, time_ms: int) -> None:
        client = mlflow.MlflowClient()
        # As MLflow names them, before an identifier of its own: a second would stand beside it. The
        # compressed one comes last.
        begin = f"images/{key.replace('/', '~')}+step+0+"
        names = [item.path for item in client.list_artifacts(self.run_id, "images")]
        if any(name.startswith(begin) and name.endswith("+compressed.webp") for name in names):
            return
        client.log_image(
            self.run_id, mlflow.Image(str(path)), key=key, timestamp=time_ms, synchronous=True
        )

    def send_metrics(self, entries: Sequence[dict[str, Any]]) -> None:
        """The points of several entries at once, without those that the run has."""
        with _held():
            points: dict[tuple[str, int], Metric] = {}
            for entry in entries:
                step = entry["step"]
                for key, value in entry["values"].items():
                    if step not in self._logged_steps(key):
                        points.setdefault((key, step), Metric(key, value, entry["time"], step))
            metrics = list(points.values())
            for start in range(0, len(metrics), _MOST_POINTS):
                mlflow.MlflowClient().log_batch(self.run_id, metrics[start : start + _MOST_POINTS])
            for key, step in points:
                self._steps[key].add(step)

    def _logged_steps(self, key: str) -> set[int]:
        if key not in self._steps:
            points = (
                [] if self.is_new else mlflow.MlflowClient().get_metric_history(self.run_id, key)
            )
            self._steps[key] = {point.step for point in points}
        return self._steps[key]


@contextmanager
def start_run(name: str, tags: dict[str, str], run_id: str = "") -> Iterator[Run]:
    """A new run, named after the DVC experiment where there is one, else as told.

    It ends FINISHED, or KILLED where the block was interrupted, or FAILED.

    Args:
        name: of the run.
        tags: of the run, besides those that say what made it.
        run_id: of the run to go on with; where it is gone, a new one takes its place.

    Raises:
        UserError: MLflow has no such kind of store, or the experiment was deleted.
    """
    with _open_run(os.environ.get("DVC_EXP_NAME", name), tags, run_id) as run:
        # Of a run that MLflow does not know they would have nowhere to go.
        monitor = run.experiment_id and SystemMetricsMonitor(run.id, resume_logging=bool(run_id))
        if monitor:
            monitor.start()
        try:
            yield run
        finally:
            # Not if interrupted, as it may have to wait for MLflow; it ends with the process.
            if monitor and run._target and not isinstance(sys.exception(), KeyboardInterrupt):
                monitor.finish()


@contextmanager
def reopen_run(run_id: str, name: str) -> Iterator[Run]:
    """The run that trained a model, open again; where it is gone, one that takes its place.

    A run that was deleted, or that this tracker never had, is replaced by a new one with the tag
    `recovered_from`; the next time that one is found again.

    Raises:
        UserError: MLflow has no such kind of store, or the experiment was deleted.
    """
    with _open_run(name, {}, run_id) as run:
        yield run


@contextmanager
def _open_run(name: str, tags: dict[str, str], run_id: str) -> Iterator[Run]:
    """The run with that id, or a new one; its own end is told whatever happens in the block."""
    opened = _opened(name, tags)
    experiment_id, target, problem = "", None, None
    started = time.monotonic()
    try:
        experiment_id = _connect()
        _check_quick(started)
        _send_waiting(experiment_id, run_id)
        target = _found_or_created(opened, run_id, experiment_id)
    except _FAILURES as error:
        problem = error
    own_id = target.run_id if target else run_id or uuid.uuid4().hex
    with open_outbox(own_id, _shown(_uri())) as outbox:
        run = Run(outbox, own_id, experiment_id if target else "", target)
        if problem is not None:
            run.keep_back(_line(problem))
            outbox.add(opened)
        elif run_id and target and target.is_new:
            print(
                f"warning: MLflow has no run {run_id}, a new one takes its place", file=sys.stderr
            )
        status = "FAILED"
        try:
            yield run
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            run._end(status)


def _found_or_created(opened: dict[str, Any], run_id: str, experiment_id: str) -> _Target:
    """The run with that id, or the one that took its place, or else a new one that now does.

    Args:
        opened: what a new one is made of, an entry of the kind `open`.
        run_id: empty for a new run that takes nobody's place.
        experiment_id: where to look for it, and where it is made.
    """
    client = mlflow.MlflowClient()
    with _held():
        found = run_id and (
            _find(run_id, experiment_id) or _find_unanswered(opened, run_id, experiment_id)
        )
        if found:
            client.update_run(found, "RUNNING")
            return _Target(found, is_new=False)
        tags = {**opened["tags"], **({"recovered_from": run_id} if run_id else {})}
        created = client.create_run(experiment_id, opened["time"], tags, opened["name"])
    return _Target(created.info.run_id, is_new=True)


def _find(run_id: str, experiment_id: str) -> str | None:
    """The id of the run, or of the one that took its place; None where there is neither."""
    client = mlflow.MlflowClient()
    try:
        if client.get_run(run_id).info.lifecycle_stage == "active":
            return run_id
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    others = client.search_runs([experiment_id], f"tags.recovered_from = '{run_id}'", max_results=1)
    return str(others[0].info.run_id) if others else None


def _find_unanswered(opened: dict[str, Any], run_id: str, experiment_id: str) -> str | None:
    """A run that was made as told, only that MLflow's answer was lost; from now on it is known."""
    client = mlflow.MlflowClient()
    for run in client.search_runs([experiment_id], f"attributes.start_time = {opened['time']}"):
        if run.info.run_name == opened["name"] and "recovered_from" not in run.data.tags:
            client.set_tag(run.info.run_id, "recovered_from", run_id)
            return str(run.info.run_id)
    return None


def _send_waiting(experiment_id: str, awaited: str) -> None:
    """Sends what runs before have left, but for those that a process is writing to.

    Args:
        experiment_id: of runs that MLflow has not been told of.
        awaited: a run that is needed now; who is sending what it has left is waited for.
    """
    deadline = time.monotonic() + _SENDING_FIRST_S
    for run_id in sorted(waiting(), key=lambda run_id: run_id != awaited):
        with ExitStack() as stack:
            try:
                outbox = stack.enter_context(open_outbox(run_id, _shown(_uri()), run_id == awaited))
            except RunFailed:
                continue
            if not outbox.entries():
                continue
            try:
                target = _send_all(outbox, run_id, experiment_id, deadline)
            except _FAILURES as error:
                if time.monotonic() > deadline and run_id != awaited:
                    return
                _check_answers()
                if run_id == awaited:
                    raise  # what comes now comes after it
                print(
                    f"warning: MLflow does not take what waits in {outbox.folder}: {_line(error)}",
                    file=sys.stderr,
                )
            else:
                print(f"sent to MLflow what it had missed of run {target.run_id}")


def _send_all(outbox: Outbox, run_id: str, experiment_id: str, deadline: float) -> _Target:
    """Sends all that is in the outbox of the run; the run, as MLflow has it.

    Raises:
        RunFailed: the deadline, of `time.monotonic`, is over; the rest is kept.
    """
    _check_unlocked()
    target = None
    for kind, group in groupby(outbox.entries(), lambda entry: entry.content["kind"]):
        entries = list(group)
        if target is None:
            opened = entries[0].content if kind == "open" else _opened("recovered", {})
            target = _found_or_created(opened, run_id, experiment_id)
        if kind == "metrics":
            try:
                target.send_metrics([entry.content for entry in entries])
            except _FAILURES as error:
                if not _is_refusal(error):  # else it is found out which
                    raise
        for entry in entries:
            if time.monotonic() > deadline:
                raise RunFailed("MLflow takes too long")
            try:
                target.send(entry.content, entry.path)
            except _FAILURES as error:
                if not _is_refusal(error):
                    raise
                print(f"warning: MLflow refuses a {kind}: {_line(error)}", file=sys.stderr)
            outbox.remove(entry)
    return target or _found_or_created(_opened("recovered", {}), run_id, experiment_id)


def _opened(name: str, tags: dict[str, str]) -> dict[str, Any]:
    """What a new run is made of, as an entry of an outbox."""
    tags = resolve_tags({**_origin_tags(), **tags})
    return {"kind": "open", "time": _now(), "name": name, "tags": tags}


def unsent_runs() -> list[str]:
    """The runs of which MLflow has missed something that waits to be sent."""
    return waiting()


def _is_refusal(error: Exception) -> bool:
    """Whether MLflow would not take it however often it is told."""
    code = getattr(error, "error_code", None)
    return code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _now() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return time.time_ns() // 1_000_000


def find_model_file(uri: str) -> Path:
    """The model file of a registered model, such as models:/cnnpipe@champion or models:/cnnpipe/3.

    Raises:
        UserError: there is no such model.
        RunFailed: the tracker cannot be reached.
    """
    _connect()
    try:
        folder = Path(mlflow.artifacts.download_artifacts(uri))
    except (MlflowException, OSError) as error:
        raise UserError(f"{uri}: no such model: {' '.join(str(error).split())[:200]}") from None
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        raise UserError(f"{uri}: the model was not made by cnnpipe: it holds no .safetensors file")
    return files[0]


@dataclass(frozen=True)
class FinishedRun:
    """A run that was evaluated, as MLflow has it."""

    id: str
    name: str
    params: dict[str, str]
    """By dotted name."""
    metrics: dict[str, float]
    """The latest value of each; `train/seconds` also where an older run has it by epoch alone."""
    tags: dict[str, str]


def find_runs(names: Sequence[str], most: int = 10) -> list[FinishedRun]:
    """Evaluated runs that are not deleted, the latest first: those that are named, or the last.

    Args:
        names: each a run's id, or at least 6 digits that its id begins with, or its name, or that
            of its DVC experiment; none for the last runs there are.
        most: how many of those.

    Raises:
        UserError: a name fits no run or several, its run was deleted or never evaluated, or there
            is no evaluated run at all.
        RunFailed: the tracker cannot be reached.
    """
    experiment_id = _connect_to_read()
    with _reading():
        runs = []
        if names and experiment_id:
            everything = _search(experiment_id, ViewType.ALL)
            runs = [_named(name, everything) for name in names]
        elif experiment_id:
            client = mlflow.MlflowClient()
            # Just any value of it: the run was evaluated.
            runs = client.search_runs([experiment_id], "metrics.`test/accuracy` >= 0",
                                      max_results=most, order_by=["start_time DESC"])  # fmt: skip
        if names and not experiment_id:
            raise UserError(f"{names[0]}: no such run: MLflow has none yet, run `dvc repro`")
        if not runs:
            raise UserError("no evaluated run yet: run `dvc repro`")
        once = {run.info.run_id: run for run in runs}.values()
        return [_finished(run) for run in sorted(once, key=lambda run: -run.info.start_time)]


def read_history(run_id: str, keys: Sequence[str]) -> pd.DataFrame:
    """Metrics by epoch: float64 columns of these names, a row an epoch, NaN where one is missing.

    Raises:
        RunFailed: the tracker cannot be reached.
    """
    with _reading():
        client = mlflow.MlflowClient(_uri())
        columns = {
            key: {point.step: point.value for point in client.get_metric_history(run_id, key)}
            for key in keys
        }
    table = pd.DataFrame(columns, columns=list(keys), dtype="float64").sort_index()
    return table.rename_axis("epoch")


def read_predictions(run_id: str) -> pd.DataFrame | None:
    """The run's test images: path, label, prediction and, but in older runs, sha256, all str.

    None where the run has no such table, or it is damaged.

    Raises:
        RunFailed: the tracker cannot be reached.
    """
    columns = ("path", "label", "sha256", "prediction")
    with TemporaryDirectory() as folder:
        try:
            file = mlflow.artifacts.download_artifacts(
                run_id=run_id,
                artifact_path="test/predictions.csv",
                dst_path=folder,
                tracking_uri=_uri(),
            )
        except (*_FAILURES, ValueError):
            _check_answers()  # else it is the file that is not there
            return None
        try:
            # Nothing is a missing value: a class may well be called NA or None.
            table = pd.read_csv(file, dtype=str, keep_default_na=False, na_filter=False,
                                usecols=lambda name: name in columns,
                                encoding_errors="surrogateescape")  # fmt: skip
        except (OSError, ValueError):
            return None
    return table if {"path", "label", "prediction"} <= set(table) else None


def _connect_to_read() -> str:
    """Points MLflow to its store without making anything there; empty where there is no run yet."""
    _, is_file, path = _uri().partition("sqlite:///")
    if is_file and not Path(path).exists():
        return ""
    return _connect(make=False)


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except _FAILURES as error:
        if isinstance(error, RunFailed):
            raise
        raise RunFailed(
            f"the MLflow store {_shown(_uri())} cannot be read: {_line(error)}"
        ) from None


def _search(experiment_id: str, view: int) -> list[mlflow.entities.Run]:
    """All runs of the experiment, the latest first."""
    client = mlflow.MlflowClient()
    runs: list[mlflow.entities.Run] = []
    token: str | None = ""
    while token is not None:
        page = client.search_runs([experiment_id], run_view_type=view, max_results=1000,
                                  page_token=token or None)  # fmt: skip
        runs += page
        token = page.token or None
    return runs


def _named(name: str, runs: Sequence[mlflow.entities.Run]) -> mlflow.entities.Run:
    """The one run of that id, name or DVC experiment, or whose id begins so.

    Raises:
        UserError: it fits none or several, or the run was deleted or never evaluated.
    """

    def fits(run: mlflow.entities.Run) -> bool:
        names = (run.info.run_id, run.info.run_name, run.data.tags.get("dvc_experiment"))
        return name in names or bool(
            re.fullmatch("[0-9a-f]{6,32}", name) and run.info.run_id.startswith(name)
        )

    found = [run for run in runs if fits(run)]
    there = [run for run in found if run.info.lifecycle_stage == "active"]
    evaluated = [run for run in there if "test/accuracy" in run.data.metrics]
    if not found:
        raise UserError(
            f"{name}: no such run: name it by its id, 6 digits of it or more, or by its name; "
            "`cnnpipe compare` alone shows the last ones"
        )
    if not there:
        raise UserError(
            f"{name}: the run was deleted: `mlflow runs restore --run-id {found[0].info.run_id}` "
            "brings it back"
        )
    if not evaluated:
        raise UserError(f"{name}: the run was not evaluated: run `cnnpipe evaluate` for it")
    if len(evaluated) > 1:
        ids = " or ".join(run.info.run_id[:12] for run in evaluated[:4])
        raise UserError(f"{name}: {len(evaluated)} runs fit: name one by its id, {ids}")
    return evaluated[0]


def _finished(run: mlflow.entities.Run) -> FinishedRun:
    metrics = dict(run.data.metrics)
    if "train/seconds" not in metrics and "train/seconds_per_epoch" in metrics:
        epochs = mlflow.MlflowClient().get_metric_history(
            run.info.run_id, "train/seconds_per_epoch"
        )
        metrics["train/seconds"] = sum({point.step: point.value for point in epochs}.values())
    return FinishedRun(
        id=run.info.run_id,
        name=run.info.run_name or run.info.run_id[:12],
        params=dict(run.data.params),
        metrics=metrics,
        tags=dict(run.data.tags),
    )


def prepare_store() -> str:
    """Makes the default store, the experiment and its view where they are missing; the store's URI.

    Raises:
        RunFailed: the tracker cannot be reached.
    """
    experiment_id = _connect()
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


def digest(*paths: str | Path) -> str:
    """16 hexadecimal digits that change when any of the files does."""
    total = hashlib.sha256()
    for path in paths:
        total.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return total.hexdigest()[:16]


def _uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or local_store()


def _held() -> AbstractContextManager[None]:
    """Signals wait where the store is a database, which an exception amid a transaction locks."""
    return nullcontext() if _is_remote(_uri()) else signals_held()


def _is_remote(uri: str) -> bool:
    return urlsplit(uri).scheme in ("http", "https")


def _check_unlocked() -> None:
    """Raises `RunFailed` where another process keeps the store, a SQLite file, locked."""
    _, is_file, path = _uri().partition("sqlite:///")
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


def _check_quick(started: float) -> None:
    """Raises `RunFailed` where a server has taken too long since then to be asked for more."""
    seconds = time.monotonic() - started
    if _is_remote(_uri()) and seconds > _SLOW_S:  # a database may have had to be made
        raise RunFailed(f"MLflow takes {seconds:.0f} s to answer")


def _check_answers() -> None:
    """Raises `RunFailed` where the store does not answer."""
    uri = _uri()
    if _is_remote(uri):
        try:
            requests.get(uri.rstrip("/") + "/health", timeout=_SLOW_S).raise_for_status()
        except requests.RequestException as error:
            raise RunFailed(
                f"MLFLOW_TRACKING_URI = {_shown(uri)}: no MLflow server answers there: "
                f"{type(error).__name__}; start one with `cnnpipe up`, or unset the variable"
            ) from None
    _check_unlocked()


def _connect(make: bool = True) -> str:
    """Points MLflow to its store; the experiment's id.

    Args:
        make: the experiment where there is none; else the id is empty then.

    Raises:
        RunFailed: the tracker cannot be reached.
        UserError: MLflow has no such kind of store, or the experiment was deleted.
    """
    uri = _uri()
    _check_answers()
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
                    f"{_shown(uri)}: the MLflow experiment {EXPERIMENT!r} was deleted: restore it "
                    f"with `mlflow experiments restore -x {experiment.experiment_id}`"
                )
            return str(experiment.experiment_id)
    except _FAILURES as error:
        kind = UserError if _is_refusal(error) else RunFailed
        raise kind(f"the MLflow store {_shown(uri)} cannot be used: {_line(error)}") from None


@contextmanager
def _lock() -> Iterator[None]:
    path = repository_root() / ".cnnpipe" / "mlflow.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def origin() -> dict[str, str]:
    """The commit and the experiment that this is, as far as they are known."""
    found = {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": "true" if _git("status", "--porcelain", "--untracked-files=no") else "false",
        "dvc_experiment": os.environ.get("DVC_EXP_NAME", ""),
    }
    return {key: value for key, value in found.items() if value}


def _origin_tags() -> dict[str, str]:
    """What made the run: the commit, the experiment, the flow, the machine."""
    tags = {
        **origin(),
        "dvc_baseline": os.environ.get("DVC_EXP_BASELINE_REV", ""),
        "prefect_flow_run": os.environ.get("CNNPIPE_FLOW_RUN_ID", ""),
        "cnnpipe_version": cnnpipe.__version__,
        "python_version": platform.python_version(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
    }
    return {key: value for key, value in tags.items() if value}


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()


def _register(run_id: str, path: Path, class_names: Sequence[str]) -> None:
    client = mlflow.MlflowClient()
    # It is told with the model and with the version: one whose answer was lost, or whose sender was
    # killed, is found by it and not made again.
    tags = {"model_digest": digest(path)}
    for version in client.search_model_versions(f"run_id = '{run_id}'"):
        if version.tags.get("model_digest") == tags["model_digest"]:
            return
    uri = ""
    for model in client.search_logged_models(
        [client.get_run(run_id).info.experiment_id],
        f"source_run_id = '{run_id}' AND tags.model_digest = '{tags['model_digest']}'",
    ):
        if model.status == LoggedModelStatus.READY:
            uri = model.model_uri
        else:
            client.delete_logged_model(model.model_id)
    if not uri:
        uri = _log_model(run_id, path, class_names, tags)
    mlflow.register_model(uri, MODEL_NAME, tags=tags)


def _log_model(run_id: str, path: Path, class_names: Sequence[str], tags: dict[str, str]) -> str:
    """The URI of the servable model, in the store with all that it needs."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    outputs = [ColSpec(DataType.string, "prediction")]
    outputs += [ColSpec(DataType.double, f"probability_{name}") for name in class_names]
    package = Path(cnnpipe.__file__).parent
    with warnings.catch_warnings(), mlflow.start_run(run_id=run_id, log_system_metrics=False):
        # It asks for an example of the input, which the signature makes unnecessary.
        warnings.simplefilter("ignore", UserWarning)
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(package / "serving" / "pyfunc.py"),
            artifacts={"model": str(path.resolve())},
            code_paths=[str(package)],
            signature=ModelSignature(
                inputs=Schema([ColSpec(DataType.binary, "image")]), outputs=Schema(outputs)
            ),
            pip_requirements=_requirements(),
            tags=tags,
        )
    return str(info.model_uri)


def _requirements() -> list[str]:
    """What a prediction needs, in the versions that are installed."""
    names = ("mlflow", "numpy", "pandas", "pillow", "pydantic", "ruamel.yaml", "safetensors",
             "scipy", "simplejpeg", "tifffile", "torch")  # fmt: skip
    # A local label such as +cpu names a build that a package index may not have.
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in names]
