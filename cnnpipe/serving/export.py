"""The network as an ONNX file, which is written only where it gives the network's own answers."""

import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

# Before ONNX Runtime is imported, which would report to its makers.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import torch
from torch import Tensor, nn

import cnnpipe
from cnnpipe.data.drawn_pets import draw
from cnnpipe.data.resizer import prepare
from cnnpipe.errors import RunFailed, UserError
from cnnpipe.network.classifier import Classifier
from cnnpipe.workspace import whole_file

TOLERANCE = 1e-5
"""In probability; float32 sums in another order differ by a tenth of it at most."""

_NEEDED = ("onnx", "onnxruntime", "onnxscript")
_BATCHES = (1, 3, 16)


class _FromPixels(nn.Module):
    """Images as they are stored to probabilities."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.network = classifier.network
        self._classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        """(N, H, W, C) uint8 to (N, classes) float32."""
        return self._classifier.probabilities(images.permute(0, 3, 1, 2))  # (N, C, H, W)


def export(classifier: Classifier, path: str) -> str:
    """Writes the ONNX file, from (N, H, W, C) uint8 pixels to (N, classes) float32 probabilities.

    Normalisation, softmax and the mean over the mirror image are part of it; the metadata say how
    an image is brought to its size, and name the classes. ONNX Runtime's answers are compared with
    the network's on drawn pictures and on noise, in batches of several sizes.

    Returns:
        A line that says so.

    Raises:
        UserError: a package is not installed, or the file cannot be written.
        RunFailed: the answers differ by more than `TOLERANCE`; nothing is written.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"an export, which is compared with the network, needs {', '.join(missing)}: "
            f"pip install {' '.join(missing)}"
        )
    content = _onnx(classifier)
    difference = _difference(classifier, content)
    if not difference <= TOLERANCE:  # which a NaN is not
        raise RunFailed(
            f"{path}: not written: its probabilities differ from the network's by up to "
            f"{difference:.1e}, more than {TOLERANCE:.0e}"
        )
    try:
        with whole_file(path) as part:
            part.write_bytes(content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    channels, height, width = classifier.preparation.input_shape
    return (
        f"{path}: images (N, {height}, {width}, {channels}) uint8 to probabilities "
        f"(N, {len(classifier.class_names)}); they differ from the network's by at most "
        f"{difference:.1e}, in batches of {', '.join(map(str, _BATCHES))}"
    )


def _onnx(classifier: Classifier) -> bytes:
    channels, height, width = classifier.preparation.input_shape
    example = torch.zeros((2, height, width, channels), dtype=torch.uint8)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of packages that no network here needs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch's, about itself
            program = torch.onnx.export(
                _FromPixels(classifier).eval(),
                (example,),
                input_names=["images"],
                output_names=["probabilities"],
                dynamic_shapes={"images": {0: torch.export.Dim("N")}},
                dynamo=True,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert program is not None
    model = program.model_proto
    for node in (*model.graph.node, *model.graph.value_info):
        del node.metadata_props[:]  # which lines of which files, on this machine, it came from
    for key, value in _metadata(classifier).items():
        model.metadata_props.add(key=key, value=value)
    content: bytes = model.SerializeToString()
    return content


def _metadata(classifier: Classifier) -> dict[str, str]:
    preparation = classifier.preparation
    kept = ("size", "mode", "color", "max_pixels")
    return {
        "class_names": json.dumps(classifier.class_names),
        "preparation": json.dumps({key: getattr(preparation, key) for key in kept}),
        "model": classifier.model.model_dump_json(),
        "run_id": classifier.run_id,
        "cnnpipe_version": cnnpipe.__version__,
    }


def _difference(classifier: Classifier, content: bytes) -> float:
    """The largest between ONNX Runtime's probabilities and the network's own."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    largest = 0.0
    for images in _pictures(classifier):
        (theirs,) = session.run(["probabilities"], {"images": images})
        with torch.inference_mode():
            tensor = torch.from_numpy(images).permute(0, 3, 1, 2)  # (N, C, H, W)
            ours = classifier.probabilities(tensor).numpy()
        largest = np.maximum(largest, np.abs(theirs - ours).max())  # which keeps a NaN
    return float(largest)


def _pictures(classifier: Classifier) -> Iterator[np.ndarray[Any, Any]]:
    """Batches of drawn pets and of noise, (n, H, W, C) uint8."""
    settings = classifier.preparation
    channels, height, width = settings.input_shape
    chance = np.random.default_rng(0)
    for size in _BATCHES:
        pets = [
            prepare(draw(0, i)[1], settings.size, settings.mode, settings.color)
            for i in range(size)
        ]
        yield np.stack(pets)
        yield chance.integers(0, 256, (size, height, width, channels), dtype=np.uint8)
