"""Tests of the layer table: the article's numbers, and the truth about every network."""

import random

import pytest
import torch
from torch import nn

from cnnpipe.network import build, summarize
from cnnpipe.network.geometry import ImpossibleSize, Shape
from cnnpipe.network.summary import Summary
from cnnpipe.params import Model, Params


def by_name(summary: Summary) -> dict[str, tuple[Shape, int]]:
    return {row.name: (row.output, row.parameters) for row in summary.layers}


def test_the_defaults_are_the_articles_network() -> None:
    params = Params()
    summary = summarize(params.model, params.input_shape, 2)
    assert by_name(summary) == {
        "convolution": ((10, 296, 296), 760),
        "pooling": ((10, 148, 148), 0),
        "flatten": ((219_040, 1, 1), 0),
        "dense": ((2, 1, 1), 438_082),
    }
    assert summary.parameters == summary.parameters_trainable == 438_842
    # 270,000 values to 876,160, and what the pooling leaves of these to 2.
    assert summary.parameters_mlp == 270_001 * 876_160 + 438_082


def test_the_sigmoid_head_has_the_articles_headline_of_parameters() -> None:
    assert summarize(Model(head="sigmoid"), (3, 300, 300), 2).parameters == 219_801


@pytest.mark.parametrize(("kernel_size", "side"), [(5, 28), (3, 30)])
def test_ten_filters_on_32_x_32_x_3(kernel_size: int, side: int) -> None:
    summary = summarize(Model(kernel_size=kernel_size), (3, 32, 32), 2)
    assert summary.layers[0].output == (10, side, side)


def test_a_6_x_6_image_and_a_3_x_3_filter_give_4_x_4() -> None:
    assert summarize(Model(kernel_size=3), (1, 6, 6), 2).layers[0].output[1:] == (4, 4)


def test_to_dict_has_the_documented_keys() -> None:
    result = summarize(Model(kernel_size=3), (1, 6, 6), 2).to_dict()
    assert result == {
        "input": [1, 6, 6],
        "layers": [
            {
                "name": "convolution",
                "output": [10, 4, 4],
                "formula": "(6 - 3 + 2·0)/1 + 1 = 4",
                "parameters": 100,
                "parameters_formula": "(3·3·1 + 1)·10",
            },
            {
                "name": "pooling",
                "output": [10, 2, 2],
                "formula": "(4 - 2 + 2·0)/2 + 1 = 2",
                "parameters": 0,
                "parameters_formula": "",
            },
            {
                "name": "flatten",
                "output": [40, 1, 1],
                "formula": "2·2·10 = 40",
                "parameters": 0,
                "parameters_formula": "",
            },
            {
                "name": "dense",
                "output": [2, 1, 1],
                "formula": "2 units",
                "parameters": 82,
                "parameters_formula": "(40 + 1)·2",
            },
        ],
        "parameters": 182,
        "parameters_trainable": 182,
        "parameters_mlp": 37 * 160 + 82,
    }


def test_the_table_shows_sizes_sums_and_totals() -> None:
    text = str(summarize(Model(), (3, 300, 300), 2))
    for expected in ("296 x 296 x 10", "148 x 148 x 10", "(300 - 5 + 2·0)/1 + 1 = 296",
                     "438,082", "438,842", "219,040", "539,065 times as many"):  # fmt: skip
        assert expected in text
    assert "rounded" not in text


def test_the_table_says_where_a_stride_leaves_pixels_over() -> None:
    text = str(summarize(Model(stride=2), (3, 300, 300), 2))
    assert "(300 - 5 + 2·0)/2 + 1 = 148.5, rounded down to 148: 1 px left over" in text


def test_sigmoid_with_three_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="one unit for two classes, but there are 3 classes"):
        summarize(Model(head="sigmoid"), (3, 300, 300), 3)


def random_case(chance: random.Random) -> tuple[Model, Shape, int]:
    """A network of any kind, small enough to build thousands of them."""
    kernel_size = chance.randint(1, 6)
    head = chance.choice(["softmax", "sigmoid"])
    model = Model(
        architecture=chance.choice(["article", "deep", "deep", "residual", "mlp"]),
        filters=chance.randint(1, 3),
        kernel_size=kernel_size,
        stride=chance.randint(1, 3),
        padding=chance.choice(["valid", "same", chance.randint(0, kernel_size - 1)]),
        pooling=chance.choice(["max", "average", "l2"]),
        pool_size=chance.randint(1, 3),
        blocks=chance.randint(1, 3),
        dense_units=chance.choice([0, 3]),
        dropout=chance.choice([0.0, 0.5]),
        batch_norm=chance.choice([False, True]),
        head=head,
        init=chance.choice(["normal", "xavier_uniform", "xavier_normal", "he_normal"]),
    )
    shape = (chance.choice([1, 3]), chance.randint(4, 40), chance.randint(4, 40))
    return model, shape, 2 if head == "sigmoid" else chance.randint(2, 4)


def measured(network: nn.Module, shape: Shape) -> dict[str, tuple[Shape, int]]:
    """The size of the tensor that comes out of each layer, and the layer's parameters."""
    found: dict[str, tuple[Shape, int]] = {}

    def note(name: str, module: nn.Module, output: torch.Tensor) -> None:
        size = (*output.shape[1:], 1, 1)[:3]
        found[name] = (size, sum(p.numel() for p in module.parameters()))  # type: ignore[assignment]

    for name, module in network.named_children():
        module.register_forward_hook(lambda m, _, output, name=name: note(name, m, output))
    with torch.no_grad():
        network.eval()(torch.zeros(1, *shape))
    return found


def test_every_size_and_count_is_the_networks_over_thousands_of_random_networks() -> None:
    chance = random.Random(2017)
    possible = 0
    for _ in range(3000):
        model, shape, num_classes = random_case(chance)
        try:
            summary = summarize(model, shape, num_classes)
        except ImpossibleSize:
            with pytest.raises(ImpossibleSize):
                build(model, shape, num_classes)
            continue
        possible += 1
        found = measured(build(model, shape, num_classes), shape)
        told = by_name(summary)
        left_out = {name for name in found if "relu" in name or name == "dropout"}
        assert told == {key: value for key, value in found.items() if key not in left_out}, model
        assert summary.parameters == sum(parameters for _, parameters in found.values())
        for row in summary.layers:
            formula = row.parameters_formula.replace("·", "*").replace(",", "")
            assert eval(formula or "0") == row.parameters
    assert 2000 < possible < 2950  # both kinds are among them
