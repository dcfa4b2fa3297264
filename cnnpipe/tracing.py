"""`cnnpipe trace`: from a run, version, model file, commit, experiment or image to all the others.

What belongs together is known by checksums: a run has those of its model file as tags, DVC's lock
has it too, and so a commit or an experiment finds the run also where DVC restored the model from
its cache, and the run bears another's name.
"""

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from cnnpipe import records, registry
from cnnpipe.data import manifest
from cnnpipe.data.splits import SPLITS
from cnnpipe.errors import UserError, printable
from cnnpipe.evaluation.comparison_table import aligned
from cnnpipe.origin import digest, git, sha256
from cnnpipe.records import RunRecord
from cnnpipe.registry import Version, flow_run_ids

MODEL_PATH = "models/model.safetensors"
_RESIZED, _SPLIT = Path("data/resized"), Path("data/split.csv")
_HEX = re.compile("[0-9a-f]+")
_EXPERIMENT = re.compile("refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/(.+)")


@dataclass(frozen=True)
class Lock:
    """What a commit's dvc.lock says."""

    commit: str
    experiments: tuple[str, ...]
    """The git refs of the DVC experiments that are this commit."""
    md5: str
    """Of dvc.lock itself."""
    model_md5: str


@dataclass(frozen=True)
class Trace:
    """What a name leads to."""

    name: str
    kind: str
    """What the name is the name of."""
    runs: list[dict[str, Any]]
    """All that is known of each run, in JSON's types."""
    image: dict[str, Any] | None = None
    """Likewise of the image."""

    def as_json(self) -> str:
        """All of it, in which nothing but ASCII remains."""
        return json.dumps(vars(self), indent=2, allow_nan=False)

    def as_text(self) -> str:
        """A few aligned lines a run, or, for an image, a line a run."""
        if self.image is None:
            return "\n\n".join(_lines(_told(run)) for run in self.runs)
        text = _lines(_told_of_image(self.image))
        if self.image["seen_by"]:
            header = ["run", "name", "version", "commit", "split", "label", "said"]
            by_id = {run["run"]: run for run in self.runs}
            rows = [
                [
                    seen["run"][:12],
                    by_id[seen["run"]]["name"],
                    _versions(by_id[seen["run"]]) or "-",
                    by_id[seen["run"]]["commit"][:12] or "-",
                    seen["split"],
                    seen["label"],
                    seen["prediction"] or "-",
                ]
                for seen in self.image["seen_by"]
            ]
            text += "\n\n" + "\n".join(aligned(header, rows, len(header)))
        return text


def trace(name: str) -> Trace:
    """Everything that the name leads to.

    Args:
        name: of a run (its id, 6 digits of it or more, or its name), a DVC experiment, a git
            commit, a version (3, models:/cnnpipe/3, models:/cnnpipe@champion), a Prefect flow run
            (its id, or 6 digits of it or more), a file (of a model or an image), an image's path in
            manifest.csv, or the SHA-256 of either.

    Raises:
        UserError: it is nothing that is known, or several things.
        RunFailed: the tracker cannot be reached.
    """
    return _Tracer().trace(name)


@dataclass
class _Tracer:
    """What is there to be found, read once."""

    runs: list[RunRecord] = field(default_factory=records.all_runs)
    versions: list[Version] = field(default_factory=registry.versions)
    _tables: dict[str, pd.DataFrame] = field(default_factory=dict)

    def trace(self, name: str) -> Trace:
        if Path(name).is_file():
            return self._file(Path(name), name)
        if re.fullmatch("[0-9a-f]{64}", name):
            found = self._model(name) or self._image(name, name, "")
            if found:
                return found
            raise UserError(f"{name}: no model file and no image, here or of any run, has it")
        fitting = self._fitting(name)
        if len(fitting) > 1:
            raise UserError(f"{name}: fits {', '.join(fitting)}: name one of them, by more of it")
        for text, runs in fitting.items():
            if not runs:
                raise UserError(f"{name}: is {text}, of which no run is known")
            kind = re.split(r" (?=\S+$)", text)[0]
            return Trace(name, kind, [self._facts(run) for run in runs])
        if image := self._image_of_path(name):
            return image
        raise UserError(
            f"{name}: no such thing: looked for a file, a run's id or name, a DVC experiment, a "
            "commit, a version of the model, a flow run, and the path of an image"
        )

    def _fitting(self, name: str) -> dict[str, list[RunRecord]]:
        """What the name is the name of, and the runs of each."""
        found: dict[str, list[RunRecord]] = {}
        if version := registry.find_version(name):
            found[f"version {version.number}"] = self._with_ids([version.run_id])
        by_id = [run for run in self.runs if name in (run.id, run.tags.get("recovered_from"))]
        if not by_id and len(name) >= 6 and _HEX.fullmatch(name):
            by_id = [run for run in self.runs if run.id.startswith(name)]
        of_experiment = self._of_experiment(name)
        known = {run.id for run in of_experiment or []}
        named = [run for run in self.runs if run.name == name and run.id not in known]
        found |= {f"run {run.id}": [run] for run in [*by_id, *named]}
        if of_experiment is not None:
            found[f"experiment {name}"] = of_experiment
        for flow_run in _flow_runs_named(name, self.runs):
            found[f"flow run {flow_run}"] = [
                run for run in self.runs if flow_run in flow_run_ids(run.tags)
            ]
        if commit := self._commit(name):
            found[f"commit {commit}"] = self._of_commit(commit)
        return found

    def _of_experiment(self, name: str) -> list[RunRecord] | None:
        """None where there is no such experiment."""
        commits = [
            lock.commit
            for lock in self._locks.values()
            if name in lock.experiments or name in map(_experiment, lock.experiments)
        ]
        found = [run for run in self.runs if run.tags.get("dvc_experiment") == name]
        found += [run for commit in commits for run in self._recorded_by(commit)]
        return list({run.id: run for run in found}.values()) if found or commits else None

    def _commit(self, name: str) -> str:
        """The commit in full; empty where the name is none."""
        if re.search(r"^-|[\s:]", name) or _EXPERIMENT.fullmatch(name):
            return ""
        if commit := git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"):
            return commit
        if len(name) >= 6 and _HEX.fullmatch(name):  # of another clone, perhaps
            commits = {run.tags.get("git_commit", "") for run in self.runs}
            found = [commit for commit in commits if commit.startswith(name)]
            return found[0] if len(found) == 1 else ""
        return ""

    def _of_commit(self, commit: str) -> list[RunRecord]:
        """The runs that were made at it, and those of the model that its dvc.lock has."""
        made = [run for run in self.runs if run.tags.get("git_commit") == commit]
        both = [*made, *self._recorded_by(commit)]
        return list({run.id: run for run in both}.values())

    def _recorded_by(self, commit: str) -> list[RunRecord]:
        lock = self._locks.get(commit) or next(iter(_read_locks({commit: ()}).values()), None)
        return [run for run in self.runs if lock and run.tags.get("model_md5") == lock.model_md5]

    @cached_property
    def _locks(self) -> dict[str, Lock]:
        """By commit: each that changed dvc.lock, and those that an experiment or a branch is at."""
        refs: dict[str, tuple[str, ...]] = {}
        # What a tag is of, or else what the ref is.
        form = "--format=%(*objectname) %(objectname) %(refname)"
        for commit, *_, ref in map(str.split, git("for-each-ref", form).splitlines()):
            is_experiment = _EXPERIMENT.fullmatch(ref)
            refs[commit] = refs.get(commit, ()) + ((ref,) if is_experiment else ())
        for commit in git("log", "--all", "--format=%H", "--", "dvc.lock").splitlines():
            refs.setdefault(commit, ())
        return _read_locks(refs)

    def _with_ids(self, ids: Collection[str]) -> list[RunRecord]:
        return [run for run in self.runs if run.id in ids]

    def _file(self, path: Path, name: str) -> Trace:
        checksum = sha256(path)
        found = self._model(checksum, name) or self._image(checksum, name, str(path))
        if found is None:
            raise UserError(
                f"{name}: its SHA-256, {checksum}, is that of no run's model, and of no image of "
                "data/resized or of a run"
            )
        return found

    def _model(self, checksum: str, name: str = "") -> Trace | None:
        ids = [run.id for run in self.runs if run.tags.get("model_sha256") == checksum]
        ids += [v.run_id for v in self.versions if v.tags.get("model_sha256") == checksum]
        runs = [self._facts(run) for run in self._with_ids(ids)]
        return Trace(name or checksum, "model file", runs) if runs else None

    def _facts(self, run: RunRecord) -> dict[str, Any]:
        """All that belongs to a run."""
        tags, table = run.tags, self._table(run)
        md5 = tags.get("model_md5", "")
        return {
            "run": run.id,
            "name": run.name,
            "status": run.status,
            "test_accuracy": run.metrics.get("test/accuracy"),
            "commit": tags.get("git_commit", ""),
            "dirty": tags.get("git_dirty") == "true",
            "experiment": tags.get("dvc_experiment", ""),
            "recorded_by": [
                {"commit": lock.commit, "experiments": list(lock.experiments),
                 "dvc_lock_md5": lock.md5}
                for lock in self._locks.values() if md5 and lock.model_md5 == md5
            ],
            "model_sha256": tags.get("model_sha256", ""),
            "model_md5": md5,
            "model_here": _is_here(tags.get("model_sha256", "")),
            "versions": [
                {"version": v.number, "aliases": list(v.aliases)}
                for v in self.versions if v.run_id == run.id
            ],
            "data_hash": tags.get("data_hash", ""),
            "data_here": bool(tags.get("data_hash")) and tags.get("data_hash") == self._data_here,
            "num_images": {} if table is None else table["split"].value_counts().to_dict(),
            "test_hash": tags.get("test_hash", ""),
            "flow_runs": [{"id": one, "url": _flow_url(one)} for one in flow_run_ids(tags)],
            "parent": tags.get("mlflow.parentRunId", ""),
            "children": [
                other.id for other in self.runs if other.tags.get("mlflow.parentRunId") == run.id
            ],
        }  # fmt: skip

    @cached_property
    def _data_here(self) -> str:
        files = (_RESIZED / "manifest.csv", _SPLIT)
        return digest(*files) if all(file.exists() for file in files) else ""

    def _table(self, run: RunRecord) -> pd.DataFrame | None:
        """All images that the run had, or, of an older one, those that it was tested on."""
        data = run.tags.get("data_hash", "")
        if data not in self._tables and run.status != "deleted":
            table = records.read_images(run.id)
            if table is not None and data:
                self._tables[data] = table  # runs on the same data have the same
            elif "test/accuracy" in run.metrics:
                told = records.read_predictions(run.id)
                return told.assign(split="test") if told is not None and "sha256" in told else None
        return self._tables.get(data)

    def _image_of_path(self, path: str) -> Trace | None:
        """By its path in the manifest here, or else in the data of the runs."""
        here = _manifest()
        if here is not None and path in set(here["path"]):
            return self._image(here.loc[here["path"] == path, "sha256"].iloc[0], path, path)
        if _quarantined(path, ""):
            return self._image("", path, path)
        of_runs = {
            checksum
            for run in self.runs
            if (table := self._table(run)) is not None
            for checksum in table.loc[table["path"] == path, "sha256"]
        }
        if len(of_runs) > 1:
            listed = ", ".join(f"image {checksum}" for checksum in sorted(of_runs)[:4])
            raise UserError(f"{path}: fits {listed}: name one of them, by its SHA-256")
        return self._image(of_runs.pop(), path, path) if of_runs else None

    def _image(self, checksum: str, name: str, path: str) -> Trace | None:
        """The image of that SHA-256; None where nothing knows it.

        Args:
            checksum: empty for one that could not be read.
            name: that was asked for.
            path: of the file, by which one in quarantine is known.
        """
        here = [] if not checksum else _places(checksum)
        reason = "" if here else _quarantined(path, checksum)
        seen = [
            {"run": run.id, "split": row["split"], "label": row["label"],
             "prediction": _prediction(run.id, checksum) if row["split"] == "test" else ""}
            for run in self.runs if checksum and (table := self._table(run)) is not None
            for row in table[table["sha256"] == checksum].drop_duplicates(["label", "split"])
            .to_dict("records")
        ]  # fmt: skip
        if not (here or reason or seen):
            return None
        image = {"sha256": checksum, "here": here, "quarantined": reason, "seen_by": seen}
        ids = {entry["run"] for entry in seen}
        return Trace(name, "image", [self._facts(run) for run in self._with_ids(ids)], image)


def _prediction(run_id: str, checksum: str) -> str:
    """What the run says of a test image; empty where it was not evaluated."""
    table = records.read_predictions(run_id)
    if table is None or "sha256" not in table:
        return ""
    said = table.loc[table["sha256"] == checksum, "prediction"]
    return "" if said.empty else str(said.iloc[0])


def _read_locks(refs: dict[str, tuple[str, ...]]) -> dict[str, Lock]:
    """The dvc.lock of each commit that has one with a trained model.

    Args:
        refs: of each commit, those of its experiments.
    """
    asked = "".join(f"{commit}:dvc.lock\n" for commit in refs)
    try:
        answer = subprocess.run(
            ["git", "cat-file", "--batch"], input=asked.encode(), capture_output=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    found: dict[str, Lock] = {}
    for commit, experiments in refs.items():
        head, _, answer = answer.partition(b"\n")
        kind, size = (head.split() + [b""] * 2)[1:3]
        if kind != b"blob":  # missing
            continue
        text, answer = answer[: int(size)], answer[int(size) + 1 :]
        if model := _model_md5(text):
            md5 = hashlib.md5(text, usedforsecurity=False).hexdigest()
            found[commit] = Lock(commit, experiments, md5, model)
    return found


def _model_md5(lock: bytes) -> str:
    """Of the model file, as `train` left it."""
    try:
        outputs = YAML(typ="safe").load(lock)["stages"]["train"]["outs"]
        return str(next(out["md5"] for out in outputs if out["path"] == MODEL_PATH))
    except (YAMLError, KeyError, TypeError, StopIteration):
        return ""


def _experiment(ref: str) -> str:
    return ref.split("/", 4)[4]


def _is_here(checksum: str) -> bool:
    return bool(checksum) and Path(MODEL_PATH).is_file() and sha256(MODEL_PATH) == checksum


def _flow_runs_named(name: str, runs: Sequence[RunRecord]) -> list[str]:
    """The flow runs of that id, or whose ids begin so; a digit is one with or without hyphens."""
    known = sorted({one for run in runs for one in flow_run_ids(run.tags)})
    digits = name.replace("-", "")
    if name in known or len(digits) < 6 or not _HEX.fullmatch(digits):
        return [name] if name in known else []
    return [one for one in known if one.replace("-", "").startswith(digits)]


def _flow_url(flow_run: str) -> str:
    api = os.environ.get("PREFECT_API_URL", "").rstrip("/")
    return f"{api.removesuffix('/api')}/runs/flow-run/{flow_run}" if api else ""


def _manifest() -> pd.DataFrame | None:
    path = _RESIZED / "manifest.csv"
    return manifest.read(path, manifest.COLUMNS, "resize") if path.exists() else None


def _places(checksum: str) -> list[dict[str, Any]]:
    """Where the image is in data/resized, as which class, and what it is a copy of."""
    table = _manifest()
    if table is None:
        return []
    splits: dict[str, str] = {}
    if _SPLIT.exists():
        split = manifest.read(_SPLIT, manifest.SPLIT_COLUMNS, "split")
        splits = dict(zip(split["path"], split["split"], strict=True))
    return [
        {
            "path": row["path"],
            "label": row["label"],
            "split": splits.get(row["path"], ""),
            "shard": str(_RESIZED / row["shard"]),
            "row": int(row["row"]),
            "copies": table.loc[
                (table["group"] == row["group"]) & (table["path"] != row["path"]), "path"
            ].tolist(),
        }
        for row in table[table["sha256"] == checksum].to_dict("records")
    ]


def _quarantined(path: str, checksum: str) -> str:
    """Why the image was left out; empty where it was not.

    Args:
        path: as in quarantine.csv, or of a file on disk that ends so and is as long.
        checksum: of the file, empty where the path is not that of one.
    """
    file = _RESIZED / "quarantine.csv"
    if not path or not file.exists():
        return ""
    table = manifest.read(file, manifest.QUARANTINE_COLUMNS, "resize")
    fits = table["path"] == path
    if checksum:
        size = str(Path(path).stat().st_size) if Path(path).is_file() else ""
        end = Path(path).absolute().as_posix()
        ends_so = table["path"].map(lambda one: end.endswith(f"/{one}")).astype(bool)  # if empty
        fits |= ends_so & (table["size"] == size)
    return "" if not fits.any() else str(table.loc[fits, "reason"].iloc[0])


def _versions(run: dict[str, Any]) -> str:
    return ", ".join(
        " ".join([str(version["version"]), *(f"({alias})" for alias in version["aliases"])])
        for version in run["versions"]
    )


def _told(run: dict[str, Any]) -> list[tuple[str, str]]:
    accuracy = run["test_accuracy"]
    tested = f", test accuracy {accuracy:.3f}" if accuracy is not None else ", not evaluated"
    recorded = [
        f"{lock['commit'][:12]}{''.join(f' ({_experiment(ref)})' for ref in lock['experiments'])}, "
        f"whose dvc.lock is {lock['dvc_lock_md5']}"
        for lock in run["recorded_by"]
    ]
    here = f", here as {MODEL_PATH}" if run["model_here"] else ""
    data = [run["data_hash"], *(["here"] if run["data_here"] else [])]
    counts = run["num_images"]
    data += [f"{counts[split]:,} {split}" for split in SPLITS if split in counts]
    flows = [", ".join(filter(None, one.values())) for one in run["flow_runs"]]
    return [
        ("run", f"{run['run']}, {run['name']}, {run['status']}{tested}"),
        ("commit", run["commit"] and run["commit"] + run["dirty"] * " with uncommitted changes"),
        ("experiment", run["experiment"]),
        *(("recorded by", text) for text in recorded),
        ("model file", run["model_sha256"] and f"SHA-256 {run['model_sha256']}{here}"),
        ("version", _versions(run)),
        ("data", run["data_hash"] and ", ".join(data)),
        ("test images", run["test_hash"]),
        *(("flow run", text) for text in flows),
        ("parent", run["parent"]),
        ("children", ", ".join(run["children"])),
    ]


def _told_of_image(image: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [("image", image["sha256"] and f"SHA-256 {image['sha256']}")]
    for place in image["here"]:
        split = f", {place['split']}" if place["split"] else ""
        lines += [
            ("path", f"{place['path']}, {place['label']}{split}"),
            ("pixels", f"{place['shard']}, row {place['row']}"),
            ("copies", ", ".join(place["copies"])),
        ]
    lines.append(("quarantined", image["quarantined"]))
    return lines


def _lines(told: Sequence[tuple[str, str]]) -> str:
    """A line each, without those of which nothing is known."""
    return "\n".join(f"{name:<12} {printable(text)}" for name, text in told if text)
