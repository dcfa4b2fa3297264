"""Whether runs are compared fairly: on the same images, and with luck told from skill."""

import csv
import io
import json
import re
import zlib
from fractions import Fraction
from itertools import combinations
from math import comb
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from compared import make_run, many_runs, predictions
from hypothesis import given
from hypothesis import strategies as st

from cnnpipe.data import manifest
from cnnpipe.data.store import open_images, shard_writer
from cnnpipe.evaluation import comparison, comparison_figures, comparison_page, comparison_table
from cnnpipe.evaluation.comparison import (
    Comparison,
    compare,
    differing_params,
    disagreements,
    holm,
    mcnemar,
    pareto_front,
    recalls,
)

ODD = ("<script>alert(1)</script>", "$x$", "NA", "a\nb", "😀", "", "x" * 200)
NOWHERE = Path("no/such/folder")


@pytest.mark.parametrize(("only_first", "only_second"), [(17, 5), (5, 17), (1, 0), (4, 4), (9, 30)])
def test_mcnemar_counts_the_ways_in_which_coins_fall_so_far_apart(
    only_first: int, only_second: int
) -> None:
    total, least = only_first + only_second, min(only_first, only_second)
    tail = sum(Fraction(comb(total, k), 2**total) for k in range(least + 1))
    assert mcnemar(only_first, only_second) == pytest.approx(float(min(Fraction(1), 2 * tail)))


def test_mcnemar_of_nothing_is_no_evidence() -> None:
    assert mcnemar(0, 0) == 1


def test_equally_good_runs_are_rarely_told_apart() -> None:
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(1000):
        # Each right on 80 % of 200 images, the two not independent.
        easy = rng.random(200) < 0.5
        first, second = (easy | (rng.random(200) < 0.6) for _ in range(2))
        alarms += mcnemar(int((first & ~second).sum()), int((second & ~first).sum())) < 0.05
    assert alarms <= 50


def test_of_many_equally_good_runs_a_better_one_is_rarely_called_so() -> None:
    rng = np.random.default_rng(1)
    alarms = 0
    for _ in range(100):
        hits = ["".join(map(str, (rng.random(100) < 0.8).astype(int))) for _ in range(5)]
        compared = compare([make_run(i, right) for i, right in enumerate(hits)])
        alarms += any(pair.better for pair in compared.pairs)
    assert alarms <= 5


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1, 1]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_lies_between_raw_and_bonferroni(p_values: list[float]) -> None:
    adjusted = np.array(holm(p_values))
    p = np.array(p_values)
    assert (adjusted >= p).all() and (adjusted <= np.minimum(1, p * len(p)) + 1e-12).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


def test_the_pareto_front_keeps_ties_and_leaves_out_what_is_beaten_in_one_alone() -> None:
    costs = [1, 1, 2, 2, 3, 3, np.nan]
    scores = [0.5, 0.5, 0.6, 0.7, 0.6, 0.9, 1.0]
    assert pareto_front(costs, scores).tolist() == [True, True, False, True, False, True, False]


def test_runs_are_listed_best_first_and_the_words_follow_the_adjusted_p() -> None:
    many, few = "1" * 60, "1" * 43 + "0" * 17
    compared = compare([make_run(0, few, "A"), make_run(1, many, "B")])
    assert compared.labels == ("B", "A")
    (pair,) = compared.pairs
    assert (pair.num_common, pair.only_first, pair.only_second) == (60, 17, 0)
    assert pair.p == pair.p_adjusted == pytest.approx(2 / 2**17)
    assert pair.sentence == (
        "B is right on 17 images on which A is wrong, A on 0 on which B is wrong: "
        "B is better, more than luck explains (p < 0.0001)"
    )


def test_what_may_be_luck_is_called_so() -> None:
    compared = compare([make_run(0, "1110", "A"), make_run(1, "0111", "B")])
    assert compared.pairs[0].sentence == (
        "A is right on 1 image on which B is wrong, B on 1 on which A is wrong: "
        "the difference may be luck (p = 1.00)"
    )
    same = compare([make_run(0, "1110", "A"), make_run(1, "1110", "B")])
    assert same.pairs[0].sentence == "no image separates A and B"


def test_a_p_that_is_small_by_itself_alone_is_no_evidence_among_many() -> None:
    base = "1" * 100
    runs = [make_run(i, base, f"{i}") for i in range(9)]
    runs.append(make_run(9, "0" * 6 + "1" * 94, "worse"))
    pair = next(p for p in compare(runs).pairs if p.names == ("0", "worse"))
    assert pair.p == pytest.approx(2 / 2**6) and pair.p < 0.05
    assert pair.p_adjusted == pytest.approx(45 * pair.p if 45 * pair.p < 1 else 1)
    assert pair.better == 0
    assert pair.sentence.endswith(
        "the difference may be luck (p = 0.031; 1.00 adjusted for 45 pairs)"
    )


def test_images_are_matched_by_checksum_whatever_they_are_called() -> None:
    table = predictions(["cat"] * 6, ["cat"] * 6)
    renamed = predictions(["cat"] * 6, ["dog"] * 6, folder="elsewhere").iloc[::-1]
    (pair,) = compare([make_run(0, table=table), make_run(1, table=renamed)]).pairs
    assert (pair.num_common, pair.only_first, pair.by_path) == (6, 6, False)


def test_an_image_with_another_label_is_another_and_copies_count_once() -> None:
    first = predictions(["cat"] * 4, ["cat"] * 4)
    second = first.assign(label=["cat", "cat", "dog", "dog"])
    second = pd.concat([second, second])
    (pair,) = compare([make_run(0, table=first), make_run(1, table=second, test_hash="b")]).pairs
    assert (pair.num_common, pair.only_first, pair.only_second) == (2, 0, 0)
    both = pd.concat([first, first.assign(label="dog")])
    (pair,) = compare([make_run(0, table=both), make_run(1, table=second, test_hash="b")]).pairs
    assert pair.num_common == 4


def test_older_runs_without_checksums_are_matched_by_path() -> None:
    old = predictions(["cat"] * 6, ["dog"] * 6).drop(columns="sha256")
    new = predictions(["cat"] * 6, ["cat"] * 6)
    compared = compare([make_run(0, table=old, test_hash=""), make_run(1, table=new)])
    (pair,) = compared.pairs
    assert (pair.num_common, pair.by_path, pair.same_set) == (6, True, False)
    assert "on the 6 images that both were tested on, matched by their paths" in pair.sentence
    assert compared.test_sets == ("A", "?")
    assert "1 run does not say on which test images" in compared.warning


def test_different_test_sets_are_said_and_not_ranked_together() -> None:
    def table(first: int, num_right: int) -> pd.DataFrame:
        return predictions(["cat"] * 20, ["cat"] * num_right + ["dog"] * (20 - num_right), first)

    runs = [
        make_run(0, name="most", table=table(100, 20), test_hash="other"),
        make_run(1, name="less", table=table(0, 10), test_hash="b"),
        make_run(2, name="more", table=table(0, 15), test_hash="b"),
        make_run(3, name="shifted", table=table(10, 18), test_hash="c"),
    ]
    compared = compare(runs)
    assert compared.labels == ("more", "less", "most", "shifted")
    assert compared.test_sets == ("A", "A", "B", "C")
    assert "tested on 3 different test sets" in compared.warning
    sentences = {pair.names: pair.sentence for pair in compared.pairs}
    assert sentences["more", "most"] == (
        "more and most have no test image in common: they are not compared"
    )
    assert sentences["more", "shifted"].startswith("on the 10 images that both were tested on, ")
    assert not sentences["more", "less"].startswith("on the")
    # Adjusted for the pairs of the same kind, without those that were not tested.
    assert {pair.names: pair.num_tested for pair in compared.pairs if pair.num_common} == {
        ("more", "less"): 1, ("more", "shifted"): 2, ("less", "shifted"): 2,
    }  # fmt: skip
    text = comparison_table.as_text(compared, 200)
    assert text.startswith("warning: the runs were tested on 3 different test sets")
    assert "test set" in text.splitlines()[2]
    fronts = comparison_figures.fronts(compared, [2.0, 1.0, 0.5, 0.5])
    assert fronts == {"A": [1, 0]}


def test_runs_on_one_test_set_need_no_warning() -> None:
    compared = compare([make_run(0), make_run(1)])
    assert compared.warning == ""
    assert "test set" not in comparison_table.as_text(compared, 200)


def test_differing_parameters_come_with_the_most_telling_first() -> None:
    params = [
        {"base.seed": "1", "model.filters": "5", "train.epochs": "5", "model/parameters": "7"},
        {"base.seed": "2", "model.filters": "10", "train.epochs": "5", "model/parameters": "8"},
        {"base.seed": "3", "model.filters": "20", "train.epochs": "5", "train.new": "none"},
    ]
    assert differing_params(params) == ("model.filters", "base.seed", "train.new")


def study() -> Comparison:
    """Of four numbers of filters, three seeds each, every seed with test images of its own."""
    runs = []
    for number, (filters, seed) in enumerate(
        (filters, seed) for filters in (5, 10, 20, 100) for seed in (1, 2, 3)
    ):
        right = 60 + 5 * (filters > 5) + 4 * (filters > 10) + seed
        table = predictions(["cat"] * 100, ["cat"] * right + ["dog"] * (100 - right), 100 * seed)
        params = {"base.seed": seed, "model.filters": filters}
        runs.append(make_run(number, table=table, params=params, test_hash=str(seed)))
    return compare(runs)


def test_runs_that_differ_in_their_seed_alone_are_summarised() -> None:
    compared = study()
    groups = {group.params["model.filters"]: group for group in compared.groups}
    assert {name: group.num_runs for name, group in groups.items()} == {
        "5": 3, "10": 3, "20": 3, "100": 3,
    }  # fmt: skip
    assert groups["5"].mean == pytest.approx(0.62)
    assert groups["5"].sd == pytest.approx(0.01)
    assert compared.groups[0].mean == pytest.approx(0.71)
    assert [compared.runs[i].params["base.seed"] for i in groups["20"].members] == ["1", "2", "3"]
    text = comparison_table.as_text(compared, 120)
    assert re.search(r"^5 +0\.620  0\.010 +3$", text, re.MULTILINE)
    assert "a seed draws its own test images, too" in text


def test_of_a_seed_that_was_run_twice_the_latest_counts() -> None:
    runs = [
        make_run(0, "1110", params={"base.seed": 1}),
        make_run(1, "1000", params={"base.seed": 1}),
        make_run(2, "1111", params={"base.seed": 2}),
    ]
    (group,) = compare(runs).groups
    assert (group.num_runs, group.mean) == (2, 0.875)
    assert compare(runs[:2]).groups == ()


def test_the_seed_of_the_training_counts_before_that_of_all() -> None:
    seeds = [("42", "None"), ("42", "7"), ("42", "7"), ("43", "7")]
    runs = [
        make_run(i, "1110", params={"base.seed": base, "train.seed": own, "model.filters": "5"})
        for i, (base, own) in enumerate(seeds)
    ]
    (group,) = compare(runs).groups
    assert [comparison.seed(runs[i].params) for i in group.members] == ["7", "42", "7"]
    assert group.members == (1, 0, 3)
    assert group.params == {}


def test_the_study_of_one_number_is_drawn_against_it() -> None:
    figure = comparison_figures.seeds(study())
    (axes,) = figure.axes
    assert axes.get_xlabel() == "model.filters"
    assert axes.get_xscale() == "log"
    assert axes.get_xticks().tolist() == [5, 10, 20, 100]
    looks, title = comparison_figures.looks(study())
    assert title == "model.filters"
    assert len(set(looks)) == 4


def test_recall_is_each_runs_own_and_classes_may_differ() -> None:
    first = make_run(0, table=predictions(["NA", "NA", "dog"], ["NA", "dog", "dog"]))
    second = make_run(1, table=predictions(["cow"], ["cow"]))
    table = recalls([first, second])
    assert table.index.tolist() == ["NA", "cow", "dog"]
    assert table[0].tolist() == pytest.approx([0.5, np.nan, 1], nan_ok=True)
    assert table[1].tolist() == pytest.approx([np.nan, 1, np.nan], nan_ok=True)


def test_the_most_split_images_come_first_and_unanimous_ones_not() -> None:
    labels = ["a"] * 4
    said = [["a", "a", "b", "a"], ["a", "b", "a", "b"], ["a", "b", "c", "a"], ["a", "a", "d", "a"]]
    runs = [make_run(i, table=predictions(labels, each)) for i, each in enumerate(said)]
    runs.append(make_run(4, table=predictions(["a"], ["b"], first=50)))  # which no other has
    table = disagreements(runs)
    assert [int(sha256, 16) for sha256, _ in table.index] == [2, 1, 3]


def test_json_has_everything_and_no_nan() -> None:
    runs = [make_run(0, "1110", "<b>\n😀", params={"a.b": "x"}, **{"test/roc_auc": np.nan})]
    runs.append(make_run(1, "0110", params={"a.b": "y"}))
    content = json.loads(comparison_table.as_json(compare(runs)))
    assert content["runs"][0]["name"] == "<b>\n😀"
    assert content["runs"][0]["metrics"]["test/roc_auc"] is None
    assert content["differing"] == ["a.b"]
    (pair,) = content["pairs"]
    assert (pair["only_first"], pair["only_second"], pair["p"]) == (1, 0, 1.0)
    assert pair["better"] is None
    study_groups = json.loads(comparison_table.as_json(study()))["groups"]
    assert [group["num_runs"] for group in study_groups] == [3, 3, 3, 3]


@pytest.mark.parametrize("name", [*ODD, 'a "b", c', "a\rb", "-", "\r\n"])
def test_csv_brings_odd_names_back(name: str) -> None:
    runs = [make_run(0, name=name or "-", params={"a": name}), make_run(1, params={"a": "y"})]
    file = io.StringIO()
    comparison_table.write_csv(compare(runs), file)
    file.seek(0)
    read = list(csv.DictReader(io.StringIO(file.getvalue(), newline="")))
    assert [row["name"] for row in read] == [name or "-", "run 1"]
    assert [row["a"] for row in read] == [name, "y"]
    table = pd.read_csv(io.StringIO(file.getvalue(), newline=""), dtype=str, na_filter=False)
    assert table["name"].tolist() == [name or "-", "run 1"]
    assert float(table["test/accuracy"][0]) == 0.75


@pytest.mark.parametrize("width", [60, 80, 120, 300])
def test_the_table_is_no_wider_than_the_terminal_and_counts_what_it_leaves_out(width: int) -> None:
    runs = many_runs(12, "ab")
    for run in runs:
        run.params.update({f"section.parameter_{i}": f"{run.id}{i}" for i in range(12)})  # type: ignore[attr-defined]
    lines = comparison_table.as_text(compare(runs), width).splitlines()
    end = next(i for i, line in enumerate(lines) if "more parameters differ" in line)
    assert max(map(len, lines[:end])) <= max(width, 76)
    num_shown = lines[0].count("section.") + lines[0].count("base.") + lines[0].count("train.")
    num_shown += lines[0].count("model.")
    assert num_shown <= 8
    assert int(lines[end].strip("(").split()[0]) == 15 - num_shown


def test_runs_of_one_name_are_told_apart_by_their_ids() -> None:
    first = make_run(0x11 << 120, name="x")
    assert compare([first, make_run(0x22 << 120, name="x")]).labels == (
        "x (11000000)",
        "x (22000000)",
    )


def assert_safe(html: str) -> None:
    assert "<script" not in html
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", html)
    html.encode()


@pytest.mark.parametrize("num_runs", [1, 2, 12, 40])
@pytest.mark.parametrize("num_classes", [2, 100])
def test_a_page_of_any_number_of_runs_and_classes(num_runs: int, num_classes: int) -> None:
    names = [*ODD, *(f"class {i}" for i in range(100))][:num_classes]
    html = comparison_page.page(compare(many_runs(num_runs, names, 300)), NOWHERE)
    assert_safe(html)
    assert html.count("data:image/svg+xml") == 5
    num_pairs = len(list(combinations(range(num_runs), 2)))
    sentences = re.findall(r"<li>[^<]*(?:may be luck|luck explains|separates)[^<]*</li>", html)
    assert len(sentences) == num_pairs
    if num_classes == 100 and num_runs > 1:
        assert "The 20 of 100 classes with the largest spread" in html
    assert ('class="matrix"' in html) == (num_runs in (2, 12))


def test_a_page_of_odd_names_shows_them_as_they_are() -> None:
    runs = many_runs(len(ODD), ODD)
    odd = [make_run(i, name=name or "-", table=run.predictions, params={"a": name})
           for i, (name, run) in enumerate(zip(ODD, runs, strict=True))]  # fmt: skip
    html = comparison_page.page(compare(odd), NOWHERE)
    assert_safe(html)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "$x$" in html


def test_a_page_without_predictions_histories_or_times_says_so() -> None:
    bare = [make_run(0, name="old"), make_run(1, name="older")]
    bare = [
        type(run)(run.id, run.name, {}, {"test/accuracy": run.accuracy}, "", None, None)
        for run in bare
    ]
    compared = compare(bare)
    assert "2 runs do not say on which test images" in compared.warning
    assert "without predictions to compare: old, older" in comparison_table.as_text(compared, 120)
    html = comparison_page.page(compared, NOWHERE)
    assert_safe(html)
    assert "data:image/svg" not in html
    mixed = compare([*bare, make_run(2, name="new")])
    assert "Without predictions to compare: 2. old, 3. older." in comparison_page.page(
        mixed, NOWHERE
    ).replace("\n", " ")


@pytest.fixture
def resized(tmp_path: Path) -> Path:
    """A data/resized/ of twelve grey images, whose SHA-256 are numbers from 100 on."""
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), np.uint8)
    with shard_writer(tmp_path / "images-0.npy") as append:
        for image in images:
            append(image)
    table = pd.DataFrame(
        {
            "path": [f"{i}.png" for i in range(12)], "label": "cat", "official": "", "width": 8,
            "height": 8, "frames": 1, "sha256": [f"{i:064x}" for i in range(100, 112)],
            "shard": "images-0.npy", "row": range(12),
            "crc32": [zlib.crc32(image.data) for image in images], "group": range(12),
        }
    )  # fmt: skip
    manifest.write(table, tmp_path / "manifest.csv", manifest.COLUMNS)
    return tmp_path


def test_pictures_come_from_the_images_with_the_same_checksums(resized: Path) -> None:
    images, known = open_images(resized)
    chosen = known.iloc[[3, 7, 11]]
    table = chosen[["path", "label", "sha256"]].assign(prediction=chosen["label"])
    renamed = table.assign(path=["a", "b", "c"], prediction=["x", "y", chosen["label"].iloc[2]])
    compared = compare([make_run(0, table=table), make_run(1, table=renamed)])
    found = comparison_page._images(compared, resized)
    assert found["missing"] == "" and found["num"] == 2
    expected = [comparison_page.pages.picture(images[row]) for row in (3, 7)]
    assert [item["src"] for item in found["shown"]] == expected
    label = chosen["label"].iloc[0]
    assert found["shown"][0]["caption"] == f"is {label}\nrun 1: {label} ✓\nrun 2: x ✗"


def test_images_that_are_not_there_are_named_and_that_is_said(resized: Path) -> None:
    compared = compare([make_run(0, "11"), make_run(1, "10")])
    for folder, why in ((NOWHERE, "no such file"), (resized, "does not hold 1")):
        found = comparison_page._images(compared, folder)
        assert why in found["missing"]
        (item,) = found["shown"]
        assert item["src"] is None
        assert item["caption"].startswith("test/1.png\nis cat")
