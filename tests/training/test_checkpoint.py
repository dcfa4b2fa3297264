"""Tests of the checkpoints: whole or not there, the damaged passed over, one training at a time."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cnnpipe.errors import RunFailed
from cnnpipe.training.checkpoint import Checkpoints, open_checkpoints, unpacked


@pytest.fixture(autouse=True)
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return tmp_path


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def state_in(folder: Path) -> dict[str, Any]:
    return unpacked(Checkpoints(folder).last)[1]


def test_what_is_saved_last_comes_back_to_the_bit(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "f")
    assert (unpacked(checkpoints.last), checkpoints.run_id) == (({}, {}, ""), "")
    checkpoints.run_id = "a run"
    weights = torch.randn(3, 4)
    for step in range(5):
        checkpoints.save({"network/w": weights + step}, {"step": step, "loss": 0.1 + 0.2})
    again = Checkpoints(tmp_path / "f")
    tensors, state, run_id = unpacked(again.last)
    assert torch.equal(tensors["network/w"], weights + 4)
    assert (state, run_id) == ({"step": 4, "loss": 0.1 + 0.2}, "a run")
    assert again.run_id == "a run"
    assert len(files(tmp_path / "f")) == 2
    again.save({}, {"step": 5})  # and goes on counting
    assert state_in(tmp_path / "f") == {"step": 5}


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_of_a_damaged_checkpoint_the_one_before_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: str
) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save({"w": torch.full((8,), float(step))}, {"step": step})
    last = files(tmp_path)[-1]
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes({"flip": data, "cut": data[:-1], "empty": b""}[harm])
    found = Checkpoints(tmp_path)
    assert unpacked(found.last)[0]["w"].tolist() == [1.0] * 8
    assert state_in(tmp_path) == {"step": 1}
    assert f"warning: {last}: the checkpoint is damaged and removed; " in capsys.readouterr().err
    found.save({}, {"step": 3})
    assert state_in(tmp_path) == {"step": 3}
    assert len(files(tmp_path)) == 2  # both of them whole
    files(tmp_path)[-1].write_bytes(b"")
    assert state_in(tmp_path) == {"step": 1}
    files(tmp_path)[-1].write_bytes(b"")
    assert state_in(tmp_path) == {}


def test_they_stay_where_the_training_fails_and_go_where_it_ends_well(repository: Path) -> None:
    folder = repository / ".cnnpipe/checkpoints/abc"
    with pytest.raises(KeyboardInterrupt), open_checkpoints("abc") as checkpoints:
        checkpoints.save({}, {"step": 1})
        raise KeyboardInterrupt
    with open_checkpoints("other") as checkpoints:
        assert unpacked(checkpoints.last)[1] == {}
    with open_checkpoints("abc") as checkpoints:
        assert unpacked(checkpoints.last)[1] == {"step": 1}
    assert not folder.exists()


def test_the_same_training_does_not_run_twice_at_once(repository: Path) -> None:
    code = (
        "import sys\nfrom cnnpipe.training.checkpoint import open_checkpoints\n"
        "with open_checkpoints('abc'):\n    print('open', flush=True)\n    sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, env=environment)  # fmt: skip
    assert other.stdout is not None and other.stdout.readline() == b"open\n"
    with (
        pytest.raises(RunFailed, match=f"is running already as process {other.pid}: wait for it"),
        open_checkpoints("abc"),
    ):
        pass
    with open_checkpoints("another"):
        pass
    other.kill()  # however it ends, it holds nothing afterwards
    other.communicate()
    with open_checkpoints("abc"):
        pass
