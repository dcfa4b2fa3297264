"""Several processes train what one would have trained, whatever becomes of them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import psutil
import pytest
import safetensors.torch
import together
import torch
from ruamel.yaml import YAML
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from cnnpipe.errors import ProcessLost, RunFailed, UserError
from cnnpipe.params import load
from cnnpipe.stages import download, resize, split, train
from cnnpipe.training import loop
from cnnpipe.training.checkpoint import Checkpoints
from cnnpipe.training.distributed import ALONE, ProcessGroup, _why

SIZE = 3
TESTS = Path(together.__file__).parent


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 11, 128])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_shares_are_all_there_is_in_order_and_all_but_equal(count: int, size: int) -> None:
    things = np.arange(count)
    shares = [things[ProcessGroup(rank, size).share(count)] for rank in range(size)]
    assert np.concatenate(shares).tolist() == things.tolist()
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


def test_one_process_alone_exchanges_nothing() -> None:
    values = torch.arange(3.0)
    ALONE.sum(values)
    assert values.tolist() == [0, 1, 2]
    assert ALONE.from_first(b"data") == b"data"


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What three processes leave behind that compute all cases together."""
    folder = tmp_path_factory.mktemp("together")
    calls = 0

    def stop(*_: object) -> bool:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Stop
        return True

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(loop, "_SAVED_EVERY_S", 0)
        patch.setattr(loop, "_check_finite", stop)
        together.trained("residual", ALONE, Checkpoints(folder / "checkpoints"))
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={SIZE}",
            "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1",
            str(TESTS / "together.py"), str(folder),
        ],
        env={**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        check=True,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("case", together.CASES)
def test_together_they_learn_what_one_learns_alone(folder: Path, case: str) -> None:
    expected, history = together.trained(case, ALONE)
    number = list(together.CASES).index(case)
    found = [
        safetensors.torch.load_file(folder / f"{number}-{rank}.safetensors") for rank in range(SIZE)
    ]
    numbers = [list(map(float, epoch.values())) for epoch in history]
    np.testing.assert_allclose(found[0].pop("history"), numbers, rtol=1e-5, atol=1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-5)
        for other in found[1:]:
            assert torch.equal(found[0][name], other[name])  # to the bit


def test_several_go_on_with_what_one_has_begun(folder: Path) -> None:
    expected, _ = together.trained("residual", ALONE)
    for rank in range(SIZE):
        found = safetensors.torch.load_file(folder / f"resumed-{rank}.safetensors")
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


SETTINGS = {
    "download": {"source": "digits", "limit_per_class": 20},
    "resize": {"size": 12, "color": "grey", "workers": 2},
    "model": {"filters": 4, "kernel_size": 3},
    "train": {"epochs": 60, "batch_size": 17, "augment": "flip", "optimizer": "sgd"},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the images ready to train on, and the history of one process."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.delenv("DVC_ROOT", raising=False)
        YAML(typ="safe").dump(SETTINGS, Path("params.yaml"))
        for stage in (download, resize, split, train):
            stage.run(load("params.yaml"))
    return folder


@pytest.fixture
def workspace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(prepared / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


def started(**changed: Any) -> subprocess.Popen[str]:
    """`cnnpipe train` in two processes, with other settings of `train`."""
    of_train = {**SETTINGS["train"], "num_processes": 2, **changed}
    YAML(typ="safe").dump({**SETTINGS, "train": of_train}, Path("params.yaml"))
    return subprocess.Popen(
        [sys.executable, "-m", "cnnpipe", "train"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def until(process: subprocess.Popen[str], text: str) -> Iterator[str]:
    assert process.stdout is not None
    for line in process.stdout:
        yield line
        if line.startswith(text):
            return


def runs() -> list[Any]:
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    return list(mlflow.search_runs(search_all_experiments=True, output_format="list"))


def assert_same_history(one: Path, other: Path) -> None:
    columns = ["epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy"]
    expected, found = (
        pd.read_csv(folder / "reports/train/history.csv")[columns] for folder in (one, other)
    )
    pd.testing.assert_frame_equal(found, expected, rtol=1e-4)


def test_killed_or_not_the_result_is_that_of_one_process(prepared: Path, workspace: Path) -> None:
    process = started()
    list(until(process, "epoch 2/"))
    first = psutil.Process(process.pid).children()
    first[1].kill()
    *_, resumed = until(process, "goes on after epoch ")
    assert int(resumed.split()[4].rstrip(",")) >= 2
    second = psutil.Process(process.pid).children()
    assert not set(first) & set(second)
    list(until(process, "epoch "))
    process.kill()
    _, err = process.communicate()  # the end of all that write there
    assert len(err.splitlines()) == 1
    assert err.startswith("warning: process 1 of the training was lost: Signal 9 (SIGKILL)")
    assert [run.info.status for run in runs()] == ["KILLED"]
    YAML(typ="safe").dump(SETTINGS, Path("params.yaml"))
    train.run(load("params.yaml"))
    assert_same_history(prepared, workspace)
    (run,) = runs()
    assert run.info.status == "FINISHED"
    assert len(mlflow.MlflowClient().get_metric_history(run.info.run_id, "val/loss")) == 60


def test_terminated_they_end_in_order(workspace: Path) -> None:
    process = started(epochs=10_000)
    list(until(process, "epoch 1/"))
    children = psutil.Process(process.pid).children()
    process.terminate()
    _, err = process.communicate()
    assert (process.returncode, err) == (143, "cnnpipe: terminated\n")
    assert len(children) == 2 and not any(child.is_running() for child in children)
    (run,) = runs()
    assert (run.info.status, run.data.tags["processes"]) == ("KILLED", "2")


def test_a_mistake_is_told_once_and_not_tried_again(workspace: Path) -> None:
    Path("data/split.csv").unlink()
    process = started()
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err == "cnnpipe: data/split.csv: no such file: run `cnnpipe split` first\n"


def failure(rank: int, exit_code: int, **told: Any) -> ProcessFailure:
    result = ProcessFailure(rank, 1, exit_code, "")
    result.error_file_data = told
    result.message = told.get("message", result.message)
    return result


LOST = failure(0, 1, kind="ProcessLost", message="another process of this training is gone")
ENDED = failure(0, 143, kind="KeyboardInterrupt", message="terminated")


@pytest.mark.parametrize(
    ("failures", "kind", "text"),
    [
        ([LOST, failure(1, 2, kind="UserError", message="wrong")], UserError, "wrong"),
        ([failure(0, 1, kind="RunFailed", message="nan"), ENDED], RunFailed, "nan"),
        ([ENDED, failure(1, 1)], RunFailed, "process 1 of the training failed, see above"),
        ([LOST, failure(1, -9)], ProcessLost, "process 1 of the training was lost: Signal 9"),
        ([LOST], ProcessLost, "process 0 of the training was lost: another process"),
        ([failure(1, -15), ENDED], ProcessLost, "process 1 of the training was lost: Signal 15"),
    ],
)
def test_only_after_a_loss_is_it_tried_again(
    failures: list[ProcessFailure], kind: type[Exception], text: str
) -> None:
    why = _why(failures)
    assert type(why) is kind
    assert str(why).startswith(text)
