"""The exported network gives the network's own answers, or there is no file."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cnnpipe.errors import RunFailed, UserError
from cnnpipe.serving import export as exporting  # before ONNX Runtime: it switches reports off
from cnnpipe.serving.export import export

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")

NETWORKS: dict[str, dict[str, Any]] = {
    "article": {},
    "article, sigmoid, same": {"head": "sigmoid", "padding": "same", "kernel_size": 4},
    "article, windows of three, stride": {"pool_size": 3, "stride": 2, "pooling": "average"},
    "deep": {"architecture": "deep", "blocks": 2, "batch_norm": True, "dense_units": 6,
             "flip_average": True, "pooling": "l2", "dropout": 0.5},
    "residual": {"architecture": "residual", "blocks": 2, "flip_average": True},
    "residual, sigmoid": {"architecture": "residual", "blocks": 1, "head": "sigmoid"},
    "mlp": {"architecture": "mlp", "dense_units": 8},
}  # fmt: skip


@pytest.mark.parametrize("color", ["rgb", "grey"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_gives_the_networks_probabilities_from_pixels_in_batches_of_any_size(
    make_classifier: Any, tmp_path: Path, name: str, color: str
) -> None:
    classifier = make_classifier(size=17, color=color, **NETWORKS[name])
    path = tmp_path / "new" / "network.onnx"
    said = export(classifier, str(path))
    channels = 1 if color == "grey" else 3
    assert said.startswith(f"{path}: images (N, 17, 17, {channels}) uint8 to probabilities (N, 2)")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in (1, 5, 33):
        chance = np.random.default_rng(size)
        images = chance.integers(0, 256, (size, 17, 17, channels), dtype=np.uint8)
        (theirs,) = session.run(None, {"images": images})
        with torch.inference_mode():
            tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
            ours = classifier.probabilities(tensor).numpy()
        assert theirs.dtype == np.float32
        np.testing.assert_allclose(theirs, ours, atol=1e-6)
        np.testing.assert_allclose(theirs.sum(axis=1), 1, rtol=1e-5)
    assert list(tmp_path.rglob("*")) == [path.parent, path]  # in one piece


def test_the_metadata_say_what_the_classes_are_and_how_an_image_is_prepared(
    make_classifier: Any, tmp_path: Path
) -> None:
    classifier = make_classifier(class_names=("cat, big", "été", "x"), color="grey")
    export(classifier, str(tmp_path / "n.onnx"))
    model = onnx.load(tmp_path / "n.onnx")
    onnx.checker.check_model(model, full_check=True)
    found = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(found["class_names"]) == ["cat, big", "été", "x"]
    assert json.loads(found["preparation"]) == {
        "size": 8, "mode": "stretch", "color": "grey", "max_pixels": 100_000_000,
    }  # fmt: skip
    assert json.loads(found["model"])["architecture"] == "article"
    assert found["run_id"] == "a run"
    assert str(tmp_path) not in str(model) and str(Path(__file__).parents[2]) not in str(model)


@pytest.mark.parametrize("error", [2e-5, float("nan")])
def test_a_file_of_other_answers_is_not_written(
    make_classifier: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    path = tmp_path / "network.onnx"
    path.write_text("before")

    def forward(self: Any, images: torch.Tensor) -> torch.Tensor:
        probabilities = self._classifier.probabilities(images.permute(0, 3, 1, 2))
        return probabilities + torch.tensor([error, 0.0])

    monkeypatch.setattr(exporting._FromPixels, "forward", forward)
    with pytest.raises(RunFailed, match=r"network\.onnx: not written: its probabilities differ"):
        export(make_classifier(), str(path))
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_and_nothing_is_written_unchecked(
    make_classifier: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    found = exporting.importlib.util.find_spec
    monkeypatch.setattr(
        exporting.importlib.util, "find_spec", lambda name: None if name == missing else found(name)
    )
    with pytest.raises(UserError, match=rf"needs {missing}: pip install {missing}$"):
        export(make_classifier(), str(tmp_path / "n.onnx"))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(make_classifier: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        export(make_classifier(), str(tmp_path))


def test_the_command_exports_a_model_file_and_reports_to_nobody(
    make_classifier: Any, tmp_path: Path
) -> None:
    make_classifier().save(tmp_path / "m.safetensors")
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [Path(sys.executable).with_name("cnnpipe"), "export", "n.onnx", "--model", "m.safetensors"],
        cwd=tmp_path,
        # Where ONNX Runtime would keep the number of this machine, and what it has not sent yet.
        env={**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home), "TMPDIR": str(home)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("n.onnx: images (N, 8, 8, 3) uint8")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    assert list(home.rglob("*")) == []
