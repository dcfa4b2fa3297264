"""Pictures of a training and its result, as matplotlib figures: no display, no network."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    import pandas as pd

# Okabe and Ito, "Color universal design" (2008): told apart by colour-blind people, too.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00")
GREY = "#8a939c"
"""To be seen on light and on dark paper."""
_NAMED = 30
"""Up to so many classes each has its name beside its bar."""


def curves(history: "pd.DataFrame") -> Figure:
    """Loss and accuracy by epoch, training and validation; the best epoch marked.

    Args:
        history: the columns of reports/train/history.csv.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=120)
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        _draw_curve(axes, history, name)
    return figure


def curve(history: "pd.DataFrame", name: str) -> Figure:
    """One half of `curves`.

    Args:
        history: likewise.
        name: loss or accuracy.
    """
    figure = small_figure()
    _draw_curve(figure.subplots(), history, name)
    return figure


def _draw_curve(axes: Axes, history: "pd.DataFrame", name: str) -> None:
    style = "o-" if len(history) <= 50 else "-"  # beyond that the points are one thick line
    best = history.sort_values(
        ["val_accuracy", "val_loss"], ascending=[False, True], kind="stable"
    ).iloc[0]
    for split, color in (("train", BLUE), ("val", ORANGE)):
        axes.plot(history["epoch"], history[f"{split}_{name}"], style, ms=3.5, color=color,
                  label={"train": "training", "val": "validation"}[split])  # fmt: skip
    axes.axvline(best["epoch"], color=GREY, lw=1, ls=":", zorder=0)
    axes.set(title=name, xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    plain(axes)
    if name == "accuracy":
        axes.plot(best["epoch"], best["val_accuracy"], "o", ms=9, mfc="none", color=ORANGE,
                  label=f"kept: epoch {best['epoch']:.0f}, {best['val_accuracy']:.3f}")  # fmt: skip
    axes.legend(frameon=False)


def class_balance(counts: "pd.DataFrame") -> Figure:
    """The number of images of each class, training, validation and test one after another.

    Args:
        counts: a row a class, with the columns train, val and test.
    """
    size = len(counts)
    shown = counts if size <= _NAMED else counts.loc[counts.sum(axis=1).sort_values().index[::-1]]
    figure = small_figure(height=3.6 if size > _NAMED else 1.4 + 0.24 * size)
    axes = figure.subplots()
    before = np.zeros(size)
    for split, color in (("train", BLUE), ("val", ORANGE), ("test", GREEN)):
        label = {"train": "training", "val": "validation", "test": "test"}[split]
        values = shown[split].to_numpy()
        if size <= _NAMED:
            axes.barh(range(size), values, 0.75, before, color=color, label=label)
        else:
            axes.bar(range(size), values, 1.0, before, color=color, label=label)
        before = before + values
    if size <= _NAMED:
        axes.set_yticks(range(size), [short_name(str(n)) for n in shown.index], parse_math=False)
        axes.invert_yaxis()
        axes.set_xlabel("images")
    else:
        axes.set(xlabel="classes, the largest first", ylabel="images", xlim=(-0.5, size - 0.5))
    plain(axes)
    _legend(figure)
    return figure


def roc(curves: Mapping[int, np.ndarray], mean: np.ndarray, class_names: Sequence[str]) -> Figure:
    """The ROC curve of each class against the rest, and the mean of all.

    Args:
        curves: of `metrics.roc_curves`.
        mean: of `metrics.mean_roc_curve`.
        class_names: of all classes.
    """
    figure = small_figure()
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":", label="chance")
    if len(class_names) == 2:  # both classes have the same curve, mirrored
        curves = {label: points for label, points in curves.items() if label == 1}
    _draw_classes(axes, curves, class_names)
    if len(class_names) > 2:
        axes.plot(*mean.T, color="black", lw=2, label="mean of the classes")
    axes.set(title="ROC", xlabel="false positive rate", ylabel="true positive rate",
             xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))  # fmt: skip
    plain(axes)
    _legend(figure)
    return figure


def precision_recall(
    curves: Mapping[int, tuple[np.ndarray, float]], class_names: Sequence[str]
) -> Figure:
    """The precision at each recall, a curve a class.

    Args:
        curves: of `metrics.precision_recall_curves`.
        class_names: of all classes.
    """
    figure = small_figure()
    axes = figure.subplots()
    _draw_classes(axes, {label: points for label, (points, _) in curves.items()}, class_names)
    axes.set(title="precision and recall", xlabel="recall", ylabel="precision",
             xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))  # fmt: skip
    plain(axes)
    _legend(figure)
    return figure


def calibration(bins: "pd.DataFrame") -> Figure:
    """How often predictions of a confidence are right, and how many there are of each.

    Args:
        bins: of `metrics.calibration_bins`.
    """
    figure = small_figure()
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":", label="as sure as right")
    share = bins["num_images"] / bins["num_images"].sum()
    axes.bar(bins["confidence"], share, 0.03, color=GREY, alpha=0.5, label="share of images")
    spread = (bins["accuracy"] - bins["low"]).clip(0), (bins["high"] - bins["accuracy"]).clip(0)
    axes.errorbar(bins["confidence"], bins["accuracy"], spread, fmt="o-", color=BLUE, ms=5, lw=1.2,
                  capsize=2, label="right, 95 % interval")  # fmt: skip
    axes.set(title="calibration", xlabel="confidence", ylabel="accuracy", xlim=(0, 1.03),
             ylim=(0, 1.05))  # fmt: skip
    plain(axes)
    _legend(figure)
    return figure


def small_figure(height: float = 3.6) -> Figure:
    """One that can be read on a phone."""
    return Figure(figsize=(4.6, height), layout="constrained", dpi=120)


def plain(axes: Axes) -> None:
    """Leaves of the axes a pale grid, and the lines at the left and below."""
    axes.grid(alpha=0.25, color=GREY)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_classes(axes: Axes, curves: Mapping[int, np.ndarray], class_names: Sequence[str]) -> None:
    """A curve a class, in colours with names as long as these can be told apart."""
    if len(class_names) <= len(COLORS):
        for label, points in curves.items():
            axes.plot(*points.T, lw=1.6, color=COLORS[label],
                      label=_in_legend(class_names[label]))  # fmt: skip
    else:
        for i, points in enumerate(curves.values()):
            axes.plot(*points.T, lw=0.8, alpha=0.6, color=BLUE,
                      label="_" if i else "a class each")  # fmt: skip


def _in_legend(name: str) -> str:
    # A label that begins with an underscore has no place in matplotlib's legends.
    return f" {short_name(name)}" if name.startswith("_") else short_name(name)


def _legend(figure: Figure) -> None:
    """Below the axes, where it covers nothing."""
    if figure.axes[0].get_legend_handles_labels()[0]:
        legend = figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=3)
        for text in legend.get_texts():
            text.set_parse_math(False)


def confusion_matrix(counts: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Images by label (rows) and prediction (columns), shaded by the share of the row.

    Args:
        counts: (classes, classes).
        class_names: their names.
    """
    size = len(class_names)
    side = float(np.clip(2.2 + 0.55 * size, 4, 11))  # inches, as wide as a page
    figure = Figure(figsize=(side + 0.6, side), layout="constrained", dpi=120)
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if size <= 30:  # more numbers than that cannot be read
        for row, column in np.ndindex(counts.shape):
            if counts[row, column] or size <= 10:
                axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center",
                          color="white" if shares[row, column] > 0.5 else "0.1")  # fmt: skip
    # Beyond 110 classes not every name has room.
    shown = range(0, size, -(-size // 110))
    names = [short_name(class_names[i]) for i in shown]
    slanted = max(map(len, names)) > (8 if size <= 3 else 3)
    axes.set_xticks(shown, names, rotation=90 if size > 30 else 45 if slanted else 0,
                    ha="center" if size > 30 or not slanted else "right",
                    fontsize=10 if size <= 30 else 6, parse_math=False)  # fmt: skip
    axes.set_yticks(shown, names, fontsize=10 if size <= 30 else 6, parse_math=False)
    axes.set(xlabel="prediction", ylabel="label")
    axes.spines[:].set_visible(False)
    return figure


def picture_grid(images: np.ndarray, captions: Sequence[str], title: str) -> Figure:
    """Images side by side, a caption under each.

    Args:
        images: (n, H, W, 1 or 3) uint8; n may be 0, which the picture says.
        captions: n of them, of one to three lines.
        title: above all of them.
    """
    columns = min(8, max(4, len(images)))
    rows = max(1, -(-len(images) // columns))
    # In inches. No automatic layout: it would shrink the images until the widest caption fits.
    side, above = 1.6, 0.4
    below = 0.1 + 0.14 * max((caption.count("\n") + 1 for caption in captions), default=1)
    height = above + rows * (side + below)
    figure = Figure(figsize=(1.06 * side * columns, height), dpi=100)
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - above / height, bottom=below / height,
                           wspace=0.06, hspace=below / side)  # fmt: skip
    figure.suptitle(title if len(images) else f"{title}: none", parse_math=False)
    for axes in figure.subplots(rows, columns, squeeze=False).ravel():
        axes.set_axis_off()
    for axes, image, caption in zip(figure.axes, images, captions, strict=False):
        axes.imshow(image if image.shape[2] == 3 else image[:, :, 0], cmap="gray", vmin=0, vmax=255)
        axes.text(0.5, -0.03, caption, fontsize=8, ha="center", va="top", parse_math=False,
                  transform=axes.transAxes)  # fmt: skip
    return figure


def weights_as_picture(weights: np.ndarray) -> np.ndarray:
    """A unit's weights, (C, h, w), as a picture, (h, w, C) uint8.

    Grey (128) is a weight of 0, and the largest has the full range.
    """
    largest = float(np.abs(weights).max()) or 1.0
    return np.rint(128 + 127 * weights.transpose(1, 2, 0) / largest).astype(np.uint8)


def sample_captions(labels: Sequence[str]) -> list[str]:
    """The class names as captions."""
    return [short_name(label) for label in labels]


def mistake_captions(
    labels: Sequence[str], predictions: Sequence[str], confidences: Sequence[float]
) -> list[str]:
    """What each image is and what it was taken for."""
    return [
        f"{short_name(label)}\ntaken for\n{short_name(prediction)}, {confidence:.0%}"
        for label, prediction, confidence in zip(labels, predictions, confidences, strict=True)
    ]


def short_name(name: str) -> str:
    """The name as it can be drawn: in one line of at most 16 characters that the font has."""
    name = " ".join(name.split())
    name = "".join(c if ord(c) in _glyphs() else "?" for c in name)
    return name if len(name) <= 16 else name[:15] + "…"


@cache
def _glyphs() -> frozenset[int]:
    """What matplotlib's font can draw; of anything else it would warn at length."""
    return frozenset(get_font(findfont(FontProperties())).get_charmap())
