"""Three hosts, as network namespaces on this machine: what one that is cut off costs.

Each has its own addresses and routes; a bridge is between them, and pulling a host's end of it is
what an unplugged cable is. They share the folder, as hosts share a network file system.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from benchmarks.drills.drill import (
    Drill,
    compared,
    environment,
    is_one_whole_run,
    repository,
    result,
    run,
)

HOSTS = ("scheduler", "worker-1", "worker-2")
EPOCHS = 120
_SWITCH = "cnnpipe-switch"


def _lacks() -> str:
    """What this machine lacks for it, or nothing."""
    if os.getuid() or not shutil.which("ip"):
        return "not practised: it needs root and the command `ip`"
    return ""


@contextmanager
def network() -> Iterator[None]:
    """The three hosts, each with an address, for as long as the block."""

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    with ExitStack() as stack:
        for name in (_SWITCH, *map(_namespace, HOSTS)):
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
        ip("-n", _SWITCH, "link", "add", "bridge", "type", "bridge")
        ip("-n", _SWITCH, "link", "set", "bridge", "up")
        for host in HOSTS:
            there = _namespace(host)
            ip("link", "add", "eth0", "netns", there, "type", "veth",
               "peer", "name", host, "netns", _SWITCH)  # fmt: skip
            ip("-n", _SWITCH, "link", "set", host, "master", "bridge", "up")
            ip("-n", there, "address", "add", f"{address(host)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", there, "link", "set", device, "up")
        yield


def _namespace(host: str) -> str:
    return f"cnnpipe-{host}"


def address(host: str) -> str:
    """The address of a host."""
    return f"10.98.0.{HOSTS.index(host) + 1}"


def cut_off(host: str) -> None:
    """Pulls the host's cable; what runs there goes on running."""
    subprocess.run(["ip", "-n", _SWITCH, "link", "set", host, "down"], check=True)


@contextmanager
def running(
    host: str, place: Path, command: Sequence[str], **more: str
) -> Iterator[subprocess.Popen[str]]:
    """A command on a host; its output goes to the file HOST.log. The end of the block ends it."""
    log = place / f"{host}.log"
    with log.open("a") as file:
        process = subprocess.Popen(
            ["ip", "netns", "exec", _namespace(host), *command], cwd=place,
            env=environment(place, **more), stdout=file, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_for(place: Path, host: str, text: str, process: subprocess.Popen[str]) -> None:
    """Returns once the host has said it, or the process has ended."""
    while process.poll() is None and text not in (place / f"{host}.log").read_text():
        time.sleep(0.1)


def cluster(stack: ExitStack, place: Path) -> dict[str, subprocess.Popen[str]]:
    """A Dask scheduler on the first host and a worker on each of the others."""
    ours = f"tcp://{address('scheduler')}:8786"
    commands = {
        host: ["dask", "worker", ours, "--no-dashboard", f"--host={address(host)}"]
        for host in HOSTS[1:]
    }
    commands["scheduler"] = [
        "dask",
        "scheduler",
        "--no-dashboard",
        f"--host={address('scheduler')}",
    ]
    # By Dask's default a host that does not answer is given five minutes.
    patience = {"DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "10s"}
    return {
        host: stack.enter_context(running(host, place, command, **patience))
        for host, command in commands.items()
    }


def resized(place: Path) -> dict[str, bytes]:
    """The files of data/resized."""
    folder = place / "data/resized"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def resizing() -> str:
    """Two hosts resize for a third until one of them is cut off; the other does its part, too."""
    if lacks := _lacks():
        return lacks
    with (
        repository(
            download__source="drawn-pets", download__limit_per_class=None, resize__size=300,
            resize__color="rgb",
        ) as place,
        ExitStack() as stack,
    ):  # fmt: skip
        run(place, "dvc", "repro", "resize").check_returncode()
        alone = resized(place)
        shutil.rmtree(place / "data/resized")
        stack.enter_context(network())
        workers = cluster(stack, place)
        ours = f"tcp://{address('scheduler')}:8786"
        script = "cnnpipe resize > resize.log 2>&1"
        client = stack.enter_context(
            running("scheduler", place, ["sh", "-c", script], DASK_SCHEDULER_ADDRESS=ours)
        )
        while client.poll() is None and len(list(place.glob("data/.shards.*/*/*.npy"))) < 4:
            time.sleep(0.02)
        was_amid = client.poll() is None and workers["worker-2"].poll() is None
        cut_off("worker-2")
        since = time.monotonic()
        code = client.wait()
        taken = time.monotonic() - since
        print(f"  done {taken:.0f} s after the cut", file=sys.stderr)
        return compared(
            cut_off_amid_it=was_amid,
            **{f"ends well, but {(place / 'resize.log').read_text()[-300:]}": code == 0},
            the_same_bytes=resized(place) == alone,
            nothing_left_behind=not list(place.glob("data/.*")),
            nothing_to_do_for_DVC=run(place, "dvc", "status", "resize").stdout.strip()
            == "Data and pipelines are up to date.",
        )


def torchrun(host: str) -> list[str]:
    """The command that is typed on each of the hosts; two of them are enough."""
    return [
        "torchrun", "--nnodes=2:3", "--nproc-per-node=1", "--max-restarts=3",
        "--rdzv-backend=c10d", f"--rdzv-endpoint={address('scheduler')}:29500", "--rdzv-id=drill",
        f"--rdzv-conf=is_host={int(host == 'scheduler')}", f"--local-addr={address(host)}",
        "-m", "cnnpipe", "train",
    ]  # fmt: skip


def training() -> str:
    """Three hosts train together until one is cut off; the other two go on."""
    if lacks := _lacks():
        return lacks
    with repository(train__epochs=EPOCHS, train__optimizer="sgd") as place:
        run(place, "dvc", "repro", "split").check_returncode()
        with ExitStack() as stack:
            stack.enter_context(network())
            processes = {
                host: stack.enter_context(
                    running(
                        host, place, torchrun(host), OMP_NUM_THREADS="1",
                        GLOO_SOCKET_IFNAME="eth0", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
                    )
                )
                for host in HOSTS
            }  # fmt: skip
            wait_for(place, "scheduler", "epoch 10/", processes["scheduler"])
            cut_off("worker-2")
            since = time.monotonic()
            codes = [processes[host].wait() for host in HOSTS[:2]]
            taken = time.monotonic() - since
            was_cut_off = processes["worker-2"].poll() is None
        log = (place / "scheduler.log").read_text()
        if codes != [0, 0]:
            return f"exit codes {codes}: {log[-500:]}"
        together = result(place)[1]
        whole = is_one_whole_run(place, EPOCHS)
        committed = run(place, "dvc", "commit", "--force", "train")
        evaluated = run(place, "dvc", "repro")
        shutil.rmtree(place / ".cnnpipe")
        run(place, "cnnpipe", "train").check_returncode()
        print(f"  done {taken:.0f} s after the cut", file=sys.stderr)
        return compared(
            the_third_is_left_alone=was_cut_off,
            it_goes_on_from_the_checkpoint="goes on after epoch" in log,
            one_whole_run=whole,
            # Rounding alone may turn one of the few images; so does the number of threads.
            the_result_of_one_process=np.allclose(together, result(place)[1], rtol=2e-3, atol=2e-2),
            only_evaluate_is_left=committed.returncode == 0
            and "Running stage 'evaluate'" in evaluated.stdout
            and "Running stage 'train'" not in evaluated.stdout,
        )


DRILLS = [
    Drill(
        "hosts-resizing",
        "of two hosts that resize by Dask one is cut off",
        "the other does its part, too; the same bytes",
        resizing,
    ),
    Drill(
        "hosts-training",
        "of three hosts that train together one is cut off",
        "the two others go on from the checkpoint; the result of one process",
        training,
    ),
]
