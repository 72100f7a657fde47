"""Aggregates runs over seeds into a table and a figure.

    python benchmarks/seeds.py RUN/FOLDER... [TABLE.csv...] --output STEM

Reads config.json and metrics.json of folders written by ``involution compare`` or ``train``, and
tables written by this script. Writes STEM.csv, one row for each model, recipe, number of epochs and
seed, and STEM.png, mean test accuracy against parameters and multiply-adds; prints the means as
Markdown.
"""

import argparse
import collections
import csv
import json
import pathlib
import statistics

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


def _run(folder):
    config, metrics = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("config", "metrics")
    )
    for label, model in metrics["models"].items():
        if model["epochs"] == config["epochs"]:
            yield {
                "recipe": config["recipe"],
                "epochs": config["epochs"],
                "model": label.rsplit("controls.py:", 1)[-1],
                "seed": config["seed"],
                **{column: model[column] for column in COLUMNS[4:]},
            }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--output", type=pathlib.Path, required=True)
    options = parser.parse_args()
    found = sorted(rows(options.paths), key=lambda r: [r[c] for c in COLUMNS[:4]])
    atomic_files.write_text(
        options.output.with_suffix(".csv"), atomic_files.csv_text(COLUMNS, found)
    )
    groups = collections.defaultdict(list)
    for row in found:
        groups[row["recipe"], row["epochs"], row["model"]].append(row)
    print("| recipe | epochs | model | parameters | multiply-adds | mean accuracy | by seed |")
    print("|---|---|---|---|---|---|---|")
    means = {}
    for (recipe, epochs, model), runs in sorted(groups.items(), key=lambda g: -mean(g[1])):
        first = runs[0]
        each = ", ".join(f"{r['test_accuracy']:.4f}" for r in runs)
        print(
            f"| {recipe} | {epochs} | {model} | {first['trainable_params']:,} | "
            f"{first['multiply_adds'] / 1e6:.2f} M | {mean(runs):.4f} | {each} |"
        )
        means[f"{model}, {recipe}"] = first | {"test_accuracy": mean(runs)}
    with atomic_files.atomic_write(options.output.with_suffix(".png")) as temporary:
        figures.accuracy_vs_cost(means).savefig(temporary, format="png", dpi=110)


def mean(runs):
    return statistics.fmean(run["test_accuracy"] for run in runs)


if __name__ == "__main__":
    main()
