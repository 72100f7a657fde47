"""Saving and loading of classifiers."""

import dataclasses
import json
import os
import pathlib
import struct
import types
import zipfile
from unittest import mock

import keras
import numpy as np
import pytest

from involution import models
from involution.data import decode, transforms
from involution.models import pretrained, weights
from involution.saving import classifier as classifiers
from involution.saving import keras_archive
from involution.saving.classifier import Classifier
from involution.utils.errors import InputError
from tests.support.images import write_image

METADATA = {
    "class_names": ["a", "말"],
    "image_shape": [4, 6, 3],
    "scaling": "pixels / 255",
    "outputs": "logits",
}
INVALID_CLASSIFIER = (
    "A model must be a .keras file or a folder with class names and an image shape, written by "
    "`involution compare` or `train`, or one of cnn-cifar10, inn-cifar10, rednet_tiny-cifar10. "
    "Received: "
)
INVALID_KERAS_FILE = (
    "A model must be a valid .keras file of Keras's and registered layers (for custom layers use "
    "keras.saving.load_model(file, custom_objects=...)). Received: "
)


@pytest.fixture(scope="module")
def classifier():
    layers = [keras.Input((4, 6, 3)), keras.layers.Flatten(), keras.layers.Dense(2)]
    return Classifier(keras.Sequential(layers), ("a", "말"), (4, 6, 3))


@pytest.fixture
def stub_model(monkeypatch):
    """Replaces model loading with a stub whose shapes match any metadata."""
    monkeypatch.setattr(
        classifiers,
        "load_model",
        lambda path: types.SimpleNamespace(
            path=path, input_shape=(None,) * 4, output_shape=mock.ANY
        ),
    )


def archive(path, entry=None, name="involution.json", compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(name, json.dumps(METADATA) if entry is None else entry)
    return path


def message(function, *arguments):
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_must_have_the_suffix_that_keras_reads(classifier, tmp_path):
    assert message(classifier.save, tmp_path / "x.h5").endswith(f"Received: {tmp_path / 'x.h5'}")
    assert not os.listdir(tmp_path)


@pytest.mark.long
def test_saved_classifier_round_trips(classifier, tmp_path):
    # The optimizer is not saved, because its state cannot be loaded on another backend.
    classifier.model.compile("adam", "mse")
    classifier.save(tmp_path / "x.keras")
    assert os.listdir(tmp_path) == ["x.keras"]
    with zipfile.ZipFile(tmp_path / "x.keras") as file:
        assert json.loads(file.read("involution.json")) == METADATA
    loaded = classifiers.load(str(tmp_path / "x.keras"))
    assert loaded.metadata == classifier.metadata
    assert (loaded.class_names, loaded.image_shape) == (("a", "말"), (4, 6, 3))
    for got, want in zip(loaded.model.get_weights(), classifier.model.get_weights(), strict=True):
        np.testing.assert_array_equal(got, want)
    assert not loaded.model.compiled
    assert classifiers.load_model(str(tmp_path / "x.keras")).output_shape == (None, 2)


def test_images_are_preprocessed_as_in_training(classifier, tmp_path):
    write_image(tmp_path / "x.png", size=(9, 7))
    images = classifier.read(tmp_path / "x.png")
    want = transforms.to_unit_float(decode.read_image(tmp_path / "x.png", (4, 6)))
    assert (images.shape, images.dtype) == ((1, 4, 6, 3), np.float32)
    np.testing.assert_array_equal(images[0], want)


def test_crop_fraction_is_saved_and_applied(classifier, tmp_path):
    cropped = dataclasses.replace(classifier, crop_fraction=0.5)
    cropped.save(tmp_path / "x.keras")
    with zipfile.ZipFile(tmp_path / "x.keras") as file:
        assert json.loads(file.read("involution.json")) == {**METADATA, "crop": 0.5}
    loaded = classifiers.load(tmp_path / "x.keras")
    assert loaded.crop_fraction == 0.5
    write_image(tmp_path / "x.png", size=(40, 30))
    want = transforms.to_unit_float(
        decode.read_image(tmp_path / "x.png", (4, 6), crop_fraction=0.5)
    )
    np.testing.assert_array_equal(loaded.read(tmp_path / "x.png")[0], want)
    assert (classifier.read(tmp_path / "x.png")[0] != want).any()


def test_load_weights_checks_the_archive(classifier, tmp_path, monkeypatch):
    path = tmp_path / "x.keras"
    model, target = (keras.models.clone_model(classifier.model) for _ in range(2))
    dataclasses.replace(classifier, model=model).save(path)
    classifiers.load_weights(target, path)
    for got, want in zip(target.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(got, want)
    checked = []
    monkeypatch.setattr(keras_archive, "check_weights", checked.append)
    classifiers.load_weights(target, path)
    assert checked == [path]
    missing = tmp_path / "missing.keras"
    assert f"Received: {missing}: " in message(classifiers.load_weights, target, missing)


def test_predict_proba_of_large_logits_does_not_overflow():
    logits = np.array([[1e4, 1e4, -1e4], [0, np.log(3), -np.inf]], "float32")
    calls = []
    model = types.SimpleNamespace(predict=lambda x, verbose: calls.append((x, verbose)) or logits)
    scores = Classifier(model, ("a", "b", "c"), (4, 6, 3)).predict_proba("images")
    assert calls == [("images", 0)]
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, [[0.5, 0.5, 0], [0.25, 0.75, 0]], rtol=1e-7)


@pytest.mark.long
def test_outputs_are_saved_and_probabilities_not_transformed_again(classifier, tmp_path):
    plain = classifier.model
    model = keras.Model(plain.inputs[0], keras.layers.Softmax()(plain.outputs[0]))
    saved = dataclasses.replace(classifier, model=model, outputs="probabilities")
    saved.save(tmp_path / "x.keras")
    loaded = classifiers.load(tmp_path / "x.keras")
    assert loaded.metadata == saved.metadata
    assert loaded.outputs == "probabilities"
    images = np.random.default_rng(0).random((5, 4, 6, 3), "float32")
    scores = loaded.predict_proba(images)
    assert scores.dtype == np.float64
    np.testing.assert_array_equal(scores, model.predict(images, verbose=0))
    np.testing.assert_allclose(scores, classifier.predict_proba(images), rtol=1e-5)


def test_files_without_outputs_are_of_logits(stub_model, tmp_path):
    metadata = {key: value for key, value in METADATA.items() if key != "outputs"}
    path = archive(tmp_path / "x.keras", json.dumps(metadata))
    assert classifiers.load(path).outputs == "logits"


@pytest.mark.long
def test_load_accepts_files_folders_and_names(stub_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert classifiers.load("inn-cifar10").model.path == pretrained.path("inn-cifar10")
    assert classifiers.load(archive(tmp_path / "x.keras")).class_names == ("a", "말")
    folder = tmp_path / "folder"
    weights.save(folder, "cnn", {"classes": 2}, models.cnn(classes=2), METADATA)
    loaded = classifiers.load(folder)
    assert (loaded.model.path, loaded.class_names, loaded.image_shape) == (
        folder,
        ("a", "말"),
        (4, 6, 3),
    )
    # Local folders take precedence over pretrained models.
    (tmp_path / "inn-cifar10").mkdir()
    rule = (
        "A model must be a .keras file, a folder with config.json and model.safetensors, or one "
        "of cnn-cifar10, inn-cifar10, rednet_tiny-cifar10. Received: "
    )
    # As the folder of a run.
    (tmp_path / "inn-cifar10" / "config.json").write_text("{}")
    assert message(classifiers.load, "inn-cifar10") == (
        f"{rule}inn-cifar10, a folder without model.safetensors"
    )
    assert message(classifiers.load, "magic") == f"{rule}magic, which does not exist"
    (tmp_path / "inn-cifar10" / "model.safetensors").touch()
    assert message(classifiers.load, "inn-cifar10").startswith(
        f"{INVALID_CLASSIFIER}inn-cifar10: CheckpointError: "
    )


@pytest.mark.long
def test_metadata_must_match_the_model(tmp_path):
    folder = tmp_path / "folder"
    metadata = {"class_names": ["a", "b"], "image_shape": [8, 12, 3], "scaling": "pixels / 255"}

    def load(model="cnn", arguments=None, **changes):
        arguments = arguments or {"input_shape": (8, 12, 3), "classes": 2}
        weights.save(
            folder, model, arguments, models.MODELS[model](**arguments), metadata | changes
        )
        return classifiers.load(folder)

    assert load().image_shape == (8, 12, 3)
    any_size = {"input_shape": (None, None, 3), "classes": 2, "head": "convolutional"}
    assert load(arguments=any_size, image_shape=[1, 2**22, 3]).image_shape == (1, 2**22, 3)
    prefix = "A model's input shape must match its metadata, "
    assert message(lambda: load(image_shape=[12, 8, 3])) == (
        f"{prefix}(None, 12, 8, 3). Received: {folder}, with input shape (None, 8, 12, 3)"
    )
    prefix = "A model's output shape must match its "
    assert message(lambda: load(class_names="abc")) == (
        f"{prefix}3 classes, (None, 3). Received: {folder}, with output shape (None, 2)"
    )
    kernels = {"input_shape": (8, 12, 3), "head": "kernels"}
    assert message(lambda: load("inn", kernels)).startswith(prefix)


def test_is_model_accepts_files_folders_and_pretrained_names(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    for name in ("x.keras", str(tmp_path / "model"), "inn-cifar10"):
        assert classifiers.is_model(name)
    assert classifiers.resolve("inn-cifar10") == pretrained.path("inn-cifar10")
    # A local folder has precedence, for every command.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inn-cifar10").mkdir()
    assert not classifiers.is_model("inn-cifar10")
    assert classifiers.resolve("inn-cifar10") == pathlib.Path("inn-cifar10")
    for name in (
        str(tmp_path),
        "x.png",
        "x.kerasx",
        "missing",
        "inn",
        str(archive(tmp_path / "x.zip")),
    ):
        assert not classifiers.is_model(name)


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
            json.dumps(METADATA | change)
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
                {"outputs": "scores"},
                {"outputs": None},
                # Larger than the size limit of the metadata.
                {"x": "y" * 2**21},
            )
        ),
    ],
    ids=range(26),
)
def test_invalid_metadata_is_rejected(entry, stub_model, tmp_path):
    path = archive(tmp_path / "x.keras", entry)
    assert message(classifiers.load, path).startswith(f"{INVALID_CLASSIFIER}{path}: ")


def test_invalid_metadata_is_named(stub_model, tmp_path):
    path = archive(tmp_path / "x.keras", json.dumps(METADATA | {"scaling": "pixels"}))
    expected = f"{INVALID_CLASSIFIER}{path}: ValueError: scaling 'pixels'"
    assert message(classifiers.load, path) == expected
    assert message(classifiers.image_shape, path) == expected


def test_models_without_class_names_are_loaded_as_models(classifier, tmp_path):
    classifier.save(tmp_path / "with.keras")
    assert isinstance(classifiers.load_any(tmp_path / "with.keras"), Classifier)
    classifier.model.save(tmp_path / "without.keras")
    assert isinstance(classifiers.load_any(tmp_path / "without.keras"), keras.Model)
    (tmp_path / "damaged.keras").write_bytes(b"PK")
    assert INVALID_KERAS_FILE in message(classifiers.load_any, tmp_path / "damaged.keras")


def test_out_of_memory_is_not_an_invalid_file(stub_model, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise MemoryError

    path = archive(tmp_path / "x.keras")
    monkeypatch.setattr(classifiers.keras_archive, "member", fail)
    with pytest.raises(MemoryError):
        classifiers.load(path)
    monkeypatch.setattr(classifiers.keras_archive, "check_weights", fail)
    with pytest.raises(MemoryError):
        classifiers.load_weights(None, path)


def test_invalid_archives_are_rejected(stub_model, tmp_path):
    path = archive(tmp_path / "x.keras", json.dumps({**METADATA, "x": "y" * 99}))
    valid = path.read_bytes()
    directory_entry = valid.index(b"PK\1\2")

    def patched(offsets, size, value):
        content = bytearray(valid)
        for start in (offsets[0], directory_entry + offsets[1]):
            content[start : start + size] = value.to_bytes(size, "little")
        return bytes(content)

    for content in (
        b"",
        b"no zip",
        valid[:-30],
        archive(tmp_path / "y.keras", name="other.json").read_bytes(),
        archive(tmp_path / "y.keras", compression=zipfile.ZIP_LZMA).read_bytes(),
        patched((6, 8), 2, 1),  # encrypted
        patched((8, 10), 2, 77),  # an unknown compression
        patched((14, 16), 4, 0),  # another checksum
        valid[:60] + bytes(20) + valid[80:],  # other data
        patched((18, 20), 4, struct.unpack("<I", valid[18:22])[0] - 5),  # truncated
    ):
        path.write_bytes(content)
        assert message(classifiers.load, path).startswith(f"{INVALID_CLASSIFIER}{path}: ")


def test_code_in_a_keras_file_is_not_executed(tmp_path):
    path, marker = tmp_path / "x.keras", str(tmp_path / "ran")
    inputs = keras.Input((2,))
    layer = keras.layers.Lambda(lambda x: (open(marker, "w").close(), x)[1], output_shape=(2,))
    keras.Model(inputs, layer(inputs)).save(path)
    if os.path.exists(marker):
        os.unlink(marker)
    text = message(classifiers.load_model, path)
    assert text.startswith(f"{INVALID_KERAS_FILE}{path}: ")
    assert "Lambda" in text
    assert not os.path.exists(marker)
    # Control: with safe_mode=False, Keras executes the code and the marker appears.
    keras.saving.load_model(path, compile=False, safe_mode=False)(np.ones((1, 2), "float32"))
    assert os.path.exists(marker)


def test_files_that_are_not_models_are_rejected(tmp_path):
    file = tmp_path / "x.keras"
    assert message(classifiers.load_model, str(file)) == (
        "A model must be a .keras file, or a folder written by `involution convert`. "
        f"Received: {file}, which does not exist"
    )
    file.write_bytes(b"no zip")
    assert message(classifiers.load_model, file).startswith(f"{INVALID_KERAS_FILE}{file}: ")
    assert "config.json and model.safetensors" in message(classifiers.load_model, tmp_path)


def test_keras_errors_are_shortened_to_one_line(classifier, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("a\n b " * 1000)

    classifier.save(tmp_path / "x.keras")
    monkeypatch.setattr(keras.saving, "load_model", fail)
    text = message(classifiers.load_model, tmp_path / "x.keras")
    assert (
        text == f"{INVALID_KERAS_FILE}{tmp_path / 'x.keras'}: ValueError: {('a b ' * 250)[:997]}..."
    )
