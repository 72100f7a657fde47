"""Runs that differ in their seed, as one table and one figure.

    python benchmarks/seeds.py RUN/FOLDER... --output STEM

Reads config.json and metrics.json of folders that ``involution compare`` or ``train`` wrote; writes
STEM.csv, a row for each model, recipe and seed, and STEM.png, mean accuracy against parameters and
multiply-adds; prints the means as Markdown.
"""

import argparse
import collections
import json
import pathlib
import statistics

from involution import files, visualize

COLUMNS = ("recipe", "model", "seed", "trainable_params", "multiply_adds", "test_accuracy")


def rows(folders):
    for folder in map(pathlib.Path, folders):
        config, metrics = (
            json.loads((folder / f"{name}.json").read_text()) for name in ("config", "metrics")
        )
        for label, model in metrics["models"].items():
            if model["epochs"] == config["epochs"]:
                yield {
                    "recipe": config["recipe"],
                    "model": label.rsplit("controls.py:", 1)[-1],
                    "seed": config["seed"],
                    **{column: model[column] for column in COLUMNS[3:]},
                }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--output", type=pathlib.Path, required=True)
    options = parser.parse_args()
    found = sorted(rows(options.folders), key=lambda r: (r["recipe"], r["model"], r["seed"]))
    files.write_text(options.output.with_suffix(".csv"), files.csv_text(COLUMNS, found))
    groups = collections.defaultdict(list)
    for row in found:
        groups[row["recipe"], row["model"]].append(row)
    print("| recipe | model | parameters | multiply-adds | accuracy, mean | of each seed |")
    print("|---|---|---|---|---|---|")
    means = {}
    for (recipe, model), runs in sorted(groups.items(), key=lambda g: -mean(g[1])):
        first = runs[0]
        each = ", ".join(f"{r['test_accuracy']:.4f}" for r in runs)
        print(
            f"| {recipe} | {model} | {first['trainable_params']:,} | "
            f"{first['multiply_adds'] / 1e6:.2f} M | {mean(runs):.4f} | {each} |"
        )
        means[f"{model}, {recipe}"] = first | {"test_accuracy": mean(runs)}
    with files.replacing(options.output.with_suffix(".png")) as temporary:
        visualize.costs(means).savefig(temporary, format="png", dpi=110)


def mean(runs):
    return statistics.fmean(run["test_accuracy"] for run in runs)


if __name__ == "__main__":
    main()
