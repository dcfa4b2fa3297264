"""What a result came from: the commit, the experiment, the contents of files."""

import hashlib
import os
import subprocess
from pathlib import Path

import cnnpipe


def origin() -> dict[str, str]:
    """The commit and the experiment that this is, as far as they are known."""
    found = {
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": "true" if git("status", "--porcelain", "--untracked-files=no") else "false",
        "dvc_experiment": os.environ.get("DVC_EXP_NAME", ""),
    }
    return {key: value for key, value in found.items() if value}


def digest(*paths: str | Path) -> str:
    """16 hexadecimal digits that change when any of the files does."""
    total = hashlib.sha256()
    for path in paths:
        total.update(bytes.fromhex(sha256(path)))
    return total.hexdigest()[:16]


def code_digest() -> str:
    """Likewise of all modules of this package, as they are on the disk."""
    return digest(*sorted(Path(cnnpipe.__file__).parent.rglob("*.py")))


def sha256(path: str | Path) -> str:
    """Of the file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def md5(path: str | Path) -> str:
    """Likewise, as DVC names files in dvc.lock and in its cache."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def git(*arguments: str) -> str:
    """What git prints, without the space around; empty where it fails."""
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()
