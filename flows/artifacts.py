"""What a flow run shows of its result in Prefect's UI."""

import base64
import csv
import io
import json
import os
from collections import Counter
from typing import Any

from dvc.api import DVCFileSystem
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from cnnpipe import running

_METRICS = {
    "accuracy": "accuracy",
    "accuracy_low": "  at least, with 95 % confidence",
    "accuracy_high": "  at most",
    "f1": "F1, mean of the classes",
    "roc_auc": "area under the ROC curve",
    "log_loss": "log loss",
    "calibration_error": "calibration error",
}


class Outputs:
    """The outputs of the checkout or of an experiment, as DVC has them."""

    def __init__(self, experiment: str | None) -> None:
        self._files = DVCFileSystem(".", rev=experiment)

    def read(self, path: str) -> bytes:
        """A file's content."""
        content: bytes = self._files.read_bytes(path)
        return content

    def json(self, path: str) -> Any:
        """A JSON file's content."""
        return json.loads(self.read(path))

    def rows(self, path: str) -> list[dict[str, str]]:
        """A CSV file's rows."""
        text = self.read(path).decode(errors="replace")
        return list(csv.DictReader(io.StringIO(text, newline="")))


def mlflow_url(run_id: str, experiment_id: str) -> str:
    """Where MLflow shows a run."""
    server = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not server.startswith("http"):
        server = running.mlflow_server()
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"


def show_run(run_id: str, experiment_id: str) -> None:
    """A link to the MLflow run."""
    create_link_artifact(
        mlflow_url(run_id, experiment_id),
        link_text=f"MLflow run {run_id[:12]}",
        key="mlflow-run",
        description="Settings, metrics by epoch, pictures, the report and the model.",
    )


def show_metrics(decision: dict[str, Any]) -> None:
    """The test metrics beside the champion's."""
    sides = {side: (decision[side] or {}).get("metrics", {}) for side in ("candidate", "champion")}
    rows = [
        {
            "test metric": text,
            **{side: _number(values.get(f"test/{key}")) for side, values in sides.items()},
        }
        for key, text in _METRICS.items()
    ]
    rows.append(
        {
            "test metric": "parameters",
            **{
                side: f"{decision[side]['parameters']:,}" if decision[side] else ""
                for side in sides
            },
        }
    )
    create_table_artifact(rows, key="test-metrics", description=decision["said"])


def show_picture(outputs: Outputs) -> None:
    """The report's key picture: what the model takes for what."""
    picture = base64.b64encode(outputs.read("reports/test/confusion.png")).decode()
    create_image_artifact(
        f"data:image/png;base64,{picture}",
        key="confusion",
        description="The test images by class (rows) and prediction (columns).",
    )


def show_quarantine(outputs: Outputs) -> None:
    """How many files were left out, and why."""
    reasons = Counter(row["reason"] for row in outputs.rows("data/resized/quarantine.csv"))
    lines = [f"**{reasons.total():,} files were left out** as no usable images."]
    lines += ["", "| files | reason |", "|---:|---|"] if reasons else []
    lines += [
        f"| {count:,} | {reason.replace('|', ' ')} |" for reason, count in reasons.most_common(20)
    ]
    create_markdown_artifact("\n".join(lines), key="quarantine")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
