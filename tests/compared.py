"""Runs to compare, made up: what each says of its test images is drawn from a seed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from cnnpipe.evaluation.comparison import Run
from cnnpipe.evaluation.intervals import wilson_interval


def predictions(
    labels: Sequence[str], said: Sequence[str], first: int = 0, folder: str = "test"
) -> pd.DataFrame:
    """Of images whose SHA-256 are numbers from `first` on."""
    numbers = range(first, first + len(labels))
    return pd.DataFrame(
        {
            "path": [f"{folder}/{i}.png" for i in numbers],
            "label": list(labels),
            "sha256": [f"{i:064x}" for i in numbers],
            "prediction": list(said),
        }
    )


def make_run(
    number: int = 0,
    right: str = "1101",
    name: str = "",
    test_hash: str = "a",
    params: Mapping[str, Any] | None = None,
    table: pd.DataFrame | None = None,
    **metrics: float,
) -> Run:
    """A run that is right on the images that have a 1; each is a cat, and else called a dog."""
    if table is None:
        said = ["cat" if hit == "1" else "dog" for hit in right]
        table = predictions(["cat"] * len(right), said)
    hits = int((table["label"] == table["prediction"]).sum())
    low, high = wilson_interval(hits, len(table))
    epochs = np.arange(1, 6)
    history = pd.DataFrame(
        {
            "train/loss": 1 / epochs**1.2,
            "val/loss": 1 / epochs + 0.01 * number,
            "val/accuracy": hits / len(table) * (1 - 0.5 / epochs),
        },
        index=epochs,
    )
    return Run(
        id=f"{number:032x}",
        name=name or f"run {number}",
        params={name: str(value) for name, value in (params or {}).items()},
        metrics={
            "test/accuracy": hits / len(table), "test/accuracy_low": low,
            "test/accuracy_high": high, "test/f1": hits / len(table), "test/log_loss": 0.5,
            "test/num_images": len(table), "model/parameters": 1000.0 * (number + 1),
            "train/seconds": 3.0 + number % 7, **metrics,
        },
        test_hash=test_hash, predictions=table, history=history,
    )  # fmt: skip


def many_runs(num_runs: int, class_names: Sequence[str], num_images: int = 300) -> list[Run]:
    """Runs of all sorts of accuracies on the same images."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.resize(np.array(class_names, object), num_images))
    runs = []
    for number in range(num_runs):
        wrong = rng.random(num_images) < 0.05 + 0.4 * number / num_runs
        said = np.where(wrong, rng.permutation(labels), labels)
        params = {"base.seed": number, "model.filters": 2 ** (number % 5), "train.epochs": number}
        runs.append(make_run(number, params=params, table=predictions(labels, said)))
    return runs
