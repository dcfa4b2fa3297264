"""Sweeps in MLflow: a run for the whole, and the runs of its trials as children below it."""

from collections.abc import Mapping
from typing import Any

from cnnpipe.mlflow_store import connect, process_tag, reading

# isort: split
import mlflow
from mlflow.entities import Metric, Param
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

_NAME = "sweep"
"""A tag of the run of the whole: what the sweep is called."""


def begin(name: str, params: Mapping[str, Any]) -> tuple[str, str]:
    """The sweep's run, the one of that name where there is one; its id and its experiment's.

    Raises:
        UserError: the experiment was deleted.
        RunFailed: the tracker cannot be reached.
    """
    experiment_id = connect()
    client = mlflow.MlflowClient()
    with reading():
        found = client.search_runs([experiment_id], f"tags.{_NAME} = '{name}'", max_results=1)
        run = found[0] if found else client.create_run(experiment_id, None, {_NAME: name}, name)
        client.update_run(run.info.run_id, "RUNNING")
        values = {key: str(value)[:6000] for key, value in params.items()}
        known = run.data.params
        # What a sweep is asked for may grow; a parameter of MLflow's cannot.
        fresh = [Param(key, value) for key, value in values.items() if key not in known]
        client.log_batch(run.info.run_id, params=fresh)
        tags = {f"{_NAME}.{key}": value for key, value in values.items()}
        for key, value in {**tags, **process_tag()}.items():
            client.set_tag(run.info.run_id, key, value)
    return run.info.run_id, experiment_id


def end(run_id: str, status: str, metrics: Mapping[str, float] | None = None) -> None:
    """Ends the sweep's run as FINISHED, FAILED or KILLED, with what was found.

    Raises:
        RunFailed: the tracker cannot be reached.
    """
    client = mlflow.MlflowClient()
    with reading():
        run = client.get_run(run_id)
        points = [Metric(key, value, run.info.start_time, 0) for key, value in
                  (metrics or {}).items()]  # fmt: skip
        client.log_batch(run_id, metrics=points)
        client.set_terminated(run_id, status)


def adopt(parent: str, run_id: str) -> None:
    """Makes a run that was restored from DVC's cache a child, unless it is another sweep's.

    Raises:
        RunFailed: the tracker cannot be reached.
    """
    client = mlflow.MlflowClient()
    with reading():
        if MLFLOW_PARENT_RUN_ID not in client.get_run(run_id).data.tags:
            client.set_tag(run_id, MLFLOW_PARENT_RUN_ID, parent)


def record_failure(parent: str, name: str, params: Mapping[str, Any], reason: str) -> None:
    """Makes sure that a trial that failed is there, with the reason.

    Raises:
        RunFailed: the tracker cannot be reached.
    """
    client = mlflow.MlflowClient()
    with reading():
        experiment_id = client.get_run(parent).info.experiment_id
        found = client.search_runs(
            [experiment_id], f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}' AND "
            f"attributes.run_name = '{name}'", max_results=1,
        )  # fmt: skip
        if found:
            run = found[0]
        else:  # it failed before its training began
            tags = {MLFLOW_PARENT_RUN_ID: parent, "dvc_experiment": name}
            run = client.create_run(experiment_id, None, tags, name)
            values = [Param(key, str(value)) for key, value in params.items()]
            client.log_batch(run.info.run_id, params=values)
        client.set_tag(run.info.run_id, "failure", reason[:5000])
        client.set_terminated(run.info.run_id, "FAILED")
