"""A real server and a real worker: what is scheduled runs, what is cancelled or killed ends."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from prefect.client.orchestration import SyncPrefectClient
from waiting import wait_for

Call = Callable[..., subprocess.CompletedProcess[str]]

DEPLOYMENTS = """
pull:
- prefect.deployments.steps.set_working_directory: {directory: "{{ $CNNPIPE_PROJECT }}"}
deployments:
- name: pipeline
  entrypoint: flows/pipeline.py:pipeline
  work_pool: {name: cnnpipe, work_queue_name: training}
- name: tick
  entrypoint: flows/tick.py:tick
  work_pool: {name: cnnpipe}
  concurrency_limit: {limit: 1, collision_strategy: CANCEL_NEW}
  schedules: [{slug: often, interval: 5}]
"""
TICK = """
import os
from pathlib import Path
from prefect import flow

@flow(name="tick")
def tick():
    Path("ticked").write_text(os.environ["MLFLOW_TRACKING_URI"])
"""
SILENT = """
import time
import flows
from prefect import flow

@flow(name="silent")
def silent():
    time.sleep(600)

silent()
"""


class Api:
    """The Prefect server, as seen from outside."""

    def __init__(self, address: str) -> None:
        self.address = address

    def post(self, path: str, **content: Any) -> Any:
        def ask() -> Any:
            answer = requests.post(f"{self.address}{path}", json=content, timeout=30)
            # Its database may be busy.
            return (answer,) if answer.status_code != 503 else ()

        (answer,) = wait_for(ask)
        answer.raise_for_status()
        return answer.json()

    def runs(self, flow: str, state: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.post(
            "/flow_runs/filter",
            flows={"name": {"any_": [flow]}},
            flow_runs={"state": {"name": {"any_": [state]}}},
        )
        return found


@pytest.fixture(scope="module")
def api(prefect_api: str) -> Api:
    return Api(prefect_api)


@pytest.fixture(scope="module")
def worker(
    project: Path, environment: dict[str, str], prefect_api: str, api: Api
) -> Iterator[subprocess.Popen[bytes]]:
    (project / "prefect.yaml").write_text(DEPLOYMENTS)
    (project / "flows" / "tick.py").write_text(TICK)
    log = project / "worker.log"
    store = f"sqlite:///{project / 'mlflow.db'}"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.worker"],
            cwd=project,
            env={**environment, "PREFECT_API_URL": prefect_api, "MLFLOW_TRACKING_URI": store},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=60)


def working_in(folder: Path) -> list[str]:
    """The command lines of the stages and flows that are at work in the folder or below it."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            if Path(process.cwd()).is_relative_to(folder) and (
                "train" in line or "prefect.engine" in line
            ):
                found.append(line)
        except psutil.Error:
            continue
    return found


def test_a_scheduled_run_appears_and_completes_in_the_projects_folder(
    project: Path, worker: subprocess.Popen[bytes], api: Api
) -> None:
    assert wait_for(lambda: worker.poll() is None and api.runs("tick", "Completed"))
    assert (project / "ticked").read_text() == f"sqlite:///{project / 'mlflow.db'}"
    # Or it would run every 5 s beside the tests that follow.
    (deployment,) = api.post("/deployments/filter", deployments={"name": {"any_": ["tick"]}})
    api.post(f"/deployments/{deployment['id']}/pause_deployment")


def test_a_cancelled_run_ends_every_process_and_mlflow_knows(
    project: Path, worker: subprocess.Popen[bytes], api: Api, last_status: Callable[[], str]
) -> None:
    params = project / "params.yaml"
    before = params.read_text()
    params.write_text(before.replace("epochs: 1", "epochs: 100000"))
    try:
        deployment = wait_for(
            lambda: api.post("/deployments/filter", deployments={"name": {"any_": ["pipeline"]}})
        )[0]
        run = api.post(f"/deployments/{deployment['id']}/create_flow_run", parameters={})["id"]
        wait_for(lambda: "epoch 3/100000" in (project / "worker.log").read_text())
        assert any("cnnpipe train" in line for line in working_in(project))
        api.post(f"/flow_runs/{run}/set_state", state={"type": "CANCELLING"})
        wait_for(lambda: not working_in(project))
        wait_for(lambda: [r for r in api.runs("pipeline", "Cancelled") if r["id"] == run])
    finally:
        params.write_text(before)
    assert last_status() == "KILLED"


def test_a_killed_run_is_crashed_by_the_automation(
    project: Path,
    environment: dict[str, str],
    prefect_api: str,
    api: Api,
    prefect: SyncPrefectClient,
) -> None:
    from flows.worker import automation

    quick = automation(["silent"], timedelta(seconds=10))
    prefect.create_automation(quick.model_copy(update={"name": "quick"}))
    process = subprocess.Popen(
        [sys.executable, "-c", SILENT],
        cwd=project, env={**environment, "PREFECT_API_URL": prefect_api},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(lambda: api.runs("silent", "Running"))
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    crashed = wait_for(lambda: api.runs("silent", "Crashed"))
    assert "No sign of life for 10 s" in crashed[0]["state"]["message"]


def test_a_run_that_fell_silent_while_no_server_ran_is_crashed_when_a_worker_starts(
    prefect: SyncPrefectClient, api: Api
) -> None:
    from prefect import flow
    from prefect.states import Running

    from flows.worker import settle

    @flow(name="orphan")
    def orphan() -> None: ...

    run = prefect.create_flow_run(orphan, state=Running())
    settle(prefect, ["orphan"])
    assert len(api.runs("orphan", "Running")) == 1  # it may be at work
    settle(prefect, ["another"], timedelta(0))
    assert len(api.runs("orphan", "Running")) == 1
    settle(prefect, ["orphan"], timedelta(0))
    assert [one["id"] for one in api.runs("orphan", "Crashed")] == [str(run.id)]


def test_what_the_flows_need_is_made_once_and_not_made_over(prefect: SyncPrefectClient) -> None:
    from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
    from prefect.concurrency.sync import concurrency

    from flows.reproduction import GPU_LIMIT
    from flows.worker import AUTOMATION, POOL, TRAINING, prepare

    prepare(prefect, ["pipeline"])
    with concurrency(GPU_LIMIT, strict=True):
        pass
    with pytest.raises(ConcurrencySlotAcquisitionError), concurrency("no such limit", strict=True):
        pass
    prefect.request("PATCH", f"/v2/concurrency_limits/{GPU_LIMIT}", json={"limit": 3})
    first = prefect.read_automations_by_name(AUTOMATION)[0]
    prefect.request("PATCH", f"/automations/{first.id}", json={"enabled": False})
    prepare(prefect, ["pipeline", "sweep"])
    assert prefect.read_global_concurrency_limit_by_name(GPU_LIMIT).limit == 3
    assert prefect.read_work_queue_by_name(TRAINING, work_pool_name=POOL).concurrency_limit == 1
    (after,) = prefect.read_automations_by_name(AUTOMATION)
    assert (after.id, after.enabled) == (first.id, False)
    assert after.trigger.match_related.root["prefect.resource.name"] == ["pipeline", "sweep"]
