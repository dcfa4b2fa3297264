"""A real `mlflow models serve`, far from the checkout: the bits of `cnnpipe predict`."""

import base64
import csv
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import mlflow
import numpy as np
import pytest

from benchmarks.serving import load
from cnnpipe import tracking
from cnnpipe.data.drawn_pets import draw
from cnnpipe.data.raw import jpeg

SCRIPTS = Path(sys.executable).parent

# A package is found by folders on the path, or by the hooks of its installation: with neither, no
# process of this environment finds the checkout's.
FAR_FROM_THE_CHECKOUT = """
import os, sys
sys.path[:] = [path for path in sys.path if not os.path.isdir(os.path.join(path, "cnnpipe"))]
sys.meta_path[:] = [
    finder for finder in sys.meta_path
    if "__editable__" not in getattr(finder, "__module__", type(finder).__module__)
]
"""

Ask = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry whose champion is a small network, and a test split of JPEG files."""
    folder = tmp_path_factory.mktemp("store")
    for i in range(30):
        label, pixels = draw(3, i)
        path = folder / "test" / label / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(pixels))
    return folder


@pytest.fixture(scope="module", autouse=True)
def champion(store: Path) -> Iterator[None]:
    from cnnpipe.network.classifier import Classifier, Preparation
    from cnnpipe.network.model import build
    from cnnpipe.params import Model

    model = Model(flip_average=True)
    preparation = Preparation(
        64, "crop", "rgb", (120.5, 110.0, 100.0), (70.0, 65.0, 60.0), 1_000_000
    )
    network = build(model, preparation.input_shape, 2).eval()
    Classifier(network, model, preparation, ("cat", "dog")).save(store / "m.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(store)
        for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "DVC_EXP_NAME"):
            patch.delenv(name, raising=False)
        with tracking.start_run("x", {}) as run:
            run.log_model("m.safetensors", ("cat", "dog"))
        mlflow.MlflowClient().set_registered_model_alias("cnnpipe", "champion", "1")
        yield


@pytest.fixture(scope="module")
def far_away(tmp_path_factory: pytest.TempPathFactory, store: Path) -> dict[str, str]:
    """The variables of an environment in which cnnpipe is not installed."""
    folder = tmp_path_factory.mktemp("far")
    (folder / "sitecustomize.py").write_text(FAR_FROM_THE_CHECKOUT)
    return {
        **os.environ,
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "MLFLOW_TRACKING_URI": f"sqlite:///{store / 'mlflow.db'}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "2",  # the tests themselves have 1
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, far_away: dict[str, str]) -> Iterator[str]:
    """The address of a server that was started in an empty folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    empty = tmp_path_factory.mktemp("empty")
    log = tmp_path_factory.mktemp("log") / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["mlflow", "models", "serve", "-m", "models:/cnnpipe@champion",
             "--env-manager", "local", "-p", port],
            cwd=empty, env=far_away, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urlopen(f"{url}/ping", timeout=5).close()
                break
            except (URLError, OSError):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield f"{url}/invocations"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


@pytest.fixture
def ask(server: str) -> Ask:
    def ask(body: Any, kind: str = "application/json") -> tuple[int, str]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = Request(server, data, {"Content-Type": kind})
        try:
            with urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return ask


def split(*images: bytes) -> dict[str, Any]:
    data = [[base64.b64encode(image).decode()] for image in images]
    return {"dataframe_split": {"columns": ["image"], "data": data}}


def photos(store: Path) -> list[Path]:
    return sorted((store / "test").rglob("*.jpg"))


def test_the_environment_of_the_server_has_no_cnnpipe_but_the_models_own(
    far_away: dict[str, str], tmp_path: Path
) -> None:
    def python(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=far_away, capture_output=True, text=True
        )

    assert "No module named 'cnnpipe'" in python("import cnnpipe").stderr
    found = python(
        "import mlflow\nmlflow.pyfunc.load_model('models:/cnnpipe@champion')\n"
        "import cnnpipe\nprint(cnnpipe.__file__)\n"
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip().endswith("/artifacts/code/cnnpipe/__init__.py")


def test_the_server_and_predict_give_the_same_bits_for_a_whole_test_split(
    store: Path, ask: Ask
) -> None:
    command = [SCRIPTS / "cnnpipe", "predict", "test", "--model", "models:/cnnpipe@champion"]
    subprocess.run([*command, "--csv", "predictions.csv"], cwd=store, check=True)
    with open(store / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [str(p.relative_to(store)) for p in photos(store)]
    expected = [
        {key: value if key == "prediction" else float(value)
         for key, value in row.items() if key != "path"}
        for row in rows
    ]  # fmt: skip
    assert len({row["probability_cat"] for row in expected}) == 30
    files = [path.read_bytes() for path in photos(store)]
    one_by_one = [json.loads(ask(split(file))[1])["predictions"][0] for file in files]
    assert one_by_one == expected
    status, answer = ask(split(*files))
    assert (status, json.loads(answer)["predictions"]) == (200, expected)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(10_000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


GOOD = jpeg(np.zeros((20, 20, 3), np.uint8))
TEXT = base64.b64encode(GOOD).decode()
BAD = {
    "no image": (split(b"no image"), "row 0: not an image"),
    "one of three": (split(GOOD, GOOD, b"no image"), "row 2: not an image"),
    "two of three": (split(b"x", GOOD, b""), "row 0: not an image; row 2: empty file"),
    "cut": (split(GOOD[:-80]), "row 0: damaged: "),
    "bomb": (split(png_header(60_000, 60_000)), "row 0: more than 1,000,000 pixels"),
    "large": (split(png_header(2_000, 501)), "row 0: 2000 x 501 pixels, more than 1,000,000"),
    "a line": (split(png_header(70_000, 2)), "row 0: 70000 x 2 pixels, a side of more than"),
    "no base64": ({"dataframe_split": {"columns": ["image"], "data": [["a"]]}}, "image"),
    "null": ({"dataframe_split": {"columns": ["image"], "data": [[None]]}}, "column image"),
    "a number": ({"dataframe_records": [{"image": 5}]}, "column image"),
    "no column": ({"dataframe_split": {"columns": [], "data": [[]]}}, "missing inputs ['image']"),
    "another": ({"dataframe_records": [{"photo": TEXT}]}, "missing inputs ['image']"),
    "no rows": (split(), "the table has no rows: send an image in each"),
    "no records": ({"dataframe_records": []}, "missing inputs ['image']"),
    "inputs": ({"inputs": [TEXT]}, "row 0: base64, which is decoded in dataframe_split"),
    "named inputs": ({"inputs": {"image": [TEXT]}}, "row 0: base64, which is decoded in data"),
    "instances": ({"instances": [{"image": TEXT}]}, "row 0: base64, which is decoded in data"),
    "no form": ({"image": TEXT}, "exactly one of the input fields"),
    "no JSON": (b"{", "valid JSON"),
    "nothing": (b"", "valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_told_why_and_the_next_one_is_answered(ask: Ask, case: str) -> None:
    before = ask(split(GOOD))
    assert before[0] == 200
    request, reason = BAD[case]
    status, answer = ask(request)
    assert status == 400
    assert reason in json.loads(answer)["message"]
    assert ask(split(GOOD)) == before


def test_other_kinds_of_request_are_refused(ask: Ask) -> None:
    assert ask(GOOD, "image/jpeg")[0] == 415
    status, answer = ask(f"image\n{TEXT}\n".encode(), "text/csv")
    assert status == 400
    assert "row 0: base64, which is decoded in dataframe_split" in answer


def test_bad_requests_beside_good_ones_change_nothing(ask: Ask, store: Path) -> None:
    files = [path.read_bytes() for path in photos(store)[:8]]
    expected = [ask(split(file)) for file in files]
    mixed: list[Any] = []
    for file, (bad, _) in zip(files * 2, BAD.values(), strict=False):
        mixed += [split(file), bad]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, mixed))
    assert answers[0::2] == expected * 2
    assert {status for status, _ in answers[1::2]} == {400}


def test_the_load_test_counts_answers_and_fails_with_an_error(server: str) -> None:
    good = json.dumps(split(GOOD)).encode()
    seconds = load(server, [good], clients=4, seconds=1)
    assert len(seconds) >= 4
    assert min(seconds) > 0
    with pytest.raises(RuntimeError, match=r"400: .*not an image"):
        load(server, [good, json.dumps(split(b"x")).encode()], clients=4, seconds=1)
