"""Sweeps for real: trials side by side, failures that stop nothing, going on where one stood."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import optuna
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.trial import TrialState
from prefect.client.orchestration import SyncPrefectClient
from pydantic import TypeAdapter, ValidationError

from cnnpipe.errors import UserError
from flows import sweep as module
from flows.sweep import Range, Space

Call = Callable[..., CompletedProcess[str]]
RUN = """
import json, sys
from flows.sweep import sweep
state = sweep(**json.loads(sys.argv[1]), return_state=True)
print("ENDED", json.dumps([state.name, state.message, str(state.state_details.flow_run_id)]))
"""


@pytest.fixture(scope="module")
def sweep(fork: Call, prefect: SyncPrefectClient) -> Callable[..., Any]:
    """Runs a sweep; its state, message and artifacts."""

    def run(**parameters: Any) -> tuple[str, str, dict[str, str]]:
        done = fork(RUN, json.dumps(parameters))
        found = re.search("^ENDED (.*)$", done.stdout, re.MULTILINE)
        assert found, done.stdout
        state, message, flow_run = json.loads(found[1])
        artifacts = prefect._client.post(
            "/artifacts/filter", json={"artifacts": {"flow_run_id": {"any_": [flow_run]}}}
        ).json()
        return state, message, {artifact["key"]: artifact["data"] for artifact in artifacts}

    return run


def runs(project: Path) -> dict[str, Run]:
    """MLflow's runs by name."""
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("cnnpipe")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


GRID = {
    "name": "sizes",
    "space": {"model.filters": [3, 4], "model.kernel_size": [3, 14]},
    "at_once": 2,
}


def test_a_grid_runs_all_combinations_and_a_failure_stops_nothing(
    project: Path, call: Call, sweep: Callable[..., Any]
) -> None:
    state, message, artifacts = sweep(**GRID)
    assert state == "Completed"
    assert re.fullmatch(r"best of 4: sizes-00\d, val_accuracy 0\.\d{4}; 2 failed", message)
    found = runs(project)
    assert set(found) == {"sizes", *(f"sizes-00{n}" for n in range(4))}
    parent = found.pop("sizes")
    assert (parent.info.status, parent.data.params["search"]) == ("FINISHED", "grid")
    assert {run.data.tags["mlflow.parentRunId"] for run in found.values()} == {parent.info.run_id}
    tried = {
        (run.data.params["model.filters"], run.data.params["model.kernel_size"]): run.info.status
        for run in found.values()
    }
    assert tried == {
        ("3", "3"): "FINISHED",
        ("4", "3"): "FINISHED",
        ("3", "14"): "FAILED",
        ("4", "14"): "FAILED",
    }
    failed = next(run for run in found.values() if run.info.status == "FAILED")
    assert failed.data.tags["failure"].startswith("params.yaml: convolution: ")
    best = max(
        (run for run in found.values() if run.info.status == "FINISHED"),
        key=lambda run: run.data.metrics["val/accuracy"],
    )
    assert parent.data.metrics["best/val_accuracy"] == best.data.metrics["val/accuracy"]
    rows = artifacts["leaderboard"].splitlines()
    assert rows[2].startswith("| experiment | model.filters | model.kernel_size | val_accuracy |")
    assert rows[4].startswith(f"| {message.split()[3].strip(',')} |")
    assert best.info.run_id in artifacts["leaderboard"]
    assert [row.split(" | ")[3] for row in rows[6:]] == ["failed", "failed"]
    for name in call("dvc", "exp", "list", "--name-only").stdout.split():
        assert name in artifacts["dvc-exp-show"]


def test_a_sweep_of_the_same_name_goes_on_and_repeats_nothing(
    project: Path, sweep: Callable[..., Any]
) -> None:
    before = runs(project)
    state, message, artifacts = sweep(
        **{**GRID, "space": {"model.filters": [3, 4, 5], "model.kernel_size": [3, 14]}}
    )
    assert state == "Completed"
    assert message.startswith("best of 6: ")
    assert set(runs(project)) - set(before) == {"sizes-004", "sizes-005"}
    assert artifacts["leaderboard"].count("| sizes-00") == 6


def test_what_was_at_work_when_a_sweep_was_killed_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STUDIES", tmp_path)
    distributions = module._distributions({"model.filters": [3, 4]}, "optuna")
    study = module._study("cut", "optuna", "val_loss", 0)
    done, killed = module._ask(study, distributions), module._ask(study, distributions)
    study.tell(done, 0.5)
    again = module._study("cut", "optuna", "val_loss", 0)
    assert module._is_left(again, "optuna", 1)
    once_more = module._ask(again, distributions)
    assert once_more.user_attrs == {"changes": killed.params, "experiment": "cut-001"}
    others = module._distributions({"model.filters": [3, 5]}, "optuna")
    with pytest.raises(UserError, match="the sweep cut was begun with another space"):
        module._ask(again, others)
    with pytest.raises(UserError, match="the sweep cut was begun by val_loss"):
        module._study("cut", "optuna", "val_accuracy", 0)


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_a_search_asks_for_as_many_trials_as_were_wanted_within_the_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search: str
) -> None:
    monkeypatch.setattr(module, "STUDIES", tmp_path)
    space: Space = {
        "train.learning_rate": Range(low=1e-4, high=1e-2, log=True),
        "model.filters": Range(low=2, high=30),
        "train.optimizer": ["adam", "sgd"],
    }
    distributions = module._distributions(space, search)
    study = module._study("some", search, "val_accuracy", 0)
    tried = []
    while module._is_left(study, search, 25):
        trial = module._ask(study, distributions)
        tried.append(trial.params)
        if trial.number % 5 == 4:
            trial.set_user_attr("reason", "failed")
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, -abs(trial.params["model.filters"] - 20))
    assert len(tried) == 25
    assert all(1e-4 <= params["train.learning_rate"] <= 1e-2 for params in tried)
    assert all(type(params["model.filters"]) is int for params in tried)
    assert {params["train.optimizer"] for params in tried} == {"adam", "sgd"}
    assert isinstance(
        study.sampler,
        optuna.samplers.TPESampler if search == "optuna" else optuna.samplers.RandomSampler,
    )
    rows = module._rows(study)
    assert rows[0].score == max(row.score for row in rows if row.score is not None)
    assert [row.score for row in rows[20:]] == [None] * 5


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "space is empty"),
        ({"model.filter": [1]}, "model.filter is no setting"),
        ({"promote.alpha": [0.1]}, "promote.alpha is no setting"),
        ({"model.filters": []}, "model.filters has no values"),
        ({"model.filters": Range(low=1, high=2)}, "model.filters is a range: a grid takes lists"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(space: Space, message: str) -> None:
    with pytest.raises(UserError, match=message):
        module._distributions(space, "grid")


@pytest.mark.parametrize(
    "wrong",
    [
        {"low": 2, "high": 1},
        {"low": 0, "high": 1, "log": True},
        {"low": 1},
        {"low": 1, "high": 2, "step": 1},
    ],
)  # fmt: skip
def test_a_range_that_is_none_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Range).validate_python(wrong)
