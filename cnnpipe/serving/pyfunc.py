"""The model as MLflow serves it; MLflow copies this file, and the package, beside the model file.

A request is a table with the column `image`, an image file's bytes (base64 in JSON); the answer has
a row for each: `prediction`, and for each class a column such as `probability_cat`.
"""

from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel

from cnnpipe.data.decode import UnreadableImage
from cnnpipe.serving.predictor import Predictor


class ImageClassifier(PythonModel):  # type: ignore[misc]
    """A `Predictor` with MLflow's interface."""

    def load_context(self, context: Any) -> None:
        """Reads the model file, once."""
        self.predictor = Predictor.load(Path(context.artifacts["model"]))

    def predict(self, context: Any, model_input: pd.DataFrame) -> pd.DataFrame:
        """The prediction and the probabilities of each image.

        Raises:
            MlflowException: a value is no image; the server answers 400.
        """
        try:
            probabilities = self.predictor.predict(list(model_input["image"]))
        except UnreadableImage as error:
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from None
        names = self.predictor.class_names
        table = pd.DataFrame(
            probabilities.astype(float), columns=[f"probability_{name}" for name in names]
        )
        table.insert(0, "prediction", [names[i] for i in probabilities.argmax(axis=1)])
        return table


set_model(ImageClassifier())
