"""A training that is killed again and again, and one that is asked to stop.

After kill -9 at 20 random moments it is to end with the weights, the history and the MLflow run of
one that was never stopped; after Ctrl-C or SIGTERM it is to end at once, as the signal says.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
import pandas as pd
import psutil
from safetensors.numpy import load_file

from benchmarks.harness import CNNPIPE, command, photos, workspace

KILLS = 20
ARCHITECTURES: dict[str, dict[str, object]] = {
    "article": {},
    "residual": {
        "model__architecture": "residual",
        "model__blocks": 2,
        "train__optimizer": "adamw",
    },
}
Row = tuple[str, str, str]
"""The fault, what is expected, what was seen."""
AS_EXPECTED = "as expected"


@contextmanager
def training(images: Path, **settings: object) -> Iterator[Path]:
    """A workspace whose `cnnpipe train` takes a minute, with dropout and augmentation."""
    with TemporaryDirectory() as folder:
        place = Path(folder)
        workspace(
            place, images, 200, resize__size=48, train__epochs=200, train__batch_size=16,
            train__augment="photo", model__dropout=0.2, **settings,
        )  # fmt: skip
        for stage in ("resize", "split"):
            command([CNNPIPE, stage], place)()
        yield place


def start(place: Path) -> subprocess.Popen[str]:
    """A training that has written its first checkpoint of this start."""
    before = time.time()
    process = subprocess.Popen(
        [CNNPIPE, "train"], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while process.poll() is None and not any(
        path.stat().st_mtime > before for path in place.glob(".cnnpipe/checkpoints/*/0*")
    ):
        time.sleep(0.01)
    return process


def result(place: Path) -> tuple[str, list[list[float]]]:
    """The checksum of the final weights, and the history without its durations."""
    weights = load_file(place / "models/model.safetensors")
    checksum = hashlib.sha256()
    for name in sorted(weights):
        checksum.update(name.encode() + weights[name].tobytes())
    history = pd.read_csv(place / "reports/train/history.csv").drop(columns="seconds")
    return checksum.hexdigest(), history.to_numpy().tolist()


def killed(architecture: str, images: Path) -> Row:
    """Kills the training `KILLS` times and lets it end."""
    chance = random.Random(0)
    with training(images, **ARCHITECTURES[architecture]) as place:
        command([CNNPIPE, "train"], place)()
        expected = result(place)
        (place / "mlflow.db").unlink()
        for kill in range(KILLS):
            process = start(place)
            time.sleep(chance.uniform(0, 1))
            process.kill()
            output, _ = process.communicate()
            if process.returncode != -signal.SIGKILL:
                return f"{architecture}: kill -9", "still running", f"at kill {kill}: {output}"
        process = start(place)
        output, _ = process.communicate()
        if process.returncode:
            return f"{architecture}: kill -9", "an end", output
        client = mlflow.MlflowClient(f"sqlite:///{place / 'mlflow.db'}")
        ids = json.loads((place / "models/run.json").read_text())
        runs = client.search_runs([ids["experiment_id"]])
        steps = [p.step for p in client.get_metric_history(ids["run_id"], "val/loss")]
        faults = [
            name
            for name, right in {
                "weights or history differ": result(place) == expected,
                "several runs": [run.info.run_id for run in runs] == [ids["run_id"]],
                "not FINISHED": runs[0].info.status == "FINISHED",
                "points doubled or missing": steps == list(range(1, len(expected[1]) + 1)),
            }.items()
            if not right
        ]
    return (
        f"{architecture}: kill -9 at {KILLS} random moments",
        "the same weights and history, one run, each point once",
        "; ".join(faults) or AS_EXPECTED,
    )


def asked_to_stop(number: signal.Signals, images: Path) -> Row:
    """Sends the signal once."""
    with training(images) as place:
        process = start(place)
        time.sleep(1)
        children = psutil.Process(process.pid).children(recursive=True)
        asked = time.monotonic()
        process.send_signal(number)
        process.communicate()
        seconds = time.monotonic() - asked
        client = mlflow.MlflowClient(f"sqlite:///{place / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("cnnpipe")
        run = client.search_runs([experiment.experiment_id])[0]
        left = sum(child.is_running() for child in children)
    seen = f"code {process.returncode}, {run.info.status}, {left} left"
    expected = f"code {128 + number}, KILLED, 0 left"
    if seen == expected and seconds < 5:
        return number.name, f"{expected}, within 5 s", AS_EXPECTED
    return number.name, f"{expected}, within 5 s", f"{seen}, after {seconds:.1f} s"


def main() -> None:
    """Runs the drills; exits with 1 where one went wrong."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    with photos(200) as images:
        rows = [killed(architecture, images) for architecture in ARCHITECTURES]
        rows += [asked_to_stop(number, images) for number in (signal.SIGINT, signal.SIGTERM)]
    for row in [("fault", "expected", "seen"), *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, (44, 56, 0), strict=True)))
    raise SystemExit(any(seen != AS_EXPECTED for *_, seen in rows))


if __name__ == "__main__":
    main()
