"""The served model under load: clients that each send one photo after another, for a minute.

The tutorial's network at 300 px, behind `mlflow models serve`, behind a plain FastAPI server, and
in the clients' own process. `--seconds` and `--workers` (of MLflow's server) are options.
"""

import argparse
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, chdir, closing, contextmanager, nullcontext
from http.client import HTTPConnection
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np

from benchmarks.harness import REPOSITORY, Row, at_most, faster, photos, report

CLIENTS = 4


def load(url: str, bodies: Sequence[bytes], clients: int, seconds: float) -> list[float]:
    """How long each request took, in seconds.

    Args:
        url: where to post them.
        bodies: of the requests, sent by turns.
        clients: how many send at a time, each over a connection that stays.
        seconds: for so long new ones are sent.

    Raises:
        RuntimeError: an answer was not 200.
    """
    address = urlsplit(url)

    @contextmanager
    def client() -> Iterator[Callable[[bytes], None]]:
        with closing(HTTPConnection(address.netloc, timeout=60)) as connection:

            def post(body: bytes) -> None:
                connection.request("POST", address.path, body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                text = answer.read()
                if answer.status != 200:
                    raise RuntimeError(f"{answer.status}: {text[-500:].decode(errors='replace')}")

            yield post

    return _together(client, bodies, clients, seconds)


def _together(
    client: Callable[[], AbstractContextManager[Callable[[bytes], object]]],
    bodies: Sequence[bytes],
    clients: int,
    seconds: float,
) -> list[float]:
    taken: list[float] = []
    errors: list[Exception] = []
    end = time.monotonic() + seconds

    def work(number: int) -> None:
        try:
            with client() as call:
                i = number
                while time.monotonic() < end and not errors:
                    started = time.perf_counter()
                    call(bodies[i % len(bodies)])
                    taken.append(time.perf_counter() - started)
                    i += clients
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return taken


@contextmanager
def server(command: Sequence[str], folder: Path, **variables: str) -> Iterator[str]:
    """A server, started with `command` and its port, for the block; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    log = folder / "server.log"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", port], cwd=folder, env={**os.environ, "PATH": path, **variables},
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                urlopen(f"{url}/ping", timeout=5).close()
                break
            except (URLError, OSError):
                if process.poll() is not None:
                    raise RuntimeError(log.read_text()) from None
                time.sleep(0.1)
        yield f"{url}/invocations"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def register(folder: Path) -> Path:
    """Makes the tutorial's network the first version of `cnnpipe` there; the model file."""
    import torch

    from cnnpipe import tracking
    from cnnpipe.network.classifier import Classifier, Preparation
    from cnnpipe.network.model import build
    from cnnpipe.params import Model

    torch.manual_seed(0)
    mean, std = (120.0, 110.0, 100.0), (70.0, 65.0, 60.0)
    preparation = Preparation(300, "stretch", "rgb", mean, std, 100_000_000)
    network = build(Model(), preparation.input_shape, 2).eval()
    path = folder / "model.safetensors"
    Classifier(network, Model(), preparation, ("cat", "dog")).save(path)
    with chdir(folder), tracking.start_run("served", {}) as run:
        run.log_model(path, ("cat", "dog"))
    return path


def rows(case: str, peer: str, theirs: list[float], ours: list[float], seconds: float) -> list[Row]:
    """The median, the 95th percentile and the throughput of two, in milliseconds."""
    both = [[1e3 * float(np.percentile(taken, share)) for taken in (theirs, ours)]
            for share in (50, 95)]  # fmt: skip
    each = [1e3 * seconds / len(taken) for taken in (theirs, ours)]
    return [
        at_most(f"{case}, median", peer, *both[0], "ms", 2),
        at_most(f"{case}, 95th percentile", peer, *both[1], "ms", 2),
        faster(f"{case}, a photo of all clients'", peer, *each, "ms", 0.5),
    ]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    with photos() as images, TemporaryDirectory() as name:
        folder = Path(name)
        files = [path.read_bytes() for path in islice(sorted(images.rglob("*.jpg")), 400)]
        model = register(folder)
        tables = [
            json.dumps(
                {"dataframe_split": {"columns": ["image"],
                                     "data": [[base64.b64encode(file).decode()]]}}
            ).encode()
            for file in files
        ]  # fmt: skip

        def measured(url: str, bodies: Sequence[bytes]) -> list[float]:
            load(url, bodies, CLIENTS, min(2, args.seconds))
            return load(url, bodies, CLIENTS, args.seconds)

        mlflow = ["mlflow", "models", "serve", "-m", "models:/cnnpipe/1", "--env-manager", "local",
                  "--workers", str(args.workers)]  # fmt: skip
        store = f"sqlite:///{folder / 'mlflow.db'}"
        with server(mlflow, folder, MLFLOW_TRACKING_URI=store) as url:
            ours = measured(url, tables)
        plain = ["uvicorn", "benchmarks.plain_server:app", "--log-level", "warning"]
        with server(plain, folder, MODEL=str(model), PYTHONPATH=str(REPOSITORY)) as url:
            theirs = measured(url, files)

        from cnnpipe.serving import Predictor

        predictor = Predictor.load(model)
        bare = _together(lambda: nullcontext(lambda file: predictor.predict([file])), files,
                         CLIENTS, args.seconds)  # fmt: skip
    case = f"{CLIENTS} clients, {len(ours):,} photos"
    report(
        "serving",
        [
            *rows(case, "plain FastAPI", theirs, ours, args.seconds),
            *rows(case, "no server", bare, ours, args.seconds),
        ],
        ["torch", "mlflow", "fastapi", "uvicorn"],
    )


if __name__ == "__main__":
    main()
