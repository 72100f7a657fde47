"""The classifiers of the keras.io example; models saved on one backend and loaded on another."""

import collections
import importlib.util
import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest

import involution
from involution.models import cnn, inn
from tests.support import keras_io_formula as formula
from tests.support.backends import each_other_backend, numpy
from tests.support.keras_io_formula import randomize, relative_error
from tests.support.paths import FILES, TESTS


def images(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, "float32")


# --- Summaries of the example --------------------------------------------------------------------


def with_optimizer(model):
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.optimizer.build(model.trainable_variables)
    return model


def renumbered(rows):
    """The example's rows with automatic names numbered as in a new process."""
    seen: collections.Counter = collections.Counter()
    result = []
    for name, kind, *others in rows:
        base = re.sub(r"_\d+$", "", name)
        if base.replace("_", "") == kind.lower():
            name = f"{base}_{seen[base]}" if seen[base] else base
            seen[base] += 1
        result.append((name, kind, *others))
    return result


@pytest.mark.long
def test_cnn_matches_the_summary_of_the_example():
    model = with_optimizer(cnn())
    # The example's model is a Sequential, whose summary has no input.
    first, *rows = formula.rows(model)
    assert renumbered([first]) == [("input_layer", "InputLayer", (None, 32, 32, 3), 0)]
    assert rows == renumbered(formula.CNN)
    assert formula.totals(model) == formula.CNN_TOTALS


@pytest.mark.long
def test_inn_matches_the_summary_of_the_example():
    model = with_optimizer(inn())
    assert model.name == "inv_model"
    first, *rows = formula.rows(model)
    assert [*renumbered([first]), *rows] == renumbered(formula.INN)
    totals = list(formula.INN_TOTALS)
    if model.optimizer.iterations.dtype == "int32":
        # The step counter has 8 bytes on TensorFlow, on which the example ran, and 4 on PyTorch.
        totals[0] = totals[0].replace("153.25", "153.24")
    assert formula.totals(model) == totals


@pytest.mark.long
@pytest.mark.parametrize("file", ["keras", "weights.h5"])
def test_files_of_the_example_load(file):
    path = FILES / f"example_inv_model.{file}"
    if file == "keras":
        custom = {"Involution": involution.Involution}
        model = keras.models.load_model(path, custom_objects=custom)
        assert type(model.get_layer("inv_2")) is involution.Involution
    else:
        model = inn()
        model.load_weights(path)
    with np.load(FILES / "example_inv_model.npz") as stored:
        # The example's model has a list of one input.
        inputs = [stored["inputs"]] if isinstance(model.input, list) else stored["inputs"]
        assert relative_error(model.predict(inputs, verbose=0), stored["logits"]) < 1e-5


# --- Variants ------------------------------------------------------------------------------------


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("arguments", "layer_parameters"),
    [
        # Hidden width 1: 3 + 1, 4 for the normalization, 2 for each kernel channel.
        ({"kernel_size": 5}, 8 + 2 * 25),
        ({"group_number": 3}, 8 + 2 * 27),
        # Hidden width 3: 12 + 12, 4 for each kernel channel.
        ({"reduction_ratio": 1}, 24 + 4 * 9),
        ({"kernel_generator": "linear"}, 4 * 9),
        # No first bias: 3 + 4, 2 for each kernel channel.
        ({"kernel_generator": "bottleneck"}, 7 + 2 * 9),
        (
            {"kernel_generator": involution.kernel_generators.Bottleneck(3), "group_number": 3},
            7 + 2 * 27,
        ),
        ({"kernel_generator": keras.layers.Conv2D(9, 3, padding="same")}, 28 * 9),
    ],
)
def test_inn_variants(arguments, layer_parameters):
    model = inn((8, 12, 3), classes=4, **arguments)
    parameters = [model.get_layer(f"inv_{i}").count_params() for i in (1, 2, 3)]
    assert parameters == [layer_parameters] * 3
    randomize(model)
    logits = numpy(model(images(2, 8, 12, 3)))
    assert logits.shape == (2, 4)
    assert not np.allclose(logits[0], logits[1])


@pytest.mark.any_backend
def test_every_stage_has_its_own_generator():
    generator = involution.kernel_generators.Linear()
    model = inn((8, 8, 3), kernel_generator=generator)
    stages = [model.get_layer(f"inv_{i}").kernel_generator for i in (1, 2, 3)]
    assert len({id(g) for g in [generator, *stages]}) == 4
    assert not generator.built


@pytest.mark.any_backend
@pytest.mark.parametrize("make", [cnn, inn])
def test_convolutional_head_accepts_any_size(make):
    model = make((None, None, 3), classes=5, head="convolutional")
    randomize(model)
    weights = model.get_weights()
    for size in (8, 12), (21, 16):
        x = images(2, *size, 3)
        logits = model.predict(x, verbose=0)
        assert logits.shape == (2, 5)
        fixed = make((*size, 3), classes=5, head="convolutional")
        fixed.set_weights(weights)
        assert relative_error(logits, fixed.predict(x, verbose=0)) < 1e-5


@pytest.mark.long
def test_cnn_filters_and_hidden():
    model = cnn((8, 8, 3), classes=5, filters=(3, 5, 7), hidden=11)
    shapes = [tuple(w.shape) for w in model.weights if len(w.shape) > 1]
    assert shapes == [(3, 3, 3, 3), (3, 3, 3, 5), (3, 3, 5, 7), (28, 11), (11, 5)]
    assert cnn((None, None, 3), head="convolutional", hidden=9).layers[-3].filters == 9
    with pytest.raises(
        ValueError, match=r"`filters` must be .* sequence of 3, .*Received: filters="
    ):
        cnn(filters=(3, 4))
    with pytest.raises(ValueError, match="Received: hidden=0"):
        cnn(hidden=0)


@pytest.mark.any_backend
def test_convolutional_head_averages_positions():
    model = cnn((8, 8, 3), classes=5, head="convolutional")
    randomize(model)
    *_, mean, classes = model.layers
    positions = keras.Model(model.input, mean.input).predict(images(2, 8, 8, 3), verbose=0)
    assert positions.shape == (2, 2, 2, 64)
    want = positions.mean((1, 2)) @ classes.get_weights()[0] + classes.get_weights()[1]
    assert relative_error(model.predict(images(2, 8, 8, 3), verbose=0), want) < 1e-5


@pytest.mark.parametrize("make", [cnn, inn])
@pytest.mark.parametrize(
    ("arguments", "received"),
    [
        ({"head": "flat"}, "head='flat'"),
        ({"input_shape": (None, None, 3)}, r"input_shape=\(None, None, 3\), head='dense'"),
        ({"input_shape": (32, 3, 3)}, r"input_shape=\(32, 3, 3\)"),
        ({"input_shape": (32, 32)}, r"input_shape=\(32, 32\)"),
        ({"input_shape": (8, 8, None), "head": "convolutional"}, r"input_shape=\(8, 8, None\)"),
        ({"input_shape": (32, 32, 0)}, r"input_shape=\(32, 32, 0\)"),
        ({"classes": 1}, "classes=1"),
        ({"classes": 2.5}, "classes=2.5"),
    ],
)
def test_invalid_arguments(make, arguments, received):
    with pytest.raises(ValueError, match="Received: " + received):
        make(**arguments)


@pytest.mark.parametrize(
    ("arguments", "received"),
    [
        ({"kernel_size": 0}, "kernel_size=0"),
        ({"group_number": 2}, "group_number=2"),
        ({"group_number": 2, "kernel_generator": "linear"}, "groups=2"),
        ({"reduction_ratio": 4}, "channel=3, reduction_ratio=4"),
        ({"kernel_generator": "quadratic"}, "kernel_generator='quadratic'"),
    ],
)
def test_invalid_arguments_of_inn(arguments, received):
    with pytest.raises(ValueError, match="Received: " + received):
        inn(**arguments)


# --- From one backend to another -----------------------------------------------------------------


def layers_of_every_rank():
    """A model with the layers of the package that ``inn`` does not have."""
    shapes = [(11, 6), (7, 8, 6), (4, 5, 6, 6)]
    inputs = [keras.Input(shape) for shape in shapes]
    outputs = [
        involution.Involution1D(5, strides=2, padding="valid", groups=2, reduction_ratio=2)(
            inputs[0]
        ),
        involution.Involution2D(
            (3, 4),
            strides=2,
            padding="symmetric",
            groups=3,
            kernel_generator="linear",
            group_layout="interleaved",
        )(inputs[1]),
        involution.Involution3D(3, dilation_rate=(1, 2, 1), reduction_ratio=2)(inputs[2]),
    ]
    return keras.Model(inputs, outputs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of models with their inputs and the predictions of this backend."""
    folder = tmp_path_factory.mktemp("saved")
    for name, make in {"cnn": cnn, "inn": inn, "layers": layers_of_every_rank}.items():
        model = make()
        randomize(model)
        inputs = [images(2, *tensor.shape[1:]) - 0.5 for tensor in model.inputs]
        outputs = model.predict(inputs if len(inputs) > 1 else inputs[0], verbose=0)
        model.save(folder / f"{name}.keras")
        np.savez(folder / f"{name}.npz", *inputs, *(outputs if len(inputs) > 1 else [outputs]))
    return folder


@pytest.mark.long
@pytest.mark.any_backend
@each_other_backend
def test_saved_models_predict_the_same_on_other_backends(saved, other):
    if importlib.util.find_spec(other) is None:
        pytest.skip(f"{other} is not installed")
    run = subprocess.run(
        [sys.executable, TESTS / "support" / "backend_pairs.py", other, saved],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    errors = {name: float(error) for name, error in map(str.split, run.stdout.splitlines())}
    assert sorted(errors) == ["cnn", "inn", "layers"]
    assert all(error < 1e-5 for error in errors.values()), errors


@pytest.mark.any_backend
@pytest.mark.parametrize("make", [cnn, inn])
def test_image_data_format_of_keras_is_ignored(make):
    setting = keras.config.image_data_format()
    keras.config.set_image_data_format("channels_first")
    try:
        assert make((16, 12, 3), 4)(images(2, 16, 12, 3)).shape == (2, 4)
    finally:
        keras.config.set_image_data_format(setting)
