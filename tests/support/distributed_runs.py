"""One host of a distributed training run, for tests.

    python -m tests.support.distributed_runs DEVICES NUM_PROCESSES PROCESS_ID PORT WEIGHTS.npz

trains in float64, prints the metrics of each epoch as JSON, and writes the weights.
"""

import dataclasses
import json
import sys

import keras
import numpy as np

import involution
from involution.data import datasets
from involution.training import distributed
from involution.training.recipes import RECIPES
from involution.training.trainer import Trainer


def dataset(train=40, test=11):
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (train + test, 6, 5, 3)).astype("uint8")
    y = random.integers(0, 3, train + test)
    return datasets.Dataset(
        "noise", "", x[:train], y[:train], x[train:], y[train:], ("a", "b", "c")
    )


def network():
    keras.utils.set_random_seed(3)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((6, 5, 3)),
            layers.Conv2D(8, 1),
            involution.Involution2D(3, groups=2),
            layers.BatchNormalization(),
            layers.Dropout(0.25),
            involution.Involution2D(3, strides=2, implementation="native"),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


def train(distribution):
    """(model, metrics of each epoch) of three epochs, each with an incomplete last batch."""
    recipe = dataclasses.replace(
        RECIPES["one-cycle"],
        batch_size=16,
        gradient_accumulation_steps=2,
        ema_momentum=0.9,
        label_smoothing=0.1,
    )
    model = network()
    return model, list(Trainer(model, dataset(), recipe, 3, 5, distribution).epochs())


def main(devices, num_processes, process_id, port, file):
    distribution = distributed.from_environment(
        int(devices), f"127.0.0.1:{port}", int(num_processes), int(process_id)
    )
    distributed.initialize(distribution)
    keras.config.set_dtype_policy("float64")
    model, rows = train(distribution)
    distribution.shutdown()
    np.savez(
        file, **{v.path.replace("/", " "): keras.ops.convert_to_numpy(v) for v in model.weights}
    )
    print(json.dumps([{k: v for k, v in row.items() if k != "seconds"} for row in rows]))


if __name__ == "__main__":
    main(*sys.argv[1:])
