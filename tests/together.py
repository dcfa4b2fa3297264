"""Trainings that a test computes alone and several processes compute together, case by case.

`python tests/together.py FOLDER` is one of the processes: torchrun's variables say which.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from stored import stored
from torch import Tensor

from cnnpipe.network.classifier import Classifier, Preparation
from cnnpipe.network.model import build
from cnnpipe.params import Model, Train
from cnnpipe.training import loop
from cnnpipe.training.batches import Batches, channel_statistics
from cnnpipe.training.checkpoint import Checkpoints
from cnnpipe.training.distributed import ProcessGroup, joined
from cnnpipe.training.loop import fit

CPU = torch.device("cpu")
WEIGHTS = torch.tensor([0.5, 1.0, 3.0])

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Tensor | None]] = {
    "article, in parts": (
        {"kernel_size": 3, "dropout": 0.4},
        {"augment": "flip", "learning_rate": 0.01, "label_smoothing": 0.1},
        WEIGHTS,
    ),
    "residual": (
        {"architecture": "residual", "filters": 4, "blocks": 2, "dropout": 0.3},
        {"augment": "photo", "optimizer": "sgd", "learning_rate": 0.02, "schedule": "one-cycle"},
        None,
    ),
    "batches smaller than the group": (
        {"architecture": "deep", "filters": 4, "kernel_size": 3, "batch_norm": True},
        {"augment": "crop", "optimizer": "sgd", "batch_size": 2, "epochs": 1},
        WEIGHTS,
    ),
}


def trained(
    case: str, group: ProcessGroup, checkpoints: Checkpoints | None = None, **changed: Any
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The weights and the history of a case.

    Args:
        case: its name.
        group: the processes.
        checkpoints: of the training.
        changed: settings of `train` that are other than the case's.
    """
    loop._PART_BYTES = 4096  # a few images of the article's network
    model_settings, train_settings, class_weights = CASES[case]
    model = Model(**model_settings)
    settings = Train(**{"epochs": 3, "batch_size": 13, **train_settings, **changed})
    chance = np.random.default_rng(0)
    labels = (np.arange(44) % 3).astype(np.int64)
    pixels = np.clip(
        chance.normal(110 + 20 * labels[:, None, None, None], 60, (44, 8, 8, 3)), 0, 255
    )
    images = stored(pixels.astype(np.uint8))
    rows = np.arange(44)
    torch.manual_seed(0)
    network = build(model, (3, 8, 8), 3).to(memory_format=torch.channels_last)
    mean, std = channel_statistics(images, rows[:33], group)
    prepared = Preparation(8, "stretch", "rgb", mean, std, 100)
    classifier = Classifier(network, model, prepared, ("a", "b", "c"))
    own = rows[33:][group.share(11)]
    train = Batches(images, rows[:33], labels[:33], settings.batch_size, CPU, group=group)
    val = Batches(images, own, labels[own], settings.batch_size, CPU)
    told: list[Any] = []
    history = fit(
        classifier, train, val, settings, class_weights, 7, CPU, told.append, checkpoints, group
    )
    assert told == history
    return network.state_dict(), [{**asdict(epoch), "seconds": 0} for epoch in history]


def main(folder: Path) -> None:
    """All cases; each process leaves its weights and histories."""
    torch.set_num_threads(1)
    with joined(CPU) as group:
        for number, case in enumerate(CASES):
            weights, history = trained(case, group)
            numbers = [list(map(float, epoch.values())) for epoch in history]
            weights = {name: value.contiguous() for name, value in weights.items()}
            weights["history"] = torch.tensor(numbers, dtype=torch.float64)
            safetensors.torch.save_file(weights, folder / f"{number}-{group.rank}.safetensors")
        # What one process alone has begun, several go on with.
        first = Checkpoints(folder / "checkpoints") if group.rank == 0 else None
        weights, _ = trained("residual", group, first)
        weights = {name: value.contiguous() for name, value in weights.items()}
        safetensors.torch.save_file(weights, folder / f"resumed-{group.rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
