"""The networks: each is one function that lists its layers. Another network is another function.

A function takes the `model` section of params.yaml and yields the layers between the normalised
image and the head, which `layers_of` appends: dropout and a dense layer with a unit a class
(`softmax`) or a single unit (`sigmoid`).
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from cnnpipe.network.geometry import (
    BatchNorm,
    Convolution,
    Dense,
    Dropout,
    Flatten,
    GlobalAverage,
    Layer,
    Pooling,
    Relu,
)
from cnnpipe.network.geometry import Residual as ResidualBlock

if TYPE_CHECKING:
    from cnnpipe.params import Model


def article(model: "Model") -> Iterator[Layer]:
    """The tutorial's network: one convolution, ReLU, one pooling, flattened."""
    yield from _conv_pool(model, "", model.filters)
    yield Flatten("flatten")
    yield from _hidden(model)


def deep(model: "Model") -> Iterator[Layer]:
    """`blocks` times convolution, ReLU and pooling, the filters doubled from block to block."""
    for block in range(model.blocks):
        yield from _conv_pool(model, f"_{block + 1}", model.filters * 2**block)
    yield Flatten("flatten")
    yield from _hidden(model)


def residual(model: "Model") -> Iterator[Layer]:
    """A compact modern network for photos: residual blocks of 3 x 3 filters, each after a pooling.

    It reads `filters` (of the first convolution, doubled in every block but the first), `blocks`,
    `pooling`, `dropout`, `head` and `init`. The head sees the mean of each feature map.
    """
    yield Convolution("convolution", model.filters, 3, padding="same")
    yield BatchNorm("batch_norm")
    yield Relu("relu")
    for block in range(1, model.blocks + 1):
        yield Pooling(f"pooling_{block}", model.pooling, 2)
        yield ResidualBlock(f"residual_{block}", model.filters * 2**block)
    yield GlobalAverage("global_average")


def mlp(model: "Model") -> Iterator[Layer]:
    """For the comparison: the image flattened, then `blocks` hidden layers of `dense_units`."""
    yield Flatten("flatten")
    for block in range(model.blocks if model.dense_units else 0):
        yield Dense(f"hidden_{block + 1}", model.dense_units)
        yield Relu(f"hidden_relu_{block + 1}")


ARCHITECTURES: dict[str, Callable[["Model"], Iterator[Layer]]] = {
    function.__name__: function for function in (article, deep, residual, mlp)
}


def layers_of(model: "Model", num_classes: int) -> list[Layer]:
    """Every layer of the network that the `model` section describes, the head included.

    Raises:
        ValueError: the head is `sigmoid` and there are not two classes.
    """
    if model.head == "sigmoid" and num_classes != 2:
        raise ValueError(
            f"model.head is sigmoid, one unit for two classes, but there are {num_classes} "
            "classes: use model.head=softmax"
        )
    layers = list(ARCHITECTURES[model.architecture](model))
    if model.dropout:
        layers.append(Dropout("dropout", model.dropout))
    layers.append(Dense("dense", 1 if model.head == "sigmoid" else num_classes))
    return layers


def _conv_pool(model: "Model", suffix: str, filters: int) -> Iterator[Layer]:
    yield Convolution(
        f"convolution{suffix}", filters, model.kernel_size, model.stride, model.padding
    )
    if model.batch_norm:
        yield BatchNorm(f"batch_norm{suffix}")
    yield Relu(f"relu{suffix}")
    yield Pooling(f"pooling{suffix}", model.pooling, model.pool_size)


def _hidden(model: "Model") -> Iterator[Layer]:
    if model.dense_units:
        yield Dense("hidden", model.dense_units)
        yield Relu("hidden_relu")
