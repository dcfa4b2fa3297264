"""The model as MLflow serves it; MLflow copies this file, and the package, beside the model file.

A request is a table with the column `image`, an image file's bytes (base64 in JSON); the answer has
a row for each: `prediction`, and for each class a column such as `probability_cat`. It is the same
to the last bit in a request of one image and in one of many.
"""

import base64
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel

from cnnpipe.serving.predictor import Predictor


class ImageClassifier(PythonModel):  # type: ignore[misc]
    """A `Predictor` with MLflow's interface."""

    def load_context(self, context: Any) -> None:
        """Reads the model file, once."""
        self.predictor = Predictor.load(Path(context.artifacts["model"]))

    def predict(self, context: Any, model_input: pd.DataFrame) -> pd.DataFrame:
        """The prediction and the probabilities of each image.

        Raises:
            MlflowException: there is no image, or a value is none; the server answers 400.
        """
        values = list(model_input["image"])
        images = (value if isinstance(value, bytes) else b"" for value in values)
        answers = list(self.predictor.each(images))
        faults = [
            f"row {i}: {_fault(values[i], answer)}"
            for i, answer in enumerate(answers)
            if isinstance(answer, Exception)
        ]
        if faults or not answers:
            message = "; ".join(faults) or "the table has no rows: send an image in each"
            raise MlflowException(message, error_code=INVALID_PARAMETER_VALUE)
        names = self.predictor.class_names
        probabilities = np.array(answers)
        table = pd.DataFrame(
            probabilities.astype(float), columns=[f"probability_{name}" for name in names]
        )
        table.insert(0, "prediction", [names[i] for i in probabilities.argmax(axis=1)])
        return table


def _fault(value: Any, reason: Exception) -> str:
    """What is wrong with a value that is no image; MLflow decodes base64 in two forms alone."""
    with suppress(ValueError, TypeError):
        if base64.b64decode(value, validate=True):
            return "base64, which is decoded in dataframe_split and dataframe_records alone"
    return str(reason) if isinstance(value, bytes) else "not the bytes of a file"


set_model(ImageClassifier())
