"""A training that is killed again and again ends as the one that was never stopped."""

import random
import signal
import time
from functools import partial

from benchmarks.drills.drill import (
    Drill,
    compared,
    is_one_whole_run,
    repository,
    result,
    run,
    start,
    wait_for_checkpoint,
)

KILLS = 20
# With dropout and augmentation, a minute each.
ARCHITECTURES: dict[str, dict[str, object]] = {
    "article": {},
    "residual": {
        "model__architecture": "residual", "model__blocks": 2, "train__optimizer": "adamw",
    },
}  # fmt: skip


def killed(architecture: str) -> str:
    """Kills the training `KILLS` times and lets it end."""
    chance = random.Random(0)
    settings = ARCHITECTURES[architecture]
    with repository(train__epochs=150, train__augment="photo", **settings) as place:
        for stage in ("download", "resize", "split", "train"):
            run(place, "cnnpipe", stage).check_returncode()
        expected = result(place)
        (place / "mlflow.db").unlink()
        for kill in range(KILLS):
            process = start(place, "cnnpipe", "train")
            wait_for_checkpoint(place, process)
            time.sleep(chance.uniform(0, 1))
            process.kill()
            if process.wait() != -signal.SIGKILL:
                return f"it ended before kill {kill}: {(place / 'log').read_text()}"
        if (last := run(place, "cnnpipe", "train")).returncode:
            return last.stderr
        return compared(
            the_same_weights_and_history=result(place) == expected,
            one_run_with_each_point_once=is_one_whole_run(place, len(expected[1])),
        )


DRILLS = [
    Drill(
        f"kill-{architecture}",
        f"kill -9 at {KILLS} random moments of training",
        "the same weights and history, one run, each point once",
        partial(killed, architecture),
    )
    for architecture in ARCHITECTURES
]
