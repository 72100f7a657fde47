"""Shared by the examples: models of equal size, a training recipe, and a table."""

import argparse
import bisect
import functools
import pathlib

import keras
import numpy as np


def arguments(text, output):
    """Parses the command line of an example."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(output))
    parser.add_argument("--quick", action="store_true", help="train briefly, as a smoke test")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def size(model):
    """Number of trainable parameters."""
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)


def nearest(target, make, widths):
    """The network ``make(width)`` with the parameter count closest to ``target``'s."""
    make = functools.cache(make)
    above = bisect.bisect_left(widths, size(target), key=lambda width: size(make(width)))
    candidates = [make(width) for width in widths[max(above - 1, 0) : above + 1]]
    return min(candidates, key=lambda m: abs(size(m) - size(target)))


def train(model, x, y, loss, epochs, seed, batch_size=32, learning_rate=5e-3):
    """Trains by AdamW with linear warmup and cosine decay."""
    keras.utils.set_random_seed(seed)
    steps = epochs * -(-len(x) // batch_size)
    rate = keras.optimizers.schedules.CosineDecay(
        learning_rate / 10, steps, warmup_target=learning_rate, warmup_steps=steps // 5
    )
    model.compile(keras.optimizers.AdamW(rate, weight_decay=1e-2), loss)
    for epoch in range(epochs):
        history = model.fit(x, y, batch_size, epochs=1, verbose=0)
        print(f"{model.name}: epoch {epoch + 1}/{epochs}, loss {history.history['loss'][0]:.5f}")


def table(metric, rows):
    """Prints (name, parameters, value) as Markdown."""
    print(f"\n| network | parameters | {metric} |\n|---|---|---|")
    for name, parameters, value in rows:
        print(f"| {name} | {parameters:,} | {value} |")
