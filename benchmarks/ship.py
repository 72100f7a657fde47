"""Puts a trained model into the package, with a card of the run's own figures; and measures all
that are there.

    python benchmarks/ship.py RUN/FOLDER LABEL NAME
    python benchmarks/ship.py --check DATASET

RUN/FOLDER is what ``involution compare`` wrote, LABEL the model in it, NAME its name from now on.
"""

import pathlib
import sys

import keras
import numpy as np

from involution import data, hub, model_labels, saved_model
from involution.models import shipped, weights


def ship(run, label, name):
    classifier = saved_model.load(pathlib.Path(run) / model_labels.file_name(label))
    logits = classifier.model.predict(ramp(classifier), verbose=0)[0].tolist()
    folder = shipped.FOLDERS / name
    hub.save(run, label, folder, extra={"logits_of_a_ramp": logits})
    print(f"{folder}: {sum(f.stat().st_size for f in folder.iterdir()):,} bytes")


def ramp(classifier):
    """An image that is easily made again."""
    count = int(np.prod(classifier.image_shape))
    return np.linspace(0, 1, count, dtype="float32").reshape(1, *classifier.image_shape)


def check(dataset):
    images = data.load(dataset)
    for name in shipped.names():
        classifier = saved_model.load(name)
        scores = classifier.scores(data.scale(images.x_test))
        accuracy = float((scores.argmax(-1) == images.y_test).mean())
        card = weights.read_config(shipped.folder(name))["extra"]["test_accuracy"]
        print(f"{keras.config.backend()}, {name}: accuracy {accuracy:.4f}, by its card {card:.4f}")


if __name__ == "__main__":
    if sys.argv[1] == "--check":
        check(sys.argv[2])
    else:
        ship(*sys.argv[1:4])
