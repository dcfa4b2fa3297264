"""Pictures of a training and its result, as matplotlib figures: no display, no network."""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    import pandas as pd

# Okabe and Ito, "Color universal design" (2008): told apart by colour-blind people, too.
_BLUE, _ORANGE = "#0072B2", "#D55E00"


def curves(history: "pd.DataFrame") -> Figure:
    """Loss and accuracy by epoch, training and validation; the best epoch marked.

    Args:
        history: the columns of reports/train/history.csv.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=120)
    style = "o-" if len(history) <= 50 else "-"  # beyond that the points are one thick line
    best = history.sort_values(
        ["val_accuracy", "val_loss"], ascending=[False, True], kind="stable"
    ).iloc[0]
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split, color in (("train", _BLUE), ("val", _ORANGE)):
            axes.plot(history["epoch"], history[f"{split}_{name}"], style, ms=3.5, color=color,
                      label={"train": "training", "val": "validation"}[split])  # fmt: skip
        axes.axvline(best["epoch"], color="0.6", lw=1, ls=":", zorder=0)
        axes.set(title=name, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    axes.plot(best["epoch"], best["val_accuracy"], "o", ms=9, mfc="none", color=_ORANGE,
              label=f"kept: epoch {best['epoch']:.0f}, {best['val_accuracy']:.3f}")  # fmt: skip
    axes.legend(frameon=False)
    return figure


def confusion_matrix(counts: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Images by label (rows) and prediction (columns), shaded by the share of the row.

    Args:
        counts: (classes, classes).
        class_names: their names.
    """
    size = len(class_names)
    side = float(np.clip(2.2 + 0.55 * size, 4, 20))
    figure = Figure(figsize=(side + 0.6, side), layout="constrained", dpi=120)
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if size <= 30:  # more numbers than that cannot be read
        for row, column in np.ndindex(counts.shape):
            if counts[row, column] or size <= 10:
                axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center",
                          color="white" if shares[row, column] > 0.5 else "black")  # fmt: skip
    # Beyond 150 classes not every name has room.
    shown = range(0, size, -(-size // 150))
    names = [short_name(class_names[i]) for i in shown]
    slanted = size > 3 or max(map(len, names)) > 8
    axes.set_xticks(shown, names, rotation=90 if size > 30 else 45 if slanted else 0,
                    ha="center" if size > 30 or not slanted else "right",
                    fontsize=10 if size <= 60 else 6, parse_math=False)  # fmt: skip
    axes.set_yticks(shown, names, fontsize=10 if size <= 60 else 6, parse_math=False)
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
    """A class's name in at most 16 characters, all of which matplotlib can draw."""
    name = " ".join(name.split())
    name = "".join(c if ord(c) in _glyphs() else "?" for c in name)
    return name if len(name) <= 16 else name[:15] + "…"


@cache
def _glyphs() -> frozenset[int]:
    """What matplotlib's font can draw; of anything else it would warn at length."""
    return frozenset(get_font(findfont(FontProperties())).get_charmap())
