"""evaluate: from the model to reports/test/ and report.html. The only reader of the test split."""

import hashlib
import importlib.metadata
import json
import platform
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd

import cnnpipe
from cnnpipe import tracking
from cnnpipe.data import manifest
from cnnpipe.data.store import open_images
from cnnpipe.errors import UserError
from cnnpipe.evaluation import figures
from cnnpipe.evaluation.diagnosis import about_test
from cnnpipe.evaluation.metrics import (
    confident_mistakes,
    confusion,
    mean_roc_curve,
    metrics,
    per_class,
    roc_curves,
)
from cnnpipe.evaluation.report import MOST_FILTERS, Evaluated, filter_pictures, report
from cnnpipe.network.classifier import Classifier
from cnnpipe.network.summary import summarize
from cnnpipe.origin import origin
from cnnpipe.params import Params
from cnnpipe.training.batches import Batches
from cnnpipe.training.loop import Epoch, choose_device, keep_freed_memory, predict
from cnnpipe.usage import OUTPUTS, last, so_far
from cnnpipe.workspace import whole_file, whole_folder

MODEL = Path("models/model.safetensors")


def run(params: Params) -> None:
    """Judges the model on the test split, reports on it, and registers it.

    Raises:
        UserError: an input is missing, or the model was trained on other classes.
    """
    trained_by, warnings = _trained_by()
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

    history = _history()
    validation = history["val_accuracy"].max(), int((table["split"] == "val").sum())
    warnings_test = about_test(probabilities.argmax(axis=1), labels, *validation)
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
    filters = filter_pictures(classifier)[:MOST_FILTERS]
    pictures = {
        "confusion.png": figures.confusion_matrix(confusion(probabilities, labels), class_names),
        "mistakes.png": figures.picture_grid(
            images[rows[worst]], captions, "most confident mistakes"
        ),
        "filters.png": figures.picture_grid(
            filters, [str(i + 1) for i in range(len(filters))], "filters of the first layer"
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
        roc = mean_roc_curve(roc_curves(probabilities, labels))
        axes = ["false_positive_rate", "true_positive_rate"]
        pd.DataFrame(roc, columns=axes).to_csv(folder / "roc.csv", index=False)
        for name, figure in pictures.items():
            figure.savefig(folder / name, format="png")
            tracked.log_file(folder / name, "test")
            tracked.log_image(folder / name, f"test/{Path(name).stem}")
        ids = {"run_id": tracked.id, "experiment_id": tracked.experiment_id}
        (folder / "run.json").write_text(json.dumps(ids, indent=2) + "\n")
        tracked.log_tag("test_hash", _test_hash(predictions))
        tracked.log_metrics({f"test/{key}": value for key, value in result.items()})
        tracked.warn("test", warnings_test)
        for name in ("predictions.csv", "classes.csv"):
            tracked.log_file(folder / name, "test")
        evaluated = Evaluated(
            params,
            classifier,
            summarize(classifier.model, classifier.preparation.input_shape, len(class_names)),
            images,
            table,
            rows,
            labels,
            probabilities,
            result,
            history,
            manifest.read("data/resized/quarantine.csv", manifest.QUARANTINE_COLUMNS, "resize"),
            Path("data/resized/quarantine"),
            manifest.read("data/resized/conflicts.csv", manifest.CONFLICT_COLUMNS, "resize"),
            {**{stage: last(stage) for stage in OUTPUTS}, "evaluate": so_far("evaluate")},
            _facts(tracked.id),
            [*warnings, *warnings_test],
        )
        with whole_file("reports/report.html") as part:
            part.write_text(report(evaluated), encoding="utf-8")
        tracked.log_file("reports/report.html", "")
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


def _history() -> pd.DataFrame:
    """Of the training, a row an epoch."""
    path = Path("reports/train/history.csv")
    try:
        return pd.read_csv(path).astype(float)[[field.name for field in fields(Epoch)]]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: run `cnnpipe train` first") from None
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged, run `cnnpipe train` again: {error}") from None


def _facts(run_id: str) -> dict[str, str]:
    """The code, the versions and the run, for the report."""
    made_by = origin()
    commit = made_by.get("git_commit", "unknown")
    packages = ("torch", "numpy", "pillow", "dvc", "mlflow")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    experiment = made_by.get("dvc_experiment")
    return {
        "code": f"cnnpipe {cnnpipe.__version__}, commit {commit[:12]}"
        + (" with uncommitted changes" if made_by.get("git_dirty") == "true" else ""),
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
        **({"DVC experiment": experiment} if experiment else {}),
        "MLflow run": run_id,
    }


def _trained_by() -> tuple[str, list[str]]:
    """The MLflow run that trained the model, and what was to be said of the training."""
    path = Path("models/run.json")
    try:
        content = json.loads(path.read_text())
        run_id, warnings = str(content["run_id"]), list(map(str, content["warnings"]))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: run `cnnpipe train` first") from None
    except (ValueError, KeyError, TypeError):
        run_id = ""
    if not re.fullmatch("[0-9a-f]{32}", run_id):  # which becomes the name of a folder
        raise UserError(f"{path}: names no run: run `cnnpipe train` again")
    return run_id, warnings
