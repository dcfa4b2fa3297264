"""Who takes the champion's place: hardly ever by luck, and often where it is deserved."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from compared import make_run, predictions

from cnnpipe.evaluation.promotion import (
    Contender,
    Counts,
    Decision,
    Outcome,
    Rules,
    as_json,
    as_text,
    count,
    decide,
    interval,
    weigh,
)

RULES = Rules(alpha=0.05, tolerance=0.01, smaller=0.5, resamples=2000)


@cache
def promoted(counts: Counts, parameters: int = 100, rules: Rules = RULES) -> bool:
    return decide(weigh(counts, rules), parameters, 100, rules).promote


def share_promoted(
    num_images: int,
    only_candidate: float,
    only_champion: float,
    promoted: Callable[[Counts], bool] = promoted,
) -> float:
    """Of 1,000 pairs of models that differ with these chances, each tested on new images."""
    chances = [only_candidate, only_champion, 1 - only_candidate - only_champion]
    drawn = np.random.default_rng(0).multinomial(num_images, chances, size=1000)
    return float(np.mean([promoted(Counts(num_images, int(a), int(b))) for a, b, _ in drawn]))


@pytest.mark.parametrize("num_images", [20, 150, 1000])
@pytest.mark.parametrize("accuracy", [0.55, 0.85, 0.97])
@pytest.mark.parametrize("independence", [1, 0.5, 0.1])
def test_of_equal_models_of_one_size_at_most_five_in_a_hundred_are_promoted(
    num_images: int, accuracy: float, independence: float
) -> None:
    # Independent models differ on 2 a (1 - a) of the images, correlated ones on fewer.
    alone = independence * accuracy * (1 - accuracy)
    assert share_promoted(num_images, alone, alone) <= 0.05


@pytest.mark.parametrize("num_images", [150, 1000, 5000])
def test_of_small_models_as_much_worse_as_is_not_tolerated_hardly_any_is_promoted(
    num_images: int,
) -> None:
    assert share_promoted(num_images, 0.02, 0.03, lambda c: promoted(c, 50)) <= 0.05


def test_what_is_truly_better_is_promoted_often() -> None:
    assert share_promoted(600, 0.10, 0.03) > 0.95
    assert share_promoted(150, 0.20, 0.05) > 0.9


def test_what_is_half_the_size_and_as_good_is_promoted_often() -> None:
    assert share_promoted(5000, 0.01, 0.01, lambda c: promoted(c, 50)) > 0.95
    assert share_promoted(5000, 0.01, 0.01, lambda c: promoted(c, 51)) <= 0.05


@pytest.mark.parametrize(("only_candidate", "only_champion"), [(0.05, 0.05), (0.2, 0.1), (0.02, 0)])
def test_the_interval_holds_the_true_difference_as_often_as_it_says(
    only_candidate: float, only_champion: float
) -> None:
    truth = only_candidate - only_champion

    @cache
    def holds(counts: Counts) -> bool:
        low, high = interval(counts, 0.95, 2000)
        return low <= truth <= high

    assert 0.92 <= share_promoted(200, only_candidate, only_champion, holds) <= 0.99


def test_the_interval_holds_the_difference_is_the_same_twice_and_never_a_point() -> None:
    for counts in (Counts(10, 0, 0), Counts(10, 10, 0), Counts(1, 0, 1), Counts(150, 12, 3)):
        low, high = interval(counts, 0.95, 2000)
        assert -1 <= low <= counts.difference <= high <= 1
        assert low < high
        assert interval(counts, 0.95, 2000) == (low, high)
    assert interval(Counts(150, 12, 3), 0.99, 2000)[0] < interval(Counts(150, 12, 3), 0.9, 2000)[0]
    # (12 - 3) / 150, and the normal approximation's standard error, 0.0256.
    assert interval(Counts(150, 12, 3), 0.95, 10_000) == pytest.approx((0.013, 0.113), abs=0.005)


@pytest.mark.parametrize(
    ("counts", "parameters", "rules", "promote", "reason"),
    [
        (Counts(150, 12, 3), 100, RULES, True,
         "it is better than the champion, by more than luck explains (p = 0.0"),
        (Counts(150, 3, 12), 100, RULES, False,
         "it is worse than the champion, by more than luck explains"),
        (Counts(150, 8, 5), 100, RULES, False,
         "that it is better than the champion may be luck (p = 0.58, alpha 0.05); nor is it small: "
         "it has 1 of the champion's parameters, more than 0.5"),
        (Counts(150, 5, 5), 100, RULES, False,
         "it is not better than the champion (p = 1.00); nor is it small"),
        # The interval alone would do: the exact test is the stricter of the two.
        (Counts(150, 5, 0), 100, RULES, False, "may be luck (p = 0.062, alpha 0.05)"),
        (Counts(150, 0, 0), 100, RULES, False,
         "it is not better than the champion: no image separates the two"),
        (Counts(2000, 4, 4), 50, RULES, True,
         "it is not worse by 0.01 and has 0.5 of the champion's parameters"),
        (Counts(100, 0, 0), 50, RULES, False, "but may be worse by 0.0200, and the tolerance is"),
        (Counts(2000, 4, 4), 51, RULES, False, "nor is it small: it has 0.51 of"),
        (Counts(2000, 4, 4), None, RULES, False, "how much smaller it is is not known"),
        (Counts(150, 12, 3), 100, replace(RULES, alpha=0.01), False,
         "may be luck (p = 0.035, alpha 0.01)"),
        (Counts(150, 12, 3), 100, replace(RULES, alpha=None), False, "promote.alpha being null"),
        (Counts(2000, 4, 4), 50, replace(RULES, tolerance=None), False,
         "promote.tolerance being null"),
        (Counts(2000, 4, 4), 50, replace(RULES, smaller=None), False, "promote.smaller being null"),
        (Counts(2000, 4, 4), 50, replace(RULES, alpha=None), True, "it is not worse by 0.01"),
    ],
)  # fmt: skip
def test_each_rule_says_why(
    counts: Counts, parameters: int | None, rules: Rules, promote: bool, reason: str
) -> None:
    decision = decide(weigh(counts, rules), parameters, 100, rules)
    assert decision.promote is promote
    assert reason in decision.reason


def test_images_are_counted_by_their_bytes_and_label_and_copies_once() -> None:
    labels = ["cat", "cat", "dog", "dog"]
    candidate = predictions(labels, ["cat", "cat", "dog", "cat"])
    champion = predictions(labels, ["cat", "dog", "cat", "dog"]).iloc[::-1]
    assert count(candidate, champion) == Counts(4, only_candidate=2, only_champion=1)
    copies = candidate.iloc[[0, 1, 1, 1, 2, 3]]
    assert count(copies, champion) == Counts(4, 2, 1)
    assert count(candidate, champion.iloc[:2]) == Counts(2, 1, 1)


def test_both_outputs_have_all_of_it_and_no_control_character() -> None:
    counts = Counts(150, 12, 3)
    candidate = Contender(4, make_run(1, name="mine \x1b[31m"))
    champion = Contender(3, make_run(0, name="theirs", **{"test/roc_auc": float("nan")}))
    evidence = weigh(counts, RULES)
    decision = decide(evidence, 100, 100, RULES)
    outcome = Outcome(candidate, champion, evidence, False, decision, True, ["tested again"])
    text = as_text(outcome)
    assert "\x1b" not in text
    said = ["candidate  4        mine \\x1b[31m  ", "p = 0.035", "+0.060 (+0.0", "with 95 %",
            "note: tested again", "promoted: version 4 is the champion now: it is"]  # fmt: skip
    assert [part for part in said if part not in text] == []
    content = json.loads(as_json(outcome))
    assert list(content) == [
        "candidate", "champion", "num_images", "same_test_set", "mcnemar_p", "difference",
        "difference_low", "difference_high", "decision", "moved", "reason", "notes",
    ]  # fmt: skip
    assert list(content["candidate"]) == ["version", "run_id", "run_name", "parameters", "metrics"]
    assert (content["num_images"], content["difference"]) == (150, 0.06)
    assert content["champion"]["metrics"]["test/roc_auc"] is None
    assert (content["decision"], content["moved"]) == ("promote", True)
    assert content["difference_low"] < 0.06 < content["difference_high"]
    alone = Outcome(candidate, None, None, True, Decision(True, "there was none"), False)
    assert json.loads(as_json(alone))["champion"] is None
    assert "promoted: version 4 would be the champion (dry run): there was none" in as_text(alone)
    kept = replace(outcome, decision=Decision(False, "it is not"), moved=False)
    assert as_text(kept).endswith("kept: version 3 stays the champion: it is not")
