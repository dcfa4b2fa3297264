"""Charts of a comparison of runs, small enough for a phone and drawn for light and dark pages.

Runs are named by their number in the table: any name would be too long for a chart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from cnnpipe.evaluation.comparison import UNKNOWN_SET, Comparison, Group, pareto_front
from cnnpipe.evaluation.figures import COLORS, GREY, plain, sample_captions, small_figure

# Black is last, and becomes light on a dark page.
_COLORS = (*COLORS, "#000000")
_MARKERS = "os^Dv"
_MOST_LABELLED = 12
_MOST_APART = 10
"""So many runs are told apart by colour and dashes; of more, the best few."""


@dataclass(frozen=True)
class Look:
    """How a run is drawn in all charts."""

    color: str
    dashed: bool
    label: str
    """In the legend; runs with the same one share an entry."""


def looks(comparison: Comparison) -> tuple[list[Look], str]:
    """How each run is drawn, and the title of the legend.

    Runs that differ in their seed alone look the same.
    """
    groups, num_runs = comparison.groups, len(comparison.runs)
    if groups and len(groups) <= len(_COLORS):
        in_order = _by_value(groups)
        names, title = group_names(in_order)
        shown = [Look(GREY, False, "repeated")] * num_runs
        for group, name, color in zip(in_order, names, _COLORS, strict=False):
            for i in group.members:
                shown[i] = Look(color, False, name)
        return shown, title
    if num_runs <= _MOST_APART:
        size = len(_COLORS)
        return [Look(_COLORS[i % size], i >= size, str(i + 1)) for i in range(num_runs)], "run"
    best = [Look(color, False, str(i + 1)) for i, color in enumerate(_COLORS)]
    return best + [Look(GREY, False, "others")] * (num_runs - len(best)), "run"


def group_names(groups: Sequence[Group]) -> tuple[list[str], str]:
    """What the groups are called in charts, and what these names are."""
    names = list(groups[0].params)
    if len(names) == 1:
        return sample_captions([group.params[names[0]] or "-" for group in groups]), names[0]
    return [str(i + 1) for i in range(len(groups))], "group"


def curves(comparison: Comparison, key: str, title: str) -> Figure | None:
    """A metric by epoch, all runs in one chart; None where no run has it.

    Args:
        comparison: of the runs.
        key: a column of their histories.
        title: above the chart.
    """
    shown, legend = looks(comparison)
    histories = [
        None if run.history is None else run.history[key].dropna() for run in comparison.runs
    ]
    drawn = [history for history in histories if history is not None and len(history)]
    if not drawn:
        return None
    figure, axes = _small(title, "epoch")
    dots = max(map(len, drawn)) <= 20
    for i in reversed(range(len(shown))):  # the best one on top
        history, look = histories[i], shown[i]
        if history is not None and len(history):
            axes.plot(history.index, history, color=look.color, lw=0.8 if look.color == GREY
                      else 1.5, ls="--" if look.dashed else "-", marker="o" if dots else "",
                      ms=2.5, alpha=0.6 if look.color == GREY else 1)  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    values = np.concatenate(drawn)
    if key.endswith("loss") and values.min() > 0 and values.max() > 20 * values.min():
        axes.set_yscale("log")
        axes.set_title(f"{title}, logarithmic", fontsize=10)
    _legend(figure, axes, shown, legend)
    return figure


def accuracy_against(
    comparison: Comparison, costs: Sequence[float], name: str, fronts: Sequence[Sequence[int]]
) -> Figure | None:
    """The test accuracy with its interval against a cost; the front ringed and joined.

    Args:
        comparison: of the runs.
        costs: one a run, NaN where it is not known.
        name: of the cost.
        fronts: the runs on the front of each test set, by cost.

    Returns:
        None where no cost is known.
    """
    shown, legend = looks(comparison)
    known = [i for i, cost in enumerate(costs) if math.isfinite(cost)]
    if not known:
        return None
    figure, axes = _small("test accuracy", name)
    of_front = {i for front in fronts for i in front}
    for i in known:
        run, look = comparison.runs[i], shown[i]
        low = run.metrics.get("test/accuracy_low", run.accuracy)
        high = run.metrics.get("test/accuracy_high", run.accuracy)
        axes.plot([costs[i]] * 2, [low, high], color=GREY, lw=1, alpha=0.7, zorder=1)
        axes.plot(costs[i], run.accuracy, marker=_marker(comparison, i), ms=5, color=look.color,
                  ls="none", zorder=3)  # fmt: skip
        if i in of_front:
            axes.plot(costs[i], run.accuracy, "o", ms=10, mfc="none", mec="#000000", mew=1,
                      zorder=4)  # fmt: skip
        # Where groups have names the legend says more than a crowd of numbers.
        if legend == "run" and (i in of_front or len(known) <= _MOST_LABELLED):
            axes.annotate(str(i + 1), (costs[i], run.accuracy), (6, 5), fontsize=8,
                          textcoords="offset points", zorder=5)  # fmt: skip
    for front in fronts:
        axes.plot([costs[i] for i in front], [comparison.runs[i].accuracy for i in front],
                  color="#000000", lw=1, ls=":", drawstyle="steps-post", zorder=2)  # fmt: skip
    _scale(axes, [costs[i] for i in known], ticks_at_values=False)
    _legend(figure, axes, shown, legend, "none")
    return figure


def fronts(comparison: Comparison, costs: Sequence[float]) -> dict[str, list[int]]:
    """For each known test set of two runs or more, those on its Pareto front, the cheapest first.

    Args:
        comparison: of the runs.
        costs: one a run, NaN where it is not known.
    """
    found = {}
    for test_set in dict.fromkeys(comparison.test_sets):
        members = [i for i, other in enumerate(comparison.test_sets)
                   if other == test_set and math.isfinite(costs[i])]  # fmt: skip
        if test_set != UNKNOWN_SET and len(members) > 1:
            accuracies = [comparison.runs[i].accuracy for i in members]
            on_it = pareto_front([costs[i] for i in members], accuracies)
            front = [i for i, is_on in zip(members, on_it, strict=True) if is_on]
            found[test_set] = sorted(front, key=lambda i: costs[i])
    return found


def seeds(comparison: Comparison) -> Figure:
    """The test accuracy of every seed and the mean of each group; there are groups.

    Against the parameter in which they differ, where it is one and a number; else side by side.
    """
    groups = _by_value(comparison.groups)
    names, title = group_names(groups)
    values = _values(groups)
    figure, axes = _small("test accuracy", title)
    places = values or [float(i) for i in range(len(groups))]
    shown, _ = looks(comparison)
    for x, group in zip(places, groups, strict=True):
        for i in group.members:
            axes.plot(x, comparison.runs[i].accuracy, "o", ms=5, alpha=0.85, color=shown[i].color,
                      zorder=3)  # fmt: skip
        axes.errorbar(x, group.mean, yerr=group.sd, color="#000000", capsize=4, lw=1.2, marker="_",
                      ms=14, mew=2, zorder=2)  # fmt: skip
    if values:
        axes.plot(places, [group.mean for group in groups], color=GREY, lw=1.2, zorder=1)
        _scale(axes, values, ticks_at_values=len(values) <= 8)
    else:
        slanted = max(map(len, names)) * len(names) > 40
        axes.set_xticks(places, names, parse_math=False, rotation=45 if slanted else 0,
                        ha="right" if slanted else "center")  # fmt: skip
        axes.margins(x=0.1)
    return figure


def _by_value(groups: Sequence[Group]) -> list[Group]:
    """In the order of the one parameter that differs, where that is a number; else as they are."""
    if not _values(groups):
        return list(groups)
    return sorted(groups, key=lambda group: float(next(iter(group.params.values()))))


def _values(groups: Sequence[Group]) -> list[float]:
    """Of the one parameter that differs; empty where there are several, or they are no numbers."""
    try:
        values = [float(value) for group in groups for value in group.params.values()]
    except ValueError:
        return []
    fits = len(values) == len(groups) and all(map(math.isfinite, values))
    return values if fits else []


def _small(title: str, xlabel: str) -> tuple[Figure, Axes]:
    figure = small_figure()
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel, fontsize=9, parse_math=False)
    axes.tick_params(labelsize=9)
    plain(axes)
    return figure, axes


def _marker(comparison: Comparison, run: int) -> str:
    """One shape a test set, as long as there are enough."""
    sets = list(dict.fromkeys(comparison.test_sets))
    return _MARKERS[min(sets.index(comparison.test_sets[run]), len(_MARKERS) - 1)]


def _scale(axes: Axes, values: Sequence[float], ticks_at_values: bool) -> None:
    """Logarithmic where the values span more than a factor of 5."""
    if min(values) > 0 and max(values) > 5 * min(values):
        axes.set_xscale("log")
        if max(values) < 100 * min(values):  # or there would be one tick, or none
            low, high = min(values), max(values)
            ticks = [step * 10.0**e for e in range(-9, 16) for step in (1, 2, 5)]
            axes.set_xticks([t for t in ticks if low / 1.6 <= t <= high * 1.6])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.12)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _compact(value)))
    elif min(values) == max(values):
        axes.set_xticks([values[0]])
    if ticks_at_values:
        axes.set_xticks(sorted(set(values)))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _compact(value)))


def _compact(value: float) -> str:
    """1,500,000 as 1.5M: there is little room."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:.3g}"


def _legend(
    figure: Figure, axes: Axes, shown: Sequence[Look], title: str, line: str | None = None
) -> None:
    """Below the chart, where it covers nothing."""
    colors = (*_COLORS, GREY)
    entries = sorted(set(shown), key=lambda look: (look.dashed, colors.index(look.color)))
    if len(entries) < 2:
        return
    handles = [
        axes.plot([], [], color=look.color, ls=line or ("--" if look.dashed else "-"),
                  marker="o" if line else "", ms=5, lw=1.8)[0]
        for look in entries
    ]  # fmt: skip
    widest = max(len(look.label) for look in entries)
    columns = max(1, min(len(entries), 36 // (widest + 5)))
    box = figure.legend(handles, [look.label for look in entries], loc="outside lower center",
                        ncols=columns, title=title, frameon=False, fontsize=8, title_fontsize=8,
                        handlelength=1.4, columnspacing=1)  # fmt: skip
    for text in [*box.get_texts(), box.get_title()]:
        text.set_parse_math(False)
