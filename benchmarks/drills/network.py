"""The pipeline, the servers and the flow without a network: nobody is called, nothing is missed."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.drills.drill import Drill, compared, environment, repository, run

# A connection that strace saw, to where.
_ADDRESS = re.compile(r'sin6?_port=htons\((\d+)\).*?(?:inet_addr\("|inet_pton\(AF_INET6, ")([^"]+)')
_LOOPBACK = re.compile(r"127\.|::1$|::ffff:127\.|0\.0\.0\.0$|::$")


def alone() -> str:
    """Runs everything in a network namespace that has loopback only, watched by strace."""
    if not shutil.which("strace"):
        return "strace is not installed"
    with repository(train__epochs=2) as place:
        command = ["unshare", "--net"] if os.getuid() == 0 else [
            "unshare", "--user", "--map-root-user", "--net"]  # fmt: skip
        trace = place / "connections"
        ended = subprocess.run(
            [*command, "strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=connect,sendto",
             "-o", str(trace), sys.executable, "-m", "benchmarks.drills.network", str(place)],
            capture_output=True, text=True,
        )  # fmt: skip
        addresses = {f"{m[2]}:{m[1]}" for m in _ADDRESS.finditer(trace.read_text())}
        elsewhere = sorted(a for a in addresses if not _LOOPBACK.match(a.rpartition(":")[0]))
        return compared(
            **{f"well, but {ended.stdout[-300:]}{ended.stderr[-300:]}": ended.returncode == 0},
            watched=any(_LOOPBACK.match(a) for a in addresses),
            **{f"loopback alone, but {elsewhere}": not elsewhere},
        )


def everything(place: Path) -> int:
    """`dvc repro`, `cnnpipe up`, a flow, and the end of them all; the exit code."""
    import fcntl
    import socket
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        # Loopback up: SIOCGIFFLAGS, IFF_UP, SIOCSIFFLAGS of linux/sockios.h.
        flags = struct.unpack("16sh", fcntl.ioctl(control, 0x8913, struct.pack("16sh", b"lo", 0)))
        fcntl.ioctl(control, 0x8914, struct.pack("16sh", b"lo", flags[1] | 1))
    if (first := run(place, "dvc", "repro")).returncode:
        print(first.stdout, first.stderr)
        return 1
    with (place / "up.log").open("w") as log:
        up = subprocess.Popen(
            ["cnnpipe", "up"], cwd=place, env=environment(place), stdout=log, stderr=log
        )
    try:
        while "Ctrl-C stops" not in (place / "up.log").read_text():
            if up.poll() is not None:
                print((place / "up.log").read_text())
                return 1
            time.sleep(0.5)
        uri = "http://127.0.0.1:5000"
        flow = run(
            place, "python", "-m", "flows.pipeline", MLFLOW_TRACKING_URI=uri,
            PREFECT_HOME=str(place / ".cnnpipe" / "prefect"),
        )  # fmt: skip
        print(flow.stdout[-300:], flow.stderr[-300:])
        time.sleep(20)  # for what calls home at leisure
        return flow.returncode
    finally:
        up.terminate()
        up.wait()


DRILLS = [
    Drill(
        "no-network",
        "no network, and all connections watched",
        "`dvc repro`, both servers and a flow work; loopback alone is asked",
        alone,
    )
]

if __name__ == "__main__":
    sys.exit(everything(Path(sys.argv[1])))
