"""A copy of this repository as a DVC project of its own, and a Prefect server."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

ROOT = Path(__file__).parents[2]

# The article's network on a few digits: seconds a stage.
PARAMS = """
base: {seed: 1}
download:  # in a line of its own each, or DVC would write a URL into it that it cannot read again
  source: digits
  folder: data/inbox
  url: null
  sha256: null
  limit_per_class: 20
resize: {size: 12, mode: stretch, color: grey, max_pixels: 1000000, workers: 1}
split: {val: 0.2, test: 0.2}
model: {architecture: article, filters: 4, kernel_size: 3}
train: {epochs: 1, batch_size: 32, device: cpu}
evaluate: {mistakes: 4}
"""


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("home")
    dropped = ("DVC_ROOT", "DVC_EXP_NAME", "MLFLOW_TRACKING_URI", "PREFECT_API_URL")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return {
        **kept,
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "OMP_NUM_THREADS": "1",
        **{f"GIT_{who}_{what}": "test" for who in ("AUTHOR", "COMMITTER")
           for what in ("NAME", "EMAIL")},
    }  # fmt: skip


Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("project") / "copy"
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in names.strip("\0").split("\0"):
        if (ROOT / name).exists() and not name.startswith("tests/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "params.yaml").write_text(PARAMS)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "start"]):
        subprocess.run(["git", *command], cwd=folder, env=environment, check=True)
    return folder


@pytest.fixture(scope="module")
def call(project: Path, environment: dict[str, str]) -> Call:
    """Runs a command in the project and returns what became of it, its output in one string."""

    def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=project,
            env={**environment, **variables},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    return run


# A process for each line, that has loaded already what all of them need: it takes seconds.
FORKED = """
import json, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import cnnpipe.registry, flows.pipeline, flows.predict, flows.sweep
for line in sys.stdin:
    if not os.fork():
        break
    print("\\nEXIT CODE", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
else:
    sys.exit()
code, sys.argv = json.loads(line)
exec(code)
"""


@pytest.fixture(scope="module")
def fork(project: Path, environment: dict[str, str], prefect_api: str) -> Iterator[Call]:
    """As `call`, of Python code with its arguments, which knows the Prefect server."""
    server = subprocess.Popen(
        [sys.executable, "-c", FORKED], cwd=project, text=True,
        env={**environment, "PREFECT_API_URL": prefect_api},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert server.stdin is not None and server.stdout is not None
    to_server, from_server = server.stdin, server.stdout

    def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        to_server.write(json.dumps([code, ["-c", *arguments]]) + "\n")
        to_server.flush()
        output = ""
        for line in from_server:
            if line.startswith("EXIT CODE "):
                return subprocess.CompletedProcess(code, int(line.split()[-1]), output)
            output += line
        raise AssertionError(output)

    yield run
    to_server.close()
    server.wait(timeout=60)


@pytest.fixture(scope="module")
def last_status(project: Path) -> Callable[[], str]:
    """The status of the latest run in the project's MLflow."""

    def status() -> str:
        with closing(sqlite3.connect(project / "mlflow.db")) as store:
            query = "SELECT status FROM runs ORDER BY start_time DESC LIMIT 1"
            return str(store.execute(query).fetchone()[0])

    return status


@pytest.fixture(scope="session")
def prefect_api(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address of a real Prefect server's API."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    api = f"http://127.0.0.1:{port}/api"
    log = tmp_path_factory.mktemp("prefect") / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)],
            env={
                **environment,
                "PREFECT_API_URL": api,
                "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "1",
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until(lambda: answers(f"{api}/health"), lambda: server.poll() is None, log)
        yield api
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


@pytest.fixture(scope="session")
def prefect(prefect_api: str) -> Iterator[SyncPrefectClient]:
    """A client of that server."""
    with (
        temporary_settings({PREFECT_API_URL: prefect_api}),
        get_client(sync_client=True) as client,
    ):
        yield client


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5):
            return True
    except (URLError, OSError):
        return False


def wait_until(done: Callable[[], bool], alive: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not done():
        assert alive(), log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
