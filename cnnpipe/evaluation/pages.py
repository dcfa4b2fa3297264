"""HTML pages that need nothing but themselves: no script, no font and no picture from elsewhere."""

import base64
import io
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from cnnpipe.errors import printable

_PIXELATED_PX = 64
"""Up to so many pixels an image is stored without loss and shown as squares."""


def render(template: str, content: Mapping[str, Any]) -> str:
    """The page that the template makes of its content, in which nothing is taken for HTML.

    Args:
        template: the name of a file in evaluation/templates/.
        content: all that the template names.
    """
    loader = PackageLoader("cnnpipe.evaluation")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    return environment.get_template(template).render(content)


def _shown(value: Any) -> Any:
    """Names as a terminal would be shown them, too: not every one can be written as UTF-8."""
    return "\n".join(map(printable, value.split("\n"))) if type(value) is str else value


def chart(figure: Figure) -> str:
    """A data URI of the figure as SVG, on whatever it is laid on, in light and dark.

    What is black in the figure is light where the reader prefers dark.
    """
    file = io.StringIO()
    # A fixed salt and no date: the same figure makes the same text.
    with matplotlib.rc_context({"svg.hashsalt": "cnnpipe"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue().replace("#000000", "currentColor")
    # Text has no colour of its own in matplotlib's SVG where it is black.
    style = (
        "<style>svg{color:#1b1f24;fill:currentColor}"
        "@media(prefers-color-scheme:dark){svg{color:#e6e8eb}}</style>"
    )
    head, tag, rest = text.partition("<defs>")
    return _uri("svg+xml", f"{head}{style}{tag}{rest}".encode())


def png_uri(data: bytes) -> str:
    """The data URI of a PNG file."""
    return _uri("png", data)


def picture(image: np.ndarray, largest_px: int = 160) -> str:
    """A data URI of an (H, W, 1 or 3) uint8 image, scaled down to that many pixels."""
    pillow = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
    file = io.BytesIO()
    if max(pillow.size) <= _PIXELATED_PX:
        pillow.save(file, "png")
        return _uri("png", file.getvalue())
    pillow.thumbnail((largest_px, largest_px))
    pillow.save(file, "jpeg", quality=85)
    return _uri("jpeg", file.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
