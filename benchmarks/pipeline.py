"""Training throughput in images per second: of reading images, of the training step on images in
memory, and of both together with prefetching.

    KERAS_BACKEND=jax python benchmarks/pipeline.py FOLDER --model rednet26 --batch-size 32

Steps are those of `involution train --recipe imagenet`. The three run alternately; the first run,
which compiles, is not counted.
"""

import argparse
import collections
import dataclasses
import statistics

import keras
import numpy as np

from involution.benchmarking import runner
from involution.benchmarking.devices import DEVICES
from involution.data import datasets
from involution.data.transforms import CENTER_FRACTION
from involution.models import specs
from involution.training import experiment
from involution.training.recipes import RECIPES
from involution.training.trainer import Trainer
from involution.utils import atomic_files, memory


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--model", default="rednet26")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="minimum total of each, with at least three runs"
    )
    parser.add_argument("--output")
    options = parser.parse_args()
    memory.disable_malloc_trim()
    recipe = dataclasses.replace(RECIPES["imagenet"], batch_size=options.batch_size)
    on_disk = datasets.load(
        options.folder, (options.side, options.side), crop_fraction=CENTER_FRACTION
    )
    order = datasets.epoch_permutation(len(on_disk.x_train), 0, 1)[
        : options.batches * options.batch_size
    ]
    count = len(order)
    in_memory = dataclasses.replace(
        on_disk, x_train=on_disk.x_train[order], y_train=on_disk.y_train[order]
    )

    def trainer(dataset, recipe):
        ((label, builder),) = specs.parse(options.model).items()
        config = experiment.Config(options.folder, options.model)
        network = experiment.build(label, builder, dataset, config)
        return Trainer(network, dataset, recipe, 1, 0)

    both, step = (
        trainer(on_disk, recipe),
        trainer(in_memory, dataclasses.replace(recipe, random_crop=False)),
    )
    parts = {
        "reading": lambda: collections.deque(both.batches(order), maxlen=0),
        "step": lambda: step.train(np.arange(count)),
        "both": lambda: both.train(order),
    }
    timers = {name: DEVICES["cpu"].timer(run) for name, run in parts.items()}
    times = runner.measure(timers, options.seconds)
    rows = [
        {
            "part": name,
            "images_per_second": round(count / statistics.median(seconds), 1),
            "least": round(count / max(seconds), 1),
            "most": round(count / min(seconds), 1),
            "model": options.model,
            "side": options.side,
            "batch_size": options.batch_size,
            "backend": keras.config.backend(),
        }
        for name, seconds in times.items()
    ]
    text = atomic_files.csv_text(rows[0], rows)
    print(text)
    if options.output:
        atomic_files.write_text(options.output, text)


if __name__ == "__main__":
    main()
