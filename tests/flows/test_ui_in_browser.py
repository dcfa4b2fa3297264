"""Prefect's own pages, driven as a person would: a run by the form, and one that is cancelled."""

import json
import re
import signal
import socket
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from browser import CHROMIUM, Page, browser

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]


class Prefect:
    """What `cnnpipe up` runs of it."""

    def __init__(self, ui: str) -> None:
        self.ui = ui

    def get(self, path: str) -> Any:
        return requests.get(f"{self.ui}/api{path}", timeout=30).json()

    def post(self, path: str, **content: Any) -> Any:
        return requests.post(f"{self.ui}/api{path}", json=content, timeout=30).json()


@pytest.fixture(scope="module")
def prefect(project: Path, environment: dict[str, str]) -> Iterator[Prefect]:
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(str(probe.getsockname()[1]))
    command = ["cnnpipe", "up", "--mlflow-port", ports[0], "--prefect-port", ports[1]]
    environment = {key: value for key, value in environment.items() if key != "PREFECT_HOME"}
    with (project / "up.log").open("w") as log:
        up = subprocess.Popen(
            command, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
    assert up.stdout is not None
    try:
        lines = [up.stdout.readline() for _ in range(3)]
        assert lines[2], (project / "up.log").read_text()
        yield Prefect(f"http://127.0.0.1:{ports[1]}")
    finally:
        up.send_signal(signal.SIGTERM)
        up.wait(timeout=60)


def start(page: Page, prefect: Prefect, **settings: str) -> dict[str, Any]:
    """Fills in the form of the deployment `pipeline` and sends it; the run that it makes."""
    (deployment,) = prefect.post(
        "/deployments/filter", deployments={"name": {"any_": ["pipeline"]}}
    )
    page.open(f"{prefect.ui}/deployments/deployment/{deployment['id']}/run")
    page.wait_for("document.body.innerText.includes('Kernel Size')")
    name = page.evaluate("document.querySelector('input').value")
    for label, value in settings.items():
        fill = """((label, value) => {
            const field = [...document.querySelectorAll('.p-label')].find(
                e => e.innerText.startsWith(label)).querySelector('input');
            Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(
                field, value);
            field.dispatchEvent(new Event('input', {bubbles: true}));
        })"""
        page.evaluate(f"{fill}({json.dumps(label)}, {json.dumps(value)})")
    page.click("Submit")
    page.wait_for("!location.pathname.endsWith('/run')")
    (run,) = prefect.post("/flow_runs/filter", flow_runs={"name": {"any_": [name]}})
    page.open(f"{prefect.ui}/runs/flow-run/{run['id']}")
    return dict(run)


def test_a_run_is_started_by_the_form_and_seen_to_complete(prefect: Prefect) -> None:
    with browser() as page:
        run = start(page, prefect, Filters="6")
        assert run["parameters"]["settings"] == {"model": {"filters": 6}}
        page.wait_for("document.body.innerText.includes(\"Running stage 'train'\")")
        page.wait_for("/^Completed$/m.test(document.body.innerText)", 180)
        page.click("Artifacts", "li")
        for key in ("mlflow-run", "confusion", "quarantine", "test-metrics"):
            page.wait_for(f"document.body.innerText.includes('{key}')")
        page.click("Task Runs", "li")
        for task in ("download", "resize", "split", "train", "evaluate", "judge"):
            page.wait_for(f"document.body.innerText.includes('{task}')")


def test_a_run_is_cancelled_by_the_button_and_leaves_no_process(
    project: Path, prefect: Prefect
) -> None:
    def at_work() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if Path(process.cwd()).is_relative_to(project / ".dvc" / "tmp"):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    with browser() as page:
        run = start(page, prefect, Epochs="100000")
        assert run["parameters"]["settings"] == {"train": {"epochs": 100000}}
        page.wait_for("document.body.innerText.includes('epoch 3/100000')")
        processes = at_work()
        assert any("train" in process.cmdline() for process in processes)
        page.click("Cancel")
        page.click("Confirm")
        _, alive = psutil.wait_procs(processes, timeout=20)
        assert alive == []
        page.wait_for("/^Cancelled$/m.test(document.body.innerText)")
    assert prefect.get(f"/flow_runs/{run['id']}")["state"]["type"] == "CANCELLED"
    assert at_work() == []
    log = (project / ".cnnpipe" / "logs" / "worker.log").read_text(errors="replace")
    assert re.search("epoch [0-9]+/100000", log)
    query = "SELECT status FROM runs WHERE name LIKE ? ORDER BY start_time DESC"
    store = sqlite3.connect(project / "mlflow.db")
    assert store.execute(query, (f"{run['name']}-%",)).fetchone() == ("KILLED",)
