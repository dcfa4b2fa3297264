"""What MLflow is told of a run: open it, log to it, open it again.

A tracker that cannot be reached, that dies, or that takes too long costs a warning and never a
training: what it misses waits in cnnpipe.outbox, and is sent once it answers, as if it had never
been away.
"""

import json
import os
import platform
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cnnpipe import mlflow_store
from cnnpipe.mlflow_store import (
    FAILURES,
    PROCESS,
    address,
    check_answers,
    check_unlocked,
    connect,
    held,
    is_refusal,
    is_remote,
    line,
    process_tag,
)

# isort: split
import mlflow
import pandas as pd
import psutil
from matplotlib.figure import Figure
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS, MLFLOW_PARENT_RUN_ID

import cnnpipe
from cnnpipe import registry
from cnnpipe.errors import RunFailed, UserError
from cnnpipe.origin import md5, origin, sha256
from cnnpipe.outbox import Outbox, open_outbox, waiting
from cnnpipe.running import shown_address

PARENT_VARIABLE = "CNNPIPE_PARENT_RUN"
"""The environment's variable by which a training learns of the sweep's run that it belongs to."""
_SENDING_S = 30
"""For sending what has waited; the rest waits on."""
_SENDING_FIRST_S = 10
"""For that before a stage begins."""
_SENDING_LAST_S = 2
"""For that after an interrupt."""
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
        self._cut_off = False
        """Whether an interrupt came out of a wait for MLflow, which may be as well as ever."""

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

    def log_model_file(self, path: str | Path) -> None:
        """The checksums of the model file as tags, by which it is found, and its DVC lock, too."""
        self.log_tag("model_sha256", sha256(path))
        self.log_tag("model_md5", md5(path))

    def log_model(self, path: str | Path, class_names: Sequence[str]) -> None:
        """The model file as a servable model, a new version of the registered model `cnnpipe`.

        It takes the bytes of image files and needs nothing from this repository. A model file that
        the run has registered already is not registered again.
        """
        self.log_model_file(path)  # also of a run that takes the place of the one that trained it
        self._log("model", Path(path), class_names=list(class_names))

    def deliver(self, most_s: float = _SENDING_S) -> None:
        """Sends what has been kept back, if MLflow answers now; for so many seconds, about."""
        if self._target is not None and not self._outbox.entries():
            return
        with suppress(*FAILURES, UserError):  # whose experiment it is may have been deleted
            experiment_id = connect()
            deadline = time.monotonic() + most_s
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
                check_unlocked()
                self._target.send(entry, path)
            except FAILURES as error:
                if is_refusal(error):
                    self._warn("refused", f"MLflow refuses a {kind}: {line(error)}")
                    return
                self.keep_back(f"MLflow does not take what is logged: {line(error)}")
            except KeyboardInterrupt:
                if is_remote():  # out of a wait: nobody knows whether it was taken
                    self._target, self._cut_off = None, True
                    self._outbox.add(entry, path)
                raise
            else:
                seconds = time.monotonic() - started
                if path is None and seconds > mlflow_store.SLOW_S:
                    self.keep_back(f"MLflow takes {seconds:.0f} s to answer")
                return
        self._outbox.add(entry, path)

    def _end(self, status: str) -> None:
        if status == "KILLED":  # whoever stops a run waits for it
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "2"
        self._log("end", status=status)
        if status != "KILLED":
            self.deliver()
        elif self._cut_off:
            self.deliver(_SENDING_LAST_S)


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
            with held():
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
            registry.register(self.run_id, path, entry["class_names"])
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
        with held():
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


def log_scores(
    table: Path, unreadable: Path, tags: dict[str, str], metrics: dict[str, float]
) -> tuple[str | None, str | None]:
    """A run of its own for images that a model has scored; its id, and that of its experiment.

    Both are None while MLflow cannot be told of it. It is no evaluated run to `find_runs`.

    Args:
        table: the scores, in MLflow's form of a table, its name what it is to be called.
        unreadable: the list of what is no image.
        tags: of the run, besides those that say what made it.
        metrics: of the run.
    """
    try:
        with _open_run("scored", {"kind": "scoring", **tags}, "") as run:
            run.log_metrics(dict(metrics))
            run.log_file(table, "")
            tables = [{"path": table.name, "type": "table"}]
            run.log_tag(MLFLOW_LOGGED_ARTIFACTS, json.dumps(tables))
            run.log_file(unreadable, "")
    except UserError as error:  # of a deleted experiment; the scores are there all the same
        print(f"warning: {error}; the scores are not logged", file=sys.stderr)
        return None, None
    return (run.id, run.experiment_id) if run.experiment_id else (None, None)


@contextmanager
def _open_run(name: str, tags: dict[str, str], run_id: str) -> Iterator[Run]:
    """The run with that id, or a new one; its own end is told whatever happens in the block."""
    opened = _opened(name, tags)
    experiment_id, target, problem = "", None, None
    started = time.monotonic()
    try:
        experiment_id = connect()
        _check_quick(started)
        _send_waiting(experiment_id, run_id)
        _end_the_dead(experiment_id)
        target = _found_or_created(opened, run_id, experiment_id)
    except FAILURES as error:
        problem = error
    own_id = target.run_id if target else run_id or uuid.uuid4().hex
    with open_outbox(own_id, shown_address(address())) as outbox:
        run = Run(outbox, own_id, experiment_id if target else "", target)
        if problem is not None:
            run.keep_back(line(problem))
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
    with held():
        found = run_id and (
            _find(run_id, experiment_id) or _find_unanswered(opened, run_id, experiment_id)
        )
        if found:
            client.update_run(found, "RUNNING")
            with suppress(MlflowException):  # no reason to go without all else
                for key, value in process_tag().items():
                    client.set_tag(found, key, value)
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
                outbox = stack.enter_context(
                    open_outbox(run_id, shown_address(address()), run_id == awaited)
                )
            except RunFailed:
                continue
            if not outbox.entries():
                continue
            try:
                target = _send_all(outbox, run_id, experiment_id, deadline)
            except FAILURES as error:
                if time.monotonic() > deadline and run_id != awaited:
                    return
                check_answers()
                if run_id == awaited:
                    raise  # what comes now comes after it
                print(
                    f"warning: MLflow does not take what waits in {outbox.folder}: {line(error)}",
                    file=sys.stderr,
                )
            else:
                print(f"sent to MLflow what it had missed of run {target.run_id}")


def _send_all(outbox: Outbox, run_id: str, experiment_id: str, deadline: float) -> _Target:
    """Sends all that is in the outbox of the run; the run, as MLflow has it.

    Raises:
        RunFailed: the deadline, of `time.monotonic`, is over; the rest is kept.
    """
    check_unlocked()
    target = None
    for kind, group in groupby(outbox.entries(), lambda entry: entry.content["kind"]):
        entries = list(group)
        if target is None:
            opened = entries[0].content if kind == "open" else _opened("recovered", {})
            target = _found_or_created(opened, run_id, experiment_id)
        if kind == "metrics":
            try:
                target.send_metrics([entry.content for entry in entries])
            except FAILURES as error:
                if not is_refusal(error):  # else it is found out which
                    raise
        for entry in entries:
            if time.monotonic() > deadline:
                raise RunFailed("MLflow takes too long")
            try:
                target.send(entry.content, entry.path)
            except FAILURES as error:
                if not is_refusal(error):
                    raise
                print(f"warning: MLflow refuses a {kind}: {line(error)}", file=sys.stderr)
            outbox.remove(entry)
    return target or _found_or_created(_opened("recovered", {}), run_id, experiment_id)


def _opened(name: str, tags: dict[str, str]) -> dict[str, Any]:
    """What a new run is made of, as an entry of an outbox."""
    tags = resolve_tags({**_origin_tags(), **tags})
    return {"kind": "open", "time": _now(), "name": name, "tags": tags}


def settle() -> None:
    """Sends what waits, and ends the runs of processes of this machine that can no more."""
    with suppress(*FAILURES, UserError):
        experiment_id = connect()
        _send_waiting(experiment_id, "")
        _end_the_dead(experiment_id)


def _end_the_dead(experiment_id: str) -> None:
    """Ends as KILLED what is said to be running, and is written to by no process any more."""
    client = mlflow.MlflowClient()
    node = platform.node()
    running = f"attributes.status = 'RUNNING' AND tags.{PROCESS} LIKE '{node} %'"
    for run in client.search_runs([experiment_id], running):
        _, pid, started = run.data.tags[PROCESS].rsplit(" ", 2)
        try:
            lives = f"{psutil.Process(int(pid)).create_time():.2f}" == started
        except psutil.Error:
            lives = False
        if not lives and run.info.run_id not in waiting():
            client.set_terminated(run.info.run_id, "KILLED")


def unsent_runs() -> list[str]:
    """The runs of which MLflow has missed something that waits to be sent."""
    return waiting()


def _now() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return time.time_ns() // 1_000_000


def _check_quick(started: float) -> None:
    """Raises `RunFailed` where a server has taken too long since then to be asked for more."""
    seconds = time.monotonic() - started
    if is_remote() and seconds > mlflow_store.SLOW_S:  # a database may have had to be made
        raise RunFailed(f"MLflow takes {seconds:.0f} s to answer")


def _origin_tags() -> dict[str, str]:
    """What made the run: the commit, the experiment, the flow, the machine."""
    tags = {
        **origin(),
        MLFLOW_PARENT_RUN_ID: os.environ.get(PARENT_VARIABLE, ""),
        "dvc_baseline": os.environ.get("DVC_EXP_BASELINE_REV", ""),
        "prefect_flow_run": os.environ.get("CNNPIPE_FLOW_RUN_ID", ""),
        "cnnpipe_version": cnnpipe.__version__,
        "python_version": platform.python_version(),
        **process_tag(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
    }
    return {key: value for key, value in tags.items() if value}
