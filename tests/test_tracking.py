"""What MLflow is told, and what happens when it is not there."""

import os
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

from cnnpipe import tracking
from cnnpipe.errors import RunFailed, UserError


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(autouse=True)
def _in_store(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(store)
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)


def client() -> mlflow.MlflowClient:
    return mlflow.MlflowClient(tracking.local_store())


def test_a_run_bears_the_experiments_name_and_what_made_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "dusty-dory")
    monkeypatch.setenv("CNNPIPE_FLOW_RUN_ID", "flow-1")
    with tracking.start_run("article", {"device": "cpu"}) as run:
        run.log_params({"model.filters": 20})
        run.log_metrics({"val/loss": 0.5, "test/roc_auc": None}, step=1)
    found = client().get_run(run.id)
    assert found.info.run_name == "dusty-dory"
    assert found.info.status == "FINISHED"
    assert found.data.tags["dvc_experiment"] == "dusty-dory"
    assert found.data.tags["prefect_flow_run"] == "flow-1"
    assert found.data.tags["device"] == "cpu"
    assert found.data.params == {"model.filters": "20"}
    assert found.data.metrics["val/loss"] == 0.5
    assert "test/roc_auc" not in found.data.metrics


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt, "KILLED"), (ValueError, "FAILED")]
)
def test_a_run_that_ends_early_says_how(error: type[BaseException], status: str) -> None:
    with pytest.raises(error), tracking.start_run("x", {}) as run:
        raise error
    assert client().get_run(run.id).info.status == status


def test_an_experiments_workspace_logs_to_the_repositorys_store(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(store))
    monkeypatch.chdir(tmp_path)
    with tracking.start_run("x", {}) as run:
        (tmp_path / "a.txt").write_text("a")
        run.log_file(tmp_path / "a.txt", "files")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"]
    assert list((store / "mlartifacts").rglob("a.txt"))
    assert client().get_run(run.id).info.status == "FINISHED"


def test_a_tracker_that_goes_away_costs_one_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise MlflowException("connection\nrefused")

    with tracking.start_run("x", {}) as run:
        monkeypatch.setattr(mlflow, "log_metrics", fail)
        run.log_metrics({"a": 1.0})
        run.log_metrics({"a": 2.0})
    assert capsys.readouterr().err == (
        "warning: MLflow does not take what is logged: connection refused\n"
    )


def test_a_server_that_does_not_answer_ends_the_run_before_it_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the discard port
    with (
        pytest.raises(RunFailed, match=r"MLFLOW_TRACKING_URI = http://127\.0\.0\.1:9: no MLflow"),
        tracking.start_run("x", {}),
    ):
        pass


def test_data_are_logged_with_digest_and_class_counts() -> None:
    table = pd.DataFrame({"path": ["a", "b", "c"], "label": ["cat", "dog", "cat"]})
    with tracking.start_run("x", {}) as run:
        run.log_data(table, "data/inbox", "folder", "0123456789abcdef", "train")
    (entry,) = client().get_run(run.id).inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("folder", "0123456789abcdef")
    tags = {tag.key: tag.value for tag in entry.tags}
    assert tags["images.cat"] == "2"
    assert tags["images.dog"] == "1"


def test_a_model_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="models:/nothing/1: no such model"):
        tracking.find_model_file("models:/nothing/1")


def test_the_digest_changes_with_the_content_and_the_order(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("1")
    b.write_text("2")
    assert tracking.digest(a, b) != tracking.digest(b, a)
    before = tracking.digest(a, b)
    b.write_text("3")
    assert tracking.digest(a, b) != before


def test_a_deleted_experiment_says_how_to_get_it_back(store: Path) -> None:
    experiment = tracking.prepare_store() and client().get_experiment_by_name(tracking.EXPERIMENT)
    client().delete_experiment(experiment.experiment_id)
    try:
        with pytest.raises(UserError, match="mlflow experiments restore"):
            tracking.prepare_store()
    finally:
        client().restore_experiment(experiment.experiment_id)


def test_telemetry_is_off() -> None:
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["DO_NOT_TRACK"] == "true"
