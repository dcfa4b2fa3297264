"""MLflow down, killed, hanging, slow or locked: a training goes on, and nothing is missed."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import mlflow
import requests

from benchmarks.drills.drill import (
    Drill,
    compared,
    environment,
    repository,
    run,
    start,
    wait_for_checkpoint,
)

EPOCHS = 60
_SLOW_S = 6


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """MLflow's own server, in a process that can be ended and begun again."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.store = f"sqlite:///{place / 'server.db'}"
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once it answers."""
        env = environment(
            self.place, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
            MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true",
        )  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port",
             str(self.port), "--workers", "1", "--backend-store-uri", self.store,
             "--artifacts-destination", str(self.place / "artifacts")],
            cwd=self.place, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        while True:
            with suppress(requests.RequestException):
                if requests.get(f"{self.address}/health", timeout=1).ok:
                    return
            time.sleep(0.2)

    def signal(self, number: int) -> None:
        """To it and its workers."""
        if self.process is not None:
            os.killpg(self.process.pid, number)
            if number == signal.SIGKILL:
                self.process.wait()
                self.process = None


@contextmanager
def served(**settings: object) -> Iterator[tuple[Path, Server]]:
    """A repository that stands before its training, and a server that is not started yet."""
    with repository(train__epochs=EPOCHS, **settings) as place:
        run(place, "dvc", "repro", "split").check_returncode()
        server = Server(place)
        try:
            yield place, server
        finally:
            server.signal(signal.SIGKILL)


@contextmanager
def slow(server: Server) -> Iterator[str]:
    """The address of a go-between that gives each answer after some seconds."""

    class Handler(BaseHTTPRequestHandler):
        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer = requests.request(
                self.command, server.address + self.path, data=body, timeout=60,
                headers={"Content-Type": self.headers.get("Content-Type", "")},
            )  # fmt: skip
            time.sleep(_SLOW_S)
            with suppress(OSError):  # whoever asked may have gone
                self.send_response(answer.status_code)
                self.send_header("Content-Type", answer.headers.get("Content-Type", ""))
                self.send_header("Content-Length", str(len(answer.content)))
                self.end_headers()
                self.wfile.write(answer.content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as between:
        Thread(target=between.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{between.server_port}"
        between.shutdown()


def seen(place: Path, store: str, trained: subprocess.Popen[str], uri: str) -> str:
    """Lets the training end, evaluates, and compares what MLflow has with what it should have."""
    code = trained.wait()
    log = (place / "log").read_text()
    warnings = log.count("what is logged is kept in .cnnpipe/outbox")
    evaluated = run(place, "cnnpipe", "evaluate", MLFLOW_TRACKING_URI=uri)
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("cnnpipe")
    runs = client.search_runs([experiment.experiment_id]) if experiment else []
    first = runs[0] if runs else None
    points = client.get_metric_history(first.info.run_id, "val/loss") if first else []
    return compared(
        **{f"training ends well but {code}": code == 0},
        **{f"one warning but {warnings}": warnings == 1},
        **{f"evaluate ends well but {evaluated.stderr}": evaluated.returncode == 0},
        **{f"one run but {len(runs)}": len(runs) == 1},
        finished=bool(first and first.info.status == "FINISHED"),
        each_point_once=sorted(p.step for p in points) == list(range(1, EPOCHS + 1)),
        points_at_the_time_of_their_epochs=len({p.timestamp for p in points}) > EPOCHS // 2,
        parameters_and_inputs=bool(first and len(first.data.params) > 40
                                   and len(first.inputs.dataset_inputs) == 3),
        evaluation=bool(first and "test/accuracy" in first.data.metrics),
        pictures=bool(first and {"train/curves.png", "train/samples.png"} <= {
            f.path for f in client.list_artifacts(first.info.run_id, "train")}),
        registered_once=len(client.search_model_versions("name = 'cnnpipe'")) == 1,
        nothing_waits=not list(place.glob(".cnnpipe/outbox/*/*/entry.json")),
    )  # fmt: skip


def amid(fault: Callable[[Server], None], back: Callable[[Server], None]) -> str:
    """The fault once the training is at work, and its end after it."""
    with served() as (place, server):
        server.start()
        trained = start(place, "cnnpipe", "train", MLFLOW_TRACKING_URI=server.address)
        wait_for_checkpoint(place, trained)
        fault(server)
        trained.wait()
        back(server)
        return seen(place, server.address, trained, server.address)


def down_at_start() -> str:
    """Nobody listens until the training has ended."""
    with served() as (place, server):
        trained = start(place, "cnnpipe", "train", MLFLOW_TRACKING_URI=server.address)
        trained.wait()
        server.start()
        return seen(place, server.address, trained, server.address)


def interrupted_while_hanging() -> str:
    """Ctrl-C to a training whose tracker hangs, and on with it once that answers."""
    with served() as (place, server):
        server.start()
        trained = start(place, "cnnpipe", "train", MLFLOW_TRACKING_URI=server.address)
        wait_for_checkpoint(place, trained)
        server.signal(signal.SIGSTOP)
        time.sleep(2)
        asked = time.monotonic()
        trained.send_signal(signal.SIGINT)
        code = trained.wait()
        seconds = time.monotonic() - asked
        server.signal(signal.SIGCONT)
        if code != 130 or seconds > 5:
            return f"code {code} after {seconds:.1f} s"
        again = start(place, "cnnpipe", "train", MLFLOW_TRACKING_URI=server.address)
        # That it was away was said by the first of the two.
        code = again.wait()
        (place / "log").write_text("what is logged is kept in .cnnpipe/outbox")
        return seen(place, server.address, again, server.address)


def always_slow() -> str:
    """A tracker that takes 6 seconds for each answer; evaluated once it is quick again."""
    with served() as (place, server):
        server.start()
        with slow(server) as address:
            trained = start(place, "cnnpipe", "train", MLFLOW_TRACKING_URI=address)
            trained.wait()
            # The same address, so that what is for it is sent: now without a delay.
            global _SLOW_S
            before, _SLOW_S = _SLOW_S, 0
            try:
                return seen(place, server.address, trained, address)
            finally:
                _SLOW_S = before


def locked() -> str:
    """Somebody keeps the database of the default store locked during the whole training."""
    with served() as (place, _):
        store = f"sqlite:///{place / 'mlflow.db'}"
        mlflow.MlflowClient(store).search_experiments()  # makes it
        other = sqlite3.connect(place / "mlflow.db", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        trained = start(place, "cnnpipe", "train")
        trained.wait()
        other.execute("ROLLBACK")
        other.close()
        return seen(place, store, trained, store)


_EXPECTED = "code 0, one warning; then one whole run, nothing doubled"
DRILLS = [
    Drill("mlflow-down", "MLflow is down when the training starts", _EXPECTED, down_at_start),
    Drill(
        "mlflow-killed",
        "MLflow's server is killed -9 amid a training",
        _EXPECTED,
        lambda: amid(lambda server: server.signal(signal.SIGKILL), lambda server: server.start()),
    ),
    Drill(
        "mlflow-hangs",
        "MLflow's server hangs amid a training",
        _EXPECTED,
        lambda: amid(
            lambda server: server.signal(signal.SIGSTOP),
            lambda server: server.signal(signal.SIGCONT),
        ),
    ),
    Drill(
        "mlflow-hangs-sigint",
        "Ctrl-C while MLflow's server hangs",
        "code 130 within 5 s; then one whole run, nothing doubled",
        interrupted_while_hanging,
    ),
    Drill("mlflow-slow", f"MLflow takes {_SLOW_S} s for each answer", _EXPECTED, always_slow),
    Drill("mlflow-locked", "MLflow's SQLite file is locked", _EXPECTED, locked),
]
