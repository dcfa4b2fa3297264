"""Whether a candidate takes the champion's place: the tests, the rules, and how both are told."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from cnnpipe.errors import printable
from cnnpipe.evaluation.comparison import Run, mcnemar, p_text
from cnnpipe.evaluation.comparison_table import METRIC_HEADER, aligned, metric_cells

_CONFIDENCE = 0.95
"""Of the interval where no alpha says it."""
_SEED = 0
"""The same two models on the same images always give the same interval."""


@dataclass(frozen=True)
class Rules:
    """When the champion is replaced; params.yaml's section `promote` says what each is."""

    alpha: float | None
    tolerance: float | None
    smaller: float | None
    resamples: int

    @property
    def confidence(self) -> float:
        """Of the interval."""
        return _CONFIDENCE if self.alpha is None else 1 - self.alpha


@dataclass(frozen=True)
class Counts:
    """On how many images the two differ in being right."""

    num_images: int
    """At least 1."""
    only_candidate: int
    """On so many the candidate is right and the champion wrong."""
    only_champion: int

    @property
    def difference(self) -> float:
        """The candidate's accuracy less the champion's."""
        return (self.only_candidate - self.only_champion) / self.num_images


@dataclass(frozen=True)
class Evidence:
    """What the images say of the difference in accuracy."""

    counts: Counts
    p: float
    """Of the exact McNemar test, two-sided."""
    low: float
    """Of the interval of the difference."""
    high: float
    confidence: float
    """Of the interval."""


@dataclass(frozen=True)
class Decision:
    """Whether the alias is to move."""

    promote: bool
    reason: str


@dataclass(frozen=True)
class Contender:
    """A version of the model, and its run with the metrics that are compared."""

    version: int
    run: Run

    @property
    def parameters(self) -> int | None:
        """Of the network; None where the run does not say."""
        number = self.run.metrics.get("model/parameters")
        return None if number is None else int(number)


@dataclass(frozen=True)
class Outcome:
    """A decision with all that led to it."""

    candidate: Contender
    champion: Contender | None
    """Before the decision."""
    evidence: Evidence | None
    """None where there was nothing to compare."""
    same_test_set: bool
    """Whether both were tested on these images, so that the champion was not tested again."""
    decision: Decision
    moved: bool
    notes: Sequence[str] = ()
    """What is to be known of the comparison besides."""


def count(candidate: pd.DataFrame, champion: pd.DataFrame) -> Counts:
    """How the two differ on the images of both tables; copies count once.

    Args:
        candidate: the columns sha256, label and prediction.
        champion: likewise.
    """
    key = ["sha256", "label"]
    both = candidate.drop_duplicates(key).merge(champion.drop_duplicates(key), on=key)
    first = both["prediction_x"] == both["label"]
    second = both["prediction_y"] == both["label"]
    return Counts(len(both), int((first & ~second).sum()), int((second & ~first).sum()))


def weigh(counts: Counts, rules: Rules) -> Evidence:
    """The exact test and the interval."""
    p = mcnemar(counts.only_candidate, counts.only_champion)
    low, high = interval(counts, rules.confidence, rules.resamples)
    return Evidence(counts, p, low, high, rules.confidence)


def interval(counts: Counts, confidence: float, resamples: int) -> tuple[float, float]:
    """The paired bootstrap's percentile interval of the difference in accuracy.

    To draw images with replacement is to draw how many fall to each of the four cells (both right,
    one alone, none). Half an image more in each cell keeps the interval from shrinking to a point
    where the two never, or always, disagree: a few images without disagreement prove little.

    Args:
        counts: of the images.
        confidence: such as 0.95.
        resamples: how many draws.

    Source: Efron and Tibshirani, "An introduction to the bootstrap" (1993), chapter 13; the halves:
    Agresti and Min, "Simple improved confidence intervals for comparing matched proportions"
    (2005).
    """
    total = counts.num_images
    same = total - counts.only_candidate - counts.only_champion
    cells = np.array([counts.only_candidate + 0.5, counts.only_champion + 0.5, same + 1.0])
    drawn = np.random.default_rng(_SEED).multinomial(total, cells / (total + 2), size=resamples)
    differences = (drawn[:, 0] - drawn[:, 1]) / total
    tail = (1 - confidence) / 2
    low, high = np.quantile(differences, [tail, 1 - tail])
    return min(float(low), counts.difference), max(float(high), counts.difference)


def decide(
    evidence: Evidence, parameters: int | None, champions: int | None, rules: Rules
) -> Decision:
    """Promotes what is better beyond luck, and what is not worse and much smaller.

    Args:
        evidence: of the two on the same images.
        parameters: of the candidate's network, None where that is not known.
        champions: likewise, of the champion's.
        rules: those that apply.
    """
    better = _is_better(evidence, rules)
    if better.promote:
        return better
    smaller = _is_smaller(evidence, parameters, champions, rules)
    if smaller.promote:
        return smaller
    return Decision(False, f"{better.reason}; {smaller.reason}")


def _is_better(evidence: Evidence, rules: Rules) -> Decision:
    if rules.alpha is None:
        return Decision(False, "that it may be better is no reason, promote.alpha being null")
    counts = evidence.counts
    p = f"p {'' if p_text(evidence.p)[0] == '<' else '= '}{p_text(evidence.p)}"
    sure = evidence.p < rules.alpha
    if sure and evidence.low > 0:
        return Decision(True, f"it is better than the champion, by more than luck explains ({p})")
    if sure and evidence.high < 0:
        return Decision(False, f"it is worse than the champion, by more than luck explains ({p})")
    if not counts.only_candidate + counts.only_champion:
        return Decision(False, "it is not better than the champion: no image separates the two")
    if counts.difference <= 0:
        return Decision(False, f"it is not better than the champion ({p})")
    return Decision(
        False, f"that it is better than the champion may be luck ({p}, alpha {rules.alpha:g})"
    )


def _is_smaller(
    evidence: Evidence, parameters: int | None, champions: int | None, rules: Rules
) -> Decision:
    """Non-inferiority: the whole interval is above what is tolerated."""
    if rules.tolerance is None or rules.smaller is None:
        key = "tolerance" if rules.tolerance is None else "smaller"
        return Decision(False, f"that it may be smaller is no reason, promote.{key} being null")
    if parameters is None or champions is None:
        return Decision(False, "how much smaller it is is not known")
    if parameters > rules.smaller * champions:
        size = f"{parameters / champions:.2g} of the champion's parameters" if champions else ""
        return Decision(False, f"nor is it small: it has {size}, more than {rules.smaller:g}")
    size = f"{parameters / champions:.2g} of the champion's parameters"
    if evidence.low > -rules.tolerance:
        return Decision(True, f"it is not worse by {rules.tolerance:g} and has {size}")
    return Decision(
        False,
        f"it has {size}, but may be worse by {-evidence.low:.4f}, and the tolerance is "
        f"{rules.tolerance:g}",
    )


def as_dict(outcome: Outcome) -> dict[str, Any]:
    """What `cnnpipe promote --json` prints, without a NaN."""
    evidence = outcome.evidence
    return {
        "candidate": _contender(outcome.candidate),
        "champion": None if outcome.champion is None else _contender(outcome.champion),
        "num_images": evidence.counts.num_images if evidence else 0,
        "same_test_set": outcome.same_test_set,
        "mcnemar_p": evidence.p if evidence else None,
        "difference": evidence.counts.difference if evidence else None,
        "difference_low": evidence.low if evidence else None,
        "difference_high": evidence.high if evidence else None,
        "decision": "promote" if outcome.decision.promote else "keep",
        "moved": outcome.moved,
        "reason": outcome.decision.reason,
        "notes": list(outcome.notes),
    }


def as_json(outcome: Outcome) -> str:
    """`as_dict` as text, in which nothing but ASCII remains."""
    return json.dumps(as_dict(outcome), indent=2, allow_nan=False)


def as_text(outcome: Outcome) -> str:
    """The two side by side, the tests, the decision and its reason."""
    contenders = [("candidate", outcome.candidate)]
    if outcome.champion is not None:
        contenders.append(("champion", outcome.champion))
    rows = [
        [role, str(one.version), one.run.name, *metric_cells(one.run)] for role, one in contenders
    ]
    lines = aligned(["", "version", "run", *METRIC_HEADER], rows, 3)
    if evidence := outcome.evidence:
        counts = evidence.counts
        images = "image" if counts.num_images == 1 else "images"
        lines += [
            "",
            f"on the same {counts.num_images:,} {images}: the candidate alone is right on "
            f"{counts.only_candidate:,}, the champion alone on {counts.only_champion:,}",
            f"exact McNemar test, two-sided: p {'' if p_text(evidence.p)[0] == '<' else '= '}"
            f"{p_text(evidence.p)}",
            f"candidate less champion, paired bootstrap: {counts.difference:+.3f} "
            f"({evidence.low:+.3f} to {evidence.high:+.3f} with {100 * evidence.confidence:.4g} % "
            "confidence)",
        ]
    lines += ["", *(f"note: {printable(note)}" for note in outcome.notes), _said(outcome)]
    return "\n".join(lines)


def _said(outcome: Outcome) -> str:
    version, reason = outcome.candidate.version, printable(outcome.decision.reason)
    if outcome.decision.promote:
        done = "is the champion now" if outcome.moved else "would be the champion (dry run)"
        return f"promoted: version {version} {done}: {reason}"
    if outcome.champion and outcome.champion.version == version:
        return f"kept: {reason}"
    held = f"version {outcome.champion.version} stays the champion" if outcome.champion else ""
    return f"kept: {held}: {reason}"


def _contender(one: Contender) -> dict[str, Any]:
    return {
        "version": one.version,
        "run_id": one.run.id,
        "run_name": one.run.name,
        "parameters": one.parameters,
        "metrics": {
            key: value if math.isfinite(value) else None
            for key, value in one.run.metrics.items()
            if key.startswith("test/")
        },
    }
