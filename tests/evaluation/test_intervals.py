"""Tests of what chance explains."""

import numpy as np
import pytest

from cnnpipe.evaluation.intervals import far_below


@pytest.mark.parametrize("count", [20, 100, 1_000])
def test_equal_shares_are_hardly_ever_far_apart(count: int) -> None:
    rng = np.random.default_rng(0)
    pairs = rng.binomial(count, 0.7, (2_000, 2)) / count
    assert np.mean([far_below(low, count, high, count) for low, high in pairs]) <= 0.002


def test_shares_that_differ_are_found_with_enough_images() -> None:
    assert far_below(0.70, 200, 0.95, 700)
    assert not far_below(0.80, 10, 0.95, 700)  # perhaps by chance
    assert not far_below(0.92, 10_000, 0.99, 10_000)  # not by chance, but not worth a word
    assert not far_below(0.95, 200, 0.70, 700)
    assert far_below(0, 50, 1, 50) and not far_below(1, 50, 1, 50)
