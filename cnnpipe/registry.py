"""MLflow's registry: each evaluated model is a version of the registered model `cnnpipe`."""

import importlib.metadata
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from cnnpipe.mlflow_store import connect

# isort: split
import mlflow
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException

import cnnpipe
from cnnpipe.errors import UserError
from cnnpipe.origin import digest, sha256

MODEL_NAME = "cnnpipe"


def find_model_file(uri: str) -> Path:
    """The model file of a registered model, such as models:/cnnpipe@champion or models:/cnnpipe/3.

    Raises:
        UserError: there is no such model.
        RunFailed: the tracker cannot be reached.
    """
    connect()
    try:
        folder = Path(mlflow.artifacts.download_artifacts(uri))
    except (MlflowException, OSError) as error:
        raise UserError(f"{uri}: no such model: {' '.join(str(error).split())[:200]}") from None
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        raise UserError(f"{uri}: the model was not made by cnnpipe: it holds no .safetensors file")
    return files[0]


def register(run_id: str, path: Path, class_names: Sequence[str]) -> None:
    """Makes the model file a version of the registered model, with all that is known of it as tags.

    Once more, it completes what is missing and changes nothing else.
    """
    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    # It is told with the model and with the version: one whose answer was lost, or whose sender was
    # killed, is found by it and not made again.
    mark = {"model_digest": digest(path)}
    tags = {**mark, "model_sha256": sha256(path), "class_names": json.dumps(list(class_names)),
            **_known(run)}  # fmt: skip
    versions = client.search_model_versions(f"name = '{MODEL_NAME}' AND run_id = '{run_id}'")
    there = [version for version in versions if mark.items() <= version.tags.items()]
    if there:
        version = there[0]
    else:
        uri = ""
        for model in client.search_logged_models(
            [run.info.experiment_id],
            f"source_run_id = '{run_id}' AND tags.model_digest = '{mark['model_digest']}'",
        ):
            if model.status == LoggedModelStatus.READY:
                uri = model.model_uri
            else:
                client.delete_logged_model(model.model_id)
        if not uri:
            uri = _log_model(run_id, path, class_names, mark)
        version = mlflow.register_model(uri, MODEL_NAME, tags=tags)
    for key, value in tags.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(MODEL_NAME, version.version, key, value)
    if version.description != (line := _description(tags)):
        client.update_model_version(MODEL_NAME, version.version, line)


def _known(run: mlflow.entities.Run) -> dict[str, str]:
    """What the run says of its model: the test's metrics, the size, the data, the code."""
    metrics = {
        key: str(int(value)) if value.is_integer() else f"{value:.6f}"
        for key, value in run.data.metrics.items()
        if key.startswith("test/") or key == "model/parameters"
    }
    names = ("test_hash", "data_hash", "git_commit", "git_dirty", "dvc_experiment")
    return {**metrics, **{name: run.data.tags[name] for name in names if name in run.data.tags}}


def _description(tags: Mapping[str, str]) -> str:
    """One line on a version."""
    parts = []
    if "test/accuracy" in tags:
        low, high, number = (tags.get(f"test/{key}") for key in
                             ("accuracy_low", "accuracy_high", "num_images"))  # fmt: skip
        parts.append(f"test accuracy {float(tags['test/accuracy']):.3f}")
        if low and high and number:
            parts[0] += f" ({float(low):.3f} to {float(high):.3f}) on {int(number):,} images"
    if "model/parameters" in tags:
        parts.append(f"{int(tags['model/parameters']):,} parameters")
    if "git_commit" in tags:
        dirty = " with uncommitted changes" if tags.get("git_dirty") == "true" else ""
        parts.append(f"commit {tags['git_commit'][:12]}{dirty}")
    return ", ".join(parts)


def _log_model(run_id: str, path: Path, class_names: Sequence[str], tags: dict[str, str]) -> str:
    """The URI of the servable model, in the store with all that it needs."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    outputs = [ColSpec(DataType.string, "prediction")]
    outputs += [ColSpec(DataType.double, f"probability_{name}") for name in class_names]
    package = Path(cnnpipe.__file__).parent
    with warnings.catch_warnings(), mlflow.start_run(run_id=run_id, log_system_metrics=False):
        # It asks for an example of the input, which the signature makes unnecessary.
        warnings.simplefilter("ignore", UserWarning)
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(package / "serving" / "pyfunc.py"),
            artifacts={"model": str(path.resolve())},
            code_paths=[str(package)],
            signature=ModelSignature(
                inputs=Schema([ColSpec(DataType.binary, "image")]), outputs=Schema(outputs)
            ),
            pip_requirements=_requirements(),
            tags=tags,
        )
    return str(info.model_uri)


def _requirements() -> list[str]:
    """What a prediction needs, in the versions that are installed."""
    names = ("mlflow", "numpy", "pandas", "pillow", "pydantic", "ruamel.yaml", "safetensors",
             "scipy", "simplejpeg", "tifffile", "torch")  # fmt: skip
    # A local label such as +cpu names a build that a package index may not have.
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in names]
