"""Compatibility with version 0.1: its runs and studies resume, and stored names stay the same.

Version 0.1 wrote `tests/support/files/version_0_1` on PyTorch, before settings were renamed:

- `run`: a run interrupted during its second model
- `history.csv`: the history of the same run without the interruption
- `sweep`: a study with two trials
- `identities.json`: settings as checkpoints and studies store them
"""

import csv
import json
import re
import shutil

import keras
import pytest

from involution.training import checkpoint, experiment, report, sweep
from involution.training.experiment import Config, compare, fingerprint
from involution.training.recipes import stored
from involution.utils.progress import NullProgress
from tests.support.images import write_folder
from tests.support.paths import FILES
from tests.training.test_experiment import Recorder

pytestmark = pytest.mark.any_backend

VERSION_0_1 = FILES / "version_0_1"
RENAMED = {
    "accumulate": "gradient_accumulation_steps",
    "ema": "ema_momentum",
    "validation": "validation_images",
}
# Keys whose values depend on the environment that wrote the files.
ENVIRONMENT = re.compile("version of .*|backend")


@pytest.fixture
def pets(tmp_path, monkeypatch):
    write_folder(tmp_path / "pets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "write", lambda *_: None)
    return tmp_path


def to_current_config(config):
    settings = {RENAMED.get(name, name): value for name, value in config.items()}
    if "image_size" in settings:
        settings["image_size"] = tuple(settings["image_size"])
    return Config(**settings)


@pytest.mark.parametrize("case", json.loads((VERSION_0_1 / "identities.json").read_text()), ids=str)
def test_stored_setting_names_are_unchanged(case, pets):
    config = to_current_config(case["config"])
    dataset = experiment.load(Config("pets", validation_images=3), NullProgress())
    run = experiment.Run(config, dataset, config.recipe_for(dataset), [], "", "")
    assert stored(run.recipe) == {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in case["training"].items()
    }
    found, expected = fingerprint(run), case["identity"]
    assert {k: v for k, v in found.items() if not ENVIRONMENT.fullmatch(k)} == {
        k: v for k, v in expected.items() if not ENVIRONMENT.fullmatch(k)
    }
    if case["plan"] is not None:
        search = sweep.SweepConfig(config, ("learning_rate=0.1,0.2",), 3)
        assert sweep._fingerprint(search) == case["plan"]


def builder(input_shape, classes):
    inputs = keras.Input(input_shape)
    x = keras.layers.GlobalAveragePooling2D()(inputs)
    x = keras.layers.BatchNormalization()(x)
    return keras.Model(inputs, keras.layers.Dense(classes)(x))


def history(file):
    return list(csv.DictReader(file.read_text().splitlines()))


@pytest.mark.long
def test_run_of_version_0_1_resumes(pets):
    shutil.copytree(VERSION_0_1 / "run", pets / "run")
    config = Config(
        "pets",
        epochs=2,
        batch_size=6,
        recipe="one-cycle",
        gradient_accumulation_steps=2,
        ema_momentum=0.5,
        validation_images=3,
        clip_norm=1.0,
        learning_rate=0.02,
    )
    progress = Recorder()
    # Versions may differ with `allow_config_change`; settings may not, as one model is trained.
    compare(
        config,
        "run",
        progress,
        {"one": builder, "two": builder},
        resume=True,
        allow_config_change=True,
    )
    assert "Resuming from checkpoint 5." in progress.lines
    # 36 images are read, and 8 of the 28 steps of both models remain.
    assert progress.steps == 36 + 8
    rows, expected_rows = (
        history(pets / "run" / "history.csv"),
        history(VERSION_0_1 / "history.csv"),
    )
    assert rows[:2] == expected_rows[:2]
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert (row.pop("model"), row.pop("epoch")) == (
            expected_row.pop("model"),
            expected_row.pop("epoch"),
        )
        for name, value in expected_row.items():
            assert float(row[name]) == pytest.approx(float(value), rel=1e-3)
    saved = checkpoint.CheckpointManager(pets / "run").latest(print)
    assert set(saved.state) == {"identity", "results", "at"}
    assert saved.state["identity"].keys() >= {"accumulate", "ema", "validation", "recipe: warm_up"}


@pytest.mark.long
def test_study_of_version_0_1_resumes(pets):
    shutil.copytree(VERSION_0_1 / "sweep", pets / "sweep")
    shutil.copy(VERSION_0_1 / "network.py", pets)
    config = Config(
        "pets",
        "network.py",
        epochs=1,
        batch_size=8,
        gradient_accumulation_steps=2,
        ema_momentum=0.5,
        validation_images=4,
    )
    search = sweep.SweepConfig(config, ("width=2..40", "learning_rate=0.001..0.1"), 3)
    assert sweep.run(search, pets / "sweep").trials == 3
    before, after = (
        {r["trial"]: r for r in history(f / "trials.csv")}
        for f in (VERSION_0_1 / "sweep", pets / "sweep")
    )
    assert len(after) == 3
    assert {number: after[number] for number in before} == before
