"""From raw photos to an evaluated model: the tutorial's script in Keras, and `dvc repro`.

The same photos, the article's network, 5 epochs of batches of 128; whole processes, start to end.
`python -m benchmarks.whole 1400` takes so many photos.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from ruamel.yaml import YAML

from benchmarks.harness import (
    DVC,
    REPOSITORY,
    command,
    faster,
    in_turn,
    needs,
    photos,
    report,
    workspace,
)


def main(count: int = 500) -> None:
    """Runs the benchmark."""
    if not needs("tensorflow-cpu"):
        return
    with photos(count) as images, TemporaryDirectory() as folder:
        place = Path(folder) / "pipeline"
        subprocess.run(["git", "clone", "-q", str(REPOSITORY), str(place)], check=True)
        packed = Path(folder) / "packed"
        packed.mkdir()
        workspace(packed, images, count)
        settings = YAML().load(place / "params.yaml")
        settings["download"].update(source="folder", folder=str(packed / "inbox"))
        YAML().dump(settings, place / "params.yaml")

        def from_nothing() -> None:
            # Results and their cache go; MLflow's store stays, as does Keras's installation.
            for name in ("data/raw", "data/resized", "models", "reports", ".dvc/cache", "dvc.lock"):
                path = place / name
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            command([DVC, "repro"], place)()

        script = [sys.executable, "-m", "benchmarks.tutorial", str(packed / "inbox")]
        tutorial = command(script, REPOSITORY)
        # Each is a whole process, imports and all, and takes minutes: nothing to warm up.
        seconds = in_turn({"ours": from_nothing, "theirs": tutorial}, rounds=1, warm_up=False)
    row = faster(
        f"{count} photos to an evaluated model", "the tutorial in Keras",
        seconds["theirs"], seconds["ours"], "s", 3,
    )  # fmt: skip
    report("whole", [row], ["tensorflow-cpu", "torch", "scikit-image", "dvc", "mlflow"])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
