"""MLflow's registry: each evaluated model is a version of the registered model `cnnpipe`."""

import importlib.metadata
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cnnpipe.mlflow_store import connect, connect_to_read, line, reading

# isort: split
import mlflow
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.utils.models import get_model_name_and_version

import cnnpipe
from cnnpipe.errors import UserError
from cnnpipe.origin import digest, sha256

MODEL_NAME = "cnnpipe"
CHAMPION = "champion"
"""The alias of the version that is to be used."""
_HISTORY = "champions"
"""A tag of the model: the numbers of the versions that have been it, the latest last."""
_MOST_CHAMPIONS = 500
_FLOW_RUN = "prefect_flow_run"
"""A tag of a run, the id of the flow run that made it; others that begin so, of those after it."""


@dataclass(frozen=True)
class Version:
    """A version of the registered model."""

    number: int
    run_id: str
    tags: Mapping[str, str]
    aliases: tuple[str, ...]

    @property
    def uri(self) -> str:
        """As the commands take it."""
        return f"models:/{MODEL_NAME}/{self.number}"


def versions(run_id: str = "") -> list[Version]:
    """All versions, or those of a run, the latest first.

    Raises:
        RunFailed: the tracker cannot be reached.
    """
    if not connect_to_read():
        return []
    client = mlflow.MlflowClient()
    of_run = f" AND run_id = '{run_id}'" if run_id else ""
    found: list[Any] = []
    token: str | None = ""
    with reading():
        while token is not None:
            page = client.search_model_versions(
                f"name = '{MODEL_NAME}'{of_run}", page_token=token or None
            )
            found += page
            token = page.token or None
        # A search of versions leaves them out.
        aliases = client.get_registered_model(MODEL_NAME).aliases if found else {}
    there = [
        Version(
            int(version.version),
            version.run_id,
            dict(version.tags),
            tuple(sorted(name for name, of in aliases.items() if int(of) == int(version.version))),
        )
        for version in found
    ]
    return sorted(there, key=lambda version: -version.number)


def find_version(name: str) -> Version | None:
    """The version of that number or address: 3, models:/cnnpipe/3, /latest or @champion.

    None where the name is neither an address nor the number of a version that is there.

    Raises:
        UserError: there is no version of that address.
        RunFailed: the tracker cannot be reached.
    """
    address = re.fullmatch(rf"models:/{MODEL_NAME}(?:/(\d+|latest)|@(.+))", name)
    if not address and not re.fullmatch("[0-9]{1,9}", name):
        if name.startswith("models:/"):
            raise UserError(f"{name}: no version of {MODEL_NAME}: write models:/{MODEL_NAME}/3")
        return None
    number, alias = address.groups() if address else (name, None)
    there = versions()
    for version in there:  # the latest first
        if number == "latest" or number == str(version.number) or alias in version.aliases:
            return version
    if address:
        last = f"the last is {there[0].number}" if there else "there is none yet, run `dvc repro`"
        raise UserError(f"{name}: no such version: {last}")
    return None


def champion() -> Version | None:
    """The version that is the champion.

    Raises:
        RunFailed: the tracker cannot be reached.
    """
    return next((version for version in versions() if CHAMPION in version.aliases), None)


def crown(version: Version) -> None:
    """Makes the version the champion, and remembers the one before."""
    client = mlflow.MlflowClient()
    before = champion()
    history = _history()
    if before and history[-1:] != [before.number]:  # somebody moved the alias by hand
        history.append(before.number)
    # In this order: whoever is killed in between leaves what `roll_back` takes back rightly.
    with reading():
        client.set_registered_model_alias(MODEL_NAME, CHAMPION, str(version.number))
        _remember([*history, version.number])
    record(version, {"promoted_at": now()})


def roll_back(dry_run: bool) -> tuple[Version, Version]:
    """Makes the champion before the champion again.

    Args:
        dry_run: only look which that would be.

    Returns:
        The champion, and the one that it is instead of.

    Raises:
        UserError: there is none, or none before it.
        RunFailed: the tracker cannot be reached.
    """
    there = versions()
    champion = next((version for version in there if CHAMPION in version.aliases), None)
    if champion is None:
        raise UserError("there is no champion yet: `cnnpipe promote` makes the first")
    numbers = {version.number: version for version in there}
    history = [number for number in _history() if number in numbers]
    while history and history[-1] == champion.number:
        history.pop()
    if not history:
        raise UserError(f"version {champion.number} is the first champion: there is none before it")
    before = numbers[history[-1]]
    if not dry_run:
        with reading():
            _remember(history)
            mlflow.MlflowClient().set_registered_model_alias(
                MODEL_NAME, CHAMPION, str(before.number)
            )
    return before, champion


def record(version: Version, tags: Mapping[str, str]) -> None:
    """Tags of a version, whatever they were before.

    Raises:
        RunFailed: the tracker cannot be reached.
    """
    with reading():
        for key, value in tags.items():
            mlflow.MlflowClient().set_model_version_tag(MODEL_NAME, str(version.number), key, value)


def keep_file(run_id: str, path: Path, folder: str) -> None:
    """A file among the artifacts of a run that has long ended.

    Raises:
        RunFailed: the tracker cannot be reached.
    """
    with reading():
        mlflow.MlflowClient().log_artifact(run_id, str(path), folder)


def note_flow_run(run_id: str, flow_run_id: str) -> None:
    """Tells the run of a flow run that restored or evaluated it, unless it knows of that one.

    Args:
        run_id: as models/run.json has it; where another took its place, that is told.
        flow_run_id: in full.

    Raises:
        UserError: the experiment was deleted.
        RunFailed: the tracker cannot be reached, or does not know the run.
    """
    experiment_id = connect()
    client = mlflow.MlflowClient()
    with reading():
        others = client.search_runs([experiment_id], f"tags.recovered_from = '{run_id}'",
                                    max_results=1)  # fmt: skip
        run = others[0] if others else client.get_run(run_id)
        if flow_run_id not in flow_run_ids(run.data.tags):
            # The id in full: its first digits are the time, and those of two runs may be the same.
            client.set_tag(run.info.run_id, f"{_FLOW_RUN}.{flow_run_id}", flow_run_id)


def flow_run_ids(tags: Mapping[str, str]) -> list[str]:
    """The flow runs that a run's tags name, first the one that made it."""
    named = [key for key in sorted(tags) if key == _FLOW_RUN or key.startswith(f"{_FLOW_RUN}.")]
    return list(dict.fromkeys(tags[key] for key in named))


def now() -> str:
    """The time, as it is written into tags."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _history() -> list[int]:
    with reading():
        tags = mlflow.MlflowClient().get_registered_model(MODEL_NAME).tags
    return [int(number) for number in tags.get(_HISTORY, "").split() if number.isdecimal()]


def _remember(history: Sequence[int]) -> None:
    mlflow.MlflowClient().set_registered_model_tag(
        MODEL_NAME, _HISTORY, " ".join(map(str, history[-_MOST_CHAMPIONS:]))
    )


def find_model_version(uri: str) -> str:
    """The version that a registered model's address means today: models:/cnnpipe/3.

    Args:
        uri: such as models:/cnnpipe@champion, models:/cnnpipe/latest or models:/cnnpipe/3.

    Raises:
        UserError: there is no such model.
        RunFailed: the tracker cannot be reached.
    """
    connect()
    try:
        parts = get_model_name_and_version(mlflow.MlflowClient(), uri)
        return "/".join(["models:", *map(str, parts)])
    except MlflowException as error:
        hint = "; `cnnpipe promote` sets it" if uri.endswith(f"@{CHAMPION}") else ""
        raise UserError(f"{uri}: no such model: {line(error).rstrip('.')}{hint}") from None


def find_model_file(uri: str, folder: str | Path | None = None) -> Path:
    """The model file of a registered model, such as models:/cnnpipe@champion or models:/cnnpipe/3.

    Args:
        uri: the model's address.
        folder: where to put what the store has of the model; else it may stay where temporary
            files are.

    Raises:
        UserError: there is no such model.
        RunFailed: the tracker cannot be reached.
    """
    connect()
    try:
        found = mlflow.artifacts.download_artifacts(uri, dst_path=folder and str(folder))
    except (MlflowException, OSError) as error:
        raise UserError(f"{uri}: no such model: {line(error)}") from None
    files = sorted(Path(found).rglob("*.safetensors"))
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
    if version.description != (text := _description(tags)):
        client.update_model_version(MODEL_NAME, version.version, text)


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
