"""Tests of the metrics, against values published or counted by hand."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnpipe.evaluation.intervals import wilson_interval
from cnnpipe.evaluation.metrics import (
    calibration_bins,
    calibration_error,
    confident_mistakes,
    confusion,
    mean_roc_curve,
    metrics,
    per_class,
    precision_recall_curves,
    roc_auc,
    roc_curves,
    unsure_hits,
)

# Three classes; the predictions are 0 0 1 | 1 1 0 1 | 2: two of class 0 right, three of class 1.
LABELS = np.array([0, 0, 0, 1, 1, 1, 1, 2])
PROBABILITIES = np.array(
    [
        [0.7, 0.2, 0.1],
        [0.5, 0.3, 0.2],
        [0.1, 0.6, 0.3],
        [0.2, 0.7, 0.1],
        [0.0, 0.9, 0.1],
        [0.8, 0.1, 0.1],
        [0.3, 0.4, 0.3],
        [0.1, 0.1, 0.8],
    ]
)


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (1, 1, 0.2065, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe, "Two-sided confidence intervals" (1998), table I
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_has_the_published_values(
    hits: int, total: int, low: float, high: float
) -> None:
    assert wilson_interval(hits, total) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_share_and_stays_within_0_and_1(case: tuple[int, int]) -> None:
    low, high = wilson_interval(*case)
    assert 0 <= low <= case[0] / case[1] <= high <= 1
    assert low < high


def test_confusion_counts_labels_down_and_predictions_across() -> None:
    assert confusion(PROBABILITIES, LABELS).tolist() == [[2, 1, 0], [1, 3, 0], [0, 0, 1]]
    assert confusion(PROBABILITIES[:3], LABELS[:3]).tolist() == [[2, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_precision_recall_and_f1_are_those_counted_by_hand() -> None:
    table = per_class(PROBABILITIES, LABELS)
    assert table["precision"].tolist() == pytest.approx([2 / 3, 3 / 4, 1])
    assert table["recall"].tolist() == pytest.approx([2 / 3, 3 / 4, 1])
    assert table["f1"].tolist() == pytest.approx([2 / 3, 3 / 4, 1])
    assert table["num_images"].tolist() == [3, 4, 1]


def test_precision_and_recall_are_not_confused() -> None:
    # All four are called 0, one of them rightly.
    table = per_class(np.array([[0.9, 0.1]] * 4), np.array([0, 1, 1, 1]))
    assert table["precision"].tolist() == [0.25, 0]  # 0: class 1 is never predicted
    assert table["recall"].tolist() == [1, 0]
    assert table["f1"].tolist() == pytest.approx([0.4, 0])


def test_calibration_error_by_hand() -> None:
    # Two bins with predictions: 0.6 to 0.7, one of two right; 0.9 to 1, all three right.
    probabilities = np.array([[0.62, 0.38], [0.36, 0.64], [0.95, 0.05], [0.05, 0.95], [0.92, 0.08]])
    labels = np.array([0, 0, 0, 1, 0])
    expected = 2 / 5 * abs(1 / 2 - 0.63) + 3 / 5 * abs(1 - 0.94)
    assert calibration_error(probabilities, labels, 10) == pytest.approx(expected)
    # In one bin the confidences and the hits are averaged before they are compared.
    assert calibration_error(probabilities, labels, 1) == pytest.approx(abs(4 / 5 - 4.08 / 5))


@pytest.mark.parametrize("num_bins", [5, 10, 15, 20, 100])
def test_a_confidence_at_an_edge_belongs_to_the_bin_that_ends_there(num_bins: int) -> None:
    # One hit below each edge and one miss at it: together in one bin their accuracy is 1/2.
    for edge in range(num_bins // 2 + 1, num_bins + 1):
        at = edge / num_bins
        below = at - 0.4 / num_bins
        probabilities = np.array([[below, 1 - below], [at, 1 - at]])
        expected = abs(0.5 - (at + below) / 2)
        assert calibration_error(probabilities, np.array([0, 1]), num_bins) == pytest.approx(
            expected
        )


def test_certain_and_right_is_perfectly_calibrated() -> None:
    assert calibration_error(np.eye(3), np.arange(3), 15) == 0
    assert calibration_error(np.eye(3), np.array([1, 2, 0]), 15) == 1


def test_roc_auc_by_hand() -> None:
    # Of the four pairs of a positive and a negative, three are in the right order.
    scores = np.array([0.1, 0.4, 0.35, 0.8])
    probabilities = np.stack([1 - scores, scores], axis=1)
    assert roc_auc(probabilities, np.array([0, 0, 1, 1])) == 0.75
    assert roc_auc(probabilities, np.array([1, 1, 0, 0])) == 0.25
    assert roc_auc(np.full((4, 2), 0.5), np.array([0, 0, 1, 1])) == 0.5  # ties count half


def test_roc_auc_of_many_classes_is_the_mean_of_one_against_the_rest() -> None:
    def area(label: int) -> float:
        inside, outside = PROBABILITIES[label == LABELS], PROBABILITIES[label != LABELS]
        pairs = [(a > b) + (a == b) / 2 for a in inside[:, label] for b in outside[:, label]]
        return float(np.mean(pairs))

    assert roc_auc(PROBABILITIES, LABELS) == pytest.approx((area(0) + area(1) + area(2)) / 3)
    # A class without an image has no curve and is left out.
    assert roc_auc(PROBABILITIES[:2], np.array([0, 1])) == 1


def test_roc_auc_is_none_where_no_class_has_a_curve() -> None:
    assert roc_auc(PROBABILITIES[:2], np.array([0, 0])) is None
    assert roc_auc(PROBABILITIES[:1], np.array([2])) is None


def test_all_metrics_by_hand() -> None:
    result = metrics(PROBABILITIES.astype(np.float32), LABELS, 10)
    right = [0.7, 0.5, 0.1, 0.7, 0.9, 0.1, 0.4, 0.8]
    assert result["accuracy"] == 6 / 8
    assert (result["accuracy_low"], result["accuracy_high"]) == wilson_interval(6, 8)
    assert result["f1"] == pytest.approx((2 / 3 + 3 / 4 + 1) / 3)
    assert result["log_loss"] == pytest.approx(-sum(map(math.log, right)) / 8, rel=1e-6)
    assert result["num_images"] == 8
    assert list(result) == ["accuracy", "accuracy_low", "accuracy_high", "f1", "roc_auc",
                            "log_loss", "calibration_error", "num_images"]  # fmt: skip


@pytest.mark.parametrize("labels", [[0], [1], [0, 0, 0], [0, 1, 1]])
def test_metrics_are_json_for_whatever_labels_there_are(labels: list[int]) -> None:
    probabilities = np.array([[1, 0]] * len(labels), np.float32)  # some certain and wrong
    result = metrics(probabilities, np.array(labels), 15)
    json.dumps(result, allow_nan=False)
    assert result["accuracy"] == labels.count(0) / len(labels)
    assert (result["roc_auc"] is None) == (len(set(labels)) == 1)


def test_probabilities_are_not_changed_by_measuring_them() -> None:
    before = PROBABILITIES * 2
    metrics(before, LABELS, 10)
    np.testing.assert_array_equal(before, PROBABILITIES * 2)


def test_confident_mistakes_come_the_surest_first() -> None:
    assert confident_mistakes(PROBABILITIES, LABELS, 16).tolist() == [5, 2]
    assert confident_mistakes(PROBABILITIES, LABELS, 1).tolist() == [5]
    assert confident_mistakes(PROBABILITIES, PROBABILITIES.argmax(axis=1), 16).tolist() == []
    # Among equally sure ones, the first.
    assert confident_mistakes(np.array([[0.9, 0.1]] * 3), np.ones(3, int), 2).tolist() == [0, 1]


def random_case(num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, 400)
    scores = rng.random((400, num_classes)) + 0.4 * np.eye(num_classes)[labels]
    return scores / scores.sum(axis=1, keepdims=True), labels


@pytest.mark.parametrize("num_classes", [2, 5])
def test_the_area_under_the_mean_roc_curve_is_the_mean_area(num_classes: int) -> None:
    probabilities, labels = random_case(num_classes)
    mean = mean_roc_curve(roc_curves(probabilities, labels))
    assert mean.shape == (201, 2)
    area = np.trapezoid(mean[:, 1], mean[:, 0])
    expected = roc_auc(probabilities, labels)
    assert expected is not None and expected < 0.95
    assert area == pytest.approx(expected, abs=0.005)


def test_a_perfect_classifier_has_a_perfect_roc_curve_and_none_has_the_diagonal() -> None:
    labels = np.array([0, 1, 0, 1])
    mean = mean_roc_curve(roc_curves(np.eye(2)[labels], labels))
    assert (mean[:, 1] == 1).all()
    assert np.array_equal(mean_roc_curve({})[:, 0], mean_roc_curve({})[:, 1])
    assert roc_curves(np.eye(2)[labels], np.zeros(4, int)) == {}


def test_average_precision_is_that_of_the_curve_by_hand() -> None:
    probabilities = np.array([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]])
    labels = np.array([1, 0, 1, 0])
    curve, average = precision_recall_curves(probabilities, labels)[1]
    assert average == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 3)  # at the first and the third
    assert curve[0].tolist() == [1, 0.5]  # all taken: half are right
    assert curve[-1].tolist() == [0, 1]


def test_the_calibration_bins_are_those_of_the_calibration_error() -> None:
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.85, 0.15], [0.4, 0.6]])
    labels = np.array([0, 1, 0, 1])
    bins = calibration_bins(probabilities, labels, 10)
    assert bins["num_images"].tolist() == [1, 1, 2]
    assert bins["confidence"].tolist() == pytest.approx([0.6, 0.8, 0.875])
    assert bins["accuracy"].tolist() == [1, 0, 1]
    assert bins["low"].iloc[2] == pytest.approx(0.342, abs=1e-3)  # Wilson's, of 2 of 2
    assert (bins["high"] >= bins["accuracy"]).all()
    error = calibration_error(probabilities, labels, 10)
    assert error == pytest.approx((0.4 + 0.8 + 2 * 0.125) / 4)


def test_each_class_has_the_intervals_of_its_own_recall_and_precision() -> None:
    predictions = np.array([0, 0, 0, 1, 0])
    labels = np.array([0, 0, 1, 1, 0])
    table = per_class(np.eye(3)[predictions], labels)
    assert table.loc[0, ["recall", "precision"]].tolist() == [1, 0.75]
    assert table.loc[0, ["recall_low", "recall_high"]].tolist() == list(wilson_interval(3, 3))
    assert table.loc[0, ["precision_low", "precision_high"]].tolist() == list(wilson_interval(3, 4))
    # Nothing is known of a class without images that is never predicted.
    assert table.loc[2, ["recall_low", "recall_high"]].tolist() == [0, 1]
    assert table.loc[2, ["precision_low", "precision_high"]].tolist() == [0, 1]


def test_the_least_sure_hits_come_first_and_mistakes_never() -> None:
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.45, 0.55], [0.3, 0.7]])
    assert unsure_hits(probabilities, np.array([0, 0, 0, 1]), 2).tolist() == [1, 3]
    assert unsure_hits(probabilities, np.array([0, 0, 0, 1]), 9).tolist() == [1, 3, 0]
    assert unsure_hits(probabilities, np.array([1, 1, 0, 0]), 9).tolist() == []
