"""What the drills share: a fault with what is expected of it, and places to practise in."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
import pandas as pd
import psutil
from ruamel.yaml import YAML
from safetensors.numpy import load_file

AS_EXPECTED = "as expected"
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Drill:
    """A fault, and how it is practised."""

    name: str
    """`python -m benchmarks.drills NAME` runs it alone."""
    fault: str
    expected: str
    run: Callable[[], str]
    """What was seen: `AS_EXPECTED`, or what was otherwise."""


def compared(**right: bool) -> str:
    """What is not as it should be, by name, with _ for spaces."""
    wrong = [name.replace("_", " ") for name, is_right in right.items() if not is_right]
    return f"not: {', '.join(wrong)}" if wrong else AS_EXPECTED


def environment(place: Path, **more: str) -> dict[str, str]:
    """For commands in a copy of the repository: its own code, the tracker's default store."""
    kept = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(place), "DVC_NO_ANALYTICS": "1", **more}


@contextmanager
def repository(**settings: object) -> Iterator[Path]:
    """A copy of this repository, committed to git, with a pipeline on the digits of ten seconds.

    Args:
        settings: by their dotted names with __ for the dot, instead of the quick ones.
    """
    quick: dict[str, object] = {
        "download__source": "digits", "download__limit_per_class": 40, "resize__size": 24,
        "resize__color": "grey", "train__epochs": 30, "train__batch_size": 16,
        "train__augment": "flip", "model__dropout": 0.2,
    }  # fmt: skip
    with TemporaryDirectory() as folder:
        place = Path(folder) / "repository"
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).exists():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, place / name)
        change_settings(place, **{**quick, **settings})
        user = ["-c", "user.name=drill", "-c", "user.email=drill@localhost"]
        for line in (["init", "-q"], ["add", "-A"], [*user, "commit", "-qm", "drill"]):
            subprocess.run(["git", *line], cwd=place, check=True)
        yield place


def change_settings(place: Path, **settings: object) -> None:
    """Writes settings into the params.yaml there."""
    yaml = YAML()
    content = yaml.load(place / "params.yaml")
    for name, value in settings.items():
        section, key = name.split("__")
        content[section][key] = value
    yaml.dump(content, place / "params.yaml")


def run(place: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A command there, to its end."""
    return subprocess.run(
        arguments, cwd=place, env=environment(place, **more), capture_output=True, text=True
    )


def start(place: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    """A command there, in a session of its own; its output goes to the file `log`."""
    with (place / "log").open("w") as log:
        return subprocess.Popen(
            arguments, cwd=place, env=environment(place, **more), stdout=log,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip


def wait_for_checkpoint(place: Path, process: subprocess.Popen[str]) -> None:
    """Returns once a training there has written a checkpoint after this call, or has ended."""
    before = time.time()
    while process.poll() is None and not any(
        path.stat().st_mtime > before for path in place.glob(".cnnpipe/checkpoints/*/0*")
    ):
        time.sleep(0.01)


def seconds_until_gone(processes: list[psutil.Process], most: float = 20) -> float:
    """How long it takes until none of the processes runs any more; those left are killed then."""
    started = time.monotonic()
    _, alive = psutil.wait_procs(processes, timeout=most)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return time.monotonic() - started


def result(place: Path) -> tuple[str, list[list[float]]]:
    """The checksum of the final weights, and the history without its durations."""
    weights = load_file(place / "models/model.safetensors")
    checksum = hashlib.sha256()
    for name in sorted(weights):
        checksum.update(name.encode() + weights[name].tobytes())
    history = pd.read_csv(place / "reports/train/history.csv").drop(columns="seconds")
    return checksum.hexdigest(), history.to_numpy().tolist()


def runs(place: Path) -> list[mlflow.entities.Run]:
    """All runs in the default store there."""
    client = mlflow.MlflowClient(f"sqlite:///{place / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("cnnpipe")
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def steps(place: Path, run_id: str) -> list[int]:
    """The epochs at which a run has a point, in order."""
    client = mlflow.MlflowClient(f"sqlite:///{place / 'mlflow.db'}")
    return [point.step for point in client.get_metric_history(run_id, "val/loss")]


def is_one_whole_run(place: Path, num_epochs: int) -> bool:
    """Whether the tracker has the one run that the model names, FINISHED, each epoch once."""
    run_id = json.loads((place / "models/run.json").read_text())["run_id"]
    found = [(run.info.run_id, run.info.status) for run in runs(place)]
    return found == [(run_id, "FINISHED")] and steps(place, run_id) == list(
        range(1, num_epochs + 1)
    )
