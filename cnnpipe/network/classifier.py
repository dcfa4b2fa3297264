"""A network together with all that a prediction needs, and its file.

The file is one safetensors file: the weights, and in the header the settings of the network, the
class names, and how an image is prepared for it. Nothing in it is ever executed. A checksum over
all of it tells a damaged file from a whole one.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cnnpipe.errors import UserError
from cnnpipe.network.geometry import Shape
from cnnpipe.network.model import build
from cnnpipe.params import Model
from cnnpipe.workspace import whole_file

_FORMAT = "2"


@dataclass(frozen=True)
class Preparation:
    """What happens to an image before the network sees it."""

    size: int
    """Height and width, pixels."""
    mode: str
    """resize.mode."""
    color: str
    """resize.color."""
    mean: tuple[float, ...]
    """Of each channel over the training images, 0-255."""
    std: tuple[float, ...]
    """Likewise the standard deviation, above 0."""
    max_pixels: int
    """resize.max_pixels."""

    @property
    def input_shape(self) -> Shape:
        """(C, H, W)."""
        return len(self.mean), self.size, self.size

    def normalise(self, images: Tensor) -> Tensor:
        """(N, C, H, W) of 0-255, uint8 or floating point, to zero mean and unit variance."""
        # A row of each, as long as an image's: of one value a channel, a CPU's inner loop would be
        # three values long, and 128 images of 300 x 300 take 31 ms instead of 5.
        width = images.shape[3]
        mean, std = (
            torch.tensor(values)
            .repeat(width)
            .view(1, 1, width, -1)
            .permute(0, 3, 1, 2)
            # Not made there, nor waited for: a GPU is still busy with the steps before.
            .to(images.device, non_blocking=True)
            for values in (self.mean, self.std)
        )  # (1, C, 1, W)
        return (images - mean).div_(std)  # from uint8 in one pass, and no third copy


@dataclass(frozen=True)
class Classifier:
    """A trained network and everything that a prediction needs besides."""

    network: nn.Module
    model: Model
    preparation: Preparation
    class_names: tuple[str, ...]
    run_id: str = ""
    """The MLflow run that trained it."""

    def class_logits(self, images: Tensor) -> Tensor:
        """Normalised (N, C, H, W) images to (N, classes) float32; softmax makes probabilities.

        A sigmoid unit's logit z becomes (0, z), since softmax((0, z)) = (1 - sigmoid(z),
        sigmoid(z)): from here on both heads are the same, and binary cross-entropy is the
        cross-entropy of these.
        """
        logits: Tensor = self.network(images).float()
        if self.model.head == "sigmoid":
            return torch.cat([torch.zeros_like(logits), logits], dim=1)
        return logits

    def probabilities(self, images: Tensor) -> Tensor:
        """Images as they are stored, (N, C, H, W) uint8, to (N, classes) float32 probabilities.

        Call it in evaluation mode and without gradients.
        """
        return self.log_probabilities(images).exp()

    def log_probabilities(self, images: Tensor) -> Tensor:
        """The logarithms of `probabilities`, finite also where a probability rounds to 0."""
        normalised = self.preparation.normalise(images)
        result = self.class_logits(normalised).log_softmax(dim=1)
        if self.model.flip_average:
            mirrored = self.class_logits(normalised.flip(3)).log_softmax(dim=1)
            result = torch.logaddexp(result, mirrored) - math.log(2)
        return result

    def save(self, path: str | Path) -> None:
        """Writes the model file, whole or not at all."""
        header = {
            "format": _FORMAT,
            "model": self.model.model_dump(),
            "preparation": vars(self.preparation),
            "class_names": self.class_names,
            "run_id": self.run_id,
        }
        weights = {key: value.contiguous() for key, value in self.network.state_dict().items()}
        text = json.dumps(header)
        metadata = {"cnnpipe": text, "sha256": _checksum(text, weights)}
        with whole_file(path) as part:
            part.write_bytes(safetensors.torch.save(weights, metadata))

    @staticmethod
    def load(path: str | Path, device: str = "cpu") -> "Classifier":
        """The classifier in a model file, in evaluation mode.

        Raises:
            UserError: the file is missing, damaged, or no model file of this program.
        """
        try:
            with safe_open(path, framework="pt", device=device) as file:
                metadata = file.metadata() or {}
                if "cnnpipe" not in metadata:
                    raise UserError(f"{path}: a safetensors file, but not one that cnnpipe wrote")
                header = json.loads(metadata["cnnpipe"])
                weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if header["format"] != _FORMAT:
                raise UserError(
                    f"{path}: model file of format {header['format']}, this is {_FORMAT}: "
                    "use the cnnpipe that wrote it"
                )
            if metadata["sha256"] != _checksum(metadata["cnnpipe"], weights):
                raise UserError(
                    f"{path}: damaged, its checksum is another: run `dvc repro --force train`, or "
                    "take it from where it was copied"
                )
            return _classifier(header, weights, device)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file: run `dvc repro train` first") from None
        except (SafetensorError, ValidationError, KeyError, ValueError, TypeError, RuntimeError,
                OSError) as error:  # fmt: skip
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path}: not a whole cnnpipe model file: {reason}") from None


def _checksum(header: str, weights: dict[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, of the header and of each weight's name, shape, type and bytes."""
    total = hashlib.sha256(header.encode())
    for name, value in sorted(weights.items()):
        total.update(f"\0{name} {tuple(value.shape)} {value.dtype} ".encode())
        total.update(value.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _classifier(header: dict[str, Any], weights: dict[str, Tensor], device: str) -> Classifier:
    model = Model.model_validate(header["model"])
    lists = {key: tuple(header["preparation"][key]) for key in ("mean", "std")}
    preparation = Preparation(**{**header["preparation"], **lists})
    class_names = tuple(header["class_names"])
    network = build(model, preparation.input_shape, len(class_names))
    network.load_state_dict(weights)
    # The layout of the stored images; the same in training and prediction, to the bit.
    network.to(device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    return Classifier(network, model, preparation, class_names, header["run_id"])
