"""The network as a PyTorch module."""

from collections import OrderedDict

from torch import nn

from cnnpipe.network.architectures import layers_of
from cnnpipe.network.geometry import Shape
from cnnpipe.network.layers import initialise, modules
from cnnpipe.params import Model


def build(model: Model, input_shape: Shape, num_classes: int) -> nn.Module:
    """The network that the `model` section describes, its weights from PyTorch's generator.

    It takes normalised images, (N, C, H, W) float32, and returns logits: (N, num_classes), or
    (N, 1) where the head is `sigmoid`. Its children bear the names that `summarize` prints.

    Args:
        model: the `model` section of params.yaml.
        input_shape: (C, H, W).
        num_classes: at least 2.

    Raises:
        ImpossibleSize: a layer's output would be smaller than 1 x 1.
        ValueError: the head is `sigmoid` and there are not two classes.
    """
    layers = layers_of(model, num_classes)
    network = nn.Sequential(OrderedDict(modules(layers, input_shape)))
    initialise(network, model.init)
    return network
