"""The five stages one after another, and what each leaves behind."""

import json
import os
import shutil
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cnnpipe import mlflow_store, records
from cnnpipe.data.decode import Decoded, UnreadableImage
from cnnpipe.data.manifest import (
    COLUMNS,
    CONFLICT_COLUMNS,
    QUARANTINE_COLUMNS,
    SPLIT_COLUMNS,
    read,
)
from cnnpipe.data.raw import RawImage, open_raw
from cnnpipe.data.store import open_images
from cnnpipe.errors import RunFailed, UserError
from cnnpipe.evaluation.figures import sample_captions
from cnnpipe.network.classifier import Classifier
from cnnpipe.params import Params, Resize, load
from cnnpipe.serving.predictor import Predictor
from cnnpipe.stages import evaluate, resize, split, train


@pytest.fixture
def workspace(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished pipeline to change at will."""
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    # MLflow puts there what it was told last: the original's.
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    # The experiment in the copied database keeps the original's artifact folder.
    return tmp_path / "copy"


def test_resize_keeps_every_image_and_what_is_known_of_it(finished: Path) -> None:
    images, table = open_images(finished / "data/resized")
    assert images.shape == (300, 16, 16, 1)
    assert len(table) == 300
    assert set(table["width"]) == {8}
    assert table["shard"].nunique() > 1
    with open_raw(finished / "data/raw") as (raw, files):
        predictor = Predictor.load(finished / "models/model.safetensors")
        some = [0, 7, 299]
        assert [files[i].path for i in some] == table["path"].iloc[some].tolist()
        stored = predictor.predict([raw.read(files[i]) for i in some])
    predictions = pd.read_csv(finished / "reports/test/predictions.csv", dtype={"label": str})
    for row, probabilities in zip(some, stored, strict=True):
        found = predictions[predictions["path"] == table["path"].iloc[row]]
        if len(found):
            assert np.allclose(found.filter(like="probability_").iloc[0], probabilities, atol=1e-6)


def test_the_shards_are_the_same_whatever_the_number_of_workers(workspace: Path) -> None:
    before = {p.name: p.read_bytes() for p in Path("data/resized").iterdir()}
    settings = load("params.yaml")
    one = settings.resize.model_copy(update={"workers": 1})
    resize.run(settings.model_copy(update={"resize": one}))
    assert {p.name: p.read_bytes() for p in Path("data/resized").iterdir()} == before


def test_a_training_goes_on_whichever_processes_have_resized_its_images() -> None:
    others = Params(resize=Resize(workers=3, scheduler="tcp://127.0.0.1:8786"))
    assert train._fingerprint(others, "data") == train._fingerprint(Params(), "data")
    larger = Params(resize=Resize(size=301))
    assert train._fingerprint(larger, "data") != train._fingerprint(Params(), "data")


@pytest.mark.parametrize("count", [1, 15, 16, 17, 300, 4000])
def test_shards_hold_every_file_in_order_and_are_many_enough_for_all_cores(count: int) -> None:
    files = [RawImage(f"cat/{i}.jpg", "cat", "") for i in range(count)]
    shards = resize._shards(files, (3, 300, 300))
    assert [file for shard in shards for file in shard] == files
    assert max(map(len, shards)) * 270_000 <= 64 << 20
    assert len({len(shard) for shard in shards[:-1]}) <= 1
    assert len(shards) >= min(count, 9)  # of 17 files there are nine times two
    if count == 4000:
        assert len(shards) == 32


def test_test_images_are_predicted_once_each_and_nothing_else(finished: Path) -> None:
    table = read(finished / "data/split.csv", SPLIT_COLUMNS, "split")
    predictions = pd.read_csv(finished / "reports/test/predictions.csv", dtype={"label": str})
    assert predictions["path"].tolist() == table["path"][table["split"] == "test"].tolist()
    sums = predictions.filter(like="probability_").sum(axis=1)
    assert np.allclose(sums, 1, atol=1e-5)


def test_train_never_opens_a_test_image(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = read("data/split.csv", SPLIT_COLUMNS, "split")
    forbidden = set(np.flatnonzero(table["split"] == "test"))
    # As if all labels contradicted, those of the test split as well.
    table[list(CONFLICT_COLUMNS)].to_csv("data/resized/conflicts.csv", index=False)
    seen: set[int] = set()
    original = train.Images.read
    shown: dict[str, list[str]] = {}
    picture_grid = train.figures.picture_grid

    def read_seen(self: object, rows: np.ndarray, images: np.ndarray) -> None:
        seen.update(rows.tolist())
        original(self, rows, images)

    def grid_shown(images: np.ndarray, captions: list[str], title: str) -> object:
        shown[title] = captions
        return picture_grid(images, captions, title)

    monkeypatch.setattr(train.Images, "read", read_seen)
    monkeypatch.setattr(train.figures, "picture_grid", grid_shown)
    train.run(load("params.yaml"))
    assert seen and not seen & forbidden
    assert seen == set(range(len(table))) - forbidden
    first = table[table["split"] != "test"].sort_values(["group", "path"])["label"][:24]
    assert shown["copies with contradicting labels"] == sample_captions(first.tolist())


def test_the_metrics_are_flat_and_agree_with_the_predictions(finished: Path) -> None:
    metrics = json.loads((finished / "reports/test/metrics.json").read_text())
    assert list(metrics) == [
        "accuracy", "accuracy_low", "accuracy_high", "f1", "roc_auc", "log_loss",
        "calibration_error", "num_images",
    ]  # fmt: skip
    predictions = pd.read_csv(finished / "reports/test/predictions.csv", dtype=str)
    hits = (predictions["label"] == predictions["prediction"]).mean()
    assert metrics["accuracy"] == pytest.approx(hits)
    assert metrics["num_images"] == len(predictions)
    assert metrics["accuracy_low"] < metrics["accuracy"] < metrics["accuracy_high"]


def test_the_kept_epochs_validation_is_that_of_the_saved_model(finished: Path) -> None:
    history = pd.read_csv(finished / "reports/train/history.csv")
    table = read(finished / "data/split.csv", SPLIT_COLUMNS, "split")
    images, _ = open_images(finished / "data/resized")
    rows = np.flatnonzero(table["split"] == "val")
    classifier = Classifier.load(finished / "models/model.safetensors")
    batches = train.Batches(images, rows, table["label"].iloc[rows].astype(int).to_numpy(), 32,
                            train.choose_device("cpu"))  # fmt: skip
    from cnnpipe.training.loop import judge

    loss, accuracy = judge(classifier, batches)
    best = history.sort_values(["val_accuracy", "val_loss"], ascending=[False, True]).iloc[0]
    assert accuracy == best["val_accuracy"]
    assert loss == pytest.approx(best["val_loss"], rel=1e-6)


def test_pictures_are_pictures(finished: Path) -> None:
    for name in ("train/curves.png", "test/confusion.png", "test/mistakes.png"):
        with Image.open(finished / "reports" / name) as picture:
            assert min(picture.size) > 100


def test_one_run_holds_the_training_and_its_evaluation(finished: Path) -> None:
    mlflow.set_tracking_uri(f"sqlite:///{finished / 'mlflow.db'}")
    ids = json.loads((finished / "models/run.json").read_text())
    client = mlflow.MlflowClient()
    run = client.get_run(ids["run_id"])
    assert run.info.status == "FINISHED"
    assert run.info.experiment_id == ids["experiment_id"]
    assert run.data.params["model.filters"] == "4"
    assert set(load(finished / "params.yaml").flat()) <= set(run.data.params)
    assert run.data.params["model/parameters"] == str(int(run.data.metrics["model/parameters"]))
    history = pd.read_csv(finished / "reports/train/history.csv")
    logged = client.get_metric_history(ids["run_id"], "val/accuracy")
    assert [(m.step, m.value) for m in logged] == list(
        zip(history["epoch"], history["val_accuracy"], strict=True)
    )
    metrics = json.loads((finished / "reports/test/metrics.json").read_text())
    assert run.data.metrics["test/accuracy"] == metrics["accuracy"]
    assert {"data_hash", "machine", "device"} <= set(run.data.tags)
    assert {i.dataset.name for i in run.inputs.dataset_inputs} == {
        "digits/train", "digits/val", "digits/test",
    }  # fmt: skip
    names = {f.path for folder in ("train", "test") for f in client.list_artifacts(
        ids["run_id"], folder)}  # fmt: skip
    assert {"train/curves.png", "train/samples.png", "test/confusion.png",
            "test/mistakes.png", "test/predictions.csv"} <= names  # fmt: skip


def test_the_registered_model_needs_no_repository_and_agrees_with_predict(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_raw(finished / "data/raw") as (raw, files):
        data = raw.read(files[5])
    expected = Predictor.load(finished / "models/model.safetensors").predict([data])[0]
    mlflow.set_tracking_uri(f"sqlite:///{finished / 'mlflow.db'}")
    mlflow.set_registry_uri(f"sqlite:///{finished / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    model = mlflow.pyfunc.load_model("models:/cnnpipe/1")
    answer = model.predict(pd.DataFrame({"image": [data]}))
    assert answer.columns[0] == "prediction"
    assert answer.iloc[0, 1:].tolist() == expected.astype(float).tolist()


def test_evaluate_again_uses_the_same_run_and_registers_no_second_version(
    workspace: Path,
) -> None:
    params = load("params.yaml")
    evaluate.run(params)
    ids = json.loads(Path("reports/test/run.json").read_text())
    assert ids.items() <= json.loads(Path("models/run.json").read_text()).items()
    mlflow.set_tracking_uri(mlflow_store.local_store())
    client = mlflow.MlflowClient()
    assert len(client.search_model_versions("name = 'cnnpipe'")) == 1


def test_an_interrupted_training_goes_on_in_the_same_run_and_no_point_is_doubled(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = load("params.yaml")
    # So that it is not the training that the workspace was copied with.
    params = params.model_copy(update={"base": params.base.model_copy(update={"seed": 7})})
    train.run(params)
    expected = pd.read_csv("reports/train/history.csv").drop(columns="seconds")
    uninterrupted = Classifier.load("models/model.safetensors").network.state_dict()
    client = mlflow.MlflowClient(mlflow_store.local_store())

    write_history = train._write_history

    def interrupted(history: list[object]) -> None:
        write_history(history)
        if len(history) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "_write_history", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.run(params)
    runs = client.search_runs([json.loads(Path("models/run.json").read_text())["experiment_id"]])
    run_id = runs[0].info.run_id
    assert runs[0].info.status == "KILLED"
    monkeypatch.setattr(train, "_write_history", write_history)
    train.run(params)
    assert json.loads(Path("models/run.json").read_text())["run_id"] == run_id
    assert client.get_run(run_id).info.status == "FINISHED"
    history = pd.read_csv("reports/train/history.csv").drop(columns="seconds")
    pd.testing.assert_frame_equal(history, expected, check_exact=True)
    resumed = Classifier.load("models/model.safetensors").network.state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in uninterrupted.items())
    for key, steps in (("val/loss", history["epoch"].tolist()), ("model/parameters", [0])):
        assert [point.step for point in client.get_metric_history(run_id, key)] == steps
    assert list(Path(".cnnpipe/checkpoints").iterdir()) == []


@pytest.mark.parametrize("fate", ["deleted", "missing"])
def test_evaluate_copes_with_a_run_that_is_gone(workspace: Path, fate: str) -> None:
    params = load("params.yaml")
    run_file = Path("models/run.json")
    ids = json.loads(run_file.read_text())
    if fate == "deleted":
        mlflow.set_tracking_uri(mlflow_store.local_store())
        mlflow.MlflowClient().delete_run(ids["run_id"])
    else:
        ids["run_id"] = "0" * 32
        run_file.write_text(json.dumps(ids))
    evaluate.run(params)
    recovered = json.loads(Path("reports/test/run.json").read_text())["run_id"]
    assert recovered != ids["run_id"]
    run = mlflow.MlflowClient().get_run(recovered)
    assert run.data.tags["recovered_from"] == ids["run_id"]
    assert "test/accuracy" in run.data.metrics
    evaluate.run(params)  # and the next time it is found again
    assert json.loads(Path("reports/test/run.json").read_text())["run_id"] == recovered


def test_train_and_evaluate_with_mlflow_out_of_reach_are_one_run_of_it_later(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_store, "_LOCKED_S", 0.1)
    params = load("params.yaml")
    params = params.model_copy(update={"base": params.base.model_copy(update={"seed": 8})})
    client = mlflow.MlflowClient(mlflow_store.local_store(), mlflow_store.local_store())
    experiment_id = json.loads(Path("models/run.json").read_text())["experiment_id"]
    before = {run.info.run_id for run in client.search_runs([experiment_id])}
    with closing(sqlite3.connect("mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        train.run(params)
        evaluate.run(params)
    assert json.loads(Path("models/run.json").read_text())["experiment_id"] == ""
    history = pd.read_csv("reports/train/history.csv")
    metrics = json.loads(Path("reports/test/metrics.json").read_text())
    evaluate.run(params)
    (run,) = [r for r in client.search_runs([experiment_id]) if r.info.run_id not in before]
    run_id = run.info.run_id
    assert json.loads(Path("reports/test/run.json").read_text())["run_id"] == run_id
    assert run.info.status == "FINISHED"
    for key, values in {
        "val/loss": history["val_loss"].tolist(), "test/accuracy": [metrics["accuracy"]]
    }.items():  # fmt: skip
        assert [p.value for p in client.get_metric_history(run_id, key)] == values
    assert set(params.flat()) <= set(run.data.params)
    assert len(run.inputs.dataset_inputs) == 3
    names = {f.path for name in ("train", "test") for f in client.list_artifacts(run_id, name)}
    assert {"train/curves.png", "train/samples.png", "test/predictions.csv"} <= names
    assert len(client.search_model_versions(f"run_id = '{run_id}'")) == 1
    assert list(Path(".cnnpipe/outbox").iterdir()) == []


@pytest.mark.parametrize("content", ["", "[]", '{"run_id": ""}', '{"run_id": "../.."}'])
def test_evaluate_takes_nothing_but_an_id_for_a_run(workspace: Path, content: str) -> None:
    Path("models/run.json").write_text(content)
    with pytest.raises(UserError, match=r"models/run\.json: names no run"):
        evaluate.run(load("params.yaml"))


def test_a_class_without_a_readable_image_ends_resize_and_leaves_what_was_there(
    workspace: Path,
) -> None:
    before = Path("data/resized/manifest.csv").read_bytes()
    import zipfile

    with zipfile.ZipFile("data/raw/images.zip", "a") as archive:
        archive.writestr("broken/1.jpg", b"no image")
    with pytest.raises(UserError, match=r"class 'broken'.*broken/1\.jpg: not an image"):
        resize.run(load("params.yaml"))
    assert Path("data/resized/manifest.csv").read_bytes() == before
    assert [p.name for p in Path("data").iterdir() if p.name.startswith(".")] == []


def test_unreadable_files_are_quarantined_and_stop_nothing(workspace: Path) -> None:
    import zipfile

    with zipfile.ZipFile("data/raw/images.zip", "a") as archive:
        archive.writestr("3/zz-empty.png", b"")
        archive.writestr("3/zz-text.png", b"<html>")
    # The limit would leave them out.
    source = json.loads(Path("data/raw/source.json").read_text())
    Path("data/raw/source.json").write_text(json.dumps({**source, "limit_per_class": None}))
    resize.run(load("params.yaml"))
    assert Path("data/resized/quarantine.csv").read_text() == (
        "path,reason,size\n3/zz-empty.png,empty file,0\n3/zz-text.png,not an image,6\n"
    )
    assert len(open_images("data/resized")[0]) == 1797


def crash(number: int) -> None:
    os.kill(os.getpid(), number)


def loop_forever() -> None:
    while True:
        pass


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    "fate", [partial(crash, signal.SIGSEGV), partial(crash, signal.SIGKILL), loop_forever]
)
def test_a_file_that_ends_its_decoder_costs_that_file_alone(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, fate: Callable[[], None], workers: int
) -> None:
    before = read("data/resized/manifest.csv", COLUMNS, "resize")
    fatal = before["path"].iloc[[0, 150, 299]].tolist()
    with open_raw("data/raw") as (raw, files):
        bytes_of = {file.path: raw.read(file) for file in files if file.path in fatal}
    decode_frame = resize.decode_frame

    def decode_or_end(data: bytes, max_pixels: int) -> Decoded:
        if data in bytes_of.values():
            fate()
        return decode_frame(data, max_pixels)

    monkeypatch.setattr(resize, "decode_frame", decode_or_end)  # forked workers have it too
    monkeypatch.setattr(resize, "_DECODING_S", 0.3)
    params = load("params.yaml")
    some = params.resize.model_copy(update={"workers": workers})
    resize.run(params.model_copy(update={"resize": some}))
    quarantine = read("data/resized/quarantine.csv", QUARANTINE_COLUMNS, "resize")
    assert quarantine["path"].tolist() == fatal
    assert set(quarantine["reason"]) == {"its decoder crashes, or computes for more than 0.3 s"}
    assert quarantine["size"].tolist() == [str(len(bytes_of[path])) for path in fatal]
    images, after = open_images("data/resized")
    left = before[~before["path"].isin(fatal)]
    same = ["path", "label", "sha256", "crc32"]
    assert after[same].to_numpy().tolist() == left[same].to_numpy().tolist()
    assert len(images[:]) == len(left)


def test_workers_that_die_of_no_files_fault_end_the_run_and_keep_what_was_there(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Path("data/resized/manifest.csv").read_bytes()
    prepare, path = resize.prepare, workspace / "once"

    def die_in_the_first_turn(*arguments: Any) -> np.ndarray:
        if not path.exists():  # as the system kills the largest process when memory is short
            crash(signal.SIGKILL)
        return prepare(*arguments)

    if_fatal = resize._if_fatal

    def enough_memory_now(*arguments: Any) -> Any:
        path.touch()
        return if_fatal(*arguments)

    monkeypatch.setattr(resize, "prepare", die_in_the_first_turn)
    monkeypatch.setattr(resize, "_if_fatal", enough_memory_now)
    with pytest.raises(RunFailed, match="a worker process died, perhaps for want of memory"):
        resize.run(load("params.yaml"))
    assert Path("data/resized/manifest.csv").read_bytes() == before


def test_a_limit_on_pixels_is_the_models_too(workspace: Path) -> None:
    params = load("params.yaml")
    small = params.resize.model_copy(update={"max_pixels": 63})  # the digits have 64
    with pytest.raises(UserError, match="8 x 8 pixels, more than 63"):
        resize.run(params.model_copy(update={"resize": small}))
    train.run(params.model_copy(update={"resize": small}))
    with open_raw("data/raw") as (raw, files), pytest.raises(UnreadableImage, match="more than 63"):
        Predictor.load("models/model.safetensors").predict([raw.read(files[0])])


def test_copies_of_contradicting_labels_are_listed_and_shown_and_never_split(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import zipfile

    assert Path("data/resized/conflicts.csv").read_text() == "path,label,group\n"
    with open_raw("data/raw") as (raw, files):
        copies = {file.path: raw.read(file) for file in files if file.path[0] in "01"}
    paths = [path for path in sorted(copies) if path[0] == "0"][:4]
    with zipfile.ZipFile("data/raw/images.zip", "a") as archive:
        for i, path in enumerate(paths):  # a 0 that is called a 7
            archive.writestr(f"7/zz{i}.png", copies[path])
    source = json.loads(Path("data/raw/source.json").read_text())
    Path("data/raw/source.json").write_text(json.dumps({**source, "limit_per_class": None}))
    params = load("params.yaml")
    resize.run(params)
    conflicts = pd.read_csv("data/resized/conflicts.csv", dtype={"label": str})
    assert conflicts["label"].tolist() == ["0", "7"] * 4
    assert conflicts["path"].tolist()[::2] == paths
    assert conflicts["group"].tolist()[::2] == conflicts["group"].tolist()[1::2]
    told = capsys.readouterr().err
    assert "8 images are copies of each other with contradicting labels, in 4 groups" in told
    assert f"{paths[0]!r} is '0', '7/zz0.png' is '7'" in told
    split.run(params)
    table = read("data/split.csv", SPLIT_COLUMNS, "split")
    assert (table.groupby("group")["split"].nunique() == 1).all()
    train.run(params.model_copy(update={"train": params.train.model_copy(update={"epochs": 1})}))
    client = mlflow.MlflowClient(mlflow_store.local_store())
    run_id = json.loads(Path("models/run.json").read_text())["run_id"]
    found = client.get_run(run_id).data.metrics
    assert found["data/images"] == 1801 and found["data/quarantined"] == 0
    assert found["data/duplicates"] == found["data/conflicts"] == 8
    logged = {file.path for file in client.list_artifacts(run_id, "data")}
    names = ("images.csv.gz", "quarantine.csv", "conflicts.csv", "conflicts.png")
    assert logged == {f"data/{name}" for name in names}
    images, known = records.read_images(run_id), open_images("data/resized")[1]
    assert images is not None and len(images) == 1801
    for column, expected in (("sha256", known["sha256"]), ("split", table["split"])):
        assert images[column].tolist() == expected.tolist()


def test_a_class_of_copies_of_another_class_has_nothing_to_train_on(workspace: Path) -> None:
    table = pd.read_csv("data/resized/manifest.csv", dtype=str, keep_default_na=False)
    table.loc[table["label"] == "9", "official"] = "test"
    table.loc[table["label"] != "9", "official"] = "train"
    table.to_csv("data/resized/manifest.csv", index=False)
    with pytest.raises(UserError, match="class '9' has no images to train on"):
        split.run(load("params.yaml"))


def test_a_sigmoid_head_with_ten_classes_is_refused(workspace: Path) -> None:
    params = load("params.yaml")
    sigmoid = params.model.model_copy(update={"head": "sigmoid"})
    with pytest.raises(UserError, match=r"sigmoid.*10 classes"):
        train.run(params.model_copy(update={"model": sigmoid}))


@pytest.mark.parametrize(
    ("stage", "missing"),
    [(resize, "data/raw/source.json"), (split, "data/resized/manifest.csv"),
     (train, "data/split.csv"), (evaluate, "models/model.safetensors"),
     (evaluate, "models/run.json")],
)  # fmt: skip
def test_a_stage_without_its_input_says_what_to_run_first(
    workspace: Path, stage: object, missing: str
) -> None:
    Path(missing).unlink()
    with pytest.raises(UserError, match=f"{missing}: no such file: run `"):
        stage.run(load("params.yaml"))  # type: ignore[attr-defined]


def test_what_train_and_evaluate_find_odd_is_said_and_kept_with_the_run(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "about_training", lambda *arguments: ["it memorises"])
    monkeypatch.setattr(evaluate, "about_test", lambda *arguments: ["it guesses", "always cat"])
    train.run(load("params.yaml"))
    assert "warning: it memorises\n" in capsys.readouterr().err
    evaluate.run(load("params.yaml"))
    assert "warning: it guesses\nwarning: always cat\n" in capsys.readouterr().err
    ids = json.loads(Path("models/run.json").read_text())
    tags = mlflow.get_run(ids["run_id"]).data.tags
    assert tags["warnings.train"] == "it memorises"
    assert tags["warnings.test"] == "it guesses; always cat"


def test_evaluate_without_a_history_says_what_to_run(workspace: Path) -> None:
    train.run(load("params.yaml"))
    Path("reports/train/history.csv").unlink()
    with pytest.raises(UserError, match=r"history.csv: no such file: run `cnnpipe train` first"):
        evaluate.run(load("params.yaml"))


def test_the_test_hash_is_of_the_images_and_labels_alone(finished: Path) -> None:
    predictions = pd.read_csv(finished / "reports/test/predictions.csv", dtype=str)
    known = evaluate._test_hash(predictions)
    tags = mlflow.MlflowClient(f"sqlite:///{finished / 'mlflow.db'}").get_run(
        json.loads((finished / "reports/test/run.json").read_text())["run_id"]
    ).data.tags  # fmt: skip
    assert tags["test_hash"] == known
    table = read(finished / "data/resized/manifest.csv", COLUMNS, "resize")
    hashes = dict(zip(table["path"], table["sha256"], strict=True))
    assert predictions["sha256"].tolist() == [hashes[path] for path in predictions["path"]]
    assert evaluate._test_hash(predictions.sample(frac=1, random_state=0)) == known
    assert evaluate._test_hash(predictions.assign(prediction="0", path="x")) == known
    assert evaluate._test_hash(predictions.iloc[1:]) != known
    assert evaluate._test_hash(predictions.assign(label="0")) != known


def test_a_damaged_file_leaves_a_glimpse_for_people_and_none_for_the_network(
    workspace: Path,
) -> None:
    import io
    import zipfile

    rng = np.random.default_rng(0)
    file = io.BytesIO()
    smooth = rng.integers(0, 256, (8, 8, 3), np.uint8).repeat(40, 0).repeat(30, 1)
    Image.fromarray(smooth).save(file, "jpeg")
    with zipfile.ZipFile("data/raw/images.zip", "a") as archive:
        archive.writestr("3/zz-cut.jpg", file.getvalue()[: len(file.getvalue()) // 2])
        archive.writestr("3/zz-text.png", b"<html>")
    source = json.loads(Path("data/raw/source.json").read_text())
    Path("data/raw/source.json").write_text(json.dumps({**source, "limit_per_class": None}))
    resize.run(load("params.yaml"))
    quarantine = read("data/resized/quarantine.csv", QUARANTINE_COLUMNS, "resize")
    assert quarantine["path"].tolist() == ["3/zz-cut.jpg", "3/zz-text.png"]
    assert [path.name for path in Path("data/resized/quarantine").iterdir()] == ["0.png"]
    seen = np.asarray(Image.open("data/resized/quarantine/0.png")).astype(int)
    assert seen.shape == (160, 120, 3)
    expected = np.asarray(Image.fromarray(smooth).resize((120, 160)))
    assert abs(seen[:60] - expected[:60]).mean() < 12  # the upper part is there
    assert len(open_images("data/resized")[0]) == 1797


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_glimpse_that_ends_its_process_costs_that_file_alone(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    import zipfile

    with zipfile.ZipFile("data/raw/images.zip", "a") as archive:
        archive.writestr("3/zz-text.png", b"<html>")
    source = json.loads(Path("data/raw/source.json").read_text())
    Path("data/raw/source.json").write_text(json.dumps({**source, "limit_per_class": None}))
    monkeypatch.setattr(resize, "glimpse", lambda *_: crash(number))
    resize.run(load("params.yaml"))
    quarantine = read("data/resized/quarantine.csv", QUARANTINE_COLUMNS, "resize")
    assert quarantine["path"].tolist() == ["3/zz-text.png"]
    assert "its decoder crashes" in quarantine["reason"].iloc[0]


def test_the_report_is_of_this_run_and_goes_to_mlflow_as_it_is(workspace: Path) -> None:
    run_file = Path("models/run.json")
    run_id = json.loads(run_file.read_text())["run_id"]
    run_file.write_text(json.dumps({"run_id": run_id, "warnings": ["it was too cold"]}))
    evaluate.run(load("params.yaml"))
    html = Path("reports/report.html").read_text()
    result = json.loads(Path("reports/test/metrics.json").read_text())
    assert f"<strong>{result['accuracy']:.3f}</strong>" in html
    assert run_id in html and "It was too cold." in html
    sizes = read("data/split.csv", SPLIT_COLUMNS, "split")["split"].value_counts()
    assert f"{sizes['train']} to train, {sizes['val']} to validate, {sizes['test']} to test" in html
    client = mlflow.MlflowClient(f"sqlite:///{Path('mlflow.db').resolve()}")
    artifacts = {item.path for item in client.list_artifacts(run_id)}
    assert "report.html" in artifacts
    logged = Path(client.download_artifacts(run_id, "report.html", str(workspace)))
    assert logged.read_text() == html
    roc = pd.read_csv("reports/test/roc.csv")
    assert roc.columns.tolist() == ["false_positive_rate", "true_positive_rate"]
    area = np.trapezoid(roc["true_positive_rate"], roc["false_positive_rate"])
    assert area == pytest.approx(result["roc_auc"], abs=0.01)


def test_a_seed_of_the_training_changes_the_weights_and_not_the_data(workspace: Path) -> None:
    params = load("params.yaml")
    first = Path("models/model.safetensors").read_bytes()

    def history(seed: int | None) -> pd.DataFrame:
        settings = params.train.model_copy(update={"seed": seed})
        train.run(params.model_copy(update={"train": settings}))
        table = pd.read_csv("reports/train/history.csv")
        return table[["train_loss", "val_loss"]]

    as_base = history(None)
    assert history(params.base.seed).equals(as_base)
    other = history(7)
    assert not other.equals(as_base)
    assert history(7).equals(other)
    weights = Classifier.load("models/model.safetensors").network.state_dict()
    Path("before.safetensors").write_bytes(first)
    before = Classifier.load("before.safetensors").network.state_dict()
    assert not any(torch.equal(weights[key], before[key]) for key in weights if "weight" in key)
