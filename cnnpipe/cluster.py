"""Work spread over the hosts of a Dask cluster.

Dask's workers do it in processes of this package's own, one for each of their threads. A worker
itself may start no processes of multiprocessing, a crash of native code would end all that it is
at, and a limit of computing time counts all its threads. Such a process is kept from request to
request, since it takes longer to start than many a request to answer.
"""

import importlib.util
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib import metadata
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any
from uuid import uuid4

from tqdm import tqdm

from cnnpipe.errors import RunFailed, UserError
from cnnpipe.origin import code_digest
from cnnpipe.processes import WorkerDied, end_with

# Those whose version may change a pixel.
_PACKAGES = ("numpy", "pillow", "scikit-image", "scipy", "simplejpeg", "tifffile")

_CONNECTING_S = 10
# How often it is looked whether there are workers, and by them whether the run goes on.
_LOOKING_S = 5


_Setup = dict[str, Any]
"""What each process that answers is told first.

Of plain values: a worker that cannot read what it is sent, for want of this package, ends.
"""


def answers(
    scheduler: str, module: str, folder: str, arguments: Any, requests: Sequence[Any]
) -> Iterator[Any]:
    """What the cluster answers to each of the requests, in their order.

    A request whose worker is lost is answered by another, perhaps while the lost one goes on.

    Args:
        scheduler: the address of Dask's.
        module: is run by each process that answers, and then calls `serve`.
        folder: exists during this run alone, on storage that all hosts share.
        arguments: what `serve` begins with.
        requests: each is sent on its own.

    Raises:
        UserError: Dask is not installed.
        RunFailed: the scheduler cannot be reached or is lost, or a worker fails; which, and why.
    """
    if importlib.util.find_spec("distributed") is None:
        raise UserError(
            f"the Dask scheduler {scheduler} needs Dask here, too: pip install 'cnnpipe[dask]'"
        )
    setup: _Setup = {
        "module": module,
        "folder": folder,
        "workspace": os.getcwd(),
        "versions": _versions(),
        "arguments": arguments,
    }
    with _connected(scheduler) as client:
        name = f"cnnpipe-{uuid4()}"
        keys = [(name, i) for i in range(len(requests))]
        futures = client.map(_asking(), requests, key=keys, setup=setup, pure=False)
        early: dict[int, Any] = {}
        following = 0
        for number, answer in _completed(client, scheduler, futures):
            early[number] = answer
            while following in early:
                yield early.pop(following)
                following += 1


@contextmanager
def _connected(scheduler: str) -> Iterator[Any]:
    """A client of the scheduler; whatever it has not been answered when it leaves is cancelled."""
    logging.disable()  # Dask and what it rests on write to stderr
    try:
        from distributed import Client

        outcome: SimpleQueue[Any] = SimpleQueue()

        def connect() -> None:
            try:
                outcome.put(Client(scheduler, timeout=_CONNECTING_S, set_as_default=False))
            except Exception as error:
                outcome.put(error)

        # What listens there without ever a word it would wait for as long.
        threading.Thread(target=connect, daemon=True).start()
        with warnings.catch_warnings(action="ignore"):
            try:
                client = outcome.get(timeout=_CONNECTING_S + 2)
            except Empty:
                client = TimeoutError(f"no answer within {_CONNECTING_S} s")
        if isinstance(client, Exception):
            raise RunFailed(
                f"no Dask scheduler answers at {scheduler} ({_line(client)}): start it, or resize "
                "here with resize.scheduler=null and DASK_SCHEDULER_ADDRESS unset"
            )
        try:
            yield client
        finally:
            with suppress(Exception):  # of a scheduler that is gone
                client.close(timeout=_CONNECTING_S)
    finally:
        logging.disable(logging.NOTSET)


def _completed(client: Any, scheduler: str, futures: list[Any]) -> Iterator[tuple[int, Any]]:
    """The number of each request and its answer, as they come in; nothing is kept of them."""
    from distributed import as_completed

    completed = as_completed(futures, with_results=True, loop=client.loop)
    futures.clear()
    lost = f"the Dask scheduler at {scheduler} is lost, or was restarted: run it again"
    said, looked = False, 0.0
    while not completed.is_empty():
        while not completed.has_ready():
            if client.status != "running":
                raise RunFailed(lost)
            if not said and time.monotonic() - looked > _LOOKING_S:
                looked = time.monotonic()
                with suppress(OSError):
                    said = not client.nthreads()
                if said:
                    tqdm.write(f"waits for workers of {scheduler}", file=sys.stderr)
            time.sleep(0.02)
        try:
            future, reply = next(completed)
        except Exception as error:
            raise RunFailed(
                f"workers of the Dask scheduler at {scheduler} fail, and their logs say more: "
                f"{_line(error)}"
            ) from None
        if future.status != "finished":
            raise RunFailed(lost)
        problem, answer = reply
        if problem:
            raise RunFailed(problem)
        yield future.key[1], answer


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _versions() -> dict[str, str]:
    """Of all that the answers depend on; the code's is a digest."""
    return {"cnnpipe": code_digest(), **{name: metadata.version(name) for name in _PACKAGES}}


_own = threading.local()
"""`process`, of each thread of a worker: the one that answers its requests."""


class _Process:
    """A process that answers requests, as seen by the worker that has started it."""

    def __init__(self, setup: _Setup) -> None:
        self.setup = setup
        self._connection, theirs = Pipe()
        with theirs:
            numbers = str(theirs.fileno()), str(os.getpid())
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", setup["module"], *numbers],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a terminal's Ctrl-C is the worker's to act on
            )
        self._connection.send(setup)

    def ask(self, request: Any) -> tuple[str, Any]:
        """What went wrong, if anything did, and the answer."""
        try:
            self._connection.send(request)
            problem, answer = self._connection.recv()
        except (EOFError, OSError):
            code = self._process.wait()
            why = "perhaps for want of memory" if code < 0 else "and the worker's log says why"
            problem, answer = f"a process there ended with code {code}, {why}", None
        if problem:
            self.end()
        return problem, answer

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()


def _asking() -> Callable[[Any, _Setup], tuple[str, Any]]:
    """`ask` for a worker, which need not have this package to read it: one that has not says so."""

    # Nested, and so sent whole; of others nothing is sent but the name.
    def asking(request: Any, setup: dict[str, Any]) -> tuple[str, Any]:
        from pkgutil import resolve_name

        from distributed import get_worker

        try:
            ask = resolve_name("cnnpipe.cluster:ask")
        except (ImportError, AttributeError) as error:
            problem, answer = f"has no cnnpipe that can do it: {error}", None
        else:
            problem, answer = ask(request, setup)
        return f"worker {get_worker().address}: {problem}" if problem else "", answer

    return asking


def ask(request: Any, setup: _Setup) -> tuple[str, Any]:
    """What went wrong, if anything did, and the answer to a request, in a thread of a worker."""
    process: _Process | None = getattr(_own, "process", None)
    if process is not None and (process.setup != setup or not process.is_alive):
        process.end()
        process = None
    if process is None:
        process = _own.process = _Process(setup)
    return process.ask(request)


def serve(begin: Callable[[Any], AbstractContextManager[Callable[[Any], Any]]]) -> None:
    """Answers requests in a process that a worker has started, for as long as the run lasts.

    Args:
        begin: from `arguments` to a function that answers a request.
    """
    descriptor, parent = map(int, sys.argv[1:])
    end_with(parent, signal.SIGKILL)
    connection = Connection(descriptor)
    setup: _Setup = connection.recv()
    try:
        _check(setup)
        os.chdir(setup["workspace"])
        with begin(setup["arguments"]) as answer:
            for request in _requests(connection, setup["folder"]):
                connection.send(("", answer(request)))
        return
    except WorkerDied:
        problem = "a process there ended, perhaps for want of memory: give it fewer --nthreads"
    except (UserError, RunFailed) as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename or setup['workspace']}: {error.strerror}"
    connection.send((problem, None))


def _requests(connection: Connection, folder: str) -> Iterator[Any]:
    """Those that come in, until the worker has ended, or the run with its folder."""
    with suppress(EOFError):
        while True:
            while not connection.poll(_LOOKING_S):
                if not os.path.isdir(folder):
                    return
            yield connection.recv()


def _check(setup: _Setup) -> None:
    if not os.path.isdir(setup["folder"]):
        raise RunFailed(
            f"does not see {setup['workspace']}: that folder must be on storage that all hosts "
            "share, under the same path"
        )
    here = _versions()
    for name, version in setup["versions"].items():
        if here[name] != version:
            other = "another cnnpipe" if name == "cnnpipe" else f"{name} {here[name]}"
            needed = "the same" if name == "cnnpipe" else f"{name}=={version}"
            raise RunFailed(f"has {other}: install {needed} as where `cnnpipe resize` runs")
