"""Whatever is changed, a module or a setting, DVC reruns each stage whose result depends on it."""

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from cnnpipe import params as module
from cnnpipe.cli import STAGES
from cnnpipe.params import Params, load
from cnnpipe.stages import download, evaluate, resize, split, train

ROOT = Path(__file__).parents[1]
PIPELINE = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
# They change no output.
TOLD_ONLY = {
    f"cnnpipe/{name}.py"
    for name in ("tracking", "registry", "mlflow_store", "outbox", "running", "sweep_view")
}
# These neither: which processes do it, and where the images came from, for MLflow.
HARMLESS = {("resize", "resize.workers"), ("resize", "resize.scheduler"),
            ("train", "download.source"), ("train", "download.folder"),
            ("train", "download.url")}  # fmt: skip

# Each stage as if it were the first: what others have loaded of the package is loaded anew.
IMPORTED = """
import importlib, json, sys
imported = {}
for stage in sys.argv[1:]:
    for name in [name for name in sys.modules if name.partition(".")[0] == "cnnpipe"]:
        del sys.modules[name]
    importlib.import_module(f"cnnpipe.stages.{stage}")
    modules = [m for name, m in sys.modules.items() if name.partition(".")[0] == "cnnpipe"]
    imported[stage] = [module.__file__ for module in modules]
print(json.dumps(imported))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A repository whose stages have all run, as far as DVC knows."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "cnnpipe", folder / "cnnpipe", ignore=shutil.ignore_patterns("*.pyc"))
    (folder / "data" / "inbox").mkdir(parents=True)
    for stage in PIPELINE.values():
        for output in [*stage.get("outs", []), *stage.get("metrics", [])]:
            path = folder / output
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(output)
    before = Path.cwd()
    os.chdir(folder)
    Repo.init(no_scm=True).close()
    with Repo() as repo:
        repo.commit(force=True)
    yield folder
    os.chdir(before)


def reasons() -> dict[str, set[str]]:
    """The stages that DVC finds changed by themselves, for each file or setting that they are for.

    `dvc status` names every one, so all may be changed at once.
    """
    with Repo() as repo:
        status = repo.status()
    stages: dict[str, set[str]] = defaultdict(set)
    for stage, changes in status.items():
        for change in changes:
            deps = change.get("changed deps", {}) if isinstance(change, dict) else {}
            for path, state in deps.items():
                for reason in state if path == "params.yaml" else [path]:
                    stages[reason].add(stage)
    return stages


def test_a_change_of_any_module_reruns_each_stage_that_imports_it(repository: Path) -> None:
    imported: dict[str, set[str]] = defaultdict(set)
    output = subprocess.run(
        [sys.executable, "-c", IMPORTED, *STAGES],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for stage, names in json.loads(output).items():
        for name in names:
            imported[str(Path(name).relative_to(ROOT))].add(stage)
    assert reasons() == {}
    paths = sorted(repository.glob("cnnpipe/**/*.py"))
    assert len(paths) > 40
    pages = sorted(repository.glob("cnnpipe/**/*.html"))
    imported |= {str(page.relative_to(repository)): {"evaluate"} for page in pages
                 if page.name in ("page.html", "report.html")}  # fmt: skip
    texts = {path: path.read_text() for path in [*paths, *pages]}
    for path, text in texts.items():
        path.write_text(f"{text}\n# changed\n")
    rerun = reasons()
    for path, text in texts.items():
        path.write_text(text)
    assert reasons() == {}
    for path in texts:
        name = str(path.relative_to(repository))
        expected = set() if name in TOLD_ONLY else imported[name]
        assert (name, rerun[name]) == (name, expected)


class Here:
    """In the place of a pool: its work is done in this process, where it is seen."""

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work(*arguments))
        return future


@contextmanager
def here(
    num_workers: int, begin: Callable[..., None], arguments: tuple[Any, ...]
) -> Iterator[Here]:
    begin(*arguments)
    yield Here()


@pytest.fixture(scope="module")
def read_by(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The stages that look at each setting, seen while they run."""
    folder = tmp_path_factory.mktemp("read")
    seen: dict[str, set[str]] = defaultdict(set)
    now = ""
    get = module.Section.__getattribute__

    def watched(self: Any, name: str) -> Any:
        # Others come from a model file, which is a dependency itself.
        if now and id(self) in sections and name in type(self).model_fields:
            seen[f"{type(self).__name__.lower()}.{name}"].add(now)
        return get(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("DVC_ROOT", "DVC_EXP_NAME", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        Path("params.yaml").write_text(
            "download: {source: digits, limit_per_class: 8}\nresize: {size: 8, workers: 1}\n"
            "model: {architecture: residual, blocks: 1, filters: 2, kernel_size: 3}\n"
            "train: {epochs: 1, augment: crop, crop_size: 8}\n"
        )
        settings = load("params.yaml")
        sections = {id(getattr(settings, name)) for name in Params.model_fields}
        patch.setattr(module.Section, "__getattribute__", watched)
        patch.setattr(resize, "process_pool", here)
        for stage in (download, resize, split, train, evaluate):
            now = stage.__name__.rpartition(".")[2]
            stage.run(settings)
        now = ""
    return seen


def other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else f"{value}x"


def test_a_change_of_any_setting_reruns_each_stage_that_looks_at_it(
    repository: Path, read_by: dict[str, set[str]]
) -> None:
    yaml = YAML()
    text = (repository / "params.yaml").read_text()
    assert len(read_by) > 30  # or nothing was seen
    content, settings = yaml.load(text), Params().flat()
    for key, value in settings.items():
        section, name = key.split(".")
        content[section][name] = other(value)
    yaml.dump(content, repository / "params.yaml")
    (repository / other(settings["download.folder"])).mkdir()  # dvc.yaml names it
    os.chdir(repository)
    rerun = reasons()
    (repository / "params.yaml").write_text(text)
    assert reasons() == {}
    for key in settings:
        expected = {stage for stage in read_by[key] if (stage, key) not in HARMLESS}
        # A stage may depend on a section as a whole.
        assert (key, expected - rerun[key] - rerun[key.split(".")[0]]) == (key, set())


def test_the_rules_of_promotion_and_which_processes_resize_rerun_nothing(repository: Path) -> None:
    text = (repository / "params.yaml").read_text()
    content = YAML().load(text)
    for name, value in Params().promote.model_dump().items():
        content["promote"][name] = other(value)
    content["resize"] |= {"workers": 3, "scheduler": "tcp://127.0.0.1:8786"}
    YAML().dump(content, repository / "params.yaml")
    with Repo() as repo:
        assert repo.status() == {}
    (repository / "params.yaml").write_text(text)
