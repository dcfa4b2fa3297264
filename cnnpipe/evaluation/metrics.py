"""How good predictions are, and how sure one can be of that."""

import numpy as np
import pandas as pd
from sklearn.metrics import (
    average_precision_score,
    log_loss,
    precision_recall_curve,
    precision_recall_fscore_support,
    roc_auc_score,
    roc_curve,
)

from cnnpipe.evaluation.intervals import wilson_interval


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, num_bins: int) -> float:
    """How far confidence and accuracy are apart on average, 0 to 1: the expected calibration error.

    Predictions are binned by the probability of the predicted class, in equal intervals.

    Args:
        probabilities: (N, classes).
        labels: (N,) integers.
        num_bins: at least 1.

    Source: Guo et al., "On calibration of modern neural networks" (2017), equation 3.
    """
    bins = calibration_bins(probabilities, labels, num_bins)
    gaps = (bins["accuracy"] - bins["confidence"]).abs() * bins["num_images"]
    return float(gaps.sum() / len(labels))


def roc_auc(probabilities: np.ndarray, labels: np.ndarray) -> float | None:
    """The mean over the classes of the area under the ROC curve, one class against the rest.

    Classes without an image among the labels, or with nothing else, have no such curve; None where
    that is all of them. With two classes both have the same area.
    """
    areas = [
        roc_auc_score(labels == label, probabilities[:, label])
        for label in range(probabilities.shape[1])
        if 0 < (labels == label).sum() < len(labels)
    ]
    return float(np.mean(areas)) if areas else None


def metrics(
    probabilities: np.ndarray, labels: np.ndarray, num_bins: int
) -> dict[str, float | None]:
    """What reports/test/metrics.json holds.

    Args:
        probabilities: (N, classes) float, N at least 1.
        labels: (N,) integers.
        num_bins: of the calibration error.
    """
    probabilities = probabilities.astype(np.float64)
    probabilities /= probabilities.sum(axis=1, keepdims=True)  # float32 sums to 1 but roughly
    hits = int((probabilities.argmax(axis=1) == labels).sum())
    low, high = wilson_interval(hits, len(labels))
    return {
        "accuracy": hits / len(labels),
        "accuracy_low": low,
        "accuracy_high": high,
        # Of the classes that are there to be found.
        "f1": float(per_class(probabilities, labels)["f1"][np.unique(labels)].mean()),
        "roc_auc": roc_auc(probabilities, labels),
        "log_loss": float(log_loss(labels, probabilities, labels=range(probabilities.shape[1]))),
        "calibration_error": calibration_error(probabilities, labels, num_bins),
        "num_images": len(labels),
    }


def per_class(probabilities: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """Precision, recall and F1 of each class, and its number of images, a row a class.

    A ratio without anything in its denominator is 0, as when a class is never predicted. Precision
    and recall have 95 % intervals; of nothing that is all of 0 to 1.
    """
    predictions = probabilities.argmax(axis=1)
    num_classes = probabilities.shape[1]
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predictions, labels=range(num_classes), zero_division=0
    )
    hits = np.bincount(labels[predictions == labels], minlength=num_classes)
    table: dict[str, object] = {}
    for name, share, totals in (
        ("precision", precision, np.bincount(predictions, minlength=num_classes)),
        ("recall", recall, support),
    ):
        intervals = [
            wilson_interval(int(hit), int(total)) if total else (0.0, 1.0)
            for hit, total in zip(hits, totals, strict=True)
        ]
        low, high = zip(*intervals, strict=True)
        table |= {name: share, f"{name}_low": low, f"{name}_high": high}
    return pd.DataFrame({**table, "f1": f1, "num_images": support})


def confusion(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(classes, classes) int64: the number of images by their label, down, and prediction."""
    size = probabilities.shape[1]
    cells = labels * size + probabilities.argmax(axis=1)
    return np.bincount(cells, minlength=size * size).reshape(size, size)


def roc_curves(probabilities: np.ndarray, labels: np.ndarray) -> dict[int, np.ndarray]:
    """The ROC curve of each class against the rest, (points, 2): false and true positive rates.

    Classes that `roc_auc` leaves out have none.
    """
    return {
        label: np.stack(roc_curve(labels == label, probabilities[:, label])[:2], axis=1)
        for label in range(probabilities.shape[1])
        if 0 < (labels == label).sum() < len(labels)
    }


def mean_roc_curve(curves: dict[int, np.ndarray]) -> np.ndarray:
    """(201, 2): the mean of the true positive rates at equal steps of the false positive rate.

    The area under it is the mean of the areas, but for the steps.
    """
    steps = np.linspace(0, 1, 201)
    heights = [np.interp(steps, curve[:, 0], curve[:, 1]) for curve in curves.values()]
    # Where a curve rises straight up from 0, `interp` takes its end; the diagonal has no curves.
    mean = np.mean(heights, axis=0) if heights else steps
    return np.stack([steps, mean], axis=1)


def precision_recall_curves(
    probabilities: np.ndarray, labels: np.ndarray
) -> dict[int, tuple[np.ndarray, float]]:
    """The curve of each class, (points, 2) of recall and precision, and its average precision.

    Classes without an image among the labels have none.
    """
    curves = {}
    for label in np.unique(labels):
        precision, recall, _ = precision_recall_curve(labels == label, probabilities[:, label])
        average = average_precision_score(labels == label, probabilities[:, label])
        curves[int(label)] = np.stack([recall, precision], axis=1), float(average)
    return curves


def calibration_bins(probabilities: np.ndarray, labels: np.ndarray, num_bins: int) -> pd.DataFrame:
    """The bins of `calibration_error` that hold images, a row each.

    Its columns are the mean `confidence`, the `accuracy` with `low` and `high`, a 95 % interval,
    and `num_images`.
    """
    confidence = probabilities.max(axis=1)
    hits = probabilities.argmax(axis=1) == labels
    # Open on the left: a confidence of exactly 0.8 belongs to the interval that ends there.
    bins = np.searchsorted(np.arange(1, num_bins) / num_bins, confidence, side="left")
    rows = []
    for b in np.unique(bins):
        inside = bins == b
        low, high = wilson_interval(int(hits[inside].sum()), int(inside.sum()))
        rows.append((confidence[inside].mean(), hits[inside].mean(), low, high, inside.sum()))
    return pd.DataFrame(rows, columns=["confidence", "accuracy", "low", "high", "num_images"])


def confident_mistakes(probabilities: np.ndarray, labels: np.ndarray, most: int) -> np.ndarray:
    """The positions of the wrong predictions, the surest first, at most so many."""
    confidence = np.where(probabilities.argmax(axis=1) != labels, probabilities.max(axis=1), -1)
    order = np.argsort(-confidence, kind="stable")[:most]
    return order[confidence[order] >= 0]


def unsure_hits(probabilities: np.ndarray, labels: np.ndarray, most: int) -> np.ndarray:
    """The positions of the right predictions, the least sure first, at most so many."""
    confidence = np.where(probabilities.argmax(axis=1) == labels, probabilities.max(axis=1), 2)
    order = np.argsort(confidence, kind="stable")[:most]
    return order[confidence[order] <= 1]
