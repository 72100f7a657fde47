"""What the examples share: twins of equal size, one recipe, one table."""

import argparse
import bisect
import functools
import pathlib

import keras
import numpy as np


def arguments(text, output):
    """The command line of an example."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(output))
    parser.add_argument("--quick", action="store_true", help="a moment's training, to see it run")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def size(model):
    """Trainable parameters."""
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)


def nearest(target, make, widths):
    """The network ``make(width)`` that comes nearest to ``target`` in parameters."""
    make = functools.cache(make)
    above = bisect.bisect_left(widths, size(target), key=lambda width: size(make(width)))
    candidates = [make(width) for width in widths[max(above - 1, 0) : above + 1]]
    return min(candidates, key=lambda m: abs(size(m) - size(target)))


def train(model, x, y, loss, epochs, seed, batch_size=32, learning_rate=5e-3):
    """AdamW, with a rate that rises and falls: the same for every network."""
    keras.utils.set_random_seed(seed)
    steps = epochs * -(-len(x) // batch_size)
    rate = keras.optimizers.schedules.CosineDecay(
        learning_rate / 10, steps, warmup_target=learning_rate, warmup_steps=steps // 5
    )
    model.compile(keras.optimizers.AdamW(rate, weight_decay=1e-2), loss)
    for epoch in range(epochs):
        history = model.fit(x, y, batch_size, epochs=1, verbose=0)
        print(f"{model.name}: epoch {epoch + 1}/{epochs}, loss {history.history['loss'][0]:.5f}")


def table(measure, rows):
    """Prints (name, parameters, figure) as Markdown."""
    print(f"\n| network | parameters | {measure} |\n|---|---|---|")
    for name, parameters, figure in rows:
        print(f"| {name} | {parameters:,} | {figure} |")
