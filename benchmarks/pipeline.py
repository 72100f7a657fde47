"""Images a second of a training: of reading them alone, of the step alone, and of both, where the
next batches are read while the step is at work.

    KERAS_BACKEND=jax python benchmarks/pipeline.py FOLDER --model rednet26 --batch-size 32

Steps are those of `involution train --recipe imagenet`; the first one, which compiles, does not
count. `step` trains on images that are in memory. The three take turns.
"""

import argparse
import collections
import dataclasses
import statistics
import time

import keras
import numpy as np

from involution import data, experiment, files, memory, model_labels, training
from involution.crops import MIDDLE


def timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--model", default="rednet26")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output")
    given = parser.parse_args()
    memory.keep_freed()
    recipe = dataclasses.replace(training.RECIPES["imagenet"], batch_size=given.batch_size)
    stored = data.load(given.folder, (given.side, given.side), crop=MIDDLE)
    order = data.order(len(stored.x_train), 0, 1)[: given.batches * given.batch_size]
    count = len(order)
    held = dataclasses.replace(stored, x_train=stored.x_train[order], y_train=stored.y_train[order])

    def trainer(dataset, recipe):
        ((label, builder),) = model_labels.parse(given.model).items()
        config = experiment.Config(given.folder, given.model)
        network = experiment.build(label, builder, dataset, config)
        return training.Trainer(network, dataset, recipe, 1, 0)

    both, alone = trainer(stored, recipe), trainer(held, dataclasses.replace(recipe, crop=False))
    parts = {
        "reading": lambda: collections.deque(both.batches(order), maxlen=0),
        "step": lambda: alone.train(np.arange(count)),
        "both": lambda: both.train(order),
    }
    for one in (alone, both):
        one.train(np.arange(given.batch_size))
    times = collections.defaultdict(list)
    for _ in range(given.repeats):
        for name, run in parts.items():
            times[name].append(timed(run))
    rows = [
        {
            "part": name,
            "images_per_second": round(count / statistics.median(seconds), 1),
            "least": round(count / max(seconds), 1),
            "most": round(count / min(seconds), 1),
            "model": given.model,
            "side": given.side,
            "batch_size": given.batch_size,
            "backend": keras.config.backend(),
        }
        for name, seconds in times.items()
    ]
    text = files.csv_text(rows[0], rows)
    print(text)
    if given.output:
        files.write_text(given.output, text)


if __name__ == "__main__":
    main()
