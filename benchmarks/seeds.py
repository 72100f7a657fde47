"""Aggregates runs over seeds into a table and a figure.

    python benchmarks/seeds.py RUN/FOLDER... [TABLE.csv...] --output STEM [--baseline MODEL]

Reads config.json and metrics.json of folders written by ``involution compare`` or ``train``, and
tables written by this script. Writes STEM.csv, one row for each model, recipe, number of epochs and
seed, and STEM.png, mean test accuracy against parameters and multiply-adds; prints the means with
their standard errors as Markdown. With a baseline, a model of the same recipe, also the mean
difference from it over the seeds of both, and the p-value of a paired t-test.
"""

import argparse
import collections
import csv
import json
import math
import pathlib
import statistics

from scipy import stats

from involution.utils import atomic_files
from involution.visualize import figures

COLUMNS = (
    "recipe",
    "epochs",
    "model",
    "seed",
    "trainable_params",
    "multiply_adds",
    "test_accuracy",
)


def rows(paths):
    for path in map(pathlib.Path, paths):
        if path.suffix == ".csv":
            with open(path, encoding="utf-8") as table:
                for row in csv.DictReader(table):
                    numbers = {c: int(row[c]) for c in COLUMNS[:-1] if row[c].isdigit()}
                    yield {**row, **numbers, "test_accuracy": float(row["test_accuracy"])}
        else:
            yield from _run(path)


def distinct(found):
    """The rows, in order; each run is in them once."""
    runs = {tuple(row[c] for c in COLUMNS[:4]): row for row in found}
    return [runs[key] for key in sorted(runs)]


def _run(folder):
    config, metrics = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("config", "metrics")
    )
    for label, model in metrics["models"].items():
        if model["epochs"] == config["epochs"]:
            yield {
                "recipe": config["recipe"],
                "epochs": config["epochs"],
                "model": label.rsplit(".py:", 1)[-1],
                "seed": config["seed"],
                **{column: model[column] for column in COLUMNS[4:]},
            }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--baseline", help="model that the others are compared with")
    options = parser.parse_args()
    found = distinct(rows(options.paths))
    atomic_files.write_text(
        options.output.with_suffix(".csv"), atomic_files.csv_text(COLUMNS, found)
    )
    groups = collections.defaultdict(list)
    for row in found:
        groups[row["recipe"], row["epochs"], row["model"]].append(row)
    if options.baseline and options.baseline not in {model for _, _, model in groups}:
        parser.error(f"--baseline must be one of the models. Received: {options.baseline}")
    headings = ["recipe", "epochs", "model", "parameters", "multiply-adds", "accuracy", "by seed"]
    if options.baseline:
        headings.append(f"minus {options.baseline}")
    print(f"| {' | '.join(headings)} |")
    print("|---" * len(headings) + "|")
    means = {}
    for (recipe, epochs, model), runs in sorted(groups.items(), key=lambda g: -mean(g[1])):
        first = runs[0]
        each = ", ".join(f"{r['test_accuracy']:.4f}" for r in runs)
        baseline = groups.get((recipe, epochs, options.baseline), [])
        accuracy = f"{mean(runs):.4f}{standard_error(runs)}"
        print(
            f"| {recipe} | {epochs} | {model} | {first['trainable_params']:,} | "
            f"{first['multiply_adds'] / 1e6:.2f} M | {accuracy} | {each} |"
            + (f" {difference(runs, baseline)} |" if options.baseline else "")
        )
        means[f"{model}, {recipe}"] = first | {"test_accuracy": mean(runs)}
    with atomic_files.atomic_write(options.output.with_suffix(".png")) as temporary:
        figures.accuracy_vs_cost(means).savefig(temporary, format="png", dpi=110)


def mean(runs):
    return statistics.fmean(run["test_accuracy"] for run in runs)


def standard_error(runs) -> str:
    if len(runs) < 2:
        return ""
    values = [run["test_accuracy"] for run in runs]
    return f" ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}"


def difference(runs, baseline) -> str:
    """The mean difference in percentage points, and the p-value of a paired t-test."""
    others = {run["seed"]: run["test_accuracy"] for run in baseline}
    pairs = [(run["test_accuracy"], others[run["seed"]]) for run in runs if run["seed"] in others]
    if runs is baseline or len(pairs) < 2:
        return "-"
    differences = [a - b for a, b in pairs]
    text = f"{100 * statistics.fmean(differences):+.2f} points"
    if min(differences) == max(differences):
        return text
    return f"{text}, p = {stats.ttest_1samp(differences, 0).pvalue:.2g}"


if __name__ == "__main__":
    main()
