"""What is wrong with a training or a test where their figures disagree, in words."""

import numpy as np

from cnnpipe.evaluation.intervals import far_below, wilson_interval


def about_training(
    train_accuracy: float,
    train_labels: np.ndarray,
    val_accuracy: float,
    num_val: int,
    num_parameters: int,
    with_batch_statistics: tuple[float, float, int] | None,
    num_steps: int,
) -> list[str]:
    """What is to be said of a training, a sentence each; mostly nothing.

    Args:
        train_accuracy: of the kept epoch, as it learned.
        train_labels: (N,) integers of the training images.
        val_accuracy: of the same epoch.
        num_val: the number of validation images.
        num_parameters: trainable.
        with_batch_statistics: of a network with batch normalisation, its accuracy on some training
            images normalised by their own mean and variance, as while learning; by the running
            ones, as in every prediction; and the number of these images.
        num_steps: up to and with the kept epoch.
    """
    if with_batch_statistics is not None:
        own, running, count = with_batch_statistics
        if far_below(running, count, own, count):
            return [
                "the statistics of the batch normalisation have not settled: on the training "
                f"images themselves the accuracy is {own:.3f} with each batch's own, and "
                f"{running:.3f} with the running ones, which all predictions use, after "
                f"{num_steps:,} steps; train for more epochs, or with a smaller train.batch_size"
            ]
    often = _most_frequent(train_labels)
    if wilson_interval(round(train_accuracy * len(train_labels)), len(train_labels))[0] <= often:
        return [
            f"the network has learned next to nothing: {train_accuracy:.3f} of the training images "
            f"right, where the most frequent class alone is {often:.3f}; train for more epochs, or "
            "with another train.learning_rate"
        ]
    if far_below(val_accuracy, num_val, train_accuracy, len(train_labels)):
        return [
            f"the network memorises: {train_accuracy:.3f} of the training images right, but "
            f"{val_accuracy:.3f} of the validation images, with {num_parameters:,} parameters for "
            f"{len(train_labels):,} images; more images, train.augment, model.dropout, "
            "train.weight_decay or a smaller network would help"
        ]
    return []


def about_test(
    predictions: np.ndarray, labels: np.ndarray, val_accuracy: float, num_val: int
) -> list[str]:
    """What is to be said of a test, a sentence each; mostly nothing.

    Args:
        predictions: (N,) integers.
        labels: (N,) integers.
        val_accuracy: of the epoch that was kept.
        num_val: the number of validation images.
    """
    hits = int((predictions == labels).sum())
    accuracy, often = hits / len(labels), _most_frequent(labels)
    warnings = []
    if wilson_interval(hits, len(labels))[0] <= often:
        alike = len(np.unique(predictions)) == 1 < len(np.unique(labels))
        warnings.append(
            f"the test accuracy, {accuracy:.3f} on {len(labels):,} images, cannot be told from "
            f"always naming the most frequent class, {often:.3f}"
            + ("; and all images are given the same class" if alike else "")
        )
    if far_below(accuracy, len(labels), val_accuracy, num_val):
        warnings.append(
            f"the test accuracy, {accuracy:.3f}, is far below the validation accuracy, "
            f"{val_accuracy:.3f}, more than chance explains: the test images are of another kind, "
            "or validation images have copies among the training images"
        )
    return warnings


def _most_frequent(labels: np.ndarray) -> float:
    return float(np.bincount(labels).max() / len(labels))
