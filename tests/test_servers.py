"""`cnnpipe up` for real: the servers answer, the flows are deployed, and nothing is left behind."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from standins import write_flows

from cnnpipe import running

ROOT = Path(__file__).parents[1]
CNNPIPE = Path(sys.executable).with_name("cnnpipe")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**variables: str) -> dict[str, str]:
    dropped = ("DVC_ROOT", "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME")
    return {key: value for key, value in os.environ.items() if key not in dropped} | variables


Up = subprocess.Popen[str]
Start = Callable[..., Up]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "flows", folder / "flows")
    shutil.copy(ROOT / "prefect.yaml", folder)
    (folder / "params.yaml").write_text("{}")
    write_flows(folder)
    return folder


@pytest.fixture(scope="module")
def ports() -> tuple[int, int]:
    return free_port(), free_port()


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts `cnnpipe up` in a folder; it is stopped in the end if it is not by then."""
    started: list[Up] = []

    def begin(folder: Path, ports: tuple[int, int], **variables: str) -> Up:
        options = ["--mlflow-port", str(ports[0]), "--prefect-port", str(ports[1])]
        process = subprocess.Popen(
            [CNNPIPE, "up", *options],
            cwd=folder, env=environment(**variables), text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        process.terminate()
        process.communicate(timeout=60)


def said(process: Up) -> list[str]:
    """The lines that it prints when all is up."""
    assert process.stdout is not None
    lines = []
    while not lines or not lines[-1].startswith("Ctrl-C"):
        lines.append(process.stdout.readline())
        assert lines[-1], process.communicate()
    return lines


def descendants(process: Up) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children(recursive=True)]


def ended(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=60)
    return alive == []


def post(port: int, path: str, **content: Any) -> Any:
    def ask() -> Any:
        answer = requests.post(f"http://127.0.0.1:{port}/api{path}", json=content, timeout=30)
        # Its database may be busy. (An answer that is no success is false by itself.)
        return (answer,) if answer.status_code != 503 else ()

    (answer,) = wait_for(ask)
    answer.raise_for_status()
    return answer.json()


def deployments(port: int) -> dict[str, Any]:
    return {one["name"]: one for one in post(port, "/deployments/filter")}


def wait_for(done: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while not (result := done()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return result


def state(port: int, run: str) -> str:
    with suppress(requests.RequestException):
        answer = requests.get(f"http://127.0.0.1:{port}/api/flow_runs/{run}", timeout=30)
        return str(answer.json()["state"]["name"])
    return ""


def test_up_serves_on_loopback_what_it_says_and_ctrl_c_stops_all_also_a_flow_that_runs(
    project: Path, ports: tuple[int, int], start: Start
) -> None:
    mlflow_port, prefect_port = ports
    process = start(project, ports)
    lines = said(process)
    assert f"http://127.0.0.1:{mlflow_port}" in lines[0]
    assert f"http://127.0.0.1:{prefect_port}" in lines[1]

    experiment = requests.get(
        f"http://127.0.0.1:{mlflow_port}/api/2.0/mlflow/experiments/get-by-name",
        params={"experiment_name": "cnnpipe"},
    ).json()["experiment"]
    assert experiment["artifact_location"].endswith("/mlartifacts")
    ui = requests.get(f"http://127.0.0.1:{prefect_port}/ui-settings").text
    assert re.search(rf'"api_url": ?"http://127\.0\.0\.1:{prefect_port}/api"', ui)
    there = deployments(prefect_port)
    assert {name: one["entrypoint"].rpartition(":")[2] for name, one in there.items()} == {
        "pipeline": "pipeline", "train-nightly": "pipeline", "train-on-new-images": "pipeline",
        "sweep": "sweep", "score-inbox": "predict",
    }  # fmt: skip
    limit = requests.get(f"http://127.0.0.1:{prefect_port}/api/v2/concurrency_limits/gpu").json()
    assert limit["limit"] == 1

    run = post(prefect_port, f"/deployments/{there['sweep']['id']}/create_flow_run",
               parameters={"seconds": 600}, state={"type": "SCHEDULED"})["id"]  # fmt: skip
    wait_for(lambda: state(prefect_port, run) == "Running")
    children = descendants(process)
    listening = {
        connection.laddr.ip
        for child in children
        for connection in child.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    assert ended(children)


def test_a_restart_keeps_what_was_there_a_kill_stops_all_and_a_killed_worker_starts_again(
    project: Path, ports: tuple[int, int], start: Start
) -> None:
    _, prefect_port = ports
    first = start(project, ports)
    said(first)
    nightly = deployments(prefect_port)["train-nightly"]
    assert [schedule["active"] for schedule in nightly["schedules"]] == [True]
    runs = post(
        prefect_port, "/flow_runs/filter", flow_runs={"state": {"type": {"any_": ["CRASHED"]}}}
    )
    assert len(runs) == 1  # which the first test stopped, and is no longer Running
    schedule = f"{nightly['id']}/schedules/{nightly['schedules'][0]['id']}"
    requests.patch(
        f"http://127.0.0.1:{prefect_port}/api/deployments/{schedule}", json={"active": False}
    ).raise_for_status()
    requests.patch(
        f"http://127.0.0.1:{prefect_port}/api/deployments/{nightly['id']}",
        json={"parameters": {"promote": False}},
    ).raise_for_status()
    limit = f"http://127.0.0.1:{prefect_port}/api/v2/concurrency_limits/gpu"
    requests.patch(limit, json={"limit": 2}).raise_for_status()
    children = descendants(first)
    first.kill()
    assert ended(children)

    process = start(project, ports)
    said(process)
    kept = deployments(prefect_port)["train-nightly"]
    assert (kept["id"], kept["parameters"]) == (nightly["id"], {"promote": False})
    assert [schedule["active"] for schedule in kept["schedules"]] == [False]
    assert requests.get(limit).json()["limit"] == 2
    assert len(post(prefect_port, "/automations/filter")) == 1

    again = start(project, (free_port(), free_port()))
    output, errors = again.communicate(timeout=60)
    assert (again.returncode, output) == (1, "")
    assert errors == (
        f"cnnpipe: `cnnpipe up` runs already in this folder, as process {process.pid}: MLflow on "
        f"http://127.0.0.1:{ports[0]}, Prefect on http://127.0.0.1:{prefect_port}; "
        f"`kill {process.pid}` stops it\n"
    )

    worker = worker_of(project)
    begun = psutil.Process(worker).create_time()
    time.sleep(max(0, begun + 11 - time.time()))  # long enough to have begun well
    os.kill(worker, signal.SIGKILL)
    assert process.stderr is not None
    log = project / ".cnnpipe" / "logs" / "worker.log"
    warning = f"warning: worker ended with exit code -9: see {log}; it is started again\n"
    assert process.stderr.readline() == warning
    while worker_of(project) == worker:
        time.sleep(0.1)
    while "started!" not in log.read_text():
        assert psutil.pid_exists(worker_of(project)) and process.poll() is None
        time.sleep(0.1)
    children = descendants(process)
    process.terminate()
    assert process.wait(timeout=60) == 0
    assert ended(children)


def worker_of(project: Path) -> int:
    """The id of the worker that `cnnpipe up` runs there."""
    content = json.loads((project / ".cnnpipe" / "up.json").read_text())
    return int(content["processes"]["worker"])


def test_taken_ports_are_told_with_who_has_them_and_what_to_type(
    project: Path, start: Start
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start(project, (port, port))
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (2, "")
    assert errors.count("\n") == 1
    assert f"port {port} is taken by process {os.getpid()} (`{sys.executable}" in errors
    options = re.search(r"use `cnnpipe up --mlflow-port (\d+) --prefect-port (\d+)`", errors)
    assert options is not None
    offered = {int(options[1]), int(options[2])}
    assert len(offered) == 2 and port not in offered


def test_a_server_that_is_somebody_elses_is_used_or_missed_in_one_line(
    project: Path, start: Start
) -> None:
    for variable in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        process = start(
            project, (free_port(), free_port()), **{variable: "http://user:secret@127.0.0.1:9/api"}
        )
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output) == (1, "")
        assert errors.startswith(f"cnnpipe: {variable} = http://127.0.0.1:9/api: no ")
        assert errors.count("\n") == 1
        assert "secret" not in errors


def test_a_flow_that_cannot_be_imported_is_named_in_one_line(project: Path, start: Start) -> None:
    (project / "flows" / "sweep.py").write_text("raise SystemExit('no flow here')")
    process = start(project, (free_port(), free_port()))
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 1  # and the servers were stopped, or it would wait for them
    assert output == ""
    assert errors.startswith(
        "cnnpipe: prefect.yaml: deployment sweep: flows/sweep.py:sweep cannot be imported: "
    )
    assert "no flow here" in errors
    assert errors.count("\n") == 1
    write_flows(project)


def test_what_a_killed_up_has_left_is_not_taken_for_a_running_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert running.find() is None
    running.note("http://127.0.0.1:1", "http://127.0.0.1:2/api", {})
    assert running.prefect_api() == "http://127.0.0.1:2/api"
    path = tmp_path / ".cnnpipe" / "up.json"
    path.write_text(path.read_text().replace('"started": ', '"started": 1'))
    assert running.find() is None  # another process has got the number
    assert running.prefect_api() == running.PREFECT_API
    path.write_text("{")
    assert running.find() is None
