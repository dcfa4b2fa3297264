"""Tests of what the benchmarks share: turns are turns, and a ratio says what it claims."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.harness import at_most, command, faster, in_turn, medians, peak_memory, report


def test_cases_take_turns_and_the_first_round_is_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    calls: list[str] = []
    durations = {"ours": iter([99, 1, 2, 9]), "theirs": iter([99, 5, 4, 6])}

    def case(name: str) -> None:
        calls.append(name)
        clock[0] += next(durations[name])

    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])
    result = in_turn({"ours": lambda: case("ours"), "theirs": lambda: case("theirs")}, rounds=3)
    assert calls == ["ours", "theirs"] * 4
    assert result == {"ours": 2, "theirs": 5}


def test_cases_that_measure_themselves_take_turns_too() -> None:
    values = iter([1.0, 10.0, 2.0, 20.0, 9.0, 30.0])
    cases = {"ours": lambda: next(values), "theirs": lambda: next(values)}
    assert medians(cases, rounds=3) == {"ours": 2, "theirs": 20}


@pytest.mark.parametrize(
    ("row", "ratio", "reached"),
    [
        (faster("a", "b", theirs=6, ours=2, unit="s", at_least=3), 3, True),
        (faster("a", "b", theirs=6, ours=2.1, unit="s", at_least=3), 6 / 2.1, False),
        (at_most("a", "b", theirs=4, ours=2, unit="MB", limit=0.5), 0.5, True),
        (at_most("a", "b", theirs=4, ours=3, unit="MB", limit=0.5), 0.75, False),
    ],
)
def test_a_ratio_is_our_speed_or_our_amount_by_theirs(
    row: harness.Row, ratio: float, reached: bool
) -> None:
    assert row.ratio == pytest.approx(ratio)
    assert row.reached is reached


def test_a_report_is_a_table_and_json_with_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    rows = [faster("training", "a peer", 6, 4, "s", 2), at_most("memory", "half", 8, 2, "MB", 1)]
    report("thing", rows, ["numpy"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed if line] == ["thing", "what", "training", "memory"]
    assert "MISSED" in printed[-2] and "MISSED" not in printed[-1]
    content = json.loads((tmp_path / "results" / "thing.json").read_text())
    assert [row["ratio"] for row in content["rows"]] == [1.5, 0.25]
    assert {"processor", "cores", "python", "numpy"} <= set(content["machine"])


def test_a_command_that_fails_fails_the_benchmark(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="went wrong"):
        command([sys.executable, "-c", "raise SystemExit('went wrong')"], tmp_path)()


def test_peak_memory_counts_children_and_shared_pages_once(tmp_path: Path) -> None:
    # 100 MB in the parent, and a forked child that shares them and holds 100 MB of its own.
    code = (
        "import os, time\n"
        "a = b'x' * 100_000_000\n"
        "if os.fork() == 0:\n"
        "    b = b'y' * 100_000_000\n"
        "    time.sleep(1)\n"
        "else:\n"
        "    os.wait()\n"
    )
    assert 200 < peak_memory([sys.executable, "-c", code], tmp_path) < 240


@pytest.mark.parametrize(
    "name",
    ["gpu", "memory", "pixels", "resize_stage", "scale", "serving", "startup", "training", "whole"],
)
def test_every_benchmark_can_be_imported_without_the_peers(name: str) -> None:
    code = (
        "import sys\n"
        "sys.modules.update(cv2=None, tensorflow=None, keras=None)\n"
        f"import benchmarks.{name}\n"
        f"benchmarks.{name}.main\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
