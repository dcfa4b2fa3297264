"""Serving: from the bytes of image files to probabilities, here and behind MLflow's server."""

from typing import Any

__all__ = ["Predictor"]


def __getattr__(name: str) -> Any:
    if name == "Predictor":  # not before it is asked for: it imports PyTorch
        from cnnpipe.serving.predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
