"""Measures the figures of README.md again: make figures, or make figures DATA=cifar10-jpeg

prints a table of each figure, its command, the value in README.md and the value of this run, and
writes it to docs/results/figures.md. Without DATA it takes about three minutes, and the values of
CIFAR-10 are those on record in docs/results. With DATA, the folder of CIFAR-10 as JPEG files, the
networks of three seeds are trained, 25 minutes, and the pictures in docs/results/cifar10-jpeg are
those of the first. Figures of rednet_tiny are means of the runs on record. Times are those of this
machine; accuracies can differ in the third digit between CPUs.
"""

import argparse
import csv
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import time
from datetime import date
from typing import NamedTuple

from involution.benchmarking.devices import Cpu
from involution.utils import atomic_files

ROOT = pathlib.Path(__file__).parents[2]
README = ROOT / "README.md"
RESULTS = ROOT / "docs/results"
CIFAR10 = RESULTS / "cifar10-jpeg"
RECORD = RESULTS / "figures.md"
SEEDS = (42, 43, 44)
CASES, CANDIDATES = ("red1", "red4"), ("native", "im2col", "conv3")
PICTURES = ("curves.png", "heatmaps-inn.png", "samples.png", "words.png")


class Figures(NamedTuple):
    """Figures of one sentence or row of README.md, in its order."""

    command: str
    pattern: str  # of README.md on one line, a group for each figure
    names: tuple[str, ...]

    def written(self) -> tuple[str, ...]:
        """Their values in README.md."""
        found = re.findall(self.pattern, " ".join(README.read_text(encoding="utf-8").split()))
        if len(found) != 1:
            raise SystemExit(f"README.md must contain {self.pattern!r} once: {len(found)} times")
        return found[0]


DIGITS = Figures(
    "involution compare --dataset digits",
    r"digits, seed 42 \| ([\d.]+) \| ([\d.]+) \| (about [a-z ]+) \|",
    ("digits, cnn", "digits, inn", "digits, time"),
)
BENCH = Figures(
    "involution bench --cases red1,red4 --calls 5",
    r"first stage takes (\S+) ms, the keras.io example's formula (\S+) ms, Keras's 3x3 convolution "
    r"(\S+) ms; in the last stage (\S+), (\S+) and (\S+) ms",
    tuple(f"{case}, {name}, ms" for case in CASES for name in CANDIDATES),
)
CIFAR = Figures(
    "involution compare --dataset cifar10-jpeg --seed 42, 43, 44",
    r"CIFAR-10 \(JPEG\), mean of 3 seeds \| ([\d.]+) \| ([\d.]+) \| (\d+ minutes)",
    ("CIFAR-10, cnn", "CIFAR-10, inn", "CIFAR-10, time"),
)
REDNET_TINY = Figures(
    "docs/results/rednet_tiny/seeds.csv",
    r"reaches ([\d.]+) with `--recipe one-cycle` .* ([\d.]+) with kernels that do not depend on "
    r"the image, and ([\d.]+) with 3x3 depthwise",
    ("rednet_tiny", "static kernels", "depthwise"),
)
ALL = (DIGITS, BENCH, CIFAR, REDNET_TINY)


def involution(*arguments) -> float:
    """Runs a command; returns the seconds from its start to its end."""
    print("involution", *arguments, flush=True)
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    begun = time.perf_counter()
    command = [sys.executable, "-m", "involution_cli", *map(str, arguments)]
    subprocess.run(command, check=True, env=environment)  # noqa: S603 - our own command
    return time.perf_counter() - begun


def accuracies(folder) -> list[float]:
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return [metrics["models"][name]["test_accuracy"] for name in ("cnn", "inn")]


def digits(folder):
    seconds = involution("compare", "--dataset", "digits", "--output", folder / "digits")
    return [*(f"{value:.3f}" for value in accuracies(folder / "digits")), f"{seconds:.0f} s"]


def bench(folder):
    file = folder / "bench.csv"
    involution("bench", "--cases", "red1,red4", "--calls", 5, "--output", file)
    with file.open(encoding="utf-8") as lines:
        rows = {
            (row["case"], row["candidate"]): float(row["median_ms"])
            for row in csv.DictReader(lines)
            if row["passes"] == "forward+backward"
        }
    times = [rows[case, name] for case in CASES for name in CANDIDATES]
    return [f"{ms:,.0f}" if ms >= 10 else f"{ms:.1f}" for ms in times]


def cifar10(folder, data):
    if data is None:
        times = "not measured"
        found = [accuracies(CIFAR10 / f"seed-{seed}") for seed in SEEDS]
    else:
        runs = [folder / f"cifar10-{seed}" for seed in SEEDS]
        seconds = [
            involution("compare", "--dataset", data, "--seed", seed, "--output", run)
            for seed, run in zip(SEEDS, runs, strict=True)
        ]
        for name in PICTURES:
            shutil.copy(runs[0] / name, CIFAR10 / name)
        times = f"{statistics.mean(seconds) / 60:.0f} minutes"
        found = [accuracies(run) for run in runs]
    return [*(f"{statistics.mean(values):.3f}" for values in zip(*found, strict=True)), times]


def rednet_tiny():
    with (RESULTS / "rednet_tiny/seeds.csv").open(encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row["recipe"] == "one-cycle"]
    means = []
    for model in ("rednet_tiny", "rednet_tiny:kernel_generator=static", "depthwise"):
        values = [float(row["test_accuracy"]) for row in rows if row["model"] == model]
        means.append(f"{statistics.mean(values):.3f}")
    return means


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder with CIFAR-10 as JPEG files")
    data = parser.parse_args().data or None
    written = {figures: figures.written() for figures in ALL}
    folder = ROOT / "build/figures"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    measured = {
        DIGITS: digits(folder),
        BENCH: bench(folder),
        CIFAR: cifar10(folder, data),
        REDNET_TINY: rednet_tiny(),
    }
    lines = [
        "# Figures of README.md",
        "",
        f"`make figures`, {date.today()}: {Cpu().description()}.",
        "Accuracies of rednet_tiny, and without `DATA` of CIFAR-10, are means of runs on record.",
        "",
        "| figure | command or file | README.md | this run |",
        "|---|---|---|---|",
    ]
    for figures in ALL:
        values = zip(figures.names, written[figures], measured[figures], strict=True)
        for name, was, now in values:
            lines.append(f"| {name} | `{figures.command}` | {was} | {now} |")
    atomic_files.write_text(RECORD, "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
