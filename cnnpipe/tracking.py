"""The only module that knows MLflow: open a run, log to it, open it again, register its model.

Files are the truth and MLflow is the view of them. A tracker that cannot be reached stops a
training before it begins; one that goes away later costs a warning, and the training goes on.
"""

import fcntl
import hashlib
import importlib.metadata
import logging
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# Before MLflow is imported: it reads them then.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "true"
# By default a server that is down is tried for several minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
# A training of the built-in data takes seconds.
os.environ.setdefault("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "2")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow
import pandas as pd
import requests
from matplotlib.figure import Figure
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.entities import RunStatus
from mlflow.exceptions import MlflowException

import cnnpipe
from cnnpipe.errors import RunFailed, UserError
from cnnpipe.workspace import repository_root, signals_held

for _name in ("mlflow", "alembic"):  # what they do well is no news
    logging.getLogger(_name).setLevel(logging.WARNING)

EXPERIMENT = "cnnpipe"
MODEL_NAME = "cnnpipe"


class Run:
    """An MLflow run that is being written to."""

    def __init__(self, run: mlflow.ActiveRun, resumed: bool = False) -> None:
        self.id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self._warned = False
        self._steps: dict[str, set[int]] | None = {} if resumed else None
        """Of a resumed run, the steps at which each metric is there already."""

    def log_params(self, params: dict[str, Any]) -> None:
        """Parameters, by their dotted names."""
        self._attempt(lambda: mlflow.log_params(params))

    def log_metrics(self, metrics: dict[str, float | None], step: int | None = None) -> None:
        """Metrics, at an epoch or once; those that are not defined (None) are left out.

        So are those that a resumed run has: MLflow would keep a second point beside the first.
        """

        def log() -> None:
            defined = {
                key: value
                for key, value in metrics.items()
                if value is not None and (step or 0) not in self._logged_steps(key)
            }
            mlflow.log_metrics(defined, step=step)

        self._attempt(log)

    def log_figure(self, figure: Figure, path: str) -> None:
        """A picture, under that path of the run's artifacts."""
        self._attempt(lambda: mlflow.log_figure(figure, path))

    def log_file(self, path: str | Path, folder: str) -> None:
        """A file, in that folder of the run's artifacts."""
        self._attempt(lambda: mlflow.log_artifact(str(path), folder))

    def warn(self, stage: str, warnings: Sequence[str]) -> None:
        """Warnings: said on stderr, and kept as the run's tag `warnings.STAGE`."""
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        if warnings:
            self._attempt(lambda: mlflow.set_tag(f"warnings.{stage}", "; ".join(warnings)))

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

        def log() -> None:
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
            mlflow.log_input(data, context=context, tags=tags)

        self._attempt(log)

    def log_model(self, path: str | Path, class_names: Sequence[str]) -> None:
        """The model file as a servable model, a new version of the registered model `cnnpipe`.

        It takes the bytes of image files and needs nothing from this repository. A model file that
        the run has registered already is not registered again.
        """
        self._attempt(lambda: _register(self.id, Path(path), class_names))

    def _logged_steps(self, key: str) -> set[int]:
        if self._steps is None:
            return set()
        if key not in self._steps:
            points = mlflow.MlflowClient().get_metric_history(self.id, key)
            self._steps[key] = {point.step for point in points}
        return self._steps[key]

    def _attempt(self, log: Callable[[], object]) -> None:
        try:
            # An exception in the middle of a transaction would leave the store locked.
            with signals_held():
                log()
        except (MlflowException, requests.RequestException, OSError) as error:
            if not self._warned:
                reason = " ".join(str(error).split())[:300]
                print(f"warning: MLflow does not take what is logged: {reason}", file=sys.stderr)
            self._warned = True


@contextmanager
def start_run(name: str, tags: dict[str, str], run_id: str = "") -> Iterator[Run]:
    """A new run, named after the DVC experiment where there is one, else as told.

    It ends FINISHED, or KILLED where the block was interrupted, or FAILED.

    Args:
        name: of the run.
        tags: of the run, besides those that say what made it.
        run_id: of the run to go on with, where this tracker still has it.

    Raises:
        RunFailed: the tracker cannot be reached.
    """
    experiment_id = _connect()
    if run_id and _active_run_id(mlflow.MlflowClient(), run_id):
        active = mlflow.start_run(run_id=run_id, log_system_metrics=True)
        with _ending(active, resumed=True) as run:
            yield run
        return
    active = mlflow.start_run(
        experiment_id=experiment_id,
        run_name=os.environ.get("DVC_EXP_NAME", name),
        tags={**_origin_tags(), **tags},
        log_system_metrics=True,
    )
    with _ending(active) as run:
        yield run


@contextmanager
def reopen_run(run_id: str, name: str) -> Iterator[Run]:
    """The run that trained a model, open again; where it is gone, one that takes its place.

    A run that was deleted, or that this tracker never had, is replaced by a new one with the tag
    `recovered_from`; the next time that one is found again.

    Raises:
        RunFailed: the tracker cannot be reached.
    """
    experiment_id = _connect()
    client = mlflow.MlflowClient()
    found = _active_run_id(client, run_id)
    if not found:
        recovered = client.search_runs(
            [experiment_id], f"tags.recovered_from = '{run_id}'", max_results=1
        )
        found = recovered[0].info.run_id if recovered else None
    if not found:
        print(f"warning: MLflow has no run {run_id}, a new one takes its place", file=sys.stderr)
        with start_run(name, {"recovered_from": run_id}) as run:
            yield run
        return
    with _ending(mlflow.start_run(run_id=found, log_system_metrics=False)) as run:
        yield run


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


def prepare_store() -> str:
    """Makes the default store and the experiment where they are missing; the store's URI.

    Raises:
        RunFailed: the tracker cannot be reached.
    """
    _connect()
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


def _connect() -> str:
    """Points MLflow to its store; the experiment's id."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or local_store()
    if urlsplit(uri).scheme in ("http", "https"):
        try:
            requests.get(uri.rstrip("/") + "/health", timeout=10).raise_for_status()
        except requests.RequestException as error:
            raise RunFailed(
                f"MLFLOW_TRACKING_URI = {uri}: no MLflow server answers there: "
                f"{type(error).__name__}; start one with `cnnpipe up`, or unset the variable"
            ) from None
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        # Several processes that make a database's tables at once get in each other's way.
        with _lock():
            experiment = mlflow.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                # Fixed here for good: artifacts of the local store are written to the same folder
                # with and without a server in between.
                location = local_artifacts().as_uri() if uri == local_store() else None
                return str(mlflow.create_experiment(EXPERIMENT, artifact_location=location))
            if experiment.lifecycle_stage == "deleted":
                raise UserError(
                    f"{uri}: the MLflow experiment {EXPERIMENT!r} was deleted: restore it with "
                    f"`mlflow experiments restore -x {experiment.experiment_id}`"
                )
            return str(experiment.experiment_id)
    except (MlflowException, OSError) as error:
        raise RunFailed(
            f"the MLflow store {uri} cannot be used: {' '.join(str(error).split())[:200]}"
        ) from None


@contextmanager
def _lock() -> Iterator[None]:
    path = repository_root() / ".cnnpipe" / "mlflow.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _ending(active: mlflow.ActiveRun, resumed: bool = False) -> Iterator[Run]:
    status = RunStatus.FAILED
    try:
        yield Run(active, resumed)
        status = RunStatus.FINISHED
    except KeyboardInterrupt:
        status = RunStatus.KILLED
        raise
    finally:
        with suppress(MlflowException, requests.RequestException), signals_held():
            mlflow.end_run(RunStatus.to_string(status))


def _active_run_id(client: mlflow.MlflowClient, run_id: str) -> str | None:
    try:
        run = client.get_run(run_id)
    except MlflowException:
        return None
    return run_id if run.info.lifecycle_stage == "active" else None


def _origin_tags() -> dict[str, str]:
    """What made the run: the commit, the experiment, the flow, the machine."""
    tags = {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": "true" if _git("status", "--porcelain", "--untracked-files=no") else "false",
        "dvc_experiment": os.environ.get("DVC_EXP_NAME", ""),
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
    checksum = digest(path)
    for version in client.search_model_versions(f"run_id = '{run_id}'"):
        if version.tags.get("model_digest") == checksum:
            return
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    outputs = [ColSpec(DataType.string, "prediction")]
    outputs += [ColSpec(DataType.double, f"probability_{name}") for name in class_names]
    package = Path(cnnpipe.__file__).parent
    with warnings.catch_warnings():
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
            registered_model_name=MODEL_NAME,
        )
    version = info.registered_model_version
    client.set_model_version_tag(MODEL_NAME, str(version), "model_digest", checksum)


def _requirements() -> list[str]:
    """What a prediction needs, in the versions that are installed."""
    names = ("mlflow", "numpy", "pandas", "pillow", "pydantic", "ruamel.yaml", "safetensors",
             "scikit-image", "scipy", "simplejpeg", "torch")  # fmt: skip
    # A local label such as +cpu names a build that a package index may not have.
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in names]
