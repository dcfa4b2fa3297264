"""The pipeline as a Prefect flow: each DVC stage a task, in order.

DVC decides whether a stage must run, and the task's state says what it decided: Completed where
the stage ran, Skipped where nothing had changed, Restored where its outputs came from the cache.

    python -m flows.pipeline            run it once
    python -m flows.pipeline --serve    wait for runs that are started in the UI
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from prefect import flow, get_run_logger, runtime, task
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    temporary_settings,
)
from prefect.states import Completed, Failed, State

STAGES = ("download", "resize", "split", "train", "evaluate")
LOCAL_API = "http://127.0.0.1:4200/api"
"""Where `cnnpipe up` starts the server."""

# What `dvc repro` prints of a stage that it need not run.
_SKIPPED = "didn't change, skipping"
_RESTORED = "is cached - skipping run"
_STOP_TIMEOUT_S = 10


@task(task_run_name="{stage}")
def run_stage(stage: str) -> State[Any]:
    """Runs one DVC stage, its output line by line in the task's log; how it ended."""
    logger = get_run_logger()
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "--single-item", stage],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env={
            **os.environ,
            # dvc.yaml's commands are to be found where this Python is.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONUNBUFFERED": "1",
            "CNNPIPE_FLOW_RUN_ID": str(runtime.flow_run.id),
        },
    )
    name, reason = "Completed", ""
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line := line.rstrip():
                logger.info(line)
            if line.startswith("cnnpipe: ") or not reason.startswith("cnnpipe: "):
                reason = line or reason
            if _SKIPPED in line:
                name = "Skipped"
            elif _RESTORED in line:
                name = "Restored"
        code = process.wait()
    except BaseException:  # a cancelled run is no reason to leave a training running
        _stop(process)
        raise
    if code:
        return Failed(message=reason)
    return Completed(name=name, message=f"{stage}: {name.lower()}")


@flow(name="pipeline")
def pipeline() -> State[Any]:
    """From the images to an evaluated, tracked model: every stage that DVC finds out of date."""
    for stage in STAGES:
        state: State[Any] = run_stage(stage, return_state=True)
        if not state.is_completed():
            break
    return state


def main() -> int:
    """Runs or serves the flow; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.pipeline", description=pipeline.__doc__)
    parser.add_argument("--serve", action="store_true", help="wait for runs started in the UI")
    args = parser.parse_args()
    url = PREFECT_API_URL.value() or LOCAL_API
    try:
        with urlopen(f"{url}/health", timeout=10):
            pass
    except (URLError, OSError, ValueError):
        print(
            f"cnnpipe: no Prefect server answers at {url}: start one with `cnnpipe up`, "
            "or set PREFECT_API_URL to yours",
            file=sys.stderr,
        )
        return 1
    # A server is required: without one Prefect starts its own for each run and forgets task runs.
    with temporary_settings({PREFECT_API_URL: url, PREFECT_SERVER_ANALYTICS_ENABLED: False}):
        if args.serve:
            pipeline.serve(name="pipeline")
            return 0
        try:
            return 0 if pipeline(return_state=True).is_completed() else 1
        except KeyboardInterrupt:
            print("cnnpipe: interrupted", file=sys.stderr)
            return 128 + signal.SIGINT


def _stop(process: subprocess.Popen[str]) -> None:
    """Ends the stage and everything that it started.

    DVC itself goes at once, and the stage takes a moment to tell MLflow: what counts is when the
    last process of the group is gone.
    """
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        while time.monotonic() < deadline:
            process.poll()  # or DVC would stay as a zombie, and the group with it
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
