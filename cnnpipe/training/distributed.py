"""Training by several processes, on one host or many: each computes its share of every batch.

Before each step the shares' gradients are summed, so that all processes take the step that one
would take of the whole batch, and have the same weights after it. Which images a batch has, how
they are augmented and what is dropped out does not depend on the number of processes. torchrun
starts them, whose variables tell each its rank, or `launch` does.
"""

import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._distributed_c10d import Store, TCPStore
from torch.autograd.function import FunctionCtx

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from cnnpipe.errors import ProcessLost, RunFailed, UserError
from cnnpipe.processes import LAUNCHED, num_cores, place

_LOST_AFTER_S = 60
"""A process that the others wait for longer is lost: only the first does anything alone, and it
tells the tracker and writes a checkpoint in less."""

_RESTARTS = 3
_PORT = "cnnpipe/port"
_LOOPBACK = "lo" if sys.platform == "linux" else "lo0"


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of one training. One alone has nothing to exchange."""

    rank: int = 0
    """Of this process; the one of rank 0 writes, and tells the tracker."""
    size: int = 1

    def share(self, count: int) -> slice:
        """Which of so many things are this process's: all but equal, consecutive parts."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, *tensors: Tensor) -> None:
        """Sums each tensor, of one type, over the processes, in place.

        Raises:
            ProcessLost: one of them is gone.
        """
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _losses_told():
            dist.all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, values in zip(tensors, parts, strict=True):
            tensor.copy_(values.view_as(tensor))

    def from_first(self, data: bytes) -> bytes:
        """The data that the process of rank 0 has; the others' are ignored.

        Raises:
            ProcessLost: one of them is gone.
        """
        if self.size == 1:
            return data
        length = torch.tensor(len(data))
        with _losses_told():
            dist.broadcast(length, 0)
            content = torch.zeros(int(length), dtype=torch.uint8)
            if self.rank == 0:
                content.numpy()[:] = np.frombuffer(data, np.uint8)
            dist.broadcast(content, 0)
        return content.numpy().tobytes()


ALONE = ProcessGroup()


@contextmanager
def joined(device: torch.device) -> Iterator[ProcessGroup]:
    """The group of processes that torchrun has started this one in, or this one alone.

    Args:
        device: this process's.

    Raises:
        ProcessLost: not all of them come.
    """
    here = place()
    if here is None or here.size == 1:
        yield ALONE
        return
    rank, size = here.rank, here.size
    with _losses_told():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=_store(rank, size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=_LOST_AFTER_S),
        )
    try:
        yield ProcessGroup(rank, size)
    finally:
        dist.destroy_process_group()


def _store(rank: int, size: int) -> Store:
    """Where the processes find each other: kept by the first, at the address that all are given.

    What torchrun keeps itself outlives its processes, and those that it starts anew would find what
    the ones before have left; all that is asked of it is the port.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=_LOST_AFTER_S)
    torchruns = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        torchruns, port = TCPStore(host, port, timeout=timeout), 0
    if rank == 0:
        listening = None
        if os.environ["GROUP_WORLD_SIZE"] == "1":  # PyTorch's own would listen to other hosts
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listening = socket.create_server(address[:2], family=family)
            port = listening.getsockname()[1]
        store = TCPStore(
            host, port, size, is_master=True, timeout=timeout, wait_for_workers=False,
            master_listen_fd=listening.detach() if listening else None,
        )  # fmt: skip
        if torchruns:
            torchruns.set(_PORT, str(store.port))
        return store
    deadline = time.monotonic() + _LOST_AFTER_S
    while True:
        try:
            at = int(torchruns.get(_PORT)) if torchruns else port
            store = TCPStore(host, at, size, timeout=timedelta(seconds=5), wait_for_workers=False)
        except RuntimeError:  # it may be the port of one that has ended
            if time.monotonic() > deadline:
                raise
        else:
            store.set_timeout(timeout)
            return store


@contextmanager
def _losses_told() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # dist.DistError and what gloo raises
        reason = " ".join(str(error).split())[:200]
        raise ProcessLost(f"another process of this training is gone: {reason}") from None


@contextmanager
def batch_norm_of_whole_batches(network: nn.Module, group: ProcessGroup) -> Iterator[None]:
    """Within the block batch normalisation has the statistics of all processes' shares together."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    if group.size > 1:
        for norm in norms:
            # What processes exchange is no part of a compiled program.
            norm.forward = torch.compiler.disable(_Normalised(norm, group))  # type: ignore
    try:
        yield
    finally:
        if group.size > 1:
            for norm in norms:
                del norm.forward


class _Normalised:
    """Takes the place of a batch normalisation's `forward`."""

    def __init__(self, norm: nn.BatchNorm2d, group: ProcessGroup) -> None:
        self.norm = norm
        self.group = group

    def __call__(self, x: Tensor) -> Tensor:
        norm = self.norm
        if not norm.training:
            return nn.BatchNorm2d.forward(norm, x)
        assert norm.running_mean is not None and norm.running_var is not None
        assert norm.num_batches_tracked is not None and norm.momentum is not None
        count, mean, var = _moments(x, self.group)
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * (count / (count - 1)), norm.momentum)
        result: Tensor = _Normalise.apply(  # type: ignore[no-untyped-call]
            x, norm.weight, norm.bias, mean, var, norm.eps, count, self.group
        )
        return result


def _moments(x: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Of each channel of (N, C, H, W), over all processes: values, mean and variance.

    The variance is that of the values, not an estimate from them. The means and deviations of the
    shares are found first, since a sum of squares alone would lose digits.
    """
    own = x.detach().float()
    channels = x.shape[1]
    count = torch.full((channels,), x.numel() / channels, dtype=torch.float64, device=x.device)
    if x.numel():
        var, mean = torch.var_mean(own, (0, 2, 3), correction=0)
    else:
        var, mean = torch.zeros(2, channels, device=x.device)
    sums = torch.stack([count, count * mean, count * (var.double() + mean.double() ** 2)])
    group.sum(sums)
    count, total, squares = sums
    mean = total / count
    return count[0].float(), mean.float(), (squares / count - mean**2).clamp(min=0).float()


class _Normalise(torch.autograd.Function):
    """Batch normalisation with a mean and variance that other processes' images have a part in.

    Source: Ioffe and Szegedy, "Batch normalization" (2015), section 3, for the gradient.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor,
        eps: float, count: Tensor, group: ProcessGroup,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps, ctx.group = eps, group  # type: ignore[attr-defined]
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors  # type: ignore[attr-defined]
        gradient = gradients[0].float()

        def by_channel(values: Tensor) -> Tensor:
            return values.view(1, -1, 1, 1)

        scale = (var + ctx.eps).rsqrt()  # type: ignore[attr-defined]
        normalised = (x.float() - by_channel(mean)) * by_channel(scale)
        of_bias = gradient.sum((0, 2, 3))
        of_weight = (gradient * normalised).sum((0, 2, 3))
        both = torch.stack([of_bias, of_weight])
        ctx.group.sum(both)  # type: ignore[attr-defined]
        mean_gradient, mean_product = (both / count).unbind()
        of_x = (
            gradient - by_channel(mean_gradient) - normalised * by_channel(mean_product)
        ) * by_channel(weight * scale)
        # Those of weight and bias are of this share: the step sums them with all others.
        return of_x.to(x.dtype), of_weight, of_bias, None, None, None, None, None


def launch(num_processes: int) -> None:
    """Runs `cnnpipe train` here in so many processes, and returns when they are done.

    One that is killed, as for want of memory, makes all begin again from the last checkpoint, at
    most three times.

    Raises:
        UserError: one of them has found that the input is wrong.
        RunFailed: one of them has failed, or was killed too often.
    """
    # Only here: it takes as long to import as PyTorch itself.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Each its own of the cores, and nothing that listens to other hosts.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_processes)))
    os.environ.update(
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        GLOO_SOCKET_IFNAME=_LOOPBACK,
        NCCL_SOCKET_IFNAME=_LOOPBACK,
    )
    logging.disable()  # what there is to say is said here
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # which it handles
    handlers = {number: signal.getsignal(number) for number in numbers}
    for restarts_left in reversed(range(_RESTARTS + 1)):
        interrupted = 0
        with tempfile.TemporaryDirectory() as folder:
            config = LaunchConfig(
                1, 1, num_processes,
                run_id=LAUNCHED,
                rdzv_backend="c10d",
                rdzv_endpoint=str(Path(folder) / "rendezvous"),
                rdzv_configs={"store_type": "file"},
                local_addr="127.0.0.1",
                logs_specs=DefaultLogsSpecs(log_dir=folder),
                max_restarts=0,
            )  # fmt: skip
            try:
                elastic_launch(config, sys.executable)("-m", "cnnpipe", "train")
                return
            except ChildFailedError as error:
                failures = list(error.failures.values())
            except SignalException as error:
                interrupted = error.sigval
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        if interrupted:
            signal.raise_signal(interrupted)
            raise KeyboardInterrupt  # where nobody handles it
        why = _why(failures)
        if restarts_left == 0 or not isinstance(why, ProcessLost):
            raise why
        print(f"warning: {why}: all go on from the last checkpoint", file=sys.stderr)


def _why(failures: list["ProcessFailure"]) -> UserError | RunFailed:
    """Why the processes have failed: what one has told, or ProcessLost where one was killed."""
    kinds = {kind.__name__: kind for kind in (UserError, RunFailed)}
    for failure in failures:
        if kind := kinds.get(failure.error_file_data.get("kind", "")):
            return kind(failure.message)
    for failure in failures:
        told = "kind" in failure.error_file_data
        stopped = failure.exitcode in (128 + signal.SIGTERM, 128 + signal.SIGINT)  # by the failure
        if failure.exitcode > 0 and not told and not stopped:
            return RunFailed(f"process {failure.local_rank} of the training failed, see above")
    killed = next((failure for failure in failures if failure.exitcode < 0), failures[0])
    return ProcessLost(f"process {killed.local_rank} of the training was lost: {killed.message}")
