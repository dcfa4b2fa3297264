"""A signal to DVC, to its whole group or to the stage: nothing stays behind, nothing is lost."""

import os
import shutil
import signal
import time
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

import psutil

from benchmarks.drills.drill import (
    BIN,
    Drill,
    compared,
    is_one_whole_run,
    repository,
    result,
    run,
    runs,
    seconds_until_gone,
    start,
    wait_for_checkpoint,
)

TARGETS = {"dvc": "DVC alone", "group": "the whole group", "stage": "the stage alone"}
EPOCHS = 100
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)


@cache
def prepared() -> tuple[Path, object]:
    """A repository that stands before its training, and the result of one never stopped."""
    with repository(train__epochs=EPOCHS) as place:
        run(place, "dvc", "repro", "split").check_returncode()
        before = Path(mkdtemp()) / "repository"
        shutil.copytree(place, before, symlinks=True)
        run(place, "dvc", "repro", "train").check_returncode()
        return before, result(place)


def stopped(target: str, number: signal.Signals) -> str:
    """Sends the signal in the middle of the training; then `dvc repro` again."""
    before, expected = prepared()
    place = Path(mkdtemp()) / "repository"
    shutil.copytree(before, place, symlinks=True)
    try:
        process = start(place, "dvc", "repro", "train")
        wait_for_checkpoint(place, process)
        time.sleep(1)
        dvc = psutil.Process(process.pid)
        family = [dvc, *dvc.children(recursive=True)]
        stage = next(p for p in family if p.cmdline()[1:] == [str(BIN / "cnnpipe"), "train"])
        if target == "group":
            os.killpg(process.pid, number)
        else:
            (dvc if target == "dvc" else stage).send_signal(number)
        if (target, number) == ("dvc", signal.SIGINT):  # which DVC ignores while a stage runs
            code = process.wait()
            return compared(
                ends_well=code == 0,
                the_same_result=result(place) == expected,
                one_whole_run=is_one_whole_run(place, EPOCHS),
            )
        seconds = seconds_until_gone(family)
        status = runs(place)[0].info.status
        told = number != signal.SIGKILL or target == "dvc"  # DVC's end is a SIGTERM to the stage
        again = run(place, "dvc", "repro", "train")
        return compared(
            **{f"all gone within 5 s but after {seconds:.1f} s": seconds < 5},
            **{f"{'KILLED' if told else 'RUNNING'} but {status}": status
               == ("KILLED" if told else "RUNNING")},
            goes_on_with_dvc_repro=again.returncode == 0 and "goes on after epoch" in again.stdout,
            the_same_result=again.returncode == 0 and result(place) == expected,
            one_whole_run=again.returncode == 0 and is_one_whole_run(place, EPOCHS),
        )  # fmt: skip
    finally:
        shutil.rmtree(place.parent)


DRILLS = [
    Drill(
        f"{number.name.lower()}-{target}",
        f"{number.name} to {name} amid a training",
        "DVC ignores it and ends well"
        if (target, number) == ("dvc", signal.SIGINT)
        else "all gone in 5 s; `dvc repro` goes on to the same result and run",
        partial(stopped, target, number),
    )
    for target, name in TARGETS.items()
    for number in NUMBERS
]
