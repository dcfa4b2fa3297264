"""Tests of the arithmetic: sizes against counted positions, sums that say what they are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnpipe.network.geometry import (
    BatchNorm,
    Convolution,
    Dense,
    Flatten,
    ImpossibleSize,
    Padding,
    Pooling,
    Residual,
    mlp_parameters,
    output_size,
    shapes,
    size_sum,
    total_padding,
)

paddings = st.sampled_from(["valid", "same"]) | st.integers(0, 6)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 8), paddings)
def test_output_size_is_the_number_of_positions_a_filter_takes(
    size: int, kernel_size: int, stride: int, padding: Padding
) -> None:
    padded = size + total_padding(kernel_size, padding)
    positions = len(range(0, padded - kernel_size + 1, stride))
    assert max(0, output_size(size, kernel_size, stride, padding)) == positions


@given(st.integers(1, 60), st.integers(1, 12))
def test_same_padding_keeps_the_size_at_stride_1(size: int, kernel_size: int) -> None:
    assert output_size(size, kernel_size, 1, "same") == size


def test_a_6_x_6_image_and_a_3_x_3_filter_give_4_x_4() -> None:
    assert Convolution("convolution", 1, 3).output((1, 6, 6)) == (1, 4, 4)


@pytest.mark.parametrize(("kernel_size", "side"), [(5, 28), (3, 30)])
def test_ten_filters_on_32_x_32_x_3(kernel_size: int, side: int) -> None:
    assert Convolution("convolution", 10, kernel_size).output((3, 32, 32)) == (10, side, side)


@pytest.mark.parametrize(
    ("sums", "expected"),
    [
        ((300, 5, 1, "valid"), "(300 - 5 + 2·0)/1 + 1 = 296"),
        ((300, 5, 1, "same"), "(300 - 5 + 2·2)/1 + 1 = 300"),
        ((300, 4, 1, "same"), "(300 - 4 + 2·1.5)/1 + 1 = 300"),
        ((300, 5, 1, 1), "(300 - 5 + 2·1)/1 + 1 = 298"),
        (
            (300, 5, 2, "valid"),
            "(300 - 5 + 2·0)/2 + 1 = 148.5, rounded down to 148: 1 px left over",
        ),
        ((10, 4, 4, "valid"), "(10 - 4 + 2·0)/4 + 1 = 2.5, rounded down to 2: 2 px left over"),
        ((9, 3, 7, "valid"), "(9 - 3 + 2·0)/7 + 1 = 1.857, rounded down to 1: 6 px left over"),
        (
            (2002, 3, 2, "valid"),
            "(2002 - 3 + 2·0)/2 + 1 = 1000.5, rounded down to 1000: 1 px left over",
        ),
        ((4096, 4096, 1, 4000), "(4096 - 4096 + 2·4000)/1 + 1 = 8001"),
    ],
)
def test_the_sum_is_written_out_and_says_when_it_is_rounded(
    sums: tuple[int, int, int, Padding], expected: str
) -> None:
    assert size_sum(*sums) == expected


def test_an_image_that_is_not_square_has_a_sum_for_each_side() -> None:
    assert Pooling("pooling", "max", 2).formula((1, 6, 4)) == (
        "(6 - 2 + 2·0)/2 + 1 = 3; (4 - 2 + 2·0)/2 + 1 = 2"
    )
    assert Residual("residual", 1).formula((1, 6, 4)) == (
        "(6 - 3 + 2·1)/1 + 1 = 6; (4 - 3 + 2·1)/1 + 1 = 4, twice"
    )


@pytest.mark.parametrize("shape", [(3, 4, 9), (3, 9, 4)])
def test_a_filter_larger_than_either_side_is_impossible(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ImpossibleSize, match=r"^wide: .* = \(4 - 5 \+ 2·0\)/1 \+ 1 = 0, "):
        Convolution("wide", 1, 5).output(shape)
    with pytest.raises(ImpossibleSize, match=r"^pool: .* = \(4 - 5 \+ 2·0\)/5 \+ 1 = 0.8, "):
        Pooling("pool", "max", 5).output(shape)


def test_shapes_lists_what_goes_into_each_layer_and_what_comes_out() -> None:
    layers = [Convolution("a", 4, 3), Pooling("b", "max", 2), Flatten("c"), Dense("d", 7)]
    assert shapes(layers, (3, 10, 8)) == [(3, 10, 8), (4, 8, 6), (4, 4, 3), (48, 1, 1), (7, 1, 1)]


def test_the_mlp_that_replaces_a_network_is_counted_by_hand() -> None:
    layers = [
        Convolution("convolution", 2, 3),
        BatchNorm("batch_norm"),
        Pooling("pooling", "max", 2),
        Flatten("flatten"),
        Dense("dense", 2),
    ]
    # 1 x 4 x 4 = 16 values to 2 x 2 x 2 = 8, their normalisation, 2 x 1 x 1 = 2 values to 2.
    assert mlp_parameters(layers, (1, 4, 4)) == (16 + 1) * 8 + 2 * 2 + (2 + 1) * 2


def test_a_residual_block_counts_as_two_dense_layers() -> None:
    # 2 x 3 x 3 = 18 values to 4 x 3 x 3 = 36, and these to 36 again.
    assert mlp_parameters([Residual("r", 4)], (2, 3, 3)) == (18 + 1) * 36 + (36 + 1) * 36
