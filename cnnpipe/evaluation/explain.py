"""The folder that `cnnpipe explain` makes: an image as the trained network sees it, step by step.

`cnnpipe.evaluation.explanation` has the numbers, `cnnpipe.evaluation.lessons` draws them, and
templates/explanation.html has the words.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError
from scipy.ndimage import correlate
from torch import nn

from cnnpipe.data.decode import Decoded, UnreadableImage, decode_frame
from cnnpipe.data.resizer import prepare
from cnnpipe.errors import UserError, printable
from cnnpipe.evaluation import explanation, lessons, pages
from cnnpipe.evaluation.explanation import Activation
from cnnpipe.evaluation.figures import short_name
from cnnpipe.network import geometry
from cnnpipe.network.classifier import Classifier
from cnnpipe.network.geometry import output_size, size_sum
from cnnpipe.network.layers import L2Pool, MaxPool
from cnnpipe.network.summary import size_text, summarize
from cnnpipe.workspace import whole_folder

PAGE = "explanation.html"
_SIGNATURE = "cnnpipe explain"
"""In every file of an explanation, so that nothing else is ever replaced by the next one."""
_MOST_MAPS = 16
_MOST_CLASSES = 10


def explain(classifier: Classifier, image: str, out: str) -> str:
    """Writes the explanation of an image and returns the answer and where the page is, a line.

    Args:
        classifier: the trained network.
        image: path of the image file.
        out: path of the folder, which is written whole or not at all.

    Raises:
        UserError: the file is no image, or the folder holds what is not of an earlier explanation.
    """
    folder = _replaceable(out)
    settings = classifier.preparation
    decoded = _decoded(image, settings.max_pixels)
    prepared = prepare(decoded.pixels, settings.size, settings.mode, settings.color)
    drawn = _Pictures()
    content = _content(classifier, prepared, drawn)
    height, width = decoded.pixels.shape[:2]
    html = pages.render(
        "explanation.html",
        {**content, "file": Path(image).name, "original": f"{width} x {height}",
         "num_frames": decoded.num_frames, "signature": _SIGNATURE},
    )  # fmt: skip
    with whole_folder(folder) as part:
        for name, data in drawn.files.items():
            (part / name).write_bytes(data)
        (part / PAGE).write_text(html, encoding="utf-8")
    return f"{content['answer']} ({content['probability']}): {printable(str(Path(out) / PAGE))}"


def _decoded(path: str, max_pixels: int) -> Decoded:
    try:
        return decode_frame(Path(path).read_bytes(), max_pixels)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder: name one image in it") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnreadableImage as error:
        raise UserError(f"{path}: {error}") from None


def _replaceable(out: str) -> Path:
    """The folder, if all that is in it was written by an earlier `explain`.

    Raises:
        UserError: something else would be lost.
    """
    folder = Path(out).resolve()
    if Path.cwd().is_relative_to(folder):
        raise UserError(f"--out {out}: the folder that you are in: name one to be made in it")
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--out {out}: {existing.name} is a file: name a folder")
    files = sorted(folder.iterdir()) if existing == folder else []
    for file in files:
        if not _is_own(file):
            raise UserError(
                f"--out {out}: holds {file.name}, which is not of an explanation and would be "
                "lost: name another folder"
            )
    return folder


def _is_own(file: Path) -> bool:
    if file.is_symlink() or not file.is_file():
        return False
    if file.name == PAGE:
        return _SIGNATURE.encode() in file.read_bytes()
    try:
        with Image.open(file, formats=["PNG"]) as picture:
            return picture.info.get("Software") == _SIGNATURE
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        return False


@dataclass(frozen=True)
class _Picture:
    """What the template shows."""

    src: str
    alt: str
    caption: str


class _Pictures:
    """Collects the files, as the page that shows them is put together."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def add(self, name: str, figure: Figure, alt: str, caption: str = "") -> _Picture:
        """The picture for the page; its file is kept."""
        file = io.BytesIO()
        # Twice as fast as Pillow's usual compression, for a tenth more bytes.
        figure.savefig(
            file, format="png", metadata={"Software": _SIGNATURE},
            pil_kwargs={"compress_level": 3},
        )  # fmt: skip
        self.files[f"{name}.png"] = file.getvalue()
        return _Picture(pages.png_uri(file.getvalue()), alt, caption)


@dataclass(frozen=True)
class _Seen:
    """An image, and what the network makes of it."""

    classifier: Classifier
    image: np.ndarray
    """(H, W, C) uint8, prepared."""
    pixels: np.ndarray
    """(C, H, W) float32, normalised."""
    layers: Sequence[Activation]
    filters: explanation.Filters | None
    """Of the first layer, where it is a convolution."""

    @property
    def channels(self) -> tuple[str, ...]:
        """The names of the image's channels."""
        return lessons.channel_names(self.image.shape[2])


def _content(classifier: Classifier, image: np.ndarray, drawn: _Pictures) -> dict[str, Any]:
    answer = explanation.answer(classifier, image)
    seen = _Seen(
        classifier,
        image,
        explanation.normalised(classifier, image),
        explanation.activations(classifier, image),
        explanation.first_filters(classifier),
    )
    names = classifier.class_names
    size = classifier.preparation.size
    return {
        "answer": printable(names[answer.index]),
        "probability": lessons.percent(answer.probabilities[answer.index]),
        "architecture": classifier.model.architecture,
        "model": classifier.model,
        "size": size,
        "mode": classifier.preparation.mode,
        "channels": seen.channels,
        "num_classes": len(names),
        "matrix": _matrix(seen, drawn),
        "convolution": _convolution(seen, drawn),
        "filters": _filters(seen, drawn),
        "layers": _layers(seen, drawn),
        "decision": _decision(seen, answer, drawn),
        "parameters": _parameters(classifier, drawn),
    }


def _matrix(seen: _Seen, drawn: _Pictures) -> dict[str, Any]:
    image, pixels, channels = seen.image, seen.pixels, seen.channels
    side = min(8, image.shape[0])
    top, left = explanation.liveliest(image, side)
    crop = image[top : top + side, left : left + side]
    flat = min(3, side)
    settings = seen.classifier.preparation
    return {
        "image": drawn.add(
            "1-image",
            lessons.framed_image(image, top, left, side),
            f"the image at {settings.size} x {settings.size} pixels, a square marked in it",
        ),
        "crops": [
            drawn.add(f"1-matrix-{name}", lessons.matrix(crop[:, :, c], name),
                      f"the {name} values of {side} x {side} pixels")
            for c, name in enumerate(channels)
        ],
        "flattened": drawn.add(
            "1-flattened", lessons.flattening(crop[:flat, :flat, 0], channels[0]),
            "rows of pixels put one after another; two neighbours are marked",
        ),
        "side": side, "top": top, "left": left, "flat": flat,
        "num_values": pixels.size,
        "per_channel": pixels[0].size,
        "value": int(crop[0, 0, 0]),
        "mean": settings.mean[0],
        "std": settings.std[0],
        "normalised": float(pixels[0, top, left]),
    }  # fmt: skip


def _convolution(seen: _Seen, drawn: _Pictures) -> dict[str, Any]:
    image, layers, own, channels = seen.image, seen.layers, seen.filters, seen.channels
    filters = own or explanation.sobel_filters(len(channels))
    worked = explanation.worked_convolution(seen.pixels, filters)
    f = filters.weights.shape[2]
    size = seen.classifier.preparation.size
    layer = layers[0].layer
    # A batch normalisation may come between.
    relu_follows = own is None or isinstance(layers[1].layer, geometry.Relu)
    rows = [
        [step, f"{one.top}, {one.left}", *(f"{v:+z.3f}" for v in one.sums),
         f"{filters.bias[worked.index]:+z.3f}", f"{one.total:+z.3f}",
         *([f"{max(0.0, one.total):.3f}"] if relu_follows else [])]
        for step, one in (("here", worked.here),
                          *((f"stride {k}", v) for k, v in worked.next.items()))
    ]  # fmt: skip
    ways: list[tuple[int, geometry.Padding]] = [
        (stride, padding) for stride in (1, 2) for padding in ("valid", "same")
    ]
    used = None
    if isinstance(layer, geometry.Convolution):
        used = layer.stride, layer.padding
        ways += [used] if used not in ways else []
    sizes = [
        [f"stride {stride}", f"{padding}{', this network' if (stride, padding) == used else ''}",
         size_sum(size, f, stride, padding)]
        for stride, padding in ways
    ]  # fmt: skip
    small = f + 2
    return {
        "own": own is not None,
        "kernel_size": f,
        "num_filters": len(filters.weights),
        "filter": worked.index + 1,
        "num_products": worked.here.products.size,
        "total": f"{worked.here.total:+z.3f}",
        "sums": " ".join(f"{v:+z.3f}" for v in worked.here.sums),
        "bias": f"{filters.bias[worked.index]:+z.3f}",
        "patch": drawn.add("2-patch",
                           lessons.framed_image(image, worked.here.top, worked.here.left, f),
                           "the image, the patch under the filter marked"),
        "products": [
            drawn.add(f"2-products-{name}", lessons.products(worked, c, name),
                      f"the {name} values of the patch, the weights and their products")
            for c, name in enumerate(channels)
        ],
        "next": drawn.add("2-next-place", lessons.next_places(image, worked),
                          "the patch, and the filter's next places with stride 1 and 2"),
        "header": ["", "row, column", *channels, "bias", "sum",
                   *(["after ReLU"] if relu_follows else [])],
        "rows": rows,
        "paddings": [
            drawn.add(f"2-padding-{padding}",
                      lessons.paddings(image, f, padding == "same",
                                       f"{padding}: {small} px in, "
                                       f"{output_size(small, f, 1, padding)} out"),
                      f"a filter in the corner of {small} x {small} pixels, padding {padding}")
            for padding in ("valid", "same")
        ],
        "sizes": sizes,
    }  # fmt: skip


def _filters(seen: _Seen, drawn: _Pictures) -> dict[str, Any]:
    image, layers, own = seen.image, seen.layers, seen.filters
    classic = [
        drawn.add(f"3-{one.name.replace(' ', '-')}", lessons.classic(one),
                  f"{one.name}: the filter's weights, and the image filtered")
        for one in explanation.classic_filters(image)
    ]  # fmt: skip
    if own is None:
        found = explanation.templates(seen.classifier, seen.pixels, _MOST_MAPS)
        names = _unit_names(seen.classifier, layers)
        pairs = [
            (f"{short_name(names[one.unit])}: {one.products.sum():+z.2f}",
             one.weights, one.products.sum(axis=0))
            for one in found
        ]  # fmt: skip
        largest, total = None, len(names)
        scale = ""
    else:
        values = layers[0].values
        channels = explanation.most_active(values, _MOST_MAPS)
        largest, total = lessons.scale_of(values), len(values)
        pairs = [(str(c + 1), own.weights[c], values[c]) for c in channels]
        scale = f"{largest:.2f}"
    return {
        "classic": classic,
        "learned": [
            drawn.add(f"3-learned-{start // 6 + 1}",
                      lessons.filters_and_maps(pairs[start : start + 6], largest),
                      "learned filters as pictures, each beside its map")
            for start in range(0, len(pairs), 6)
        ],
        "shown": len(pairs), "total": total, "scale": scale,
    }  # fmt: skip


def _unit_names(classifier: Classifier, layers: Sequence[Activation]) -> list[str]:
    """Of the first dense layer, in a network that begins with it."""
    dense = next(one for one in layers if isinstance(one.layer, geometry.Dense))
    units = dense.values.shape[0]
    if dense is not layers[-1]:
        return [f"unit {i + 1}" for i in range(units)]
    return list(classifier.class_names[1:] if units == 1 else classifier.class_names)


def _layers(seen: _Seen, drawn: _Pictures) -> dict[str, Any]:
    layers = seen.layers
    shown: list[dict[str, Any]] = []
    channels: list[int] = []
    largest = 1.0
    for i, one in enumerate(layers):
        name, values = one.layer.name, one.values
        match one.layer:
            case geometry.Convolution() | geometry.Residual():
                # The same filters and the same colours until the next convolution.
                ends = (geometry.Relu, geometry.Residual)
                after = next(later for later in layers[i:] if isinstance(later.layer, ends))
                channels = explanation.most_active(after.values, _MOST_MAPS)
                largest = lessons.scale_of(np.concatenate([a.values.ravel() for a in (one, after)]))
            case geometry.Dropout() | geometry.Flatten() | geometry.Dense(name="dense"):
                continue
        if values.shape[1:] == (1, 1) and not isinstance(one.layer, geometry.Pooling):
            flat = values.ravel()
            order = np.argsort(-flat, kind="stable")[:_MOST_MAPS]
            what = "map" if isinstance(one.layer, geometry.GlobalAverage) else "unit"
            figure = lessons.bars([f"{what} {i + 1}" for i in order], flat[order].tolist())
            num = len(order)
        else:
            figure = lessons.maps(values, channels, largest)
            num = len(channels)
        size = size_text(one.values.shape)
        note = f"the {num} of {len(values)} that are most active" if num < len(values) else ""
        kind = type(one.layer).__name__
        shown.append({
            "name": name, "kind": kind, "size": size,
            "picture": drawn.add(f"4-{name}", figure, f"{name}: {size}",
                                 f"{name}: {size}\n{note}".strip()),
        })  # fmt: skip
        if isinstance(one.layer, geometry.Residual):
            parts = explanation.inside_residual(seen.classifier, name, layers[i - 1].values)
            channel = int(values.mean(axis=(1, 2)).argmax())
            titles = {
                "convolution_1": "first convolution", "norm_1": "normalised",
                "convolution_2": "second convolution", "norm_2": "normalised: f(x)",
                "skip": "x, past both", "sum": "x + f(x)",
            }  # fmt: skip
            shown.append({
                "name": name, "kind": "inside", "size": size,
                "picture": drawn.add(
                    f"4-{name}-inside",
                    lessons.named_maps({titles[key]: parts[key][channel] for key in titles}),
                    f"what happens inside {name}",
                    f"inside {name}, map {channel + 1}, in colours of its own scale; "
                    "ReLU then takes the blue away",
                ),
            })  # fmt: skip
    return {"shown": shown, **_pooling(seen, drawn)}


def _pooling(seen: _Seen, drawn: _Pictures) -> dict[str, Any]:
    """The same map, pooled in three ways; without a convolution it is that of a Sobel filter."""
    spatial = next(
        (one.values for one in seen.layers
         if isinstance(one.layer, geometry.Relu) and one.values.shape[1:] != (1, 1)), None
    )  # fmt: skip
    if spatial is None:
        brightness = seen.pixels.mean(axis=0)
        edges = correlate(brightness, explanation.SOBEL.astype(np.float32))
        spatial = np.maximum(edges, 0)[None]
    channel = int(spatial.mean(axis=(1, 2)).argmax())
    values = spatial[channel]
    k = seen.classifier.model.pool_size
    k = k if min(values.shape) >= k > 1 else 2
    if min(values.shape) < k:
        return {"pooling": []}

    def pooled(x: np.ndarray, size: int) -> dict[str, np.ndarray]:
        ways: dict[str, nn.Module] = {
            "max": MaxPool(size), "average": nn.AvgPool2d(size), "L2": L2Pool(size)
        }  # fmt: skip
        with torch.inference_mode():
            tensor = torch.from_numpy(np.ascontiguousarray(x))[None, None]
            return {name: way(tensor)[0, 0].numpy() for name, way in ways.items()}

    def label(name: str, map_: np.ndarray) -> str:
        return f"{name}: {map_.shape[0]} x {map_.shape[1]}"

    maps = {"before": values, **pooled(values, k)}
    side = 4 if min(values.shape) >= 4 else min(values.shape) // 2 * 2
    top, left = explanation.liveliest(values[:, :, None], side)
    example = values[top : top + side, left : left + side]
    return {
        "pooling": [
            drawn.add("4-poolings",
                      lessons.named_maps({label(name, map_): map_ for name, map_ in maps.items()}),
                      "the same map pooled by maximum, average and L2 norm",
                      f"map {channel + 1}, windows of {k} x {k}"),
            drawn.add("4-poolings-numbers", lessons.pooled_numbers(example, pooled(example, 2)),
                      "four windows of numbers, and each one's maximum, average and L2 norm",
                      "where the map varies most, windows of 2 x 2"),
        ],
    }  # fmt: skip


def _decision(seen: _Seen, answer: explanation.Answer, drawn: _Pictures) -> dict[str, Any]:
    classifier, image, channels = seen.classifier, seen.image, seen.channels
    names = classifier.class_names
    order = np.argsort(-answer.probabilities, kind="stable")[:_MOST_CLASSES]
    result: dict[str, Any] = {
        "probabilities": drawn.add(
            "5-probabilities",
            lessons.bars([names[i] for i in order], answer.probabilities[order].tolist(), True),
            "the probability of each class",
            "" if len(order) == len(names) else f"the {len(order)} most probable of {len(names)}",
        ),
        "lead": f"{answer.lead:+z.2f}",
        "exact": None,
    }
    exact = explanation.evidence(classifier, seen.pixels, seen.layers, answer.index)
    if exact is not None:
        by_place, by_filter = exact.maps.sum(axis=0), exact.maps.sum(axis=(1, 2))
        strongest = np.argsort(-np.abs(by_filter), kind="stable")[:_MOST_MAPS]
        first = exact.after == "input"
        bars = {
            (channels[i] if first else f"map {i + 1}"): float(by_filter[i])
            for i in strongest
        }  # fmt: skip
        rest = len(by_filter) - len(strongest)
        if rest:
            bars[f"other {rest}"] = float(by_filter.sum() - sum(bars.values()))
        bars["bias"] = exact.bias
        result["exact"] = {
            "map": drawn.add("5-evidence", lessons.heat(image, by_place, exact.extent),
                             "the evidence over the image",
                             "exact evidence, all maps together"),
            "bars": drawn.add("5-evidence-by-map", lessons.bars(list(bars), list(bars.values())),
                              "the evidence of each feature map",
                              f"the same, by {'channel' if first else 'map'}"),
            "sum": f"{by_filter.sum():+z.3f}",
            "bias": f"{exact.bias:+z.3f}",
            "total": f"{by_filter.sum() + exact.bias:+z.3f}",
            "after": exact.after,
            "num_values": exact.maps.size,
        }  # fmt: skip
    gradients = explanation.integrated_gradients(classifier, image, answer.index)
    result |= {
        "gradients": drawn.add("5-pixels", lessons.heat_of_pixels(image, gradients.map),
                               "what each pixel adds, over the image",
                               "integrated gradients, summed in small cells"),
        "gradients_sum": f"{gradients.map.sum():+z.3f}",
        "lead_of_mean": f"{gradients.lead_of_mean:+z.3f}",
        "lead_exact": f"{gradients.lead:+z.3f}",
        "missing": f"{gradients.missing:+z.3f}",
        "steps": explanation.STEPS,
    }  # fmt: skip
    return result


def _parameters(classifier: Classifier, drawn: _Pictures) -> dict[str, Any]:
    model, shape = classifier.model, classifier.preparation.input_shape
    num_classes = len(classifier.class_names)
    summary = summarize(model, shape, num_classes)
    blocks = list(explanation.more_blocks(model, shape, num_classes))
    fewest = min(blocks, key=lambda row: row.parameters) if blocks else None
    return {
        "rows": [
            [row.name, size_text(row.output), row.formula, row.parameters_formula,
             f"{row.parameters:,}"]
            for row in summary.layers
        ],
        "total": f"{summary.parameters:,}",
        "mlp": f"{summary.parameters_mlp:,}",
        "ratio": f"{summary.parameters_mlp / summary.parameters:,.0f}",
        "has_convolutions": summary.parameters_mlp != summary.parameters,
        "blocks": [
            [row.blocks, size_text(row.features), f"{row.in_convolutions:,}", f"{row.in_dense:,}",
             f"{row.parameters:,}"]
            for row in blocks
        ],
        "fewest": fewest,
        "chart": drawn.add("6-parameters", lessons.parameters_by_blocks(blocks),
                           "parameters by the number of blocks") if blocks else None,
    }  # fmt: skip
