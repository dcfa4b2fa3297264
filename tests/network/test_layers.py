"""Tests of the modules: the article's worked example, pooling, padding and the weights' start."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnpipe.network.geometry import Convolution, Layer, Padding, Pooling, PoolingKind, Relu, Shape
from cnnpipe.network.layers import L2Pool, initialise, modules

IMAGE = [
    [18, 54, 51, 239, 244, 188],
    [55, 121, 75, 78, 95, 88],
    [35, 24, 204, 113, 109, 221],
    [3, 154, 104, 235, 25, 130],
    [15, 253, 225, 159, 78, 233],
    [68, 85, 180, 214, 245, 0],
]
FILTER = [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
CONVOLVED = [[429, 505, 686, 856], [261, 792, 412, 640], [633, 653, 851, 751], [608, 913, 713, 657]]
POOLED = [[792, 856], [913, 851]]


def module(layer: Layer, shape: Shape) -> nn.Module:
    return modules([layer], shape)[0][1]


def images(values: list[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[None, None]


def test_the_articles_worked_example_comes_out_of_our_layers() -> None:
    convolution = module(Convolution("convolution", 1, 3), (1, 6, 6))
    with torch.no_grad():
        convolution.weight.copy_(images(FILTER))
        convolution.bias.zero_()
        convolved = convolution(images(IMAGE))
    assert convolved.tolist() == [[CONVOLVED]]
    assert module(Pooling("pooling", "max", 2), (1, 4, 4))(convolved).tolist() == [[POOLED]]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("max", [[4.0, 2.0]]),
        ("average", [[2.5, 0.5]]),
        ("l2", [[math.sqrt(30), 2.0]]),
    ],
)
def test_each_pooling_makes_of_a_window_what_its_name_says(
    kind: PoolingKind, expected: list[list[float]]
) -> None:
    pooling = module(Pooling("pooling", kind, 2), (1, 2, 4))
    result = pooling(images([[1, 2, 0, 0], [3, 4, 0, 2]]))
    torch.testing.assert_close(result, torch.tensor([[expected]]))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("size", "shape"), [(2, (3, 6, 8)), (2, (10, 7, 5)), (3, (3, 7, 9))])
def test_max_pooling_without_gradients_gives_the_same_values(
    size: int, shape: Shape, layout: torch.memory_format
) -> None:
    pooling = module(Pooling("pooling", "max", size), shape)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    x[0, 0, 1, 1] = torch.nan
    x = x.to(memory_format=layout)
    expected = F.max_pool2d(x, size)
    torch.testing.assert_close(pooling(x), expected, rtol=0, atol=0, equal_nan=True)
    with torch.inference_mode():
        torch.testing.assert_close(pooling(x), expected, rtol=0, atol=0, equal_nan=True)


def test_l2_pooling_is_the_root_of_the_sum_of_squares() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 7, 8)
    windows = x[:, :, :6, :6].reshape(3, 4, 2, 3, 2, 3)  # N, C, row, in it, column, in it
    torch.testing.assert_close(L2Pool(3)(x), windows.square().sum(dim=(3, 5)).sqrt())


def test_l2_pooling_has_a_finite_gradient_where_a_window_is_zero() -> None:
    x = torch.tensor([[[[0.0, 0.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]]]], requires_grad=True)
    L2Pool(2)(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([[[[0, 0, 0.6, 0.8], [0, 0, 0, 0]]]]))


@pytest.mark.parametrize(("size", "pool_size"), [(8, 2), (9, 2), (10, 3), (5, 1)])
def test_pooling_before_relu_gives_exactly_what_relu_before_pooling_gives(
    size: int, pool_size: int
) -> None:
    layers: list[Layer] = [Relu("relu"), Pooling("pooling", "max", pool_size)]
    made = modules(layers, (3, size, size))
    assert [name for name, _ in made] == ["pooling", "relu"]
    torch.manual_seed(0)
    x = torch.randn(4, 3, size, size)
    swapped = nn.Sequential(*(m for _, m in made))
    assert torch.equal(swapped(x), F.max_pool2d(F.relu(x), pool_size))


@pytest.mark.parametrize("kind", ["average", "l2"])
def test_only_max_pooling_changes_places_with_relu(kind: PoolingKind) -> None:
    made = modules([Relu("relu"), Pooling("pooling", kind, 2)], (3, 8, 8))
    assert [name for name, _ in made] == ["relu", "pooling"]


@pytest.mark.parametrize(
    ("kernel_size", "padding", "sides"),
    [
        (3, "valid", (0, 0)),
        (3, "same", (1, 1)),
        (4, "same", (1, 2)),
        (2, "same", (0, 1)),
        (3, 2, (2, 2)),
    ],
)
def test_zeros_are_added_where_the_padding_says(
    kernel_size: int, padding: Padding, sides: tuple[int, int]
) -> None:
    convolution = module(Convolution("c", 1, kernel_size, padding=padding), (1, 6, 6))
    inner = next(m for m in convolution.modules() if isinstance(m, nn.Conv2d))
    torch.manual_seed(0)
    x = torch.randn(2, 1, 6, 6)
    expected = F.conv2d(F.pad(x, (*sides, *sides)), inner.weight, inner.bias)
    assert torch.equal(convolution(x), expected)


@pytest.mark.parametrize("fan", [(200, 100), (300, 300)])
@pytest.mark.parametrize("init", ["normal", "xavier_uniform", "xavier_normal", "he_normal"])
def test_weights_begin_with_the_spread_that_their_name_promises(
    init: str, fan: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    # A dense layer, and a convolution of 5 x 5 = 25 pixels a channel.
    network = nn.Sequential(nn.Linear(*fan), nn.Conv2d(fan[0] // 25, fan[1] // 25, 5))
    initialise(network, init)
    for layer, (fan_in, fan_out) in zip(
        network, [fan, (fan[0] // 25 * 25, fan[1] // 25 * 25)], strict=True
    ):
        std = {
            "normal": 0.05,
            "xavier_uniform": math.sqrt(2 / (fan_in + fan_out)),
            "xavier_normal": math.sqrt(2 / (fan_in + fan_out)),
            "he_normal": math.sqrt(2 / fan_in),
        }[init]
        assert layer.weight.std().item() == pytest.approx(std, rel=0.07)
        assert layer.weight.mean().item() == pytest.approx(0, abs=0.15 * std)
        assert not layer.bias.any()


def test_xavier_uniform_is_uniform_and_xavier_normal_is_not() -> None:
    widest = {}
    for init in ("xavier_uniform", "xavier_normal"):
        torch.manual_seed(0)
        layer = nn.Linear(300, 300)
        initialise(layer, init)
        widest[init] = (layer.weight.abs().max() / layer.weight.std()).item()
    assert widest["xavier_uniform"] == pytest.approx(math.sqrt(3), rel=0.02)
    assert widest["xavier_normal"] > 3
