"""Tests of training on a GPU: what a CPU cannot show. Left out where there is none."""

import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stored import stored
from torch import Tensor

from cnnpipe.data.store import Images
from cnnpipe.errors import RunFailed
from cnnpipe.network.classifier import Classifier
from cnnpipe.params import Model, Train
from cnnpipe.training import loop
from cnnpipe.training.batches import Batches
from cnnpipe.training.checkpoint import Checkpoints, unpacked
from cnnpipe.training.loop import (
    Epoch,
    autocast,
    choose_device,
    choose_residency,
    fit,
    judge,
    predict,
    seed_generators,
    step_seed,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def images_of(count: int, size: int) -> tuple[Images, np.ndarray]:
    """Two classes: brighter on the left, or on the right, under noise; and their labels."""
    chance = np.random.default_rng(0)
    labels = (np.arange(count) % 2).astype(np.int64)
    pixels = chance.integers(0, 200, (count, size, size, 3), dtype=np.uint8)
    pixels[labels == 0, :, : size // 2] += 55
    pixels[labels == 1, :, size // 2 :] += 55
    return stored(pixels), labels


def halves(
    count: int = 48, size: int = 8, batch_size: int = 16, resident: bool = True
) -> tuple[Batches, Batches]:
    """The first two thirds to train on, the rest to validate."""
    images, labels = images_of(count, size)
    rows, cut = np.arange(count), count * 2 // 3
    train, val = (
        Batches(images, rows[part], labels[part], batch_size, GPU, resident)
        for part in (slice(cut), slice(cut, None))
    )
    return train, val


def trained(
    classifier: Classifier,
    train: Batches,
    val: Batches,
    checkpoints: Checkpoints | None = None,
    **settings: Any,
) -> list[Epoch]:
    classifier.network.to(GPU)
    chosen = Train.model_validate({"epochs": 3, **settings})
    return fit(classifier, train, val, chosen, None, 7, GPU, lambda _: None, checkpoints)


def weights(classifier: Classifier) -> Tensor:
    return torch.cat([t.flatten().double() for t in classifier.network.state_dict().values()])


def losses(history: list[Epoch]) -> list[tuple[float, float]]:
    return [(epoch.train_loss, epoch.val_loss) for epoch in history]


@pytest.fixture
def repeatable() -> Iterator[None]:
    """cuDNN's algorithms that add in one order."""
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = False


def test_auto_is_the_gpu_with_the_images_that_fit_on_it() -> None:
    assert choose_device("auto").type == "cuda"
    assert choose_residency(Train(), 1, GPU)
    assert not choose_residency(Train(), 1 << 60, GPU)


@pytest.mark.parametrize(
    ("precision", "filters", "dtype"),
    [
        ("auto", 10, torch.float32),
        ("auto", 64, torch.bfloat16),
        ("float32", 64, torch.float32),
        ("bfloat16", 10, torch.bfloat16),
    ],
)
def test_auto_is_bfloat16_for_wide_networks(
    precision: str, filters: int, dtype: torch.dtype
) -> None:
    matrix = torch.ones(2, 2, device=GPU)
    with autocast(Train.model_validate({"precision": precision}), Model(filters=filters), GPU):
        assert (matrix @ matrix).dtype == dtype


def test_a_steps_seed_is_that_of_all_that_draws() -> None:
    def drawn() -> tuple[float, float]:
        return torch.rand(1).item(), torch.rand(1, device=GPU).item()

    seed = step_seed(1, 2, 3)
    torch.manual_seed(seed)
    expected = drawn()
    assert drawn() != expected
    seed_generators(GPU, seed)
    assert drawn() == expected


@pytest.mark.parametrize("resident", [True, False])
def test_every_batch_is_the_stored_one_while_the_gpu_computes(resident: bool) -> None:
    images, labels = images_of(700, 64)
    rows = np.random.default_rng(1).permutation(700)
    of = Batches(images, rows, labels[rows], 16, GPU, resident)
    expected = Batches(images, rows, labels[rows], 16, CPU)
    busy = torch.ones(4096, 4096, device=GPU)
    for epoch in range(2):
        found = []
        for batch, targets in of.shuffled(3, epoch):
            busy = busy @ busy / 4096  # what a copy that nobody waits for would be late behind
            found.append((batch.clone(), targets.clone()))
        assert len(found) == 44
        for (batch, targets), (image, label) in zip(
            found, expected.shuffled(3, epoch), strict=True
        ):
            assert torch.equal(batch.cpu(), image)
            assert torch.equal(targets.cpu(), label)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["article", "residual"])
def test_it_learns(make_classifier: Any, architecture: str, precision: str) -> None:
    train, val = halves(96)
    classifier = make_classifier(architecture=architecture)
    history = trained(
        classifier, train, val, epochs=20, learning_rate=0.01, precision=precision, augment="none"
    )
    assert max(epoch.val_accuracy for epoch in history) >= 0.9
    best = max(history, key=lambda epoch: epoch.score)
    assert judge(classifier, val) == pytest.approx((best.val_loss, best.val_accuracy), rel=1e-5)


def test_where_the_images_lie_does_not_change_the_run(
    make_classifier: Any, repeatable: None
) -> None:
    runs = []
    for resident in (False, True):
        classifier = make_classifier(architecture="residual", dropout=0.5)
        history = trained(classifier, *halves(resident=resident), augment="photo")
        runs.append((losses(history), weights(classifier)))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


def test_no_step_waits_for_the_gpu(make_classifier: Any) -> None:
    def waits(count: int) -> Counter[str]:
        images, labels = images_of(count, 8)
        train = Batches(images, np.arange(count), labels, 16, GPU, resident=True)
        val = Batches(images, np.arange(16), labels[:16], 16, GPU, resident=True)
        classifier = make_classifier(architecture="residual", dropout=0.5)
        trained(classifier, train, val, augment="photo")  # what is done once is done
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                trained(classifier, train, val, augment="photo", label_smoothing=0.1)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return Counter(
            f"{Path(one.filename).name}:{one.lineno}"
            for one in caught
            if "called a synchronizing CUDA operation" in str(one.message)
        )

    few = waits(32)
    assert few and waits(160) == few


@pytest.mark.parametrize(
    ("architecture", "optimizer"), [("article", "adam"), ("residual", "adamw"), ("deep", "sgd")]
)
def test_a_training_that_was_stopped_goes_on_to_the_same_weights_and_history(
    make_classifier: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    repeatable: None,
    architecture: str,
    optimizer: str,
) -> None:
    monkeypatch.setattr(loop, "_SAVED_EVERY_S", 0)  # after every step

    def run(stop_at: int | None, checkpoints: Checkpoints | None) -> tuple[Any, Tensor]:
        classifier = make_classifier(architecture=architecture, dropout=0.3)
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise KeyboardInterrupt

        classifier.network.register_forward_pre_hook(count)
        history = trained(
            classifier, *halves(), checkpoints,
            optimizer=optimizer, augment="photo", schedule="one-cycle",
        )  # fmt: skip
        return losses(history), weights(classifier)

    expected, expected_weights = run(None, None)
    for stop_at in (2, 3, 5, 9):
        with pytest.raises(KeyboardInterrupt):
            run(stop_at, Checkpoints(tmp_path / str(stop_at)))
        history, found = run(None, Checkpoints(tmp_path / str(stop_at)))
        assert history == expected
        assert torch.equal(found, expected_weights)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """80 MB of the GPU's memory, besides what is taken already."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (80 << 20)) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_out_of_memory_the_parts_halve_and_the_batch_stays(
    make_classifier: Any, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> tuple[list[Epoch], Tensor]:
        classifier = make_classifier(size=64)
        history = trained(classifier, *halves(768, 64, 256, resident=False), precision="float32")
        return history, weights(classifier).cpu()

    expected, expected_weights = run()
    assert "out of memory" not in capsys.readouterr().err
    request.getfixturevalue("little_memory")
    history, found = run()
    assert "cuda is out of memory with 256 images at a time" in capsys.readouterr().err
    np.testing.assert_allclose(losses(history), losses(expected), rtol=1e-2)
    torch.testing.assert_close(found, expected_weights, rtol=1e-2, atol=1e-3)


def test_memory_for_not_even_an_image_ends_the_run(
    make_classifier: Any, little_memory: None
) -> None:
    with pytest.raises(RunFailed, match="memory of cuda does not suffice for 1 images"):
        trained(make_classifier(size=1024), *halves(6, 1024, 2, resident=False))


def test_the_last_good_checkpoint_outlives_a_loss_that_is_not_finite(
    make_classifier: Any, tmp_path: Path
) -> None:
    with pytest.raises(RunFailed, match="the loss is"):
        trained(make_classifier(), *halves(), Checkpoints(tmp_path),
                optimizer="sgd", learning_rate=1e38)  # fmt: skip
    kept = unpacked(Checkpoints(tmp_path).last)[0]
    assert kept and all(torch.isfinite(value).all() for value in kept.values())


@pytest.mark.parametrize("architecture", ["article", "residual"])
def test_a_model_trained_on_a_gpu_predicts_the_same_on_a_cpu(
    make_classifier: Any, tmp_path: Path, architecture: str
) -> None:
    train, val = halves(96, 32)
    classifier = make_classifier(size=32, architecture=architecture)
    trained(classifier, train, val)
    classifier.save(tmp_path / "m.safetensors")
    on_gpu = predict(Classifier.load(tmp_path / "m.safetensors", "cuda"), val)
    np.testing.assert_array_equal(on_gpu, predict(classifier, val))
    on_cpu = Batches(val.images, val.rows, val.labels, 16, CPU)
    loaded = predict(Classifier.load(tmp_path / "m.safetensors"), on_cpu)
    np.testing.assert_allclose(on_gpu, loaded, atol=5e-3)


def test_a_compiled_network_learns_the_same(make_classifier: Any) -> None:
    eager, compiled = (
        losses(trained(make_classifier(), *halves(), precision="float32", compile=compile))
        for compile in (False, True)
    )
    np.testing.assert_allclose(eager, compiled, rtol=1e-2)
