"""The pages in a browser: whole, silent, at rest with the network, and as wide as the window."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CHROMIUM, WIDTHS, browser
from PIL import Image

from cnnpipe.evaluation import explain

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]


@pytest.mark.parametrize("settings", [{"batch_norm": True}, {"architecture": "residual"},
                                      {"architecture": "mlp", "dense_units": 4}])  # fmt: skip
def test_an_explanation_is_whole_and_asks_for_nothing(
    settings: dict[str, Any], tmp_path: Path, make_classifier: Callable[..., Any]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    name = "<script>" + "long" * 30 + ".png"
    Image.fromarray(pixels).save(tmp_path / name)
    names = ("<img src=x onerror=console.error(1)>", "dog" * 60)
    classifier = make_classifier(24, class_names=names, **settings)
    explain.explain(classifier, str(tmp_path / name), str(tmp_path / "out"))
    url = (tmp_path / "out" / explain.PAGE).as_uri()
    with browser() as page:
        for width in WIDTHS:
            for dark in (False, True):
                page.open(url, width, dark)
                assert page.missing_pictures() == []
                assert page.overflow_px() <= 0
                # A telephone would rather widen the window than let something reach out of it.
                assert page.evaluate("innerWidth") == width
                reaching_out = (
                    "[...document.querySelectorAll('body *:not(.wide *)')].filter("
                    "e => e.getBoundingClientRect().right > innerWidth).length"
                )
                assert page.evaluate(reaching_out) == 0
        assert page.complaints == []
        assert {request for request in page.requests if not request.startswith("data:")} == {url}
