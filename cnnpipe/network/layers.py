"""The PyTorch module of each layer in `cnnpipe.network.geometry`."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnpipe.network import geometry
from cnnpipe.network.geometry import Layer, Padding, Shape


class MaxPool(nn.MaxPool2d):
    """The maximum of each window: (N, C, H, W) to (N, C, H // k, W // k)."""

    def forward(self, x: Tensor) -> Tensor:
        """The pooled feature maps."""
        if torch.is_grad_enabled() or x.device.type != "cpu" or self.kernel_size != 2:
            return F.max_pool2d(x, self.kernel_size)
        # PyTorch's own also finds the position of each maximum, which only the gradient needs. On a
        # CPU two maxima of halves take a sixth of its time for ten channels, and a quarter for 16.
        height, width = (side // 2 * 2 for side in x.shape[2:])
        rows = torch.maximum(x[:, :, 0:height:2, :width], x[:, :, 1:height:2, :width])
        return torch.maximum(rows[..., 0::2], rows[..., 1::2])


class L2Pool(nn.Module):
    """The L2 norm of each window, sqrt(sum of squares): (N, C, H, W) to (N, C, H // k, W // k)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """The pooled feature maps."""
        sums = F.avg_pool2d(x.square(), self.size) * self.size**2
        # After ReLU a window of zeros is common, and there the square root has no derivative:
        # without the epsilon the first such window makes all NaN. (torch.nn.LPPool2d masks such
        # windows instead, and takes 1.4 times as long.)
        return (sums + 1e-12).sqrt()


class Dropout(nn.Dropout):
    """Dropout that can be told what to drop: (N, ...) to (N, ...).

    Whoever computes a batch in parts draws for all of it once, and for an image the same values are
    dropped whatever part it is in.
    """

    def __init__(self, rate: float, num_values: int) -> None:
        """Drops that share of `num_values` values an image."""
        super().__init__(rate)
        self.num_values = num_values
        self.kept: Tensor | None = None
        """(N, num_values) bool for the next images; None draws."""

    def draw(self, count: int, device: torch.device) -> Tensor:
        """(count, num_values) bool, what is kept of so many images, from the global generator."""
        kept = torch.empty(count, self.num_values, dtype=torch.bool, device=device)
        return kept.bernoulli_(1 - self.p)

    def forward(self, x: Tensor) -> Tensor:
        """The values, some of them zero, the others the larger for it."""
        if self.kept is None or not self.training:
            return super().forward(x)
        return torch.where(self.kept.view_as(x), x / (1 - self.p), 0)


class Residual(nn.Module):
    """relu(x' + f(x)): (N, C, H, W) to (N, filters, H, W); see `geometry.Residual`."""

    def __init__(self, channels: int, filters: int, widens: bool) -> None:
        super().__init__()
        self.convolution_1 = nn.Conv2d(channels, filters, 3, padding=1, bias=False)
        self.norm_1 = nn.BatchNorm2d(filters)
        self.convolution_2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.norm_2 = nn.BatchNorm2d(filters)
        self.skip = (
            nn.Sequential(nn.Conv2d(channels, filters, 1, bias=False), nn.BatchNorm2d(filters))
            if widens
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """The feature maps of x, refined."""
        out = F.relu(self.norm_1(self.convolution_1(x)))
        out = self.norm_2(self.convolution_2(out))
        return F.relu(out + self.skip(x))


def modules(layers: list[Layer], input_shape: Shape) -> list[tuple[str, nn.Module]]:
    """The layers' modules by name, in the order in which they are computed.

    Max pooling changes places with the ReLU before it: the maximum of the positive parts is the
    positive part of the maximum, and ReLU then has a quarter of the values to go through.
    """
    shapes = geometry.shapes(layers, input_shape)
    result = [
        (layer.name, _module(layer, shape)) for layer, shape in zip(layers, shapes, strict=False)
    ]
    for i in range(len(result) - 1):
        if isinstance(result[i][1], nn.ReLU) and isinstance(result[i + 1][1], nn.MaxPool2d):
            result[i], result[i + 1] = result[i + 1], result[i]
    return result


def initialise(network: nn.Module, init: str) -> None:
    """Fills the weights in place from PyTorch's global generator; biases become zero.

    `normal` has standard deviation 0.05, Keras's RandomNormal. `he_normal` is for ReLU.

    Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural
    networks" (2010); He et al., "Delving deep into rectifiers" (2015).
    """
    fills: dict[str, Callable[[Tensor], Tensor]] = {
        "normal": lambda weight: nn.init.normal_(weight, std=0.05),
        "xavier_uniform": nn.init.xavier_uniform_,
        "xavier_normal": nn.init.xavier_normal_,
        "he_normal": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
    }
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fills[init](module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _module(layer: Layer, shape: Shape) -> nn.Module:
    match layer:
        case geometry.Convolution():
            return _convolution(layer, shape)
        case geometry.BatchNorm():
            return nn.BatchNorm2d(shape[0])
        case geometry.Relu():
            return nn.ReLU()
        case geometry.Pooling():
            pooling: dict[str, Callable[[int], nn.Module]] = {
                "max": MaxPool,
                "average": nn.AvgPool2d,
                "l2": L2Pool,
            }
            return pooling[layer.kind](layer.size)
        case geometry.Residual():
            return Residual(shape[0], layer.filters, layer.widens(shape))
        case geometry.GlobalAverage():
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        case geometry.Flatten():
            return nn.Flatten()
        case geometry.Dropout():
            return Dropout(layer.rate, math.prod(shape))
        case geometry.Dense():
            return nn.Linear(shape[0] * shape[1] * shape[2], layer.units)
    raise TypeError(f"no module for the layer {layer}")


def _convolution(layer: geometry.Convolution, shape: Shape) -> nn.Module:
    padding = _sides(layer.kernel_size, layer.padding)
    convolution = nn.Conv2d(
        shape[0],
        layer.filters,
        layer.kernel_size,
        layer.stride,
        padding=padding if isinstance(padding, int) else 0,
    )
    if isinstance(padding, int):
        return convolution
    return nn.Sequential(nn.ZeroPad2d(padding), convolution)


def _sides(kernel_size: int, padding: Padding) -> int | tuple[int, int, int, int]:
    """P, or (left, right, top, bottom) where F - 1 is odd and one side gets the zero more."""
    total = geometry.total_padding(kernel_size, padding)
    if total % 2 == 0:
        return total // 2
    return (total // 2, total - total // 2) * 2
