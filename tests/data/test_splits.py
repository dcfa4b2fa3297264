"""Tests of the split: disjoint, whole groups, equal shares, and nothing that the order decides."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnpipe.data.splits import SPLITS, assign_splits

DATA_SETS = st.lists(
    st.tuples(st.sampled_from(["cat", "dog", "owl"]), st.integers(1, 6)), min_size=1, max_size=60
)  # each group's class and number of images
SHARES = st.floats(0.05, 0.4)
properties = settings(max_examples=150, deadline=None, derandomize=True)


def split(
    labels: list[str],
    groups: list[int] | None = None,
    official: list[str] | None = None,
    keys: list[str] | None = None,
    val: float = 0.15,
    test: float = 0.15,
    seed: int = 42,
) -> np.ndarray:
    n = len(labels)
    return assign_splits(
        labels,
        keys or [f"sha-{i}" for i in range(n)],
        np.arange(n) if groups is None else np.array(groups),
        official or [""] * n,
        val,
        test,
        seed,
    )


def images_of(data_set: list[tuple[str, int]]) -> tuple[list[str], list[int]]:
    labels = [label for label, size in data_set for _ in range(size)]
    groups = [group for group, (_, size) in enumerate(data_set) for _ in range(size)]
    return labels, groups


@properties
@given(DATA_SETS, SHARES, SHARES, st.integers(0, 99))
def test_every_image_is_in_one_split_every_group_whole_and_every_class_trained_on(
    data_set: list[tuple[str, int]], val: float, test: float, seed: int
) -> None:
    labels, groups = images_of(data_set)
    splits = split(labels, groups, val=val, test=test, seed=seed)
    assert splits.shape == (len(labels),)
    assert set(splits) <= set(SPLITS)
    assert len(set(zip(groups, splits, strict=True))) == len(data_set)
    assert set(np.array(labels)[splits == "train"]) == set(labels)


@properties
@given(
    st.dictionaries(st.sampled_from(["cat", "dog", "owl"]), st.integers(10, 90), min_size=1),
    SHARES,
    SHARES,
)
def test_each_class_gives_its_share_to_the_image(
    sizes: dict[str, int], val: float, test: float
) -> None:
    labels = [label for label, size in sizes.items() for _ in range(size)]
    counts = Counter(zip(labels, split(labels, val=val, test=test), strict=True))
    for label, size in sizes.items():
        assert counts[label, "val"] == max(1, round(val * size))
        assert counts[label, "test"] == max(1, round(test * size))


@properties
@given(DATA_SETS, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_and_the_numbers_of_the_groups_do_not_matter(
    data_set: list[tuple[str, int]], random: Any
) -> None:
    labels, groups = images_of(data_set)
    order = list(range(len(labels)))
    random.shuffle(order)
    keys = [f"sha-{i}" for i in order]
    renumbered = [1000 - groups[i] for i in order]
    shuffled = split([labels[i] for i in order], renumbered, keys=keys)
    np.testing.assert_array_equal(shuffled, split(labels, groups)[order])


def test_contradicting_labels_of_one_file_do_not_make_the_order_matter() -> None:
    labels = ["cat", "dog"] * 20 + ["cat"] * 20
    groups = [*(i // 2 for i in range(40)), *range(20, 40)]
    keys = [f"sha-{group}" for group in groups]
    splits = split(labels, groups, keys=keys)
    np.testing.assert_array_equal(split(labels[::-1], groups[::-1], keys=keys[::-1]), splits[::-1])
    assert len(set(zip(groups, splits, strict=True))) == 40


def test_the_same_seed_gives_the_same_split_and_another_seed_another() -> None:
    labels = ["cat"] * 100 + ["dog"] * 100
    np.testing.assert_array_equal(split(labels, seed=1), split(labels, seed=1))
    changed = np.mean(split(labels, seed=1) != split(labels, seed=2))
    assert 0.2 < changed < 0.7  # by chance 0.46


@pytest.mark.parametrize("added", range(10))
def test_one_more_image_moves_hardly_any_other(added: int) -> None:
    labels = ["cat"] * 200 + ["dog"] * 200
    keys = [f"sha-{i}" for i in range(400)]
    before = split(labels, keys=keys)
    after = split([*labels, "cat"], keys=[*keys, f"new-{added}"])[:-1]
    assert np.count_nonzero(before != after) <= 2
    np.testing.assert_array_equal(before[200:], after[200:])


def test_the_tutorials_mistake_cannot_happen() -> None:
    # It held out the end of a list that begins with all cats and ends with all dogs.
    labels = ["cat"] * 700 + ["dog"] * 300
    naive = labels[-300:]
    assert set(naive) == {"dog"}
    splits = split(labels, val=0.15, test=0.15)
    held_out = Counter(label for label, name in zip(labels, splits, strict=True) if name != "train")
    assert held_out == {"cat": 210, "dog": 90}
    for name in ("val", "test"):
        assert Counter(np.array(labels)[splits == name].tolist()) == {"cat": 105, "dog": 45}


def test_held_out_images_come_from_everywhere_in_the_list() -> None:
    held_out = np.flatnonzero(split(["cat"] * 1000) != "train")
    assert np.histogram(held_out, bins=5, range=(0, 1000))[0].min() > 40  # 60 each by chance


@pytest.mark.parametrize(
    ("num_images", "counts"),
    [(1, {"train": 1}), (2, {"train": 2}), (3, {"train": 1, "val": 1, "test": 1})],
)
def test_of_a_tiny_class_one_image_stays_and_of_three_each_split_has_one(
    num_images: int, counts: dict[str, int]
) -> None:
    assert Counter(split(["cat"] * num_images).tolist()) == counts


def test_shares_that_leave_nothing_leave_an_image_to_train_on() -> None:
    splits = split(["cat"] * 10, val=0.5, test=0.5)
    assert Counter(splits.tolist()) == {"train": 1, "test": 5, "val": 4}


def test_three_groups_too_large_for_a_share_are_still_dealt_out() -> None:
    groups = [0] * 20 + [1] * 20 + [2] * 20  # such as the frames of three films
    splits = split(["cat"] * 60, groups)
    assert Counter(splits.tolist()) == {"train": 20, "val": 20, "test": 20}


def test_official_splits_are_kept() -> None:
    official = ["train"] * 50 + ["val"] * 10 + ["test"] * 20
    splits = split(["cat", "dog"] * 40, official=official)
    assert splits.tolist() == official


def test_an_official_test_split_is_kept_and_only_validation_is_drawn() -> None:
    labels = ["cat", "dog"] * 60
    official = ["train"] * 80 + ["test"] * 40
    splits = split(labels, official=official, val=0.2)
    assert (splits[80:] == "test").all()
    counts = Counter(zip(labels[:80], splits[:80].tolist(), strict=True))
    assert counts == {
        (label, name): number
        for label in ("cat", "dog")
        for name, number in (("train", 32), ("val", 8))
    }


def test_an_official_validation_split_is_kept_and_only_the_test_is_drawn() -> None:
    splits = split(["cat"] * 100, official=["train"] * 80 + ["val"] * 20, test=0.1)
    assert (splits[80:] == "val").all()
    assert Counter(splits[:80].tolist()) == {"train": 72, "test": 8}


def test_an_official_training_split_alone_gives_both_others() -> None:
    splits = split(["cat"] * 100, official=["train"] * 100)
    assert Counter(splits.tolist()) == {"train": 70, "val": 15, "test": 15}


def test_copies_of_a_held_out_training_image_follow_it_but_official_images_stay() -> None:
    groups = [*range(60), *range(30)]  # half the training images are in the official test, too
    splits = split(["cat"] * 90, groups, ["train"] * 60 + ["test"] * 30)
    assert (splits[60:] == "test").all()
    assert Counter(splits[:60].tolist()) == {"train": 51, "val": 9}
