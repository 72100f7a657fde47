"""A model in a folder: names of weights, what is stored, what damaged folders do."""

import json

import keras
import numpy as np
import pytest
import test_checkpoints
from frameworks import numpy
from keras_io_formula import randomize
from safetensors.numpy import load_file, save_file

from involution import models
from involution.models import weights
from involution.models.checkpoints import CheckpointError

SMALL = {
    "cnn": {"input_shape": (8, 12, 3), "classes": 7},
    "inn": {"input_shape": (8, 8, 4), "classes": 3, "group_number": 2},
    "rednet_tiny": {"input_shape": (None, None, 3), "classes": 4},
}
IMAGES = {name: (2, 8, 12 if name == "cnn" else 8, 4 if name == "inn" else 3) for name in SMALL}


def saved(name, folder):
    model = models.MODELS[name](**SMALL[name])
    randomize(model)
    weights.save(folder, name, SMALL[name], model, {"note": ["a", 1]})
    return model


def refused(folder):
    return test_checkpoints.refused(folder, weights.load)


@pytest.mark.parametrize("name", SMALL)
def test_a_folder_gives_the_model_back_to_the_bit(name, tmp_path):
    model = saved(name, tmp_path / "new" / "folder")
    again = weights.load(tmp_path / "new" / "folder")
    images = np.random.default_rng(0).random(IMAGES[name], dtype="float32")
    np.testing.assert_array_equal(numpy(again(images)), numpy(model(images)))
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert weights.read_config(tmp_path / "new" / "folder")["extra"] == {"note": ["a", 1]}


@pytest.mark.parametrize("name", SMALL)
def test_names_do_not_depend_on_what_was_built_before(name, tmp_path):
    first, second = (models.MODELS[name](**SMALL[name]) for _ in range(2))
    names = weights.named_weights(first)
    assert len(names) == len(first.weights)
    assert list(weights.named_weights(second)) == list(names)
    first.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert list(weights.named_weights(loaded)) == list(names)
    for variable, same in zip(names.values(), weights.named_weights(loaded).values(), strict=True):
        np.testing.assert_array_equal(numpy(variable.value), numpy(same.value))


def test_names_are_the_layers_and_the_paths_inside():
    assert list(weights.named_weights(models.inn()))[6:10] == [
        "inv_1/sequential/conv2d_1/kernel",
        "inv_1/sequential/conv2d_1/bias",
        "inv_2/sequential/conv2d/kernel",
        "inv_2/sequential/conv2d/bias",
    ]
    assert list(weights.named_weights(models.cnn()))[-4:] == [
        "dense/kernel",
        "dense/bias",
        "dense_1/kernel",
        "dense_1/bias",
    ]
    names = list(weights.named_weights(models.rednet_tiny()))
    assert "stage1_block1_2_involution/bottleneck/normalization/moving_mean" in names
    assert names[-2:] == ["logits/kernel", "logits/bias"]


def test_weights_of_one_name_are_refused():
    x = inputs = keras.Input((4, 4, 16))
    # A name as Keras would count it, of a layer of another class.
    named = keras.layers.Conv2DTranspose(16, 1, name="conv2d_1")
    for layer in (keras.layers.Conv2D(16, 1), named, keras.layers.Conv2D(16, 1, name="conv2d_9")):
        x = layer(x)
    with pytest.raises(ValueError, match="Received: conv2d_1/kernel twice"):
        weights.named_weights(keras.Model(inputs, x))


def test_only_models_with_a_name_are_saved(tmp_path):
    with pytest.raises(ValueError, match="`name` must be one of"):
        weights.save(tmp_path / "new", "rednet_huge", {}, models.cnn())
    assert not (tmp_path / "new").exists()


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path):
    saved("cnn", tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)

    def message(changes):
        tensors = {k: v for k, v in (whole | changes).items() if v is not None}
        save_file(tensors, file)
        return refused(tmp_path)

    assert "2 missing: conv2d/bias, conv2d_1/bias" in message(
        {"conv2d/bias": None, "conv2d_1/bias": None}
    )
    assert "1 unknown: more" in message({"more": np.ones(2, "float32")})
    assert "conv2d/bias (31,) instead of (32,)" in message({"conv2d/bias": np.ones(31, "f")})
    assert "types F16, F32, F64" in message({"conv2d/bias": np.ones(32, "int32")})
    save_file({k: v.astype("float64") for k, v in whole.items()}, file)
    weights.load(tmp_path)


def test_configurations_that_are_none_are_refused(tmp_path):
    saved("cnn", tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())

    def message(**changes):
        file.write_text(json.dumps({**config, **changes}))
        return refused(tmp_path)

    assert "format 'x'" in message(format="x")
    assert "version 2" in message(version=2)
    assert "unknown model 'x'" in message(name="x")
    assert "arguments and extra" in message(arguments=[1])
    assert "must suit cnn" in message(arguments={"classes": 7, "wings": 3})
    assert "must suit cnn" in message(arguments={"classes": 7, "input_shape": "large"})
    # Before memory is taken.
    assert "size of one of its tensors" in message(arguments={"classes": 10**12})
    assert "more than" in message(extra={"x": "y" * 2**20})
    for text in ("", "[]", "{", '"x"', "[" * 10**5, "\udcff", '{"format": 1}'):
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
        refused(tmp_path)
    file.unlink()
    assert "No such file" in refused(tmp_path)
    refused(tmp_path / "missing")


def test_damaged_weights_end_in_the_error_or_in_a_model(tmp_path):
    saved("cnn", tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for cut in (0, 7, 8, 100, 1000, len(whole) - 1):
        file.write_bytes(whole[:cut])
        refused(tmp_path)
    rng = np.random.default_rng(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    errors = 0
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[rng.integers(header)] ^= 1 << rng.integers(8)
        file.write_bytes(damaged)
        try:
            assert weights.load(tmp_path).output_shape == (None, 7)
        except CheckpointError:
            errors += 1
    assert errors > 20
    file.unlink()
    refused(tmp_path)
    file.mkdir()
    refused(tmp_path)
