"""`cnnpipe doctor`: what this machine and this folder have and lack, and what to do about it."""

import json
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil
import requests

from cnnpipe import mlflow_store, running, tracking
from cnnpipe.errors import UserError, printable
from cnnpipe.params import Params, load
from cnnpipe.processes import num_cores
from cnnpipe.running import shown_address
from cnnpipe.workspace import repository_root

Status = Literal["ok", "missing", "wrong"]

_FREE_BYTES = 2 * 2**30
"""Of the disk, below which a run may not come to its end."""
_TIMEOUT_S = 3


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    what: str
    status: Status
    """`missing` is what one can do without, `wrong` what one cannot."""
    found: str
    advice: str = ""


def examine(params_file: str) -> list[Finding]:
    """All there is to say, in the order in which one would ask."""
    root = repository_root()
    params, settings = _settings(params_file)
    prefect_api = os.environ.get("PREFECT_API_URL", "").rstrip("/") or running.prefect_api()
    prefect = _prefect(prefect_api)
    return [
        Finding("python", "ok", platform.python_version()),
        _torch(),
        Finding("cores", "ok", str(num_cores())),
        Finding("memory", "ok", f"{psutil.virtual_memory().total / 2**30:.1f} GB"),
        _disk(root),
        _compiler(params),
        _git(root),
        _dvc(root),
        settings,
        _up(),
        _mlflow(),
        _outbox(),
        prefect,
        _worker(prefect_api, prefect.status == "ok"),
    ]


def as_text(findings: list[Finding]) -> str:
    """A table, a line each."""
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        line = f"{finding.what:{width}}  {finding.status:7}  {printable(finding.found)}"
        lines.append(f"{line}: {printable(finding.advice)}" if finding.advice else line)
    return "\n".join(lines)


def _torch() -> Finding:
    version = metadata.version("torch")
    gpus = _lines("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    if not gpus:
        return Finding("torch", "ok", f"{version}, no GPU: it computes on the CPU")
    found = f"{version}, {'; '.join(gpus)}"
    if version.endswith("+cpu"):
        return Finding("torch", "wrong", found, "this build cannot use it: install torch for CUDA")
    return Finding("torch", "ok", found)


def _disk(root: Path) -> Finding:
    free = shutil.disk_usage(root).free
    found = f"{free / 2**30:.1f} GB free"
    if free < _FREE_BYTES:
        return Finding("disk", "wrong", found, "make room: `dvc gc -w` removes unused results")
    return Finding("disk", "ok", found)


def _compiler(params: Params | None) -> Finding:
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found:
        return Finding("compiler", "ok", found)
    if params is not None and params.train.compile:
        return Finding("compiler", "wrong", "none", "train.compile needs one: install g++")
    return Finding("compiler", "missing", "none", "only train.compile needs one")


def _git(root: Path) -> Finding:
    if not _lines("git", "-C", str(root), "rev-parse", "--git-dir"):
        return Finding("git", "missing", "no repository", "`dvc exp` needs one: run `git init`")
    commit = _lines("git", "-C", str(root), "rev-parse", "--short", "HEAD")
    changed = _lines("git", "-C", str(root), "status", "--porcelain")
    found = f"commit {commit[0]}" if commit else "no commit yet"
    found += f", {_counted(len(changed), 'changed file')}"
    names = (("user.name", "GIT_AUTHOR_NAME"), ("user.email", "GIT_AUTHOR_EMAIL"))
    missing = [
        key
        for key, variable in names
        if variable not in os.environ and not _lines("git", "-C", str(root), "config", key)
    ]
    if missing:
        found += f", no {' and no '.join(missing)}"
        advice = "flows and queues commit experiments: `git config user.name NAME`, and user.email"
        return Finding("git", "wrong", found, advice)
    return Finding("git", "ok", found)


def _dvc(root: Path) -> Finding:
    if not (root / ".dvc").is_dir():
        return Finding("dvc", "wrong", f"{root} is no DVC repository", "run `dvc init` there")
    locks = root / ".dvc" / "tmp" / "rwlock"
    try:
        content = json.loads(locks.read_text()) if locks.exists() else {}
        busy = {
            holder["pid"]: holder["cmd"]
            for lock in content.values()
            for holder in [*lock.get("read", []), *filter(None, [lock.get("write")])]
            if psutil.pid_exists(holder["pid"])
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        # Of a DVC that was killed while it wrote it; no other goes on without.
        return Finding("dvc", "wrong", f"{locks} is damaged", f"run `rm {locks}`")
    found = metadata.version("dvc")
    for pid, command in busy.items():
        found += f", process {pid} is at work ({command})"
    return Finding("dvc", "ok", found)


def _settings(params_file: str) -> tuple[Params | None, Finding]:
    try:
        return load(params_file), Finding("params", "ok", params_file)
    except UserError as error:
        return None, Finding("params", "wrong", str(error))


def _up() -> Finding:
    there = running.find()
    if there is None:
        return Finding("up", "missing", "does not run here", "`cnnpipe up` starts the servers")
    gone = [name for name, pid in there.processes.items() if not psutil.pid_exists(pid)]
    found = ", ".join(f"{name} {pid}" for name, pid in there.processes.items())
    if gone:
        return Finding("up", "wrong", f"{' and '.join(gone)} ended", "start `cnnpipe up` again")
    return Finding("up", "ok", f"process {there.pid}, with {found}")


def _mlflow() -> Finding:
    named, there = os.environ.get("MLFLOW_TRACKING_URI", ""), running.find()
    address = named or (there.mlflow if there else "")
    if not address.startswith(("http://", "https://")):
        store = shown_address(address or mlflow_store.local_store())
        return Finding("mlflow", "missing", f"no server; runs go to {store}",
                       "`cnnpipe up` shows them")  # fmt: skip
    shown = shown_address(address)
    if _get(f"{address.rstrip('/')}/health") is None:
        advice = "start it, or unset MLFLOW_TRACKING_URI" if named else "start `cnnpipe up` again"
        return Finding("mlflow", "wrong", f"{shown} does not answer", advice)
    return Finding("mlflow", "ok", shown)


def _outbox() -> Finding:
    runs = tracking.unsent_runs()
    if not runs:
        return Finding("outbox", "ok", "MLflow has been told all")
    told = f"MLflow has not been told all of {_counted(len(runs), 'run')}"
    return Finding("outbox", "missing", told, "the next stage that reaches it sends it")


def _prefect(api: str) -> Finding:
    shown = shown_address(api)
    if _get(f"{api}/health") is not None:
        return Finding("prefect", "ok", shown)
    if os.environ.get("PREFECT_API_URL"):
        return Finding("prefect", "wrong", f"{shown} does not answer",
                       "start it, or unset PREFECT_API_URL")  # fmt: skip
    return Finding("prefect", "missing", "no server", "`cnnpipe up` starts one")


def _worker(api: str, answers: bool) -> Finding:
    workers = _get(f"{api}/work_pools/cnnpipe/workers/filter", post={}) if answers else None
    online = [worker["name"] for worker in workers or [] if worker["status"] == "ONLINE"]
    if online:
        return Finding("worker", "ok", ", ".join(online))
    return Finding("worker", "missing", "none that the server knows of",
                   "`cnnpipe up` or `python -m flows.worker` starts one")  # fmt: skip


def _get(url: str, post: dict[str, Any] | None = None) -> Any:
    """The answer, from JSON where it is any; None where there is none."""
    try:
        answer = requests.request(
            "GET" if post is None else "POST", url, json=post, timeout=_TIMEOUT_S
        )
    except requests.RequestException:
        return None
    if not answer.ok:
        return None
    return answer.json() if "json" in answer.headers.get("content-type", "") else answer.text


def _counted(number: int, thing: str) -> str:
    return f"{number or 'no'} {thing}{'' if number == 1 else 's'}"


def _lines(*command: str) -> list[str]:
    """What the command prints; nothing where it is not there, or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()
