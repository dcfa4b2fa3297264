"""`cnnpipe predict` for a schedule: what it prints, what MLflow keeps of it, and how it fails."""

import csv
import json
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cnnpipe import cli, mlflow_store, records, tracking
from cnnpipe.errors import UserError
from cnnpipe.outbox import open_outbox, waiting
from cnnpipe.running import shown_address

pytestmark = pytest.mark.usefixtures("in_store")


@pytest.fixture
def champion(store: Path, make_classifier: Any) -> str:
    """A version that nobody has scored with, which is the champion from now on."""
    classifier = make_classifier(seed=len(list(store.iterdir())), class_names=("cat", "big, dog"))
    classifier.save("m.safetensors")
    with tracking.start_run("x", {}) as run:
        run.log_model("m.safetensors", classifier.class_names)
    client = mlflow.MlflowClient()
    number = max(int(found.version) for found in client.search_model_versions(""))
    client.set_registered_model_alias("cnnpipe", "champion", str(number))
    return f"models:/cnnpipe/{number}"


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    for i in range(3):
        picture(inbox / f"{i}.png", i)
    (inbox / "notes.txt").write_text("no image")
    return inbox


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    return tmp_path / "scores.csv"


@pytest.fixture
def nobody(in_store: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An address at which no tracker answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free.getsockname()[1]}")
        yield


def picture(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def predict(*arguments: str | Path) -> int:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["cnnpipe", "predict", *map(str, arguments)])
        cli.main()
    signal.signal(signal.SIGTERM, before)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def scheduled(inbox: Path, scores: Path, model: str = "models:/cnnpipe@champion") -> int:
    return predict(inbox, "--model", model, "--csv", scores, "--update", "--log", "--json")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def logged(run_id: str) -> pd.DataFrame:
    client = mlflow.MlflowClient()
    experiment = client.get_run(run_id).info.experiment_id
    return client.load_table(experiment, "scores.json", [run_id])


def test_a_schedule_gets_json_and_mlflow_what_is_new(
    champion: str, inbox: Path, scores: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert scheduled(inbox, scores) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert captured.out.count("\n") == 1
    predictions = [row["prediction"] for row in rows(scores)]
    experiment = mlflow.get_experiment_by_name("cnnpipe").experiment_id
    assert result == {
        "model": champion,
        "scored": 3,
        "skipped": 0,
        "unreadable": [{"path": f"{inbox}/notes.txt", "reason": "not an image"}],
        "csv": str(scores),
        "run_id": result["run_id"],
        "experiment_id": experiment,
        "classes": {name: predictions.count(name) for name in ("cat", "big, dog")},
    }
    assert {row["model"] for row in rows(scores)} == {champion}
    run = mlflow.get_run(result["run_id"])
    assert (run.info.run_name, run.info.status) == ("scored", "FINISHED")
    assert (run.data.tags["kind"], run.data.tags["model"]) == ("scoring", champion)
    assert run.data.tags["model_sha256"] == rows(scores)[0]["model_sha256"]
    assert run.data.tags["cnnpipe_version"]
    assert run.data.metrics == {
        "scored": 3, "skipped": 0, "unreadable": 1,
        "classes/cat": predictions.count("cat"), "classes/big_ dog": predictions.count("big, dog"),
    }  # fmt: skip
    table = logged(run.info.run_id)
    assert table["path"].tolist() == [row["path"] for row in rows(scores)]
    expected = [float(row["probability_cat"]) for row in rows(scores)]
    # pandas reads a double's last bit wrong, of which a float32 has none.
    np.testing.assert_array_equal(np.float32(table["probability_cat"]), np.float32(expected))
    listed = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/unreadable.csv")
    assert listed == scores.with_name("scores.unreadable.csv").read_text()


def test_the_next_time_only_what_is_new_is_logged_and_nothing_makes_no_run(
    champion: str, inbox: Path, scores: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scheduled(inbox, scores)
    before = len(mlflow.search_runs(experiment_names=["cnnpipe"]))
    capsys.readouterr()
    assert scheduled(inbox, scores) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["scored"], result["skipped"], result["run_id"]) == (0, 3, None)
    assert result["experiment_id"] is None
    assert len(mlflow.search_runs(experiment_names=["cnnpipe"])) == before
    picture(inbox / "new.png", 9)
    assert scheduled(inbox, scores) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["scored"], result["skipped"]) == (1, 3)
    table = logged(result["run_id"])
    assert table["path"].tolist() == [f"{inbox}/new.png"]
    assert len(rows(scores)) == 4


def test_a_scoring_run_is_never_taken_for_an_evaluated_one(
    champion: str, inbox: Path, scores: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    scheduled(inbox, scores)
    run_id = json.loads(capsys.readouterr().out)["run_id"]
    with tracking.start_run("y", {}) as run:
        run.log_metrics({"test/accuracy": 0.5})
    found = records.find_runs([], most=1000)
    assert run.id in [one.id for one in found]
    assert run_id not in [one.id for one in found]
    with pytest.raises(UserError, match="the run was not evaluated"):
        records.find_runs([run_id])


def test_the_champion_of_the_moment_scores(
    champion: str, inbox: Path, scores: Path, make_classifier: Any
) -> None:
    scheduled(inbox, scores)
    make_classifier(seed=99, class_names=("cat", "big, dog")).save("other.safetensors")
    with tracking.start_run("x", {}) as run:
        run.log_model("other.safetensors", ("cat", "big, dog"))
    number = int(champion.rpartition("/")[2]) + 1
    mlflow.MlflowClient().set_registered_model_alias("cnnpipe", "champion", str(number))
    scheduled(inbox, scores)
    assert [row["model"] for row in rows(scores)] == [champion] * 3 + [
        f"models:/cnnpipe/{number}"
    ] * 3


def test_without_a_champion_it_says_what_makes_one(
    champion: str, inbox: Path, scores: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow.MlflowClient().delete_registered_model_alias("cnnpipe", "champion")
    capsys.readouterr()
    assert scheduled(inbox, scores) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("cnnpipe: models:/cnnpipe@champion: no such model: ")
    assert err.endswith("`cnnpipe promote` sets it\n")
    assert err.count("\n") == 1
    for model in ("models:/nothing@champion", "models:/cnnpipe/999", "models:/", "models:/a/b/c"):
        assert predict(inbox, "--model", model) == 2
        assert f"cnnpipe: {model}: no such model" in capsys.readouterr().err


def test_json_is_alone_on_stdout_even_where_older_news_are_sent(
    champion: str, inbox: Path, scores: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_outbox("f" * 32, shown_address(mlflow_store.address())) as outbox:
        outbox.add({"kind": "tag", "key": "late", "value": "yes"})
    capsys.readouterr()
    assert scheduled(inbox, scores) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["scored"] == 3
    assert "sent to MLflow what it had missed" in err


@pytest.mark.usefixtures("nobody")
def test_a_tracker_that_is_away_costs_a_warning_and_not_the_scores(
    inbox: Path, scores: Path, make_classifier: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    make_classifier().save("m.safetensors")
    assert scheduled(inbox, scores, "m.safetensors") == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert (result["model"], result["scored"]) == ("m.safetensors", 3)
    assert (result["run_id"], result["experiment_id"]) == (None, None)
    assert len(rows(scores)) == 3
    assert err.count("warning: ") == 1
    assert "what is logged is kept in .cnnpipe/outbox" in err
    assert waiting()


def test_what_was_kept_back_is_sent_as_a_scoring_run(
    inbox: Path, scores: Path, make_classifier: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    make_classifier().save("m.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "connect", away)
        scheduled(inbox, scores, "m.safetensors")
    assert json.loads(capsys.readouterr().out)["run_id"] is None
    with tracking.start_run("next", {}):
        pass
    found = mlflow.search_runs(
        experiment_names=["cnnpipe"], filter_string="tags.kind = 'scoring'", output_format="list"
    )
    assert [run.data.metrics["scored"] for run in found] == [3]
    table = logged(found[0].info.run_id)
    assert table["path"].tolist() == [row["path"] for row in rows(scores)]


def away(make: bool = True) -> str:
    raise tracking.RunFailed("MLflow is away")


def test_a_deleted_experiment_costs_a_warning_and_not_the_scores(
    inbox: Path, scores: Path, make_classifier: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    make_classifier().save("m.safetensors")
    mlflow_store.prepare_store()
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("cnnpipe").experiment_id
    client.delete_experiment(experiment)
    try:
        assert scheduled(inbox, scores, "m.safetensors") == 0
    finally:
        client.restore_experiment(experiment)
    out, err = capsys.readouterr()
    assert json.loads(out)["run_id"] is None
    assert "mlflow experiments restore" in err and "the scores are not logged" in err
    assert len(rows(scores)) == 3


def test_the_file_of_a_registered_model_does_not_stay_behind(
    champion: str, inbox: Path, scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert scheduled(inbox, scores) == 0
    assert list(temporary.iterdir()) == []


def test_json_also_tells_of_a_table_that_is_made_anew(
    inbox: Path, scores: Path, make_classifier: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    make_classifier().save("m.safetensors")
    assert predict(inbox, "--model", "m.safetensors", "--csv", scores, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["scored"], result["skipped"], result["run_id"]) == (3, 0, None)
    assert list(rows(scores)[0])[:2] == ["path", "prediction"]


@pytest.mark.parametrize("option", ["--update", "--json"])
def test_options_that_need_a_file_say_so(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict("x.png", option) == 2
    assert capsys.readouterr().err.startswith(f"cnnpipe: {option} needs --csv FILE: ")


def test_the_table_is_no_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert predict("x.png", "--csv", "s3://photos/scores.csv") == 2
    said = "cnnpipe: --csv s3://photos/scores.csv: the table is written here: name a file\n"
    assert capsys.readouterr().err == said
    assert not Path("s3:").exists()
