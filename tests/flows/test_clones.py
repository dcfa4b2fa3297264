"""Clones and one object storage: what one has made the others get, and no credentials with it."""

import hashlib
import io
import json
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from object_storage import Storage
from PIL import Image
from ruamel.yaml import YAML

STAGES = ["download", "resize", "split", "train", "evaluate"]
ARCHIVE = "s3://photos/pets.zip"

Run = Callable[..., CompletedProcess[str]]


def archive() -> bytes:
    """Ten pictures each of dark and bright things."""
    file, rng = io.BytesIO(), np.random.default_rng(0)
    with zipfile.ZipFile(file, "w") as archive:
        for i in range(20):
            picture = io.BytesIO()
            pixels = rng.integers(0, 128, (12, 12, 3)) + 100 * (i % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(picture, "png")
            archive.writestr(f"{('dark', 'bright')[i % 2]}/{i}.png", picture.getvalue())
    return file.getvalue()


@pytest.fixture(scope="module")
def secrets(storage_of_all: Storage) -> list[str]:
    return [storage_of_all.environment()[f"AWS_{name}"]
            for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN")]  # fmt: skip


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What the commands have printed."""
    return []


@pytest.fixture(scope="module")
def run(environment: dict[str, str], storage_of_all: Storage, said: list[str]) -> Run:
    """`run(folder, command, ...)` with the storage's credentials in the environment alone."""

    def run(folder: Path, *command: str) -> CompletedProcess[str]:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**environment, **storage_of_all.environment()},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        said.append(done.stdout)
        assert done.returncode == 0, done.stdout
        return done

    return run


@pytest.fixture(scope="module")
def first(project: Path, storage_of_all: Storage, run: Run) -> Path:
    """The clone that has run the pipeline, on an archive of the storage, and pushed the results."""
    storage_of_all.reset()
    data = archive()
    storage_of_all.put("pets.zip", data)
    storage_of_all.put("nothing", b"", bucket="results")
    params = YAML().load(project / "params.yaml")
    params["download"] |= {"source": "url", "url": ARCHIVE,
                           "sha256": hashlib.sha256(data).hexdigest()}  # fmt: skip
    YAML().dump(params, project / "params.yaml")
    run(project, "dvc", "remote", "add", "-d", "storage", "s3://results/dvc")
    run(project, "dvc", "repro")
    run(project, "git", "add", "-A")
    run(project, "git", "commit", "-qm", "results")
    run(project, "dvc", "push")
    predict(project, run)
    return project


@pytest.fixture(scope="module")
def clone(first: Path, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    def clone() -> Path:
        folder = tmp_path_factory.mktemp("clone") / "copy"
        run(first, "git", "clone", "-q", ".", str(folder))
        return folder

    return clone


def predict(folder: Path, run: Run) -> None:
    run(folder, "cnnpipe", "predict", ARCHIVE, "--csv", "reports/predictions.csv")


def run_id(folder: Path) -> str:
    return str(json.loads((folder / "models" / "run.json").read_text())["run_id"])


def test_a_clone_pulls_runs_nothing_and_predicts_the_same_to_the_bit(
    first: Path, clone: Callable[[], Path], run: Run
) -> None:
    second = clone()
    run(second, "dvc", "pull")
    done = run(second, "dvc", "repro")
    assert "Running stage" not in done.stdout
    assert done.stdout.count("didn't change, skipping") == len(STAGES)
    assert run(second, "git", "status", "--short").stdout == ""
    assert run_id(second) == run_id(first)
    predict(second, run)
    table = "reports/predictions.csv"
    assert (second / table).read_bytes() == (first / table).read_bytes()


def test_a_clone_without_data_pulls_what_it_needs_and_runs_nothing(
    first: Path, clone: Callable[[], Path], run: Run
) -> None:
    third = clone()
    done = run(third, "dvc", "repro", "--pull")
    assert "Running stage" not in done.stdout
    assert run(third, "git", "status", "--short").stdout == ""
    assert run(third, "dvc", "status").stdout.endswith("up to date.\n")
    for name in ("models/model.safetensors", "reports/report.html", "reports/test/metrics.json"):
        assert (third / name).read_bytes() == (first / name).read_bytes()


def test_images_that_dvc_keeps_go_with_the_clones(
    first: Path, clone: Callable[[], Path], run: Run
) -> None:
    giver, folder = clone(), "data/photos"
    with zipfile.ZipFile(io.BytesIO(archive())) as photos:
        photos.extractall(giver / folder)  # ours
    run(giver, "dvc", "add", folder)
    params = YAML().load(giver / "params.yaml")
    params["download"] |= {"source": "folder", "folder": folder}
    YAML().dump(params, giver / "params.yaml")
    run(giver, "dvc", "repro", "download")
    run(giver, "git", "add", "-A")
    run(giver, "git", "commit", "-qm", "photos")
    run(giver, "dvc", "push", "download", f"{folder}.dvc")
    run(giver, "git", "push", "-q", "origin", "HEAD:refs/heads/photos")
    taker = clone()
    run(taker, "git", "checkout", "-q", "photos")
    assert "Running stage" not in run(taker, "dvc", "repro", "--pull", "download").stdout
    assert (taker / folder / "dark" / "0.png").exists()


def test_the_credentials_are_in_nothing_that_was_left_or_said(
    first: Path, secrets: list[str], said: list[str], environment: dict[str, str]
) -> None:
    folders = [*first.parent.parent.glob("*/copy"), Path(environment["HOME"])]
    left = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    for name in ("params.yaml", "dvc.lock", "data/raw/source.json", ".dvc/config", "mlflow.db"):
        assert first / name in left
    assert any(path.is_relative_to(first / "mlartifacts") for path in left)
    assert any(path.is_relative_to(first / ".cnnpipe" / "downloads") for path in left)
    assert ARCHIVE.encode() in (first / "mlflow.db").read_bytes()  # what is searched can be found
    for secret in secrets:
        assert secret not in "".join(said)
        assert [path for path in left if secret.encode() in path.read_bytes()] == []
