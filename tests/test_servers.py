"""`cnnpipe up` for real: both servers answer, the flow is deployed, and nothing is left behind."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import requests

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(folder: Path, mlflow_port: int, prefect_port: int) -> subprocess.Popen[str]:
    dropped = ("DVC_ROOT", "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME")
    return subprocess.Popen(
        [Path(sys.executable).with_name("cnnpipe"), "up",
         "--mlflow-port", str(mlflow_port), "--prefect-port", str(prefect_port)],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key not in dropped},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_serves_both_on_loopback_and_one_signal_stops_all(
    tmp_path: Path, number: signal.Signals
) -> None:
    shutil.copytree(ROOT / "flows", tmp_path / "flows")
    (tmp_path / "params.yaml").write_text("{}")
    mlflow_port, prefect_port = free_port(), free_port()
    process = start(tmp_path, mlflow_port, prefect_port)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    try:
        assert f"http://127.0.0.1:{mlflow_port}" in lines[0], process.communicate()
        assert f"http://127.0.0.1:{prefect_port}" in lines[1]
        children = psutil.Process(process.pid).children(recursive=True)
        listening = {
            connection.laddr.ip
            for child in children
            for connection in child.net_connections(kind="tcp")
            if connection.status == psutil.CONN_LISTEN
        }
        assert listening == {"127.0.0.1"}
        experiments = requests.get(
            f"http://127.0.0.1:{mlflow_port}/api/2.0/mlflow/experiments/get-by-name",
            params={"experiment_name": "cnnpipe"},
        ).json()
        assert experiments["experiment"]["artifact_location"].endswith("/mlartifacts")
        ui = requests.get(f"http://127.0.0.1:{prefect_port}/ui-settings").text
        assert re.search(rf'"api_url": ?"http://127\.0\.0\.1:{prefect_port}/api"', ui)
        deployments = requests.post(
            f"http://127.0.0.1:{prefect_port}/api/deployments/filter", json={}
        ).json()
        assert [deployment["name"] for deployment in deployments] == ["pipeline"]
    finally:
        process.send_signal(number)
    assert process.wait(timeout=60) == 0
    assert [child for child in children if child.is_running()] == []


def test_a_server_that_does_not_come_up_is_named_with_its_log(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("{}")
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").touch()
    (tmp_path / "flows" / "pipeline.py").write_text("raise SystemExit('no flow here')")
    process = start(tmp_path, free_port(), free_port())
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 1  # and the other two were stopped, or it would wait for them
    assert output == ""
    assert re.fullmatch(r"cnnpipe: flow ended with exit code \d+: see .*flow\.log\n", errors)
    log = Path(errors.split("see ")[1].strip())
    assert log.read_text() == "no flow here\n"
