"""A view of the experiment for MLflow's pages, made for sweeps: what differs, and what came of it.

MLflow keeps a view that is shared as a tag of the experiment, and shows it to whoever opens the
experiment's runs with `?viewStateShareKey=sweep&compareRunsMode=CHART`.
"""

import base64
import json
import zlib
from typing import Any

KEY = "mlflow.sharedViewState.sweep"


def view() -> str:
    """The tag's value.

    Source: what the pages of MLflow 3.17 themselves write when a view is shared.
    """
    sections: dict[str, tuple[int, list[dict[str, Any]]]] = {
        "settings and accuracy": (
            2,
            [
                _chart(
                    "PARALLEL",
                    selectedParams=["model.filters", "train.learning_rate", "model/parameters"],
                    selectedMetrics=["test/accuracy"],
                    showAllRuns=True,
                ),
                _chart(
                    "SCATTER",
                    xaxis={"key": "model/parameters", "type": "METRIC"},
                    yaxis={"key": "test/accuracy", "type": "METRIC"},
                ),
            ],
        ),
        "curves": (3, [_curve(key) for key in ("val/accuracy", "val/loss", "train/loss")]),
        "pictures": (
            1,
            [
                _chart("IMAGE", imageKeys=[key], step=0, showRunParams=False)
                for key in ("test/confusion", "test/mistakes", "test/filters", "train/curves")
            ],
        ),
    }
    state = {
        "orderByKey": "metrics.`test/accuracy`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "runsHiddenMode": "FIRST_20_RUNS",
        "hideEmptyCharts": True,
        "isAccordionReordered": True,
        "compareRunSections": [
            {"uuid": name, "name": name, "display": True, "isGenerated": False, "deleted": False,
             "isReordered": False, "columns": columns}
            for name, (columns, _) in sections.items()
        ],
        "compareRunCharts": [
            {**chart, "uuid": f"{name} {i}", "metricSectionId": name}
            for name, (_, charts) in sections.items()
            for i, chart in enumerate(charts)
        ],
        "globalLineChartConfig": {
            "xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""
        },
    }  # fmt: skip
    return "deflate;" + base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()


def _curve(metric: str) -> dict[str, Any]:
    return _chart(
        "LINE",
        metricKey=metric,
        displayName=metric,
        xAxisKey="step",
        xAxisScaleType="linear",
        scaleType="linear",
        range={},
        yAxisKey="metric",
        yAxisExpressions=[],
        useGlobalXaxisKey=True,
        useGlobalLineSmoothing=True,
    )


def _chart(kind: str, **settings: Any) -> dict[str, Any]:
    fixed = {"type": kind, "runsCountToCompare": 20, "deleted": False, "isGenerated": False}
    return {**fixed, **settings}
