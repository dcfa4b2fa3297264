"""What MLflow has of the runs, to be read: none of it is changed here."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory

from cnnpipe.mlflow_store import FAILURES, address, check_answers, connect_to_read, reading

# isort: split
import mlflow
import pandas as pd
from mlflow.entities import ViewType

from cnnpipe.errors import UserError


class NoSuchRun(UserError):
    """A name fits no run at all."""


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


@dataclass(frozen=True)
class RunRecord:
    """Any run, whatever became of it."""

    id: str
    name: str
    status: str
    """finished, failed, killed, running, or deleted."""
    metrics: dict[str, float]
    """The latest value of each."""
    tags: dict[str, str]


def all_runs() -> list[RunRecord]:
    """All runs, deleted ones as well, the latest first.

    Raises:
        RunFailed: the tracker cannot be reached.
    """
    experiment_id = connect_to_read()
    with reading():
        runs = _search(experiment_id, ViewType.ALL) if experiment_id else []
    return [
        RunRecord(
            run.info.run_id,
            run.info.run_name or run.info.run_id[:12],
            run.info.status.lower() if run.info.lifecycle_stage == "active" else "deleted",
            dict(run.data.metrics),
            dict(run.data.tags),
        )
        for run in runs
    ]


def find_runs(names: Sequence[str], most: int = 10) -> list[FinishedRun]:
    """Evaluated runs that are not deleted, the latest first: those that are named, or the last.

    Args:
        names: each a run's id, or at least 6 digits that its id begins with, or its name, or that
            of its DVC experiment; none for the last runs there are.
        most: how many of those.

    Raises:
        NoSuchRun: a name fits no run.
        UserError: it fits several, its run was deleted or never evaluated, or there is no evaluated
            run at all.
        RunFailed: the tracker cannot be reached.
    """
    experiment_id = connect_to_read()
    with reading():
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
            raise NoSuchRun(f"{names[0]}: no such run: MLflow has none yet, run `dvc repro`")
        if not runs:
            raise UserError("no evaluated run yet: run `dvc repro`")
        once = {run.info.run_id: run for run in runs}.values()
        return [_finished(run) for run in sorted(once, key=lambda run: -run.info.start_time)]


def read_history(run_id: str, keys: Sequence[str]) -> pd.DataFrame:
    """Metrics by epoch: float64 columns of these names, a row an epoch, NaN where one is missing.

    Raises:
        RunFailed: the tracker cannot be reached.
    """
    with reading():
        client = mlflow.MlflowClient(address())
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
    table = _read_table(run_id, "test/predictions.csv", columns)
    return table if table is not None and {"path", "label", "prediction"} <= set(table) else None


def read_images(run_id: str) -> pd.DataFrame | None:
    """All images that the run had: path, label, sha256 and split, all str.

    None where the run has no such table, as an older one, or it is damaged.

    Raises:
        RunFailed: the tracker cannot be reached.
    """
    columns = ("path", "label", "sha256", "split")
    table = _read_table(run_id, "data/images.csv.gz", columns)
    return table if table is not None and set(columns) == set(table) else None


def _read_table(run_id: str, path: str, columns: Sequence[str]) -> pd.DataFrame | None:
    """Those columns of a table among the run's artifacts, as the text they are; else None."""
    with TemporaryDirectory() as folder:
        try:
            file = mlflow.artifacts.download_artifacts(
                run_id=run_id, artifact_path=path, dst_path=folder, tracking_uri=address()
            )
        except (*FAILURES, ValueError):
            check_answers()  # else it is the file that is not there
            return None
        try:
            # Nothing is a missing value: a class may well be called NA or None.
            return pd.read_csv(file, dtype=str, keep_default_na=False, na_filter=False,
                               usecols=lambda name: name in columns,
                               encoding_errors="surrogateescape")  # fmt: skip
        except (OSError, ValueError, EOFError):
            return None


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
        NoSuchRun: it fits none.
        UserError: it fits several, or the run was deleted or never evaluated.
    """

    def fits(run: mlflow.entities.Run) -> bool:
        # The id that models/run.json has, where the run took the place of another.
        named = ("dvc_experiment", "recovered_from")
        names = (run.info.run_id, run.info.run_name, *map(run.data.tags.get, named))
        return name in names or bool(
            re.fullmatch("[0-9a-f]{6,32}", name) and run.info.run_id.startswith(name)
        )

    found = [run for run in runs if fits(run)]
    there = [run for run in found if run.info.lifecycle_stage == "active"]
    evaluated = [run for run in there if "test/accuracy" in run.data.metrics]
    if not found:
        raise NoSuchRun(
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
