"""A finished pipeline on a few of scikit-learn's digits, made once."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from cnnpipe.params import load
from cnnpipe.stages import download, evaluate, resize, split, train

SETTINGS = {
    "download": {"source": "digits", "limit_per_class": 30},
    "resize": {"size": 16, "color": "grey", "workers": 2},
    "model": {"architecture": "deep", "filters": 4, "kernel_size": 3, "padding": "same"},
    "train": {"epochs": 2, "batch_size": 32, "learning_rate": 0.01},
}


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("finished")
    before = Path.cwd()
    for name in ("DVC_ROOT", "DVC_EXP_NAME", "MLFLOW_TRACKING_URI"):
        os.environ.pop(name, None)
    os.chdir(folder)
    YAML(typ="safe").dump(SETTINGS, Path("params.yaml"))
    params = load("params.yaml")
    for stage in (download, resize, split, train, evaluate):
        stage.run(params)
    yield folder
    os.chdir(before)
