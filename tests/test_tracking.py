"""What MLflow is told, and what happens when it is not there."""

import base64
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from matplotlib.figure import Figure
from mlflow.exceptions import MlflowException
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as Registry
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as Tracker

from benchmarks.drills.tracker import Server
from cnnpipe import mlflow_store, registry, sweep_view, tracking
from cnnpipe.errors import RunFailed, UserError
from cnnpipe.origin import digest
from cnnpipe.running import shown_address

ROOT = Path(__file__).parents[1]


pytestmark = pytest.mark.usefixtures("in_store")


def client() -> mlflow.MlflowClient:
    return mlflow.MlflowClient(mlflow_store.address())


def test_a_run_bears_the_experiments_name_and_what_made_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "dusty-dory")
    monkeypatch.setenv("CNNPIPE_FLOW_RUN_ID", "flow-1")
    with tracking.start_run("article", {"device": "cpu"}) as run:
        run.log_params({"model.filters": 20})
        run.log_metrics({"val/loss": 0.5, "test/roc_auc": None}, step=1)
    found = client().get_run(run.id)
    assert found.info.run_name == "dusty-dory"
    assert found.info.status == "FINISHED"
    assert found.data.tags["dvc_experiment"] == "dusty-dory"
    assert found.data.tags["prefect_flow_run"] == "flow-1"
    assert found.data.tags["device"] == "cpu"
    assert found.data.params == {"model.filters": "20"}
    assert found.data.metrics["val/loss"] == 0.5
    assert "test/roc_auc" not in found.data.metrics


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt, "KILLED"), (ValueError, "FAILED")]
)
def test_a_run_that_ends_early_says_how(error: type[BaseException], status: str) -> None:
    with pytest.raises(error), tracking.start_run("x", {}) as run:
        raise error
    assert client().get_run(run.id).info.status == status


def test_the_run_of_a_killed_process_is_ended_by_the_next_and_one_at_work_is_not() -> None:
    code = """
import time
from cnnpipe import sweeps, tracking
with tracking.start_run("x", {}) as run:
    print(run.id, sweeps.begin(run.id, {})[0], flush=True)
    time.sleep(600)
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    (killed, sweep), (at_work, _) = (process.stdout.readline().split() for process in processes)  # type: ignore[union-attr]
    processes[0].kill()
    processes[0].wait()
    try:
        assert client().get_run(killed).info.status == "RUNNING"
        with tracking.start_run("next", {}):
            pass
        assert client().get_run(killed).info.status == "KILLED"
        assert client().get_run(sweep).info.status == "KILLED"
        assert client().get_run(at_work).info.status == "RUNNING"
    finally:
        processes[1].kill()
        processes[1].wait()
    with tracking.reopen_run(killed, "x"):  # it is written to again
        tracking.settle()
        assert client().get_run(killed).info.status == "RUNNING"
        assert client().get_run(at_work).info.status == "KILLED"


def test_an_experiments_workspace_logs_to_the_repositorys_store(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(store))
    monkeypatch.chdir(tmp_path)
    with tracking.start_run("x", {}) as run:
        (tmp_path / "a.txt").write_text("a")
        run.log_file(tmp_path / "a.txt", "files")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"]
    assert list((store / "mlartifacts").rglob("a.txt"))
    assert client().get_run(run.id).info.status == "FINISHED"


def points(run_id: str, key: str = "val/loss") -> list[tuple[int, float]]:
    return [(p.step, p.value) for p in client().get_metric_history(run_id, key)]


def runs() -> list[mlflow.entities.Run]:
    experiment = client().get_experiment_by_name(mlflow_store.EXPERIMENT)
    return list(client().search_runs([experiment.experiment_id], max_results=10_000))


def outbox() -> list[Path]:
    return list(Path(".cnnpipe/outbox").glob("*"))


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """`away(True)`: from now on MLflow cannot be reached; `away(False)`: it is back."""
    connect, send = tracking.connect, tracking._Target.send
    is_away = False

    def connected() -> str:
        if is_away:
            raise RunFailed("no MLflow server answers there")
        return connect()

    def sent(self: tracking._Target, *arguments: Any) -> None:
        if is_away:
            raise MlflowException("connection\nrefused")
        send(self, *arguments)

    def switch(on: bool) -> None:
        nonlocal is_away
        is_away = on

    monkeypatch.setattr(tracking, "connect", connected)
    monkeypatch.setattr(tracking._Target, "send", sent)
    return switch


def log_everything(run: tracking.Run, model: Path) -> None:
    run.log_params({"model.filters": 20})
    run.log_data(pd.DataFrame({"label": ["cat", "dog"]}), "x", "x/train", "0123456789", "train")
    for epoch in (1, 2, 3):
        run.log_metrics({"val/loss": 1 / epoch, "val/accuracy": 0.5}, step=epoch)
    figure = Figure()
    run.log_figure(figure, "train/curves.png")
    figure.savefig("curves.png")
    run.log_image("curves.png", "train/curves")
    run.warn("train", ["it memorises"])
    run.log_model(model, ["cat", "dog"])


def assert_everything_is_there_once(run_id: str, status: str = "FINISHED") -> None:
    found = client().get_run(run_id)
    assert found.info.status == status
    assert found.data.params == {"model.filters": "20"}
    assert found.data.tags["warnings.train"] == "it memorises"
    assert points(run_id) == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert points(run_id, "val/accuracy") == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert [i.dataset.name for i in found.inputs.dataset_inputs] == ["x/train"]
    assert [f.path for f in client().list_artifacts(run_id, "train")] == ["train/curves.png"]
    images = [f.path for f in client().list_artifacts(run_id, "images")]
    assert all(path.startswith("images/train~curves+step+0+timestamp+") for path in images)
    # One that was cut off between the two is sent again, and the pages show one of a step.
    assert sum(path.endswith("+compressed.webp") for path in images) == 1 <= len(images) // 2
    assert found.data.tags["mlflow.loggedImages"] == "True"
    assert len(client().search_model_versions(f"run_id = '{run_id}'")) == 1


@pytest.fixture
def model(tmp_path: Path, make_classifier: Any) -> Path:
    make_classifier(seed=int(time.time())).save(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_a_tracker_that_goes_away_and_comes_back_misses_nothing(
    away: Callable[[bool], None], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tracking.start_run("x", {}) as run:
        run.log_metrics({"val/loss": 1.0}, step=1)
        away(True)
        log_everything(run, model)
        assert points(run.id) == [(1, 1.0)]
        away(False)
        run.log_metrics({"val/loss": 1 / 4}, step=4)
        assert points(run.id) == [(1, 1.0)]  # in their order, so not before the others
        id_before = run.id
    assert run.id == id_before
    assert points(run.id)[-1] == (4, 0.25)
    assert [line for line in capsys.readouterr().err.splitlines() if "MLflow" in line] == [
        "warning: MLflow does not take what is logged: connection refused; what is logged is kept "
        "in .cnnpipe/outbox and sent by the next stage that reaches MLflow"
    ]
    assert client().get_run(run.id).info.status == "FINISHED"
    assert outbox() == []


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_tracker_that_is_not_there_is_told_everything_later(
    away: Callable[[bool], None], model: Path, capsys: pytest.CaptureFixture[str], interrupted: bool
) -> None:
    before = {run.info.run_id for run in runs()} if mlflow_store.prepare_store() else set()
    away(True)
    began = time.time() * 1000
    with suppress(KeyboardInterrupt), tracking.start_run("mine", {"device": "cpu"}) as run:
        log_everything(run, model)
        if interrupted:
            raise KeyboardInterrupt
    assert run.experiment_id == ""
    ended = time.time() * 1000
    assert capsys.readouterr().err.count("what is logged is kept in .cnnpipe/outbox") == 1
    assert len(outbox()) == 1
    away(False)
    time.sleep(0.1)
    with tracking.start_run("another", {}) as another:
        pass
    (found,) = [r for r in runs() if r.info.run_id not in before | {another.id}]
    assert_everything_is_there_once(found.info.run_id, "KILLED" if interrupted else "FINISHED")
    assert found.info.run_name == "mine"
    assert found.data.tags["device"] == "cpu" and "python_version" in found.data.tags
    assert began - 1 <= found.info.start_time <= found.info.end_time <= ended + 1
    times = [p.timestamp for p in client().get_metric_history(found.info.run_id, "val/loss")]
    assert began - 1 <= times[0] <= times[-1] <= ended + 1
    assert outbox() == []
    # Under the id that models/run.json has it is found from now on.
    with tracking.reopen_run(run.id, "again") as again:
        assert again.id == found.info.run_id
    assert f"no run {run.id}" not in capsys.readouterr().err


def test_a_sender_that_is_killed_at_any_moment_sends_nothing_twice(
    away: Callable[[bool], None], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow_store.prepare_store()
    count = len(runs())
    away(True)
    with tracking.start_run("x", {}) as run:
        log_everything(run, model)
    away(False)
    remove = tracking.Outbox.remove
    left = [0]

    def killed(self: tracking.Outbox, entry: Any) -> None:
        if not left[0]:
            raise SystemExit  # after it was sent, and before it is forgotten
        left[0] -= 1
        remove(self, entry)

    monkeypatch.setattr(tracking.Outbox, "remove", killed)
    moments = 0
    while True:
        left[0] = moments
        with suppress(SystemExit), tracking.reopen_run(run.id, "x") as again:
            break
        moments = 1  # each time one more thing is got rid of
    assert len(runs()) == count + 1
    assert_everything_is_there_once(again.id)


def test_a_training_that_is_resumed_while_the_tracker_is_away_is_one_run(
    away: Callable[[bool], None], model: Path
) -> None:
    mlflow_store.prepare_store()
    count = len(runs())
    away(True)
    with suppress(KeyboardInterrupt), tracking.start_run("x", {}) as first:
        first.log_metrics({"val/loss": 1.0, "val/accuracy": 0.5}, step=1)
        raise KeyboardInterrupt
    with suppress(KeyboardInterrupt), tracking.start_run("x", {}, first.id) as second:
        assert second.id == first.id
        log_everything(second, model)
        raise KeyboardInterrupt
    away(False)
    with tracking.start_run("x", {}, first.id) as third:
        log_everything(third, model)
    assert len(runs()) == count + 1
    assert_everything_is_there_once(third.id)
    assert client().get_run(third.id).data.tags["recovered_from"] == first.id


def test_a_short_absence_at_the_start_leaves_mlflows_own_id(away: Callable[[bool], None]) -> None:
    away(True)
    with tracking.start_run("x", {}) as run:
        own = run.id
        away(False)
        run.deliver()
        assert run.id != own and run.experiment_id
        run.log_metrics({"val/loss": 1.0}, step=1)
        assert points(run.id) == [(1, 1.0)]
    assert client().get_run(run.id).info.status == "FINISHED"


def test_two_that_send_at_once_send_nothing_twice(away: Callable[[bool], None]) -> None:
    mlflow_store.prepare_store()
    count = len(runs())
    away(True)
    with tracking.start_run("x", {}) as run:
        for epoch in range(200):
            run.log_metrics({"val/loss": 1.0}, step=epoch)
            if epoch % 20 == 0:
                run.warn(f"train{epoch}", ["x"])  # so that it is not one request
    away(False)
    code = f"""
from cnnpipe import tracking
tracking.connect()  # or the first would be done before the second has connected
print("ready", flush=True)
input()
with tracking.reopen_run("{run.id}", "x"): pass
"""
    senders = [
        subprocess.Popen(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    for sender in senders:
        assert sender.stdout and sender.stdout.readline() == "ready\n"
    for sender in senders:
        assert sender.stdin and sender.stdin.write("\n")
        sender.stdin.close()
    assert [sender.wait() for sender in senders] == [0, 0]
    with tracking.reopen_run(run.id, "x") as again:
        assert sorted(points(again.id)) == [(epoch, 1.0) for epoch in range(200)]
    assert len(runs()) == count + 1
    assert outbox() == []


def test_a_locked_store_costs_seconds_and_no_point(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mlflow_store, "_LOCKED_S", 0.2)
    mlflow_store.prepare_store()
    other = sqlite3.connect(store / "mlflow.db", isolation_level=None)
    with tracking.start_run("x", {}) as run:
        run.log_metrics({"val/loss": 1.0}, step=1)
        # Not before the monitor of the machine is at rest, which would hold it for a moment.
        for _ in range(100):
            with suppress(sqlite3.OperationalError):
                other.execute("BEGIN EXCLUSIVE")
                break
        run.log_metrics({"val/loss": 0.5}, step=2)
        other.execute("ROLLBACK")
    assert points(run.id) == [(1, 1.0), (2, 0.5)]
    assert "mlflow.db cannot be used: database is locked; what is logged" in capsys.readouterr().err
    other.execute("BEGIN EXCLUSIVE")
    with tracking.start_run("y", {}) as offline:
        offline.log_metrics({"val/loss": 1.0}, step=1)
    other.execute("ROLLBACK")
    assert offline.experiment_id == ""
    with tracking.reopen_run(offline.id, "y") as again:
        assert points(again.id) == [(1, 1.0)]


def test_a_server_that_never_answers_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mlflow_store, "SLOW_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@{address}")
        with tracking.start_run("x", {}) as run:
            run.log_metrics({"val/loss": 1.0}, step=1)
    warning = capsys.readouterr().err
    assert f"MLFLOW_TRACKING_URI = http://{address}: no MLflow server answers there" in warning
    kept = "".join(p.read_text() for p in Path(".cnnpipe/outbox").rglob("*.json"))
    assert "val/loss" in kept and "secret" not in warning + kept
    # What is for another tracker is neither sent here nor lost.
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with tracking.start_run("x", {}):
        pass
    assert kept == "".join(p.read_text() for p in Path(".cnnpipe/outbox").rglob("*.json"))
    shutil.rmtree(".cnnpipe/outbox")


def test_a_server_that_is_slow_from_the_start_is_asked_no_more_than_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path.partition("?")[0])
            time.sleep(0.6)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"experiment": {"experiment_id": "1", "lifecycle_stage": "active"}}')

        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_error(503)

        def log_message(self, *arguments: object) -> None:
            pass

    monkeypatch.setattr(mlflow_store, "SLOW_S", 1)
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        with tracking.start_run("x", {}) as run:
            run.log_metrics({"val/loss": 1.0}, step=1)
            assert asked == ["/health", "/api/2.0/mlflow/experiments/get-by-name"]
        server.shutdown()
    assert capsys.readouterr().err.count("MLflow takes 1 s to answer; what is logged is kept") == 1
    assert [folder.name for folder in outbox()] == [run.id]
    shutil.rmtree(".cnnpipe/outbox")


def test_a_real_server_that_comes_up_later_is_told_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    server = Server(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    with tracking.start_run("x", {}) as run:
        log_everything(run, model)
    assert [folder.name for folder in outbox()] == [run.id]
    server.start()
    try:
        with tracking.reopen_run(run.id, "x") as again:
            assert again.id != run.id
        assert_everything_is_there_once(again.id)
        assert len(runs()) == 1
    finally:
        server.signal(signal.SIGKILL)
    assert outbox() == []


def test_an_experiment_that_was_deleted_meanwhile_does_not_end_the_training(
    away: Callable[[bool], None],
) -> None:
    mlflow_store.prepare_store()
    experiment = client().get_experiment_by_name(mlflow_store.EXPERIMENT)
    away(True)
    with tracking.start_run("x", {}) as run:
        run.log_metrics({"val/loss": 1.0}, step=1)
        away(False)
        client().delete_experiment(experiment.experiment_id)
    client().restore_experiment(experiment.experiment_id)
    with tracking.reopen_run(run.id, "x") as again:
        assert points(again.id) == [(1, 1.0)]


def test_a_slow_tracker_is_asked_once_and_told_the_rest_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mlflow_store, "SLOW_S", 0)
    with tracking.start_run("x", {}) as run:
        run.log_metrics({"val/loss": 1.0}, step=1)
        run.log_metrics({"val/loss": 0.5}, step=2)
        assert points(run.id) == [(1, 1.0)]
    assert points(run.id) == [(1, 1.0), (2, 0.5)]
    assert capsys.readouterr().err.count("to answer; what is logged is kept") == 1


def test_what_mlflow_refuses_is_said_and_keeps_nothing_else_back(
    away: Callable[[bool], None], capsys: pytest.CaptureFixture[str]
) -> None:
    for is_away in (False, True):
        with tracking.start_run("x", {}) as run:
            away(is_away)
            run.log_params({"a": 1})
            for other in (2, 3):  # which MLflow lets nobody change
                run.log_params({"a": other})
            run.log_params({"b": 1})
            run.log_metrics({"val/loss": 1.0}, step=1)
            run.log_metrics({"no such name!": 1.0}, step=1)
            run.log_metrics({"val/loss": 0.5}, step=2)
            away(False)
        assert client().get_run(run.id).data.params == {"a": "1", "b": "1"}
        assert points(run.id) == [(1, 1.0), (2, 0.5)]
        refused = capsys.readouterr().err.count("warning: MLflow refuses a ")
        assert refused == (3 if is_away else 1)  # while the run is at work, the first alone
    assert outbox() == []


@pytest.mark.parametrize(
    ("to", "request_"),
    [(Tracker, "create_run"), (Tracker, "log_batch"), (Tracker, "log_inputs"),
     (Tracker, "create_logged_model"), (Tracker, "log_outputs"), (Tracker, "update_run_info"),
     (Tracker, "finalize_logged_model"), (Registry, "create_model_version")],
)  # fmt: skip
def test_a_request_whose_answer_is_lost_is_not_done_twice(
    model: Path, monkeypatch: pytest.MonkeyPatch, to: type, request_: str
) -> None:
    mlflow_store.prepare_store()
    before = {run.info.run_id for run in runs()}
    answer = getattr(to, request_)
    lost: list[str] = []

    def lose_one(self: object, *arguments: object, **more: object) -> object:
        result = answer(self, *arguments, **more)
        if not lost and threading.current_thread() is threading.main_thread():
            lost.append(request_)
            raise MlflowException("connection reset")
        return result

    monkeypatch.setattr(to, request_, lose_one)
    with tracking.start_run("x", {}) as run:
        log_everything(run, model)
    with tracking.start_run("another", {}) as another:
        pass
    assert lost
    (found,) = [r for r in runs() if r.info.run_id not in before | {another.id}]
    assert_everything_is_there_once(found.info.run_id)
    logged = client().search_logged_models(
        [found.info.experiment_id], f"source_run_id = '{found.info.run_id}'"
    )
    assert [model.status for model in logged] == ["READY"]
    assert outbox() == []


def test_what_mlflow_can_never_take_holds_nothing_else_back(
    away: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    away(True)
    with tracking.start_run("x", {}) as run:
        run.warn("train", ["x"])
    with tracking.start_run("y", {}) as later:
        later.log_metrics({"val/loss": 1.0}, step=1)
    away(False)

    def fail(*arguments: object) -> None:
        raise MlflowException("no room for tags")

    monkeypatch.setattr(mlflow.MlflowClient, "set_tag", fail)
    capsys.readouterr()
    with tracking.start_run("another", {}) as another:
        assert another.experiment_id
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "no room for tags" in warnings[0] and run.id in warnings[0]
    assert [folder.name for folder in outbox()] == [run.id]
    with tracking.reopen_run(later.id, "y") as again:
        assert points(again.id) == [(1, 1.0)]
    shutil.rmtree(outbox()[0])


@pytest.mark.parametrize("taken", [False, True])
def test_what_was_being_sent_at_an_interrupt_is_sent_once_more_with_the_end(taken: bool) -> None:
    log_batch = mlflow.MlflowClient.log_batch

    def hang(*arguments: Any, **more: Any) -> None:
        if taken:
            log_batch(*arguments, **more)
        raise KeyboardInterrupt

    with (
        suppress(KeyboardInterrupt),
        tracking.start_run("x", {}) as run,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(tracking, "is_remote", lambda: True)  # only there it is a wait
        patch.setattr(mlflow.MlflowClient, "log_batch", hang)
        run.log_metrics({"val/loss": 1.0}, step=1)
    assert points(run.id) == [(1, 1.0)]
    assert client().get_run(run.id).info.status == "KILLED"
    assert outbox() == []


def test_a_signal_that_waited_for_the_store_ends_the_run_there_as_killed() -> None:
    with suppress(KeyboardInterrupt), tracking.start_run("x", {}) as run:
        send = tracking._Target._send

        def interrupted(self: tracking._Target, *arguments: Any) -> None:
            send(self, *arguments)
            tracking._Target._send = send  # type: ignore[method-assign]
            signal.raise_signal(signal.SIGINT)

        tracking._Target._send = interrupted  # type: ignore[method-assign]
        run.log_params({"a": 1})
    assert client().get_run(run.id).info.status == "KILLED"
    assert outbox() == []


@pytest.mark.parametrize("uri", ["file:./mlruns", "mlruns", "nonsense://x"])
def test_a_store_that_mlflow_cannot_use_ends_the_run_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=f"store {uri} cannot be used"), tracking.start_run("x", {}):
        pass


def test_another_password_is_no_other_tracker(tmp_path: Path) -> None:
    folders = [shown_address(f"http://{who}127.0.0.1:5000/") for who in ("", "me:a@", "me:b@")]
    assert set(folders) == {"http://127.0.0.1:5000"}


def test_data_are_logged_with_digest_and_class_counts() -> None:
    table = pd.DataFrame({"path": ["a", "b", "c"], "label": ["cat", "dog", "cat"]})
    with tracking.start_run("x", {}) as run:
        run.log_data(table, "data/inbox", "folder", "0123456789abcdef", "train")
    (entry,) = client().get_run(run.id).inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("folder", "0123456789abcdef")
    tags = {tag.key: tag.value for tag in entry.tags}
    assert tags["images.cat"] == "2"
    assert tags["images.dog"] == "1"


def test_a_model_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="models:/nothing/1: no such model"):
        registry.find_model_file("models:/nothing/1")


def test_the_digest_changes_with_the_content_and_the_order(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("1")
    b.write_text("2")
    assert digest(a, b) != digest(b, a)
    before = digest(a, b)
    b.write_text("3")
    assert digest(a, b) != before


def test_a_deleted_experiment_says_how_to_get_it_back(store: Path) -> None:
    experiment = mlflow_store.prepare_store() and client().get_experiment_by_name(
        mlflow_store.EXPERIMENT
    )
    client().delete_experiment(experiment.experiment_id)
    try:
        with pytest.raises(UserError, match="mlflow experiments restore"):
            mlflow_store.prepare_store()
    finally:
        client().restore_experiment(experiment.experiment_id)


def test_telemetry_is_off() -> None:
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["DO_NOT_TRACK"] == "true"


def test_an_image_that_the_run_has_is_not_sent_again() -> None:
    Figure().savefig("picture.png")
    with tracking.start_run("x", {}) as run:
        run.log_image("picture.png", "test/mistakes")
    with tracking.reopen_run(run.id, "x") as again:
        again.log_image("picture.png", "test/mistakes")
        again.log_image("picture.png", "test/mistakes too")
    paths = [f.path for f in client().list_artifacts(run.id, "images")]
    keys = sorted(path.partition("+step")[0] for path in paths)
    assert keys == ["images/test~mistakes"] * 2 + ["images/test~mistakes too"] * 2


def test_the_experiment_has_a_view_for_sweeps_also_one_from_before(tmp_path: Path) -> None:
    mlflow_store.prepare_store()
    experiment = client().get_experiment_by_name(mlflow_store.EXPERIMENT)
    assert experiment.tags[sweep_view.KEY] == sweep_view.view()
    client().delete_experiment_tag(experiment.experiment_id, sweep_view.KEY)
    mlflow_store.prepare_store()
    experiment = client().get_experiment_by_name(mlflow_store.EXPERIMENT)
    assert experiment.tags[sweep_view.KEY] == sweep_view.view()
    head, _, packed = sweep_view.view().partition(";")
    assert head == "deflate" and len(sweep_view.view()) < 5000  # the most that a tag may be long
    state = json.loads(zlib.decompress(base64.b64decode(packed)))
    sections = {section["uuid"] for section in state["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == sections
    uuids = [chart["uuid"] for chart in state["compareRunCharts"]]
    assert len(set(uuids)) == len(uuids) == 9
