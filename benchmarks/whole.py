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

from benchmarks.harness import DVC, command, faster, in_turn, needs, photos, report, workspace
from benchmarks.startup import REPOSITORY

TUTORIAL = """
import os, sys
os.environ["KERAS_BACKEND"] = "tensorflow"
import numpy as np, keras
from skimage.io import imread
from skimage.transform import resize
paths = sorted((os.path.join(f, n) for f, _, names in os.walk(sys.argv[1]) for n in names))
images = np.array([resize(imread(path), (300, 300)) for path in paths])
labels = keras.utils.to_categorical([os.sep + "dog" + os.sep in path for path in paths])
order = np.random.default_rng(0).permutation(len(paths))
cut = int(0.7 * len(paths))
train, test = order[:cut], order[cut:]
model = keras.Sequential([
    keras.layers.Input((300, 300, 3)),
    keras.layers.Conv2D(10, 5, activation="relu"),
    keras.layers.MaxPooling2D(2),
    keras.layers.Flatten(),
    keras.layers.Dense(2, activation="softmax"),
])
model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
model.fit(images[train], labels[train], batch_size=128, epochs=5, verbose=0)
print(model.evaluate(images[test], labels[test], verbose=0))
model.save("model.keras")
"""


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

        tutorial = command([sys.executable, "-c", TUTORIAL, str(packed / "inbox")], Path(folder))
        # Each is a whole process, imports and all, and takes minutes: nothing to warm up.
        seconds = in_turn({"ours": from_nothing, "theirs": tutorial}, rounds=1, warm_up=False)
    row = faster(
        f"{count} photos to an evaluated model", "the tutorial in Keras",
        seconds["theirs"], seconds["ours"], "s", 3,
    )  # fmt: skip
    report("whole", [row], ["tensorflow-cpu", "torch", "scikit-image", "dvc", "mlflow"])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
