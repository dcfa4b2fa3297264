"""The faults that take no minutes: tests of the suite, named beside the others."""

import subprocess
import sys
from functools import partial

from benchmarks.drills.drill import AS_EXPECTED, ROOT, Drill

# The fault, what is expected, and the tests that see to it: files, and words to choose by.
TESTS: dict[str, tuple[str, str, list[str], str]] = {
    "kinds-of-images": (
        "every kind of image file, and what is none",
        "its pixels, scaled and upright, or the reason",
        ["tests/data/test_decode.py"], "",
    ),
    "deadly-decoder": (
        "a file that crashes its decoder or never ends",
        "that file alone is quarantined",
        ["tests/stages"], "ends_its_decoder or no_files_fault",
    ),
    "hostile-archives": (
        "archives with bombs, links, devices, odd paths",
        "refused in one line, or taken safely",
        ["tests/data/test_hostile_archives.py", "tests/data/test_raw.py"], "",
    ),
    "odd-names-layouts": (
        "odd names of classes and files, odd layouts",
        "unchanged through all stages, or one line",
        ["tests/stages/test_layouts.py", "tests/data/test_layout.py"], "",
    ),
    "fuzzed-params": (
        "anything at all in params.yaml",
        "settings, or one line",
        ["tests/test_params.py"], "",
    ),
    "cut-download": (
        "downloads that are cut, killed, exchanged",
        "only the rest is fetched; a checksum decides",
        ["tests/data/test_downloads.py"], "",
    ),
    "object-storage": (
        "an S3 storage that fails, refuses, changes",
        "a line; a download goes on, or begins anew",
        ["tests/data/test_object_storage.py", "tests/data/test_downloads.py",
         "tests/serving/test_files.py"],
        "object or storage or archive",
    ),
    "clones": (
        "other clones, with the DVC remote alone",
        "run nothing, predict the same; no credentials left",
        ["tests/flows/test_clones.py"], "",
    ),
    "damaged-files": (
        "flipped or missing bytes in any file of ours",
        "named; of checkpoints the one before is taken",
        ["tests/data/test_store.py", "tests/network/test_classifier.py",
         "tests/training/test_checkpoint.py"],
        "damaged or flipped or wrong or refused or cut or truncated",
    ),
    "diverging-loss": (
        "a loss that is not finite",
        "stops there, the last good checkpoint stays",
        ["tests/training/test_loop.py"], "finite or ruins",
    ),
    "out-of-memory": (
        "a GPU that has no room for a batch",
        "smaller parts, the same batch and result",
        ["tests/training/test_loop.py"], "memory",
    ),
    "leaking-copies": (
        "copies across classes and splits",
        "one group, one split; contradictions listed",
        ["tests/data/test_duplicates.py", "tests/stages"], "cop or group or burst or shade",
    ),
    "missed-rerun": (
        "a change of any module or setting",
        "DVC reruns each stage that depends on it",
        ["tests/test_dvc_reruns.py", "tests/test_dvc_yaml.py"], "",
    ),
    "unsafe-code": (
        "pickles, shells, unsafe YAML, open ports",
        "none",
        ["tests/test_security.py"], "",
    ),
}  # fmt: skip


def passed(files: list[str], words: str) -> str:
    """Runs the tests; the last line of what they say, if they do not all pass."""
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "2", *files, "-k", words],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    return AS_EXPECTED if ended.returncode == 0 else ended.stdout.strip().rpartition("\n")[2]


DRILLS = [
    Drill(name, fault, expected, partial(passed, files, words))
    for name, (fault, expected, files, words) in TESTS.items()
]
