"""Ends all that `cnnpipe up` has started as soon as that has ended itself, however it did.

    python -m cnnpipe.guard MARK

`cnnpipe up` starts it first, and gives whatever it starts later the mark in the variable
CNNPIPE_UP, which those pass on: a flow's stages are found by it although they are in sessions of
their own.
"""

import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from cnnpipe.workspace import locked

VARIABLE = "CNNPIPE_UP"
_WAIT_S = 15


def main() -> None:
    """Waits for the end of stdin, each of whose lines names a process and its id; ends all."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends when all others have
    mark = sys.argv[1]
    with locked(".cnnpipe/guard.lock", "the end of an earlier `cnnpipe up`", wait=True):
        print("ready", flush=True)
        pids = {name: int(pid) for name, pid in (line.split() for line in sys.stdin)}
        worker = pids.pop("worker", None)
        servers = set(pids.values())

        def flows() -> list[psutil.Process]:
            return [process for process in others() if process.pid != worker]

        def others() -> list[psutil.Process]:
            return [process for process in marked(mark) if not _is_of(process, servers)]

        # In this order, as each has something to tell the next.
        for processes in (flows, others, lambda: marked(mark)):
            _end(processes)


def marked(mark: str) -> list[psutil.Process]:
    """The processes that have the mark."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(VARIABLE) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _is_of(process: psutil.Process, servers: set[int]) -> bool:
    with suppress(psutil.Error):
        return bool(servers & {process.pid, *(parent.pid for parent in process.parents())})
    return False


def _end(processes: Callable[[], list[psutil.Process]]) -> None:
    """Asks the uppermost of them to end, as each ends its own, and insists where that fails."""
    asked: set[psutil.Process] = set()
    deadline = time.monotonic() + _WAIT_S
    while left := processes():
        ids = {process.pid for process in left}
        for process in left:
            with suppress(psutil.Error):
                if time.monotonic() > deadline:
                    process.kill()
                elif process not in asked and process.ppid() not in ids:
                    process.terminate()
                    asked.add(process)
        time.sleep(0.1)


if __name__ == "__main__":
    main()
