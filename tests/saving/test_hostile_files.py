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
from tests.support.hostile_files import FILES, Place
from tests.support.images import write_folder, write_image
from tests.support.syscall_watch import FileOpenMonitor, observe

pytestmark = [
    pytest.mark.any_backend,
    pytest.mark.skipif(sys.platform != "linux", reason="uses inotify and /proc"),
]

MAX_GROWTH = 64 * 2**20
# Decoding takes four bytes per pixel of an image within Pillow's limit.
EXPECTED = {"image_bomb_of_64_million_black_pixels": 4 * 64 * 10**6}
REVISION = "0" * 40


def hub_load(place, path):
    """A folder in the layout of the client's cache: links to blobs named by their hashes."""
    cache = place.written / "cache"
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


def predict(place, path):
    write_image(place.written / "image.png")
    return lambda: commands.read_images([str(path), place.written / "image.png"])


def resume(place, path):
    def latest():
        lines: list[str] = []
        saved = checkpoint.CheckpointManager(path).latest(lines.append)
        if saved is None:
            (reason,) = lines
            raise InputError(f"Received: {reason}")  # as a run reports it
        return saved

    return latest


# How each command reads a file; explain and demo read it as predict does.
ENTRIES = {
    "export": lambda place, path: lambda: classifier.load_model(path),
    "predict": predict,
    "hub": hub_load,
    "convert": lambda place, path: lambda: convert(path, place.written / "model"),
    "data": lambda place, path: lambda: datasets.load(path),
    "image": lambda place, path: lambda: decode.read_image(path / "train" / "a" / "2.png"),
    "resume": resume,
}
CASES = [(name, entry) for name, (_, entries) in FILES.items() for entry in entries]


class WritablePlace(Place):
    """With a folder that readers may write to."""

    @property
    def written(self) -> pathlib.Path:
        return self.given.parent / "written"


@pytest.fixture
def place(tmp_path, monkeypatch):
    secret = tmp_path / "elsewhere" / "secret.h5"
    place = WritablePlace(tmp_path / "given", secret, tmp_path / "marker")
    for folder in (place.given, place.written, secret.parent):
        folder.mkdir()
    with h5py.File(secret, "w") as file:
        file["x"] = np.ones((48, 2), "f4")
    # Modules in the folder of the file are importable, as in the current folder.
    monkeypatch.syspath_prepend(place.given)
    return place


@keras.saving.register_keras_serializable("test_hostile")
class Own(keras.layers.Layer):
    """A user's registered layer."""

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], 2))

    def call(self, x):
        return keras.ops.matmul(x, self.kernel)


def own_file(place):
    x = inputs = keras.Input((4, 4, 3))
    x = keras.layers.Conv2D(3, 3, padding="same", activation="gelu")(x) + x
    x = keras.ops.mean(keras.layers.RandomFlip()(x)[:, 1:], axis=(1, 2))
    model = keras.Model(inputs, Own()(keras.layers.Dropout(0.5)(x)))
    model.compile("adam", "mse")  # loading ignores it
    classifier.Classifier(model, ("a", "b"), (4, 4, 3)).save(place.given / "own.keras")
    return place.given / "own.keras"


def data_folder(place):
    write_folder(place.given)
    write_image(place.given / "train" / "a" / "2.png")
    (place.given / "test" / "a").mkdir()
    write_image(place.given / "test" / "a" / "2.png")
    return place.given


def run_folder(place):
    checkpoint.CheckpointManager(place.given).save({"a": np.ones(3, "f4")}, {"x": 1})
    return place.given


HONEST = {
    "a model's file": (lambda place: hostile_files.archive(place), hostile_files.KERAS),
    "a file with a registered layer": (own_file, hostile_files.KERAS),
    "a folder": (lambda place: hostile_files.folder(place), hostile_files.FOLDER),
    "a bundle": (lambda place: paths.FILES / "hosted", ("convert", "hub")),
    "images": (data_folder, ("data", "image")),
    "a run": (run_folder, ("resume",)),
}


def observed(place, work):
    """(result or exception, observed events by kind, growth of peak memory in bytes)."""
    monitor = FileOpenMonitor(place.secret)
    with observe(place.given, paths.FILES, place.written) as watch:
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - is returned
            result = error
    was_opened = monitor.was_opened()
    monitor.close()
    events = {
        "ran": watch.ran,
        "opened": watch.opened + ["secret"] * was_opened,
        "sockets": watch.sockets,
        "marker": place.marker.exists(),
    }
    return result, {name: value for name, value in events.items() if value}, watch.grown


HONEST_CASES = [(name, entry) for name, (_, entries) in HONEST.items() for entry in entries]


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """Runs every honest case once: frameworks load modules lazily."""
    for number, (name, entry) in enumerate(HONEST_CASES):
        folder = tmp_path_factory.mktemp(f"warm{number}")
        place = WritablePlace(folder / "given", folder / "secret", folder / "marker")
        place.given.mkdir()
        place.written.mkdir()
        ENTRIES[entry](place, HONEST[name][0](place))()
    # The model of commands without a model argument.
    classifier.load(classifier.DEFAULT)
    # Pillow imports all its plugins at the first unrecognized file.
    with contextlib.suppress(InputError):
        decode.read_image(io.BytesIO(b"x"))


@pytest.mark.parametrize(("name", "entry"), HONEST_CASES)
def test_honest_files_are_read(name, entry, place, warm):
    path = HONEST[name][0](place)
    result, events, grown = observed(place, ENTRIES[entry](place, path))
    assert not isinstance(result, Exception), result
    assert events == {}
    assert grown <= MAX_GROWTH


def test_registered_layer_is_loaded_with_its_weights(place):
    path = own_file(place)
    model = classifier.load_model(path)
    assert isinstance(model.layers[-1], Own)
    x = np.random.default_rng(0).random((2, 4, 4, 3), "float32")
    want = keras.saving.load_model(path, compile=False)
    got, want = (numpy(loaded(x, training=False)) for loaded in (model, want))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("name", "entry"), CASES)
def test_hostile_files_are_rejected(name, entry, place, warm):
    path = FILES[name][0](place)
    assert not place.marker.exists()
    result, events, grown = observed(place, ENTRIES[entry](place, path))
    print(f"{name} at {entry}: {grown / 2**20:.1f} MiB, {result}")
    assert isinstance(result, InputError), repr(result)
    assert "Received: " in str(result) or entry == "image"
    assert "\n" not in str(result)
    assert len(str(result)) < 2000
    assert events == {}
    assert grown <= MAX_GROWTH + EXPECTED.get(name, 0)


def test_every_entry_point_has_hostile_files():
    assert len(FILES) >= 60
    assert {entry for _, entry in CASES} == set(ENTRIES)


# Controls: the observation detects each kind of attack.


def open_secret(place):
    place.secret.read_bytes()


def follow_link(place):
    with h5py.File(place.given / "x.h5", "w") as file:
        file["a"] = h5py.ExternalLink(str(place.secret), "/x")
        file["a"][()]


def write_outside(place):
    (place.given.parent / "stranger.txt").write_text("x")


def run_lambda(place):
    path = hostile_files.cve_2024_3660_lambda(place)
    keras.saving.load_model(path, compile=False, safe_mode=False)(np.ones((1, 4, 4, 3), "f4"))


def unpickle(place):
    content = pickle.dumps(hostile_files.Call(os.system, place.command))
    pickle.loads(content)  # noqa: S301 - from this test


def start_process(place):
    subprocess.run([sys.executable, "-c", ""], check=True)


def import_canary(place):
    (place.given / "canary_of_a_test.py").write_text("")
    __import__("canary_of_a_test")


def execute_a_file(place):
    exec(compile("1", str(place.given / "x.py"), "exec"))  # noqa: S102 - from this test


def connect(place):
    with socket.socket() as client:
        client.connect_ex(("127.0.0.1", 1))


@pytest.mark.parametrize(
    ("attack", "kinds"),
    [
        (open_secret, {"opened"}),
        (follow_link, {"opened"}),
        (write_outside, {"opened"}),
        (run_lambda, {"ran", "marker"}),
        (unpickle, {"ran", "marker"}),
        (start_process, {"ran"}),
        (import_canary, {"ran"}),
        (execute_a_file, {"ran"}),
        (connect, {"sockets"}),
    ],
)
def test_attacks_are_observed(attack, kinds, place, warm):
    result, events, _ = observed(place, lambda: attack(place))
    assert result is None
    assert kinds <= set(events)


def test_memory_is_observed(place):
    def allocate():
        ctypes.memset(ctypes.create_string_buffer(100 * 2**20), 1, 100 * 2**20)

    *_, grown = observed(place, allocate)
    assert 95 * 2**20 <= grown < 160 * 2**20
    # Neither freed memory nor an earlier peak counts.
    *_, grown = observed(place, lambda: None)
    assert grown < 10 * 2**20


def test_keras_alone_exceeds_the_memory_limit(place):
    """Control: without validation, the bomb is decompressed."""
    path = hostile_files.compressed_array(place)
    *_, grown = observed(place, lambda: keras.saving.load_model(path, compile=False))
    assert grown > MAX_GROWTH
