"""Runs side by side: what differs, which is better, and whether that is more than luck."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

SEEDS = ("base.seed", "train.seed")
SURE = 0.05
"""A difference that luck alone makes less often than this is called more than luck."""
SMALLEST_P = 0.0001
"""Below it only that is said."""
UNKNOWN_SET = "?"


@dataclass(frozen=True)
class Run:
    """An evaluated run, as it is compared."""

    id: str
    name: str
    params: Mapping[str, str]
    """By dotted name."""
    metrics: Mapping[str, float]
    test_hash: str = ""
    """Equal for the same test images with the same labels; empty where it is not known."""
    predictions: pd.DataFrame | None = None
    """Of the test images: path, label, prediction and perhaps sha256, all str."""
    history: pd.DataFrame | None = None
    """By epoch: `train/loss`, `val/loss` and `val/accuracy`."""

    @property
    def accuracy(self) -> float:
        """On its test images."""
        return self.metrics["test/accuracy"]


@dataclass(frozen=True)
class Pair:
    """Two runs on the test images that both were tested on."""

    first: int
    """The position of the run that comes first in the comparison."""
    second: int
    same_set: bool
    """Whether all test images of the two are known to be the same."""
    by_path: bool
    """Whether images were matched by their paths, as one run has no checksums of them."""
    num_common: int
    only_first: int
    """Images on which the first is right and the second wrong."""
    only_second: int
    p: float
    """Of the exact McNemar test, two-sided."""
    p_adjusted: float
    """After Holm, for all pairs on one test set, or all pairs across test sets."""
    num_tested: int
    """How many pairs those are."""
    names: tuple[str, str]

    @property
    def better(self) -> int:
        """1 where the first is better by more than luck, -1 where the second is, else 0."""
        if self.p_adjusted >= SURE:
            return 0
        return 1 if self.only_first > self.only_second else -1

    @property
    def sentence(self) -> str:
        """What can be said of the two."""
        first, second = self.names
        if not self.num_common:
            return f"{first} and {second} have no test image in common: they are not compared"
        images = "image" if self.num_common == 1 else "images"
        where = "" if self.same_set else (
            f"on the {self.num_common:,} {images} that both were tested on"
            f"{', matched by their paths' if self.by_path else ''}, "
        )  # fmt: skip
        if not self.only_first + self.only_second:
            return f"{where}no image separates {first} and {second}"
        images = "image" if self.only_first == 1 else "images"
        counts = (
            f"{where}{first} is right on {self.only_first:,} {images} on which {second} is wrong, "
            f"{second} on {self.only_second:,} on which {first} is wrong"
        )
        p = f"p {'' if self.p < SMALLEST_P else '= '}{p_text(self.p)}"
        if self.num_tested > 1:
            p += f"; {p_text(self.p_adjusted)} adjusted for {self.num_tested:,} pairs"
        if not self.better:
            return f"{counts}: the difference may be luck ({p})"
        winner = first if self.better > 0 else second
        return f"{counts}: {winner} is better, more than luck explains ({p})"


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed."""

    params: Mapping[str, str]
    """What sets it apart from the other groups."""
    members: tuple[int, ...]
    """The positions of its runs: the latest of each seed."""
    mean: float
    """Of the test accuracy."""
    sd: float | None
    """The sample standard deviation; None for a single run."""

    @property
    def num_runs(self) -> int:
        """One for each seed."""
        return len(self.members)


@dataclass(frozen=True)
class Comparison:
    """Runs in the order in which they are listed, and all that is said of them."""

    runs: tuple[Run, ...]
    """The best first, but one test set after another."""
    labels: tuple[str, ...]
    """A name for each run that no other has."""
    test_sets: tuple[str, ...]
    """A, B, ... for each run, or ? where it is not known."""
    differing: tuple[str, ...]
    """The parameters that are not the same in all runs, those with the most values first."""
    pairs: tuple[Pair, ...]
    groups: tuple[Group, ...]
    """Empty unless some runs differ in their seed alone; the best mean first."""

    @property
    def one_set(self) -> bool:
        """Whether all runs are known to have the same test images."""
        return len(self.runs) < 2 or set(self.test_sets) == {"A"}

    @property
    def warning(self) -> str:
        """What must be said where the runs were not all tested on the same images; else empty."""
        if self.one_set:
            return ""
        known = sorted(set(self.test_sets) - {UNKNOWN_SET}, key=self.test_sets.index)
        unknown = self.test_sets.count(UNKNOWN_SET)
        text = []
        if len(known) > 1:
            text.append(f"the runs were tested on {len(known)} different test sets")
        if unknown:
            runs = "run does" if unknown == 1 else "runs do"
            text.append(f"{unknown} {runs} not say on which test images")
        return (
            f"{' and '.join(text)}: accuracies are ranked within a test set only, and two runs are "
            "tested against each other on the images that both were tested on"
        )


def compare(runs: Sequence[Run]) -> Comparison:
    """The runs with all that can be said of them.

    Args:
        runs: at least one, the latest first, which breaks ties.
    """
    order, test_sets = _ranked(runs)
    ranked = tuple(runs[i] for i in order)
    labels = unique_names(ranked)
    latest_first = sorted(range(len(runs)), key=order.__getitem__)
    return Comparison(
        runs=ranked,
        labels=labels,
        test_sets=test_sets,
        differing=differing_params([run.params for run in ranked]),
        pairs=_pairs(ranked, labels),
        groups=seed_groups(ranked, latest_first),
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """How often luck alone makes two equally good classifiers differ at least so much, two-sided.

    Args:
        only_first: images on which the first is right and the second wrong.
        only_second: the other way round.

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions or
    percentages" (1947), in its exact form: each of these images is a fair coin.
    """
    discordant = only_first + only_second
    if not discordant:
        return 1.0
    tail = binomtest(min(only_first, only_second), discordant, alternative="less").pvalue
    return min(1.0, 2 * float(tail))  # the other tail is as large, a fair coin being symmetric


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, adjusted so that one false alarm among all is as rare as each says.

    Source: Holm, "A simple sequentially rejective multiple test procedure" (1979).
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    steps = np.minimum(1, p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(steps)
    return [float(value) for value in adjusted]


def pareto_front(costs: Sequence[float], scores: Sequence[float]) -> np.ndarray:
    """Which are the front: no other has as low a cost and as high a score, and one of them better.

    Those with the same cost and score are all on it, or none is.

    Args:
        costs: (N,) the lower, the better; those that are NaN are not on the front.
        scores: (N,) the higher, the better.

    Returns:
        (N,) bool.
    """
    cost, score = np.asarray(costs, dtype=float), np.asarray(scores, dtype=float)
    no_worse = (cost[:, None] <= cost) & (score[:, None] >= score)
    better = (cost[:, None] < cost) | (score[:, None] > score)
    beaten = (no_worse & better).any(axis=0)
    front: np.ndarray = ~beaten & ~np.isnan(cost) & ~np.isnan(score)
    return front


def differing_params(params: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    """The names of those that are not the same, or not there, in all; most values first.

    What follows from the others, as the number of parameters, is none of them.
    """
    names = {name: None for one in params for name in one if not name.startswith("model/")}
    values = {name: {one.get(name) for one in params} for name in names}
    # Where a value is missing the run is older than the parameter, which says little.
    known = {name: len(values[name] - {None}) for name in names}
    differing = [name for name in names if len(values[name]) > 1]
    return tuple(sorted(differing, key=lambda name: (-known[name], name in SEEDS)))


def seed(params: Mapping[str, str]) -> str:
    """What the randomness of a training came from: `train.seed`, or else `base.seed`."""
    of_training = params.get("train.seed", "None")
    return params.get("base.seed", "-") if of_training == "None" else of_training


def seed_groups(runs: Sequence[Run], latest_first: Sequence[int]) -> tuple[Group, ...]:
    """The runs by all parameters but the seeds; none where no two runs differ in these alone.

    Args:
        runs: all of them.
        latest_first: their positions in that order; of one seed the latest run counts.
    """
    found: dict[frozenset[tuple[str, str]], dict[tuple[str, str], int]] = {}
    for i in latest_first:
        params = runs[i].params
        key = frozenset((k, v) for k, v in params.items() if k not in SEEDS and k[:6] != "model/")
        found.setdefault(key, {}).setdefault((params.get("base.seed", ""), seed(params)), i)
    if max(map(len, found.values()), default=0) < 2:
        return ()
    # In the order of their seeds, which are whole numbers.
    members = [
        tuple(seeds[both] for both in sorted(seeds, key=lambda both: [(len(s), s) for s in both]))
        for seeds in found.values()
    ]
    names = [n for n in differing_params([runs[m[0]].params for m in members]) if n not in SEEDS]
    groups = []
    for positions in members:
        accuracies = [runs[i].accuracy for i in positions]
        sd = float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None
        shown = {name: runs[positions[0]].params.get(name, "") for name in names}
        groups.append(Group(shown, positions, float(np.mean(accuracies)), sd))
    return tuple(sorted(groups, key=lambda group: -group.mean))


def recalls(runs: Sequence[Run]) -> pd.DataFrame:
    """The share of each class's test images that a run gets right: a row a class, a column a run.

    NaN where the run was tested on no image of that class, or kept no predictions.
    """
    columns = {}
    for i, run in enumerate(runs):
        if run.predictions is not None:
            hits = run.predictions["prediction"] == run.predictions["label"]
            columns[i] = hits.groupby(run.predictions["label"]).mean()
    return pd.DataFrame(columns, columns=range(len(runs)), dtype=float).sort_index()


def disagreements(runs: Sequence[Run]) -> pd.DataFrame:
    """The test images on which two runs or more say different things, the most split first.

    Returns:
        A row an image, with the index (sha256 or, where a run has none, path; label) and a column a
        run: what it says, NaN where it was not tested on the image.
    """
    table = _by_image(runs, "prediction", _key(runs))
    if table.empty:
        return table
    numbers = _codes(table)
    codes = np.stack([table[i].map(numbers).to_numpy(float) for i in table], axis=1)
    num_tested = (~np.isnan(codes)).sum(axis=1)
    # One minus the chance that two of the runs, drawn with replacement, say the same.
    same = np.zeros(len(codes))
    for code in np.unique(codes[~np.isnan(codes)]):
        same += ((codes == code).sum(axis=1) / num_tested) ** 2
    split = np.round(1 - same, 9)
    chosen = np.flatnonzero(split > 0)
    order = np.lexsort((-num_tested[chosen], -split[chosen]))
    return table.iloc[chosen[order]]


def p_text(p: float) -> str:
    """The p-value as it is written: with two significant digits."""
    if p < SMALLEST_P:
        return f"< {SMALLEST_P:.4f}"
    return f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def unique_names(runs: Sequence[Run]) -> tuple[str, ...]:
    """The runs' names, with the beginnings of their ids where several have the same."""
    names = [run.name for run in runs]
    return tuple(
        run.name if names.count(run.name) == 1 else f"{run.name} ({run.id[:8]})" for run in runs
    )


def _ranked(runs: Sequence[Run]) -> tuple[list[int], tuple[str, ...]]:
    """Positions in the order of listing, and the test set of each: that of most runs is first."""
    by_hash: dict[str, list[int]] = {}
    for i in sorted(range(len(runs)), key=lambda i: -runs[i].accuracy):
        by_hash.setdefault(runs[i].test_hash, []).append(i)
    unknown = by_hash.pop("", [])
    order, names = [], []
    for number, positions in enumerate(sorted(by_hash.values(), key=len, reverse=True)):
        order += positions
        names += [_letters(number)] * len(positions)
    return order + unknown, (*names, *[UNKNOWN_SET] * len(unknown))


def _letters(number: int) -> str:
    """A to Z, then AA, AB, ..."""
    rest, last = divmod(number, 26)
    return (_letters(rest - 1) if rest else "") + chr(ord("A") + last)


def _pairs(runs: Sequence[Run], labels: Sequence[str]) -> tuple[Pair, ...]:
    """All pairs of runs that kept their predictions, in the order of the runs."""
    tested = [i for i, run in enumerate(runs) if run.predictions is not None]
    by_sha256 = [i for i in tested if _key([runs[i]]) == "sha256"]
    counts = {"sha256": _counts(runs, by_sha256, "sha256")}
    if by_sha256 != tested:
        counts["path"] = _counts(runs, tested, "path")
    found: list[dict[str, Any]] = []
    for first, second in combinations(tested, 2):
        key = _key([runs[first], runs[second]])
        common, only = counts[key]
        same = runs[first].test_hash == runs[second].test_hash != ""
        found.append({
            "first": first, "second": second, "same_set": same, "by_path": key == "path",
            "num_common": int(common[first, second]), "only_first": int(only[first, second]),
            "only_second": int(only[second, first]), "names": (labels[first], labels[second]),
        })  # fmt: skip
    p_values = [mcnemar(pair["only_first"], pair["only_second"]) for pair in found]
    adjusted, num_tested = dict.fromkeys(range(len(found)), 1.0), {}
    # Pairs of one test set are a family of their own: many others, which share but a few images,
    # would only hide what these show. Pairs without a common image are not tested at all.
    for same in (True, False):
        family = [i for i, pair in enumerate(found) if pair["num_common"]
                  and pair["same_set"] == same]  # fmt: skip
        adjusted |= zip(family, holm([p_values[i] for i in family]), strict=True)
        num_tested[same] = len(family)
    return tuple(
        Pair(p=p, p_adjusted=adjusted[i], num_tested=num_tested[pair["same_set"]], **pair)
        for i, (pair, p) in enumerate(zip(found, p_values, strict=True))
    )


def _counts(runs: Sequence[Run], chosen: Sequence[int], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Two (runs, runs) arrays: images that both were tested on; those on which only one is right.

    Args:
        runs: all of them.
        chosen: the positions of those that are counted.
        key: sha256 or path, by which images are matched.
    """
    table = _by_image([runs[i] for i in chosen], "hit", key)
    hit, miss = (np.zeros((len(table), len(runs)), np.float32) for _ in range(2))
    hit[:, chosen] = table == True  # noqa: E712  (NaN is neither)
    miss[:, chosen] = table == False  # noqa: E712
    tested = hit + miss
    # Sums of zeros and ones are exact in float32 up to 2^24 images.
    return tested.T @ tested, hit.T @ miss


def _key(runs: Iterable[Run]) -> str:
    """By what their images can be matched: checksums, or paths where a run has none."""
    tables = [run.predictions for run in runs if run.predictions is not None]
    return "sha256" if all("sha256" in table for table in tables) else "path"


def _by_image(runs: Sequence[Run], value: str, key: str) -> pd.DataFrame:
    """A row for each image with its label, of which the key and the label are the index.

    Copies in a test set count once.
    """
    columns = {}
    for i, run in enumerate(runs):
        if run.predictions is not None:
            table = run.predictions.drop_duplicates([key, "label"])
            hit = table["prediction"] == table["label"]
            columns[i] = table.assign(hit=hit).set_index([key, "label"])[value]
    if not columns:
        return pd.DataFrame(index=pd.MultiIndex.from_tuples([], names=[key, "label"]))
    return pd.concat(columns, axis=1)


def _codes(table: pd.DataFrame) -> dict[str, int]:
    """A number for each prediction in the table."""
    return {name: i for i, name in enumerate(pd.unique(table.to_numpy().ravel()))
            if isinstance(name, str)}  # fmt: skip
