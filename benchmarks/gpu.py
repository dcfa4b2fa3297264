"""Training images on a GPU: plain PyTorch, and cnnpipe by precision, residency, compile.

`python -m benchmarks.gpu` on a machine with an NVIDIA GPU; more than 5 minutes, with a table after
each. `--device cpu` runs a few tiny images through the same code, to see that it works.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import Row, faster, in_turn, report
from cnnpipe.data.decode import MAX_PIXELS
from cnnpipe.data.store import Images, Shard, shard_writer
from cnnpipe.network import build
from cnnpipe.network.classifier import Classifier, Preparation
from cnnpipe.params import Model, Train
from cnnpipe.training.batches import Batches
from cnnpipe.training.loop import autocast, fit, keep_freed_memory

NETWORKS = {
    "article": Model(),
    "residual": Model(architecture="residual", filters=16, blocks=4),
    "wide residual": Model(architecture="residual", filters=64, blocks=4),
}


@dataclass(frozen=True)
class Job:
    """A network, and what it is fed."""

    network: str
    size: int
    batch_size: int
    num_batches: int
    device: torch.device

    @property
    def num_images(self) -> int:
        """An epoch's."""
        return self.batch_size * self.num_batches

    def build(self) -> nn.Module:
        """The network, on the device."""
        torch.manual_seed(0)
        return build(NETWORKS[self.network], (3, self.size, self.size), 2).to(self.device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def random_store(job: Job) -> Iterator[Images]:
    """A store of noise."""
    rng = np.random.default_rng(0)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        with shard_writer(path) as append:
            for _ in range(job.num_images):
                append(rng.integers(0, 256, (job.size, job.size, 3), np.uint8))
        mapped = np.load(path, mmap_mode="r")
        with path.open("rb", buffering=0) as file:
            yield Images([Shard(file, mapped.offset, mapped.shape)])


class Arrays(Dataset):
    """The images as most people hand them to a DataLoader: NCHW float32."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.images[i]).permute(2, 0, 1).float() / 255, i % 2


def plain(job: Job, images: Images) -> Callable[[], None]:
    """An epoch of plain PyTorch with a DataLoader of 8 workers."""
    network = job.build()
    optimizer = torch.optim.AdamW(network.parameters())
    loader = DataLoader(
        Arrays(images), job.batch_size, shuffle=True, num_workers=8, persistent_workers=True
    )

    def epoch() -> None:
        network.train()
        for batch, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(network(batch.to(job.device)), labels.to(job.device))
            loss.backward()
            optimizer.step()
        _synchronize(job.device)

    return epoch


def pipeline(
    job: Job, train: Batches, val: Batches, precision: str, compile: bool
) -> Callable[[], None]:
    """An epoch of the pipeline's loop."""
    classifier = _classifier(job)
    settings = Train.model_validate(
        {"epochs": 1, "optimizer": "adamw", "precision": precision, "compile": compile}
    )

    def epoch() -> None:
        fit(classifier, train, val, settings, None, 0, job.device, lambda _: None)
        _synchronize(job.device)

    return epoch


def bare(job: Job, train: Batches, precision: str) -> Callable[[], None]:
    """As many bare steps on a batch that is on the device."""
    classifier = _classifier(job)
    network, settings = classifier.network, Train.model_validate({"precision": precision})
    batch, targets = next(train.in_order())
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)

    def epoch() -> None:
        network.train()
        for _ in range(job.num_batches):
            with autocast(settings, classifier.model, job.device):
                logits = classifier.class_logits(classifier.preparation.normalise(batch))
            optimizer.zero_grad()
            F.cross_entropy(logits, targets).backward()
            optimizer.step()
        _synchronize(job.device)

    return epoch


def _classifier(job: Job) -> Classifier:
    network = job.build().to(memory_format=torch.channels_last)
    prepared = Preparation(job.size, "stretch", "rgb", (128.0,) * 3, (74.0,) * 3, MAX_PIXELS)
    return Classifier(network, NETWORKS[job.network], prepared, ("cat", "dog"))


def compare(job: Job, rounds: int, with_compile: bool) -> list[Row]:
    """The rows of one job."""
    what = f"{job.network}, {job.size} px, batches of {job.batch_size}"
    torch.compiler.reset()  # or after a few networks it would give up and compile no more
    rows, labels = np.arange(job.num_images), np.arange(job.num_images) % 2
    with random_store(job) as images:
        train, val = (
            {
                resident: Batches(
                    images, rows[:count], labels[:count], job.batch_size, job.device, resident
                )
                for resident in (True, False)
            }
            for count in (job.num_images, 2)
        )
        cases = {"plain": plain(job, images)}
        variants = itertools.product(
            ("float32", "bfloat16"), (False, True) if with_compile else (False,), (True, False)
        )
        for precision, compile, resident in variants:
            name = f"{precision}{' compiled' * compile} {'resident' if resident else 'streamed'}"
            cases[name] = pipeline(job, train[resident], val[resident], precision, compile)
        for precision in ("float32", "bfloat16"):
            cases[f"{precision} bare"] = bare(job, train[False], precision)
        seconds = {
            name: value / job.num_images * 1e6 for name, value in in_turn(cases, rounds).items()
        }
    compared = []
    for name, ours in seconds.items():
        if name == "plain" or name.endswith("bare"):
            continue
        wanted = 5 if job.network == "residual" else 1
        compared.append(
            faster(f"{what}, {name}", "plain PyTorch", seconds["plain"], ours, "us/image", wanted)
        )
        if "compiled" not in name:
            step = seconds[f"{name.split()[0]} bare"]
            share = 0.95 if name.endswith("resident") else 0.9
            compared.append(faster(f"{what}, {name}", "bare step", step, ours, "us/image", share))
    return compared


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = torch.device(parser.parse_args().device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "there is no usable GPU here; --device cpu tries the script out\n")
    keep_freed_memory()
    if device.type == "cuda":
        jobs = [
            Job("article", 300, 128, 64, device), Job("article", 300, 1024, 8, device),
            Job("residual", 96, 128, 128, device), Job("residual", 224, 128, 64, device),
            Job("wide residual", 96, 128, 128, device),
        ]  # fmt: skip
    else:
        jobs = [Job("article", 32, 8, 2, device), Job("residual", 32, 8, 2, device)]
    rounds, with_compile = (3, True) if device.type == "cuda" else (1, False)
    for job in jobs:  # a report each: whoever stops it keeps what it has
        name = f"gpu_{device.type}_{job.network}_{job.size}_{job.batch_size}".replace(" ", "_")
        report(name, compare(job, rounds, with_compile), ["torch"])


if __name__ == "__main__":
    main()
