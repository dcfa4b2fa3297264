"""`cnnpipe doctor`: what is there is ok, what is optional may be missing, what is wrong is said."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from cnnpipe import cli, doctor, running
from cnnpipe.doctor import Finding, as_text, examine


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    # No server of this machine's user.
    monkeypatch.setattr(running, "PREFECT_API", "http://127.0.0.1:9/api")
    Path("params.yaml").write_text("{}")
    Path(".dvc/tmp").mkdir(parents=True)


class _Servers(BaseHTTPRequestHandler):
    def _answer(self, content: object) -> None:
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def do_GET(self) -> None:
        self._answer(True)

    def do_POST(self) -> None:
        assert self.path == "/api/work_pools/cnnpipe/workers/filter"
        names = {"gone": "OFFLINE", "here": "ONLINE"}
        self._answer([{"name": name, "status": status} for name, status in names.items()])

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def servers() -> Iterator[str]:
    """An address at which both servers seem to be."""
    server = HTTPServer(("127.0.0.1", 0), _Servers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def found() -> dict[str, Finding]:
    return {finding.what: finding for finding in examine("params.yaml")}


def test_a_folder_that_is_well_has_nothing_wrong_also_with_no_server() -> None:
    table = found()
    assert {one.what for one in table.values() if one.status == "wrong"} == set()
    for name in ("python", "torch", "cores", "memory", "disk", "dvc", "params", "outbox"):
        assert table[name].status == "ok"
    for name in ("git", "up", "mlflow", "prefect", "worker"):
        assert table[name].status == "missing"
        assert table[name].advice
    assert not Path("mlflow.db").exists()  # it looks, and makes nothing


def test_experiments_of_flows_need_somebodys_name(monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", "-q"], check=True)
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    git = found()["git"]
    assert (git.status, git.found) == (
        "wrong",
        "no commit yet, 1 changed file, no user.name and no user.email",
    )
    for key in ("user.name", "user.email"):
        subprocess.run(["git", "config", key, "x"], check=True)
    assert found()["git"].status == "ok"


def test_the_servers_and_the_worker_are_found_where_up_has_left_word(servers: str) -> None:
    running.note(servers, f"{servers}/api", {"MLflow": os.getpid()})
    table = found()
    assert table["mlflow"] == Finding("mlflow", "ok", servers)
    assert table["prefect"] == Finding("prefect", "ok", f"{servers}/api")
    assert table["worker"] == Finding("worker", "ok", "here")
    assert table["up"].found == f"process {os.getpid()}, with MLflow {os.getpid()}"
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                           capture_output=True, text=True)  # fmt: skip
    running.note(servers, f"{servers}/api", {"worker": int(ended.stdout)})
    assert found()["up"].status == "wrong"


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_URI", "PREFECT_API_URL"])
def test_a_server_that_is_named_and_does_not_answer_is_wrong(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "http://user:secret@127.0.0.1:9")
    finding = found()["mlflow" if name.startswith("MLFLOW") else "prefect"]
    assert finding == Finding(
        finding.what, "wrong", "http://127.0.0.1:9 does not answer", f"start it, or unset {name}"
    )


def test_what_dvc_is_at_and_a_lock_that_a_killed_dvc_left_half_written() -> None:
    locks = Path(".dvc/tmp/rwlock")
    mine = {"pid": os.getpid(), "cmd": "dvc repro"}
    stale = {"pid": 2**22 + 1, "cmd": "dvc gone"}  # more than Linux gives
    locks.write_text(json.dumps({"data": {"write": mine, "read": [stale]}}))
    assert found()["dvc"].found.endswith(f"process {os.getpid()} is at work (dvc repro)")
    locks.write_text("")
    assert found()["dvc"].status == "wrong"
    assert found()["dvc"].advice == f"run `rm {locks.resolve()}`"
    shutil.rmtree(".dvc")
    assert "dvc init" in found()["dvc"].advice


def test_impossible_settings_and_a_compiler_that_they_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert found()["compiler"].status == "missing"
    Path("params.yaml").write_text("train: {compile: true}")
    assert found()["compiler"].status == "wrong"
    Path("params.yaml").write_text("model: {filters: 0}")
    assert found()["params"].status == "wrong"
    assert "model.filters = 0" in found()["params"].found


def test_a_gpu_that_the_installed_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_lines", lambda *command: ["NVIDIA H100, 81559 MiB"])
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.13.0+cpu")
    assert found()["torch"].status == "wrong"
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.13.0")
    assert found()["torch"] == Finding("torch", "ok", "2.13.0, NVIDIA H100, 81559 MiB")


def test_a_full_disk_and_what_mlflow_has_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_FREE_BYTES", 2**60)
    Path(".cnnpipe/outbox/run").mkdir(parents=True)
    table = found()
    assert table["disk"].status == "wrong"
    assert table["outbox"].found == "MLflow has not been told all of 1 run"


def test_the_command_prints_a_table_or_json_and_its_code_says_whether_something_is_wrong(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [Path(sys.executable).with_name("cnnpipe"), "doctor"]
    table = subprocess.run(command, capture_output=True, text=True)
    assert (table.returncode, table.stderr) == (0, "")
    assert any(
        line.startswith("params    ok       params.yaml") for line in table.stdout.split("\n")
    )
    Path("params.yaml").unlink()
    assert cli._command(["doctor", "--json"]) == 1
    lines = {one["what"]: one for one in json.loads(capsys.readouterr().out)}
    assert lines["params"] == {
        "what": "params", "status": "wrong", "found": lines["params"]["found"], "advice": "",
    }  # fmt: skip
    assert "no such file" in lines["params"]["found"]


def test_the_table_shows_what_a_terminal_would_act_on() -> None:
    assert as_text([Finding("a", "ok", "b\x1b[2J")]) == "a  ok       b\\x1b[2J"
