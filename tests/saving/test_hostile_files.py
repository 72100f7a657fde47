"""Hostile files at every entry point: no code is executed, no other file is opened, no connection
is made, memory is bounded, and the error has one line."""

import contextlib
import ctypes
import hashlib
import io
import os
import pathlib
import pickle
import socket
import subprocess
import sys

import h5py
import keras
import numpy as np
import pytest

from involution import hub
from involution.data import datasets, decode
from involution.models.convert import convert
from involution.saving import classifier
from involution.training import checkpoint
from involution.utils.errors import InputError
from involution_cli import commands
from tests.support import hostile_files, paths
from tests.support.backends import numpy
from tests.support.hostile_files import FILES, Sandbox
from tests.support.images import write_folder, write_image
from tests.support.syscall_watch import FileOpenMonitor, observe

pytestmark = [
    pytest.mark.any_backend,
    pytest.mark.skipif(sys.platform != "linux", reason="uses inotify and /proc"),
]

MAX_GROWTH = 64 * 2**20
# Decoding takes four bytes per pixel of an image within Pillow's limit.
EXPECTED_GROWTH = {"image_bomb_of_64_million_black_pixels": 4 * 64 * 10**6}
REVISION = "0" * 40


def hub_load(sandbox, path):
    """Copies the folder to a cache of the Hub client: links to blobs named by their hashes."""
    cache = sandbox.output / "cache"
    repo = cache / "models--me--x"
    (repo / "blobs").mkdir(parents=True)
    for file in path.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            blob = repo / "blobs" / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            link = repo / "snapshots" / REVISION / file.relative_to(path)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    return lambda: hub.load("me/x", REVISION, offline=True, cache=cache)


def predict(sandbox, path):
    write_image(sandbox.output / "image.png")
    return lambda: commands.read_images([str(path), sandbox.output / "image.png"])


def resume(sandbox, path):
    def latest():
        lines: list[str] = []
        newest = checkpoint.CheckpointManager(path).latest(lines.append)
        if newest is None:
            (reason,) = lines
            raise InputError(f"Received: {reason}")  # as a run reports it
        return newest

    return latest


# How each command reads a file; explain and demo use the reader of predict.
ENTRY_POINTS = {
    "export": lambda sandbox, path: lambda: classifier.load_model(path),
    "predict": predict,
    "hub": hub_load,
    "convert": lambda sandbox, path: lambda: convert(path, sandbox.output / "model"),
    "data": lambda sandbox, path: lambda: datasets.load(path),
    "image": lambda sandbox, path: lambda: decode.read_image(path / "train" / "a" / "2.png"),
    "resume": resume,
}
CASES = [(name, entry) for name, (_, entries) in FILES.items() for entry in entries]


class WritableSandbox(Sandbox):
    """A sandbox with a folder that readers may write to."""

    @property
    def output(self) -> pathlib.Path:
        return self.input.parent / "output"


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    secret = tmp_path / "elsewhere" / "secret.h5"
    sandbox = WritableSandbox(tmp_path / "input", secret, tmp_path / "marker")
    for folder in (sandbox.input, sandbox.output, secret.parent):
        folder.mkdir()
    with h5py.File(secret, "w") as file:
        file["x"] = np.ones((48, 2), "f4")
    # Modules in the folder of the file are importable, as in the current folder.
    monkeypatch.syspath_prepend(sandbox.input)
    return sandbox


@keras.saving.register_keras_serializable("test_hostile")
class RegisteredLayer(keras.layers.Layer):
    """A user's registered layer."""

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], 2))

    def call(self, x):
        return keras.ops.matmul(x, self.kernel)


def registered_layer_file(sandbox):
    x = inputs = keras.Input((4, 4, 3))
    x = keras.layers.Conv2D(3, 3, padding="same", activation="gelu")(x) + x
    x = keras.ops.mean(keras.layers.RandomFlip()(x)[:, 1:], axis=(1, 2))
    model = keras.Model(inputs, RegisteredLayer()(keras.layers.Dropout(0.5)(x)))
    model.compile("adam", "mse")  # loading ignores it
    classifier.Classifier(model, ("a", "b"), (4, 4, 3)).save(sandbox.input / "registered.keras")
    return sandbox.input / "registered.keras"


def data_folder(sandbox):
    write_folder(sandbox.input)
    write_image(sandbox.input / "train" / "a" / "2.png")
    (sandbox.input / "test" / "a").mkdir()
    write_image(sandbox.input / "test" / "a" / "2.png")
    return sandbox.input


def run_folder(sandbox):
    checkpoint.CheckpointManager(sandbox.input).save({"a": np.ones(3, "f4")}, {"x": 1})
    return sandbox.input


VALID = {
    "a model's file": (lambda sandbox: hostile_files.archive(sandbox), hostile_files.KERAS),
    "a file with a registered layer": (registered_layer_file, hostile_files.KERAS),
    "a folder": (lambda sandbox: hostile_files.folder(sandbox), hostile_files.FOLDER),
    "a bundle": (lambda sandbox: paths.FILES / "hosted", ("convert", "hub")),
    "images": (data_folder, ("data", "image")),
    "a run": (run_folder, ("resume",)),
}


def observed(sandbox, work):
    """(result or exception, observed events by kind, growth of peak memory in bytes)."""
    monitor = FileOpenMonitor(sandbox.secret)
    with observe(sandbox.input, paths.FILES, sandbox.output) as watch:
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - returned
            result = error
    was_opened = monitor.was_opened()
    monitor.close()
    events = {
        "executed": watch.executed,
        "opened": watch.opened + ["secret"] * was_opened,
        "sockets": watch.sockets,
        "marker": sandbox.marker.exists(),
    }
    return result, {name: value for name, value in events.items() if value}, watch.memory_growth


VALID_CASES = [(name, entry) for name, (_, entries) in VALID.items() for entry in entries]


@pytest.fixture(scope="module")
def warm_up(tmp_path_factory):
    """Runs every valid case once: frameworks load modules lazily."""
    for number, (name, entry) in enumerate(VALID_CASES):
        folder = tmp_path_factory.mktemp(f"warm_up{number}")
        sandbox = WritableSandbox(folder / "input", folder / "secret", folder / "marker")
        sandbox.input.mkdir()
        sandbox.output.mkdir()
        ENTRY_POINTS[entry](sandbox, VALID[name][0](sandbox))()
    # The default model of the commands.
    classifier.load(classifier.DEFAULT)
    # Pillow imports all its plugins at the first unrecognized file.
    with contextlib.suppress(InputError):
        decode.read_image(io.BytesIO(b"x"))


@pytest.mark.long
@pytest.mark.parametrize(("name", "entry"), VALID_CASES)
def test_valid_files_are_read(name, entry, sandbox, warm_up):
    path = VALID[name][0](sandbox)
    result, events, growth = observed(sandbox, ENTRY_POINTS[entry](sandbox, path))
    assert not isinstance(result, Exception), result
    assert events == {}
    assert growth <= MAX_GROWTH


def test_registered_layer_is_loaded_with_its_weights(sandbox):
    path = registered_layer_file(sandbox)
    model = classifier.load_model(path)
    assert isinstance(model.layers[-1], RegisteredLayer)
    x = np.random.default_rng(0).random((2, 4, 4, 3), "float32")
    want = keras.saving.load_model(path, compile=False)
    got, want = (numpy(loaded(x, training=False)) for loaded in (model, want))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("name", "entry"), CASES)
def test_hostile_files_are_rejected(name, entry, sandbox, warm_up):
    path = FILES[name][0](sandbox)
    assert not sandbox.marker.exists()
    result, events, growth = observed(sandbox, ENTRY_POINTS[entry](sandbox, path))
    print(f"{name} at {entry}: {growth / 2**20:.1f} MiB, {result}")
    assert isinstance(result, InputError), repr(result)
    assert "Received: " in str(result) or entry == "image"
    assert "\n" not in str(result)
    assert len(str(result)) < 2000
    assert events == {}
    assert growth <= MAX_GROWTH + EXPECTED_GROWTH.get(name, 0)


def test_every_entry_point_has_hostile_files():
    assert len(FILES) >= 60
    assert {entry for _, entry in CASES} == set(ENTRY_POINTS)


# Controls: the observation detects each kind of attack.


def open_secret(sandbox):
    sandbox.secret.read_bytes()


def follow_link(sandbox):
    with h5py.File(sandbox.input / "x.h5", "w") as file:
        file["a"] = h5py.ExternalLink(str(sandbox.secret), "/x")
        file["a"][()]


def write_outside(sandbox):
    (sandbox.input.parent / "stranger.txt").write_text("x")


def run_lambda(sandbox):
    path = hostile_files.cve_2024_3660_lambda(sandbox)
    keras.saving.load_model(path, compile=False, safe_mode=False)(np.ones((1, 4, 4, 3), "f4"))


def unpickle(sandbox):
    content = pickle.dumps(hostile_files.Call(os.system, sandbox.command))
    pickle.loads(content)  # noqa: S301 - from this test


def start_process(sandbox):
    subprocess.run([sys.executable, "-c", ""], check=True)


def import_canary(sandbox):
    (sandbox.input / "canary_of_a_test.py").write_text("")
    __import__("canary_of_a_test")


def execute_a_file(sandbox):
    exec(compile("1", str(sandbox.input / "x.py"), "exec"))  # noqa: S102 - from this test


def connect(sandbox):
    with socket.socket() as client:
        client.connect_ex(("127.0.0.1", 1))


@pytest.mark.parametrize(
    ("attack", "kinds"),
    [
        (open_secret, {"opened"}),
        (follow_link, {"opened"}),
        (write_outside, {"opened"}),
        (run_lambda, {"executed", "marker"}),
        (unpickle, {"executed", "marker"}),
        (start_process, {"executed"}),
        (import_canary, {"executed"}),
        (execute_a_file, {"executed"}),
        (connect, {"sockets"}),
    ],
)
def test_observation_detects_attacks(attack, kinds, sandbox, warm_up):
    result, events, _ = observed(sandbox, lambda: attack(sandbox))
    assert result is None
    assert kinds <= set(events)


def test_observation_measures_peak_memory(sandbox):
    def allocate():
        ctypes.memset(ctypes.create_string_buffer(100 * 2**20), 1, 100 * 2**20)

    *_, growth = observed(sandbox, allocate)
    assert 95 * 2**20 <= growth < 160 * 2**20
    # Neither freed memory nor an earlier peak counts.
    *_, growth = observed(sandbox, lambda: None)
    assert growth < 10 * 2**20


@pytest.mark.long
def test_keras_without_validation_exceeds_the_memory_limit(sandbox):
    """Control: Keras alone decompresses the bomb."""
    path = hostile_files.compressed_array(sandbox)
    *_, growth = observed(sandbox, lambda: keras.saving.load_model(path, compile=False))
    assert growth > MAX_GROWTH
