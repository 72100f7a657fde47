"""A classifier in a file or a folder: what is written, what is read, what is refused."""

import dataclasses
import json
import os
import struct
import types
import zipfile
from unittest import mock

import keras
import numpy as np
import pytest
from images import write_image

from involution import data, keras_files, models, saved_model
from involution.errors import InputError
from involution.models import shipped, weights
from involution.saved_model import Classifier

ABOUT = {"class_names": ["a", "말"], "image_shape": [4, 6, 3], "scaling": "pixels / 255"}
NO_CLASSIFIER = (
    "A model must be a .keras file or a folder with its classes and image size, written by "
    "`involution compare` or `train`, or one of cnn-cifar10, inn-cifar10, rednet_tiny-cifar10. "
    "Received: "
)
NO_KERAS = (
    "A model must be a .keras file, and load without code of its own: one with a user's own layers "
    "is for keras.saving.load_model(file, custom_objects=...). Received: "
)


@pytest.fixture(scope="module")
def classifier():
    layers = [keras.Input((4, 6, 3)), keras.layers.Flatten(), keras.layers.Dense(2)]
    return Classifier(keras.Sequential(layers), ("a", "말"), (4, 6, 3))


@pytest.fixture
def unread(monkeypatch):
    """Models are not loaded: what is said to be one has the path, and suits everything."""
    monkeypatch.setattr(
        saved_model,
        "load_model",
        lambda path: types.SimpleNamespace(
            path=path, input_shape=(None,) * 4, output_shape=mock.ANY
        ),
    )


def archive(path, entry=None, name="involution.json", compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as made:
        made.writestr(name, json.dumps(ABOUT) if entry is None else entry)
    return path


def message(function, *arguments):
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_gives_the_classifier_back(classifier, tmp_path):
    # Of another backend's optimizer nothing could be loaded.
    classifier.model.compile("adam", "mse")
    classifier.save(tmp_path / "x.keras")
    assert os.listdir(tmp_path) == ["x.keras"]
    with zipfile.ZipFile(tmp_path / "x.keras") as made:
        assert json.loads(made.read("involution.json")) == ABOUT
    again = saved_model.load(str(tmp_path / "x.keras"))
    assert again.about == classifier.about
    assert (again.class_names, again.image_shape) == (("a", "말"), (4, 6, 3))
    for got, want in zip(again.model.get_weights(), classifier.model.get_weights(), strict=True):
        np.testing.assert_array_equal(got, want)
    assert not again.model.compiled
    assert saved_model.load_model(str(tmp_path / "x.keras")).output_shape == (None, 2)


def test_an_image_is_read_as_in_training(classifier, tmp_path):
    write_image(tmp_path / "x.png", size=(9, 7))
    read = classifier.read(tmp_path / "x.png")
    want = data.scale(data.read_image(tmp_path / "x.png", (4, 6)))
    assert (read.shape, read.dtype) == ((1, 4, 6, 3), np.float32)
    np.testing.assert_array_equal(read[0], want)


def test_a_model_of_the_middle_sees_the_middle(classifier, tmp_path):
    seen = dataclasses.replace(classifier, crop=0.5)
    seen.save(tmp_path / "x.keras")
    with zipfile.ZipFile(tmp_path / "x.keras") as made:
        assert json.loads(made.read("involution.json")) == {**ABOUT, "crop": 0.5}
    again = saved_model.load(tmp_path / "x.keras")
    assert again.crop == 0.5
    write_image(tmp_path / "x.png", size=(40, 30))
    want = data.scale(data.read_image(tmp_path / "x.png", (4, 6), crop=0.5))
    np.testing.assert_array_equal(again.read(tmp_path / "x.png")[0], want)
    assert (classifier.read(tmp_path / "x.png")[0] != want).any()


def test_weights_of_a_file_for_a_model_that_is_there(classifier, tmp_path, monkeypatch):
    path = tmp_path / "x.keras"
    model, again = (keras.models.clone_model(classifier.model) for _ in range(2))
    dataclasses.replace(classifier, model=model).save(path)
    saved_model.load_weights(again, path)
    for got, want in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(got, want)
    checked = []
    monkeypatch.setattr(keras_files, "check", checked.append)
    saved_model.load_weights(again, path)
    assert checked == [path]
    missing = tmp_path / "missing.keras"
    assert f"Received: {missing}: " in message(saved_model.load_weights, again, missing)


def test_scores_of_large_logits_are_probabilities():
    logits = np.array([[1e4, 1e4, -1e4], [0, np.log(3), -np.inf]], "float32")
    asked = []
    model = types.SimpleNamespace(predict=lambda x, verbose: asked.append((x, verbose)) or logits)
    scores = Classifier(model, ("a", "b", "c"), (4, 6, 3)).scores("images")
    assert asked == [("images", 0)]
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, [[0.5, 0.5, 0], [0.25, 0.75, 0]], rtol=1e-7)


def test_where_a_classifier_is_looked_for(unread, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert saved_model.load("inn-cifar10").model.path == shipped.folder("inn-cifar10")
    assert saved_model.load(archive(tmp_path / "x.keras")).class_names == ("a", "말")
    folder = tmp_path / "folder"
    weights.save(folder, "cnn", {"classes": 2}, models.cnn(classes=2), ABOUT)
    read = saved_model.load(folder)
    assert (read.model.path, read.class_names, read.image_shape) == (folder, ("a", "말"), (4, 6, 3))
    # What lies here goes before what comes along.
    (tmp_path / "inn-cifar10").mkdir()
    assert message(saved_model.load, "inn-cifar10") == NO_CLASSIFIER + "inn-cifar10"
    assert message(saved_model.load, "magic") == (
        "A model must be a .keras file, a folder, or one of cnn-cifar10, inn-cifar10, "
        "rednet_tiny-cifar10. Received: magic, which does not exist"
    )


def test_a_model_suits_what_is_said_of_it(tmp_path):
    folder = tmp_path / "folder"
    about = {"class_names": ["a", "b"], "image_shape": [8, 12, 3], "scaling": "pixels / 255"}

    def load(model="cnn", arguments=None, **said):
        arguments = arguments or {"input_shape": (8, 12, 3), "classes": 2}
        weights.save(folder, model, arguments, models.MODELS[model](**arguments), about | said)
        return saved_model.load(folder)

    assert load().image_shape == (8, 12, 3)
    free = {"input_shape": (None, None, 3), "classes": 2, "head": "convolutional"}
    assert load(arguments=free, image_shape=[1, 2**22, 3]).image_shape == (1, 2**22, 3)
    rule = "A model must take the images that are said to be its own, "
    assert message(lambda: load(image_shape=[12, 8, 3])) == (
        f"{rule}(12, 8, 3). Received: {folder}, which takes (None, 8, 12, 3)"
    )
    rule = "A model must give one number for each of its "
    assert message(lambda: load(class_names="abc")) == (
        f"{rule}3 classes. Received: {folder}, which gives (None, 2)"
    )
    kernels = {"input_shape": (8, 12, 3), "head": "kernels"}
    assert message(lambda: load("inn", kernels)).startswith(rule)


def test_what_is_a_model_on_a_command_line(tmp_path):
    for text in ("x.keras", str(tmp_path), "inn-cifar10"):
        assert saved_model.is_model(text)
    for text in ("x.png", "x.kerasx", "missing", "inn", str(archive(tmp_path / "x.zip"))):
        assert not saved_model.is_model(text)


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "{",
        "[" * 10**5,
        "[1]",
        "null",
        "{}",
        *(
            json.dumps(ABOUT | change)
            for change in (
                {"class_names": 3},
                {"image_shape": [4, 6]},
                {"image_shape": [4, 6, 3, 1]},
                {"image_shape": 4},
                {"image_shape": ["a", "b", "c"]},
                {"image_shape": [float("inf"), 6, 3]},
                {"image_shape": [0, 6, 3]},
                {"image_shape": [-4, -6, 3]},
                {"image_shape": [2**22 + 1, 1, 3]},
                {"image_shape": [2**11, 2**11 + 1, 3]},
                {"crop": 0},
                {"crop": 1.01},
                {"crop": "all"},
                {"crop": float("nan")},
                {"image_shape": [4, 6, 1]},
                {"scaling": "pixels"},
                {"scaling": None},
                # More than any model has to say.
                {"x": "y" * 2**21},
            )
        ),
    ],
    ids=range(24),
)
def test_what_an_archive_says_wrongly_is_refused_in_one_line(entry, unread, tmp_path):
    path = archive(tmp_path / "x.keras", entry)
    assert message(saved_model.load, path) == f"{NO_CLASSIFIER}{path}"


def test_archives_that_cannot_be_read_are_refused_in_one_line(unread, tmp_path):
    path = archive(tmp_path / "x.keras", json.dumps({**ABOUT, "x": "y" * 99}))
    whole = path.read_bytes()
    listed = whole.index(b"PK\1\2")

    def changed(place, size, number):
        content = bytearray(whole)
        for start in (place[0], listed + place[1]):
            content[start : start + size] = number.to_bytes(size, "little")
        return bytes(content)

    for content in (
        b"",
        b"no zip",
        whole[:-30],
        archive(tmp_path / "y.keras", name="other.json").read_bytes(),
        archive(tmp_path / "y.keras", compression=zipfile.ZIP_LZMA).read_bytes(),
        changed((6, 8), 2, 1),  # encrypted
        changed((8, 10), 2, 77),  # a compression that nobody knows
        changed((14, 16), 4, 0),  # another checksum
        whole[:60] + bytes(20) + whole[80:],  # other data
        changed((18, 20), 4, struct.unpack("<I", whole[18:22])[0] - 5),  # cut off
    ):
        path.write_bytes(content)
        assert message(saved_model.load, path) == f"{NO_CLASSIFIER}{path}"


def test_code_in_a_keras_file_is_not_run(tmp_path):
    path, marker = tmp_path / "x.keras", str(tmp_path / "ran")
    inputs = keras.Input((2,))
    harm = keras.layers.Lambda(lambda x: (open(marker, "w").close(), x)[1], output_shape=(2,))
    keras.Model(inputs, harm(inputs)).save(path)
    if os.path.exists(marker):
        os.unlink(marker)
    said = message(saved_model.load_model, path)
    assert said.startswith(f"{NO_KERAS}{path}: ")
    assert "Lambda" in said
    assert not os.path.exists(marker)
    # The same file does run it where it is trusted: the test would see it.
    keras.saving.load_model(path, compile=False, safe_mode=False)(np.ones((1, 2), "float32"))
    assert os.path.exists(marker)


def test_what_is_no_model(tmp_path):
    file = tmp_path / "x.keras"
    assert message(saved_model.load_model, str(file)) == (
        "A model must be a .keras file, or a folder written by `involution convert`. "
        f"Received: {file}, which does not exist"
    )
    file.write_bytes(b"no zip")
    assert message(saved_model.load_model, file).startswith(f"{NO_KERAS}{file}: ")
    assert "config.json and model.safetensors" in message(saved_model.load_model, tmp_path)


def test_what_keras_says_in_many_lines_is_told_in_one(classifier, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("a\n b " * 1000)

    classifier.save(tmp_path / "x.keras")
    monkeypatch.setattr(keras.saving, "load_model", fail)
    said = message(saved_model.load_model, tmp_path / "x.keras")
    assert said == f"{NO_KERAS}{tmp_path / 'x.keras'}: {('a b ' * 250)}"
