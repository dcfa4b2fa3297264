"""The network: its geometry, its layers, and the architectures made of them."""

from typing import Any

__all__ = ["build", "summarize"]


def __getattr__(name: str) -> Any:
    # Not imported before it is asked for: the settings are checked with this package's arithmetic
    # alone, and PyTorch takes a second to import.
    if name == "build":
        from cnnpipe.network.model import build

        return build
    if name == "summarize":
        from cnnpipe.network.summary import summarize

        return summarize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
