"""resize on a Dask cluster, of a real scheduler and workers: what is made, and what goes wrong.

The workers and `cnnpipe resize` find stand-ins for a decoder that crashes, and for one that takes
its time, under the names that the files end with.
"""

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from waiting import wait_for

from cnnpipe import cluster
from cnnpipe.cli import PARAMS
from cnnpipe.data.raw import Source, png
from cnnpipe.errors import RunFailed, UserError

pytest.importorskip("distributed")

ROOT = Path(__file__).parents[1]
CNNPIPE = Path(sys.executable).with_name("cnnpipe")
DASK = Path(sys.executable).with_name("dask")

SAID = """37 images of 2 classes at 10 x 10, rgb
3 files quarantined, see data/resized/quarantine.csv
"""

# Python imports it first of all.
DECODER = """
import os, signal, time
from pathlib import Path
import cnnpipe.data.decode as decode

readable = decode.decode_frame

def decode_frame(data, max_pixels):
    if data.endswith(b"crash"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if data.endswith(b"slow"):
        try:
            with open("slow", "x") as file:  # the first time only
                file.write(str(os.getpid()))
        except FileExistsError:
            pass
        else:
            os.replace("slow", "at-it")
            open("slow", "w").close()
            time.sleep(600)
    return readable(data, max_pixels)

decode.decode_frame = decode_frame
"""


class Dask:
    """A scheduler and its workers, on the loopback."""

    def __init__(self, folder: Path, code: Path) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self._folder, self._code = folder, code
        folder.mkdir()

    def begin(self) -> None:
        self.scheduler = self._start(
            "scheduler", "--port", "0", "--dashboard-address", "127.0.0.1:0"
        )
        log = self.log(self.scheduler)
        found = wait_for(lambda: re.search(r"Scheduler at: +(tcp://\S+:\d+)\n", log.read_text()))
        self.address: str = found[1]

    def worker(self, code: Path | None = None) -> subprocess.Popen[bytes]:
        """One of a thread, without the process that would start it again."""
        process = self._start(
            "worker", self.address, "--nthreads", "1", "--no-nanny", code=code or self._code
        )
        log = self.log(process)
        wait_for(lambda: "Registered to" in log.read_text())
        return process

    def log(self, process: subprocess.Popen[bytes]) -> Path:
        return self._folder / f"{self.processes.index(process)}.log"

    def _start(self, *command: str, code: Path | None = None) -> subprocess.Popen[bytes]:
        path = self._folder / f"{len(self.processes)}.log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                [DASK, *command, "--host", "127.0.0.1", "--no-dashboard"],
                stdout=log, stderr=log, cwd=self._folder, env=environment(code or self._code),
            )  # fmt: skip
        self.processes.append(process)
        return process


def environment(code: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{code}{os.pathsep}{ROOT}", **more}


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """Put before the package, it has the stand-ins in the decoder's place."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(DECODER)
    return folder


@pytest.fixture
def dask(tmp_path: Path, code: Path) -> Iterator[Dask]:
    """It ends with the test, and its workers."""
    dask = Dask(tmp_path / "dask", code)
    try:
        dask.begin()
        yield dask
    finally:
        for process in reversed(dask.processes):
            process.kill()
            process.wait()


@pytest.fixture
def resize(code: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `cnnpipe resize`, with these variables."""
    runs: list[subprocess.Popen[str]] = []

    def start(**variables: str) -> subprocess.Popen[str]:
        runs.append(subprocess.Popen(
            [CNNPIPE, "resize"], env=environment(code, **variables), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ))  # fmt: skip
        return runs[-1]

    yield start
    for run in runs:
        run.kill()
        run.communicate()


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set in a compressed tar, some of it not to be read."""
    folder = tmp_path / "project"
    raw = folder / "data" / "raw"
    raw.mkdir(parents=True)
    monkeypatch.chdir(folder)
    for name in ("DVC_ROOT", "DVC_EXP_NAME", "DASK_SCHEDULER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    rng = np.random.default_rng(0)
    with tarfile.open(raw / "images.tar.gz", "w:gz") as archive:
        for i in range(40):
            content = png(rng.integers(0, 256, (12, 9, 3), np.uint8))
            content = {7: content + b"crash", 8: b"<html>", 21: b"", 30: content + b"slow"}.get(
                i, content
            )
            entry = tarfile.TarInfo(f"{'cat' if i % 2 else 'dog'}/{i}.png")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    Source("folder", "", ("images.tar.gz",)).write(raw)
    Path(PARAMS).write_text("resize: {size: 10}")
    return folder


def made() -> dict[str, bytes]:
    return {
        str(path.relative_to("data/resized")): path.read_bytes()
        for path in Path("data/resized").rglob("*")
        if path.is_file()
    }


def left_over() -> list[str]:
    return [path.name for path in Path("data").iterdir() if path.name.startswith(".")]


def decoding() -> psutil.Process:
    """The process that is at the slow image, once it is."""
    wait_for(Path("at-it").exists)
    return psutil.Process(int(Path("at-it").read_text()))


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_the_result_is_the_local_one_to_the_byte_though_files_crash_and_a_worker_is_killed(
    dask: Dask, workspace: Path, resize: Callable[..., subprocess.Popen[str]]
) -> None:
    Path("slow").touch()
    local = resize()
    assert local.communicate(timeout=120) == (SAID, "")
    expected = made()
    assert b"crash" in expected["quarantine.csv"]
    assert len([name for name in expected if name.startswith("images-")]) == 13  # and one of none
    Path("slow").unlink()
    shutil.rmtree("data/resized")

    workers = [dask.worker(), dask.worker()]
    run = resize(DASK_SCHEDULER_ADDRESS=dask.address)
    at_it = decoding()
    (lost,) = [worker for worker in workers if worker.pid in {p.pid for p in at_it.parents()}]
    lost.kill()
    assert run.communicate(timeout=120) == (SAID, "")
    assert run.returncode == 0
    assert made() == expected
    assert left_over() == []
    wait_for(lambda: gone(at_it))
    (worker,) = [worker for worker in workers if worker is not lost]
    wait_for(lambda: all(gone(child) for child in psutil.Process(worker.pid).children()))


def test_an_interrupt_and_the_loss_of_the_scheduler_leave_what_was_there(
    dask: Dask, workspace: Path, resize: Callable[..., subprocess.Popen[str]]
) -> None:
    Path("data/resized").mkdir()
    Path("data/resized/before").touch()
    dask.worker()
    run = resize(DASK_SCHEDULER_ADDRESS=dask.address)
    decoding()
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=120) == ("", "cnnpipe: interrupted\n")
    assert run.returncode == 130
    assert left_over() == []
    Path("slow").unlink()
    Path("at-it").unlink()
    dask.worker()
    Path(PARAMS).write_text(f"resize: {{size: 10, scheduler: '{dask.address}'}}")
    run = resize()
    decoding()
    dask.scheduler.kill()
    lost = f"the Dask scheduler at {dask.address} is lost, or was restarted: run it again"
    assert run.communicate(timeout=120) == ("", f"cnnpipe: {lost}\n")
    assert run.returncode == 1
    assert left_over() == []
    assert [path.name for path in Path("data/resized").iterdir()] == ["before"]


def test_a_run_without_workers_waits_for_one_and_one_of_other_code_is_named(
    dask: Dask,
    workspace: Path,
    tmp_path: Path,
    resize: Callable[..., subprocess.Popen[str]],
) -> None:
    run = resize(DASK_SCHEDULER_ADDRESS=dask.address)
    assert run.stderr is not None
    assert run.stderr.readline() == f"waits for workers of {dask.address}\n"
    shutil.copytree(ROOT / "cnnpipe", tmp_path / "other" / "cnnpipe")
    with (tmp_path / "other" / "cnnpipe" / "errors.py").open("a") as file:
        file.write("# changed\n")
    dask.worker(tmp_path / "other")
    _, errors = run.communicate(timeout=120)
    assert errors.startswith("cnnpipe: worker tcp://127.0.0.1:")
    assert errors.endswith("has another cnnpipe: install the same as where `cnnpipe resize` runs\n")
    assert errors.count("\n") == run.returncode == 1
    assert left_over() == []


def test_workers_that_cannot_do_it_are_named(dask: Dask, workspace: Path, tmp_path: Path) -> None:
    seeing = dask.worker()
    elsewhere = cluster.answers(dask.address, "cnnpipe.stages.resize", "/not/shared", None, [0])
    with pytest.raises(
        RunFailed, match=rf"^worker tcp://.*: does not see {workspace}: that folder"
    ):
        next(elsewhere)
    seeing.kill()
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "cnnpipe.py").touch()  # in the package's place
    dask.worker(tmp_path / "none")
    lacking = cluster.answers(dask.address, "cnnpipe.stages.resize", str(workspace), None, [0])
    with pytest.raises(RunFailed, match=r"^worker tcp://127[^ ]*: has no cnnpipe that can do it"):
        next(lacking)


def test_a_scheduler_that_does_not_answer_is_one_line(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_CONNECTING_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        there = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        for address in ("tcp://127.0.0.1:1", "127.0.0.1", "nonsense://", there):
            with pytest.raises(RunFailed, match=f"^no Dask scheduler answers at {address} .*: st"):
                next(cluster.answers(address, "cnnpipe.stages.resize", str(workspace), None, [0]))


def test_without_dask_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'cnnpipe\[dask\]'"):
        next(cluster.answers("tcp://127.0.0.1:1", "cnnpipe.stages.resize", "/", None, [0]))
