"""What the tests share: steady numbers, and a small classifier to try things on."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from object_storage import Storage, storage_server

# The same examples every time, however busy the machine is.
hypothesis.settings.register_profile("cnnpipe", deadline=None, derandomize=True)
hypothesis.settings.load_profile("cnnpipe")


def pytest_configure() -> None:
    # A run in the background of a script ignores Ctrl-C, and so would all that the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Sums are added in one order, so that golden numbers hold on any machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a local MLflow store, a module's own."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def in_store(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder is the store's, and nothing names another."""
    monkeypatch.chdir(store)
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def storage_of_all() -> Iterator[Storage]:
    with storage_server() as storage:
        yield storage


@pytest.fixture
def storage(storage_of_all: Storage, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """An S3 server without objects, which the environment names."""
    from s3fs import S3FileSystem

    storage_of_all.reset()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in storage_of_all.environment().items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()  # it remembers credentials
    return storage_of_all


@pytest.fixture
def make_classifier() -> Callable[..., Any]:
    """`make_classifier(size=8, color="rgb", class_names=("cat", "dog"), seed=0, **model)`."""
    import torch

    from cnnpipe.network.classifier import Classifier, Preparation
    from cnnpipe.network.model import build
    from cnnpipe.params import Model

    def make(
        size: int = 8,
        color: str = "rgb",
        class_names: tuple[str, ...] = ("cat", "dog"),
        seed: int = 0,
        **settings: Any,
    ) -> Classifier:
        model = Model(**{"kernel_size": 3, **settings})
        mean, std = ((120.0,), (70.0,)) if color == "grey" else ((120.5, 110, 100), (70.0, 65, 60))
        preparation = Preparation(size, "stretch", color, mean, std, 100_000_000)
        torch.manual_seed(seed)
        network = build(model, preparation.input_shape, len(class_names))
        network.to(memory_format=torch.channels_last)  # as the train stage does
        return Classifier(network.eval(), model, preparation, class_names, "a run")

    return make
