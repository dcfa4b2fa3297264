"""The training loop: plain PyTorch, and every random choice a function of (seed, epoch, step)."""

import copy
import ctypes
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from cnnpipe.errors import RunFailed
from cnnpipe.network.architectures import layers_of
from cnnpipe.network.classifier import Classifier
from cnnpipe.network.geometry import shapes
from cnnpipe.network.layers import Dropout
from cnnpipe.params import Model, Train
from cnnpipe.processes import place
from cnnpipe.training.augment import augment, draw
from cnnpipe.training.batches import Batches
from cnnpipe.training.checkpoint import Checkpoints, unpacked
from cnnpipe.training.distributed import ALONE, ProcessGroup, batch_norm_of_whole_batches
from cnnpipe.workspace import signals_held

_Result = TypeVar("_Result")

_PART_BYTES = 32 << 20
"""Of the largest feature map of the images that a CPU computes at a time: as much as glibc can be
told to keep without keeping everything, and as the last cache of a server holds."""

_SAVED_EVERY_S = 30
"""Within an epoch; at most so much is trained again after a kill."""


@dataclass(frozen=True)
class Epoch:
    """One row of the history."""

    epoch: int
    """From 1."""
    train_loss: float
    """Over the epoch's steps, as optimised: augmented, smoothed, weighted, and still learning."""
    train_accuracy: float
    val_loss: float
    """Plain cross-entropy, in nats, as log_loss in the evaluation."""
    val_accuracy: float
    learning_rate: float
    """At the epoch's last step."""
    seconds: float

    @property
    def score(self) -> tuple[float, float]:
        """What the best checkpoint is chosen by: accuracy, and among equals the smaller loss."""
        return self.val_accuracy, -self.val_loss


@dataclass
class Progress:
    """Where a training stands, between two steps."""

    epoch: int = 1
    """The one that is being trained."""
    step: int = 0
    """The steps of it that are done."""
    sums: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    """Of the losses and the hits in these."""
    seconds: float = 0.0
    """That these took."""
    history: list[Epoch] = field(default_factory=list)
    best_weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def best(self) -> Epoch | None:
        """The epoch that is to be kept, so far."""
        return max(self.history, key=lambda epoch: epoch.score, default=None)

    def is_over(self, settings: Train) -> bool:
        """Whether all epochs are trained, or patience has ended."""
        waited = self.epoch - 1 - self.best.epoch if self.best else 0
        return self.epoch > settings.epochs or 0 < (settings.patience or 0) <= waited


def fit(
    classifier: Classifier,
    train: Batches,
    val: Batches,
    settings: Train,
    class_weights: Tensor | None,
    seed: int,
    device: torch.device,
    on_epoch: Callable[[Epoch], None],
    checkpoints: Checkpoints | None = None,
    group: ProcessGroup = ALONE,
) -> list[Epoch]:
    """Trains the classifier's network in place; it ends with the weights of its best epoch.

    Args:
        classifier: its network on the device.
        train: the batches to learn from.
        val: the batches that choose the checkpoint.
        settings: the `train` section of params.yaml.
        class_weights: (classes,) float32 on the device, or None.
        seed: of all that is random.
        device: where the network is.
        on_epoch: called with each epoch as it ends; with those before a resumption, first.
        checkpoints: where it goes on from, and where it leaves its own: at every epoch's end, every
            half a minute, and when it is interrupted. Of several processes the first has them.
        group: the processes that train together, each with its share of `train` and of `val`.

    Raises:
        ProcessLost: one of the group is gone.
        RunFailed: the loss is not finite, the network cannot be compiled here, or the memory of the
            device does not suffice for an image. Where it suffices for fewer than a batch, that is
            computed in parts; the statistics of batch normalisation are then of these.
    """
    network = classifier.network
    optimizer = _optimizer(network, settings)
    class_logits = _compiled(classifier, device) if settings.compile else classifier.class_logits
    total_steps = settings.epochs * train.num_steps
    dropouts = [module for module in network.modules() if isinstance(module, Dropout)]
    # The statistics of batch normalisation are a batch's, as long as it fits.
    whole_batches = has_batch_norm(network)
    part_size = sys.maxsize if whole_batches else part_of_batch(classifier, device)
    # With batch normalisation two images, and all of a share where the others wait for its sums.
    least = 1 if not whole_batches else 2 if group.size == 1 else sys.maxsize
    progress = _resumed(checkpoints, network, optimizer, group)
    done = (progress.epoch - 1) * train.num_steps + progress.step
    for row in progress.history:
        on_epoch(row)

    def save() -> None:
        # On a GPU the loss is looked at once an epoch; the last good checkpoint is to stay.
        if checkpoints is not None and math.isfinite(progress.sums[0]):
            _save(checkpoints, network, optimizer, progress)

    def take_step(images: Tensor, labels: Tensor) -> Tensor:
        """Its loss, summed over the images, and its hits: (2,) float64 on the device."""
        nonlocal part_size
        # The mean over the batch, weighted: the sum of its parts' sums by this. Not tried again,
        # since the others sum it once.
        total = torch.tensor(train.num_images(progress.step))
        if class_weights is not None:
            total = class_weights[labels].sum()
            group.sum(total)
        taken, part_size = _as_memory_allows(
            lambda size: try_step(images, labels, total, size),
            part_size, len(labels), least, device,
        )  # fmt: skip
        return taken

    def try_step(images: Tensor, labels: Tensor, total: Tensor, part_size: int) -> Tensor:
        epoch, step = progress.epoch, progress.step
        rate = learning_rate(settings, (epoch - 1) * train.num_steps + step, total_steps)
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate
        seed_generators(device, step_seed(seed, epoch, step))
        optimizer.zero_grad(set_to_none=True)
        num_images = train.num_images(step)
        own = group.share(num_images)
        changes = draw(settings.augment, num_images, device)[own]
        kept = [dropout.draw(num_images, device)[own] for dropout in dropouts]
        sums = torch.zeros(2, device=device, dtype=torch.float64)
        for start in range(0, max(1, len(labels)), part_size):
            part = slice(start, start + part_size)
            for dropout, values in zip(dropouts, kept, strict=True):
                dropout.kept = values[part]
            inputs = augment(images[part], changes[part], settings.crop_size)
            with autocast(settings, classifier.model, device):
                logits = class_logits(classifier.preparation.normalise(inputs))
            part_loss = F.cross_entropy(
                logits, labels[part], class_weights, reduction="sum",
                label_smoothing=settings.label_smoothing,
            ) / total  # fmt: skip
            part_loss.backward()  # type: ignore[no-untyped-call]
            hits = (logits.detach().argmax(1) == labels[part]).sum()
            sums += torch.stack([part_loss.detach() * num_images, hits])
        group.sum(sums)
        group.sum(*(p.grad for p in network.parameters() if p.grad is not None))
        if device.type == "cpu":  # elsewhere reading the loss would wait for the device
            _check_finite(sums[0].item() / num_images, epoch, step, rate)
        optimizer.step()
        return sums

    def train_epoch() -> None:
        started = time.perf_counter() - progress.seconds
        saved = time.monotonic()
        network.train()
        # Summed on the device and read once an epoch: reading waits for the device.
        progress.sums = progress.sums.to(device)
        for images, labels in train.shuffled(seed, progress.epoch, progress.step):
            with signals_held():  # a step is taken and counted, or neither
                progress.sums += take_step(images, labels)
                progress.step += 1
                progress.seconds = time.perf_counter() - started
                if time.monotonic() - saved >= _SAVED_EVERY_S:
                    save()
                    saved = time.monotonic()
            bar.update()
        rate = learning_rate(settings, progress.epoch * train.num_steps - 1, total_steps)
        train_loss, train_accuracy = (progress.sums / len(train.rows)).tolist()
        _check_finite(train_loss, progress.epoch, train.num_steps - 1, rate)
        val_loss, val_accuracy = judge(classifier, val, part_size, group)
        # The last step's loss is from before it, and cannot show what it ruined.
        _check_finite(val_loss, progress.epoch, train.num_steps - 1, rate)
        row = Epoch(
            progress.epoch, train_loss, train_accuracy, val_loss, val_accuracy, rate,
            time.perf_counter() - started,
        )  # fmt: skip
        with signals_held():
            if progress.best is None or row.score > progress.best.score:
                progress.best_weights = copy.deepcopy(network.state_dict())
            progress.history.append(row)
            progress.epoch, progress.step, progress.seconds = progress.epoch + 1, 0, 0.0
            progress.sums = torch.zeros_like(progress.sums)
            save()
        bar.set_postfix_str(f"val accuracy {val_accuracy:.3f}")
        on_epoch(row)

    silent = True if group.rank else None  # None: where stderr is no terminal
    with (
        batch_norm_of_whole_batches(network, group),
        tqdm(total=total_steps, initial=done, desc="training", unit="step", disable=silent) as bar,
    ):
        try:
            save()  # so that from now on it is known whose run this is
            while not progress.is_over(settings):
                train_epoch()
        except KeyboardInterrupt:
            save()
            raise
    for dropout in dropouts:
        dropout.kept = None
    network.load_state_dict(progress.best_weights)
    network.eval()
    return progress.history


def _save(
    checkpoints: Checkpoints, network: nn.Module, optimizer: torch.optim.Optimizer, at: Progress
) -> None:
    """A checkpoint of all that `_resumed` needs."""
    tensors = {f"network/{name}": value for name, value in network.state_dict().items()}
    tensors |= {f"best/{name}": value for name, value in at.best_weights.items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in values.items()}
    state = {
        **vars(at),
        "sums": at.sums.tolist(),
        "history": [asdict(epoch) for epoch in at.history],
    }
    del state["best_weights"]
    # In the one layout that the file format has.
    whole = {name: value.contiguous() for name, value in tensors.items()}
    checkpoints.save(whole, state)


def _resumed(
    checkpoints: Checkpoints | None,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: ProcessGroup,
) -> Progress:
    """Where the last checkpoint was; network and optimizer are as they were then."""
    data = group.from_first(checkpoints.last if checkpoints else b"")
    tensors, state, _ = unpacked(data)
    if not tensors:
        return Progress()
    groups: dict[str, dict[str, Tensor]] = {"network": {}, "best": {}, "optimizer": {}}
    for name, value in tensors.items():
        kind, _, rest = name.partition("/")
        groups[kind][rest] = value
    network.load_state_dict(groups["network"])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in groups["optimizer"].items():
        index, _, name = key.partition("/")
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:  # in its layout, as the fused optimizers have them
            value = torch.empty_like(parameter).copy_(value)
        moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(
        {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    return Progress(
        **{
            **state,
            "sums": torch.tensor(state["sums"], dtype=torch.float64),
            "history": [Epoch(**row) for row in state["history"]],
            "best_weights": groups["best"],
        }
    )


def judge(
    classifier: Classifier,
    batches: Batches,
    part_size: int = sys.maxsize,
    group: ProcessGroup = ALONE,
) -> tuple[float, float]:
    """The cross-entropy, in nats, and the accuracy over the batches.

    Args:
        classifier: whose.
        batches: of which images; of several processes each has its own.
        part_size: at most so many are computed at a time.
        group: the processes over whose images together the mean is.
    """
    logs = _log_probabilities(classifier, batches, part_size).numpy()
    loss = -logs[np.arange(len(batches.rows)), batches.labels].sum(dtype=np.float64)
    hits = np.count_nonzero(logs.argmax(1) == batches.labels)
    sums = torch.tensor([loss, hits, len(batches.rows)], dtype=torch.float64)
    group.sum(sums)
    loss, hits, count = sums.tolist()
    return loss / count, hits / count


def predict(classifier: Classifier, batches: Batches) -> np.ndarray:
    """The probabilities of all images of the batches, (n, classes) float32, in their order.

    Always in float32, whatever the network was trained in: validation, test and prediction agree.
    """
    return _log_probabilities(classifier, batches).exp().numpy()


def _log_probabilities(
    classifier: Classifier, batches: Batches, part_size: int = sys.maxsize
) -> Tensor:
    classifier.network.eval()
    device = batches.device
    part_size = min(part_size, part_of_batch(classifier, device))
    result = torch.empty(len(batches.rows), len(classifier.class_names))

    def fill(rows: Tensor, images: Tensor, part_size: int) -> None:
        for some, part in zip(
            torch.split(rows, part_size), torch.split(images, part_size), strict=True
        ):
            # Small tensors that stay would lie between the large ones that come and go.
            some.copy_(classifier.log_probabilities(part))

    done = 0
    with torch.inference_mode():
        for images, _ in batches.in_order():
            rows = result[done : done + len(images)]
            _, part_size = _as_memory_allows(
                partial(fill, rows, images), part_size, len(images), 1, device
            )
            done += len(images)
    return result


def _as_memory_allows(
    compute: Callable[[int], _Result],
    part_size: int,
    num_images: int,
    least: int,
    device: torch.device,
) -> tuple[_Result, int]:
    """What `compute(part_size)` returns, and part_size, halved until the memory suffices.

    Args:
        compute: it takes the number of images to compute at a time.
        part_size: that number, to begin with.
        num_images: of the whole batch.
        least: the fewest images that can be computed at a time.
        device: whose memory.

    Raises:
        RunFailed: it does not suffice for `least` images.
    """
    while True:
        try:
            return compute(part_size), part_size
        except torch.OutOfMemoryError:
            size = min(part_size, num_images)
        # Not in the handler: while it lasts, the traceback keeps all that was computed.
        if size <= least:
            raise RunFailed(
                f"the memory of {device} does not suffice for {size} images at a time: use a "
                "smaller resize.size, train.crop_size or network"
            )
        part_size = size // 2
        print(
            f"warning: {device} is out of memory with {size} images at a time: each batch is "
            f"computed in parts of {part_size}, as large a batch as before",
            file=sys.stderr,
        )
        torch.cuda.empty_cache()


def has_batch_norm(network: nn.Module) -> bool:
    """Whether the network is one whose training on a batch cannot be cut into parts."""
    return any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def normalisation_accuracies(
    classifier: Classifier, train: Batches, most: int = 512
) -> tuple[float, float, int] | None:
    """Whether the statistics of batch normalisation have settled, seen on training images.

    Returns:
        The accuracy with the statistics of each batch, as while learning, and with the running
        ones, as in every prediction; and the number of images, about `most`. None where the network
        has no batch normalisation.
    """
    if not has_batch_norm(classifier.network):
        return None
    own = replace(classifier, network=copy.deepcopy(classifier.network).eval())
    for module in own.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    hits = np.zeros(2)
    count = 0
    with torch.inference_mode():
        for images, labels in train.shuffled(seed=0, epoch=0):
            for i, judged in enumerate((own, classifier)):
                hits[i] += (judged.log_probabilities(images).argmax(1) == labels).sum().item()
            count += len(labels)
            if count >= most:
                break
    return float(hits[0] / count), float(hits[1] / count), count


def learning_rate(settings: Train, step: int, total_steps: int) -> float:
    """The learning rate of a step, counted from 0 over the whole training.

    `one-cycle` rises from 1/25 of the peak over the first 30 % of the steps and falls to nothing,
    both along a cosine.

    Source: Smith and Topin, "Super-convergence" (2017); the shares are PyTorch's defaults.
    """
    peak = settings.learning_rate
    done = step / max(1, total_steps)
    if settings.schedule == "constant":
        return peak
    if settings.schedule == "cosine":
        return peak * (1 + math.cos(math.pi * done)) / 2
    if done < 0.3:
        return peak / 25 + (peak - peak / 25) * (1 - math.cos(math.pi * done / 0.3)) / 2
    return peak * (1 + math.cos(math.pi * (done - 0.3) / 0.7)) / 2


def step_seed(seed: int, epoch: int, step: int) -> int:
    """A seed of 64 bits for the augmentation and the dropout of one step."""
    return int(np.random.SeedSequence([seed, epoch, step]).generate_state(1, np.uint64)[0])


def seed_generators(device: torch.device, seed: int) -> None:
    """Seeds what draws in a step: PyTorch's generators of the CPU and of the device.

    torch.manual_seed seeds those of all kinds of devices, and for each kind that is not there
    formats a traceback, which took a tenth of a small network's step on a GPU.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def keep_freed_memory(whole_batches: bool = False) -> None:
    """Makes the C library keep large freed buffers for the next step.

    By default glibc soon returns them to the system and gets them back as untouched pages, each of
    which costs a fault: on 2 cores the article's step of 128 images takes 1.5 times as long.
    Elsewhere than on glibc it does nothing.

    Args:
        whole_batches: also those of over 32 MiB, which a batch that is not cut into parts has: the
            residual network's step of 32 images of 224 x 224 takes 1.3 times as long without. What
            is kept then lies in pieces, and may take up to half as much again.
    """
    if sys.platform == "linux":
        m_trim_threshold, m_mmap_threshold, m_mmap_max, m_arena_max = -1, -3, -4, -8  # malloc.h
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(m_trim_threshold, 2**31 - 1 if whole_batches else 512 << 20)
            libc.mallopt(m_mmap_threshold, 32 << 20)  # the most that it takes
            libc.mallopt(m_arena_max, 1)  # the batches' reader would keep as much for itself
            if whole_batches:
                libc.mallopt(m_mmap_max, 0)


def part_of_batch(classifier: Classifier, device: torch.device) -> int:
    """How many images are computed at a time: on a CPU a power of two, elsewhere all.

    The feature maps of 128 images of 300 x 300 take 450 MB and more. In parts of 8 the article's
    step takes 1.03 times as long, and its training 0.8 GB instead of 3. A power of two, since each
    core computes whole images: parts of 9 took 1.07 times as long on two.
    """
    if device.type != "cpu":
        return sys.maxsize
    layers = layers_of(classifier.model, len(classifier.class_names))
    largest = max(map(math.prod, shapes(layers, classifier.preparation.input_shape)))
    images = max(1, _PART_BYTES // (largest * 4))  # float32
    return 1 << (images.bit_length() - 1)


def choose_device(name: str) -> torch.device:
    """The device that `train.device` names; of several processes on a host each has its own GPU.

    Raises:
        RunFailed: `cuda` is asked for and there is none, or there are fewer than processes.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise RunFailed("train.device = cuda: this machine has no usable GPU; use auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    here = place()
    if name == "cpu" or here is None:
        return torch.device(name)
    if here.local_rank >= torch.cuda.device_count():
        raise RunFailed(
            f"train.num_processes: this machine has {torch.cuda.device_count()} GPUs, and each "
            "process takes one: start as many, or use train.device=cpu"
        )
    torch.cuda.set_device(here.local_rank)
    return torch.device(name, here.local_rank)


def choose_residency(settings: Train, num_bytes: int, device: torch.device) -> bool:
    """Whether images of so many bytes are to stay on the device, by `train.residency`.

    `auto` keeps them on a GPU that has twice as much memory free: the other half is the network's.
    """
    if settings.residency == "auto":
        return device.type == "cuda" and num_bytes <= torch.cuda.mem_get_info(device)[0] // 2
    return settings.residency == "resident"


def autocast(settings: Train, model: Model, device: torch.device) -> torch.autocast:
    """bfloat16 where it is asked for; by `auto`, where a GPU has it and it is faster for sure.

    cuDNN pads narrow layers for it: on an H200 the article's step takes 1.5 times as long as in
    float32, and only from 64 filters on each network tried takes less, down to 0.6 of it.
    """
    on = settings.precision == "bfloat16" or (
        settings.precision == "auto"
        and model.filters >= 64
        and device.type == "cuda"
        and torch.cuda.is_bf16_supported()
    )
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


def _compiled(classifier: Classifier, device: torch.device) -> Callable[[Tensor], Tensor]:
    """`class_logits` made into one program by torch.compile, at the first batch of each size."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise RunFailed(
            f"train.compile = true: there is no C++ compiler {compiler} here: install one, or use "
            "false"
        )
    return torch.compile(classifier.class_logits)


def _optimizer(network: nn.Module, settings: Train) -> torch.optim.Optimizer:
    weights = [p for p in network.parameters() if p.ndim > 1]
    # Biases and the scales of normalisation layers have nothing to gain from being small.
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    rate = settings.learning_rate
    # Fused, one pass over all parameters: on a CPU the residual network's step takes 3 % less.
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True, fused=True)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, fused=True)
    return torch.optim.Adam(groups, lr=rate, fused=True)


def _check_finite(loss: float, epoch: int, step: int, rate: float) -> None:
    if not math.isfinite(loss):
        raise RunFailed(
            f"the loss is {loss} at epoch {epoch}, step {step}, learning rate {rate:g}: "
            "lower train.learning_rate"
        )
