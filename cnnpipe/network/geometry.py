"""What each kind of layer does to a size, and how many parameters it takes: arithmetic alone.

A network is described as a list of these layers before any of it exists, so that a description
can be checked, summed and printed without PyTorch; `cnnpipe.network.layers` makes the modules.

Shapes are (channels, height, width); what has been flattened is (features, 1, 1).
"""

from dataclasses import dataclass
from typing import Literal, Protocol

Shape = tuple[int, int, int]
Padding = Literal["valid", "same"] | int
PoolingKind = Literal["max", "average", "l2"]


class ImpossibleSize(ValueError):
    """A layer's output would be smaller than 1 x 1; the message names the layer and the sum."""


def total_padding(kernel_size: int, padding: Padding) -> int:
    """2P: the zeros added to a row, both ends together.

    `valid` adds none; `same` adds F - 1, which at stride 1 keeps the size; a number adds that
    many at each end.
    """
    if padding == "valid":
        return 0
    return kernel_size - 1 if padding == "same" else 2 * padding


def output_size(size: int, kernel_size: int, stride: int = 1, padding: Padding = "valid") -> int:
    """(W - F + 2P)/S + 1, rounded down: the positions a filter takes along one side.

    It is below 1 where the filter is larger than the padded image.

    Source: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning" (2016),
    relationship 6.
    """
    return (size - kernel_size + total_padding(kernel_size, padding)) // stride + 1


def size_sum(size: int, kernel_size: int, stride: int, padding: Padding) -> str:
    """The sum behind `output_size`, written out; it says where pixels are left over."""
    twice_p = total_padding(kernel_size, padding)
    p = f"{twice_p / 2:.12g}"
    span = size - kernel_size + twice_p
    exact = span / stride + 1
    text = f"({size} - {kernel_size} + 2·{p})/{stride} + 1 = {round(exact, 3):.12g}"
    rounded = output_size(size, kernel_size, stride, padding)
    if span < 0 or span % stride == 0:
        return text
    return f"{text}, rounded down to {rounded}: {span % stride} px left over"


def _window_output(name: str, shape: Shape, sums: tuple[int, int, Padding]) -> tuple[int, int]:
    kernel_size, stride, padding = sums
    height, width = (output_size(side, kernel_size, stride, padding) for side in shape[1:])
    if min(height, width) < 1:
        side = min(shape[1:])
        raise ImpossibleSize(
            f"{name}: (W - F + 2P)/S + 1 = {size_sum(side, kernel_size, stride, padding)}, "
            "which is smaller than 1 x 1"
        )
    return height, width


def _window_formula(shape: Shape, sums: tuple[int, int, Padding]) -> str:
    # One sum for a square; for any other image the height's and the width's.
    return "; ".join(size_sum(side, *sums) for side in dict.fromkeys(shape[1:]))


def _count(shape: Shape) -> int:
    return shape[0] * shape[1] * shape[2]


class Layer(Protocol):
    """What every layer answers, given the shape that comes in."""

    @property
    def name(self) -> str:
        """The name in the summary and in the model file."""

    def output(self, shape: Shape) -> Shape:
        """The shape that goes out. Raises `ImpossibleSize` where that is below 1 x 1."""

    def formula(self, shape: Shape) -> str:
        """The sum behind the output's size."""

    def parameters(self, shape: Shape) -> int:
        """The number of trainable parameters."""

    def parameters_formula(self, shape: Shape) -> str:
        """The sum behind `parameters`, empty where there are none."""


@dataclass(frozen=True)
class _Plain:
    """A layer without parameters that keeps its shape."""

    name: str

    def output(self, shape: Shape) -> Shape:
        return shape

    def formula(self, shape: Shape) -> str:
        return "as it comes"

    def parameters(self, shape: Shape) -> int:
        return 0

    def parameters_formula(self, shape: Shape) -> str:
        return ""


@dataclass(frozen=True)
class Relu(_Plain):
    """max(0, x), element by element."""


@dataclass(frozen=True)
class Dropout(_Plain):
    """Sets a share of the values to zero while training."""

    rate: float = 0.0


@dataclass(frozen=True)
class BatchNorm(_Plain):
    """Standardises each channel over the batch; two parameters a channel, scale and shift."""

    def parameters(self, shape: Shape) -> int:
        return 2 * shape[0]

    def parameters_formula(self, shape: Shape) -> str:
        return f"2·{shape[0]}"


@dataclass(frozen=True)
class Convolution(_Plain):
    """`filters` square filters slid over the image; the same weights at every position."""

    filters: int
    kernel_size: int
    stride: int = 1
    padding: Padding = "valid"

    @property
    def _sums(self) -> tuple[int, int, Padding]:
        return self.kernel_size, self.stride, self.padding

    def output(self, shape: Shape) -> Shape:
        return (self.filters, *_window_output(self.name, shape, self._sums))

    def formula(self, shape: Shape) -> str:
        return _window_formula(shape, self._sums)

    def parameters(self, shape: Shape) -> int:
        return (self.kernel_size**2 * shape[0] + 1) * self.filters

    def parameters_formula(self, shape: Shape) -> str:
        return f"({self.kernel_size}·{self.kernel_size}·{shape[0]} + 1)·{self.filters}"


@dataclass(frozen=True)
class Pooling(_Plain):
    """Each window of `size` x `size` becomes one value: its maximum, average or L2 norm."""

    kind: PoolingKind
    size: int

    @property
    def _sums(self) -> tuple[int, int, Padding]:
        return self.size, self.size, "valid"

    def output(self, shape: Shape) -> Shape:
        return (shape[0], *_window_output(self.name, shape, self._sums))

    def formula(self, shape: Shape) -> str:
        return _window_formula(shape, self._sums)


@dataclass(frozen=True)
class Residual(_Plain):
    """relu(x' + f(x)): f is two 3 x 3 convolutions, x' is x, by a 1 x 1 convolution if widened.

    Every convolution is followed by batch normalisation and has no bias of its own, since the
    normalisation would take it away again.

    Source: He et al., "Deep residual learning for image recognition" (2015), figure 5 left.
    """

    filters: int

    def output(self, shape: Shape) -> Shape:
        return (self.filters, *shape[1:])

    def formula(self, shape: Shape) -> str:
        return _window_formula(shape, (3, 1, "same")) + ", twice"

    def widens(self, shape: Shape) -> bool:
        """Whether x needs a 1 x 1 convolution before it can be added."""
        return shape[0] != self.filters

    def parameters(self, shape: Shape) -> int:
        out = self.filters
        both = 9 * shape[0] * out + 9 * out * out + 4 * out
        return both + (shape[0] * out + 2 * out if self.widens(shape) else 0)

    def parameters_formula(self, shape: Shape) -> str:
        into, out = shape[0], self.filters
        skip = f" + 1·1·{into}·{out} + 2·{out}" if self.widens(shape) else ""
        return f"3·3·{into}·{out} + 3·3·{out}·{out} + 4·{out}{skip}"


@dataclass(frozen=True)
class GlobalAverage(_Plain):
    """The mean of each channel."""

    def output(self, shape: Shape) -> Shape:
        return (shape[0], 1, 1)

    def formula(self, shape: Shape) -> str:
        return f"the mean of {shape[1]}·{shape[2]} values a channel"


@dataclass(frozen=True)
class Flatten(_Plain):
    """All values in one row; from here on the arrangement of the pixels is gone."""

    def output(self, shape: Shape) -> Shape:
        return (_count(shape), 1, 1)

    def formula(self, shape: Shape) -> str:
        return f"{shape[1]}·{shape[2]}·{shape[0]} = {_count(shape):,}"


@dataclass(frozen=True)
class Dense(_Plain):
    """Every value to every unit, each connection a weight of its own."""

    units: int

    def output(self, shape: Shape) -> Shape:
        return (self.units, 1, 1)

    def formula(self, shape: Shape) -> str:
        return f"{self.units:,} unit{'s' if self.units > 1 else ''}"

    def parameters(self, shape: Shape) -> int:
        return (_count(shape) + 1) * self.units

    def parameters_formula(self, shape: Shape) -> str:
        return f"({_count(shape):,} + 1)·{self.units:,}"


def shapes(layers: list[Layer], input_shape: Shape) -> list[Shape]:
    """The shape that goes into each layer, and last the shape that comes out of the network.

    Raises:
        ImpossibleSize: an output would be smaller than 1 x 1.
    """
    result = [input_shape]
    for layer in layers:
        result.append(layer.output(result[-1]))
    return result


def mlp_parameters(layers: list[Layer], input_shape: Shape) -> int:
    """The parameters of the multilayer perceptron that would replace the network.

    It has the same values in and out of every step, but each convolution is a dense layer: what
    is saved by looking at a few pixels at a time with the same weights everywhere.
    """
    total = 0
    for layer, shape in zip(layers, shapes(layers, input_shape), strict=False):
        if isinstance(layer, Convolution | Residual):
            inner = layer.output(shape)
            total += Dense("", _count(inner)).parameters(shape)
            if isinstance(layer, Residual):  # its second convolution
                total += Dense("", _count(inner)).parameters(inner)
        else:
            total += layer.parameters(shape)
    return total
