"""Bytes of image files in, probabilities out, prepared exactly as the training images were."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cnnpipe.data.decode import decode
from cnnpipe.data.resizer import prepare
from cnnpipe.network.classifier import Classifier

_BATCH_SIZE = 64


class Predictor:
    """A trained classifier for image files."""

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier

    @staticmethod
    def load(path: str | Path) -> "Predictor":
        """The predictor of a model file.

        Raises:
            UserError: the file is missing, damaged, or no model file of this program.
        """
        return Predictor(Classifier.load(path))

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the probabilities."""
        return self._classifier.class_names

    def predict(self, images: Sequence[bytes]) -> np.ndarray:
        """The probability of each class for each encoded image, (N, classes) float32.

        Raises:
            UnreadableImage: one of them is no image; the message is the reason.
        """
        settings = self._classifier.preparation
        results = [np.zeros((0, len(self.class_names)), np.float32)]
        for start in range(0, len(images), _BATCH_SIZE):
            batch = np.stack(
                [
                    prepare(
                        decode(data, settings.max_pixels),
                        settings.size,
                        settings.mode,
                        settings.color,
                    )
                    for data in images[start : start + _BATCH_SIZE]
                ]
            )
            with torch.inference_mode():
                tensor = torch.from_numpy(batch).permute(0, 3, 1, 2)  # (n, C, H, W)
                results.append(self._classifier.probabilities(tensor).numpy())
        return np.concatenate(results)
