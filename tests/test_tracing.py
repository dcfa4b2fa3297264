"""From any one thing to all the others, and back: a real store, a real repository, real models."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import mlflow
import pytest
from PIL import Image
from ruamel.yaml import YAML

from cnnpipe import cli, mlflow_store, records, registry, tracing, tracking
from cnnpipe.data.raw import open_raw
from cnnpipe.errors import RunFailed, UserError
from cnnpipe.origin import git, md5, sha256
from cnnpipe.params import load
from cnnpipe.stages import download, evaluate, resize, split, train
from cnnpipe.tracing import Trace, trace

SETTINGS = {
    "download": {"source": "digits", "limit_per_class": 20},
    "resize": {"size": 8, "color": "grey", "workers": 1},
    "model": {"filters": 2, "kernel_size": 3},
    "train": {"epochs": 1, "batch_size": 32, "device": "cpu"},
}
FLOW = "0199d3a0-1111-7222-8333-444455556666"
MODEL = Path("models/model.safetensors")


def commit(message: str) -> str:
    for command in (["add", "-A"], ["commit", "-qm", message]):
        subprocess.run(["git", *command], check=True)
    return git("rev-parse", "HEAD")


def write_lock() -> None:
    """As `dvc repro` leaves it, as far as it is read."""
    outs = [{"path": str(MODEL), "hash": "md5", "md5": md5(MODEL), "size": 1}]
    YAML(typ="safe").dump({"schema": "2.0", "stages": {"train": {"outs": outs}}}, Path("dvc.lock"))


@dataclass(frozen=True)
class Project:
    """One run, and what it is known by."""

    run_id: str
    names: dict[str, str]
    """A name of each kind."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("traced")
    before = Path.cwd()
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DVC_ROOT", "MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
            patch.delenv(name, raising=False)
        for who in ("AUTHOR", "COMMITTER"):
            patch.setenv(f"GIT_{who}_NAME", "test")
            patch.setenv(f"GIT_{who}_EMAIL", "test@localhost")
        patch.setenv("DVC_EXP_NAME", "dusty-dory")
        patch.setenv("CNNPIPE_FLOW_RUN_ID", FLOW)
        subprocess.run(["git", "init", "-q"], check=True)
        ignored = [
            "/data",
            "/models",
            "/reports",
            "/mlflow.db",
            "/mlartifacts",
            "/.cnnpipe",
            "/*.*g",
        ]
        Path(".gitignore").write_text("\n".join(ignored))
        YAML(typ="safe").dump(SETTINGS, Path("params.yaml"))
        code = commit("the code")
        params = load("params.yaml")
        for stage in (download, resize, split, train, evaluate):
            stage.run(params)
        write_lock()
        lock = commit("the lock")
        # Where DVC keeps an experiment: a commit that no branch has.
        git("update-ref", f"refs/exps/{code[:2]}/{code[2:]}/dusty-dory", lock)
        git("reset", "--hard", "-q", code)
        run_id = json.loads(Path("models/run.json").read_text())["run_id"]
        registry.crown(registry.versions()[0])
        images = records.read_images(run_id)
        assert images is not None
        image = images[images["split"] == "test"].iloc[0]
        with open_raw("data/raw") as (raw, files):
            data = next(raw.read(file) for file in files if file.path == image["path"])
        (folder / "image.png").write_bytes(data)
        shutil.copy(MODEL, folder / "copied.bin")
        yield Project(run_id, {
            "run": run_id, "beginning": run_id[:8], "experiment": "dusty-dory", "code": code,
            "lock": lock, "branch": "HEAD", "flow run": FLOW, "version": "1",
            "model": "models:/cnnpipe/1", "champion": "models:/cnnpipe@champion",
            "file": str(MODEL), "copy": "copied.bin", "model_sha256": sha256(MODEL),
            "image": image["path"], "image file": "image.png", "image_sha256": image["sha256"],
        })  # fmt: skip
    os.chdir(before)


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DVC_ROOT", "DVC_EXP_NAME", "MLFLOW_TRACKING_URI", "CNNPIPE_FLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def client() -> mlflow.MlflowClient:
    return mlflow.MlflowClient(mlflow_store.address(), mlflow_store.address())


def names_in(found: Trace) -> dict[str, str]:
    """What the trace itself names, of each kind."""
    (run,) = found.runs
    (recorded,) = run["recorded_by"]
    (version,) = run["versions"]
    (alias,) = version["aliases"]
    images = records.read_images(run["run"])
    assert images is not None and run["num_images"] == images["split"].value_counts().to_dict()
    image = images[images["split"] == "test"].iloc[0]
    return {
        "run": run["run"], "beginning": run["run"][:8], "experiment": run["experiment"],
        "code": run["commit"], "lock": recorded["commit"], "flow run": run["flow_runs"][0]["id"],
        "version": str(version["version"]), "model": f"models:/cnnpipe/{version['version']}",
        "champion": f"models:/cnnpipe@{alias}", "model_sha256": run["model_sha256"],
        "file": tracing.MODEL_PATH if run["model_here"] else "",
        "image": image["path"], "image_sha256": image["sha256"],
    }  # fmt: skip


KINDS = (
    *("run", "beginning", "experiment", "code", "lock", "branch", "flow run", "version", "model"),
    *("champion", "file", "copy", "model_sha256", "image", "image file", "image_sha256"),
)


@pytest.fixture(scope="module")
def traces(project: Project) -> dict[str, Trace]:
    return {kind: trace(name) for kind, name in project.names.items()}


@pytest.fixture(scope="module")
def found_names(traces: dict[str, Trace]) -> dict[str, dict[str, str]]:
    return {kind: names_in(found) for kind, found in traces.items()}


@pytest.mark.parametrize(("start", "end"), list(permutations(KINDS, 2)))
def test_whatever_one_starts_from_everything_else_is_found(
    project: Project,
    traces: dict[str, Trace],
    found_names: dict[str, dict[str, str]],
    start: str,
    end: str,
) -> None:
    assert set(project.names) == set(KINDS)
    found = found_names[start]
    if end in found:
        assert found[end] == project.names[end]
    # And from there it is the same again.
    assert traces[end].runs == traces[start].runs
    if start.startswith("image") and end.startswith("image"):
        assert traces[end].image == traces[start].image


def test_a_trace_has_what_the_files_and_the_store_say(
    project: Project, traces: dict[str, Trace]
) -> None:
    (run,) = traces["run"].runs
    assert run["name"] == run["experiment"] == "dusty-dory"
    assert (run["status"], run["dirty"]) == ("finished", False)
    assert run["test_accuracy"] == client().get_run(project.run_id).data.metrics["test/accuracy"]
    assert (run["model_md5"], run["data_here"]) == (md5(MODEL), True)
    (recorded,) = run["recorded_by"]
    assert recorded["experiments"][0].endswith("/dusty-dory")
    text = subprocess.run(
        ["git", "show", f"{recorded['commit']}:dvc.lock"], check=True, capture_output=True
    ).stdout
    Path("lock.png").write_bytes(text)
    assert recorded["dvc_lock_md5"] == md5("lock.png")


def test_an_image_says_where_it_is_and_how_it_was_predicted(
    project: Project, traces: dict[str, Trace]
) -> None:
    image = traces["image file"].image
    assert image is not None
    (place,) = image["here"]
    (seen,) = image["seen_by"]
    table = records.read_predictions(project.run_id)
    assert table is not None
    told = table[table["path"] == project.names["image"]].iloc[0]
    assert seen == {"run": project.run_id, "split": "test", "label": told["label"],
                    "prediction": told["prediction"]}  # fmt: skip
    assert (place["path"], place["split"]) == (project.names["image"], "test")
    manifest = Path("data/resized/manifest.csv").read_text()
    line = next(line for line in manifest.splitlines() if line.startswith(place["path"] + ","))
    assert f",{Path(place['shard']).name},{place['row']}," in line
    learned = records.read_images(project.run_id)
    assert learned is not None
    path = learned.loc[learned["split"] == "train", "path"].iloc[0]
    trained = trace(path).image
    assert trained is not None
    assert trained["seen_by"][0] | {"label": ""} == {
        "run": project.run_id, "split": "train", "label": "", "prediction": "",
    }  # fmt: skip


def test_copies_and_images_in_quarantine_are_said_to_be_that(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store.address())
    shutil.copytree("data", tmp_path / "data", ignore=shutil.ignore_patterns("raw"))
    monkeypatch.chdir(tmp_path)
    inbox = tmp_path / "inbox" / "cat"
    inbox.mkdir(parents=True)
    (inbox / "broken.jpg").write_bytes(b"12345")
    (tmp_path / "data/resized/quarantine.csv").write_text(
        "path,reason,size\ncat/broken.jpg,no image,5\n"
    )
    path = Path("data/resized/manifest.csv")
    lines = path.read_text().splitlines()
    first, second = lines[1].split(","), lines[2].split(",")
    position = lines[0].split(",").index("group")
    second[position] = first[position]
    path.write_text("\n".join([lines[0], lines[1], ",".join(second), *lines[3:]]) + "\n")
    here = (trace(first[0]).image or {})["here"]
    assert here[0]["copies"] == [second[0]]
    for name in ("cat/broken.jpg", str(inbox / "broken.jpg")):
        found = trace(name)
        assert found.image is not None and found.runs == []
        assert found.image["quarantined"] == "no image"
    (inbox / "broken.jpg").write_bytes(b"123456")  # is another
    with pytest.raises(UserError, match="is that of no run's model, and of no image"):
        trace(str(inbox / "broken.jpg"))


def test_a_file_that_is_no_model_and_no_image_is_said_to_be_that(project: Project) -> None:
    assert Path("data/resized/quarantine.csv").read_text().count("\n") == 1  # nothing is in it
    for name in ("data/raw/images.zip", "params.yaml"):
        with pytest.raises(UserError, match=f"{name}: its SHA-256, {sha256(name)}, is that of no"):
            trace(name)


def test_a_flow_run_has_its_page_where_the_server_is_known(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trace(FLOW).runs[0]["flow_runs"] == [{"id": FLOW, "url": ""}]
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    url = f"http://127.0.0.1:4200/runs/flow-run/{FLOW}"
    assert trace(FLOW).runs[0]["flow_runs"] == [{"id": FLOW, "url": url}]
    assert f"flow run     {FLOW}, {url}" in trace(FLOW).as_text()


def test_every_flow_run_that_a_run_was_told_of_finds_it_by_6_digits_or_more(
    project: Project,
) -> None:
    # Two at nearly the same time, which is what an id begins with.
    later = [f"0199d4b7-{n}-7222-8333-444455556666" for n in ("0001", "0002")]
    for flow_run in (FLOW, later[1], later[0], later[1]):
        registry.note_flow_run(project.run_id, flow_run)
    try:
        for name in (FLOW, FLOW[:6], "0199d3a011", *later, later[0][:13]):
            (run,) = trace(name).runs
            assert run["run"] == project.run_id
            assert [one["id"] for one in run["flow_runs"]] == [FLOW, *later]
        assert trace(FLOW[:6]).as_text().count("\nflow run ") == 3
        with pytest.raises(UserError, match=f"fits flow run {later[0]}, flow run {later[1]}: name"):
            trace("0199d4b7")
        with pytest.raises(UserError, match="0199d: no such thing"):
            trace("0199d")
    finally:
        for flow_run in later:
            client().delete_tag(project.run_id, f"prefect_flow_run.{flow_run}")


def test_a_flow_run_is_told_to_the_run_that_took_anothers_place(project: Project) -> None:
    gone = "e" * 32
    with pytest.raises(RunFailed, match=gone):
        registry.note_flow_run(gone, FLOW)
    with tracking.reopen_run(gone, "recovered") as run:
        pass
    registry.note_flow_run(gone, FLOW)
    try:
        assert {found["run"] for found in trace(FLOW).runs} == {project.run_id, run.id}
    finally:
        for tag in (f"prefect_flow_run.{FLOW}", "git_commit"):
            client().delete_tag(run.id, tag)


def test_an_experiment_that_was_restored_leads_to_the_run_of_another_name(
    project: Project,
) -> None:
    lock, code = project.names["lock"], project.names["code"]
    ref = f"refs/exps/{code[:2]}/{code[2:]}/restored-later"
    git("update-ref", ref, lock)
    try:
        found = trace("restored-later")
    finally:
        git("update-ref", "-d", ref)
    assert [run["run"] for run in found.runs] == [project.run_id]
    assert found.kind == "experiment" and found.runs[0]["experiment"] == "dusty-dory"


def test_parent_and_children_name_each_other_and_a_commit_shows_all_its_runs(
    project: Project,
) -> None:
    tags = {"mlflow.parentRunId": project.run_id}
    with tracking.start_run("a child", tags) as child:
        pass
    try:
        found = trace(project.names["code"])
        assert {run["run"] for run in found.runs} == {child.id, project.run_id}
        by_id = {run["run"]: run for run in found.runs}
        assert by_id[project.run_id]["children"] == [child.id]
        assert by_id[child.id]["parent"] == project.run_id
        assert found.as_text().count("\nparent ") == found.as_text().count("\nchildren ") == 1
    finally:
        for tag in ("mlflow.parentRunId", "git_commit"):
            client().delete_tag(child.id, tag)


def test_what_fits_several_things_lists_them_and_what_fits_none_says_so(
    project: Project, tmp_path: Path
) -> None:
    twins = []
    for _ in range(2):
        with tracking.start_run("twin", {"git_commit": "f" * 40}) as run:
            twins.append(run.id)
    for name, message in [
        ("twin", f"twin: fits run {twins[1]}, run {twins[0]}: name one of them"),
        ("nobody", "nobody: no such thing: looked for a file, a run's id or name, "),
        ("0" * 64, "no model file and no image, here or of any run, has it"),
        ("models:/cnnpipe/9", "no such version: the last is 1"),
        ("99", "99: no such thing"), ("--all", "no such thing"), ("*", "no such thing"),
    ]:  # fmt: skip
        with pytest.raises(UserError) as error:
            trace(name)
        assert message in str(error.value) and "\n" not in str(error.value)
    assert len(trace("f" * 12).runs) == 2  # of a commit that this clone has not


def test_the_command_prints_a_few_lines_or_one_object(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli._command(["trace", project.run_id]) == 0
    text = capsys.readouterr().out
    names = [project.names[kind] for kind in ("code", "flow run", "experiment", "model_sha256")]
    parts = [*names, project.names["lock"][:12], "version      1 (champion)", ", here"]
    assert [part for part in parts if part not in text] == []
    assert cli._command(["trace", project.names["image"]]) == 0
    text = capsys.readouterr().out
    assert project.names["image_sha256"] in text and "data/resized/images-" in text
    assert text.splitlines()[-1].startswith(f"{project.run_id[:12]}  dusty-dory  1 (champion)  ")
    for name in (project.run_id, project.names["image"]):
        assert cli._command(["trace", name, "--json"]) == 0
        content: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert content["runs"][0]["run"] == project.run_id


def test_without_a_store_and_a_repository_it_says_so_and_makes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    Image.new("L", (8, 8)).save("x.png")
    for name in ("nobody", "x.png"):
        with pytest.raises(UserError):
            trace(name)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
