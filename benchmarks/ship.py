"""Adds a trained model with its model card to the package, or measures all pretrained models.

    python benchmarks/ship.py RUN/FOLDER LABEL NAME
    python benchmarks/ship.py --check DATASET

RUN/FOLDER was written by ``involution compare``; LABEL is a model in it, NAME its pretrained name.
"""

import pathlib
import sys

import keras
import numpy as np

from involution import hub
from involution.data import datasets, transforms
from involution.models import pretrained, specs, weights
from involution.saving import classifier


def ship(run, label, name):
    loaded = classifier.load(pathlib.Path(run) / specs.file_name(label))
    logits = loaded.model.predict(ramp(loaded.image_shape), verbose=0)[0].tolist()
    folder = pretrained.ROOT / name
    hub.save(run, label, folder, extra={"logits_of_a_ramp": logits})
    print(f"{folder}: {sum(f.stat().st_size for f in folder.iterdir()):,} bytes")


def ramp(image_shape):
    """A batch with one deterministic image."""
    count = int(np.prod(image_shape))
    return np.linspace(0, 1, count, dtype="float32").reshape(1, *image_shape)


def check(dataset):
    images = datasets.load(dataset)
    for name in pretrained.available():
        loaded = classifier.load(name)
        scores = loaded.predict_proba(transforms.to_unit_float(images.x_test))
        accuracy = float((scores.argmax(-1) == images.y_test).mean())
        card = weights.read_config(pretrained.path(name))["extra"]["test_accuracy"]
        print(f"{keras.config.backend()}, {name}: accuracy {accuracy:.4f}, model card {card:.4f}")


if __name__ == "__main__":
    if sys.argv[1] == "--check":
        check(sys.argv[2])
    else:
        ship(*sys.argv[1:4])
