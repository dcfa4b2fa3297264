"""The report: one page that says what was run, on which images, and how good the result is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from torch import nn

from cnnpipe.data.store import Images
from cnnpipe.evaluation import figures, pages
from cnnpipe.evaluation.metrics import (
    calibration_bins,
    confident_mistakes,
    confusion,
    mean_roc_curve,
    per_class,
    precision_recall_curves,
    roc_curves,
    unsure_hits,
)
from cnnpipe.network.architectures import layers_of
from cnnpipe.network.classifier import Classifier
from cnnpipe.network.geometry import Convolution
from cnnpipe.network.summary import Summary, size_text
from cnnpipe.params import Params
from cnnpipe.usage import Usage

MOST_FILTERS = 64
"""So many are drawn."""
# What is shown of each kind; the page says how many there are.
_SAMPLES = 200
_APART = 12
_QUARANTINED = 24
_GROUPS, _COPIES = 12, 4
_ROWS = 20
_CONFUSIONS = 10


@dataclass(frozen=True)
class Evaluated:
    """A model that was judged, and all that there is to say of it."""

    params: Params
    classifier: Classifier
    summary: Summary
    images: Images
    table: pd.DataFrame
    """A row an image: path, label, group and split."""
    rows: np.ndarray
    """(N,) of the test images, in the table."""
    labels: np.ndarray
    """(N,) integers."""
    probabilities: np.ndarray
    """(N, classes)."""
    metrics: dict[str, float | None]
    history: pd.DataFrame
    """The columns of reports/train/history.csv."""
    quarantine: pd.DataFrame
    glimpses: Path
    """A folder with pictures of quarantined files, each called after its row."""
    conflicts: pd.DataFrame
    usage: dict[str, Usage | None]
    """By stage."""
    facts: dict[str, str]
    """What else identifies the run: commit, versions, ids."""
    warnings: Sequence[str]


def report(evaluated: Evaluated) -> str:
    """The page, as HTML."""
    class_names = evaluated.classifier.class_names
    probabilities = evaluated.probabilities.astype(np.float64)
    labels, images, rows = evaluated.labels, evaluated.images, evaluated.rows
    counts = pd.crosstab(evaluated.table["label"], evaluated.table["split"])
    counts = counts.reindex(index=list(class_names), columns=["train", "val", "test"], fill_value=0)
    curves = roc_curves(probabilities, labels)
    matrix = confusion(probabilities, labels)
    most = evaluated.params.evaluate.mistakes
    filters = filter_pictures(evaluated.classifier)
    first_layer = layers_of(evaluated.classifier.model, len(class_names))[0]
    return pages.render(
        "report.html",
        {
            "params": evaluated.params,
            "settings": evaluated.params.flat(),
            "class_names": class_names,
            "summary": evaluated.summary,
            "metrics": evaluated.metrics,
            "warnings": evaluated.warnings,
            "facts": _facts(evaluated, counts),
            "stages": _stages(evaluated.usage),
            "seconds": _duration(evaluated.history["seconds"].sum()),
            "chance_loss": np.log(len(class_names)),
            "num_epochs": len(evaluated.history),
            "best": evaluated.history["val_accuracy"].max(),
            "counts": counts,
            "balance_rows": [(name, *map(str, row)) for name, row in
                             zip(class_names, counts.to_numpy(), strict=True)],
            "samples": _samples(evaluated.table, images, class_names),
            "balance": pages.chart(figures.class_balance(counts)),
            "loss": pages.chart(figures.curve(evaluated.history, "loss")),
            "accuracy": pages.chart(figures.curve(evaluated.history, "accuracy")),
            "confusion": pages.chart(figures.confusion_matrix(matrix, class_names)),
            "confusions": _confusions(matrix, class_names),
            "roc": pages.chart(figures.roc(curves, mean_roc_curve(curves), class_names)),
            "precision_recall": pages.chart(
                figures.precision_recall(
                    precision_recall_curves(probabilities, labels), class_names
                )
            ),
            "calibration": pages.chart(
                figures.calibration(
                    calibration_bins(
                        probabilities, labels, evaluated.params.evaluate.calibration_bins
                    )
                )
            ),
            "classes": _class_rows(per_class(probabilities, labels), class_names),
            "num_rows": _ROWS,
            "num_apart": _APART,
            "mistakes": _predicted(
                evaluated, rows, confident_mistakes(probabilities, labels, most)
            ),
            "num_mistakes": int((probabilities.argmax(axis=1) != labels).sum()),
            "unsure": _predicted(evaluated, rows, unsure_hits(probabilities, labels, most)),
            "num_quarantined": len(evaluated.quarantine),
            "quarantine": _quarantined(evaluated.quarantine, evaluated.glimpses),
            "groups": _groups(evaluated.table, images),
            "num_groups": int((evaluated.table["group"].value_counts() > 1).sum()),
            "num_copies": int(evaluated.table["group"].duplicated(keep=False).sum()),
            "num_conflicts": len(evaluated.conflicts),
            "layers": [
                (row.name, size_text(row.output), row.formula, f"{row.parameters:,}",
                 row.parameters_formula)
                for row in evaluated.summary.layers
            ],
            "filters": [
                {"src": pages.picture(image), "alt": f"filter {i + 1}", "caption": f"{i + 1}"}
                for i, image in enumerate(filters[:MOST_FILTERS])
            ],
            "num_filters": len(filters),
            "first_is_convolution": isinstance(first_layer, Convolution),
        },
    )  # fmt: skip


def filter_pictures(classifier: Classifier) -> np.ndarray:
    """The weights that look at the pixels, as pictures: (n, h, w, 1 or 3) uint8.

    They are the filters of the first convolution; without one, the weights of each unit of the
    first dense layer, laid out as the image is.
    """
    first = next(
        module
        for module in classifier.network.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    )
    weights = first.weight.detach().cpu().numpy()
    if isinstance(first, nn.Linear):
        weights = weights.reshape(-1, *classifier.preparation.input_shape)
    return np.stack([figures.weights_as_picture(unit) for unit in weights])


def _facts(evaluated: Evaluated, counts: pd.DataFrame) -> list[tuple[str, str]]:
    params, splits = evaluated.params, counts.sum()
    origin = {"folder": params.download.folder, "url": str(params.download.url)}
    data = params.download.source
    return [
        ("data", f"{data}: {origin[data]}" if data in origin else data),
        ("images", f"{counts.to_numpy().sum():,} of {len(counts):,} classes"),
        ("splits", f"{splits['train']:,} to train, {splits['val']:,} to validate, "
                   f"{splits['test']:,} to test"),
        ("as the network sees them", f"{params.resize.size} x {params.resize.size} pixels, "
                                     f"{params.resize.color}, {params.resize.mode}"),
        *evaluated.facts.items(),
    ]  # fmt: skip


def _stages(usage: dict[str, Usage | None]) -> list[tuple[str, ...]]:
    return [
        (stage, "not known here", "", "", "") if used is None else
        (stage, _duration(used.seconds), f"{used.peak_bytes / 2**20:,.0f} MB"
         + (f", GPU {used.gpu_bytes / 2**20:,.0f} MB" if used.gpu_bytes else ""),
         used.ended, used.machine)
        for stage, used in usage.items()
    ]  # fmt: skip


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _samples(
    table: pd.DataFrame, images: Images, class_names: Sequence[str]
) -> list[dict[str, Any]]:
    """Training images: several of each class where there are few classes, else one."""
    apart = len(class_names) <= _APART
    train = table[table["split"] == "train"].groupby("label").head(8 if apart else 1)
    train = train.sort_values("label", kind="stable").head(_SAMPLES)
    return [
        {"label": label, "src": pages.picture(images[row]), "alt": path,
         "caption": "" if apart else label}
        for row, path, label in zip(train.index, train["path"], train["label"], strict=True)
    ]  # fmt: skip


def _confusions(matrix: np.ndarray, class_names: Sequence[str]) -> list[tuple[str, str, str]]:
    """The most frequent mistakes: label, prediction, how many of the label's images."""
    wrong = matrix * (1 - np.eye(len(matrix), dtype=int))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_CONFUSIONS]
    pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
    return [
        (class_names[label], class_names[prediction],
         f"{wrong[label, prediction]:,} of {matrix[label].sum():,}")
        for label, prediction in pairs
        if wrong[label, prediction]
    ]  # fmt: skip


def _class_rows(classes: pd.DataFrame, class_names: Sequence[str]) -> list[tuple[str, ...]]:
    """The worst first."""
    named = classes.assign(label=list(class_names)).sort_values("f1", kind="stable")
    return [
        (row["label"], f"{row['num_images']:,}",
         *(f"{row[name]:.3f} ({row[f'{name}_low']:.3f} to {row[f'{name}_high']:.3f})"
           for name in ("recall", "precision")),
         f"{row['f1']:.3f}")
        for row in named.to_dict("records")
    ]  # fmt: skip


def _predicted(
    evaluated: Evaluated, rows: np.ndarray, positions: np.ndarray
) -> list[dict[str, Any]]:
    names = evaluated.classifier.class_names
    result = []
    for i in positions:
        probabilities = evaluated.probabilities[i]
        label, prediction = names[evaluated.labels[i]], names[probabilities.argmax()]
        taken = f"taken for {prediction}" if label != prediction else "right"
        result.append(
            {
                "src": pages.picture(evaluated.images[rows[i]]),
                "alt": evaluated.table["path"].iloc[rows[i]],
                "caption": f"{label}\n{taken}, {probabilities.max():.1%}",
            }
        )
    return result


def _quarantined(quarantine: pd.DataFrame, glimpses: Path) -> list[dict[str, Any]]:
    result = []
    shown = quarantine.head(_QUARANTINED).to_numpy().tolist()
    for i, (path, reason, num_bytes) in enumerate(shown):
        file = glimpses / f"{i}.png"
        length = f"\n{int(num_bytes):,} bytes" if num_bytes else ""
        result.append(
            {
                "src": pages.picture(np.asarray(Image.open(file))) if file.exists() else "",
                "alt": path if file.exists() else "no picture",
                "caption": f"{path}\n{reason}{length}",
            }
        )
    return result


def _groups(table: pd.DataFrame, images: Images) -> list[dict[str, Any]]:
    """Groups of copies, those with contradicting labels first, then the largest."""
    copies = table[table["group"].duplicated(keep=False)]
    grouped = copies.groupby("group", sort=True)
    about = pd.DataFrame({"labels": grouped["label"].nunique(), "size": grouped.size()})
    about = about.sort_values(["labels", "size"], ascending=False, kind="stable")
    result = []
    for group in about.index[:_GROUPS]:
        members = copies[copies["group"] == group]
        labels, splits = members["label"].unique(), members["split"].unique()
        named = ", ".join(labels)
        says = [
            f"{len(members):,} copies"
            + (f" of {named}" if len(labels) == 1 else f" with contradicting labels: {named}"),
            f"in {splits[0]}" if len(splits) == 1 else f"torn apart: in {', '.join(splits)}",
        ]
        result.append(
            {
                "says": "; ".join(says),
                "alarming": len(labels) > 1 or len(splits) > 1,
                "pictures": [
                    {"src": pages.picture(images[row]), "alt": path, "caption": f"{label}\n{path}"}
                    for row, path, label in zip(
                        members.index[:_COPIES], members["path"], members["label"], strict=False
                    )
                ],
            }
        )
    return result
