"""Flow runs in workspaces of their own: what they change, what they show, and when they retry."""

import base64
import csv
import hashlib
import http.server
import io
import json
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import psutil
import pytest
from PIL import Image
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
)
from prefect.exceptions import PrefectHTTPStatusError

Call = Callable[..., CompletedProcess[str]]
STAGES = ["download", "resize", "split", "train", "evaluate"]
RUN = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from flows.pipeline import pipeline
from flows.predict import predict
flow = {"pipeline": pipeline, "predict": predict}[sys.argv[1]]
state = flow(**json.loads(sys.argv[2]), return_state=True)
print("ENDED", json.dumps([state.name, state.message, str(state.state_details.flow_run_id)]))
"""


class Ended:
    """A flow run that has ended."""

    def __init__(self, done: CompletedProcess[str], prefect: SyncPrefectClient) -> None:
        found = re.search("^ENDED (.*)$", done.stdout, re.MULTILINE)
        assert found, done.stdout
        self.output = done.stdout
        self.state, self.message, self.id = json.loads(found[1])
        self.name = prefect.read_flow_run(self.id).name
        filters = FlowRunFilter.model_validate({"id": {"any_": [self.id]}})
        self.tasks = {
            task.name: task.state_name for task in prefect.read_task_runs(flow_run_filter=filters)
        }
        found_artifacts = prefect._client.post(
            "/artifacts/filter", json={"artifacts": {"flow_run_id": {"any_": [self.id]}}}
        ).json()
        self.artifacts = {artifact["key"]: artifact for artifact in found_artifacts}


@pytest.fixture(scope="module")
def flow(fork: Call, prefect: SyncPrefectClient) -> Callable[..., Ended]:
    def run(name: str = "pipeline", **parameters: Any) -> Ended:
        return Ended(fork(RUN, name, json.dumps(parameters)), prefect)

    return run


def test_a_run_has_one_name_in_all_three_tools_and_leaves_the_checkout_as_it_is(
    project: Path, call: Call, flow: Callable[..., Ended]
) -> None:
    before = call("git", "status", "--porcelain", "--ignored=no").stdout
    done = flow(settings={"model": {"filters": 5}, "train": {"epochs": 2}})
    assert (done.state, done.tasks) == (
        "Completed",
        {**dict.fromkeys(STAGES, "Completed"), "judge": "Completed"},
    )
    assert call("git", "status", "--porcelain", "--ignored=no").stdout == before
    assert not (project / "models").exists()
    assert [p.name for p in (project / ".dvc/tmp/exps/standalone").iterdir()] == ["run"]
    (experiment,) = call("dvc", "exp", "list", "--name-only").stdout.split()
    assert experiment == f"{done.name}-{done.id[-4:]}"
    run_id = done.artifacts["mlflow-run"]["data"].rpartition("/")[2].rstrip(")")
    listed = call("cnnpipe", "compare", experiment, "--json")
    (run,) = json.loads(listed.stdout)["runs"]
    assert run["name"] == experiment
    assert run_id == run["id"]


def test_the_result_is_shown_as_artifacts(call: Call, flow: Callable[..., Ended]) -> None:
    done = flow(settings={"model": {"filters": 5}, "train": {"epochs": 2}}, promote=True)
    assert done.tasks == {**dict.fromkeys(STAGES, "Restored"), "judge": "Promoted"}
    assert done.message.startswith("promoted: ")  # the first there is
    assert set(done.artifacts) == {"mlflow-run", "confusion", "quarantine", "test-metrics"}
    assert "http://127.0.0.1:5000/#/experiments/1/runs/" in done.artifacts["mlflow-run"]["data"]
    picture = base64.b64decode(done.artifacts["confusion"]["data"].partition("base64,")[2])
    assert Image.open(io.BytesIO(picture)).format == "PNG"
    assert "**0 files were left out**" in done.artifacts["quarantine"]["data"]
    table = json.loads(done.artifacts["test-metrics"]["data"])
    run_id = done.artifacts["mlflow-run"]["data"].rpartition("/")[2].rstrip(")")
    (traced,) = json.loads(call("cnnpipe", "trace", done.id, "--json").stdout)["runs"]
    assert (traced["run"], traced["flow_runs"][1]["id"]) == (run_id, done.id)  # and the first's
    assert table[0] == {
        "test metric": "accuracy",
        "candidate": f"{traced['test_accuracy']:.4f}",
        "champion": "",  # there is none yet
    }


def test_where_nothing_has_changed_a_run_ends_skipped_and_leaves_no_experiment(
    project: Path, call: Call, flow: Callable[..., Ended]
) -> None:
    params = project / "params.yaml"
    before = params.read_text()
    as_tried = before.replace("filters: 4", "filters: 5").replace("epochs: 1", "epochs: 2")
    params.write_text(as_tried)
    experiments = call("dvc", "exp", "list", "--name-only").stdout
    again = flow(promote=True)
    params.write_text(before)
    assert (again.state, again.message) == ("Skipped", "nothing has changed")
    assert set(again.tasks.values()) == {"Restored"}
    assert "judge" not in again.tasks and not again.artifacts
    assert call("dvc", "exp", "list", "--name-only").stdout == experiments != ""


def test_the_champion_scores_what_is_new_and_lists_what_is_no_image(
    project: Path, call: Call, flow: Callable[..., Ended]
) -> None:
    inbox = project / "data" / "unlabelled"
    empty = flow("predict")
    assert (empty.state, empty.message) == ("Skipped", "data/unlabelled is empty")
    for number in range(3):
        pixels = bytes((number * 50 + i) % 256 for i in range(256))
        Image.frombytes("L", (16, 16), pixels).save(inbox / f"{number}.png")
    (inbox / "notes.txt").write_text("no image")
    first = flow("predict")
    assert (first.state, first.message) == ("Completed", "3 scored, 0 known, 1 unreadable")
    assert set(first.artifacts) == {"mlflow-run", "scores"}
    assert "| data/unlabelled/notes.txt | not an image |" in first.artifacts["scores"]["data"]
    with (project / "reports" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["path"] for row in rows} == {f"data/unlabelled/{n}.png" for n in range(3)}
    said = call("cnnpipe", "predict", "data/unlabelled/0.png", "--model", rows[0]["model"]).stdout
    (alone,) = csv.DictReader(io.StringIO(said))
    assert alone["probability_0"] == rows[0]["probability_0"]
    again = flow("predict")
    assert (again.state, again.message) == ("Skipped", "0 scored, 3 known, 1 unreadable")
    assert "mlflow-run" not in again.artifacts
    missing = flow("predict", path="nowhere")
    assert (missing.state, missing.message) == ("Failed", "nowhere: no such file or folder")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"settings": {"model": {"kernel_size": 14}}}, "params.yaml: convolution: "),
        (
            {"settings": {"model": {"filters": 5}}, "in_checkout": True},
            "in_checkout takes no settings: ",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_stage(
    flow: Callable[..., Ended], parameters: dict[str, Any], message: str
) -> None:
    done = flow(**parameters)
    assert done.state == "Failed"
    assert done.message.startswith(message)
    assert done.tasks == {}
    assert "Traceback" not in done.output


@contextmanager
def archive_server(refusals: int) -> Iterator[tuple[str, str, list[str]]]:
    """A server of an archive of images that first refuses; its address, checksum, requests."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for number in range(24):
            image = io.BytesIO()
            pixels = bytes((number * 37 + i * (number + 3)) % 256 for i in range(256))
            Image.frombytes("L", (16, 16), pixels).save(image, "png")
            member = tarfile.TarInfo(f"{'ab'[number % 2]}/{number}.png")
            member.size = image.tell()
            image.seek(0)
            archive.addfile(member, image)
    data = content.getvalue()
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            if len(requests) <= refusals:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield (
            f"http://127.0.0.1:{server.server_port}/images.tar",
            hashlib.sha256(data).hexdigest(),
            requests,
        )
    finally:
        server.shutdown()


def test_a_download_that_fails_is_retried_and_succeeds(flow: Callable[..., Ended]) -> None:
    with archive_server(refusals=1) as (url, sha256, requests):
        done = flow(settings={"download": {"source": "url", "url": url, "sha256": sha256}})
    assert done.state == "Completed", done.output
    assert len(requests) == 2
    assert "Retry 1/3 will start" in done.output
    assert done.tasks == {**dict.fromkeys(STAGES, "Completed"), "judge": "Completed"}
    table = done.artifacts["test-metrics"]
    assert re.fullmatch(r"0\.\d{4}", json.loads(table["data"])[0]["champion"])
    assert table["description"] == done.message
    assert done.message.startswith("the champion stays: they cannot be compared: ")


def test_a_users_mistake_is_not_retried(flow: Callable[..., Ended]) -> None:
    with archive_server(refusals=0) as (url, _, requests):
        done = flow(settings={"download": {"source": "url", "url": url, "sha256": "0" * 64}})
    assert done.state == "Failed"
    assert done.message.startswith(f"download: cnnpipe: {url}: what was downloaded does not have")
    assert done.tasks == {"download": "Failed"}
    assert len(requests) == 1
    assert "Retry" not in done.output


def test_an_interrupted_run_removes_its_workspace_and_mlflow_says_killed(
    project: Path,
    environment: dict[str, str],
    prefect_api: str,
    last_status: Callable[[], str],
) -> None:
    settings = {"settings": {"train": {"epochs": 100_000}}}
    flow = subprocess.Popen(
        [sys.executable, "-c", RUN, "pipeline", json.dumps(settings)], cwd=project,
        env={**environment, "PREFECT_API_URL": prefect_api}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert flow.stdout is not None
    try:
        for line in flow.stdout:
            if "epoch 3/100000" in line:
                break
        children = psutil.Process(flow.pid).children(recursive=True)
        assert {"dvc", "cnnpipe"} <= {Path(c.cmdline()[1]).name for c in children}
        flow.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs(children, timeout=5)
        assert alive == []
        flow.communicate(timeout=60)
    finally:
        flow.kill()
    assert [p.name for p in (project / ".dvc/tmp/exps/standalone").iterdir()] == ["run"]
    assert last_status() == "KILLED"


GATED = """
import sys
from prefect import flow
from flows import commands
from flows.reproduction import Reproduction
program = "import time; print(\\"Running stage 'train':\\"); time.sleep(0.3); print('at work')"
start = commands.start
commands.start = lambda *_, variables: start(sys.executable, "-c", program)
@flow
def training():
    with Reproduction([], uses_gpu=True) as reproduction:
        reproduction.start()
        for line in reproduction.stage("train"):
            print(line, flush=True)
training()
"""


def test_a_training_waits_for_the_gpu_and_without_a_limit_none_begins(
    fork: Call, project: Path, environment: dict[str, str], prefect_api: str,
    prefect: SyncPrefectClient,
) -> None:  # fmt: skip
    with suppress(PrefectHTTPStatusError):  # of another test
        prefect._client.delete("/v2/concurrency_limits/gpu")
    none = fork(GATED)
    assert none.returncode == 1
    assert "at work" not in none.stdout
    prefect._client.post("/v2/concurrency_limits/", json={"name": "gpu", "limit": 1})
    taken = prefect._client.post(
        "/v2/concurrency_limits/increment", json={"names": ["gpu"], "slots": 1}
    )
    assert len(taken.json()) == 1
    waiting = subprocess.Popen(
        [sys.executable, "-c", GATED], cwd=project, text=True, stdout=subprocess.PIPE,
        env={**environment, "PREFECT_API_URL": prefect_api},
    )  # fmt: skip
    assert waiting.stdout is not None
    try:
        assert waiting.stdout.readline() == "Running stage 'train':\n"
        time.sleep(3)
        (child,) = psutil.Process(waiting.pid).children()
        assert child.status() == psutil.STATUS_STOPPED
        prefect._client.post(
            "/v2/concurrency_limits/decrement",
            json={"names": ["gpu"], "slots": 1, "occupancy_seconds": 1},
        )
        output, _ = waiting.communicate(timeout=120)
    finally:
        waiting.kill()
    assert (waiting.returncode, output) == (0, "at work\n")
    (limit,) = prefect._client.post("/v2/concurrency_limits/filter", json={}).json()
    assert limit["active_slots"] == 0
