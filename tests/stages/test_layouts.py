"""Folders as people have them, through all five stages: a sensible result, or one clear line."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from ruamel.yaml import YAML

from cnnpipe.cli import main
from cnnpipe.errors import UserError
from cnnpipe.params import load
from cnnpipe.stages import download, evaluate, resize, split, train

SETTINGS = {
    "resize": {"size": 16, "color": "grey", "workers": 1},
    "model": {"architecture": "deep", "filters": 2, "kernel_size": 3, "padding": "same"},
    "train": {"epochs": 1, "batch_size": 32},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where MLflow keeps what all of these tests log: to make its tables takes seconds."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def run(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict[str, int]], pd.DataFrame]:
    """Runs all stages on folders of so many images; the table of data/split.csv, by class."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(store))
    for name in ("DVC_EXP_NAME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    source = {"source": "folder", "folder": str(tmp_path / "inbox")}
    YAML(typ="safe").dump({**SETTINGS, "download": source}, Path("params.yaml"))

    def run(folders: dict[str, int]) -> pd.DataFrame:
        rng = np.random.default_rng(0)
        for folder, number in folders.items():
            for i in range(number):
                put(rng, tmp_path / "inbox" / folder / f"{i}.png")
        params = load("params.yaml")
        for stage in (download, resize, split, train, evaluate):
            stage.run(params)
        table = read("data/split.csv")
        return pd.crosstab(table["label"], table["split"])

    return run


def put(rng: np.random.Generator, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (16, 16), np.uint8)
    with path.open("wb") as file:
        Image.fromarray(pixels).save(file, "png")


def read(path: str) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False, na_filter=False, dtype=str)


def metrics() -> dict[str, Any]:
    result: dict[str, Any] = json.loads(Path("reports/test/metrics.json").read_text())
    return result


def test_a_class_of_one_image_is_trained_on_and_said_to_be_in_no_test(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = run({"cat": 20, "dog": 20, "owl": 1})
    assert counts.loc["owl"].to_dict() == {"train": 1, "val": 0, "test": 0}
    out = capsys.readouterr().out
    assert "warning: no val images of 1 classes, such as 'owl'\n" in out
    assert "warning: no test images of 1 classes, such as 'owl'\n" in out
    assert metrics()["num_images"] == 6
    classes = read("reports/test/classes.csv")
    assert classes["num_images"].tolist() == ["3", "3", "0"]
    assert 0 <= metrics()["roc_auc"] <= 1 and 0 <= metrics()["f1"] <= 1


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_a_class_that_is_held_out_alone_is_refused(run: Any, held_out: str) -> None:
    folders = {f"{split}/{label}": 5 for split in ("train", "val", "test") for label in "ab"}
    with pytest.raises(UserError, match=r"^class 'owl' has no images to train on, only 5 held out"):
        run({**folders, f"{held_out}/owl": 5})


def test_a_class_missing_in_the_official_val_is_validated_on_the_others(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = run({"train/cat": 20, "train/dog": 20, "val/cat": 5, "test/cat": 5, "test/dog": 5})
    assert counts.loc["dog"].to_dict() == {"train": 20, "val": 0, "test": 5}
    assert "warning: no val images of 1 classes, such as 'dog'\n" in capsys.readouterr().out
    assert metrics()["num_images"] == 10


def test_a_class_missing_in_the_official_test_is_tested_on_the_others(run: Any) -> None:
    run({"train/cat": 20, "train/dog": 20, "val/cat": 5, "val/dog": 5, "test/dog": 5})
    assert metrics()["num_images"] == 5
    assert metrics()["roc_auc"] is None  # all of the labels are one


def test_validation_beside_val_is_val_too(run: Any) -> None:
    folders = {"train/cat": 20, "train/dog": 20, "test/cat": 5, "test/dog": 5}
    counts = run({**folders, "val/cat": 5, "validation/cat": 1, "validation/dog": 4})
    assert counts["val"].to_dict() == {"cat": 6, "dog": 4}


def test_ten_of_one_class_to_one_of_the_other_are_split_in_that_ratio(run: Any) -> None:
    counts = run({"cat": 200, "dog": 20})
    assert counts.loc["dog"].to_dict() == {"train": 14, "val": 3, "test": 3}
    assert counts.loc["cat"].to_dict() == {"train": 140, "val": 30, "test": 30}
    assert metrics()["num_images"] == 33


def test_classes_called_as_the_splits_are_classes(run: Any) -> None:
    counts = run({"train": 10, "val": 10, "test": 10})
    assert sorted(counts.index) == ["test", "train", "val"]
    assert (counts > 0).all(axis=None)


def test_classes_that_look_alike_are_classes_and_pointed_out(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = run({"Cat": 3, "cat": 3, "caf\u00e9": 3, "cafe\u0301": 3, "dog": 3})
    assert len(counts) == 5
    warned = [line for line in capsys.readouterr().out.splitlines() if "look alike" in line]
    assert warned == [
        "warning: 2 classes look alike: 'Cat', 'cat'",
        r"warning: 2 classes look alike: 'cafe\u0301', 'caf\xe9'",
    ]


def test_hundreds_of_classes_are_said_nothing_of_at_length(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.PerformanceWarning)
        counts = run({f"{i:03d}": 3 for i in range(300)})
    assert (counts == 1).all(axis=None) and len(counts) == 300
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) < 40
    columns = read("reports/test/predictions.csv").columns[4:].tolist()
    assert columns == [f"probability_{i:03d}" for i in range(300)]
    assert metrics()["num_images"] == 300


ODD = (
    "a b", " before", "after ", "a,b", 'a"b', "a'b", "a\nb", "a\r\nb", "a\rb", "a\tb", "é",
    "e\u0301", "🐱", "👩‍🔬", "\u202egnp", "שלום", "x" * 255, "-rf", "--help", "<script>",
    "=1+1", "NA", "None", "nan", "null", "true", "1e3", "007", "%s{}", "$\\frac{1}$", "$x",
    "\x1b[2J", "\x07", "\x7f", "\\", "\\n", "a\u2028b", "a\x85b", "~", "#x", "&amp;",
)  # fmt: skip


def test_odd_names_come_back_unchanged_and_never_reach_the_terminal(
    run: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(1)
    paths = {f"{label}/{name}" for label in ODD for name in ("0.png", f"1 {label}"[:255], label)}
    for path in paths:
        put(rng, tmp_path / "inbox" / path)
    (tmp_path / "inbox" / "a\nb" / "\x1b[2J.png").write_bytes(b"no image")
    (tmp_path / "inbox" / "a\rb" / "gone.png").symlink_to("nowhere")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as matplotlib's of missing glyphs
        run({})

    class_names = sorted(ODD)
    assert json.loads(Path("data/resized/classes.json").read_text()) == class_names
    for file in ("data/resized/manifest.csv", "data/split.csv"):
        table = read(file)
        assert set(table["path"]) == paths
        assert (table["label"] == table["path"].str.partition("/")[0]).all()
    assert read("data/resized/quarantine.csv")["path"].tolist() == [
        "a\rb/gone.png",
        "a\nb/\x1b[2J.png",
    ]
    predictions = read("reports/test/predictions.csv")
    assert set(predictions["path"]) <= paths
    assert set(predictions["label"]) == set(ODD) and set(predictions["prediction"]) <= set(ODD)
    assert predictions.columns[4:].tolist() == [f"probability_{name}" for name in class_names]
    assert read("reports/test/classes.csv")["label"].tolist() == class_names

    client = mlflow.MlflowClient()
    run_id = json.loads(Path("models/run.json").read_text())["run_id"]
    inputs = client.get_run(run_id).inputs.dataset_inputs
    assert len(inputs) == 3
    for data in inputs:
        tags = {tag.key.removeprefix("images.") for tag in data.tags if tag.key[:7] == "images."}
        assert {name[:243] for name in ODD} == tags
    (version,) = client.search_model_versions(f"run_id = '{run_id}'")
    signature = mlflow.models.get_model_info(f"models:/cnnpipe/{version.version}").signature
    names = ["prediction", *(f"probability_{name}" for name in class_names)]
    assert signature.outputs.input_names() == names
    assert control_characters(capsys.readouterr()) == set()

    monkeypatch.setattr("sys.argv", ["cnnpipe", "predict", "inbox", "--csv", "all.csv"])
    with pytest.raises(SystemExit) as exit_code:
        main()
    assert exit_code.value.code == 0
    table = read("all.csv")
    assert set(table["path"]) == {f"inbox/{path}" for path in paths}
    assert table.columns[2:].tolist() == [f"probability_{name}" for name in class_names]
    assert set(table["prediction"]) <= set(ODD)
    captured = capsys.readouterr()
    assert control_characters(captured) == set()
    assert r"a\nb/\x1b[2J.png: not an image" in captured.err


def control_characters(captured: Any) -> set[str]:
    return {c for c in captured.out + captured.err if not c.isprintable()} - {"\n"}
