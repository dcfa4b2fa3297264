"""train: from data/resized/ and data/split.csv to models/ and reports/train/.

It never opens a test image: only the rows of the training and validation splits are read.
"""

import hashlib
import json
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch

from cnnpipe import tracking
from cnnpipe.data import manifest
from cnnpipe.data.store import Images, open_images
from cnnpipe.errors import UserError
from cnnpipe.evaluation import figures
from cnnpipe.evaluation.diagnosis import about_training
from cnnpipe.network.classifier import Classifier, Preparation
from cnnpipe.network.model import build
from cnnpipe.network.summary import Summary, summarize
from cnnpipe.origin import code_digest, digest
from cnnpipe.params import SPREAD, Params
from cnnpipe.processes import place
from cnnpipe.training.batches import Batches, channel_statistics
from cnnpipe.training.checkpoint import open_checkpoints, unpacked
from cnnpipe.training.distributed import ProcessGroup, joined, launch
from cnnpipe.training.loop import (
    Epoch,
    choose_device,
    choose_residency,
    fit,
    has_batch_norm,
    keep_freed_memory,
    normalisation_accuracies,
)
from cnnpipe.workspace import whole_file

HISTORY = Path("reports/train/history.csv")
CURVES = Path("reports/train/curves.png")


def run(params: Params) -> None:
    """Trains the network; writes the model file, run.json, the history and the curves.

    Where `train.num_processes` is more than one it starts them, and returns when they are done.
    Where torchrun has started this process it is one of them: the first writes.

    Raises:
        UserError: an input is missing, or the network does not fit the number of classes.
        RunFailed: the training diverges.
    """
    if params.train.num_processes > 1 and place() is None:
        launch(params.train.num_processes)
        return
    device = choose_device(params.train.device)
    with joined(device) as group:
        _train(params, device, group)


def _train(params: Params, device: torch.device, group: ProcessGroup) -> None:
    images, known = open_images("data/resized")
    table = manifest.read("data/split.csv", manifest.SPLIT_COLUMNS, "split")
    class_names = manifest.read_class_names("data/resized")
    if len(table) != len(images):
        raise UserError(
            f"data/split.csv has {len(table):,} images and data/resized {len(images):,}: "
            "run `cnnpipe split` again"
        )
    try:
        summary = summarize(params.model, params.input_shape, len(class_names))
    except ValueError as error:
        raise UserError(f"params.yaml: {error}") from None
    # Only these rows of the store are ever touched here.
    splits = {name: np.flatnonzero(table["split"] == name) for name in ("train", "val")}
    labels = pd.Categorical(table["label"], categories=class_names).codes.astype(np.int64)

    torch.manual_seed(params.training_seed)
    network = build(params.model, params.input_shape, len(class_names))
    keep_freed_memory(whole_batches=has_batch_norm(network))
    network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    mean, std = channel_statistics(images, splits["train"], group)
    resize = params.resize
    preparation = Preparation(resize.size, resize.mode, resize.color, mean, std, resize.max_pixels)
    num_bytes = int(np.prod(images.shape[1:])) * sum(map(len, splits.values()))
    resident = choose_residency(params.train, num_bytes, device)
    batch_size = params.train.batch_size
    rows, own = splits["train"], splits["val"][group.share(len(splits["val"]))]
    train = Batches(images, rows, labels[rows], batch_size, device, resident, group)
    val = Batches(images, own, labels[own], batch_size, device, resident)
    weights = _class_weights(params.train.class_weights, train.labels, len(class_names), device)
    if group.rank:
        classifier = Classifier(network, params.model, preparation, tuple(class_names))
        fit(
            classifier, train, val, params.train, weights, params.training_seed, device,
            lambda _: None, group=group,
        )  # fmt: skip
        return
    architecture = params.model.architecture
    data_hash = digest("data/resized/manifest.csv", "data/split.csv")
    with (
        open_checkpoints(_fingerprint(params, data_hash)) as checkpoints,
        tracking.start_run(
            f"{architecture} {datetime.now():%Y-%m-%d %H:%M:%S}",
            {"data_hash": data_hash, **_hardware_tags(device)},
            checkpoints.run_id,
        ) as tracked,
    ):
        checkpoints.run_id = tracked.id
        tracked.log_tag("processes", str(group.size))  # that it goes on with
        num_resumed = 0
        if at := unpacked(checkpoints.last)[1]:
            num_resumed = at["epoch"] - 1
            print(f"goes on after epoch {num_resumed}, step {at['step']}", flush=True)
        classifier = Classifier(network, params.model, preparation, tuple(class_names), tracked.id)
        _log_start(tracked, params, summary, table, data_hash, images, splits)
        _log_images(tracked, table.assign(sha256=known["sha256"]))
        del known, table  # 250 bytes an image
        history: list[Epoch] = []

        def on_epoch(epoch: Epoch) -> None:
            history.append(epoch)
            _write_history(history)
            if epoch.epoch > num_resumed:
                print(
                    f"epoch {epoch.epoch}/{params.train.epochs}: "
                    f"train loss {epoch.train_loss:.4f} accuracy {epoch.train_accuracy:.4f}, "
                    f"val loss {epoch.val_loss:.4f} accuracy {epoch.val_accuracy:.4f}, "
                    f"{epoch.seconds:.1f} s",
                    flush=True,
                )
            tracked.log_metrics(_epoch_metrics(epoch), step=epoch.epoch)

        fit(
            classifier, train, val, params.train, weights, params.training_seed, device,
            on_epoch, checkpoints, group,
        )  # fmt: skip
        best = max(history, key=lambda epoch: epoch.score)
        warnings = about_training(
            best.train_accuracy, train.labels, best.val_accuracy, len(splits["val"]),
            summary.parameters_trainable, normalisation_accuracies(classifier, train),
            best.epoch * train.num_steps,
        )  # fmt: skip
        tracked.warn("train", warnings)
        tracked.log_metrics({"train/seconds": sum(epoch.seconds for epoch in history)})
        if not tracked.experiment_id:  # MLflow was away at the start: if it is back, it has an id
            tracked.deliver()
        replace(classifier, run_id=tracked.id).save("models/model.safetensors")
        tracked.log_model_file("models/model.safetensors")
        with whole_file("models/run.json") as part:
            ids = {"run_id": tracked.id, "experiment_id": tracked.experiment_id}
            part.write_text(json.dumps({**ids, "warnings": warnings}, indent=2) + "\n")
        with whole_file(CURVES) as part:
            figures.curves(pd.read_csv(HISTORY)).savefig(part, format="png")
        tracked.log_image(CURVES, "train/curves")
        for path in (CURVES, HISTORY):
            tracked.log_file(path, "train")
    print(f"kept epoch {best.epoch}: val accuracy {best.val_accuracy:.4f}")


def _fingerprint(params: Params, data_hash: str) -> str:
    """16 hexadecimal digits that change with all that the training's result depends on."""
    settings = params.model_dump(include={"base", "resize", "model", "train"}, exclude=SPREAD)
    text = json.dumps([settings, data_hash, code_digest(), torch.__version__])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _hardware_tags(device: torch.device) -> dict[str, str]:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return {
        "device": device.type,
        "gpu": gpu,
        "torch_version": torch.__version__,
        "torch_threads": str(torch.get_num_threads()),
    }


def _log_start(
    tracked: tracking.Run,
    params: Params,
    summary: Summary,
    table: pd.DataFrame,
    data_hash: str,
    images: Images,
    splits: dict[str, np.ndarray],
) -> None:
    """Parameters, counts, data and sample pictures, before the first step."""
    counts: dict[str, Any] = {
        "model/parameters": summary.parameters,
        "model/parameters_trainable": summary.parameters_trainable,
        "model/parameters_mlp": summary.parameters_mlp,
    }
    tracked.log_params({**params.flat(), **counts})
    tracked.log_metrics({key: float(value) for key, value in counts.items()})
    download = params.download
    source = {"folder": download.folder, "url": str(download.url)}.get(
        download.source, download.source
    )
    for split in ("train", "val", "test"):
        part = table.loc[table["split"] == split, ["path", "label"]]
        # A name for each: MLflow takes two data sets of one name and digest for the same.
        tracked.log_data(part, source, f"{download.source}/{split}", data_hash, split)
    _log_data_quality(tracked, table, images)
    rows = _sample_rows(table, splits["train"])
    captions = figures.sample_captions(table["label"].iloc[rows].tolist())
    samples = figures.picture_grid(images[rows], captions, "training images")
    tracked.log_figure(samples, "train/samples.png")


def _log_data_quality(tracked: tracking.Run, table: pd.DataFrame, images: Images) -> None:
    """What was left out, what is there more than once, and copies whose labels contradict."""
    folder = Path("data/resized")
    quarantined = manifest.read(folder / "quarantine.csv", manifest.QUARANTINE_COLUMNS, "resize")
    conflicts = manifest.read(folder / "conflicts.csv", manifest.CONFLICT_COLUMNS, "resize")
    counts = {
        "images": len(table),
        "quarantined": len(quarantined),
        "duplicates": int(table["group"].duplicated(keep=False).sum()),
        "conflicts": len(conflicts),
    }
    tracked.log_metrics({f"data/{key}": float(value) for key, value in counts.items()})
    for name in ("quarantine.csv", "conflicts.csv"):
        tracked.log_file(folder / name, "data")
    # Not those of the test split, which nobody looks at before the end.
    shown = table[table["path"].isin(conflicts["path"]) & (table["split"] != "test")]
    rows = shown.sort_values(["group", "path"]).index.to_numpy()[:24]
    if len(rows):
        captions = figures.sample_captions(table["label"].iloc[rows].tolist())
        title = "copies with contradicting labels"
        tracked.log_figure(
            figures.picture_grid(images[rows], captions, title), "data/conflicts.png"
        )


def _log_images(tracked: tracking.Run, table: pd.DataFrame) -> None:
    """Which images there were, and in which split: what a model has been trained on, for ever."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "images.csv.gz"  # half a megabyte for 10,000
        manifest.write(table, path, {"path": str, "label": str, "sha256": str, "split": str})
        tracked.log_file(path, "data")


def _sample_rows(table: pd.DataFrame, rows: np.ndarray, most: int = 24) -> np.ndarray:
    """Rows of the training split, the classes in turn."""
    labels = table["label"].iloc[rows]
    turn = labels.groupby(labels).cumcount().to_numpy()
    return rows[np.argsort(turn, kind="stable")][:most]


def _epoch_metrics(epoch: Epoch) -> dict[str, float | None]:
    return {
        "train/loss": epoch.train_loss,
        "train/accuracy": epoch.train_accuracy,
        "val/loss": epoch.val_loss,
        "val/accuracy": epoch.val_accuracy,
        "train/learning_rate": epoch.learning_rate,
        "train/seconds_per_epoch": epoch.seconds,
    }


def _write_history(history: list[Epoch]) -> None:
    with whole_file(HISTORY) as part:
        pd.DataFrame([asdict(epoch) for epoch in history]).to_csv(part, index=False)


def _class_weights(
    kind: str, labels: np.ndarray, num_classes: int, device: torch.device
) -> torch.Tensor | None:
    """(classes,) float32 of mean 1 over the images, or None.

    Source: King and Zeng, "Logistic regression in rare events data" (2001), as scikit-learn's
    `balanced`.
    """
    if kind == "none":
        return None
    counts = np.bincount(labels, minlength=num_classes)
    balanced = len(labels) / (num_classes * counts)
    return torch.tensor(balanced, dtype=torch.float32, device=device)
