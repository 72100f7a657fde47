"""The folder format of models: names of weights, content, damaged folders."""

import json
import os
import pathlib
import types

import keras
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from involution import models
from involution.models import weights
from involution.models.checkpoint_readers import CheckpointError
from involution.utils.errors import WriteError
from tests.models import test_checkpoint_readers
from tests.support.backends import numpy
from tests.support.keras_io_formula import randomize

pytestmark = pytest.mark.any_backend

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


def rejection(folder):
    return test_checkpoint_readers.rejection(folder, weights.load)


@pytest.mark.parametrize("name", SMALL)
def test_round_trip_is_exact(name, tmp_path):
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
def test_names_do_not_depend_on_earlier_models(name, tmp_path):
    first, second = (models.MODELS[name](**SMALL[name]) for _ in range(2))
    names = weights.named_weights(first)
    assert len(names) == len(first.weights)
    assert list(weights.named_weights(second)) == list(names)
    first.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert list(weights.named_weights(loaded)) == list(names)
    for variable, same in zip(names.values(), weights.named_weights(loaded).values(), strict=True):
        np.testing.assert_array_equal(numpy(variable.value), numpy(same.value))


def test_names_are_layers_and_paths_inside():
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


@pytest.mark.long
def test_equal_names_are_rejected():
    keras.utils.clear_session()  # the first layer is conv2d, regardless of other tests
    x = inputs = keras.Input((4, 4, 16))
    # An automatic name of another class.
    named = keras.layers.Conv2DTranspose(16, 1, name="conv2d_1")
    for layer in (keras.layers.Conv2D(16, 1), named, keras.layers.Conv2D(16, 1, name="conv2d_9")):
        x = layer(x)
    with pytest.raises(ValueError, match="Received: conv2d_1/kernel twice"):
        weights.named_weights(keras.Model(inputs, x))


class Layer:
    """A stand-in for a layer: class, name and the paths of its weights."""

    def __init__(self, name, *paths):
        self.name, self.weights = name, [types.SimpleNamespace(path=path) for path in paths]


class Conv2D(Layer):
    pass


class BatchNormalization(Layer):
    pass


def test_numbering_is_per_model_and_per_layer():
    layers = [
        Layer("input_layer_3"),
        Conv2D("conv2d_7", "conv2d_7/kernel", "conv2d_7/bias"),
        BatchNormalization("batch_normalization_4", "batch_normalization_4/gamma"),
        Conv2D("conv2d_9", "conv2d_9/kernel"),
        # A user's names are kept.
        Conv2D("mine_3", "mine_3/kernel"),
        Layer(
            "inv_1", *(f"inv_1/seq_{path}" for path in ("5/c_8/a", "5/c_8/b", "5/c_9/a", "6/c_3/a"))
        ),
        # Built before its parent, whose name is missing; and inside another layer.
        Layer("inv_2", "seq_7/c_1/a", "outer/inv_2/seq_9/c_1/a"),
    ]
    named = weights.named_weights(types.SimpleNamespace(layers=layers))
    assert list(named) == [
        "conv2d/kernel",
        "conv2d/bias",
        "batch_normalization/gamma",
        "conv2d_1/kernel",
        "mine_3/kernel",
        "inv_1/seq/c/a",
        "inv_1/seq/c/b",
        "inv_1/seq/c_1/a",
        "inv_1/seq_1/c/a",
        "inv_2/seq/c/a",
        "inv_2/seq_1/c/a",
    ]
    variables = [variable for layer in layers for variable in layer.weights]
    assert list(named.values()) == variables
    layers.append(Layer("mine_3", "kernel"))
    with pytest.raises(ValueError, match="Weights must have unique names") as e:
        weights.named_weights(types.SimpleNamespace(layers=layers))
    assert str(e.value).endswith(": mine_3/kernel twice")


def test_differences_are_listed():
    weights.check_tensors({"a": (2,), "b": None}, {"a": (2,), "b": (3, 4)}, "x")
    with pytest.raises(CheckpointError) as caught:
        weights.check_tensors(
            {"a": (2,), "b": None, "c": (1,), "d": (5,)}, {"c": (2,), "d": (5, 1), "e": ()}, "x.y"
        )
    assert str(caught.value) == (
        "Tensors must match the names and shapes of the model's weights. "
        "Received: x.y, with 2 missing: a, b; "
        "1 unknown: e; 2 of another shape: c (2,) instead of (1,), d (5, 1) instead of (5,)"
    )
    assert weights.format_names([]) == ""
    assert weights.format_names(range(20)) == ", ".join(map(str, range(20)))
    assert weights.format_names(range(22)) == ", ".join(map(str, range(20))) + " and 2 more"
    assert weights.format_names("abc", 1) == "a and 2 more"
    # Names are from an untrusted file.
    assert weights.format_names(["x" * 300, "é\n"]) == "x" * 200 + r", \xe9\n"


class Variable:
    """A stand-in for the weight of a model."""

    path = "head/kernel"

    def __init__(self, dtype="float32", value=None):
        self.dtype = dtype
        self.value = np.zeros((2, 3), dtype) if value is None else value
        self.shape = self.value.shape

    def assign(self, value):
        self.value = value


def small(monkeypatch, **options):
    """Adds a model ``small`` to ``weights.MODELS``; returns the arguments of its calls."""
    calls = []

    def build(**arguments):
        calls.append(arguments)
        if "wings" in arguments:
            raise RuntimeError("no\n  " + "wings " * 100)
        layer = types.SimpleNamespace(name="head", weights=[Variable(**options)])
        return types.SimpleNamespace(layers=[layer])

    monkeypatch.setitem(weights.MODELS, "small", build)
    return calls


def test_content_of_a_folder(tmp_path, monkeypatch):
    calls = small(monkeypatch, value=np.arange(6, dtype="float64").reshape(3, 2).T)
    model = weights.MODELS["small"]()
    arguments = {"classes": 3, "sizes": (1, 2)}
    weights.save(str(tmp_path / "a" / "b"), "small", arguments, model, {"note": "é"})
    assert json.loads((tmp_path / "a" / "b" / "config.json").read_text()) == {
        "format": "involution model",
        "version": 1,
        "name": "small",
        "arguments": {"classes": 3, "sizes": [1, 2]},
        "extra": {"note": "é"},
    }
    stored = load_file(tmp_path / "a" / "b" / "model.safetensors")
    assert list(stored) == ["head/kernel"]
    np.testing.assert_array_equal(stored["head/kernel"], [[0, 2, 4], [1, 3, 5]])
    again = weights.load(str(tmp_path / "a" / "b"))
    assert calls[-1] == {"classes": 3, "sizes": (1, 2)}
    np.testing.assert_array_equal(again.layers[0].weights[0].value, [[0, 2, 4], [1, 3, 5]])
    # To an existing folder, without extra.
    weights.save(tmp_path, "small", {}, model)
    assert weights.read_config(str(tmp_path))["extra"] == {}


@pytest.mark.parametrize("failing", ["model.safetensors", "config.json"])
def test_a_folder_with_a_configuration_is_complete(failing, tmp_path, monkeypatch):
    small(monkeypatch)
    model = weights.MODELS["small"]()
    weights.save(tmp_path, "small", {}, model)
    real = pathlib.Path.replace

    def replace(source, target):
        if target.name == failing:
            raise OSError("killed")
        return real(source, target)

    monkeypatch.setattr(pathlib.Path, "replace", replace)
    with pytest.raises(WriteError, match="killed"):
        weights.save(tmp_path, "small", {}, model)
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_out_of_memory_is_not_an_invalid_folder(tmp_path, monkeypatch):
    small(monkeypatch)
    weights.save(tmp_path, "small", {}, weights.MODELS["small"]())

    def build():
        raise MemoryError

    monkeypatch.setitem(weights.MODELS, "small", build)
    with pytest.raises(MemoryError):
        weights.load(tmp_path)


def test_failed_save_keeps_the_model(tmp_path, monkeypatch):
    small(monkeypatch)
    model = weights.MODELS["small"]()
    weights.save(tmp_path, "small", {}, model, {"note": "old"})
    monkeypatch.setattr(weights, "save_arrays", lambda tensors: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        weights.save(tmp_path, "small", {}, model, {"note": "new"})
    assert weights.read_config(tmp_path)["extra"] == {"note": "old"}
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_names_of_models_must_be_known(tmp_path):
    with pytest.raises(ValueError, match=r"^`name` must be one of .*\. Received: name='x'$"):
        weights.save(tmp_path, "x", {}, None)


@pytest.mark.parametrize(
    ("kind", "stored"),
    [("float16", "F16"), ("float32", "F32"), ("float64", "F64"), ("bfloat16", "F32")],
)
def test_dtypes_of_weights(kind, stored, tmp_path, monkeypatch):
    value = np.array([[0.1, 0.2, 0.3]] * 2, "float32" if kind == "bfloat16" else kind)
    small(monkeypatch, dtype=kind, value=value)
    model = weights.MODELS["small"]()
    weights.save(tmp_path, "small", {}, model)
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.get_slice("head/kernel").get_dtype() == stored
    again = weights.load(tmp_path).layers[0].weights[0].value
    assert again.dtype == value.dtype
    np.testing.assert_array_equal(again, value)


def test_assign_copies_and_casts():
    variable, array = Variable("float16"), np.arange(6, dtype="float64").reshape(3, 2).T
    weights.assign(variable, array)
    assert variable.value.dtype == np.float16
    assert variable.value.flags.c_contiguous
    np.testing.assert_array_equal(variable.value, array)
    same = np.zeros((2, 3), "float32")
    variable = Variable()
    weights.assign(variable, same)
    assert not np.shares_memory(variable.value, same)


def test_error_messages(tmp_path, monkeypatch):
    small(monkeypatch)
    weights.save(tmp_path, "small", {}, weights.MODELS["small"]())
    config, tensors = tmp_path / "config.json", tmp_path / "model.safetensors"
    original = json.loads(config.read_text())

    def message(**changes):
        config.write_text(json.dumps({**original, **changes}))
        return rejection(tmp_path)

    rule = f"A model's arguments must be valid for small. Received: {config}: RuntimeError: "
    assert (
        message(arguments={"wings": 2})
        == (rule + "no " + "wings " * 100)[: len(rule) + 297] + "..."
    )
    rule = (
        "A model folder must contain config.json and model.safetensors as involution writes them. "
    )
    rule += f"Received: {config}: "
    for change, reason in (
        ({"format": "x"}, "ValueError: format 'x', version 1"),
        ({"version": 2}, "ValueError: format 'involution model', version 2"),
        ({"name": "huge"}, "ValueError: unknown model 'huge'"),
        ({"arguments": [1]}, "TypeError: arguments and extra must be objects"),
        ({"extra": None}, "TypeError: arguments and extra must be objects"),
        ({"extra": {"x": "y" * 2**20}}, "ValueError: more than 1048576 bytes"),
    ):
        assert message(**change) == rule + reason
    text = json.dumps(original)
    config.write_text(text + " " * (2**20 - len(text)))
    weights.load(tmp_path)
    config.write_text(text + " " * (2**20 - len(text) + 1))
    assert rejection(tmp_path) == f"{rule}ValueError: more than 1048576 bytes"
    config.write_text(text)
    save_file({"head/kernel": np.ones((2, 3), "int32"), "b": np.ones(0, "f")}, tensors)
    assert rejection(tmp_path) == (
        "A model's tensors must have a dtype of F16, F32, F64. Received: head/kernel of dtype I32"
    )
    save_file({"head/kernel": np.ones((2, 4), "f")}, tensors)
    assert rejection(tmp_path) == (
        "Tensors must match the names and shapes of the model's weights. Received: "
        f"{tensors}, with 1 of another shape: head/kernel (2, 4) instead of (2, 3)"
    )
    tensors.write_bytes(b"")
    rule = f"A model's weights must be a complete safetensors file. Received: {tensors}: Safetensor"
    assert rejection(tmp_path).startswith(rule)
    tensors.unlink()
    assert "No such file" in rejection(tmp_path)


def test_arguments_that_do_not_bound_the_build_are_rejected(tmp_path, monkeypatch):
    calls = small(monkeypatch)
    weights.save(tmp_path, "small", {}, weights.MODELS["small"]())
    config = tmp_path / "config.json"
    original = json.loads(config.read_text())
    calls.clear()

    def message(**arguments):
        config.write_text(json.dumps({**original, "arguments": arguments}))
        return rejection(tmp_path)

    rule = (
        "A model's arguments must be numbers, strings, booleans, null, or lists of them. Received: "
    )
    harm = {"class_name": "Lambda", "config": {}}
    assert message(a={"b": 1}) == f"{rule}{config} with a=\"{{'b': 1}}\""
    assert message(a=[1, harm]).startswith(f"{rule}{config} with a=")
    assert message(a=[[1]]) == f"{rule}{config} with a='([1],)'"
    rule = "`blocks` must not exceed the number of tensors. Received: "
    assert message(blocks=2) == f"{rule}{config} with blocks=2 and 1 tensors"
    assert message(blocks=[1, 9999]) == f"{rule}{config} with blocks=(1, 9999) and 1 tensors"
    assert calls == []
    for arguments in ({"blocks": 1}, {"blocks": [1, 0]}, {"blocks": None}, {"blocks": ["x", 1]}):
        config.write_text(json.dumps({**original, "arguments": arguments}))
        weights.load(tmp_path)


def test_shapes_are_compared_before_the_build(tmp_path, monkeypatch):
    calls = small(monkeypatch)
    weights.save(tmp_path, "small", {}, weights.MODELS["small"]())
    calls.clear()
    weights.load(tmp_path)
    assert len(calls) == 2
    save_file({"head/kernel": np.ones((2, 4), "f")}, tmp_path / "model.safetensors")
    calls.clear()
    rejection(tmp_path)
    assert len(calls) == 1


def test_only_registered_models_are_saved(tmp_path):
    with pytest.raises(ValueError, match="`name` must be one of"):
        weights.save(tmp_path / "new", "rednet_huge", {}, models.cnn())
    assert not (tmp_path / "new").exists()


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path):
    saved("cnn", tmp_path)
    file = tmp_path / "model.safetensors"
    original = load_file(file)

    def message(changes):
        tensors = {k: v for k, v in (original | changes).items() if v is not None}
        save_file(tensors, file)
        return rejection(tmp_path)

    assert "2 missing: conv2d/bias, conv2d_1/bias" in message(
        {"conv2d/bias": None, "conv2d_1/bias": None}
    )
    assert "1 unknown: more" in message({"more": np.ones(2, "float32")})
    assert "conv2d/bias (31,) instead of (32,)" in message({"conv2d/bias": np.ones(31, "f")})
    assert "dtype of F16, F32, F64" in message({"conv2d/bias": np.ones(32, "int32")})
    save_file({k: v.astype("float64") for k, v in original.items()}, file)
    weights.load(tmp_path)


def test_invalid_configurations_are_rejected(tmp_path):
    saved("cnn", tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())

    def message(**changes):
        file.write_text(json.dumps({**config, **changes}))
        return rejection(tmp_path)

    assert "format 'x'" in message(format="x")
    assert "version 2" in message(version=2)
    assert "unknown model 'x'" in message(name="x")
    assert "arguments and extra" in message(arguments=[1])
    assert "must be valid for cnn" in message(arguments={"classes": 7, "wings": 3})
    assert "must be valid for cnn" in message(arguments={"classes": 7, "input_shape": "large"})
    # Rejected before memory is allocated.
    text = message(arguments={**config["arguments"], "classes": 10**12})
    assert "must be valid for cnn. " in text
    assert "elements, of which " in text
    assert "more than" in message(extra={"x": "y" * 2**20})
    for text in ("", "[]", "{", '"x"', "[" * 10**5, "\udcff", '{"format": 1}'):
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
        rejection(tmp_path)
    file.unlink()
    assert "No such file" in rejection(tmp_path)
    rejection(tmp_path / "missing")


def test_damaged_weights_give_an_error_or_a_model(tmp_path):
    saved("cnn", tmp_path)
    file = tmp_path / "model.safetensors"
    original = file.read_bytes()
    for cut in (0, 7, 8, 100, 1000, len(original) - 1):
        file.write_bytes(original[:cut])
        rejection(tmp_path)
    rng = np.random.default_rng(0)
    header = 8 + int.from_bytes(original[:8], "little")
    errors = 0
    for _ in range(40):
        damaged = bytearray(original)
        damaged[rng.integers(header)] ^= 1 << rng.integers(8)
        file.write_bytes(damaged)
        try:
            assert weights.load(tmp_path).output_shape == (None, 7)
        except CheckpointError:
            errors += 1
    assert errors > 20
    file.unlink()
    rejection(tmp_path)
    file.mkdir()
    rejection(tmp_path)
