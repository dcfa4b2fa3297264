"""A comparison of runs as a table in the terminal, as JSON and as CSV."""

import csv
import json
import math
import unicodedata
from collections.abc import Sequence
from typing import Any, TextIO

from cnnpipe.data import manifest
from cnnpipe.errors import printable
from cnnpipe.evaluation.comparison import Comparison, Group, Run, seed

_MOST_PARAMS = 8
_MOST_LETTERS = 24
METRICS = ("accuracy", "accuracy_low", "accuracy_high", "f1", "roc_auc", "log_loss",
           "calibration_error", "num_images")  # fmt: skip


def as_text(comparison: Comparison, width: int) -> str:
    """The table, the sentences on the best run against the others, and the groups of seeds.

    Args:
        comparison: at least one run.
        width: of the terminal, in letters; parameters that have no room are left out and counted.
    """
    lines = [*([f"warning: {comparison.warning}", ""] if comparison.warning else [])]
    lines += _runs_table(comparison, width)
    best = [pair for pair in comparison.pairs if pair.first == 0]
    if best:
        lines += ["", f"the best against the others{set_note(comparison)}:"]
        lines += [f"- {printable(pair.sentence)}" for pair in best]
        if max(pair.num_tested for pair in best) > 1:
            lines.append(f"({PAIRS_NOTE})")
    silent = [label for label, run in zip(comparison.labels, comparison.runs, strict=True)
              if run.predictions is None]  # fmt: skip
    if silent and len(comparison.runs) > 1:
        lines += ["", f"without predictions to compare: {printable(', '.join(silent))}"]
    if comparison.groups:
        names = list(comparison.groups[0].params)
        header = [*names, "mean accuracy", "sd", "runs"]
        rows = [group_cells(group) for group in comparison.groups]
        lines += ["", "by seed, all else equal:"]
        lines += aligned(header, rows, len(names))
        if note := groups_note(comparison):
            lines.append(f"({note})")
    return "\n".join(lines)


PAIRS_NOTE = (
    "each pair is tested on its own, by McNemar's exact test; the words follow the p-value that is "
    "adjusted, after Holm, for the number of pairs on one test set, or of those across test sets"
)


def set_note(comparison: Comparison) -> str:
    """Which best run is meant, where there are several test sets."""
    return "" if comparison.one_set else f" (the best on test set {comparison.test_sets[0]})"


def groups_note(comparison: Comparison) -> str:
    """What the spread over the seeds holds besides the training's luck; else empty."""
    for group in comparison.groups:
        if len({comparison.runs[i].test_hash for i in group.members}) > 1:
            return (
                "a seed draws its own test images, too, so the spread holds the luck of the split "
                "as well as that of the training"
            )
    return ""


def group_cells(group: Group) -> list[str]:
    """Its parameters, the mean and the standard deviation of its accuracies, and their number."""
    sd = "" if group.sd is None else f"{group.sd:.3f}"
    return [*(value or "-" for value in group.params.values()), f"{group.mean:.3f}", sd,
            str(group.num_runs)]  # fmt: skip


def accuracy_text(run: Run) -> str:
    """The accuracy with its 95 % interval."""
    low, high = (run.metrics.get(f"test/accuracy_{end}") for end in ("low", "high"))
    if low is None or high is None:
        return f"{run.accuracy:.3f}"
    return f"{run.accuracy:.3f} ({low:.3f} to {high:.3f})"


def metric_cells(run: Run) -> list[str]:
    """The accuracy with its interval, F1, log loss, parameters and seconds of training."""
    seconds = run.metrics.get("train/seconds")
    return [
        accuracy_text(run),
        _number(run.metrics.get("test/f1"), ".3f"),
        _number(run.metrics.get("test/log_loss"), ".3f"),
        _number(run.metrics.get("model/parameters"), ",.0f"),
        _number(seconds, ",.0f" if seconds and seconds >= 100 else ".1f"),
    ]


METRIC_HEADER = ("test accuracy", "f1", "log loss", "parameters", "seconds")


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """What `cnnpipe compare --json` prints: runs, pairs and groups, without a NaN."""
    runs = comparison.runs
    return {
        "warning": comparison.warning or None,
        "differing": list(comparison.differing),
        "runs": [
            {
                "id": run.id,
                "name": run.name,
                "test_set": test_set,
                "params": dict(run.params),
                "metrics": {key: _finite(value) for key, value in run.metrics.items()},
            }
            for run, test_set in zip(runs, comparison.test_sets, strict=True)
        ],
        "pairs": [
            {
                "first": runs[pair.first].id,
                "second": runs[pair.second].id,
                "same_test_set": pair.same_set,
                "num_common": pair.num_common,
                "only_first": pair.only_first,
                "only_second": pair.only_second,
                "p": pair.p,
                "p_adjusted": pair.p_adjusted,
                "better": {1: runs[pair.first].id, -1: runs[pair.second].id}.get(pair.better),
                "sentence": pair.sentence,
            }
            for pair in comparison.pairs
        ],
        "groups": [
            {
                "params": dict(group.params),
                "runs": [runs[i].id for i in group.members],
                "seeds": [seed(runs[i].params) for i in group.members],
                "mean": group.mean,
                "sd": group.sd,
                "num_runs": group.num_runs,
            }
            for group in comparison.groups
        ],
    }


def as_json(comparison: Comparison) -> str:
    """`as_dict` as text, in which nothing but ASCII remains."""
    return json.dumps(as_dict(comparison), indent=2, allow_nan=False)


def write_csv(comparison: Comparison, file: TextIO) -> None:
    """A row a run: id, name, test set, all parameters that differ, and the metrics."""
    names = list(comparison.differing)
    rows: list[list[Any]] = [
        [run.id, run.name, test_set, *(run.params.get(name, "") for name in names),
         *(run.metrics.get(f"test/{name}", "") for name in METRICS),
         run.metrics.get("model/parameters", ""), run.metrics.get("train/seconds", "")]
        for run, test_set in zip(comparison.runs, comparison.test_sets, strict=True)
    ]  # fmt: skip
    texts = [cell for row in [names, *rows] for cell in row if isinstance(cell, str)]
    # Python's csv module quotes a line feed by itself.
    style: Any = csv.QUOTE_NONNUMERIC if manifest.quoting(texts) else csv.QUOTE_MINIMAL
    writer = csv.writer(file, lineterminator="\n", quoting=style)
    metrics = [f"test/{name}" for name in METRICS]
    writer.writerow(["run", "name", "test_set", *names, *metrics, "model/parameters",
                     "train/seconds"])  # fmt: skip
    writer.writerows(rows)


def _runs_table(comparison: Comparison, width: int) -> list[str]:
    most = min(_MOST_PARAMS, len(comparison.differing))
    everything = tuple(range(len(METRIC_HEADER)))
    # What has no room is given up in this order; the accuracy and a parameter never are.
    layouts: list[tuple[int, int, tuple[int, ...]]]
    layouts = [(n, _MOST_LETTERS, everything) for n in range(most, 2, -1)]
    least = min(2, most)
    layouts += [(least, _MOST_LETTERS, everything), (least, 14, everything)]
    lines: list[str] = []
    layouts += [(least, 14, (0, 3, 4)), (least, 14, (0,)), (min(1, most), 14, (0,))]
    for num_params, letters, metrics in layouts:
        names = comparison.differing[:num_params]
        sets = [] if comparison.one_set else ["test set"]
        header = ["run", *sets, *names, *(METRIC_HEADER[i] for i in metrics)]
        rows = []
        for run, label, test_set in zip(
            comparison.runs, comparison.labels, comparison.test_sets, strict=True
        ):
            cells = metric_cells(run)
            params = [run.params.get(name, "-") for name in names]
            rows.append([_short(printable(label), letters), *([test_set] if sets else []), *params,
                         *(cells[i] for i in metrics)])  # fmt: skip
        lines = aligned(header, rows, 1 + len(sets) + num_params)
        if len(lines[1]) <= width:
            break
    hidden = comparison.differing[num_params:]
    if hidden:
        more = "parameter differs" if len(hidden) == 1 else "parameters differ"
        lines.append(
            f"({len(hidden)} more {more}, see --json or --csv: "
            f"{printable(', '.join(hidden[:8]))}{', ...' if len(hidden) > 8 else ''})"
        )
    return lines


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], num_left: int) -> list[str]:
    """The header, a line and the rows, the first so many columns to the left, else to the right.

    What a terminal would act on is escaped, and long cells are cut.
    """
    table = [[_short(printable(cell)) for cell in row] for row in [header, *rows]]
    widths = [max(map(_columns, cells)) for cells in zip(*table, strict=True)]
    lines = []
    for row in table:
        padded = [
            cell + " " * (width - _columns(cell)) if i < num_left
            else " " * (width - _columns(cell)) + cell
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]  # fmt: skip
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return lines


def _short(text: str, letters: int = _MOST_LETTERS) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


def _columns(text: str) -> int:
    """How wide a terminal shows it: East Asian letters and emoji take two columns."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
