"""One host of a training that devices and hosts share: for tests.

    python -m tests.support.distributed_runs DEVICES HOSTS HOST PORT WEIGHTS.npz

trains in float64, prints what each epoch gave as JSON, and writes the weights.
"""

import dataclasses
import json
import sys

import keras
import numpy as np

import involution
from involution.data import datasets
from involution.training import distributed, trainer


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


def train(hosts):
    """(model, rows) of three epochs; the last batch of each is not whole."""
    recipe = dataclasses.replace(
        trainer.RECIPES["one-cycle"], batch_size=16, accumulate=2, ema=0.9, label_smoothing=0.1
    )
    model = network()
    return model, list(trainer.Trainer(model, dataset(), recipe, 3, 5, hosts).epochs())


def main(devices, hosts, host, port, file):
    hosts = distributed.of(int(devices), f"127.0.0.1:{port}", int(hosts), int(host))
    distributed.begin(hosts)
    keras.config.set_dtype_policy("float64")
    model, rows = train(hosts)
    hosts.end()
    np.savez(
        file, **{v.path.replace("/", " "): keras.ops.convert_to_numpy(v) for v in model.weights}
    )
    print(json.dumps([{k: v for k, v in row.items() if k != "seconds"} for row in rows]))


if __name__ == "__main__":
    main(*sys.argv[1:])
