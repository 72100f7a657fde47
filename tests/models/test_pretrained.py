"""Pretrained models: they match their model cards; how they are packaged."""

import importlib.util
import json
import sys

import numpy as np
import pytest

from involution import models
from involution.models import pretrained, weights
from involution.saving.classifier import DEFAULT
from involution.saving.classifier import load as load_classifier
from involution.training import experiment
from tests.support.backends import numpy
from tests.support.images import write_folder
from tests.support.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
LIMIT = 2_000_000


def script(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_size_and_model_cards():
    assert DEFAULT in pretrained.available()
    assert {"cnn-cifar10", "inn-cifar10", "rednet_tiny-cifar10"} == set(pretrained.available())
    sizes = [f.stat().st_size for f in pretrained.ROOT.rglob("*") if f.is_file()]
    assert sum(sizes) < LIMIT
    for name in pretrained.available():
        card = (pretrained.path(name) / "README.md").read_text(encoding="utf-8")
        accuracy = weights.read_config(pretrained.path(name))["extra"]["test_accuracy"]
        for part in (
            f"# {name}\n",
            "| recipe |",
            "involution compare",
            f"{accuracy:.4f}",
            "keras ",
        ):
            assert part in card, (name, part)


@pytest.mark.long
@pytest.mark.parametrize("name", pretrained.available())
def test_outputs_match_those_at_packaging(name):
    model = models.load(name)
    metadata = weights.read_config(pretrained.path(name))["extra"]
    ramp = np.linspace(0, 1, 32 * 32 * 3, dtype="float32").reshape(1, 32, 32, 3)
    np.testing.assert_allclose(
        numpy(model(ramp))[0], metadata["logits_of_a_ramp"], rtol=1e-4, atol=1e-4
    )
    classifier = load_classifier(name)
    assert classifier.image_shape == (32, 32, 3)
    assert classifier.class_names[3] == "cat"
    np.testing.assert_allclose(classifier.predict_proba(ramp).sum(), 1, rtol=1e-5)


def test_unknown_names_are_rejected():
    with pytest.raises(ValueError, match=r"one of cnn-cifar10, inn-cifar10.* Received: 'magic'"):
        models.load("magic")
    with pytest.raises(ValueError, match=r"Received: '\.\./trained/inn-cifar10'"):
        models.load("../trained/inn-cifar10")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs with different seeds."""
    folder = tmp_path_factory.mktemp("runs")
    pets = write_folder(folder / "pets")
    for seed in (1, 2):
        config = experiment.Config(
            str(pets), "inn:head=convolutional,cnn:filters=2-3-4", 2, seed=seed
        )
        experiment.compare(config, folder / str(seed), command="involution compare --epochs 2")
    return folder


@pytest.mark.slow
@pytest.mark.any_backend
def test_a_run_is_packaged(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrained, "ROOT", tmp_path)
    script("ship").ship(runs / "1", "cnn:filters=2-3-4", "small")
    assert pretrained.available() == ["small"]
    classifier = load_classifier("small")
    original = load_classifier(runs / "1" / "cnn-filters=2-3-4.keras")
    assert classifier.class_names == original.class_names
    x = np.random.default_rng(0).random((2, *classifier.image_shape), "float32")
    np.testing.assert_array_equal(numpy(classifier.model(x)), numpy(original.model(x)))
    card = (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    accuracy = json.loads((runs / "1" / "metrics.json").read_text())["models"]["cnn:filters=2-3-4"][
        "test_accuracy"
    ]
    for part in ("# small\n", "example, 2 epochs", "learning_rate 0.001", f"{accuracy:.4f}", "ant"):
        assert part in card
    assert str(tmp_path / "small") in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.any_backend
def test_table_and_figure_of_seeds(runs, tmp_path, monkeypatch, capsys):
    stem = tmp_path / "table"
    monkeypatch.setattr(
        sys, "argv", ["seeds", str(runs / "1"), str(runs / "2"), "--output", str(stem)]
    )
    script("seeds").main()
    lines = stem.with_suffix(".csv").read_text().splitlines()
    assert lines[0] == "recipe,epochs,model,seed,trainable_params,multiply_adds,test_accuracy"
    assert [line.split(",")[2:4] for line in lines[1:]] == [
        ["cnn:filters=2-3-4", "1"],
        ["cnn:filters=2-3-4", "2"],
        ["inn:head=convolutional", "1"],
        ["inn:head=convolutional", "2"],
    ]
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4
    each = [float(line.split(",")[-1]) for line in lines[1:3]]
    row = next(line for line in printed if "| cnn:filters=2-3-4 |" in line)
    assert f"| {sum(each) / 2:.4f} | {each[0]:.4f}, {each[1]:.4f} |" in row
