"""The example programs run in their quick forms."""

import json
import re
import runpy
import sys

import numpy as np
import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.any_backend

FOLDER = ROOT / "examples"
SHARED = {"common", "experiments", "photographs"}
EXPERIMENTS = {"associative_recall", "guided_upsampling", "varying_noise"}
EXAMPLES = sorted({f.stem for f in FOLDER.glob("*.py")} - SHARED - EXPERIMENTS)


def test_examples_are_found():
    assert {"denoising", "segmentation", "series"} <= set(EXAMPLES)


@pytest.mark.long
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name, monkeypatch, tmp_path, capsys):
    run(name, monkeypatch, "--quick", "--output", str(tmp_path / "picture.png"))
    rows = re.findall(r"^\| (\w+) \| ([\d,]+) \| ([\d.]+) \|$", capsys.readouterr().out, re.M)
    results = {row[0]: (int(row[1].replace(",", "")), float(row[2])) for row in rows}
    involution, convolution = results["involution"], results["convolution"]
    # Parameter counts of small networks cannot be equal: numbers of channels are integers.
    assert involution[0] == pytest.approx(convolution[0], rel=0.3)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def run(name, monkeypatch, *arguments):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")


def runs(folder):
    """The last metric of each run, by task and arm; checks that arms of a task have one size."""
    found = json.loads((folder / "runs.json").read_text())["runs"]
    for task in {run["task"] for run in found}:
        sizes = [run["parameters"] for run in found if run["task"] == task]
        sizes = [n for n in sizes if n > 1000]  # those with a trunk
        assert max(sizes) <= 1.02**2 * min(sizes), task
    return {(run["task"], run["arm"]): run["curve"] for run in found}


@pytest.mark.long
def test_noise_that_varies_by_place(monkeypatch, tmp_path):
    example = run("varying_noise", monkeypatch, "--output", str(tmp_path))
    fixed, inverse_variance, best = example["bounds"]().values()
    # Published for this setting, from another sample: 8.54, 10.82 (not optimized), 11.67 dB.
    assert fixed == pytest.approx(8.54, abs=0.05)
    assert 10.8 < inverse_variance < best
    assert best == pytest.approx(11.5, abs=0.2)
    found = runs(tmp_path)
    assert found.keys() == {(t, a) for t in ("field", "photograph") for a in example["ARMS"]}
    for (task, arm), curve in found.items():
        if task == "field":
            # Every arm uses the map of the noise, and none exceeds the bound.
            assert fixed < curve[-1][1] < best + 0.1, arm
            assert curve[-1][1] > curve[0][1], arm
    for name in ("curves.png", "field.png", "photograph.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_guided_upsampling_starts_from_the_bilinear_interpolation(monkeypatch, tmp_path):
    example = run("guided_upsampling", monkeypatch, "--output", str(tmp_path))
    curves = {arm: curve for (_, arm), curve in runs(tmp_path).items()}
    assert curves.keys() == {"bilinear", *example["networks"]()}
    for arm, curve in curves.items():
        # A few steps change it by a fraction of a decibel.
        assert curve[-1][1] > curves["bilinear"][-1][1] - 0.5, arm
    for name in ("curves.png", "chelsea.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_sequences_of_the_recall_tasks(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    example = runpy.run_path(str(FOLDER / "associative_recall.py"))
    tokens, targets = example["recall"](50, np.random.default_rng(0))
    for row, target in zip(tokens.tolist(), targets.tolist(), strict=True):
        stored, key = {}, []
        for token, value in zip(row, target, strict=True):
            if token >= example["FIRST_VALUE"]:
                assert tuple(key) not in stored
                stored[tuple(key)], key = token, []
            elif token:
                key.append(token)
                if value != example["IGNORED"]:
                    assert stored[tuple(key)] == value
                    key = []
        assert not key
        assert len(stored) in example["PAIRS"]
        assert sum(value != example["IGNORED"] for value in target) == min(len(stored), 6)
    tokens, targets = example["copy"](5, np.random.default_rng(0))
    letters, steps = np.divmod(tokens - 1, 8)
    assert steps.max() == 7
    for row, position in np.ndindex(*tokens.shape):
        assert targets[row, position] == letters[row, position - steps[row, position]]


@pytest.mark.long
def test_short_convolutions_learn(monkeypatch, tmp_path):
    example = run("associative_recall", monkeypatch, "--output", str(tmp_path))
    found = runs(tmp_path)
    assert found.keys() == {(t, a) for t in ("copy", "recall") for a in example["ARMS"]}
    for (task, arm), curve in found.items():
        # Above chance. The quick form does not train `recall` for long enough.
        assert curve[-1][1] > 100 / 16 or task == "recall", (task, arm)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
