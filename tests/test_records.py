"""What MLflow has of the runs is found and read as it is."""

import socket
from pathlib import Path

import mlflow
import pytest

from cnnpipe import mlflow_store, records, tracking
from cnnpipe.errors import RunFailed, UserError

pytestmark = pytest.mark.usefixtures("in_store")


def client() -> mlflow.MlflowClient:
    return mlflow.MlflowClient(mlflow_store.address())


def evaluated(name: str, accuracy: float | None = 0.5, **metrics: float) -> str:
    """The id of a run of that name; it was evaluated unless its accuracy is None."""
    with tracking.start_run(name, {}) as run:
        run.log_params({"model.filters": 20})
        run.log_metrics({"test/accuracy": accuracy, **metrics})
    return run.id


def test_runs_are_found_by_id_beginning_name_and_experiment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = evaluated("found by 'name\" 😀")
    monkeypatch.setenv("DVC_EXP_NAME", "sunny-lyre")
    second = evaluated("")
    client().update_run(second, name="renamed since")
    for names, expected in [
        ([first], [first]), ([first[:6]], [first]), (["found by 'name\" 😀"], [first]),
        (["sunny-lyre"], [second]), (["renamed since", second[:9], first], [second, first]),
    ]:  # fmt: skip
        assert [run.id for run in records.find_runs(names)] == expected
    (found,) = records.find_runs([first])
    assert (found.name, found.params, found.metrics) == (
        "found by 'name\" 😀", {"model.filters": "20"}, {"test/accuracy": 0.5},
    )  # fmt: skip


def test_the_last_evaluated_runs_are_found_and_no_others() -> None:
    evaluated("only trained", None)
    gone = evaluated("deleted")
    there = [evaluated("last", accuracy) for accuracy in (0.0, 0.9, 0.1)]
    client().delete_run(gone)
    evaluated("only trained", None)
    assert [run.id for run in records.find_runs([], most=3)] == there[::-1]
    assert gone not in [run.id for run in records.find_runs([], most=10_000)]


def test_a_run_that_cannot_be_compared_is_named_with_the_reason() -> None:
    twins = [evaluated("twin"), evaluated("twin")]
    gone = evaluated("gone")
    client().delete_run(gone)
    evaluated("trained", None)
    for name, message in [
        ("nobody", "nobody: no such run: name it by its id"),
        (twins[0][:5], "no such run"),
        ("%", "no such run"),
        ("twin", f"twin: 2 runs fit: name one by its id, {twins[1][:12]} or {twins[0][:12]}"),
        ("gone", f"gone: the run was deleted: `mlflow runs restore --run-id {gone}`"),
        ("trained", "trained: the run was not evaluated"),
    ]:
        with pytest.raises(UserError) as error:
            records.find_runs([name])
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_a_beginning_that_several_ids_have_is_ambiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    run = mlflow.entities.Run(
        mlflow.entities.RunInfo("a" * 32, "1", "me", "FINISHED", 0, 0, "active", run_name="x"),
        mlflow.entities.RunData([mlflow.entities.Metric("test/accuracy", 0.5, 0, 0)]),
    )
    other = mlflow.entities.Run(
        mlflow.entities.RunInfo("a" * 31 + "b", "1", "me", "FINISHED", 0, 0, "active"), run.data
    )
    with pytest.raises(UserError, match="aaaaaaa: 2 runs fit"):
        records._named("aaaaaaa", [run, other])
    assert records._named("a" * 32, [run, other]) is run


def test_where_there_is_no_store_yet_none_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no evaluated run yet: run `dvc repro`"):
        records.find_runs([])
    with pytest.raises(UserError, match="x: no such run"):
        records.find_runs(["x"])
    assert list(tmp_path.iterdir()) == []


def test_reading_runs_changes_nothing_in_the_store(store: Path) -> None:
    run_id = evaluated("read", **{"val/loss": 1.0})
    before = client().get_run(run_id).to_dictionary()
    records.find_runs([run_id])
    records.read_history(run_id, ["val/loss"])
    assert records.read_predictions(run_id) is None
    assert client().get_run(run_id).to_dictionary() == before


def test_older_runs_have_their_time_by_epoch_alone() -> None:
    with tracking.start_run("x", {}) as run:
        for epoch, seconds in ((1, 2.0), (2, 3.0)):
            run.log_metrics({"train/seconds_per_epoch": seconds, "val/loss": 1 / epoch}, step=epoch)
        run.log_metrics({"val/accuracy": 0.5}, step=2)
        run.log_metrics({"test/accuracy": 0.5})
    (found,) = records.find_runs([run.id])
    assert found.metrics["train/seconds"] == 5
    history = records.read_history(run.id, ["val/loss", "val/accuracy", "train/loss"])
    assert history.index.tolist() == [1, 2]
    assert history["val/loss"].tolist() == [1, 0.5]
    assert history["val/accuracy"].dropna().tolist() == [0.5]
    assert history["train/loss"].isna().all()
    assert evaluated("newer", **{"train/seconds": 7.0, "train/seconds_per_epoch": 1.0})
    assert records.find_runs([], most=1)[0].metrics["train/seconds"] == 7


def test_predictions_are_read_as_the_text_they_are(tmp_path: Path) -> None:
    file = tmp_path / "predictions.csv"
    file.write_text("path,label,sha256,prediction,probability_NA\n1,NA,0012,None,0.5\n")
    with tracking.start_run("x", {}) as run:
        run.log_file(file, "test")
    table = records.read_predictions(run.id)
    assert table is not None
    assert table.to_dict("records") == [
        {"path": "1", "label": "NA", "sha256": "0012", "prediction": "None"}
    ]
    file.write_text("nonsense\n1,2\n")
    with tracking.start_run("x", {}) as run:
        run.log_file(file, "test")
    assert records.read_predictions(run.id) is None


def test_a_tracker_that_is_away_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(RunFailed, match="no MLflow server answers there") as error:
        records.find_runs([])
    assert "\n" not in str(error.value)
