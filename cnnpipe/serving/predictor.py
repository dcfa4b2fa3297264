"""Bytes of image files in, probabilities out, prepared exactly as the training images were."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from cnnpipe.data.decode import UnreadableImage, decode
from cnnpipe.data.resizer import prepare
from cnnpipe.network.classifier import Classifier
from cnnpipe.processes import num_cores


class Predictor:
    """A trained classifier for image files.

    An image has the same probabilities, to the last bit, alone and among others, on one core and
    on many: sums of floating-point numbers depend on their order, and that on the size of a batch
    and the number of threads. So each image is computed by itself on one thread, and several
    images at a time, one a core. PyTorch's number of threads becomes 1 for the whole process.
    """

    def __init__(self, classifier: Classifier) -> None:
        torch.set_num_threads(1)
        self._classifier = classifier
        self._num_cores = num_cores()
        self._pool = ThreadPoolExecutor(self._num_cores, "predictor")

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
        result = np.zeros((len(images), len(self.class_names)), np.float32)
        for i, row in enumerate(self.each(images)):
            if isinstance(row, UnreadableImage):
                raise row
            result[i] = row
        return result

    def each(self, images: Iterable[bytes]) -> Iterator[np.ndarray | UnreadableImage]:
        """The probabilities of each encoded image, (classes,) float32, or why it is none.

        In the order of the images, of which it takes only a few more than it has answered.
        """
        begun: deque[Future[np.ndarray | UnreadableImage]] = deque()
        for data in images:
            begun.append(self._pool.submit(self._one, data))
            if len(begun) > 2 * self._num_cores:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()

    def _one(self, data: bytes) -> np.ndarray | UnreadableImage:
        settings = self._classifier.preparation
        try:
            pixels = decode(data, settings.max_pixels)
        except UnreadableImage as error:
            return error
        image = prepare(pixels, settings.size, settings.mode, settings.color)
        with torch.inference_mode():
            tensor = torch.from_numpy(image[None]).permute(0, 3, 1, 2)  # (1, C, H, W)
            row: np.ndarray = self._classifier.probabilities(tensor).numpy()[0]
        return row
