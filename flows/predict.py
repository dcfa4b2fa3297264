"""Scoring on a schedule: what is new in a folder or archive, by the champion."""

import json
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed, State

from flows import commands
from flows.artifacts import mlflow_url


@task(task_run_name="score", cache_policy=NO_CACHE)
def score(path: str, csv: str, model: str) -> State[Any]:
    """`cnnpipe predict` of what is new; the state's data is what it says it has done."""
    done = commands.run(
        "cnnpipe", "predict", path, "--model", model, "--csv", csv, "--update", "--log", "--json"
    )
    if done.code:
        return Failed(message=done.reason)
    summary = json.loads(done.output)
    return Completed(
        message=f"{summary['scored']:,} scored, {summary['skipped']:,} known, "
        f"{len(summary['unreadable']):,} unreadable",
        data=summary,
    )


@flow(name="predict")
def predict(
    path: str = "data/unlabelled",
    csv: str = "reports/scores.csv",
    model: str = "models:/cnnpipe@champion",
) -> State[Any]:
    """Classifies the images that this model version has not seen; Skipped where there are none.

    Args:
        path: A folder of images, or a zip or tar archive of them; also s3://bucket/folder.
        csv: The table that grows by a row an image.
        model: A version of a registered model, by number or alias, or a model file.
    """
    if not path.startswith("s3://") and not Path(path).exists():
        return Failed(message=f"{path}: no such file or folder")
    if Path(path).is_dir() and not any(
        file.is_file() for file in Path(path).rglob("[!.]*")
    ):  # before a champion is asked for, which there may not be yet
        return Completed(name="Skipped", message=f"{path} is empty")
    scored: State[Any] = score(path, csv, model, return_state=True)
    if not scored.is_completed():
        return scored
    summary = scored.result()
    show(summary)
    if not summary["scored"]:
        return Completed(name="Skipped", message=scored.message)
    return Completed(message=scored.message)


def show(summary: dict[str, Any]) -> None:
    """What was scored, what could not be read, and where MLflow keeps the table."""
    if summary["run_id"]:
        create_link_artifact(
            mlflow_url(summary["run_id"], summary["experiment_id"]),
            link_text=f"MLflow run {summary['run_id'][:12]}",
            key="mlflow-run",
            description="The new scores as a table.",
        )
    lines = [f"**{summary['scored']:,} images scored** by {summary['model']}", ""]
    lines += ["| class | images |", "|---|---:|"]
    lines += [f"| {name} | {count:,} |" for name, count in summary["classes"].items()]
    if unreadable := summary["unreadable"]:
        lines += ["", f"**{len(unreadable):,} files could not be read**", ""]
        lines += ["| file | reason |", "|---|---|"]
        lines += [f"| {_cell(row['path'])} | {_cell(row['reason'])} |" for row in unreadable[:50]]
    create_markdown_artifact("\n".join(lines), key="scores", description=f"in {summary['csv']}")


def _cell(text: str) -> str:
    return text.replace("|", " ").replace("\n", " ")
