"""Training images a second: the tutorial's Keras code, plain PyTorch, cnnpipe.

Without arguments it compares. With a case, an architecture and a workspace it trains that case: an
epoch to warm up and then one that counts, in a process of its own.
"""

import math
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.harness import (
    CNNPIPE,
    alone,
    command,
    faster,
    in_turn,
    medians,
    needs,
    photos,
    report,
    workspace,
)

ARTICLE, RESIDUAL = 384, 512
"""Photos to train on."""
SETTINGS: dict[str, dict[str, object]] = {"article": {}}
for _name, _settings in {
    "residual": {"train__augment": "flip", "train__batch_size": 128},
    "residual, batches of 32": {"train__augment": "flip"},
    # As the README advises for photos: random crops scaled to 64 pixels, and colours.
    "residual, crops": {"train__augment": "photo", "train__crop_size": 64},
}.items():
    SETTINGS[_name] = {
        "resize__size": 96,
        "model__architecture": "residual",
        "model__filters": 16,
        "model__blocks": 4,
        "train__batch_size": 32,
        "train__optimizer": "adamw",
        **_settings,
    }


def seconds_an_epoch(epoch: Callable[[], object]) -> float:
    """The second of two epochs; the first warms up."""
    epoch()
    started = time.perf_counter()
    epoch()
    return time.perf_counter() - started


def keras() -> float:
    """The tutorial's network and call of fit, on one float array."""
    from benchmarks import tutorial
    from cnnpipe.data.store import open_images

    images, table = open_images("data/resized")
    features = images[np.arange(ARTICLE)].astype("float32") / 255
    targets = np.eye(2)[(table["label"] == "dog")[:ARTICLE].astype(int)]
    model = tutorial.model()
    return seconds_an_epoch(lambda: model.fit(features, targets, batch_size=128, verbose=0))


def plain(architecture: str) -> float:
    """PyTorch as most people write it: NCHW float32, ReLU before pooling, a DataLoader."""
    import torch
    from PIL import Image, ImageEnhance
    from torch import nn
    from torch.utils.data import DataLoader, Dataset

    from cnnpipe.data.store import open_images
    from cnnpipe.network import build
    from cnnpipe.params import load

    class Arrays(Dataset):
        """The article's: the resized arrays that all cases start from."""

        def __init__(self) -> None:
            self.images, table = open_images("data/resized")
            self.labels = (table["label"] == "dog").to_numpy()

        def __len__(self) -> int:
            return ARTICLE

        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            image = torch.from_numpy(self.images[i]).permute(2, 0, 1)
            return image.float() / 255, int(self.labels[i])

    class Photos(Dataset):
        """The residual network's: the photos, by Pillow; the augmentations as torchvision's."""

        def __init__(self) -> None:
            paths = sorted(Path("inbox").rglob("*.jpg"))
            self.paths = paths[:: len(paths) // RESIDUAL][:RESIDUAL]

        def __len__(self) -> int:
            return RESIDUAL

        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            photo = Image.open(self.paths[i]).convert("RGB")
            if crop is None:
                photo = photo.resize((96, 96))
            else:
                area, aspect = random.uniform(0.35, 1), math.exp(random.uniform(-0.28, 0.28))
                width = min(1, math.sqrt(area * aspect)) * photo.width
                height = min(1, math.sqrt(area / aspect)) * photo.height
                left = random.uniform(0, photo.width - width)
                top = random.uniform(0, photo.height - height)
                box = (left, top, left + width, top + height)
                photo = photo.resize((crop, crop), box=box)
                for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                    photo = kind(photo).enhance(random.uniform(0.7, 1.3))
            image = torch.from_numpy(np.array(photo)).permute(2, 0, 1).float() / 255
            if torch.rand(1) < 0.5:
                image = image.flip(2)
            return (image - 0.5) / 0.25, int(self.paths[i].parent.name == "dog")

    params = load("params.yaml")
    crop = params.train.crop_size
    if architecture == "article":
        network: nn.Module = nn.Sequential(
            nn.Conv2d(3, 10, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(219_040, 2)
        )
        optimizer: torch.optim.Optimizer = torch.optim.Adam(network.parameters())
        loader = DataLoader(Arrays(), 128, shuffle=True, num_workers=2)
    else:
        network = build(params.model, (3, 96, 96), 2)
        optimizer = torch.optim.AdamW(network.parameters())
        loader = DataLoader(Photos(), params.train.batch_size, shuffle=True, num_workers=2)
    criterion = nn.CrossEntropyLoss()

    def epoch() -> None:
        network.train()
        for images, labels in loader:
            optimizer.zero_grad()
            loss = criterion(network(images), labels)
            loss.backward()
            optimizer.step()

    return seconds_an_epoch(epoch)


def cnnpipe(place: Path) -> tuple[int, Callable[[], object], Callable[[], object]]:
    """The images of an epoch; one of the pipeline's own loop; one of its bare step.

    The bare step has a batch that is in memory already.
    """
    import torch
    import torch.nn.functional as F

    from cnnpipe.data.decode import MAX_PIXELS
    from cnnpipe.data.store import open_images
    from cnnpipe.network import build
    from cnnpipe.network.classifier import Classifier, Preparation
    from cnnpipe.params import load
    from cnnpipe.training.augment import augment, draw
    from cnnpipe.training.batches import Batches
    from cnnpipe.training.loop import fit, has_batch_norm, keep_freed_memory, part_of_batch

    params = load(place / "params.yaml")
    device = torch.device("cpu")
    images, table = open_images(place / "data/resized")
    labels = (table["label"] == "dog").to_numpy().astype(np.int64)
    size, batch_size = params.resize.size, params.train.batch_size
    rows = np.arange(RESIDUAL)
    if params.model.architecture == "article":  # the photos several times, for more than 3 steps
        rows = np.arange(1024) % ARTICLE
    network = build(params.model, params.input_shape, 2).to(memory_format=torch.channels_last)
    keep_freed_memory(whole_batches=has_batch_norm(network))
    prepared = Preparation(
        size, "stretch", "rgb", (124.0, 116.0, 106.0), (64.0, 62.0, 63.0), MAX_PIXELS
    )
    classifier = Classifier(network, params.model, prepared, ("cat", "dog"))
    train = Batches(images, rows, labels[rows], batch_size, device)
    val = Batches(images, rows[:2], labels[:2], batch_size, device)
    settings = params.train.model_copy(update={"epochs": 1})
    batch, targets = next(train.shuffled(0, 0))
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    part_size = batch_size if has_batch_norm(network) else part_of_batch(classifier, device)

    def bare() -> None:
        network.train()
        for _ in range(train.num_steps):
            optimizer.zero_grad()
            for part, labels in zip(batch.split(part_size), targets.split(part_size), strict=True):
                changes = draw(settings.augment, len(part), device)
                inputs = augment(part, changes, settings.crop_size)
                logits = classifier.class_logits(prepared.normalise(inputs))
                (F.cross_entropy(logits, labels, reduction="sum") / batch_size).backward()
            optimizer.step()

    def loop() -> None:
        fit(classifier, train, val, settings, None, 0, device, lambda _: None)

    return len(rows), loop, bare


def measure(case: str, architecture: str, folder: str) -> float:
    """Milliseconds an image of one case."""
    os.chdir(folder)
    count = ARTICLE if architecture == "article" else RESIDUAL
    if case == "keras":
        seconds = keras()
    elif case == "plain":
        seconds = plain(architecture)
    else:
        count, loop, _ = cnnpipe(Path())
        seconds = seconds_an_epoch(loop)
    return seconds / count * 1e3


def main() -> None:
    """Runs the benchmark."""
    rows = []
    with photos(RESIDUAL) as images, TemporaryDirectory() as folder:
        for architecture, settings in SETTINGS.items():
            count = ARTICLE if architecture == "article" else RESIDUAL
            place = Path(folder) / architecture
            place.mkdir()
            workspace(place, images, count, **settings)
            command([CNNPIPE, "resize"], place)()
            peers = {"plain": "plain PyTorch"}
            if architecture == "article" and needs("tensorflow-cpu"):
                peers["keras"] = "Keras on TensorFlow"
            taken = medians(
                {
                    name: alone("benchmarks.training", name, architecture, str(place))
                    for name in ("cnnpipe", *peers)
                },
                rounds=2,
            )
            wanted = {"plain": 2.5 if architecture == "article" else 2, "keras": 1.5}
            what = f"{architecture}, training an image"
            rows += [
                faster(what, peer, taken[name], taken["cnnpipe"], "ms", wanted[name])
                for name, peer in peers.items()
            ]
            num_images, loop, bare = cnnpipe(place)
            same = {
                name: seconds / num_images * 1e3
                for name, seconds in in_turn({"loop": loop, "bare": bare}, rounds=4).items()
            }
            rows.append(faster(what, "bare step", same["bare"], same["loop"], "ms", 0.95))
    report("training", rows, ["torch", "numpy", "pillow"])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(measure(*sys.argv[1:]))
    else:
        main()
