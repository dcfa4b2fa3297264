"""Tests of the diagnosis: it speaks where figures disagree, says why, and else is silent."""

import numpy as np
import pytest

from cnnpipe.evaluation.diagnosis import about_test, about_training

LABELS = np.arange(400) % 2


def of_training(train: float, val: float, norm: tuple[float, float, int] | None = None) -> str:
    return "; ".join(about_training(train, LABELS, val, 100, 12_345, norm, 70))


@pytest.mark.parametrize(
    ("train", "val", "norm"),
    [
        (0.95, 0.93, None),
        (0.95, 0.87, (0.96, 0.95, 400)),  # a gap as chance makes it
        (0.80, 0.95, (0.80, 0.85, 400)),  # augmented images are harder
        (1.00, 0.91, None),
    ],
)
def test_nothing_is_said_of_a_sound_training(
    train: float, val: float, norm: tuple[float, float, int] | None
) -> None:
    assert of_training(train, val, norm) == ""


def test_memorising_is_named_with_its_figures() -> None:
    text = of_training(0.99, 0.70, (0.99, 0.99, 400))
    assert "memorises: 0.990 of the training images right, but 0.700 of the validation" in text
    assert "12,345 parameters for 400 images" in text
    assert "train.augment" in text


def test_statistics_that_never_settled_come_before_what_follows_from_them() -> None:
    text = of_training(0.73, 0.50, (0.73, 0.50, 400))
    assert text.startswith("the statistics of the batch normalisation have not settled")
    assert "0.730 with each batch's own, and 0.500 with the running ones" in text
    assert "after 70 steps" in text
    assert "memorises" not in text


def test_a_network_that_has_learned_nothing_is_told_from_one_that_memorises() -> None:
    assert "has learned next to nothing: 0.520" in of_training(0.52, 0.50)


def test_a_test_at_chance_is_told_and_where_all_are_one_class_that_too() -> None:
    half = np.zeros(400, int)
    text = "; ".join(about_test(half, LABELS, 0.52, 100))
    assert "0.500 on 400 images, cannot be told from always naming" in text
    assert "all images are given the same class" in text
    mixed = "; ".join(about_test(np.roll(LABELS, 1) ^ (np.arange(400) < 200), LABELS, 0.52, 100))
    assert "cannot be told" in mixed and "same class" not in mixed


def test_chance_is_that_of_the_most_frequent_class() -> None:
    rare = (np.arange(400) < 40).astype(int)
    almost = rare.copy()
    almost[:40] = np.arange(40) % 4 == 0  # 10 of the 40 found: 0.925, where 0.9 is for nothing
    assert "cannot be told" in about_test(almost, rare, 0.93, 100)[0]
    assert about_test(rare, rare, 0.99, 100) == []


def test_a_test_far_below_validation_is_told_and_a_little_below_is_not() -> None:
    predictions = LABELS.copy()
    predictions[:100] ^= 1  # 0.75
    assert "0.750, is far below the validation accuracy, 0.950" in about_test(
        predictions, LABELS, 0.95, 200
    )[0]  # fmt: skip
    assert about_test(predictions, LABELS, 0.80, 200) == []
    assert about_test(predictions[:40], LABELS[:40], 0.5, 10) != []  # 0 of 40
    assert about_test(LABELS, LABELS, 1.0, 5) == []
