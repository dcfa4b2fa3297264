"""Tests of the report: it says what is so, of any number of classes with any names."""

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from stored import stored

from cnnpipe.data.manifest import CONFLICT_COLUMNS, QUARANTINE_COLUMNS
from cnnpipe.evaluation.metrics import metrics
from cnnpipe.evaluation.report import Evaluated, filter_pictures, report
from cnnpipe.network.summary import summarize
from cnnpipe.params import Params
from cnnpipe.usage import Usage

ODD = ("<script>alert(1)</script>", "$x$", "two\nlines", "_under", "NA", "🐱", "=1+1")


@pytest.fixture
def make(make_classifier: Callable[..., Any], tmp_path: Path) -> Callable[..., Evaluated]:
    """`make(class_names, each=10, color="rgb", **model)`: an evaluated model of random pictures."""

    def make(
        class_names: tuple[str, ...], each: int = 10, color: str = "rgb", **model: Any
    ) -> Evaluated:
        rng = np.random.default_rng(0)
        classifier = make_classifier(12, color, class_names, **model)
        channels = classifier.preparation.input_shape[0]
        num_images = each * len(class_names)
        labels = np.arange(num_images) % len(class_names)
        images = stored(rng.integers(0, 256, (num_images, 12, 12, channels), np.uint8))
        table = pd.DataFrame(
            {
                "path": [f"{class_names[i]}/{k}.jpg" for k, i in enumerate(labels)],
                "label": [class_names[i] for i in labels],
                "split": [("train", "train", "val", "test")[k // len(class_names) % 4]
                          for k in range(num_images)],
                "group": range(num_images),
            }
        )  # fmt: skip
        rows = np.flatnonzero(table["split"] == "test")
        scores = rng.random((len(rows), len(class_names)))
        scores += 0.7 * np.eye(len(class_names))[labels[rows]]
        probabilities = scores / scores.sum(axis=1, keepdims=True)
        history = pd.DataFrame(
            {"epoch": [1.0, 2], "train_loss": [2.0, 1], "train_accuracy": [0.4, 0.6],
             "val_loss": [2.0, 1.5], "val_accuracy": [0.3, 0.5], "learning_rate": [0.1, 0.1],
             "seconds": [1.0, 1.5]}
        )  # fmt: skip
        shape = classifier.preparation.input_shape
        return Evaluated(
            Params(model=classifier.model),
            classifier,
            summarize(classifier.model, shape, len(class_names)),
            images,
            table,
            rows,
            labels[rows],
            probabilities,
            metrics(probabilities, labels[rows], 15),
            history,
            pd.DataFrame(columns=list(QUARANTINE_COLUMNS)),
            tmp_path,
            pd.DataFrame(columns=list(CONFLICT_COLUMNS)),
            {"train": Usage("train", 100.5, 300 << 20, 0, "a machine", "2026-01-02"),
             "split": None},
            {"code": "abc"},
            [],
        )  # fmt: skip

    return make


def plain(html: str) -> str:
    """The text of a page, its runs of spaces as one."""
    text = re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.DOTALL)
    return " ".join(text.split())


def pictures(html: str) -> list[str]:
    return re.findall(r'<img src="(data:image/[^"]+)"', html)


def test_the_report_says_what_was_run_and_how_good_it_is(make: Callable[..., Evaluated]) -> None:
    evaluated = make(("cat", "dog"), each=40)
    text = plain(report(replace(evaluated, warnings=["the network memorises"])))
    result = evaluated.metrics
    hits = round(result["accuracy"] * 20)
    assert result["num_images"] == 20
    assert f"Of 20 test images, which the training never saw, {hits} are told right" in text
    for key in ("accuracy", "accuracy_low", "accuracy_high", "f1", "roc_auc", "log_loss",
                "calibration_error"):  # fmt: skip
        assert f"{result[key]:.3f}" in text
    assert "40 to train, 20 to validate, 20 to test" in text
    assert "train 100.5 s 300 MB 2026-01-02 a machine" in text
    assert "split not known here" in text
    assert "The network memorises." in text
    assert "training 2.5 s 2 epochs" in text
    assert "0.500, was kept" in text
    assert "train.learning_rate 0.001" in text
    assert f"{evaluated.summary.parameters:,} parameters." in text
    assert "cat 40 20 20" not in text and "cat 20 10 10" in text
    assert "Nothing: every file could be read." in text and "None was found." in text


@pytest.mark.parametrize("num_classes", [2, 6, 7, 13, 31, 120])
@pytest.mark.parametrize("color", ["rgb", "grey"])
def test_a_report_of_any_number_of_classes_is_whole(
    make: Callable[..., Evaluated], num_classes: int, color: str
) -> None:
    names = tuple(f"class {i:03d}" for i in range(num_classes))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        html = report(make(names, 8, color))
    assert all(name in html for name in names)
    assert len(html) < 5_000_000
    assert len(pictures(html)) >= 7 + min(num_classes, 12) + 10  # charts, samples, filters


def test_names_do_nothing_in_a_report(make: Callable[..., Evaluated]) -> None:
    evaluated = make(ODD)
    quarantine = pd.DataFrame([(f"{name}.jpg", "not an image", "5") for name in ODD],
                              columns=list(QUARANTINE_COLUMNS))  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        html = report(replace(evaluated, quarantine=quarantine))
    html.encode()
    assert "<script" not in html and "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_a_class_without_test_images_and_a_perfect_model_are_no_obstacle(
    make: Callable[..., Evaluated],
) -> None:
    evaluated = make(("a", "b", "c"))
    only = evaluated.labels != 2
    probabilities = np.eye(3)[evaluated.labels[only]]
    text = plain(
        report(
            replace(evaluated, rows=evaluated.rows[only], labels=evaluated.labels[only],
                    probabilities=probabilities,
                    metrics=metrics(probabilities, evaluated.labels[only], 15))
        )
    )  # fmt: skip
    assert "None: every test image is told right." in text
    assert "c 0 0.000 (0.000 to 1.000)" in text


def test_quarantined_files_are_shown_with_what_is_left_of_them(
    make: Callable[..., Evaluated], tmp_path: Path
) -> None:
    rows = [(f"cat/{i}.jpg", f"reason {i}", str(1000 + i)) for i in range(30)]
    Image.new("RGB", (40, 20), "red").save(tmp_path / "3.png")
    quarantine = pd.DataFrame(rows, columns=list(QUARANTINE_COLUMNS))
    evaluated = make(("cat", "dog"))
    html = report(replace(evaluated, quarantine=quarantine))
    text = plain(html)
    assert "30 files could not be used; these are the first 24" in text
    assert "cat/3.jpg reason 3 1,003 bytes" in text and "cat/24.jpg reason" not in text
    assert len(pictures(html)) == len(pictures(report(evaluated))) + 1
    assert text.count("no picture") == 23


def test_copies_are_shown_contradictions_first(make: Callable[..., Evaluated]) -> None:
    evaluated = make(("cat", "dog"), each=20)
    table = evaluated.table.copy()
    cats = table.index[(table["label"] == "cat") & (table["split"] == "train")][:3]
    table.loc[cats, "group"] = cats[0]
    torn = table.index[(table["label"] == "cat") & (table["split"] != "train")][:2]
    table.loc[torn, "group"] = torn[0]
    both = table.index[table["split"] == "val"][-2:]
    assert set(table.loc[both, "label"]) == {"cat", "dog"}
    table.loc[both, "group"] = both[0]
    conflicts = table.loc[both, list(CONFLICT_COLUMNS)]
    html = report(replace(evaluated, table=table, conflicts=conflicts))
    text = plain(html)
    assert "7 images are copies or near-copies of others, in 3 groups. 2 of them have" in text
    first = text.index("2 copies with contradicting labels: cat, dog; in val")
    assert first < text.index("3 copies of cat; in train") < text.index("2 copies of cat; torn")
    assert len(re.findall(r'<h3 class="alarm">', html)) == 2


def test_the_surest_mistakes_and_least_sure_hits_are_named(make: Callable[..., Evaluated]) -> None:
    evaluated = make(("cat", "dog"), each=8)
    assert evaluated.labels.tolist() == [0, 1, 0, 1]
    probabilities = np.array([[0.2, 0.8], [0.1, 0.9], [0.6, 0.4], [0.95, 0.05]])
    text = plain(report(replace(evaluated, probabilities=probabilities)))
    mistakes = text.partition("The surest mistakes")[2].partition("The least sure hits")
    assert mistakes[0].index("dog taken for cat, 95.0%") < mistakes[0].index(
        "cat taken for dog, 80.0%"
    )
    assert "2 of 2" in mistakes[0]
    assert mistakes[2].index("cat right, 60.0%") < mistakes[2].index("dog right, 90.0%")


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        ({"architecture": "article"}, (10, 3, 3, 3)),
        ({"architecture": "residual", "filters": 4}, (4, 3, 3, 3)),
        ({"architecture": "mlp", "dense_units": 5}, (5, 12, 12, 3)),
    ],
)
def test_filters_are_pictures_in_which_grey_is_nothing(
    make_classifier: Callable[..., Any], model: dict[str, Any], shape: tuple[int, ...]
) -> None:
    classifier = make_classifier(12, **model)
    weight = next(classifier.network.parameters())
    with torch.no_grad():
        picture = weight[0].reshape(3, *shape[1:3]) if weight.ndim == 2 else weight[0]
        picture[0, 0, 0], picture[0, 0, 1] = 0.0, -9.0
    found = filter_pictures(classifier)
    assert found.shape == shape and found.dtype == np.uint8
    assert found[0, 0, 0, 0] == 128
    assert found[0, 0, 1, 0] == 1  # the largest weight of the first, negative
    assert all(np.abs(picture.astype(int) - 128).max() == 127 for picture in found)


@pytest.mark.browser
@pytest.mark.skipif(not browser.CHROMIUM, reason="there is no Chromium")
@pytest.mark.parametrize("class_names", [("cat", "dog"), ODD, tuple(map(str, range(100)))])
def test_a_browser_shows_the_report_whole_and_asks_nobody(
    make: Callable[..., Evaluated], class_names: tuple[str, ...], tmp_path: Path
) -> None:
    page_file = tmp_path / "report.html"
    page_file.write_text(report(make(class_names)), encoding="utf-8")
    with browser.browser() as page:
        for width in browser.WIDTHS:
            page.open(page_file.as_uri(), width, dark=width == 390)
            assert page.missing_pictures() == []
            assert page.overflow_px() <= 0
            assert page.evaluate("document.images.length") > 20
        assert page.complaints == []
        assert {url for url in page.requests if not url.startswith("data:")} == {page_file.as_uri()}
