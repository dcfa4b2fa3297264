"""Work spread over the cores, and processes that end whatever happens to those around them."""

import ctypes
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import Any

from cnnpipe.errors import RunFailed


class WorkerDied(RunFailed):
    """A worker process ended before its work did."""


def num_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def process_pool(
    num_workers: int, begin: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
) -> Iterator[ProcessPoolExecutor]:
    """Worker processes for the block; what they have not begun when it ends, they never will.

    Args:
        num_workers: how many.
        begin: called in each worker before its first work.
        arguments: of `begin`.

    Raises:
        WorkerDied: a worker did.
    """
    pool = ProcessPoolExecutor(
        num_workers, initializer=_begin, initargs=(os.getpid(), begin, arguments)
    )
    # Ctrl-C goes to the whole group, but it is the parent's to act on; it then ends the workers,
    # which inherit the mask. And an exception raised in the middle of a fork would be lost.
    handled = {signal.SIGINT, signal.SIGTERM}
    others = set(active_children())
    workers: set[BaseProcess] = set()
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, handled)
        # What there is now is no garbage to a worker: looking through it for some, each would copy
        # every page of it, 30 MB a worker.
        gc.freeze()
        try:
            pool.submit(int)  # starts them
            workers = set(active_children()) - others
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
        yield pool
    except BaseException as error:
        # The pool only asks them to end, and one that died may hold what the others wait for.
        for worker in workers:
            worker.kill()
        if isinstance(error, BrokenProcessPool):
            raise WorkerDied(
                "a worker process died, perhaps for want of memory: try again with resize.workers=1"
            ) from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def computing_limit(seconds: float) -> Iterator[None]:
    """Ends this process, whatever it is doing, once the block has kept the processor for so long.

    It is the system that ends it: native code that loops forever listens to nothing else.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def end_with_dvc() -> None:
    """Has this process sent SIGTERM within a second after the DVC that started it is gone.

    Likewise where a flow has started DVC, and is gone. A signal to DVC or the flow alone would else
    leave the stage running: neither they nor the shell that is between pass one on. Where DVC did
    not start this process it does nothing.
    """
    if "DVC_STAGE" not in os.environ:
        return
    import psutil

    # Each process up to DVC or to the flow, which have not themselves the variables that they give
    # to what they start.
    variables = {"DVC_STAGE", "CNNPIPE_FLOW_RUN_ID"}
    line = [psutil.Process()]
    with suppress(psutil.Error):
        while (parent := line[-1].parent()) and variables & parent.environ().keys():
            line.append(parent)
    parents = {process: process.ppid() for process in line}

    def watch() -> None:
        with suppress(psutil.NoSuchProcess):
            while all(process.ppid() == parent for process, parent in parents.items()):
                time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def end_with_parent(parent: int) -> None:
    """Has this process killed once the one that started it has ended, however; on Linux alone.

    Args:
        parent: that one's id: it may have ended already.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # linux/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _begin(parent: int, begin: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    end_with_parent(parent)
    if begin is not None:
        begin(*arguments)
