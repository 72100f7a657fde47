"""Files of strangers at every place where one comes in: no code runs, nothing else is opened,
nobody is called, memory stays, and one line says what is wrong."""

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
import hostile_files
import keras
import numpy as np
import pytest
import test_checkpoints
from frameworks import numpy
from hostile_files import FILES, Place
from images import write_folder, write_image
from watching import Doorbell, watching

import involution_cli
from involution import checkpoint, data, hub, saved_model
from involution.errors import InputError
from involution.models.convert import convert

pytestmark = [
    pytest.mark.any_backend,
    pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what happens"),
]

MOST = 64 * 2**20
# An image within Pillow's limit of pixels takes four bytes for each.
EXPECTED = {"image_bomb_of_64_million_black_pixels": 4 * 64 * 10**6}
REVISION = "0" * 40


def hub_load(place, path):
    """A folder as the client's cache has it: names that are links to contents, by their hashes."""
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
    return lambda: involution_cli._read(saved_model, [str(path), place.written / "image.png"])


def resume(place, path):
    def go_on():
        said: list[str] = []
        saved = checkpoint.Store(path).latest(said.append)
        if saved is None:
            (reason,) = said
            raise InputError(f"Received: {reason}")  # as a run says it
        return saved

    return go_on


# What a command does with a file of a stranger's: explain and demo do what predict does.
ENTRIES = {
    "export": lambda place, path: lambda: saved_model.load_model(path),
    "predict": predict,
    "hub": hub_load,
    "convert": lambda place, path: lambda: convert(path, place.written / "model"),
    "data": lambda place, path: lambda: data.load(path),
    "image": lambda place, path: lambda: data.read_image(path / "train" / "a" / "2.png"),
    "resume": resume,
}
CASES = [(name, entry) for name, (_, entries) in FILES.items() for entry in entries]


class Written(Place):
    """A place with a folder for what readers write."""

    @property
    def written(self) -> pathlib.Path:
        return self.given.parent / "written"


@pytest.fixture
def place(tmp_path, monkeypatch):
    made = Written(tmp_path / "given", tmp_path / "elsewhere" / "secret.h5", tmp_path / "marker")
    for folder in (made.given, made.written, made.secret.parent):
        folder.mkdir()
    with h5py.File(made.secret, "w") as file:
        file["x"] = np.ones((48, 2), "f4")
    # A file's code beside it could be found where Python looks for modules.
    monkeypatch.syspath_prepend(made.given)
    return made


@keras.saving.register_keras_serializable("test_hostile")
class Own(keras.layers.Layer):
    """A layer of the user's own."""

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], 2))

    def call(self, x):
        return keras.ops.matmul(x, self.kernel)


def own_file(place):
    x = inputs = keras.Input((4, 4, 3))
    x = keras.layers.Conv2D(3, 3, padding="same", activation="gelu")(x) + x
    x = keras.ops.mean(keras.layers.RandomFlip()(x)[:, 1:], axis=(1, 2))
    model = keras.Model(inputs, Own()(keras.layers.Dropout(0.5)(x)))
    model.compile("adam", "mse")  # of which nothing is taken
    saved_model.Classifier(model, ("a", "b"), (4, 4, 3)).save(place.given / "own.keras")
    return place.given / "own.keras"


def data_folder(place):
    write_folder(place.given)
    write_image(place.given / "train" / "a" / "2.png")
    (place.given / "test" / "a").mkdir()
    write_image(place.given / "test" / "a" / "2.png")
    return place.given


def run_folder(place):
    checkpoint.Store(place.given).save({"a": np.ones(3, "f4")}, {"x": 1})
    return place.given


HONEST = {
    "a model's file": (lambda place: hostile_files.archive(place), hostile_files.KERAS),
    "a file with a layer of one's own": (own_file, hostile_files.KERAS),
    "a folder": (lambda place: hostile_files.folder(place), hostile_files.FOLDER),
    "a bundle": (lambda place: test_checkpoints.DATA / "hosted", ("convert", "hub")),
    "images": (data_folder, ("data", "image")),
    "a run": (run_folder, ("resume",)),
}


def watched(place, work):
    """(what is returned or raised, what was noticed)."""
    bell = Doorbell(place.secret)
    data_folder = test_checkpoints.DATA  # which an honest case lies in
    with watching(place.given, data_folder, place.written) as watch:
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - to be looked at
            result = error
    rang = bell.rang()
    bell.close()
    noticed = {
        "ran": watch.ran,
        "opened": watch.opened + ["secret"] * rang,
        "sockets": watch.sockets,
        "marker": place.marker.exists(),
    }
    return result, {name: value for name, value in noticed.items() if value}, watch.grown


HONEST_CASES = [(name, entry) for name, (_, entries) in HONEST.items() for entry in entries]


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """Frameworks load parts of themselves at their first work."""
    for number, (name, entry) in enumerate(HONEST_CASES):
        folder = tmp_path_factory.mktemp(f"warm{number}")
        made = Written(folder / "given", folder / "secret", folder / "marker")
        made.given.mkdir()
        made.written.mkdir()
        ENTRIES[entry](made, HONEST[name][0](made))()
    # What has no model's ending is an image, for this one.
    saved_model.load(saved_model.DEFAULT)
    # Pillow looks for all its readers, and for what they need, at its first failure.
    with contextlib.suppress(InputError):
        data.read_image(io.BytesIO(b"x"))


@pytest.mark.parametrize(("name", "entry"), HONEST_CASES)
def test_honest_files_are_read(name, entry, place, warm):
    path = HONEST[name][0](place)
    result, noticed, grown = watched(place, ENTRIES[entry](place, path))
    assert not isinstance(result, Exception), result
    assert noticed == {}
    assert grown <= MOST


def test_a_registered_layer_comes_with_its_weights(place):
    path = own_file(place)
    model = saved_model.load_model(path)
    assert isinstance(model.layers[-1], Own)
    x = np.random.default_rng(0).random((2, 4, 4, 3), "float32")
    want = keras.saving.load_model(path, compile=False)
    got, want = (numpy(loaded(x, training=False)) for loaded in (model, want))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("name", "entry"), CASES)
def test_hostile_files_are_refused(name, entry, place, warm):
    path = FILES[name][0](place)
    assert not place.marker.exists()
    result, noticed, grown = watched(place, ENTRIES[entry](place, path))
    print(f"{name} at {entry}: {grown / 2**20:.1f} MiB, {result}")
    assert isinstance(result, InputError), repr(result)
    assert "Received: " in str(result) or entry == "image"
    assert "\n" not in str(result)
    assert len(str(result)) < 2000
    assert noticed == {}
    assert grown <= MOST + EXPECTED.get(name, 0)


def test_there_are_enough_of_them():
    assert len(FILES) >= 60
    assert {entry for _, entry in CASES} == set(ENTRIES)


# Whether the watch would see what the files want.


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
    pickle.loads(content)  # noqa: S301 - our own


def start(place):
    subprocess.run([sys.executable, "-c", ""], check=True)


def import_canary(place):
    (place.given / "canary_of_a_test.py").write_text("")
    __import__("canary_of_a_test")


def execute_a_file(place):
    exec(compile("1", str(place.given / "x.py"), "exec"))  # noqa: S102 - our own


def connect(place):
    with socket.socket() as made:
        made.connect_ex(("127.0.0.1", 1))


@pytest.mark.parametrize(
    ("attack", "seen"),
    [
        (open_secret, {"opened"}),
        (follow_link, {"opened"}),
        (write_outside, {"opened"}),
        (run_lambda, {"ran", "marker"}),
        (unpickle, {"ran", "marker"}),
        (start, {"ran"}),
        (import_canary, {"ran"}),
        (execute_a_file, {"ran"}),
        (connect, {"sockets"}),
    ],
)
def test_attacks_are_noticed(attack, seen, place, warm):
    result, noticed, _ = watched(place, lambda: attack(place))
    assert result is None
    assert seen <= set(noticed)


def test_memory_is_noticed(place):
    def take():
        ctypes.memset(ctypes.create_string_buffer(100 * 2**20), 1, 100 * 2**20)

    *_, grown = watched(place, take)
    assert 95 * 2**20 <= grown < 160 * 2**20
    # Given back: the peak is what counts, and of the block alone.
    *_, grown = watched(place, lambda: None)
    assert grown < 10 * 2**20


def test_what_takes_memory_without_a_look_at_it(place):
    """A bomb does go off where nobody looks."""
    path = hostile_files.compressed_array(place)
    *_, grown = watched(place, lambda: keras.saving.load_model(path, compile=False))
    assert grown > MOST
