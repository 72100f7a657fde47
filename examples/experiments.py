"""Shared by the experiments of "When to use involution": arms of equal size, repeated, compared.

An experiment trains several arms, networks that differ in one part, with the same seeds. Its
results are a JSON file with every run, a table with means, standard errors and paired tests, and
figures.
"""

import argparse
import json
import os
import pathlib
import platform
import sys
import time

import keras
import numpy as np
from common import nearest, size
from scipy import stats

from involution.utils.atomic_files import atomic_write, write_json
from involution.utils.environment import versions
from involution.visualize.colors import PALETTE


def arguments(text, name):
    """Parses the command line of an experiment."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="as in the published results")
    parser.add_argument("--seeds", type=int, help="number of repetitions (1; with --full 5)")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path(name), help="folder of the results"
    )
    parser.add_argument("--resume", action="store_true", help="skip the runs that are in --output")
    options = parser.parse_args()
    options.seeds = options.seeds or (5 if options.full else 1)
    return options


def of_size(target, make, widths):
    """``common.nearest``, within 2 %.

    Raises:
        ValueError: No width gives that.
    """
    best = nearest(target, make, widths)
    if abs(size(best) - size(target)) > 0.02 * size(target):
        raise ValueError(
            f"No width gives {size(target)} parameters within 2 %: {best.name} {size(best)}"
        )
    return best


class Results:
    """The runs of an experiment, in ``runs.json`` of its folder after each of them."""

    def __init__(self, options):
        self.folder = options.output
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "runs.json"
        self.runs = json.loads(self.file.read_text())["runs"] if options.resume else []

    def has(self, **key) -> bool:
        return bool(self.of(**key))

    def add(self, **run):
        self.runs.append(run)
        content = {
            "command": " ".join(["python", *sys.argv]),
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "versions": versions(),
            "runs": self.runs,
        }
        write_json(self.file, content)

    def of(self, **key) -> list[dict]:
        """The runs with this key, in the order of the seeds."""
        runs = sorted(self.runs, key=lambda run: run["seed"])
        return [run for run in runs if all(run[name] == value for name, value in key.items())]

    def values(self, metric, **key) -> dict[str, list[float]]:
        """By arm, the metric of the runs with this key, in the order of the seeds."""
        found: dict[str, list] = {}
        for run in self.of(**key):
            found.setdefault(run["arm"], []).append(run[metric])
        return found

    def table(self, metric, title, reference, digits=2, **key):
        """Prints a Markdown table: every seed, mean and standard error, and the difference from
        the arm ``reference`` with the probability of a paired t-test."""
        found = self.values(metric, **key)
        seeds = sorted({run["seed"] for run in self.of(**key)})
        heads = [f"seed {seed}" for seed in seeds]
        print(
            f"\n{title}\n\n| arm | parameters | {' | '.join(heads)} | mean | {reference} minus it |"
        )
        print("|---|" + "---|" * (len(seeds) + 3))
        for arm, values in found.items():
            parameters = next(run["parameters"] for run in self.of(**key, arm=arm))
            error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
            cells = [f"{value:.{digits}f}" for value in values]
            mean = f"{np.mean(values):.{digits}f} ± {error:.{digits}f}"
            print(
                f"| {arm} | {parameters:,} | {' | '.join(cells)} | {mean} | "
                f"{_difference(found[reference], values, digits)} |"
            )


def _difference(reference, values, digits) -> str:
    if values is reference:
        return ""
    difference = f"{np.mean(np.subtract(reference, values)):+.{digits}f}"
    if len(values) < 2 or np.ptp(np.subtract(reference, values)) == 0:
        return difference
    return f"{difference}, p = {stats.ttest_rel(reference, values).pvalue:.2g}"


def fit(model, loss, batches, steps, evaluate, every, learning_rate=3e-3):
    """Trains by AdamW with linear warmup and cosine decay.

    Args:
        model: The network.
        loss: Its loss function.
        batches: Function of a number of batches that returns the inputs and targets of all.
        steps: Number of steps.
        evaluate: Function without arguments that returns the metric.
        every: Steps between evaluations.

    Returns:
        The curve, pairs of step and metric, and the seconds of training without evaluation.
    """
    rate = keras.optimizers.schedules.CosineDecay(
        learning_rate / 10, steps, warmup_target=learning_rate, warmup_steps=steps // 10
    )
    model.compile(keras.optimizers.AdamW(rate, weight_decay=1e-4, global_clipnorm=1.0), loss)
    curve, seconds = [], 0.0
    for step in range(every, steps + 1, every):
        inputs, targets, batch_size = batches(every)
        start = time.perf_counter()
        history = model.fit(inputs, targets, batch_size, epochs=1, verbose=0, shuffle=False)
        seconds += time.perf_counter() - start
        value = float(evaluate())
        curve.append((step, value))
        print(
            f"{model.name}: step {step} of {steps}, loss {history.history['loss'][0]:.5f}, "
            f"metric {value:.4f}",
            flush=True,
        )
    return curve, seconds


def train_arms(results, key, arms, batches, loss, evaluate, steps, every, keep=None, **options):
    """Trains the arms that the results lack, from the same seed, on the same data.

    Args:
        results: Receives the runs.
        key: The task and the seed, and whatever else identifies a run.
        arms: Function that returns the networks by name; those of a call have new weights.
        batches: Function of a number of batches and a random generator, for ``fit``.
        loss, steps, every: As for ``fit``.
        evaluate: Function of a network that returns metrics by name; the first has the curve.
        keep: Function of a network's name and the network, called after its training.
        **options: Of ``fit``.
    """
    for arm in arms():
        if results.has(**key, arm=arm):
            continue
        keras.utils.set_random_seed(key["seed"])
        model = arms()[arm]
        random = np.random.default_rng([key["seed"], 1])
        metrics = {}

        def measure(model=model, metrics=metrics):
            metrics.update({name: float(value) for name, value in evaluate(model).items()})
            return next(iter(metrics.values()))

        def some_batches(count, random=random):
            return batches(count, random)

        curve, seconds = fit(model, loss, some_batches, steps, measure, every, **options)
        run = {"parameters": size(model), "curve": curve, **metrics, "seconds": round(seconds, 1)}
        if keep is not None:
            keep(arm, model)
        # Last: a run that is recorded has its files.
        results.add(**key, arm=arm, **run)


def save_arrays(file, arrays):
    """Writes arrays, by name, in half precision."""
    with atomic_write(file) as temporary:
        np.savez(temporary, **{name: array.astype("float16") for name, array in arrays.items()})


def steps_to(curve, level):
    """The step at which a curve reaches a level, by linear interpolation; None if it never does."""
    before = (0, None)
    for step, value in curve:
        if value >= level:
            if before[1] is None:
                return step
            return before[0] + (step - before[0]) * (level - before[1]) / (value - before[1])
        before = (step, value)
    return None


def draw_curves(ax, results, label, lines=(), **key):
    """Mean learning curves of the arms over the seeds, with the range; horizontal lines."""
    for (arm, curves), color in zip(results.values("curve", **key).items(), PALETTE, strict=False):
        steps, values = np.moveaxis(np.array(curves), -1, 0)
        ax.plot(steps[0], values.mean(0), color=color, label=arm)
        ax.fill_between(steps[0], values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
    for name, value in lines:
        ax.axhline(value, color="0.4", linestyle=":", lw=1)
        ax.annotate(
            name,
            (1, value),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
        )
    ax.set_xlabel("step")
    ax.set_ylabel(label)
    ax.grid(alpha=0.3)
