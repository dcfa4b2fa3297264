"""`cnnpipe up`: the MLflow and Prefect servers, and the worker that runs the deployments, together.

A server that MLFLOW_TRACKING_URI or PREFECT_API_URL names is somebody else's: it is used, and not
started.
"""

import os
import shlex
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
import requests

from cnnpipe import guard, mlflow_store, running
from cnnpipe.errors import RunFailed, UserError
from cnnpipe.running import shown_address
from cnnpipe.workspace import locked, repository_root

HOST = "127.0.0.1"
_START_TIMEOUT_S = 90
_AT_WORK_S = 10
"""After so long a worker has begun well; one that ends sooner would do so again."""


def serve(mlflow_port: int, prefect_port: int) -> int:
    """Starts what is missing, prints where all is, and stops it at Ctrl-C or SIGTERM.

    Returns:
        The exit code, 0.

    Raises:
        UserError: a port is taken.
        RunFailed: it runs already in this folder, a server that is somebody else's does not
            answer, or one does not start, or ends by itself.
    """
    root = repository_root()
    if there := running.find():
        raise RunFailed(
            f"`cnnpipe up` runs already in this folder, as process {there.pid}: MLflow on "
            f"{there.mlflow}, Prefect on {_ui(there.prefect_api)}; `kill {there.pid}` stops it"
        )
    mlflow_url, prefect_api = _remote("MLFLOW_TRACKING_URI"), _remote("PREFECT_API_URL")
    with locked(root / ".cnnpipe" / "up.lock", "`cnnpipe up` in this folder"):
        if prefect_api and not _answers(f"{prefect_api}/health"):
            raise RunFailed(
                f"PREFECT_API_URL = {shown_address(prefect_api)}: no Prefect server answers there: "
                "start it, or unset the variable to have one started here"
            )
        with suppress(KeyboardInterrupt), _guarded(root) as start:
            _check_free(
                ({} if mlflow_url else {"--mlflow-port": mlflow_port})
                | ({} if prefect_api else {"--prefect-port": prefect_port})
            )
            _progress("starting, which takes a quarter of a minute")
            _run(start, mlflow_url, mlflow_port, prefect_api, prefect_port)
    _progress("all is stopped")
    return 0


def _run(
    start: "_Start", mlflow_url: str, mlflow_port: int, prefect_api: str, prefect_port: int
) -> None:
    """Starts those servers that have no address yet, and the worker; returns never."""
    children = []
    store = _store()
    is_local = store == mlflow_store.local_store()
    if mlflow_url or is_local:
        # The tables and the experiment first: two that make them get in each other's way.
        mlflow_store.prepare_store()
    if not mlflow_url:
        mlflow_url = f"http://{HOST}:{mlflow_port}"
        children.append(start(
            "MLflow",
            ["mlflow", "server", "--host", HOST, "--port", str(mlflow_port), "--workers", "1"],
            # No option, since all users of the machine see those: it may hold a password.
            MLFLOW_BACKEND_STORE_URI=store,
        ))  # fmt: skip
    if not prefect_api:
        prefect_api = f"http://{HOST}:{prefect_port}/api"
        command = ["prefect", "server", "start", "--host", HOST, "--port", str(prefect_port)]
        # Without the address the UI looks for the API at the default port.
        children.append(start("Prefect", command, PREFECT_API_URL=prefect_api))
    start_worker = partial(start, "worker", ["flows.worker", "--wait"],
                           MLFLOW_TRACKING_URI=mlflow_url, PREFECT_API_URL=prefect_api)  # fmt: skip
    children.append(start_worker())
    log = children[-1].log
    _wait_for("MLflow", children, lambda: _answers(f"{mlflow_url}/health"))
    if not is_local:
        # By the server itself, to which every host can then send what its runs have made.
        os.environ["MLFLOW_TRACKING_URI"] = mlflow_url
        mlflow_store.prepare_store()
    _wait_for("Prefect", children, lambda: _answers(f"{prefect_api}/health"))
    _wait_for("worker", children, lambda: "started!" in log.read_text(errors="replace"))
    said = shown_address(mlflow_url), shown_address(prefect_api)
    running.note(*said, {child.name: child.process.pid for child in children})
    _tell(*said, is_local)
    while True:
        if children[
            -1
        ].has_ended_late():  # a run took all memory, say: no reason to end the servers
            print(f"warning: {children[-1].ended()}; it is started again", file=sys.stderr)
            children[-1] = start_worker()
            running.note(*said, {child.name: child.process.pid for child in children})
        for child in children:
            child.check()
        time.sleep(0.5)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


def _tell(mlflow_url: str, prefect_api: str, is_local: bool) -> None:
    print(f"MLflow    {mlflow_url}")
    print(f"Prefect   {_ui(prefect_api)}")
    print("Ctrl-C stops them.")
    tracked = "" if is_local else f" MLFLOW_TRACKING_URI={mlflow_url}"
    print(f"In other terminals: export PREFECT_API_URL={prefect_api}{tracked}", flush=True)


class _Child:
    """A process in a group of its own, so that Ctrl-C is ours to pass on; its output in a log."""

    def __init__(self, name: str, module: list[str], env: dict[str, str], root: Path) -> None:
        self.name = name
        self.log = root / ".cnnpipe" / "logs" / f"{name.lower()}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._started = time.monotonic()
        with suppress(FileNotFoundError):
            self.log.replace(self.log.with_suffix(".before.log"))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *module],
                cwd=root,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def check(self) -> None:
        """Raises `RunFailed` where the process has ended."""
        if self.process.poll() is not None:
            lines = self.log.read_text(errors="replace").splitlines()
            said = [line for line in lines if line.startswith("cnnpipe: ")]
            raise RunFailed(said[-1].removeprefix("cnnpipe: ") if said else self.ended())

    def ended(self) -> str:
        """That it has ended, and where to read on."""
        return f"{self.name} ended with exit code {self.process.poll()}: see {self.log}"

    def has_ended_late(self) -> bool:
        """Whether it has ended, though it was able to run."""
        running_s = time.monotonic() - self._started
        return self.process.poll() is not None and running_s > _AT_WORK_S


def _wait_for(name: str, children: list[_Child], ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not ready():
        for child in children:
            child.check()
        if time.monotonic() > deadline:
            raise RunFailed(f"{name} is not up after {_START_TIMEOUT_S} s: see .cnnpipe/logs")
        time.sleep(0.2)


_Start = Callable[..., _Child]


@contextmanager
def _guarded(root: Path) -> Iterator[_Start]:
    """A function that starts a process; whatever it has started ends with the block, or with us."""
    mark = uuid.uuid4().hex
    env = {
        **os.environ,
        guard.VARIABLE: mark,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # Eight processes fewer and a start three times as fast; cnnpipe has no use for its jobs.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_ARTIFACTS_DESTINATION": os.environ.get(
            "MLFLOW_ARTIFACTS_DESTINATION", str(mlflow_store.local_artifacts())
        ),
        "PREFECT_HOME": str(root / ".cnnpipe" / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    watcher = subprocess.Popen(
        [sys.executable, "-m", "cnnpipe.guard", mark],
        cwd=root,
        stdin=subprocess.PIPE,  # which ends when this process does
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        start_new_session=True,
    )
    assert watcher.stdin is not None and watcher.stdout is not None
    to_watcher, from_watcher = watcher.stdin, watcher.stdout
    children: list[_Child] = []

    def start(name: str, module: list[str], **variables: str) -> _Child:
        child = _Child(name, module, {**env, **variables}, root)
        children.append(child)
        to_watcher.write(f"{name} {child.process.pid}\n")
        return child

    try:
        if from_watcher.readline() != "ready\n":
            raise RunFailed(f"cnnpipe.guard ended with exit code {watcher.wait()}")
        yield start
    finally:
        running.forget()
        to_watcher.close()
        while watcher.poll() is None:
            for child in children:
                child.process.poll()  # what has ended, and is not asked for, is there still
            time.sleep(0.05)
        for child in children:
            child.process.wait()


def _remote(variable: str) -> str:
    """The address of a server that is somebody else's; empty where the variable names none."""
    address = os.environ.get(variable, "")
    return address.rstrip("/") if address.startswith(("http://", "https://")) else ""


def _store() -> str:
    """Where the MLflow server keeps its records: as its own variable says, or as cnnpipe's does."""
    named = os.environ.get("MLFLOW_BACKEND_STORE_URI") or os.environ.get("MLFLOW_TRACKING_URI")
    return named or mlflow_store.local_store()


def _check_free(ports: dict[str, int]) -> None:
    """Raises `UserError` where one cannot be listened on: by whom it is taken, and what is free."""
    problems = {option: _problem(port) for option, port in ports.items()}
    if len(set(ports.values())) < len(ports):
        problems |= {"--prefect-port": f"port {ports['--prefect-port']} is to be both servers'"}
    if not any(problems.values()):
        return
    free: dict[str, int] = {}
    for option, port in ports.items():
        while (
            (problems[option] and port == ports[option]) or port in free.values() or _problem(port)
        ):
            port = port + 1 if port < 65535 else 1024
        free[option] = port
    options = " ".join(f"{option} {port}" for option, port in free.items())
    said = "; ".join(problem for problem in problems.values() if problem)
    raise UserError(f"{said}: use `cnnpipe up {options}`")


def _problem(port: int) -> str:
    """Why the port cannot be listened on; empty where it can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            holder = _holder(port)
            if holder is None:
                return f"port {port} cannot be used ({error})"
            command = shlex.join(holder.cmdline())[:120]
            return f"port {port} is taken by process {holder.pid} (`{command}`)"
    return ""


def _holder(port: int) -> psutil.Process | None:
    """The process that listens on the port, as far as we may know."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return process
    return None


def _ui(prefect_api: str) -> str:
    return prefect_api.removesuffix("/api")


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.RequestException:
        return False
