"""Trains the same weights on the same batches on every installed backend, and compares losses.

    python benchmarks/across_backends.py DATASET OUTPUT.json [--epochs 20] [--steps 50] [--follow]

Records the loss of each of the first steps for the cnn and the inn, and the inn's test accuracy
after all epochs (--epochs 0: none). Takes about 30 minutes on two cores for CIFAR-10 on three
backends.

Training amplifies rounding errors from step to step. --follow excludes that: before each step every
backend loads the weights that the first backend had there. --float64 shows the growth rate.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from involution.utils import atomic_files


def train(arguments):
    """Trains on one backend, in a subprocess; prints the results as JSON on the last line."""
    import keras

    from involution import models
    from involution.data import datasets
    from involution.training.recipes import RECIPES
    from involution.training.trainer import Trainer
    from involution.utils.environment import versions

    if arguments.float64:
        keras.config.set_floatx("float64")
    dataset = datasets.load(arguments.dataset)
    results = {"versions": versions()}
    for name in ("cnn", "inn"):
        keras.utils.set_random_seed(42)
        network = models.MODELS[name](dataset.image_shape, len(dataset.class_names))
        weights = pathlib.Path(arguments.weights) / f"{name}.weights.h5"
        if not weights.exists():
            network.save_weights(weights)
        network.load_weights(weights)
        order = datasets.epoch_permutation(len(dataset.x_train), 42, 1)
        recipe, size = RECIPES["example"], dataset.batch_size
        trainer = Trainer(network, dataset, recipe, 1, 42)
        losses = []
        for step in range(arguments.steps):
            batch = order[step * size : (step + 1) * size]
            if arguments.follow:
                step_weights = pathlib.Path(arguments.weights) / f"{name}-{step}.weights.h5"
                if not step_weights.exists():
                    network.save_weights(step_weights)
                network.load_weights(step_weights)
            losses.append(trainer.train(batch)[0])
        results[name] = {"losses": losses}
        if name == "inn" and arguments.epochs:
            network.load_weights(weights)
            trainer = Trainer(network, dataset, recipe, arguments.epochs, 42)
            *_, last = trainer.epochs()
            results[name]["test_accuracy"] = last["test_accuracy"]
    print(json.dumps(results))


def compare(arguments):
    from involution.backend import installed

    results = {}
    with tempfile.TemporaryDirectory() as weights:
        for backend in installed():
            print(f"{backend}...", flush=True)
            result = subprocess.run(  # noqa: S603 - this file
                [sys.executable, __file__, *sys.argv[1:], "--weights", weights],
                env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
                | ({"JAX_ENABLE_X64": "1"} if arguments.float64 else {}),
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            results[backend] = json.loads(result.stdout.splitlines()[-1])
    first = next(iter(results.values()))
    for backend, other in results.items():
        for name in ("cnn", "inn"):
            pairs = zip(first[name]["losses"], other[name]["losses"], strict=True)
            worst = max(abs(a - b) for a, b in pairs)
            print(f"{backend} {name}: maximum difference of {arguments.steps} losses {worst:.1e}")
        if arguments.epochs:
            print(f"{backend} inn: test accuracy {other['inn']['test_accuracy']:.4f}")
    atomic_files.write_text(arguments.output, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    parser.add_argument("output")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--follow", action="store_true")
    parser.add_argument("--float64", action="store_true")
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    (train if arguments.weights else compare)(arguments)
