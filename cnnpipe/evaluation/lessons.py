"""The figures of an explanation: as wide as a telephone shows legibly, with any name in them.

Signed values have the same colours everywhere: orange above zero, white at zero, blue below.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from cnnpipe.evaluation.explanation import (
    Blocks,
    ClassicFilter,
    WorkedConvolution,
    in_cells,
)
from cnnpipe.evaluation.figures import BLUE, GREEN, ORANGE, short_name, weights_as_picture

# Of Okabe and Ito's colours, darkened outwards.
_SIGNED = LinearSegmentedColormap.from_list(
    "signed", ["#00304d", BLUE, "#a6cfe6", "#ffffff", "#f3b98f", ORANGE, "#5c2800"]
)
_STEPS = {"here": ORANGE, "stride 1": BLUE, "stride 2": GREEN}
_TINTS = {"red": (1.0, 0.25, 0.2), "green": (0.3, 0.85, 0.3), "blue": (0.35, 0.6, 1.0),
          "grey": (1.0, 1.0, 1.0)}  # fmt: skip

_WIDTH, _DPI = 4.2, 150
"""In inches, of every figure, and dots an inch: at 390 px a page scales it down by half."""
_TILE_PX = 144
"""Of a feature map in a grid of four columns."""
_MOST_WRITTEN = 11
"""A larger filter is drawn without its numbers, for which there is no room."""


def channel_names(num_channels: int) -> tuple[str, ...]:
    """Of the image: red, green and blue, or grey."""
    return ("red", "green", "blue") if num_channels == 3 else ("grey",)


def framed_image(image: np.ndarray, top: int, left: int, side: int) -> Figure:
    """The image with a square marked in it.

    Args:
        image: (H, W, 1 or 3) uint8.
        top: of the square, in pixels.
        left: likewise.
        side: likewise.
    """
    figure, axes = _one(_WIDTH)
    axes.imshow(_rgb(image))
    for width, edge in ((4, "white"), (2, ORANGE)):
        axes.add_patch(Rectangle((left - 0.5, top - 0.5), side, side, fill=False, ec=edge,
                                 lw=width))  # fmt: skip
    axes.text(0.02, 0.98, f"{side} x {side} pixels", color="white", fontsize=10, va="top",
              transform=axes.transAxes,
              bbox={"fc": ORANGE, "ec": "none", "pad": 2.5})  # fmt: skip
    return figure


def matrix(values: np.ndarray, channel: str) -> Figure:
    """One channel of a crop, its numbers in the cells.

    Args:
        values: (h, w) uint8.
        channel: its name.
    """
    height, width = values.shape
    figure, axes = _one(_WIDTH * height / width + 0.3, above=0.3)
    axes.set_title(channel, fontsize=11)
    shades = values[:, :, None] / 255 * np.array(_TINTS[channel])
    _cells(axes, shades, [[str(v) for v in row] for row in values], min(11, 88 / width))
    return figure


def flattening(values: np.ndarray, channel: str) -> Figure:
    """The rows of a small crop, and the same put one after another.

    Args:
        values: (3, 3) uint8.
        channel: its name.
    """
    size = len(values)
    figure = _figure(3.1)
    square = _place(figure, (_WIDTH - 1.65) / 2, 0.35, 1.65, 1.65)
    strip = _place(figure, 0.08, 2.5, _WIDTH - 0.16, (_WIDTH - 0.16) / size**2)
    rows = np.array([(1.0, 0.85, 0.72), (0.82, 0.91, 0.97), (0.80, 0.93, 0.87)])[:size]
    colours = np.repeat(rows[:, None], size, axis=1)
    texts = [[str(v) for v in row] for row in values]
    _cells(square, colours, texts, 11)
    square.set_title(f"{size} x {size} pixels ({channel})", fontsize=10)
    _cells(strip, colours.reshape(1, -1, 3), [[text for row in texts for text in row]], 10)
    strip.set_title("flattened", fontsize=10)
    # A pixel and the one below it, which were neighbours.
    for axes, places in ((square, ((1, 0), (1, 1))), (strip, ((1, 0), (1 + size, 0)))):
        for x, y in places:
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, ec="black", lw=2,
                                     zorder=3, clip_on=False))  # fmt: skip
    return figure


def products(worked: WorkedConvolution, channel: int, name: str) -> Figure:
    """One channel of the patch, the filter's weights that lie on it, and their products.

    Args:
        worked: the convolution.
        channel: its number.
        name: its name.
    """
    patch, weights = worked.here.patch[channel], worked.filters.weights[worked.index, channel]
    terms = worked.here.products[channel]
    size = len(patch)
    side = min(3.6, 0.72 * size)
    figure = _figure(3 * (side + 0.42) + 0.1)
    grids = (
        (f"{name}: the patch, normalised", patch),
        ("times the filter's weights", weights),
        (f"= products, together {worked.here.sums[channel]:+z.3f}", terms),
    )
    for number, (title, values) in enumerate(grids):
        top = 0.34 + number * (side + 0.42)
        axes = _place(figure, (_WIDTH - side) / 2, top, side, side)
        axes.set_title(title, fontsize=11)
        texts = [[f"{v:z.2f}" for v in row] for row in values] if size <= _MOST_WRITTEN else None
        _cells(axes, _signed(values), texts, min(11, 72 * side / size / 3.6))
    return figure


def paddings(image: np.ndarray, kernel_size: int, same: bool, title: str) -> Figure:
    """A filter in the corner of a small image, without or with zeros around it.

    Args:
        image: (H, W, 1 or 3) uint8, whose corner is drawn.
        kernel_size: of the filter, in pixels.
        same: whether F - 1 zeros are added to each row and column.
        title: above the figure.
    """
    side = kernel_size + 2
    corner = _rgb(image)[:side, :side]
    ends = [(0, side - n) for n in corner.shape[:2]]
    corner = np.pad(corner, (*ends, (0, 0)), mode="edge") / 255
    before = (kernel_size - 1) // 2 if same else 0
    after = kernel_size - 1 - before if same else 0
    padded = np.pad(corner, ((before, after), (before, after), (0, 0)), constant_values=1)
    figure, axes = _one(_WIDTH + 0.35, above=0.35)
    axes.set_title(title, fontsize=11)
    total = len(padded)
    inside = slice(before, before + side)
    texts = [["0"] * total for _ in range(total)]
    for row in range(total)[inside]:
        texts[row][inside] = [""] * side
    _cells(axes, padded, texts if total <= 2 * _MOST_WRITTEN else None, min(10, 130 / total))
    axes.add_patch(Rectangle((-0.5, -0.5), kernel_size, kernel_size, fc=ORANGE, alpha=0.25))
    axes.add_patch(Rectangle((-0.5, -0.5), kernel_size, kernel_size, fill=False, ec=ORANGE, lw=3,
                             clip_on=False, zorder=3))  # fmt: skip
    centre = (kernel_size - 1) / 2
    axes.plot(centre, centre, "o", ms=9, color=ORANGE, mec="white", zorder=4)
    return figure


def classic(filter_: ClassicFilter) -> Figure:
    """The filter's numbers beside what it makes of the image."""
    kernel = filter_.kernel
    figure = _figure(2.35)
    side = 1.55 / max(kernel.shape)
    numbers = _place(figure, 0.05 + (1.55 - side * kernel.shape[1]) / 2,
                     0.5 + (1.55 - side * kernel.shape[0]) / 2,
                     side * kernel.shape[1], side * kernel.shape[0])  # fmt: skip
    texts = [[f"{v:.0f}" for v in row] for row in kernel]
    _cells(numbers, _signed(kernel, float(np.abs(kernel).max()) * 1.6), texts, 11)
    by = f", each / {filter_.divisor}" if filter_.divisor > 1 else ""
    what = "red, green, blue" if len(kernel) == 1 else f"{len(kernel)} x {len(kernel)} weights"
    figure.text(0.83 / _WIDTH, 0.06, what + by, fontsize=9, ha="center")
    response = _place(figure, 1.8, 0.3, 2.0, 2.0)
    values = filter_.response
    response.imshow(_rgb(values) if values.dtype == np.uint8 else _signed(values))
    figure.text(2.8 / _WIDTH, 1 - 0.22 / 2.35, filter_.name, fontsize=11, ha="center")
    response.set_xticks([])
    response.set_yticks([])
    return figure


def filters_and_maps(
    pairs: Sequence[tuple[str, np.ndarray, np.ndarray]], largest: float | None = None
) -> Figure:
    """Weights drawn as pictures, each beside a map.

    Args:
        pairs: a label, (C, F, F) weights of 1 or 3 channels, and an (H, W) map.
        largest: the value that has the darkest colour in all maps; None is each map's own.
    """
    tiles, labels = [], []
    for label, weights, values in pairs:
        # A filter's own largest weight has the full colour, or weak filters would all be grey.
        colours = (
            weights_as_picture(weights)
            if len(weights) == 3
            else _signed(weights[0], float(np.abs(weights).max()) or 1.0)
        )
        tiles += [colours, _signed(values, largest)]
        labels += [label, ""]
    return _mosaic(tiles, labels)


def maps(values: np.ndarray, channels: Sequence[int], largest: float) -> Figure:
    """Some channels' activation maps.

    Args:
        values: (C, H, W).
        channels: to be drawn.
        largest: the value that has the darkest colour.
    """
    return _mosaic([_signed(values[c], largest) for c in channels], [str(c + 1) for c in channels])


def named_maps(items: dict[str, np.ndarray], columns: int = 2) -> Figure:
    """Maps side by side, of one scale, each under its name.

    Args:
        items: (H, W) maps.
        columns: so many in a row.
    """
    largest = scale_of(np.concatenate([values.ravel() for values in items.values()]))
    tiles = [_signed(values, largest) for values in items.values()]
    return _mosaic(tiles, list(items), columns)


def pooled_numbers(values: np.ndarray, pooled: dict[str, np.ndarray]) -> Figure:
    """Part of a map and what becomes of its windows of 2 x 2.

    Args:
        values: (4, 4), or (2, 2) of a map that has no more.
        pooled: the results, of half its side, by their names.
    """
    figure = _figure(3.95)
    windows = np.array([[(1.0, 0.85, 0.72), (0.82, 0.91, 0.97)],
                        [(0.80, 0.93, 0.87), (0.93, 0.87, 0.95)]])  # fmt: skip
    windows = windows[: len(values) // 2, : len(values) // 2]
    side = 2.1
    axes = _place(figure, (_WIDTH - side) / 2, 0.08, side, side)
    _cells(axes, windows.repeat(2, axis=0).repeat(2, axis=1), _written(values), 11)
    for number, (name, result) in enumerate(pooled.items()):
        left = 0.1 + number * (_WIDTH - 0.2 - 1.2) / 2
        axes = _place(figure, left, 2.65, 1.2, 1.2)
        axes.set_title(name, fontsize=11)
        _cells(axes, windows, _written(result), 11)
    return figure


def bars(names: Sequence[str], values: Sequence[float], share: bool = False) -> Figure:
    """A bar a name, the first at the top.

    Args:
        names: any text.
        values: a value each.
        share: whether they are probabilities.
    """
    height = 0.3 + 0.3 * len(names)
    figure = _figure(height)
    axes = _place(figure, 1.5, 0.1, _WIDTH - 1.65, height - 0.2)
    places = np.arange(len(names))
    colors = [ORANGE if v > 0 else BLUE for v in values]
    axes.barh(places, values, color=BLUE if share else colors, height=0.7)
    low, high = min(0.0, *values), max(0.0, *values)
    span = 1.0 if share else (high - low) or 1.0
    for place, value in enumerate(values):
        text = percent(value) if share else f"{value:+z.2f}"
        axes.text(max(value, 0) + span * 0.03, place, text, fontsize=10, va="center")
    axes.set(ylim=(len(names) - 0.45, -0.55),
             xlim=(low - span * 0.03, (1.0 if share else high) + span * 0.32))  # fmt: skip
    axes.set_yticks(places, [short_name(name) for name in names], fontsize=10, parse_math=False)
    axes.set_xticks([])
    axes.axvline(0, color="0.4", lw=0.8)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure


def heat(
    image: np.ndarray, values: np.ndarray, extent: tuple[float, float, float, float]
) -> Figure:
    """Signed values over the image, which is pale and grey.

    Args:
        image: (H, W, 1 or 3) uint8.
        values: (h, w).
        extent: left, right, bottom and top of the values in pixels of the image.
    """
    figure, axes = _one(_WIDTH)
    height, width = image.shape[:2]
    pale = image.mean(axis=2) * 0.45 + 140
    axes.imshow(pale, cmap="gray", vmin=0, vmax=255)
    scale = scale_of(values)
    colours = _signed(values, scale) / 255
    alpha = np.clip(np.abs(values) / scale, 0, 1) ** 0.7 * 0.9
    axes.imshow(np.dstack([colours, alpha]), extent=extent, interpolation="nearest")
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    return figure


def parameters_by_blocks(rows: Sequence[Blocks]) -> Figure:
    """The parameters of networks of 1, 2, ... blocks, in convolutions and dense layers."""
    height = 0.75 + 0.42 * len(rows)
    figure = _figure(height)
    axes = _place(figure, 0.95, 0.42, _WIDTH - 1.1, height - 0.5)
    places = np.arange(len(rows))
    first = np.array([row.in_convolutions for row in rows])
    second = np.array([row.in_dense for row in rows])
    axes.barh(places, first, color=BLUE, height=0.66, label="convolutions")
    axes.barh(places, second, left=first, color=ORANGE, height=0.66, label="dense layers")
    most = int((first + second).max())
    for place, row in enumerate(rows):
        axes.text(row.parameters + most * 0.02, place, f"{row.parameters:,}", fontsize=10,
                  va="center")  # fmt: skip
    names = [f"{row.blocks} block{'s' if row.blocks > 1 else ''}" for row in rows]
    axes.set_yticks(places, names, fontsize=10)
    axes.set(ylim=(len(rows) - 0.45, -0.55), xlim=(0, most * 1.35))
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.legend(frameon=False, fontsize=10, ncols=2, loc="lower center",
                bbox_to_anchor=(0.4, 1.0))  # fmt: skip
    return figure


def percent(probability: float) -> str:
    """A probability to a tenth of a percent, and never as 0 or 100."""
    if 0.0005 <= probability < 0.9995:
        return f"{probability:.1%}"
    return "< 0.1%" if probability < 0.5 else "> 99.9%"


def scale_of(values: np.ndarray) -> float:
    """The value for the darkest colour: of a thousand, five may be beyond it."""
    magnitudes = np.abs(values)
    return float(np.quantile(magnitudes, 0.995)) or float(magnitudes.max()) or 1.0


def heat_of_pixels(image: np.ndarray, values: np.ndarray) -> Figure:
    """As `heat`, of a value a pixel, summed in cells that can be seen."""
    cells = in_cells(values, 60)
    cell = -(-max(values.shape) // 60)
    height, width = (side * cell - 0.5 for side in cells.shape)
    return heat(image, cells, (-0.5, width, height, -0.5))


def next_places(image: np.ndarray, worked: WorkedConvolution) -> Figure:
    """The pixels around the filter's place, with the filter there and one step on.

    Args:
        image: (H, W, 1 or 3) uint8.
        worked: the convolution.
    """
    size = worked.filters.weights.shape[2]
    here = worked.here
    top, left = here.top - 1, here.left - 1
    rows, columns = size + 2, size + 4
    shown = np.full((rows, columns, 3), 255, np.uint8)  # white beyond the image
    for row in range(max(0, -top), min(rows, image.shape[0] - top)):
        for column in range(max(0, -left), min(columns, image.shape[1] - left)):
            shown[row, column] = _rgb(image)[top + row, left + column]
    height = _WIDTH * rows / columns + 0.35
    figure, axes = _one(height, above=0.35)
    _cells(axes, shown / 255, None, 0)
    places = {0: here, **worked.next}
    for number, (step, position) in enumerate(places.items()):
        color = list(_STEPS.values())[step]
        inset = 0.13 * number
        corner = (position.left - left - 0.5 + inset, 0.5 + inset)
        side = size - 2 * inset
        for width, edge in ((4.5, "white"), (2.5, color)):
            axes.add_patch(Rectangle(corner, side, side, fill=False, ec=edge, lw=width))
        figure.text(0.02 + 0.3 * number, 1 - 0.22 / height, list(_STEPS)[step], fontsize=11,
                    color=color, weight="bold")  # fmt: skip
    return figure


def _figure(height: float) -> Figure:
    return Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="white")


def _place(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes without ticks at that place of the figure; all in inches, from its top left."""
    total = figure.get_figheight()
    axes = figure.add_axes(
        (left / _WIDTH, 1 - (top + height) / total, width / _WIDTH, height / total)
    )
    axes.set_xticks([])
    axes.set_yticks([])
    return axes


def _one(height: float, above: float = 0.0) -> tuple[Figure, Axes]:
    figure = _figure(height)
    axes = _place(figure, 0.03, above + 0.03, _WIDTH - 0.06, height - above - 0.06)
    axes.spines[:].set_color("0.75")
    return figure, axes


def _cells(
    axes: Axes, colours: np.ndarray, texts: Sequence[Sequence[str]] | None, fontsize: float
) -> None:
    """Squares of these colours, (h, w, 3) of 0-1 or uint8, with what is written in them."""
    if colours.dtype == np.uint8:
        colours = colours / 255
    height, width = colours.shape[:2]
    axes.imshow(colours, interpolation="nearest", aspect="auto")
    axes.vlines(np.arange(1, width) - 0.5, -0.5, height - 0.5, color="0.7", lw=0.6)
    axes.hlines(np.arange(1, height) - 0.5, -0.5, width - 0.5, color="0.7", lw=0.6)
    axes.spines[:].set_color("0.6")
    if texts is None:
        return
    dark = colours @ np.array([0.299, 0.587, 0.114]) < 0.5  # ITU-R BT.601 luma
    for row, column in np.ndindex(height, width):
        if text := texts[row][column]:
            axes.text(column, row, text, ha="center", va="center", fontsize=fontsize,
                      color="white" if dark[row, column] else "black")  # fmt: skip


def _signed(values: np.ndarray, largest: float | None = None) -> np.ndarray:
    """(H, W) values as (H, W, 3) uint8 colours."""
    scale = largest if largest is not None else scale_of(values)
    return np.asarray(_SIGNED(values / (2 * scale) + 0.5, bytes=True)[:, :, :3])


def _rgb(image: np.ndarray) -> np.ndarray:
    return image if image.shape[2] == 3 else image.repeat(3, axis=2)


def _written(values: np.ndarray) -> list[list[str]]:
    return [[f"{v:z.2f}" for v in row] for row in values]


def _mosaic(tiles: Sequence[np.ndarray], labels: Sequence[str], columns: int = 4) -> Figure:
    """Pictures, (H, W, 3) uint8 of any sizes, in one: sixteen axes would take ten times as long."""
    side = _TILE_PX * 4 // columns
    gap, above = 10, 38
    total = round(_WIDTH * _DPI)
    rows = -(-len(tiles) // columns)
    canvas = np.full((rows * (side + above) + gap, total, 3), 255, np.uint8)
    height = len(canvas) / _DPI
    figure = _figure(height)
    left = (total - columns * side - (columns - 1) * gap) // 2
    for number, (tile, label) in enumerate(zip(tiles, labels, strict=True)):
        y = number // columns * (side + above) + above
        x = left + number % columns * (side + gap)
        picture = Image.fromarray(tile)
        way = Image.Resampling.NEAREST if max(picture.size) <= side else Image.Resampling.BOX
        canvas[y - 1 : y + side + 1, x - 1 : x + side + 1] = 190
        canvas[y : y + side, x : x + side] = np.asarray(picture.resize((side, side), way))
        figure.text((x + side / 2) / total, 1 - (y - 5) / len(canvas), label, fontsize=9,
                    ha="center", va="bottom", parse_math=False)  # fmt: skip
    figure.figimage(canvas, zorder=-1)
    return figure
