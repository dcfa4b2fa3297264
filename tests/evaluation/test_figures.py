"""Tests of the pictures: any number of classes, any name, and nothing that covers anything else."""

import io
import itertools
import warnings
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from cnnpipe.evaluation.figures import (
    calibration,
    class_balance,
    confusion_matrix,
    curves,
    mistake_captions,
    picture_grid,
    precision_recall,
    roc,
    sample_captions,
)

WEIRD = ["$x$", "<script>", "two\nlines", "long" * 100, "_\\alpha^{", "$", "\udcff", "tab\there"]


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # of what other tests have left
        yield


def saved(figure: Figure) -> np.ndarray:
    """The pixels of the PNG that the figure makes; it is not empty."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    pixels = np.asarray(Image.open(file).convert("L"))
    assert pixels.min() < 128 < pixels.max()
    assert max(pixels.shape) < 4000
    return pixels


def history(num_epochs: int) -> pd.DataFrame:
    epochs = np.arange(1, num_epochs + 1)
    return pd.DataFrame(
        {"epoch": epochs, "train_loss": 1 / epochs, "val_loss": 1.2 / epochs,
         "train_accuracy": 1 - 0.4 / epochs, "val_accuracy": np.round(1 - 0.5 / epochs, 1)}
    )  # fmt: skip


def images(count: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 20, 20, channels), dtype=np.uint8)


@pytest.mark.parametrize("num_epochs", [1, 5, 200])
def test_curves_mark_the_epoch_that_was_kept(num_epochs: int) -> None:
    figure = curves(history(num_epochs))
    saved(figure)
    texts = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    # Accuracies are equal from some epoch on: the smallest loss, the last, is kept.
    kept = f"kept: epoch {num_epochs}, {1 - 0.5 / num_epochs:.1f}00"
    assert texts == ["training", "validation", kept]
    ticks = figure.axes[0].get_xticks()
    assert all(tick == int(tick) for tick in ticks)


def test_the_confusion_matrix_shows_each_count_in_its_place() -> None:
    figure = confusion_matrix(np.array([[120, 13], [0, 1234]]), ["cat", "dog"])
    saved(figure)
    cells = {t.get_position(): t.get_text() for t in figure.axes[0].texts}
    assert cells == {(0, 0): "120", (1, 0): "13", (0, 1): "0", (1, 1): "1,234"}


@pytest.mark.parametrize("num_classes", [2, 8, 40, 100])
def test_a_confusion_matrix_of_any_size_can_be_saved(num_classes: int) -> None:
    names = [WEIRD[i % 8] + str(i) * (i > 8) for i in range(num_classes)]
    figure = confusion_matrix(np.full((num_classes, num_classes), 7), names)
    saved(figure)
    labels = figure.axes[0].get_yticklabels()
    assert len(labels) == num_classes
    assert not any(label.get_parse_math() for label in labels)
    boxes = [label.get_window_extent() for label in labels]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


def test_a_thousand_classes_show_some_of_their_names() -> None:
    figure = confusion_matrix(np.eye(1000, dtype=int), [f"class {i}" for i in range(1000)])
    saved(figure)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[:2] == ["class 0", "class 10"]


def test_a_class_without_an_image_is_an_empty_row() -> None:
    saved(confusion_matrix(np.array([[0, 0], [3, 4]]), ["none", "some"]))


@pytest.mark.parametrize(("count", "channels"), [(0, 3), (1, 1), (5, 3), (24, 1), (100, 3)])
def test_a_picture_grid_of_any_length_can_be_saved(count: int, channels: int) -> None:
    figure = picture_grid(images(count, channels), ["cat"] * count, "the title")
    saved(figure)
    title = figure.get_suptitle()
    assert title == ("the title" if count else "the title: none")
    assert sum(len(axes.images) for axes in figure.axes) == count


def test_captions_lie_between_the_images_and_within_the_picture() -> None:
    names = [name.encode(errors="replace").decode()[:9] for name in WEIRD]
    captions = mistake_captions(names * 2, names[::-1] * 2, [0.987] * 16)
    figure = picture_grid(images(16), captions, "most confident mistakes")
    saved(figure)
    pictures = [axes.get_window_extent() for axes in figure.axes]
    texts = [axes.texts[0].get_window_extent() for axes in figure.axes]
    for i, text in enumerate(texts):
        assert not any(text.overlaps(picture) for picture in pictures)
        assert not any(text.overlaps(other) for other in texts[:i])
        assert text.y0 >= 0 and text.x0 >= 0 and text.x1 <= figure.bbox.x1


def test_weird_names_become_plain_short_text() -> None:
    captions = sample_captions(WEIRD)
    assert captions[:3] == ["$x$", "<script>", "two lines"]
    assert captions[3] == "longlonglonglon…"
    assert captions[6] == "?"
    figure = picture_grid(images(8), captions, "$title$")
    saved(figure)
    assert not any(axes.texts[0].get_parse_math() for axes in figure.axes)


def test_a_mistake_says_what_it_is_and_what_it_was_taken_for() -> None:
    assert mistake_captions(["cat"], ["dog"], [0.987]) == ["cat\ntaken for\ndog, 99%"]


def test_grey_images_are_drawn_in_greys_of_the_full_range() -> None:
    figure = picture_grid(np.full((1, 9, 9, 1), 128, np.uint8), ["x"], "grey")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    pixels = np.asarray(Image.open(file).convert("RGB"))
    middle = figure.axes[0].get_window_extent()
    row, column = pixels.shape[0] - int(middle.y0 + middle.y1) // 2, int(middle.x0 + middle.x1) // 2
    assert pixels[row, column].tolist() == [128, 128, 128]


@pytest.mark.parametrize("names", [["a", "b"], WEIRD[:6], [f"class {i}" for i in range(500)]])
def test_the_charts_of_any_classes_can_be_saved(names: list[str]) -> None:
    rng = np.random.default_rng(0)
    lines = {i: np.sort(rng.random((9, 2)), axis=0) for i in range(len(names))}
    counts = pd.DataFrame(rng.integers(1, 99, (len(names), 3)), names, ["train", "val", "test"])
    bins = pd.DataFrame({"confidence": [0.55, 1], "accuracy": [0.5, 1], "low": [0.2, 1.0],
                         "high": [0.7, 1.0], "num_images": [5, 9]})  # fmt: skip
    for figure in (
        class_balance(counts),
        roc(lines, lines[0], names),
        precision_recall({i: (line, 0.5) for i, line in lines.items()}, names),
        calibration(bins),
    ):
        saved(figure)
        assert max(figure.get_size_inches()) < 10


def test_two_classes_have_one_roc_curve_and_more_have_their_mean() -> None:
    line = np.array([[0, 0], [0, 1], [1, 1]])
    two = roc({0: line, 1: line}, line, ["cat", "_dog"]).axes[0]
    assert [artist.get_label() for artist in two.lines] == ["chance", " _dog"]
    three = roc(dict.fromkeys(range(3), line), line, ["a", "b", "c"]).axes[0]
    labels = [artist.get_label() for artist in three.lines]
    assert labels == ["chance", "a", "b", "c", "mean of the classes"]
