"""Commands at work for a flow: in a group of their own, so that a cancelled flow leaves none."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from prefect import get_run_logger, runtime

_BIN = Path(sys.executable).parent
_INTERRUPT_S, _KILL_S = 4.0, 1.0


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    output: str
    """On stdout."""
    reason: str
    """The last line on stderr."""


def start(
    *arguments: str, stderr: int = subprocess.STDOUT, variables: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """A command, its output piped.

    Args:
        arguments: the command; those that are installed beside this Python come first.
        stderr: where to.
        variables: for its environment.
    """
    return subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        errors="replace",
        start_new_session=True,
        env={
            **os.environ,
            "PATH": f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONUNBUFFERED": "1",
            "CNNPIPE_FLOW_RUN_ID": str(runtime.flow_run.id),
            **(variables or {}),
        },
    )


def stop(process: subprocess.Popen[str]) -> None:
    """Ends a command and everything that it started.

    An interrupt lets DVC remove its workspace and the stage tell MLflow; what takes too long is
    killed. What counts is when the last process of the group is gone.
    """
    # A shell's background job ignores interrupts, and so does all that it starts.
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    with suppress(ProcessLookupError):
        for number, seconds in (
            (signal.SIGTERM if ignored else signal.SIGINT, _INTERRUPT_S),
            (signal.SIGKILL, _KILL_S),
        ):
            os.killpg(process.pid, number)
            os.killpg(process.pid, signal.SIGCONT)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                process.poll()  # or it would stay as a zombie, and the group with it
                os.killpg(process.pid, 0)
                time.sleep(0.05)
    process.wait()


def run(*arguments: str) -> Finished:
    """Runs a command to its end, what it says on stderr in the log line by line."""
    process = start(*arguments, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    output: list[str] = []

    def collect(pipe: IO[str]) -> None:
        output.append(pipe.read())

    collector = threading.Thread(target=collect, args=(process.stdout,))
    collector.start()
    reason = ""
    try:
        for line in process.stderr:
            if line := line.rstrip():
                get_run_logger().info(line)
                reason = line
        code = process.wait()
    except BaseException:
        stop(process)
        raise
    finally:
        collector.join()
    return Finished(code, output[0], reason)
