"""The pipeline under DVC and Prefect, for real: what runs, what is skipped, what is restored."""

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from PIL import Image

Call = Callable[..., CompletedProcess[str]]
STAGES = ["download", "resize", "split", "train", "evaluate"]
FLOW = (sys.executable, "-m", "flows.pipeline")


def states(done: CompletedProcess[str]) -> dict[str, str]:
    """The state that each stage's task ended in, as the flow's log tells it."""
    found = re.findall(r"Task run '(\w+)' - Finished in state (\w+)", done.stdout)
    return {task: state for task, state in found if task in STAGES}


def run_id(project: Path) -> str:
    return str(json.loads((project / "models/run.json").read_text())["run_id"])


def test_the_flow_shows_what_dvc_decided(
    project: Path, call: Call, fork: Call, prefect_api: str
) -> None:
    def flow() -> CompletedProcess[str]:
        done: CompletedProcess[str] = fork("from flows.pipeline import main; sys.exit(main())")
        assert done.returncode == 0, done.stdout
        return done

    first = call(*FLOW, PREFECT_API_URL=prefect_api)
    assert first.returncode == 0, first.stdout
    assert states(first) == dict.fromkeys(STAGES, "Completed")
    assert "Task run 'judge' - Finished in state Completed" in first.stdout
    assert "Task run 'train' - epoch 1/1: train loss" in first.stdout  # line by line, in the log
    trained = run_id(project)
    assert states(flow()) == dict.fromkeys(STAGES, "Skipped")

    params = project / "params.yaml"
    before = params.read_text()
    params.write_text(before.replace("filters: 4", "filters: 5"))
    changed = flow()
    assert states(changed) == {
        **dict.fromkeys(STAGES[:3], "Skipped"),
        **dict.fromkeys(STAGES[3:], "Completed"),
    }
    assert run_id(project) != trained

    params.write_text(before)
    restored = flow()
    assert states(restored) == {
        **dict.fromkeys(STAGES[:3], "Skipped"),
        **dict.fromkeys(STAGES[3:], "Restored"),
    }
    assert run_id(project) == trained

    # Evaluate alone, of the restored training: it finds the old run and adds to it.
    params.write_text(before.replace("mistakes: 4", "mistakes: 5"))
    judged = flow()
    assert states(judged) == {**dict.fromkeys(STAGES[:4], "Skipped"), "evaluate": "Completed"}
    assert json.loads((project / "reports/test/run.json").read_text())["run_id"] == trained
    params.write_text(before)


def test_a_stage_that_fails_fails_the_flow_and_nothing_after_it_runs(
    project: Path, call: Call, prefect_api: str
) -> None:
    params = project / "params.yaml"
    before = params.read_text()
    params.write_text(before.replace("source: digits", "source: folder"))
    done = call(*FLOW, PREFECT_API_URL=prefect_api)
    params.write_text(before)
    assert done.returncode == 1
    assert states(done) == {"download": "Failed"}
    reason = "cnnpipe: download.folder = data/inbox: "
    assert f'Finished in state Failed("{reason}' in done.stdout
    assert f'Finished in state Failed("download: {reason}' in done.stdout
    assert "Traceback" not in done.stdout


def test_an_interrupted_flow_lets_the_stage_tell_the_tracker(
    project: Path,
    call: Call,
    environment: dict[str, str],
    prefect_api: str,
    last_status: Callable[[], str],
) -> None:
    params = project / "params.yaml"
    before = params.read_text()
    params.write_text(before.replace("epochs: 1", "epochs: 100000"))
    assert call("dvc", "repro", "split").returncode == 0
    flow = subprocess.Popen(
        FLOW, cwd=project, env={**environment, "PREFECT_API_URL": prefect_api}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert flow.stdout is not None
    try:
        for line in flow.stdout:
            if "epoch 3/100000" in line:
                break
        flow.send_signal(signal.SIGINT)
        output, _ = flow.communicate(timeout=60)
    finally:
        flow.terminate()
        params.write_text(before)
    assert flow.returncode == 130
    assert output.endswith("cnnpipe: interrupted\n")
    assert last_status() == "KILLED"


def test_without_a_server_the_flow_says_how_to_start_one(call: Call) -> None:
    done = call(*FLOW, PREFECT_API_URL="http://127.0.0.1:9/api")
    assert done.returncode == 1
    assert done.stdout == (
        "cnnpipe: no Prefect server answers at http://127.0.0.1:9/api: start one with "
        "`cnnpipe up`, or set PREFECT_API_URL to yours\n"
    )


def test_a_schedule_makes_runs_appear(prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With SQLAlchemy 2.1 the server starts and no scheduled run ever appears."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
    from prefect.settings import PREFECT_API_URL, temporary_settings

    async def scheduled() -> int:
        async with get_client() as client:
            flow = await client.create_flow_from_name("scheduled")
            await client.create_deployment(
                flow,
                "nightly",
                schedules=[
                    DeploymentScheduleCreate(schedule=CronSchedule(cron="* * * * *")),
                    DeploymentScheduleCreate(
                        schedule=IntervalSchedule(interval=timedelta(hours=1))
                    ),
                ],
            )
            for _ in range(300):
                runs = await client.read_flow_runs(
                    flow_run_filter=FlowRunFilter.model_validate(
                        {"state": {"type": {"any_": ["SCHEDULED"]}}}
                    )
                )
                if runs:
                    return len(runs)
                await asyncio.sleep(0.1)
        return 0

    with temporary_settings({PREFECT_API_URL: prefect_api}):
        assert asyncio.run(scheduled()) > 0


def test_an_image_added_to_the_inbox_is_noticed_and_found_by_experiments_elsewhere(
    project: Path, call: Call
) -> None:
    def draw(label: str, number: int) -> None:
        path = project / f"data/inbox/{label}/{number}.png"
        path.parent.mkdir(exist_ok=True)
        # Every picture a pattern of its own, so that none is a copy of another.
        shade = 40 if label == "dark" else 200
        pixels = bytes((shade + 13 * number * (i + 1)) % 256 if i % (number + 2) else shade
                       for i in range(256))  # fmt: skip
        Image.frombytes("L", (16, 16), pixels).save(path)

    def experiment() -> str:
        done = call("dvc", "exp", "run", "--temp", "-S", "download.source=folder", "split")
        assert done.returncode == 0, done.stdout
        return done.stdout

    assert call("dvc", "repro", "download").returncode == 0
    for number in range(15):
        draw("dark", number)
        draw("light", number)
    assert "data/inbox" in call("dvc", "status", "download").stdout
    assert "30 images of 2 classes" in experiment()
    assert "Stage 'split' is cached" in experiment()
    for number in range(15, 25):
        draw("dark", number)
        draw("light", number)
    assert "40 images of 2 classes" in experiment()  # its limit; not the cached result of fewer
    assert call("git", "status", "--porcelain", "data").stdout == ""
