"""Checkpoints, and runs that go on from them."""

import functools
import hashlib
import json
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
from images import write_folder

from involution import checkpoint, files, models, report, saved_model
from involution.checkpoint import Store
from involution.errors import InputError
from involution.experiment import Config, Silent, compare

ARRAYS = {
    "a": np.arange(12, dtype="float32").reshape(3, 4),
    "b": np.array(7, "int64"),
    "c": np.zeros((0, 2), "uint32"),
}
STATE = {"at": 3, "loss": float("nan"), "text": "말"}


def no_word(line):
    raise AssertionError(line)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def content(store):
    return sorted(path.name for path in store.folder.iterdir())


# --- Files ---------------------------------------------------------------------------------------


def test_what_is_saved_comes_back_to_the_bit(store):
    assert store.latest(no_word) is None
    assert store.save(ARRAYS, STATE).number == 1
    found = store.latest(no_word)
    assert found.number == 1
    assert repr(found.state) == repr(STATE)
    assert {k: (v.dtype, v.shape) for k, v in found.arrays.items()} == {
        k: (v.dtype, v.shape) for k, v in ARRAYS.items()
    }
    assert all(np.array_equal(found.arrays[k], ARRAYS[k]) for k in ARRAYS)


def test_two_are_kept(store):
    for number in range(1, 5):
        assert store.save(ARRAYS, {"number": number}).number == number
        assert len(content(store)) == min(number, 2)
    assert store.latest(no_word).state == {"number": 4}
    store.clear()
    assert not store.folder.exists()
    store.clear()


def test_the_older_stays_until_the_newer_is_read_back(store, monkeypatch):
    for number in (1, 2):
        store.save(ARRAYS, {"number": number})
    real = files.replacing

    def faulty(path):
        return real(path.with_name("elsewhere"))

    before = content(store)
    monkeypatch.setattr(files, "replacing", faulty)
    with pytest.raises(OSError, match="No such file"):
        store.save(ARRAYS, {"number": 3})
    assert set(before) < set(content(store))
    assert store.latest(no_word).state == {"number": 2}


def test_a_medium_that_changes_what_is_written(store, monkeypatch):
    store.save(ARRAYS, {"number": 1})
    real = files.replacing

    class Changing:
        def __init__(self, path):
            self.path, self.inner = path, real(path)

        def __enter__(self):
            return self.inner.__enter__()

        def __exit__(self, *error):
            self.inner.__exit__(*error)
            self.path.write_bytes(self.path.read_bytes()[:-1])

    monkeypatch.setattr(files, "replacing", Changing)
    with pytest.raises(OSError, match="was not read back as it was written"):
        store.save(ARRAYS, {"number": 2})
    assert store.latest(no_word).state == {"number": 1}
    assert len(content(store)) == 1


def test_every_truncation_and_flips_of_bits_are_detected(store):
    store.save(ARRAYS, {"number": 1})
    store.save(ARRAYS, {"number": 2})
    newest = store.folder / content(store)[-1]
    whole = newest.read_bytes()
    rng = np.random.default_rng(0)

    def damaged():
        for length in range(len(whole)):
            yield whole[:length]
        for bit in rng.integers(8 * len(whole), size=500):
            changed = bytearray(whole)
            changed[bit // 8] ^= 1 << (bit % 8)
            yield bytes(changed)

    for damage in damaged():
        newest.write_bytes(damage)
        lines = []
        assert store.latest(lines.append).state == {"number": 1}
        assert len(lines) == 1
        assert lines[0].startswith("Checkpoint 2 is damaged, the one before it is taken: ")
    newest.write_bytes(whole)
    assert store.latest(no_word).state == {"number": 2}


def test_a_file_with_the_right_hash_and_the_wrong_content(store):
    store.save(ARRAYS, {"number": 1})
    for number, made in enumerate((b"", b"hello", bytes(8) + b"{}", b"\2" + bytes(7) + b"{}"), 2):
        name = f"{number:012d}-{hashlib.sha256(made).hexdigest()}.safetensors"
        (store.folder / name).write_bytes(made)
    lines = []
    assert store.latest(lines.append).state == {"number": 1}
    assert len(lines) == 4


def test_what_else_lies_there_is_left_out(store):
    store.save(ARRAYS, {"number": 1})
    (store.folder / ".half").write_bytes(b"x")
    (store.folder / "notes.txt").write_bytes(b"x")
    assert store.latest(no_word).number == 1
    store.clear()
    assert not store.folder.exists()


def test_one_process_at_a_time(tmp_path):
    with checkpoint.alone(tmp_path):
        # Another process, and as quick as this: it does not import Keras.
        code = (
            "import filelock, sys\n"
            "try:\n    filelock.FileLock(sys.argv[1]).acquire(blocking=False); print('in')\n"
            "except filelock.Timeout: print('out')"
        )
        command = [sys.executable, "-c", code, str(tmp_path / checkpoint.LOCK)]
        second = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
        assert second.stdout == "out\n"
        with pytest.raises(InputError, match="must be free"), checkpoint.alone(tmp_path):
            raise AssertionError
    after = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    assert after.stdout == "in\n"
    with checkpoint.alone(tmp_path):
        pass


# --- Runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "pets")


def builder(input_shape, classes, width=4):
    """With all that has a state: batch normalization, and numbers drawn at random."""
    inputs = keras.Input(input_shape)
    x = keras.layers.Conv2D(width, 3)(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(0.3, seed=1)(keras.layers.ReLU()(x))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(classes)(x))


@pytest.fixture(autouse=True)
def unreported(monkeypatch):
    """Reports take longer than these runs, and are others' to test."""
    monkeypatch.setattr(report, "write", lambda run, output: None)


BUILDERS = {"one": builder, "other": functools.partial(builder, width=5)}
ONE = {"one": builder}
STEPS = 20  # of both models, after 36 images were read


def config(folder, **more):
    return Config(str(folder), **{"recipe": "one-cycle", "epochs": 2, "batch_size": 10} | more)


def outcome(output):
    """All that must not depend on breaks."""
    weights = {
        label: [
            w.tobytes() for w in saved_model.load(output / f"{label}.keras").model.get_weights()
        ]
        for label in BUILDERS
    }
    metrics = json.loads((output / "metrics.json").read_text())["models"]
    clock = ("seconds", "seconds_per_epoch")
    kept = {m: {k: v for k, v in of.items() if k not in clock} for m, of in metrics.items()}
    return weights, kept, (output / "history.csv").read_bytes()


class StopAfter(Silent):
    def __init__(self, steps, number=None):
        self.left, self.number, self.lines = 36 + steps, number, []

    def say(self, text):
        self.lines.append(text)

    def step(self):
        self.left -= 1
        if self.left == 0 and self.number is None:
            raise KeyboardInterrupt
        if self.left == 0:
            signal.raise_signal(self.number)


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda run, output: None)
        compare(config(folder), output, builders=BUILDERS)
    assert not (output / checkpoint.FOLDER).exists()
    return outcome(output)


@pytest.mark.parametrize(
    "stops",
    [
        [2, 6, 4],
        *(pytest.param(stops, marks=pytest.mark.slow) for stops in ([1] * 20, [10], [20])),
    ],
    ids=str,
)
def test_a_run_with_breaks_gives_what_it_gives_without(folder, tmp_path, uninterrupted, stops):
    output = tmp_path / "run"
    for steps in stops:
        console = StopAfter(steps)
        run = compare(config(folder), output, console, BUILDERS, resume=True)
        assert run.exit_code == 130
        assert console.left == 0
    # The console is told how far it was, and no step is done twice.
    rest = StopAfter(10**6)
    run = compare(config(folder), output, rest, BUILDERS, resume=True)
    assert run.exit_code == 0
    assert 36 + 10**6 - rest.left == 36 + STEPS - sum(stops)
    assert any(line.startswith("Going on from checkpoint ") for line in rest.lines)
    assert outcome(output) == uninterrupted
    assert not (output / checkpoint.FOLDER).exists()


def test_a_damaged_checkpoint_costs_what_came_after_the_one_before(folder, tmp_path, uninterrupted):
    output = tmp_path / "run"
    compare(config(folder), output, StopAfter(4), BUILDERS, checkpoint_every=2)
    newest = max((output / checkpoint.FOLDER).iterdir())
    newest.write_bytes(newest.read_bytes()[:-100])
    console = StopAfter(10**6)
    compare(config(folder), output, console, BUILDERS, resume=True)
    assert sum(" is damaged, the one before it is taken" in line for line in console.lines) == 1
    assert outcome(output) == uninterrupted


def test_a_trained_model_that_was_changed_is_trained_again(folder, tmp_path, uninterrupted):
    output = tmp_path / "run"
    compare(config(folder), output, StopAfter(10), BUILDERS)
    compare(config(folder), output, StopAfter(1), BUILDERS, resume=True)
    (output / "one.keras").write_bytes(b"hello")
    console = StopAfter(10**6)
    compare(config(folder), output, console, BUILDERS, resume=True)
    assert (
        sum(
            "one.keras is not as it was written: it is trained again." in line
            for line in console.lines
        )
        == 1
    )
    assert outcome(output) == uninterrupted


def test_a_signal_loses_no_step(folder, tmp_path, uninterrupted):
    output, number = tmp_path / "run", signal.SIGTERM
    before = signal.getsignal(number)
    run = compare(config(folder), output, StopAfter(3, number), BUILDERS)
    assert run.exit_code == 128 + number
    assert signal.getsignal(number) is before
    rest = StopAfter(10**6)
    compare(config(folder), output, rest, BUILDERS, resume=True)
    assert 10**6 - rest.left == STEPS - 3
    assert outcome(output) == uninterrupted


def test_a_change_is_refused_by_name(folder, tmp_path):
    output = tmp_path / "run"
    compare(config(folder), output, StopAfter(2), ONE)
    before = sorted(p.read_bytes() for p in output.rglob("*") if p.is_file())
    for changed, said in (
        ({"seed": 1}, "seed was 42 and is 1"),
        ({"learning_rate": 0.5}, "recipe: learning_rate was 0.018 and is 0.5"),
        ({"batch_size": 5}, "batch_size was 10 and is 5"),
        ({"epochs": 3}, "epochs was 2 and is 3"),
    ):
        with pytest.raises(InputError, match="all must be as before, or --allow-change") as refusal:
            compare(config(folder, **changed), output, builders=ONE, resume=True)
        assert said in str(refusal.value)
        assert sorted(p.read_bytes() for p in output.rglob("*") if p.is_file()) == before
    # Another size of batches needs no other weights.
    run = compare(
        config(folder, **{"batch_size": 5, "epochs": 3}),
        output,
        builders=ONE,
        resume=True,
        allow_change=True,
    )
    assert [len(result.rows) for result in run.results] == [3]


def test_other_images_are_a_change(folder, tmp_path):
    output = tmp_path / "run"
    compare(config(folder), output, StopAfter(2), ONE)
    other = write_folder(tmp_path / "other" / "pets", train=9)
    with pytest.raises(InputError, match=r"images was \w{64} and is \w{64}"):
        compare(config(other), output, builders=ONE, resume=True)


def test_another_model_is_refused_whatever_is_allowed(folder, tmp_path):
    output = tmp_path / "run"
    compare(config(folder), output, StopAfter(2), ONE)
    with pytest.raises(InputError, match="A checkpoint must be of this model and recipe"):
        compare(
            config(folder), output, builders={"one": models.inn}, resume=True, allow_change=True
        )


def test_a_folder_without_checkpoints(folder, tmp_path):
    output = tmp_path / "run"
    run = compare(config(folder, epochs=1), output, builders=ONE, resume=True)
    assert len(run.results[0].rows) == 1
    with pytest.raises(InputError, match="must have a whole checkpoint"):
        compare(config(folder, epochs=1), output, builders=ONE, resume=True)
    with pytest.raises(InputError, match="must be new or empty"):
        compare(config(folder, epochs=1), output, builders=ONE)
    with checkpoint.alone(tmp_path), pytest.raises(InputError, match="must be free"):
        compare(config(folder), tmp_path, builders=ONE, resume=True)


def test_steps_between_checkpoints(folder, tmp_path, monkeypatch):
    saved = []
    real = Store.save

    def save(self, arrays, state):
        saved.append(state["at"] and state["at"]["images"])
        return real(self, arrays, state)

    monkeypatch.setattr(Store, "save", save)
    compare(config(folder, epochs=1), tmp_path / "a", builders=ONE)
    assert saved == [0, None]
    saved.clear()
    compare(config(folder, epochs=1), tmp_path / "b", builders=ONE, checkpoint_every=2)
    # 24 training and 12 test images in batches of 10; then the epoch's end, then the model's.
    assert saved == [20, 34, 0, None]
    with pytest.raises(InputError, match="checkpoint_every must be at least 1"):
        compare(config(folder), tmp_path / "c", checkpoint_every=0)
