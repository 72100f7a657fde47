"""Resuming runs after interruptions, signals, full disks and corrupt files."""

import errno
import functools
import json
import os
import pathlib
import re
import signal

import keras
import pytest

from involution import models
from involution.saving import classifier
from involution.training import checkpoint, distributed, report
from involution.training.checkpoint import CheckpointManager
from involution.training.experiment import Config, compare
from involution.utils import atomic_files
from involution.utils.errors import InputError, WriteError
from involution.utils.progress import NullProgress
from tests.support.images import write_folder

pytestmark = pytest.mark.any_backend


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "pets")


def builder(input_shape, classes, width=4):
    """A model with every kind of state: weights, moving statistics, a seed generator."""
    inputs = keras.Input(input_shape)
    x = keras.layers.Conv2D(width, 3)(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(0.3, seed=1)(keras.layers.ReLU()(x))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(classes)(x))


@pytest.fixture(autouse=True)
def skip_reports(monkeypatch):
    """A report takes longer than these runs; test_report.py tests it."""
    monkeypatch.setattr(report, "write", lambda *_: None)


BUILDERS = {"one": builder, "other": functools.partial(builder, width=5)}
ONE = {"one": builder}
STEPS = 20  # of both models; progress also counts the 36 images read before


def config(folder, **overrides):
    return Config(str(folder), **{"recipe": "one-cycle", "epochs": 2, "batch_size": 10} | overrides)


def outcome(output, builders=BUILDERS):
    """The results that must not depend on interruptions."""
    weights = {
        label: [w.tobytes() for w in classifier.load(output / f"{label}.keras").model.get_weights()]
        for label in builders
    }
    metrics = json.loads((output / "metrics.json").read_text())["models"]
    times = ("seconds", "seconds_per_epoch")
    metrics = {
        label: {k: v for k, v in values.items() if k not in times}
        for label, values in metrics.items()
    }
    return weights, metrics, (output / "history.csv").read_bytes()


class StopAfter(NullProgress):
    def __init__(self, steps, number=None):
        self.left, self.number, self.lines = 36 + steps, number, []

    def log(self, text):
        self.lines.append(text)

    def advance(self):
        self.left -= 1
        if self.left == 0 and self.number is None:
            raise KeyboardInterrupt
        if self.left == 0:
            signal.raise_signal(self.number)


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda *_: None)
        compare(config(folder), output, builders=BUILDERS)
    return outcome(output)


@pytest.mark.long
@pytest.mark.parametrize(
    "stops",
    [
        [2, 6, 4],
        *(pytest.param(stops, marks=pytest.mark.slow) for stops in ([1] * 20, [10], [20])),
    ],
    ids=str,
)
def test_resumed_run_equals_uninterrupted(folder, tmp_path, uninterrupted, stops):
    output = tmp_path / "run"
    for steps in stops:
        console = StopAfter(steps)
        run = compare(config(folder), output, console, BUILDERS, resume=True)
        assert run.exit_code == 130
        assert console.left == 0
    # Progress starts at the checkpoint, and no step is repeated.
    rest = StopAfter(10**6)
    run = compare(config(folder), output, rest, BUILDERS, resume=True)
    assert run.exit_code == 0
    assert 36 + 10**6 - rest.left == 36 + STEPS - sum(stops)
    assert any(line.startswith("Resuming from checkpoint ") for line in rest.lines)
    assert outcome(output) == uninterrupted
    # A finished run has no steps left.
    files = list((output / checkpoint.FOLDER).iterdir())
    (state,) = (file for file in files if not file.name.startswith("final-"))
    assert len(files) == 1 + len(BUILDERS)
    again = StopAfter(10**6)
    compare(config(folder), output, again, BUILDERS, resume=True)
    assert again.left == 10**6
    assert outcome(output) == uninterrupted
    assert state.stat().st_size < 5000


@pytest.mark.long
def test_corrupt_checkpoint_falls_back_to_the_previous_one(folder, tmp_path, uninterrupted):
    output = tmp_path / "run"
    compare(config(folder), output, StopAfter(4), BUILDERS, checkpoint_every=2)
    newest = max((output / checkpoint.FOLDER).iterdir())
    newest.write_bytes(newest.read_bytes()[:-100])
    console = StopAfter(10**6)
    compare(config(folder), output, console, BUILDERS, resume=True)
    assert sum(" is corrupt and skipped" in line for line in console.lines) == 1
    assert outcome(output) == uninterrupted


@pytest.mark.long
def test_model_with_modified_file_is_retrained(folder, tmp_path, uninterrupted):
    output = tmp_path / "run"
    compare(config(folder), output, StopAfter(10), BUILDERS)
    compare(config(folder), output, StopAfter(1), BUILDERS, resume=True)
    (output / "one.keras").write_bytes(b"hello")
    console = StopAfter(10**6)
    compare(config(folder), output, console, BUILDERS, resume=True)
    assert (
        sum("one.keras is missing or changed; training it again." in line for line in console.lines)
        == 1
    )
    assert outcome(output) == uninterrupted


@pytest.mark.long
def test_only_the_missing_model_is_retrained(folder, tmp_path, uninterrupted):
    output = tmp_path / "run"
    compare(config(folder), output, builders=BUILDERS)
    (output / "one.keras").unlink()
    compare(config(folder), output, StopAfter(3), BUILDERS, resume=True)
    rest = StopAfter(10**6)
    compare(config(folder), output, rest, BUILDERS, resume=True)
    assert 10**6 - rest.left == STEPS // 2 - 3
    assert outcome(output) == uninterrupted


@pytest.mark.long
def test_changed_settings_of_trained_models_are_rejected(folder, tmp_path):
    output = tmp_path / "run"
    compare(config(folder), output, builders=ONE)
    before = sorted(p.read_bytes() for p in output.rglob("*") if p.is_file())
    options = {"resume": True, "allow_config_change": True}
    message = (
        "The settings of a folder with trained models must not change; use a new folder. "
        "Received: one, already trained; `epochs` was 2 and is 1"
    )
    with pytest.raises(InputError, match=f"^{message}"):
        compare(config(folder, epochs=1), output, builders=BUILDERS, **options)
    assert sorted(p.read_bytes() for p in output.rglob("*") if p.is_file()) == before
    # Other models can be added, with the same images in another folder.
    moved = folder.rename(tmp_path / folder.name)
    try:
        run = compare(config(moved), output, builders=BUILDERS, **options)
    finally:
        moved.rename(folder)
    assert [len(result.rows) for result in run.results] == [2, 2]


@pytest.mark.long
def test_secondary_hosts_write_no_files(folder, tmp_path, monkeypatch):
    class SecondaryHost(distributed.Distribution):
        def shard(self, indices):
            return distributed.SINGLE_PROCESS.shard(indices)

    distribution = SecondaryHost()
    object.__setattr__(distribution, "process_id", 1)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    output = tmp_path / "run"
    run = compare(config(folder), output, builders=ONE, distribution=distribution)
    assert [len(result.rows) for result in run.results] == [2]
    assert not output.exists()
    with pytest.raises(InputError, match="must be writable"):
        compare(config(folder), output, builders=ONE)


@pytest.mark.long
def test_too_few_images_are_rejected_before_writing(folder, tmp_path):
    with pytest.raises(InputError, match=r"at least 50 images, for one batch\. Received: 24"):
        compare(
            config(folder, batch_size=50, gradient_accumulation_steps=2),
            tmp_path / "run",
            builders=ONE,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.parametrize("unwritable", ["lock", "folder"])
def test_full_disk_at_start_raises_write_error(unwritable, folder, tmp_path, monkeypatch):
    def raise_no_space(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    store = tmp_path / "run" / checkpoint.FOLDER
    make_folder = pathlib.Path.mkdir
    if unwritable == "lock":
        monkeypatch.setattr("filelock.FileLock.acquire", raise_no_space)
    else:
        monkeypatch.setattr(
            "pathlib.Path.mkdir",
            lambda path, *args, **kwargs: (
                raise_no_space() if path == store else make_folder(path, *args, **kwargs)
            ),
        )
    path = store if unwritable == "folder" else tmp_path / "run" / checkpoint.LOCK
    with pytest.raises(WriteError, match=rf"Could not write {path}: No space left"):
        compare(config(folder), tmp_path / "run", builders=ONE)


@pytest.mark.long
def test_signal_loses_no_step(folder, tmp_path, uninterrupted):
    output, number = tmp_path / "run", signal.SIGTERM
    before = signal.getsignal(number)
    run = compare(config(folder), output, StopAfter(3, number), BUILDERS)
    assert run.exit_code == 128 + number
    assert signal.getsignal(number) is before
    rest = StopAfter(10**6)
    compare(config(folder), output, rest, BUILDERS, resume=True)
    assert 10**6 - rest.left == STEPS - 3
    assert outcome(output) == uninterrupted


@pytest.mark.long
def test_signal_during_a_write_loses_no_step(folder, tmp_path, monkeypatch, uninterrupted):
    output = tmp_path / "run"
    real, left = os.fsync, 9

    def sync(handle):
        nonlocal left
        left -= 1
        if left == 0:
            signal.raise_signal(signal.SIGTERM)
        real(handle)

    monkeypatch.setattr(os, "fsync", sync)
    first, rest = StopAfter(10**6), StopAfter(10**6)
    run = compare(config(folder), output, first, BUILDERS, checkpoint_every=1)
    assert run.exit_code == 143
    compare(config(folder), output, rest, BUILDERS, resume=True)
    done = [10**6 - console.left for console in (first, rest)]
    assert min(done) > 0
    assert sum(done) == STEPS
    assert outcome(output) == uninterrupted


@pytest.mark.long
def test_full_disk_loses_only_steps_after_the_last_checkpoint(folder, tmp_path, monkeypatch):
    """Fails each write of a run in turn, as on a full disk."""
    output, left = tmp_path / "run", 0
    one_epoch = config(folder, epochs=1)
    compare(one_epoch, tmp_path / "uninterrupted", builders=ONE)
    real = os.fsync

    def sync(handle):
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", sync)
    for number in range(1, 100):
        left, console, failure = number, StopAfter(10**6), None
        try:
            compare(one_epoch, output, console, ONE, resume=True, checkpoint_every=3)
        except WriteError as error:
            failure = str(error)
        assert not list(output.rglob(f"{atomic_files.TMP_PREFIX}*"))
        if failure is None:
            break
        assert failure.startswith("Could not write ")
        assert failure.endswith(": No space left on device")
        if number > 2:  # writes 1 and 2 belong to the first checkpoint
            assert re.fullmatch(r"Stopped: the last checkpoint is number \d+\.", console.lines[-1])
    assert 4 < number < 99
    assert outcome(output, ONE) == outcome(tmp_path / "uninterrupted", ONE)


@pytest.mark.long
def test_temporary_files_of_killed_processes_are_removed(folder, tmp_path):
    output = tmp_path / "run"
    (output / checkpoint.FOLDER).mkdir(parents=True)
    for directory in (output, output / checkpoint.FOLDER):
        (directory / f"{atomic_files.TMP_PREFIX}000000000001-1234.safetensors").write_bytes(b"half")
    run = compare(config(folder, epochs=1), output, builders=ONE, resume=True)
    assert run.exit_code == 0
    assert not list(output.rglob(f"{atomic_files.TMP_PREFIX}*"))
    # Other folders are not modified.
    other = tmp_path / "other"
    other.mkdir()
    for name in (f"{atomic_files.TMP_PREFIX}x", "thesis.txt"):
        (other / name).write_bytes(b"mine")
    with pytest.raises(InputError, match="must contain an intact checkpoint"):
        compare(config(folder, epochs=1), other, builders=ONE, resume=True)
    assert (other / f"{atomic_files.TMP_PREFIX}x").read_bytes() == b"mine"


@pytest.mark.long
def test_changed_settings_are_named_and_rejected(folder, tmp_path):
    output = tmp_path / "run"
    compare(config(folder), output, StopAfter(2), ONE)
    before = sorted(p.read_bytes() for p in output.rglob("*") if p.is_file())
    for changed, message in (
        ({"seed": 1}, "`seed` was 42 and is 1"),
        ({"learning_rate": 0.5}, "the recipe's `learning_rate` was 0.018 and is 0.5"),
        ({"batch_size": 5}, "`batch_size` was 10 and is 5"),
        ({"epochs": 1}, "`epochs` was 2 and is 1"),
    ):
        with pytest.raises(InputError, match="unless `allow_config_change` is set") as error:
            compare(config(folder, **changed), output, builders=ONE, resume=True)
        assert message in str(error.value)
        assert sorted(p.read_bytes() for p in output.rglob("*") if p.is_file()) == before
    # Weight shapes depend on neither the batch size nor the number of epochs.
    run = compare(
        config(folder, **{"batch_size": 5, "epochs": 3}),
        output,
        builders=ONE,
        resume=True,
        allow_config_change=True,
    )
    assert [len(result.rows) for result in run.results] == [3]


@pytest.mark.long
def test_changed_images_are_rejected(folder, tmp_path):
    output = tmp_path / "run"
    compare(config(folder), output, StopAfter(2), ONE)
    other = write_folder(tmp_path / "other" / "pets", train=9)
    with pytest.raises(InputError, match=r"images was \w{64} and is \w{64}"):
        compare(config(other), output, builders=ONE, resume=True)


@pytest.mark.long
def test_different_model_is_always_rejected(folder, tmp_path):
    output = tmp_path / "run"
    compare(config(folder), output, StopAfter(2), ONE)
    with pytest.raises(InputError, match="A checkpoint must match the model and the recipe"):
        compare(
            config(folder),
            output,
            builders={"one": models.inn},
            resume=True,
            allow_config_change=True,
        )


@pytest.mark.long
def test_resume_without_checkpoints(folder, tmp_path):
    output = tmp_path / "run"
    run = compare(config(folder, epochs=1), output, builders=ONE, resume=True)
    assert len(run.results[0].rows) == 1
    for path in (output / checkpoint.FOLDER).iterdir():
        path.unlink()
    with pytest.raises(InputError, match="must contain an intact checkpoint"):
        compare(config(folder, epochs=1), output, builders=ONE, resume=True)
    with pytest.raises(InputError, match="must be new or empty"):
        compare(config(folder, epochs=1), output, builders=ONE)
    with checkpoint.exclusive_lock(tmp_path), pytest.raises(InputError, match="must not be in use"):
        compare(config(folder), tmp_path, builders=ONE, resume=True)


@pytest.mark.long
def test_checkpoint_every(folder, tmp_path, monkeypatch):
    saved = []
    real = CheckpointManager.save

    def save(self, arrays, state):
        saved.append(state["at"] and state["at"]["images"])
        return real(self, arrays, state)

    monkeypatch.setattr(CheckpointManager, "save", save)
    compare(config(folder, epochs=1), tmp_path / "a", builders=ONE)
    assert saved == [None, 0, None]  # at the start, after the epoch, after the model
    saved.clear()
    compare(config(folder, epochs=1), tmp_path / "b", builders=ONE, checkpoint_every=2)
    # 24 training and 12 test images in batches of 10.
    assert saved == [None, 20, 34, 0, None]
    with pytest.raises(InputError, match="`checkpoint_every` must be at least 1"):
        compare(config(folder), tmp_path / "c", checkpoint_every=0)
