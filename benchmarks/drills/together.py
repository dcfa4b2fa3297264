"""Several at once: who has to wait is told so in one line, and nothing is mixed up."""

import json
import signal
import time

from benchmarks.drills.drill import (
    Drill,
    compared,
    is_one_whole_run,
    repository,
    run,
    runs,
    start,
    steps,
    wait_for_checkpoint,
)

EPOCHS = 100


def two_repros() -> str:
    """A second `dvc repro` in the same folder amid the first one's training."""
    with repository(train__epochs=EPOCHS) as place:
        first = start(place, "dvc", "repro")
        wait_for_checkpoint(place, first)
        second = run(place, "dvc", "repro")
        return compared(
            the_second_refused=second.returncode != 0 and first.poll() is None,
            told_who_is_busy=str(first.pid) in second.stderr and "busy" in second.stderr,
            the_first_ends_well=first.wait() == 0,
            one_whole_run=is_one_whole_run(place, EPOCHS),
            nothing_left_to_do=run(place, "dvc", "status", "--quiet").returncode == 0,
        )


def beside_an_orphan() -> str:
    """A `dvc repro` beside a training that was started by hand, and again once that is stopped."""
    with repository(train__epochs=EPOCHS) as place:
        run(place, "dvc", "repro", "split").check_returncode()
        orphan = start(place, "cnnpipe", "train")
        wait_for_checkpoint(place, orphan)
        refused = run(place, "dvc", "repro", "train")
        line = f"is running already as process {orphan.pid}: wait for it, or stop it with"
        was_running = orphan.poll() is None
        orphan.send_signal(signal.SIGTERM)
        stopped = orphan.wait()
        again = run(place, "dvc", "repro", "train")
        return compared(
            refused=refused.returncode != 0 and was_running,
            told_what_to_do=line in refused.stderr,
            stopped_as_told=stopped == 128 + signal.SIGTERM,
            goes_on=again.returncode == 0 and "goes on after epoch" in again.stdout,
            one_whole_run=is_one_whole_run(place, EPOCHS),
        )


def sweep_beside_a_repro() -> str:
    """Eight queued experiments, two at a time, and `dvc repro` of other settings meanwhile."""
    rates = [0.0005 * (i + 1) for i in range(8)]
    with repository(train__epochs=10, train__learning_rate=0.1) as place:
        run(place, "dvc", "repro", "split").check_returncode()
        values = ",".join(f"{rate:g}" for rate in rates)
        run(place, "dvc", "exp", "run", "--queue", "-S",
            f"train.learning_rate={values}").check_returncode()  # fmt: skip
        run(place, "dvc", "queue", "start", "-j", "2").check_returncode()
        repro = start(place, "dvc", "repro")
        code = repro.wait()
        for _ in range(300):
            status = run(place, "dvc", "queue", "status").stdout
            if "Running" not in status and "Queued" not in status:
                break
            time.sleep(1)
        listed = json.loads(run(place, "dvc", "exp", "show", "--json").stdout)
        done = [e for row in listed for e in row["experiments"] or []]
        found = runs(place)
        whole = [run.info.run_id for run in found if run.info.status == "FINISHED"
                 and steps(place, run.info.run_id) == list(range(1, 11))]  # fmt: skip
        tried = sorted(float(run.data.params["train.learning_rate"]) for run in found)
        return compared(
            the_repro_ends_well=code == 0,
            **{f"eight experiments but {status}": len(done) == 8 and "Failed" not in status},
            **{f"nine runs but {tried}": tried == sorted([*map(float, values.split(",")), 0.1])},
            each_with_each_point_once=len(whole) == 9,
            each_evaluated=all("test/accuracy" in run.data.metrics for run in found),
        )  # fmt: skip


DRILLS = [
    Drill(
        "two-repros",
        "two `dvc repro` in a folder at once",
        "the second is told which process is busy, the first ends well",
        two_repros,
    ),
    Drill(
        "repro-beside-orphan",
        "`dvc repro` beside a training by hand",
        "it is told whom to wait for, and goes on once that is stopped",
        beside_an_orphan,
    ),
    Drill(
        "sweep-beside-repro",
        "a sweep of 8, two at a time, beside a repro",
        "nine whole runs, each point once, all evaluated",
        sweep_beside_a_repro,
    ),
]
