"""`cnnpipe promote`: a candidate against the champion, on the same test images.

What is compared comes from MLflow, and the decision from evaluation/promotion.py. Where the two
were tested on different images, the champion is tested again, on the candidate's.
"""

import hashlib
import json
import math
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException

from cnnpipe import records, registry
from cnnpipe.data import manifest
from cnnpipe.data.decode import UnreadableImage
from cnnpipe.data.raw import open_raw
from cnnpipe.data.store import open_images
from cnnpipe.errors import UserError
from cnnpipe.evaluation import comparison, promotion
from cnnpipe.evaluation.intervals import wilson_interval
from cnnpipe.evaluation.metrics import metrics
from cnnpipe.evaluation.promotion import Contender, Decision, Outcome
from cnnpipe.network.classifier import Classifier
from cnnpipe.origin import digest
from cnnpipe.params import Params
from cnnpipe.records import NoSuchRun
from cnnpipe.registry import Version
from cnnpipe.serving.predictor import Predictor
from cnnpipe.training.batches import Batches
from cnnpipe.training.loop import predict
from cnnpipe.workspace import locked, repository_root

_RESIZED, _SPLIT, _RAW = Path("data/resized"), Path("data/split.csv"), Path("data/raw")
_BATCH_SIZE = 64
_MOST_NAMES = 5
"""Of classes, in a reason."""


def promote(
    name: str | None, params: Params, dry_run: bool = False, force: bool = False
) -> Outcome:
    """Decides whether the candidate becomes the champion, and makes it that.

    Args:
        name: of a run or of a version; None for the one that this folder holds, or the last.
        params: of which `promote` has the rules.
        dry_run: only decide, and change nothing anywhere.
        force: promote whatever a comparison says, and where there can be none.

    Raises:
        UserError: there is no such candidate, or, without force, the two cannot be compared here.
        RunFailed: the tracker cannot be reached.
    """
    with locked(".cnnpipe/promote.lock", "`cnnpipe promote` in this folder", wait=True):
        version = _candidate(name)
        champion = registry.champion()
        outcome = _decided(version, champion, params, dry_run, force)
        if not dry_run:
            word = "promoted" if outcome.decision.promote else "kept the champion"
            reason = f"{word}: {outcome.decision.reason}"
            registry.record(version, {"promotion": reason, "promotion_at": registry.now()})
        if outcome.moved:
            registry.crown(version)
    return outcome


def roll_back(dry_run: bool) -> tuple[Version, Version]:
    """Brings the champion before back; it, and the one that it is instead of.

    Raises:
        UserError: there is none.
        RunFailed: the tracker cannot be reached.
    """
    with locked(".cnnpipe/promote.lock", "`cnnpipe promote` in this folder", wait=True):
        before, after = registry.roll_back(dry_run)
        if not dry_run:
            line = f"rolled back to version {before.number}"
            registry.record(after, {"promotion": line, "promotion_at": registry.now()})
    return before, after


def _candidate(name: str | None) -> Version:
    if name is None:
        name = _run_here()
    if name is None:
        if there := registry.versions():
            return there[0]
        raise UserError("no evaluated run yet: run `dvc repro`")
    if version := registry.find_version(name):
        return version
    try:
        (run,) = records.find_runs([name])
    except NoSuchRun:
        there = registry.versions()
        if not (there and name.isdecimal()):
            raise
        raise UserError(
            f"{name}: no such version or run: the last version is {there[0].number}"
        ) from None
    found = registry.versions(run.id)
    if not found:
        raise UserError(f"{name}: the run has no version of the model: run `cnnpipe evaluate`")
    return found[0]


def _run_here() -> str | None:
    """The run of the model that was evaluated, or trained, in this folder."""
    for path in (Path("reports/test/run.json"), Path("models/run.json")):
        if path.exists():
            try:
                return str(json.loads(path.read_text())["run_id"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}: names no run: run `dvc repro`") from None
    return None


def _contender(version: Version) -> Contender:
    """The version with its run, and with what that said of its test images."""
    try:
        (run,) = records.find_runs([version.run_id])
    except UserError as error:
        raise UserError(f"version {version.number}: {error}") from None
    table = records.read_predictions(run.id)
    return Contender(
        version.number,
        comparison.Run(run.id, run.name, run.params, run.metrics, run.tags.get("test_hash", ""),
                       table if table is not None and "sha256" in table else None),
    )  # fmt: skip


def _as_recorded(version: Version) -> Contender:
    """The version with what its tags say of the test, whatever became of its run."""
    metrics = {
        key: float(value)
        for key, value in version.tags.items()
        if key.startswith("test/") or key == "model/parameters"
    }
    run = comparison.Run(version.run_id, version.run_id[:12], {},
                         {"test/accuracy": math.nan, **metrics})  # fmt: skip
    return Contender(version.number, run)


def _decided(
    version: Version, champion: Version | None, params: Params, dry_run: bool, force: bool
) -> Outcome:
    candidate = _contender(version)
    if champion is None:
        decision = Decision(True, "there was no champion to compare it with")
        return Outcome(candidate, None, None, True, decision, not dry_run)
    if champion.number == version.number:
        decision = Decision(False, f"version {version.number} is the champion already")
        return Outcome(candidate, candidate, None, True, decision, False)
    hint = f"`cnnpipe promote {version.number} --force` promotes it without a comparison"
    try:
        outcome = _compared(version, candidate, champion, params, dry_run)
    except UserError as error:
        if not force:
            raise UserError(f"{error}; {hint}") from None
        decision = Decision(False, f"they cannot be compared: {error}")
        outcome = Outcome(candidate, _as_recorded(champion), None, False, decision, False)
    reason = outcome.decision.reason
    if outcome.decision.promote:
        return outcome
    if force:
        decision = Decision(True, f"the decision is forced, although {reason}")
        return replace(outcome, decision=decision, moved=not dry_run)
    if outcome.evidence is None:
        return replace(outcome, decision=Decision(False, f"{reason}; {hint}"))
    return outcome


def _compared(
    version: Version, candidate: Contender, champion: Version, params: Params, dry_run: bool
) -> Outcome:
    """What the rules decide.

    Raises:
        UserError: the champion's run or something else that the comparison needs is missing.
    """
    holder = _contender(champion)
    ours, theirs = set(_class_names(version)), set(_class_names(champion))
    if ours != theirs:
        only = ", ".join(
            f"only the {role} has {_listed(names)}"
            for role, names in (("candidate", ours - theirs), ("champion", theirs - ours))
            if names
        )
        decision = Decision(
            False, f"they cannot be compared: their classes are not the same: {only}"
        )
        return Outcome(candidate, holder, None, False, decision, False)
    if candidate.run.predictions is None:
        raise UserError(
            f"version {version.number}: its run kept no predictions of its test images: run "
            "`cnnpipe evaluate` for it again"
        )
    same = candidate.run.test_hash == holder.run.test_hash != ""
    notes: list[str] = []
    if not same or holder.run.predictions is None:
        candidate, holder, notes = _tested_again(version, candidate, champion, holder, params,
                                                 dry_run)  # fmt: skip
    assert candidate.run.predictions is not None and holder.run.predictions is not None
    counts = promotion.count(candidate.run.predictions, holder.run.predictions)
    if not counts.num_images:
        decision = Decision(False, "the champion has learned from all of the candidate's test "
                            "images, so that nothing is left to compare them on")  # fmt: skip
        return Outcome(candidate, holder, None, same, decision, False, notes)
    rules = promotion.Rules(**params.promote.model_dump())
    evidence = promotion.weigh(counts, rules)
    decision = promotion.decide(evidence, candidate.parameters, holder.parameters, rules)
    moved = decision.promote and not dry_run
    return Outcome(candidate, holder, evidence, same, decision, moved, notes)


def _listed(names: Collection[str]) -> str:
    """The first of them in the order of the alphabet, and how many more there are."""
    more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(sorted(names)[:_MOST_NAMES]) + more


def _class_names(version: Version) -> list[str]:
    if "class_names" in version.tags:
        names: list[str] = json.loads(version.tags["class_names"])
        return names
    return list(Classifier.load(registry.find_model_file(version.uri)).class_names)  # an older one


def _tested_again(
    version: Version,
    candidate: Contender,
    champion: Version,
    holder: Contender,
    params: Params,
    dry_run: bool,
) -> tuple[Contender, Contender, list[str]]:
    """Both with what they say of the candidate's test images, as far as these are new to both.

    The champion may have been trained on some of these, which would flatter it: on those neither is
    judged. Copies that are not the same byte for byte go unnoticed.
    """
    ours = candidate.run.predictions
    assert ours is not None
    classifier = Classifier.load(registry.find_model_file(champion.uri))
    probabilities = _predicted(classifier, ours, candidate, version)
    names = np.array(classifier.class_names, object)
    columns = [f"probability_{name}" for name in names]
    theirs = pd.concat(
        [ours.assign(prediction=names[probabilities.argmax(axis=1)]),
         pd.DataFrame(probabilities, ours.index, columns)], axis=1,
    )  # fmt: skip
    if not dry_run:
        _keep(theirs, candidate, champion)
    notes = [f"the champion was tested again, on the {len(ours):,} test images of the candidate"]
    images = records.read_images(holder.run.id)
    if images is None:
        notes.append("whether it has learned from some of them is not known, which would flatter "
                     "it: its run is older than this record")  # fmt: skip
        learned = np.zeros(len(ours), bool)
    else:
        seen = images.loc[images["split"] != "test", "sha256"]
        learned = ours["sha256"].isin(seen).to_numpy()
    if learned.any():
        notes.append(
            f"it has learned from {learned.sum():,} of them, which would flatter it: the two are "
            "compared on the others"
        )
    new = np.flatnonzero(~learned)
    bins = params.evaluate.calibration_bins
    theirs, probabilities = theirs.iloc[new], probabilities[new]
    holder = _judged(holder, theirs, _metrics(theirs, probabilities, classifier, bins))
    if learned.any():
        candidate = _judged(candidate, ours.iloc[new], _accuracy(ours.iloc[new]))
    return candidate, holder, notes


def _judged(contender: Contender, table: pd.DataFrame, found: dict[str, float]) -> Contender:
    """The contender with these predictions and metrics of the test, instead of its own."""
    run = contender.run
    others = {key: value for key, value in run.metrics.items() if not key.startswith("test/")}
    metrics = {**others, **{f"test/{key}": value for key, value in found.items()}}
    judged = comparison.Run(run.id, run.name, run.params, metrics, predictions=table)
    return Contender(contender.version, judged)


def _metrics(
    table: pd.DataFrame, probabilities: np.ndarray, classifier: Classifier, num_bins: int
) -> dict[str, float]:
    if table.empty:
        return {"accuracy": math.nan}
    categories = list(classifier.class_names)
    labels = pd.Categorical(table["label"], categories=categories).codes.astype(np.int64)
    found = metrics(probabilities, labels, num_bins)
    return {key: value for key, value in found.items() if value is not None}


def _accuracy(table: pd.DataFrame) -> dict[str, float]:
    """All that follows from the predictions alone."""
    if table.empty:
        return {"accuracy": math.nan}
    hits = int((table["prediction"] == table["label"]).sum())
    low, high = wilson_interval(hits, len(table))
    return {"accuracy": hits / len(table), "accuracy_low": low, "accuracy_high": high,
            "num_images": len(table)}  # fmt: skip


def _keep(table: pd.DataFrame, candidate: Contender, champion: Version) -> None:
    """The champion's predictions, among the artifacts of the candidate's run."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"champion-{champion.number}.csv"
        texts = [*table["path"], *table["label"], *table.columns]
        table.to_csv(path, index=False, lineterminator="\n", quoting=manifest.quoting(texts),
                     errors="surrogateescape")  # fmt: skip
        registry.keep_file(candidate.run.id, path, "promotion")


def _predicted(
    classifier: Classifier, table: pd.DataFrame, candidate: Contender, version: Version
) -> np.ndarray:
    """(N, classes) float32: the probabilities for the images of the table, prepared as for it.

    Raises:
        UserError: the images are not in this folder, or one cannot be read.
    """
    if _is_prepared(classifier, candidate, version):
        return _from_resized(classifier, table)
    found = _from_raw(classifier, table, _RAW)
    if found is not None:
        return found
    commit, experiment = (version.tags.get(key, "") for key in ("git_commit", "dvc_experiment"))
    for revision in filter(None, (experiment, commit)):
        with TemporaryDirectory() as folder, suppress(DvcException, OSError):
            raw = Path(folder) / "raw"
            DVCFileSystem(str(repository_root()), rev=revision).get(
                str(_RAW), str(raw), recursive=True
            )
            found = _from_raw(classifier, table, raw)
            if found is not None:
                return found
    if experiment:
        how = f"`dvc exp apply {experiment}` brings them back"
    elif commit:
        how = f"`git checkout {commit[:12]} && dvc checkout` brings them back"
    else:
        how = "go to the folder where it was evaluated"
    raise UserError(
        f"version {version.number}: was tested on other images than the champion, and its test "
        f"images are neither in this folder nor in DVC's cache: {how}"
    )


def _is_prepared(classifier: Classifier, candidate: Contender, version: Version) -> bool:
    """Whether data/resized/ is the candidate's, and prepared as the classifier needs it."""
    files = (_RESIZED / "manifest.csv", _SPLIT)
    if not all(file.exists() for file in files):
        return False
    settings, needed = candidate.run.params, classifier.preparation
    return digest(*files) == version.tags.get("data_hash") and all(
        settings.get(f"resize.{key}") == str(getattr(needed, key))
        for key in ("size", "mode", "color", "max_pixels")
    )


def _from_resized(classifier: Classifier, table: pd.DataFrame) -> np.ndarray:
    images, known = open_images(_RESIZED)
    places = pd.Series(known.index, index=known["sha256"])
    rows = places[~places.index.duplicated()].loc[table["sha256"]].to_numpy()
    labels = np.zeros(len(rows), np.int64)  # nobody asks for the loss
    return predict(
        classifier, Batches(images, rows, labels, _BATCH_SIZE, torch.device("cpu"))
    )  # fmt: skip


def _from_raw(classifier: Classifier, table: pd.DataFrame, folder: Path) -> np.ndarray | None:
    """None where an image is not there, or is not the same any more."""
    if not (folder / "source.json").exists():
        return None
    predictor = Predictor(classifier)
    results = []
    with open_raw(folder) as (raw, files):
        by_path = {file.path: file for file in files}
        for start in range(0, len(table), _BATCH_SIZE):
            part = table.iloc[start : start + _BATCH_SIZE]
            batch = []
            for path, sha256 in zip(part["path"], part["sha256"], strict=True):
                try:
                    data = raw.read(by_path[path])
                except (KeyError, UnreadableImage):
                    return None
                if hashlib.sha256(data).hexdigest() != sha256:
                    return None
                batch.append(data)
            try:
                results.append(predictor.predict(batch))
            except UnreadableImage as error:
                raise UserError(
                    f"the champion cannot read one of {part['path'].iloc[0]} and the "
                    f"{len(part) - 1} test images after it: {error}"
                ) from None
    return np.concatenate(results)
