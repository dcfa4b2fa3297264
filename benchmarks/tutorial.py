"""The 2017 tutorial's script, in today's Keras: the peer of `training` and `whole`.

`python -m benchmarks.tutorial FOLDER` reads a folder of class folders into one float array, trains
on 70 % of it and evaluates the rest. The photos are shuffled first, as the tutorial's were not.
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
from skimage.io import imread
from skimage.transform import resize


def model() -> Any:
    """The network, compiled: ten 5 x 5 filters, ReLU, 2 x 2 max pooling, softmax, Adam."""
    network = keras.Sequential(
        [
            keras.layers.Input((300, 300, 3)),
            keras.layers.Conv2D(10, 5, activation="relu"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Flatten(),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    network.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
    return network


def main(folder: str) -> None:
    """Trains and evaluates."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    images = np.array([resize(imread(path), (300, 300)) for path in paths])
    labels = keras.utils.to_categorical([path.parent.name == "dog" for path in paths])
    order = np.random.default_rng(0).permutation(len(paths))
    train, test = np.split(order, [int(0.7 * len(paths))])
    network = model()
    network.fit(images[train], labels[train], batch_size=128, epochs=5, verbose=0)
    print(network.evaluate(images[test], labels[test], verbose=0))


if __name__ == "__main__":
    main(sys.argv[1])
