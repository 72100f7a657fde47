"""Loads saved models and predicts, in a process in which only one framework can be imported.

    python -m tests.support.backend_pairs FRAMEWORK FOLDER

FOLDER contains models NAME.keras, each with NAME.npz: the inputs in order, then the expected
outputs. Prints the name and the maximum relative error of each model.
"""

import importlib.machinery
import os
import pathlib
import sys

import numpy as np

FRAMEWORKS = ("tensorflow", "jax", "torch")


def hide(names):
    """Makes modules appear not to be installed."""
    finder = importlib.machinery.PathFinder

    class Hiding(finder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            return None if name in names else finder.find_spec(name, path, target)

    sys.meta_path[sys.meta_path.index(finder)] = Hiding


def main(framework, folder):
    hide(set(FRAMEWORKS) - {framework})
    os.environ["KERAS_BACKEND"] = framework
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import keras

    import involution  # noqa: F401 - registers the layers
    from tests.support.keras_io_formula import relative_error

    if keras.config.backend() != framework:
        raise RuntimeError(f"Keras runs on {keras.config.backend()}, not on {framework}")
    for path in sorted(pathlib.Path(folder).glob("*.keras")):
        model = keras.models.load_model(path)
        with np.load(path.with_suffix(".npz")) as stored:
            arrays = list(stored.values())
        inputs, outputs = arrays[: len(model.inputs)], arrays[len(model.inputs) :]
        got = model.predict(inputs if len(inputs) > 1 else inputs[0], verbose=0)
        got = got if isinstance(got, list) else [got]
        errors = [relative_error(a, b) for a, b in zip(got, outputs, strict=True)]
        print(path.stem, np.max(errors))


if __name__ == "__main__":
    main(*sys.argv[1:])
