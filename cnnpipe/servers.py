"""`cnnpipe up`: the MLflow and Prefect servers and the process that serves the flow, together."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import requests

from cnnpipe import mlflow_store
from cnnpipe.errors import RunFailed, UserError
from cnnpipe.workspace import repository_root

HOST = "127.0.0.1"
_DEFAULT_PREFECT_PORT = 4200  # where a flow looks for the server
_START_TIMEOUT_S = 90
_STOP_TIMEOUT_S = 10


def serve(mlflow_port: int, prefect_port: int) -> int:
    """Starts everything, prints where it is, and stops everything at Ctrl-C or SIGTERM.

    Returns:
        The exit code, 0.

    Raises:
        UserError: a port is taken.
        RunFailed: a server does not start, or ends by itself.
    """
    if mlflow_port == prefect_port:
        raise UserError(f"--mlflow-port and --prefect-port are both {mlflow_port}: take two ports")
    for port, option in ((mlflow_port, "--mlflow-port"), (prefect_port, "--prefect-port")):
        _check_free(port, option)
    root = repository_root()
    # The tables and the experiment first: two processes that make them get in each other's way.
    store = mlflow_store.prepare_store()
    mlflow_url, prefect_url = f"http://{HOST}:{mlflow_port}", f"http://{HOST}:{prefect_port}"
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # Eight processes fewer and a start three times as fast; cnnpipe has no use for its jobs.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PREFECT_HOME": str(root / ".cnnpipe" / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # Without it the UI looks for the API at the default port.
        "PREFECT_API_URL": f"{prefect_url}/api",
    }
    mlflow = ["mlflow", "server", "--host", HOST, "--port", str(mlflow_port), "--workers", "1",
              "--backend-store-uri", store,
              "--artifacts-destination", str(mlflow_store.local_artifacts())]  # fmt: skip
    prefect = ["prefect", "server", "start", "--host", HOST, "--port", str(prefect_port)]
    children: list[_Child] = []
    try:
        children.append(_Child("MLflow", mlflow, env, root))
        children.append(_Child("Prefect", prefect, env, root))
        children[0].wait_for(lambda: _answers(f"{mlflow_url}/health"))
        children[1].wait_for(lambda: _answers(f"{prefect_url}/api/health"))
        children.append(_Child("flow", ["flows.pipeline", "--serve"], env, root))
        flow = children[-1]
        flow.wait_for(lambda: "is being served" in flow.log.read_text())
        print(f"MLflow    {mlflow_url}")
        print(f"Prefect   {prefect_url}   (the deployment is called pipeline)")
        print("Ctrl-C stops both.", flush=True)
        if prefect_port != _DEFAULT_PREFECT_PORT:
            print(f"In other terminals: export PREFECT_API_URL={prefect_url}/api", flush=True)
        while True:
            for child in children:
                child.check()
            time.sleep(0.5)
    except KeyboardInterrupt:
        return 0
    finally:
        _stop(children)


class _Child:
    """A process in a group of its own, so that Ctrl-C is ours to pass on; its output in a log."""

    def __init__(self, name: str, module: list[str], env: dict[str, str], root: Path) -> None:
        self.name = name
        self.log = root / ".cnnpipe" / "logs" / f"{name.lower()}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
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
        code = self.process.poll()
        if code is not None:
            raise RunFailed(f"{self.name} ended with exit code {code}: see {self.log}")

    def wait_for(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise RunFailed(f"{self.name} is not up after {_START_TIMEOUT_S} s: see {self.log}")
            time.sleep(0.2)

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def _stop(children: list[_Child]) -> None:
    """Ends the processes and theirs, the last started first; insists where asking is not enough."""
    for child in reversed(children):
        child.signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.process.wait(_STOP_TIMEOUT_S)
        child.signal(signal.SIGKILL)  # and whatever of its group is left
        child.process.wait()


def _check_free(port: int, option: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"port {port} cannot be used ({error}): choose another with {option}"
            ) from None


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.RequestException:
        return False
