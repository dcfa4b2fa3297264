"""Tests of what is known of a stage's time and memory, and of when nothing is."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cnnpipe.usage import OUTPUTS, keep, last, so_far


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    put("split", "a table")
    return tmp_path


def put(stage: str, text: str) -> None:
    path = Path(OUTPUTS[stage])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_usage_of_a_stage_is_that_of_the_output_which_is_there() -> None:
    assert last("split") is None
    first = replace(so_far("split"), seconds=1.0)
    keep(first)
    keep(replace(so_far("train"), seconds=7.0))
    assert last("split") == first
    put("split", "another, restored from DVC's cache")
    assert last("split") is None
    second = replace(so_far("split"), seconds=2.0)
    keep(second)
    assert last("split") == second
    put("split", "a table")
    assert last("split") == first
    keep(replace(first, seconds=3.0))
    assert last("split") == replace(first, seconds=3.0)


def test_an_experiments_workspace_and_the_repository_share_what_they_know(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(so_far("split"))
    workspace = here / ".dvc/tmp/exps/1"
    workspace.mkdir(parents=True)
    monkeypatch.chdir(workspace)
    put("split", "a table")
    assert last("split") is None
    monkeypatch.setenv("DVC_ROOT", str(here))
    assert last("split") is not None


def test_damaged_lines_are_passed_over() -> None:
    keep(replace(so_far("split"), seconds=1.0))
    with Path(".cnnpipe/usage.jsonl").open("a") as file:
        digest = json.loads(Path(".cnnpipe/usage.jsonl").read_text())["output"]
        entry = {"stage": "split", "output": digest}
        file.write(f'[]\n\n{json.dumps(entry)}\n{{"stage": "spl')
    found = last("split")
    assert found is not None and found.seconds == 1.0


def test_the_peak_is_of_this_process_and_grows_with_what_it_takes() -> None:
    before = so_far("train")
    taken = np.ones(before.peak_bytes // 8 + (50 << 20) // 8)
    after = so_far("train")
    assert after.peak_bytes >= before.peak_bytes + (50 << 20)
    assert after.peak_bytes > taken.nbytes
    assert after.seconds > before.seconds > 0
    assert "core" in after.machine and "GB" in after.machine
