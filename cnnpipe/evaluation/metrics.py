"""How good predictions are, and how sure one can be of that."""

import numpy as np
import pandas as pd
from sklearn.metrics import log_loss, precision_recall_fscore_support, roc_auc_score

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
    confidence = probabilities.max(axis=1)
    hits = probabilities.argmax(axis=1) == labels
    # Open on the left: a confidence of exactly 0.8 belongs to the interval that ends there.
    bins = np.searchsorted(np.arange(1, num_bins) / num_bins, confidence, side="left")
    gaps = (
        abs(hits[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean()
        for b in np.unique(bins)
    )
    return float(sum(gaps))


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

    A ratio without anything in its denominator is 0, as when a class is never predicted.
    """
    classes = range(probabilities.shape[1])
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, probabilities.argmax(axis=1), labels=classes, zero_division=0
    )
    return pd.DataFrame({"precision": precision, "recall": recall, "f1": f1, "num_images": support})


def confusion(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(classes, classes) int64: the number of images by their label, down, and prediction."""
    size = probabilities.shape[1]
    cells = labels * size + probabilities.argmax(axis=1)
    return np.bincount(cells, minlength=size * size).reshape(size, size)


def confident_mistakes(probabilities: np.ndarray, labels: np.ndarray, most: int) -> np.ndarray:
    """The positions of the wrong predictions, the surest first, at most so many."""
    confidence = np.where(probabilities.argmax(axis=1) != labels, probabilities.max(axis=1), -1)
    order = np.argsort(-confidence, kind="stable")[:most]
    return order[confidence[order] >= 0]
