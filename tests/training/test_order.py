"""Tests of the order of an epoch: a permutation, of which a disk reads long runs."""

import numpy as np
import pytest

from cnnpipe.training import order
from cnnpipe.training.order import shuffled


def numbers(total: int, num_bytes: int, epoch: int = 1, start: int = 0) -> list[int]:
    pieces = [piece for piece, _ in shuffled(total, num_bytes, 3, epoch, start)]
    return np.concatenate([[], *pieces]).astype(int).tolist()


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (42, 1), (2**32 - 1, 7)])
@pytest.mark.parametrize("total", [1, 5000])
def test_a_set_of_one_window_is_permuted_by_the_seed_and_the_epoch(
    seed: int, epoch: int, total: int
) -> None:
    [(piece, block)] = shuffled(total, 100_000, seed, epoch)
    np.testing.assert_array_equal(piece, np.random.default_rng([seed, epoch]).permutation(total))
    assert block.size == 0


@pytest.mark.parametrize("total", [60, 61, 119, 120, 121, 599, 605])
def test_of_many_windows_too_it_is_a_permutation(
    total: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "_BLOCK_BYTES", 1050)  # ten of 100 bytes
    monkeypatch.setattr(order, "_WINDOW_BLOCKS", 6)
    drawn = numbers(total, 100)
    assert sorted(drawn) == list(range(total))
    assert drawn == numbers(total, 100)
    assert total <= 60 or drawn != numbers(total, 100, epoch=2)
    for start in (1, 59, 60, 61, total - 1, total):
        assert numbers(total, 100, start=start) == drawn[start:]


def test_a_window_is_of_whole_blocks_each_of_which_comes_ahead_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(order, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr(order, "_WINDOW_BLOCKS", 6)
    steps = list(shuffled(600, 100, 3, 1))
    drawn = [number for piece, _ in steps for number in piece.tolist()]
    blocks = [block.tolist() for _, block in steps if block.size]
    assert sorted(blocks) == [list(range(i, i + 10)) for i in range(0, 600, 10)]
    for window in range(10):
        ahead = blocks[6 * window : 6 * (window + 1)]
        assert ahead == sorted(ahead)  # a disk's head goes one way
        assert sorted(drawn[60 * window : 60 * (window + 1)]) == np.concatenate(ahead).tolist()
    # The first at once, the others spread over the window before.
    sizes = [(len(piece), len(block)) for piece, block in steps]
    assert sizes == [(0, 10)] * 6 + [(10, 10)] * 54 + [(60, 0)]


@pytest.mark.parametrize("num_classes", [2, 20])
def test_batches_of_a_store_sorted_by_class_are_mixed(num_classes: int) -> None:
    total, num_bytes = 200_000, 30_000  # 6 GB
    drawn = np.array(numbers(total, num_bytes))
    of_class = drawn * num_classes // total
    batches = of_class[: total // 128 * 128].reshape(-1, 128)
    counts = np.stack([np.bincount(batch, minlength=num_classes) for batch in batches])
    # Of a plain permutation the counts of a class have the variance n p (1 - p).
    share = 1 / num_classes
    assert counts.var() < 1.5 * 128 * share * (1 - share)
    windows = np.array_split(of_class, 12)
    shares = [np.bincount(window, minlength=num_classes) / len(window) for window in windows]
    assert np.min(shares) > share / 4 and np.max(shares) < 2.5 * share


def test_the_last_window_is_about_as_large_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr(order, "_WINDOW_BLOCKS", 100)
    drawn = np.array(numbers(1010, 100))  # a block more than fits one
    assert len(set(drawn[-10:] // 10)) > 5
