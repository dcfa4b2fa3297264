"""Tests of what all pages share: names are never taken for HTML, and nothing is fetched."""

import base64
import io
import re

import numpy as np
import pytest
from jinja2 import UndefinedError
from matplotlib.figure import Figure
from PIL import Image

from cnnpipe.evaluation import pages

SECTION = """{% extends "page.html" %}{% import "page.html" as page %}
{% block title %}{{ name }}{% endblock %}
{% block body %}{{ page.table(["class"], [[name]]) }}{% endblock %}"""


@pytest.fixture(autouse=True)
def a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    load = pages.PackageLoader.get_source

    def get_source(self: object, environment: object, template: str) -> object:
        return (SECTION, None, None) if template == "a.html" else load(self, environment, template)

    monkeypatch.setattr(pages.PackageLoader, "get_source", get_source)


def decoded(uri: str) -> bytes:
    return base64.b64decode(uri.partition("base64,")[2])


def test_names_are_shown_and_never_taken_for_html() -> None:
    html = pages.render("a.html", {"name": "<script>alert('&')</script>\x1b[31m\udcff{{ 7 * 7 }}"})
    assert "<script" not in html
    shown = "&lt;script&gt;alert(&#39;&amp;&#39;)&lt;/script&gt;\\x1b[31m\\xff{{ 7 * 7 }}"
    assert html.count(shown) == 2  # the title, and the table
    html.encode()


def test_a_name_that_a_template_needs_must_be_given() -> None:
    with pytest.raises(UndefinedError, match="name"):
        pages.render("a.html", {})


def test_a_page_may_fetch_nothing_and_run_nothing() -> None:
    html = pages.render("a.html", {"name": "cat"})
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html
    assert not re.search(r"(src|href)=[\"'](?!data:)", html)
    assert "url(" not in html and "@import" not in html


def test_a_chart_is_the_same_text_for_the_same_figure_and_its_black_follows_the_reader() -> None:
    def figure() -> Figure:
        figure = Figure(figsize=(3, 2))
        figure.subplots().set(title="loss", xlabel="epoch")
        return figure

    text = decoded(pages.chart(figure())).decode()
    assert text == decoded(pages.chart(figure())).decode()
    assert "prefers-color-scheme:dark" in text
    assert "currentColor" in text and "#000000" not in text and "#ffffff" not in text


@pytest.mark.parametrize(("side", "channels", "mode"), [(28, 1, "L"), (64, 3, "RGB")])
def test_small_pictures_keep_every_pixel(side: int, channels: int, mode: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (side, side, channels), np.uint8)
    read = Image.open(io.BytesIO(decoded(pages.picture(image))))
    assert read.mode == mode
    assert np.array_equal(np.asarray(read).reshape(image.shape), image)


def test_large_pictures_are_scaled_down() -> None:
    uri = pages.picture(np.full((300, 200, 3), 99, np.uint8))
    assert uri.startswith("data:image/jpeg")
    assert Image.open(io.BytesIO(decoded(uri))).size == (107, 160)
