"""What a trained network does with one image, in numbers: `cnnpipe explain` draws them.

Nothing of the network is computed anew here: its own modules run, one after another.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.ndimage
import torch
from captum.attr import IntegratedGradients
from torch import Tensor, nn

from cnnpipe.data.resizer import grey
from cnnpipe.network import geometry
from cnnpipe.network.architectures import layers_of
from cnnpipe.network.classifier import Classifier
from cnnpipe.network.geometry import ImpossibleSize, Layer, Shape
from cnnpipe.network.layers import Residual
from cnnpipe.network.summary import summarize
from cnnpipe.params import Model

STEPS = 32
"""Of integrated gradients: for the networks here they leave a percent or so unaccounted for."""
_AT_ONCE = 8
"""At 300 x 300 pixels more at once take more memory and no less time."""

SOBEL = np.array([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
"""Brightness that grows to the right. Source: Sobel and Feldman, "A 3x3 isotropic gradient operator
for image processing" (1968)."""


@dataclass(frozen=True)
class Activation:
    """What comes out of a layer."""

    layer: Layer
    values: np.ndarray
    """(C, H, W) float32; what has been flattened is (features, 1, 1)."""


@dataclass(frozen=True)
class Answer:
    """What the network says of an image."""

    probabilities: np.ndarray
    """(classes,) float32, as `cnnpipe predict` gives them."""
    index: int
    """Of the most probable class."""
    lead: float
    """That class's entry in `leads` of the image as it is, not mirrored."""


def answer(classifier: Classifier, image: np.ndarray) -> Answer:
    """The network's answer for a prepared image, (H, W, C) uint8."""
    with torch.inference_mode():
        probabilities = classifier.probabilities(_batch(image))[0].numpy()
        index = int(probabilities.argmax())
        lead = leads(classifier, classifier.preparation.normalise(_batch(image)))[0, index]
    return Answer(probabilities, index, float(lead))


def normalised(classifier: Classifier, image: np.ndarray) -> np.ndarray:
    """What goes into the first layer: (H, W, C) uint8 to (C, H, W) float32."""
    return np.asarray(classifier.preparation.normalise(_batch(image))[0].numpy())


def _batch(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None]  # (1, C, H, W)


def leads(classifier: Classifier, images: Tensor) -> Tensor:
    """How far each class's logit is ahead: normalised (N, C, H, W) to (N, classes).

    Softmax only sees differences of logits, so each is taken relative to the mean of all. A sigmoid
    unit's logit speaks for the second class as much as against the first.
    """
    if classifier.model.head == "sigmoid":
        logit: Tensor = classifier.network(images)
        return torch.cat([-logit, logit], dim=1)
    logits = classifier.class_logits(images)
    return logits - logits.mean(dim=1, keepdim=True)


def activations(classifier: Classifier, image: np.ndarray) -> list[Activation]:
    """The output of every layer, in the order of the description: ReLU before pooling.

    The network itself pools first where it takes the maximum, which comes to the same.

    Args:
        classifier: the trained network.
        image: prepared, (H, W, C) uint8.
    """
    layers = layers_of(classifier.model, len(classifier.class_names))
    sizes = geometry.shapes(layers, classifier.preparation.input_shape)[1:]
    result = []
    with torch.inference_mode():
        x = classifier.preparation.normalise(_batch(image))
        for layer, size in zip(layers, sizes, strict=True):
            x = classifier.network.get_submodule(layer.name)(x)
            result.append(Activation(layer, x[0].numpy().reshape(size)))
    return result


def inside_residual(classifier: Classifier, name: str, x: np.ndarray) -> dict[str, np.ndarray]:
    """What happens within a residual block: the output of each of its modules, and their sum.

    Args:
        classifier: the trained network.
        name: of the block.
        x: (C, H, W) float32, what goes into it.
    """
    block = classifier.network.get_submodule(name)
    assert isinstance(block, Residual)
    outputs: dict[str, np.ndarray] = {}

    def note(key: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[key] = output[0].numpy()

        return block.get_submodule(key).register_forward_hook(hook)

    hooks = [note(key) for key, _ in block.named_children()]
    try:
        with torch.inference_mode():
            block(torch.from_numpy(x)[None])
    finally:
        for handle in hooks:
            handle.remove()
    outputs["sum"] = outputs["norm_2"] + outputs["skip"]
    return outputs


def most_active(values: np.ndarray, most: int) -> list[int]:
    """The channels, at most so many, whose positive parts have the largest mean, in their order.

    Args:
        values: (C, H, W).
        most: channels.
    """
    means = np.maximum(values, 0).mean(axis=(1, 2))
    return sorted(np.argsort(-means, kind="stable")[:most].tolist())


def liveliest(image: np.ndarray, side: int) -> tuple[int, int]:
    """Top and left of the square of so many values that vary most, the first of equals.

    Args:
        image: (H, W, C), neither side shorter than the square's.
        side: of the square, in pixels.
    """
    brightness = image.mean(axis=2)
    # The filter's origin makes a value that of the square to the right and below.
    mean, mean_of_squares = (
        scipy.ndimage.uniform_filter(values, side, origin=-(side // 2))
        for values in (brightness, brightness**2)
    )
    height, width = (length - side + 1 for length in brightness.shape)
    variance = (mean_of_squares - mean**2)[:height, :width]
    top, left = divmod(int(variance.argmax()), width)
    return top, left


@dataclass(frozen=True)
class Filters:
    """The filters of a convolution."""

    weights: np.ndarray
    """(filters, C, F, F) float64."""
    bias: np.ndarray
    """(filters,) float64."""
    stride: int
    before: int
    """Zeros above and to the left of the image."""
    after: int
    """Zeros below and to the right."""


def first_filters(classifier: Classifier) -> Filters | None:
    """The filters that look at the image itself; None where the network begins with no convolution.

    An MLP does not.
    """
    layer = layers_of(classifier.model, len(classifier.class_names))[0]
    if not isinstance(layer, geometry.Convolution):
        return None
    total = geometry.total_padding(layer.kernel_size, layer.padding)
    module = classifier.network.get_submodule(layer.name)
    convolution = next(part for part in module.modules() if isinstance(part, nn.Conv2d))
    assert convolution.bias is not None
    return Filters(
        convolution.weight.detach().double().numpy(),
        convolution.bias.detach().double().numpy(),
        layer.stride,
        total // 2,
        total - total // 2,
    )


def sobel_filters(num_channels: int) -> Filters:
    """One Sobel filter on every channel, for a network that has no filters of its own."""
    weights = np.tile(SOBEL, (1, num_channels, 1, 1))
    return Filters(weights, np.zeros(1), 1, 1, 1)


@dataclass(frozen=True)
class Position:
    """A filter at one place of the image, worked out."""

    top: int
    """Of the patch in the image, in pixels; negative within the padding."""
    left: int
    patch: np.ndarray
    """(C, F, F) float64, normalised pixels."""
    products: np.ndarray
    """(C, F, F) float64: each pixel times the weight that lies on it."""
    sums: np.ndarray
    """(C,) float64: of the products of each channel."""
    total: float
    """All products and the bias: the activation."""


@dataclass(frozen=True)
class WorkedConvolution:
    """A filter where the image fits its pattern best, and at the next places."""

    filters: Filters
    index: int
    """Of the filter."""
    here: Position
    next: dict[int, Position]
    """One step to the right, by stride; a step that leaves the image is missing."""


def worked_convolution(pixels: np.ndarray, filters: Filters) -> WorkedConvolution:
    """The place that fits the pattern of one of the filters best, worked out product by product.

    It is one where the filter responds, away from the border, if there is any.

    Args:
        pixels: (C, H, W), normalised.
        filters: of the first convolution.

    Source: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning" (2016).
    """
    ends = (filters.before, filters.after)
    padded = np.pad(pixels.astype(np.float64), ((0, 0), ends, ends))
    size, stride = filters.weights.shape[2], filters.stride
    image, weights, bias = map(torch.from_numpy, (padded[None], filters.weights, filters.bias))
    maps = nn.functional.conv2d(image, weights, bias, stride)[0].numpy()
    # Without its mean a filter is blind to how bright a place is, and sees only its pattern.
    shape = weights - weights.mean(dim=(2, 3), keepdim=True)
    fits = nn.functional.conv2d(image, shape, stride=stride)[0].numpy()
    tops, lefts = (np.arange(side) * stride - filters.before for side in maps.shape[1:])
    height, width = (side - size for side in pixels.shape[1:])
    inner = ((tops >= 0) & (tops <= height))[:, None] & ((lefts >= 0) & (lefts <= width - 2))
    for allowed in (inner & (maps > 0), np.broadcast_to(inner, maps.shape), maps > -np.inf):
        if allowed.any():
            break
    candidates = np.where(allowed, fits, -np.inf)
    index, row, column = map(int, np.unravel_index(candidates.argmax(), maps.shape))
    top, left = row * stride, column * stride  # in the padded image
    columns = padded.shape[2] - size + 1

    def position(left: int) -> Position:
        patch = padded[:, top : top + size, left : left + size]
        products = patch * filters.weights[index]
        sums = products.sum(axis=(1, 2))
        total = float(sums.sum() + filters.bias[index])
        return Position(top - filters.before, left - filters.before, patch, products, sums, total)

    steps = {step: position(left + step) for step in (1, 2) if left + step < columns}
    return WorkedConvolution(filters, index, position(left), steps)


@dataclass(frozen=True)
class ClassicFilter:
    """A filter that people thought of, and what it makes of the image."""

    name: str
    kernel: np.ndarray
    """(F, F) of numbers to write down: what each pixel is multiplied by, times `divisor`."""
    divisor: int
    response: np.ndarray
    """(H, W) float64, signed, or (H, W, C) uint8 where it is a picture again."""


def classic_filters(image: np.ndarray) -> list[ClassicFilter]:
    """Edges both ways, blur, sharpen and, of a colour image, red against green and blue.

    Edges are those of the brightness, in levels of 0-255.

    Args:
        image: (H, W, 1 or 3) uint8.
    """
    brightness = (grey(image) if image.shape[2] == 3 else image)[:, :, 0].astype(np.float64)
    blur = np.ones((7, 7))
    sharpen = np.array([[0.0, -1, 0], [-1, 5, -1], [0, -1, 0]])

    def edges(kernel: np.ndarray) -> np.ndarray:
        return np.asarray(scipy.ndimage.correlate(brightness, kernel, mode="nearest"))

    def picture(kernel: np.ndarray) -> np.ndarray:
        values = scipy.ndimage.correlate(
            image.astype(np.float64), kernel[:, :, None], mode="nearest"
        )
        return np.asarray(np.clip(np.rint(values), 0, 255), dtype=np.uint8)

    result = [
        ClassicFilter("vertical edges", SOBEL, 1, edges(SOBEL)),
        ClassicFilter("horizontal edges", SOBEL.T, 1, edges(SOBEL.T)),
        ClassicFilter("blur", blur, blur.size, picture(blur / blur.size)),
        ClassicFilter("sharpen", sharpen, 1, picture(sharpen)),
    ]
    if image.shape[2] == 3:
        # One pixel of three channels: a filter may look at colours alone.
        kernel = np.array([[2.0, -1, -1]])
        response = image.astype(np.float64) @ kernel[0] / 2
        result.append(ClassicFilter("red against the rest", kernel, 2, response))
    return result


@dataclass(frozen=True)
class Template:
    """A unit's weights on the image's own pixels, in a network that begins with a dense layer."""

    unit: int
    weights: np.ndarray
    """(C, H, W)."""
    products: np.ndarray
    """(C, H, W): each weight times its normalised pixel."""


def templates(classifier: Classifier, pixels: np.ndarray, most: int) -> list[Template]:
    """The units of the first dense layer with the largest sums of products, in their order.

    Where they are the classes of a softmax, their mean is taken off, as it decides nothing.
    """
    module = next(part for part in classifier.network.modules() if isinstance(part, nn.Linear))
    weights = module.weight.detach().double().numpy().reshape(-1, *pixels.shape)
    if module is classifier.network.get_submodule("dense") and len(weights) > 1:
        weights = weights - weights.mean(axis=0)
    products = weights * pixels
    strength = -np.abs(products.sum(axis=(1, 2, 3)))
    units = sorted(np.argsort(strength, kind="stable")[:most].tolist())
    return [Template(unit, weights[unit], products[unit]) for unit in units]


@dataclass(frozen=True)
class Evidence:
    """What every value of the last feature maps adds to a class's lead, exactly."""

    maps: np.ndarray
    """(C, H, W) float64."""
    bias: float
    """With it, the sum of the maps is the class's lead."""
    after: str
    """The layer whose maps these are; "input" where they are the image's own pixels."""
    extent: tuple[float, float, float, float]
    """Left, right, bottom and top of the maps in pixels of the image, whose first centre is 0."""


def evidence(
    classifier: Classifier, pixels: np.ndarray, layers: Sequence[Activation], index: int
) -> Evidence | None:
    """The evidence for a class, or None where what follows the feature maps is not linear.

    It is where a flattened map, or the mean of each, goes into the last dense layer without a
    hidden one between: every value times its weight, relative as `leads` are.

    Args:
        classifier: the trained network.
        pixels: (C, H, W), normalised.
        layers: its `activations`.
        index: of the class.

    Source: Zhou et al., "Learning deep features for discriminative localization" (2016), for the
    mean of each map; where maps are flattened, a weight a place.
    """
    kinds = [type(one.layer) for one in layers if not isinstance(one.layer, geometry.Dropout)]
    if kinds[-2] not in (geometry.Flatten, geometry.GlobalAverage):
        return None
    last = next(
        i for i, one in enumerate(layers) if isinstance(one.layer, kinds[-2])
    )  # where maps become numbers
    values = (layers[last - 1].values if last else pixels).astype(np.float64)
    dense = classifier.network.get_submodule("dense")
    assert isinstance(dense, nn.Linear)
    weights, biases = (p.detach().double().numpy() for p in (dense.weight, dense.bias))
    if classifier.model.head == "sigmoid":
        sign = 1 if index == 1 else -1
        weight, bias = sign * weights[0], sign * biases[0]
    else:
        weight, bias = weights[index] - weights.mean(axis=0), biases[index] - biases.mean()
    if kinds[-2] is geometry.GlobalAverage:
        weight = np.broadcast_to(weight[:, None, None], values.shape) / values[0].size
    before = [one.layer for one in layers[:last]]
    name = before[-1].name if before else "input"
    extent = _extent(before, values.shape[1:])
    return Evidence(values * weight.reshape(values.shape), float(bias), name, extent)


def _extent(layers: Sequence[Layer], size: tuple[int, ...]) -> tuple[float, float, float, float]:
    """Where feature maps lie on the image.

    Source: Araujo et al., "Computing receptive fields of convolutional neural networks" (2019).
    """
    start, step = 0.0, 1  # the centre of the first value and the distance to the next, in pixels
    for layer in layers:
        if isinstance(layer, geometry.Convolution):
            before = geometry.total_padding(layer.kernel_size, layer.padding) // 2
            start += ((layer.kernel_size - 1) / 2 - before) * step
            step *= layer.stride
        elif isinstance(layer, geometry.Pooling):
            start += (layer.size - 1) / 2 * step
            step *= layer.size
    low = start - step / 2
    return low, low + size[1] * step, low + size[0] * step, low


@dataclass(frozen=True)
class Attribution:
    """What every pixel adds to a class's lead over that of an image of the mean colour."""

    map: np.ndarray
    """(H, W) float64, the channels' sum."""
    lead: float
    """The class's lead for the image."""
    lead_of_mean: float
    """The class's lead for the image of the mean colour."""

    @property
    def missing(self) -> float:
        """What the pixels together do not account for; 0 with infinitely many steps."""
        return self.lead - self.lead_of_mean - float(self.map.sum())


def integrated_gradients(classifier: Classifier, image: np.ndarray, index: int) -> Attribution:
    """Which pixels decided, for every architecture: each pixel's gradient, on average from grey on.

    The way leads from the mean colour, 0 after normalisation, to the image.

    Args:
        classifier: the trained network.
        image: prepared, (H, W, C) uint8.
        index: of the class.

    Source: Sundararajan et al., "Axiomatic attribution for deep networks" (2017).
    """
    inputs = classifier.preparation.normalise(_batch(image))
    method = IntegratedGradients(lambda x: leads(classifier, x))
    result = method.attribute(inputs, target=index, n_steps=STEPS, internal_batch_size=_AT_ONCE)
    with torch.inference_mode():
        both = leads(classifier, torch.cat([inputs, torch.zeros_like(inputs)]))[:, index]
    summed = result[0].sum(dim=0).detach().double().numpy()
    return Attribution(np.asarray(summed), float(both[0]), float(both[1]))


def in_cells(values: np.ndarray, most: int) -> np.ndarray:
    """The sums of square cells, at most so many a side: (H, W) to (h, w), the same total."""
    cell = -(-max(values.shape) // most)
    for axis in (0, 1):
        values = np.add.reduceat(values, np.arange(0, values.shape[axis], cell), axis=axis)
    return values


@dataclass(frozen=True)
class Blocks:
    """What a network of so many blocks of convolution and pooling would have."""

    blocks: int
    features: Shape
    """What is flattened, (C, H, W)."""
    in_convolutions: int
    """Parameters, batch normalisation included."""
    in_dense: int
    """Parameters of the dense layers."""

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.in_convolutions + self.in_dense


def more_blocks(
    model: Model, input_shape: Shape, num_classes: int, most: int = 5
) -> Iterator[Blocks]:
    """The architecture `deep` of 1, 2, ... blocks and else these settings, while the image lasts.

    Args:
        model: the `model` section of params.yaml.
        input_shape: (C, H, W).
        num_classes: at least 2.
        most: blocks.
    """
    for blocks in range(1, most + 1):
        deep = model.model_copy(update={"architecture": "deep", "blocks": blocks})
        try:
            rows = summarize(deep, input_shape, num_classes).layers
        except ImpossibleSize:
            return
        flatten = next(i for i, row in enumerate(rows) if row.name == "flatten")
        yield Blocks(
            blocks,
            rows[flatten - 1].output,
            sum(row.parameters for row in rows[:flatten]),
            sum(row.parameters for row in rows[flatten:]),
        )
