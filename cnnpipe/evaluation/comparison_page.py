"""A comparison of runs as a page: curves, costs, seeds, classes and the images they disagree on."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cnnpipe.data.store import open_images
from cnnpipe.errors import UserError
from cnnpipe.evaluation import comparison_figures as charts
from cnnpipe.evaluation import pages
from cnnpipe.evaluation.comparison import (
    Comparison,
    Pair,
    disagreements,
    recalls,
    seed,
)
from cnnpipe.evaluation.comparison_table import (
    METRIC_HEADER,
    PAIRS_NOTE,
    accuracy_text,
    group_cells,
    groups_note,
    metric_cells,
    set_note,
)

_MOST_PICTURES = 32
_MOST_CLASSES = 20
_MOST_IN_MATRIX = 12
_MOST_SENTENCES = 11
"""So many are shown at once, the others on demand."""
_MOST_NAMED = 4
"""So many runs are named under a picture with what each says; of more, how many say what."""


def page(comparison: Comparison, images: Path) -> str:
    """The page, as HTML that needs no other file.

    Args:
        comparison: at least one run.
        images: data/resized, for the pictures; it may be another one, or not be there.
    """
    names = [f"{i + 1}. {label}" for i, label in enumerate(comparison.labels)]
    against_best = [pair for pair in comparison.pairs if pair.first == 0]
    others = [pair for pair in comparison.pairs if pair.first]
    return pages.render(
        "comparison.html",
        {
            "comparison": comparison,
            "summary": _tiles(comparison),
            "answer": _answer(comparison),
            **_runs_table(comparison, names),
            "matrix": _matrix(comparison),
            "set_note": set_note(comparison),
            "pairs_note": PAIRS_NOTE if len(comparison.pairs) > 1 else "",
            "against_best": [pair.sentence for pair in against_best[:_MOST_SENTENCES]],
            "other_pairs": [pair.sentence for pair in against_best[_MOST_SENTENCES:] + others],
            "silent": [name for name, run in zip(names, comparison.runs, strict=True)
                       if run.predictions is None],
            "curves": _curves(comparison),
            "costs": _costs(comparison, names),
            "groups": _groups(comparison),
            "classes": _classes(comparison),
            "images": _images(comparison, images),
        },
    )  # fmt: skip


def _tiles(comparison: Comparison) -> list[dict[str, str]]:
    best = comparison.runs[0]
    low, high = (best.metrics.get(f"test/accuracy_{end}") for end in ("low", "high"))
    interval = "" if low is None or high is None else f"{low:.3f} to {high:.3f}, 95 % interval"
    num_images = best.metrics.get("test/num_images")
    known = "" if num_images is None else f"{num_images:,.0f}"
    num_sets = len(set(comparison.test_sets))
    sets = "" if comparison.one_set else f"of the best; {num_sets} test sets in all"
    return [
        {"name": "runs", "value": str(len(comparison.runs)), "note": ""},
        {"name": "best test accuracy", "value": f"{best.accuracy:.3f}", "note": interval},
        {"name": "test images", "value": known or "-", "note": sets},
    ]


def _answer(comparison: Comparison) -> str:
    """What the comparison comes to, in a sentence or two."""
    best = f"{comparison.labels[0]}, {accuracy_text(comparison.runs[0])}"
    if len(comparison.runs) == 1:
        return f"One run, {best}: nothing to compare it with."
    where = "" if comparison.one_set else f" on test set {comparison.test_sets[0]}"
    text = f"The best{where} is {best}."
    tested = [pair for pair in comparison.pairs if pair.first == 0 and pair.same_set]
    beaten = sum(pair.better > 0 for pair in tested)
    if not tested:
        return text
    if beaten == len(tested):
        them = "the other" if beaten == 1 else f"all {beaten} others"
        return f"{text} It beats {them}{where} by more than luck explains."
    if not beaten:
        return f"{text} Its lead may be luck."
    return (
        f"{text} It beats {beaten} of the {len(tested)} others{where} by more than luck explains; "
        "its lead over the rest may be luck."
    )


def _runs_table(comparison: Comparison, names: Sequence[str]) -> dict[str, Any]:
    sets = [] if comparison.one_set else ["test set"]
    rows = []
    for name, run, test_set in zip(names, comparison.runs, comparison.test_sets, strict=True):
        params = [run.params.get(param, "-") for param in comparison.differing]
        metrics = metric_cells(run)
        rows.append([name, run.id[:8], *([test_set] if sets else []), *metrics, *params])
    header = ["run", "id", *sets, *METRIC_HEADER, *comparison.differing]
    return {"header": header, "rows": rows, "num_texts": 2 + len(sets)}


def _matrix(comparison: Comparison) -> list[list[dict[str, str]]]:
    """A cell for each two runs: the adjusted p-value, and whether the row's run is the better."""
    num_runs = len(comparison.runs)
    if num_runs > _MOST_IN_MATRIX or not comparison.pairs:
        return []
    empty = {"text": "", "kind": "", "sentence": ""}
    cells = [[empty] * num_runs for _ in range(num_runs)]
    for pair in comparison.pairs:
        for row, column, sign in ((pair.first, pair.second, 1), (pair.second, pair.first, -1)):
            cells[row][column] = _cell(pair, pair.better * sign)
    return cells


def _cell(pair: Pair, better: int) -> dict[str, str]:
    p = pair.p_adjusted
    text = "none" if not pair.num_common else "< 0.001" if p < 0.001 else f"{p:.3f}"
    return {
        "text": {1: "+ ", -1: "\N{MINUS SIGN} "}.get(better, "") + text,
        "kind": {1: "better", -1: "worse"}.get(better, "quiet"),
        "sentence": pair.sentence,
    }


def _curves(comparison: Comparison) -> list[dict[str, str]]:
    titles = {"val/accuracy": "validation accuracy", "val/loss": "validation loss",
              "train/loss": "training loss"}  # fmt: skip
    drawn = ((charts.curves(comparison, key, title), title) for key, title in titles.items())
    return [
        {"src": pages.chart(figure), "alt": f"{title} by epoch, a curve a run"}
        for figure, title in drawn
        if figure is not None
    ]


def _costs(comparison: Comparison, names: Sequence[str]) -> list[dict[str, Any]]:
    found = []
    for key, name, one in (
        ("model/parameters", "parameters", "fewer parameters"),
        ("train/seconds", "training time, seconds", "less training time"),
    ):
        costs = [run.metrics.get(key, float("nan")) for run in comparison.runs]
        fronts = charts.fronts(comparison, costs)
        figure = charts.accuracy_against(comparison, costs, name, list(fronts.values()))
        if figure is not None:
            form = ",.0f" if key == "model/parameters" else ",.1f"
            unit = " parameters" if key == "model/parameters" else " s"
            words = [
                {
                    "where": "" if comparison.one_set else f"test set {test_set}: ",
                    "runs": "; ".join(
                        f"{names[i]} ({costs[i]:{form}}{unit}, {comparison.runs[i].accuracy:.3f})"
                        for i in front
                    ),
                }
                for test_set, front in fronts.items()
            ]
            alt = f"test accuracy against {name}, a point a run"
            found.append({"src": pages.chart(figure), "alt": alt, "less": one, "fronts": words})
    return found


def _groups(comparison: Comparison) -> dict[str, Any] | None:
    if not comparison.groups:
        return None
    params = list(comparison.groups[0].params)
    numbered = len(params) != 1  # the chart cannot say more than a number
    rows = []
    for i, group in enumerate(comparison.groups):
        seeds = ", ".join(seed(comparison.runs[member].params) for member in group.members)
        rows.append([*([str(i + 1)] if numbered else []), *group_cells(group), seeds])
    return {
        "header": [*(["group"] if numbered else []), *params, "mean accuracy", "sd", "runs",
                   "seeds"],
        "rows": rows,
        "num_texts": len(params) + numbered,
        "src": pages.chart(charts.seeds(comparison)),
        "note": groups_note(comparison),
    }  # fmt: skip


def _classes(comparison: Comparison) -> dict[str, Any]:
    table = recalls(comparison.runs)
    spread = table.max(axis=1) - table.min(axis=1)
    order = spread.sort_values(ascending=False, kind="stable").index[:_MOST_CLASSES]
    return {
        "num_classes": len(table),
        "rows": [
            {
                "label": _line(str(label)),
                "spread": f"{spread[label]:.2f}",
                "cells": [
                    {"text": "-" if np.isnan(value) else f"{value:.2f}",
                     "shade": 0 if np.isnan(value) else round(0.6 * float(1 - value) ** 0.5, 3)}
                    for value in table.loc[label]
                ],
            }
            for label in order
        ],
    }  # fmt: skip


def _images(comparison: Comparison, folder: Path) -> dict[str, Any]:
    table = disagreements(comparison.runs)
    shown = table.head(_MOST_PICTURES)
    keys = [str(key) for key in shown.index.get_level_values(0)]
    found, missing = _pictures(keys, shown.index.names[0] == "sha256", folder)
    wanted = set(keys)
    paths = {
        key: path
        for run in reversed(comparison.runs)
        if run.predictions is not None
        for key, path in zip(run.predictions[shown.index.names[0]], run.predictions["path"],
                             strict=True)
        if key in wanted
    }  # fmt: skip
    items = []
    for (key, label), src, (_, said) in zip(shown.index, found, shown.iterrows(), strict=True):
        name = "" if src else _line(paths[key])
        alt = f"an image of {label}" if src else "no picture"
        items.append({"src": src, "alt": alt, "caption": _caption(str(label), said, name)})
    return {"num": len(table), "shown": items, "missing": missing}


def _caption(label: str, said: pd.Series, name: str) -> str:
    """What an image is, what the runs say, and where there is no picture of it, its name."""
    known = said.notna()
    said = said[known]
    if len(said) <= _MOST_NAMED:
        numbers = (i + 1 for i, is_known in enumerate(known) if is_known)
        lines = [f"run {i}: {_verdict(text, label)}" for i, text in zip(numbers, said, strict=True)]
    else:
        counts = Counter(said).most_common()
        lines = [f"{count} of {len(said)}: {_verdict(text, label)}" for text, count in counts[:4]]
        if len(counts) > 4:
            lines.append(f"and {len(counts) - 4} more")
    return "\n".join([*([name] if name else []), f"is {_line(label)}", *lines])


def _verdict(prediction: str, label: str) -> str:
    return f"{_line(prediction)} {'✓' if prediction == label else '✗'}"


def _line(name: str) -> str:
    """On one line, and a short one: it stands under a small picture."""
    name = " ".join(name.split())
    return name if len(name) <= 40 else name[:39] + "…"


def _pictures(
    keys: Sequence[str], are_checksums: bool, folder: Path
) -> tuple[list[str | None], str]:
    """Data URIs of the images with these SHA-256, None for those that are not there; why not."""
    nothing: list[str | None] = [None] * len(keys)
    if not keys:
        return nothing, ""
    if not are_checksums:
        return nothing, "a run is older than the checksums by which an image is known"
    try:
        images, manifest = open_images(folder)
        rows = {sha256: row for row, sha256 in reversed(list(enumerate(manifest["sha256"])))}
        found = [pages.picture(images[rows[key]]) if key in rows else None for key in keys]
    except (UserError, OSError) as error:
        return nothing, str(error)
    num_missing = found.count(None)
    why = f"{folder} does not hold {num_missing} of these images" if num_missing else ""
    return found, why
