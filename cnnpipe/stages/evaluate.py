"""evaluate: from the model to reports/test/. The only reader of the test split."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd

from cnnpipe import tracking
from cnnpipe.data import manifest
from cnnpipe.data.store import open_images
from cnnpipe.errors import UserError
from cnnpipe.evaluation import figures
from cnnpipe.evaluation.diagnosis import about_test
from cnnpipe.evaluation.metrics import (
    confident_mistakes,
    confusion,
    metrics,
    per_class,
)
from cnnpipe.network.classifier import Classifier
from cnnpipe.params import Params
from cnnpipe.training.batches import Batches
from cnnpipe.training.loop import choose_device, keep_freed_memory, predict
from cnnpipe.workspace import whole_folder

MODEL = Path("models/model.safetensors")


def run(params: Params) -> None:
    """Judges the model on the test split, and registers it.

    Raises:
        UserError: an input is missing, or the model was trained on other classes.
    """
    trained_by = _trained_by()
    images, known = open_images("data/resized")
    table = manifest.read("data/split.csv", manifest.SPLIT_COLUMNS, "split")
    device = choose_device(params.train.device)
    keep_freed_memory()
    classifier = Classifier.load(MODEL, device.type)
    class_names = classifier.class_names
    if list(class_names) != manifest.read_class_names("data/resized"):
        raise UserError(f"{MODEL} was trained on other classes: run `cnnpipe train` again")
    rows = np.flatnonzero(table["split"] == "test")
    test = table.iloc[rows]
    labels = pd.Categorical(test["label"], categories=list(class_names)).codes.astype(np.int64)
    batches = Batches(images, rows, labels, batch_size=64, device=device)
    probabilities = predict(classifier, batches)

    validation = _val_accuracy(), int((table["split"] == "val").sum())
    result = metrics(probabilities, labels, params.evaluate.calibration_bins)
    predictions = test[["path", "label"]].assign(
        sha256=known["sha256"].iloc[rows],
        prediction=[class_names[i] for i in probabilities.argmax(axis=1)],
    )
    columns = [f"probability_{name}" for name in class_names]
    each = pd.DataFrame(probabilities, index=test.index, columns=columns)
    predictions = pd.concat([predictions, each], axis=1)
    classes = per_class(probabilities, labels)
    classes.insert(0, "label", list(class_names))
    worst = confident_mistakes(probabilities, labels, params.evaluate.mistakes)
    captions = figures.mistake_captions(
        test["label"].iloc[worst].tolist(),
        predictions["prediction"].iloc[worst].tolist(),
        probabilities.max(axis=1)[worst].tolist(),
    )
    pictures = {
        "confusion.png": figures.confusion_matrix(confusion(probabilities, labels), class_names),
        "mistakes.png": figures.picture_grid(
            images[rows[worst]], captions, "most confident mistakes"
        ),
    }
    with (
        whole_folder("reports/test") as folder,
        tracking.reopen_run(trained_by, f"{classifier.model.architecture} evaluated") as tracked,
    ):
        (folder / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
        for frame, name in ((predictions, "predictions.csv"), (classes, "classes.csv")):
            quoting = manifest.quoting([*test["path"], *class_names])
            frame.to_csv(folder / name, index=False, lineterminator="\n", quoting=quoting)
        for name, figure in pictures.items():
            figure.savefig(folder / name, format="png")
            tracked.log_figure(figure, f"test/{name}")
        ids = {"run_id": tracked.id, "experiment_id": tracked.experiment_id}
        (folder / "run.json").write_text(json.dumps(ids, indent=2) + "\n")
        tracked.log_tag("test_hash", _test_hash(predictions))
        tracked.log_metrics({f"test/{key}": value for key, value in result.items()})
        tracked.warn("test", about_test(probabilities.argmax(axis=1), labels, *validation))
        for name in ("predictions.csv", "classes.csv"):
            tracked.log_file(folder / name, "test")
        tracked.log_model(MODEL, class_names)
    print(
        f"test accuracy {result['accuracy']:.4f} "
        f"({result['accuracy_low']:.4f} to {result['accuracy_high']:.4f} with 95 % confidence) "
        f"on {len(rows):,} images"
    )


def _test_hash(predictions: pd.DataFrame) -> str:
    """16 hexadecimal digits that are equal for the same test images with the same labels.

    How they were resized, what they are called and in which order they come does not matter.
    """
    lines = sorted(predictions["sha256"] + " " + predictions["label"])
    text = "\n".join(lines).encode(errors="surrogateescape")
    return hashlib.sha256(text).hexdigest()[:16]


def _val_accuracy() -> float:
    """Of the epoch that was kept: the best, as everywhere."""
    path = Path("reports/train/history.csv")
    try:
        return float(pd.read_csv(path)["val_accuracy"].max())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: run `cnnpipe train` first") from None
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged, run `cnnpipe train` again: {error}") from None


def _trained_by() -> str:
    """The MLflow run that trained the model."""
    path = Path("models/run.json")
    try:
        run_id = str(json.loads(path.read_text())["run_id"])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: run `cnnpipe train` first") from None
    except (ValueError, KeyError, TypeError):
        run_id = ""
    if not re.fullmatch("[0-9a-f]{32}", run_id):  # which becomes the name of a folder
        raise UserError(f"{path}: names no run: run `cnnpipe train` again")
    return run_id
