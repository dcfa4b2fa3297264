"""Searching the settings: many experiments, some at a time, and a table of the best."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, as_completed
from prefect.states import Completed, Failed, State
from pydantic import BaseModel, ConfigDict, Field, model_validator

from cnnpipe import sweeps
from cnnpipe.errors import RunFailed, UserError
from cnnpipe.params import Params, load
from cnnpipe.tracking import PARENT_VARIABLE
from flows import commands
from flows.artifacts import Outputs, mlflow_url
from flows.pipeline import PARAMS, uses_gpu
from flows.reproduction import STAGES, Reproduction
from flows.settings import Settings, options

STUDIES = Path(".cnnpipe/sweeps")

Value = bool | int | float | str | None


class Range(BaseModel):
    """All numbers from low to high, both included."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    low: int | float
    high: int | float
    log: bool = Field(False, description="Search by factors, not by differences.")

    @model_validator(mode="after")
    def _ordered(self) -> "Range":
        if self.low >= self.high:
            raise ValueError(f"low = {self.low} must be less than high = {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low = {self.low} must be more than 0 where log is true")
        return self


Name = Annotated[str, Field(pattern="^[a-z0-9][a-z0-9-]{0,39}$")]
Space = dict[str, list[Value] | Range]


@dataclass(frozen=True)
class Row:
    """A trial in the table of the best."""

    experiment: str
    changes: Mapping[str, Any]
    score: float | None
    reason: str
    found: Mapping[str, Any]


@task(task_run_name="{name}", cache_policy=NO_CACHE)
def run_trial(
    name: str, changes: dict[str, Any], parent: str, live: list[Reproduction]
) -> State[Any]:
    """One experiment, its output in the task's log; the state's data is what came of it."""
    logger = get_run_logger()
    try:
        params = load(PARAMS, changes)
    except UserError as error:
        sweeps.record_failure(parent, name, changes, str(error))
        return Failed(message=str(error))
    arguments = ["exp", "run", "--temp", "--name", name, *options(changes)]
    environment = {PARENT_VARIABLE: parent}
    verdicts = []
    with Reproduction(arguments, uses_gpu(params), **environment) as reproduction:
        live.append(reproduction)
        reproduction.start()
        for stage in STAGES:
            for line in reproduction.stage(stage):
                logger.info(line)
            if reproduction.code or not reproduction.verdict:
                reason = reproduction.reason
                if not reproduction.stopped:
                    sweeps.record_failure(parent, name, changes, reason)
                return Failed(message=reason)
            verdicts.append(reproduction.verdict)
    found = _found(name)
    if verdicts[STAGES.index("train")] != "Completed":
        sweeps.adopt(parent, found["run_id"])
    return Completed(
        name="Completed" if "Completed" in verdicts else "Restored",
        message=f"validation accuracy {found['val_accuracy']:.4f}",
        data=found,
    )


@flow(name="sweep")
def sweep(
    name: Name,
    space: Space,
    search: Literal["grid", "random", "optuna"] = "grid",
    trials: Annotated[int, Field(ge=1, le=10_000)] = 20,
    at_once: Annotated[int, Field(ge=1, le=64)] = 1,
    metric: Literal["val_accuracy", "val_loss"] = "val_accuracy",
    settings: Settings = Settings(),  # noqa: B008 - what the form shows, and never changed
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42,
) -> State[Any]:
    """Tries settings, each a DVC experiment and an MLflow run below the sweep's own.

    A trial that fails is recorded and stops nothing. A sweep of the same name goes on where it
    stood: what has been tried is not tried again. The test split has no say in what is best.

    Args:
        name: What the sweep is called: small letters, digits and hyphens.
        space: What to try, such as {"model.filters": [5, 10, 20], "train.learning_rate": {"low":
            0.0001, "high": 0.01, "log": true}}; a grid takes lists only.
        search: All combinations, random ones, or those that Optuna finds promising.
        trials: How many, for random and optuna; a grid has as many as it has combinations.
        at_once: How many trials run at the same time.
        metric: What is best, of the epoch that was kept.
        settings: What else is to differ from params.yaml, in all trials.
        seed: Of the search.
    """
    try:
        distributions = _distributions(space, search)
        study = _study(name, search, metric, seed)
        asked = {"space": json.dumps(_plain(space)), "search": search, "metric": metric}
        parent, experiment_id = sweeps.begin(name, asked)
    except (UserError, RunFailed) as error:
        return Failed(message=str(error))
    create_link_artifact(
        mlflow_url(parent, experiment_id), link_text=f"MLflow run of {name}", key="mlflow-run"
    )
    if search == "grid":
        lists = [values for values in space.values() if isinstance(values, list)]
        for combination in itertools.product(*lists):
            _enqueue(study, dict(zip(space, combination, strict=True)))
    live: list[Reproduction] = []
    running: dict[PrefectFuture[Any], optuna.Trial] = {}
    try:
        while True:
            while len(running) < at_once and _is_left(study, search, trials):
                trial = _ask(study, distributions)
                changes = {**settings.changes(), **trial.user_attrs["changes"]}
                experiment = trial.user_attrs["experiment"]
                running[run_trial.submit(experiment, changes, parent, live)] = trial
            if not running:
                break
            _tell(study, *_next(running), metric)
    except UserError as error:
        sweeps.end(parent, "FAILED")
        return Failed(message=str(error))
    except BaseException:  # a cancelled sweep is no reason to leave trainings running
        for reproduction in live:
            reproduction.stop()
        sweeps.end(parent, "KILLED")
        raise
    rows = _rows(study)
    _show(name, rows, metric, experiment_id)
    best = rows[0] if rows and rows[0].score is not None else None
    if best is None or best.score is None:
        sweeps.end(parent, "FAILED")
        return Failed(message="no trial has succeeded")
    sweeps.end(parent, "FINISHED", {f"best/{metric}": best.score})
    failures = sum(row.score is None for row in rows)
    return Completed(
        message=f"best of {len(rows)}: {best.experiment}, {metric} {best.score:.4f}"
        + (f"; {failures} failed" if failures else "")
    )


def _distributions(space: Space, search: str) -> dict[str, BaseDistribution]:
    """Of what is to be searched; none for a grid, whose combinations are all known.

    Raises:
        UserError: the space cannot be searched so.
    """
    if not space:
        raise UserError("space is empty: name settings to try")
    known = Params().flat()
    found: dict[str, BaseDistribution] = {}
    for name, values in space.items():
        if name not in known or name.startswith("promote."):
            raise UserError(f"space: {name} is no setting of params.yaml's stages")
        if isinstance(values, list) and not values:
            raise UserError(f"space: {name} has no values to try")
        elif search == "grid" and isinstance(values, list):
            continue
        elif isinstance(values, list):
            found[name] = CategoricalDistribution(values)
        elif search == "grid":
            raise UserError(f"space: {name} is a range: a grid takes lists; search=random does not")
        elif isinstance(values.low, int) and isinstance(values.high, int):
            found[name] = IntDistribution(values.low, values.high, log=values.log)
        else:
            found[name] = FloatDistribution(values.low, values.high, log=values.log)
    return found


def _study(name: str, search: str, metric: str, seed: int) -> optuna.Study:
    """The sweep's record, where there is one with what was tried.

    Raises:
        UserError: it was begun with another metric.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    STUDIES.mkdir(parents=True, exist_ok=True)
    sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    study = optuna.create_study(
        study_name=name,
        storage=JournalStorage(JournalFileBackend(str(STUDIES / f"{name}.log"))),
        sampler=sampler if search == "optuna" else optuna.samplers.RandomSampler(seed=seed),
        direction="minimize" if metric == "val_loss" else "maximize",
        load_if_exists=True,
    )
    if (before := study.user_attrs.setdefault("metric", metric)) != metric:
        raise UserError(f"the sweep {name} was begun by {before}: give this one another name")
    study.set_user_attr("metric", metric)
    # Those that were at work when the sweep was stopped are to be tried again.
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        study.tell(trial.number, state=TrialState.FAIL)
        if "experiment" in trial.user_attrs:  # under the name that its training has in MLflow
            study.enqueue_trial(trial.user_attrs["changes"], user_attrs=trial.user_attrs)
    return study


def _enqueue(study: optuna.Study, changes: dict[str, Any]) -> None:
    study.enqueue_trial(changes, user_attrs={"changes": changes}, skip_if_exists=True)


def _ask(study: optuna.Study, distributions: dict[str, BaseDistribution]) -> optuna.Trial:
    """The next trial, with the settings that it tries and the name of its experiment.

    Raises:
        UserError: the sweep was begun with other values for a setting.
    """
    try:
        trial = study.ask(distributions)
    except ValueError as error:
        raise UserError(
            f"the sweep {study.study_name} was begun with another space, give this one another "
            f"name: {error}"
        ) from None
    if distributions:
        trial.set_user_attr("changes", trial.params)
    if "experiment" not in trial.user_attrs:
        trial.set_user_attr("experiment", f"{study.study_name}-{trial.number:03d}")
    return trial


def _is_left(study: optuna.Study, search: str, trials: int) -> bool:
    if search == "grid" or study.get_trials(states=[TrialState.WAITING]):
        return bool(study.get_trials(states=[TrialState.WAITING]))
    running = study.get_trials(states=[TrialState.RUNNING])
    return len(_rows(study)) + len(running) < trials


def _next(
    running: dict[PrefectFuture[Any], optuna.Trial],
) -> tuple[optuna.Trial, State[Any]]:
    """The first trial that ends, and how; it is running no more."""
    future = next(as_completed(list(running)))
    future.wait()
    return running.pop(future), future.state


def _tell(study: optuna.Study, trial: optuna.Trial, state: State[Any], metric: str) -> None:
    if not state.is_completed():
        trial.set_user_attr("reason", state.message or "failed")
        study.tell(trial, state=TrialState.FAIL)
        return
    found = state.result()
    trial.set_user_attr("found", found)
    study.tell(trial, found[metric])


def _found(experiment: str) -> dict[str, Any]:
    """What came of an experiment: of the epoch that was kept, and of the test."""
    outputs = Outputs(experiment)
    history = outputs.rows("reports/train/history.csv")
    kept = max(history, key=lambda row: (float(row["val_accuracy"]), -float(row["val_loss"])))
    test = outputs.json("reports/test/metrics.json")
    return {
        **{key: float(kept[key]) for key in ("val_accuracy", "val_loss")},
        **{f"test_{key}": test[key] for key in ("accuracy", "accuracy_low", "accuracy_high")},
        "run_id": outputs.json("reports/test/run.json")["run_id"],
    }


def _rows(study: optuna.Study) -> list[Row]:
    """The trials that have ended, the best first, those that failed last."""
    rows = [
        Row(
            trial.user_attrs["experiment"], trial.user_attrs["changes"], trial.value,
            trial.user_attrs.get("reason", ""), trial.user_attrs.get("found", {}),
        )
        for trial in study.trials
        if trial.state == TrialState.COMPLETE or "reason" in trial.user_attrs
    ]  # fmt: skip
    sign = 1 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1
    return sorted(
        rows, key=lambda row: (row.score is None, sign * (row.score or 0), row.experiment)
    )


def _show(name: str, rows: list[Row], metric: str, experiment_id: str) -> None:
    settings = list(dict.fromkeys(name for row in rows for name in row.changes))
    columns = ["experiment", *settings, metric, "test accuracy", "MLflow"]
    lines = [f"### {name}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        if row.score is None:
            cells = ["failed", row.reason.replace("|", " "), ""]
        else:
            low, high = (row.found[f"test_accuracy_{side}"] for side in ("low", "high"))
            link = mlflow_url(row.found["run_id"], experiment_id)
            cells = [
                f"{row.score:.4f}",
                f"{row.found['test_accuracy']:.4f} ({low:.4f} to {high:.4f})",
                f"[{row.found['run_id'][:12]}]({link})",
            ]
        cells = [row.experiment, *(str(row.changes.get(key, "")) for key in settings), *cells]
        lines.append(f"| {' | '.join(cells)} |")
    create_markdown_artifact("\n".join(lines), key="leaderboard")
    shown = commands.run(
        "dvc", "exp", "show", "--md", "--only-changed", "--drop", "cnnpipe|data|models"
    ).output
    get_run_logger().info("dvc exp show:\n%s", shown)
    create_markdown_artifact(shown, key="dvc-exp-show")


def _plain(space: Space) -> dict[str, Any]:
    return {
        name: values.model_dump() if isinstance(values, Range) else values
        for name, values in space.items()
    }
