"""``models.fold``: equal outputs, and the normalization that remains."""

import keras
import numpy as np
import pytest

import involution
from involution.kernel_generators import Bottleneck, Contextual, LargeContext
from involution.models import fold
from tests.support.backends import numpy

layers = keras.layers


def with_statistics(model, seed=0):
    """The model with random normalization weights and statistics."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        kind = weight.path.rpartition("/")[2]
        if kind == "moving_variance":
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
        elif kind == "gamma":
            # An involution's output is of second degree in its input: without small factors, some
            # layers later it overflows.
            weight.assign(rng.uniform(0.1, 0.3, weight.shape))
        elif kind in ("beta", "moving_mean", "bias"):
            weight.assign(rng.normal(scale=0.3, size=tuple(weight.shape)))
    return model


def normalizations(model):
    return [x.name for x in model.layers if type(x) is layers.BatchNormalization]


def assert_folds(model, remaining):
    rng = np.random.default_rng(3)
    inputs = [rng.normal(size=(2, *x.shape[1:])).astype("float32") for x in model.inputs]
    inputs = inputs[0] if len(inputs) == 1 else inputs
    before = [numpy(weight) for weight in model.weights]
    folded = fold(model)
    assert normalizations(folded) == remaining
    assert folded.name == model.name
    assert not folded.trainable_weights
    expected, actual = (
        [numpy(y) for y in keras.tree.flatten(m(inputs, training=False))] for m in (model, folded)
    )
    for one, other in zip(expected, actual, strict=True):
        assert np.abs(other - one).max() <= 1e-5 * np.abs(one).max()
        assert np.abs(one).max() > 0
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(numpy(weight), value)
    return folded


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_rednet(data_format):
    shape = (33, 40, 3) if data_format == "channels_last" else (3, 33, 40)
    model = with_statistics(involution.models.RedNet26(shape, classes=5, data_format=data_format))
    after_involutions = [x for x in normalizations(model) if x.endswith("_2_bn")]
    folded = assert_folds(model, after_involutions)
    generators = [x.kernel_generator for x in folded.layers if hasattr(x, "kernel_generator")]
    assert len(generators) == len(after_involutions)
    assert not any(generator.use_normalization for generator in generators)
    assert not any("normalization" in weight.path for weight in folded.weights)


def test_every_kind_of_layer():
    inputs = keras.Input((9, 8, 6))
    x = layers.BatchNormalization(name="first")(inputs)
    x = layers.Conv2D(8, 3, strides=2, padding="same", use_bias=True)(x)
    x = layers.BatchNormalization(scale=False)(x)
    x = involution.Involution2D(3, groups=2, kernel_generator=Contextual(2), filters=10)(x)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.BatchNormalization(center=False)(layers.Dense(7, use_bias=False)(x))
    x = layers.BatchNormalization(name="after_activation")(layers.Dense(7, "relu")(x))
    assert_folds(with_statistics(keras.Model(inputs, x)), ["first", "after_activation"])


def test_depthwise_convolutions():
    inputs = keras.Input((9, 8, 6))
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False)(inputs)
    x = layers.BatchNormalization()(x)
    x = layers.Reshape((-1, 12))(x)
    x = layers.BatchNormalization()(layers.DepthwiseConv1D(5)(x))
    assert_folds(with_statistics(keras.Model(inputs, x)), [])


def test_a_layer_whose_generator_is_no_object():
    model = with_statistics(involution.models.inn((8, 8, 3), classes=4))
    assert_folds(model, normalizations(model))


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_lsnet(data_format):
    shape = (64, 72, 3) if data_format == "channels_last" else (3, 64, 72)
    model = with_statistics(involution.models.LSNetT(shape, classes=5, data_format=data_format))
    remaining = [x for x in normalizations(model) if x.endswith("involution_bn") or x == "head_bn"]
    folded = assert_folds(model, remaining)
    generators = [x.kernel_generator for x in folded.layers if hasattr(x, "kernel_generator")]
    assert generators
    assert not any(generator.use_normalization for generator in generators)


def test_large_context_without_normalization_survives_saving(tmp_path):
    generator = LargeContext(2, use_normalization=False)
    model = keras.Sequential(
        [keras.Input((6, 5, 4)), involution.Involution2D(3, kernel_generator=generator)]
    )
    assert not any("moving_mean" in weight.path for weight in model.weights)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = np.random.default_rng(0).normal(size=(1, 6, 5, 4)).astype("float32")
    np.testing.assert_array_equal(numpy(model(x)), numpy(loaded(x)))


def test_layers_whose_output_has_other_uses_stay():
    inputs = keras.Input((8, 6))
    shared = layers.Conv1D(6, 1, name="shared")
    x = layers.BatchNormalization(name="one")(shared(inputs))
    x = layers.BatchNormalization(name="two")(shared(x))
    branch = layers.Conv1D(6, 3, padding="same")(x)
    normalized = layers.BatchNormalization(name="branched")(branch)
    x = layers.Add()([branch, normalized])
    output = layers.Conv1D(4, 1)(x)
    ends = {"raw": output, "normalized": layers.BatchNormalization(name="end")(output)}
    assert_folds(with_statistics(keras.Model(inputs, ends)), ["one", "two", "branched", "end"])


def test_nested_and_sequential_models():
    sequential = keras.Sequential(
        [keras.Input((8, 3)), layers.Conv1D(4, 3), layers.BatchNormalization()], name="inner"
    )
    assert_folds(with_statistics(sequential), [])
    one, other = keras.Input((8, 3), name="one"), keras.Input((6, 4), name="other")
    x = layers.Add()([sequential(one), other])
    model = with_statistics(keras.Model([one, other], layers.BatchNormalization(name="last")(x)))
    folded = assert_folds(model, ["last"])
    assert normalizations(folded.get_layer("inner")) == []
    assert [tensor.name for tensor in folded.inputs] == ["one", "other"]


def test_generator_without_normalization_survives_saving(tmp_path):
    generator = Bottleneck(2, use_normalization=False)
    layer = involution.Involution2D(3, kernel_generator=generator)
    model = keras.Sequential([keras.Input((6, 5, 4)), layer])
    assert [weight.name for weight in generator.reduce.weights] == ["kernel", "bias"]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = np.random.default_rng(0).normal(size=(1, 6, 5, 4)).astype("float32")
    np.testing.assert_array_equal(numpy(model(x)), numpy(loaded(x)))


def test_other_models_raise():
    class Subclass(keras.Model):
        def call(self, inputs):
            return inputs

    with pytest.raises(ValueError, match=r"must be functional or sequential, and built\. Received"):
        fold(Subclass())
    with pytest.raises(ValueError, match=r"Received: .*, of Sequential"):
        fold(keras.Sequential([layers.Dense(3)]))


def test_state_that_layers_name_or_keep_in_their_own_way():
    """Weights without the layer's name in their path, and state outside of weights."""
    normalization = layers.Normalization()
    normalization.adapt(np.random.default_rng(0).normal(3, 2, size=(50, 4)).astype("float32"))
    inputs = keras.Input((5, 4))
    x = layers.TimeDistributed(layers.Dense(6))(normalization(inputs))
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(x)
    x = layers.RNN([layers.LSTMCell(3), layers.GRUCell(3)], return_sequences=True)(x)
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(4), layers.Dense(4)])
    x = layers.TimeDistributed(inner)(x)
    x = layers.BatchNormalization()(inputs=layers.Dense(3)(x))
    assert_folds(with_statistics(keras.Model(inputs, x)), [])


def test_generator_built_before_its_layer():
    generator = Bottleneck(2, kernel_size=3, groups=1, strides=1, data_format="channels_last")
    generator(np.ones((1, 6, 6, 8), "float32"))
    inputs = keras.Input((6, 6, 8))
    layer = involution.Involution2D(3, kernel_generator=generator)
    assert_folds(with_statistics(keras.Model(inputs, layer(inputs))), [])


def test_normalization_that_computes_something_else_stays():
    inputs, mask = keras.Input((5, 4)), keras.Input((5,), dtype="bool")
    x = layers.BatchNormalization(name="masked")(layers.Dense(3)(inputs), mask=mask)
    assert normalizations(fold(keras.Model([inputs, mask], x))) == ["masked"]
    x = layers.Dense(3, dtype="mixed_bfloat16")(inputs)
    x = layers.BatchNormalization(name="float32", dtype="float32")(x)
    assert normalizations(fold(keras.Model(inputs, x))) == ["float32"]


def test_optional_inputs_and_several_outputs_remain():
    class Sum(layers.Layer):
        def call(self, x, y=None):
            return x if y is None else x + y

        def compute_output_spec(self, x, y=None):
            return keras.KerasTensor(x.shape, x.dtype)

    one, other = keras.Input((3,)), keras.Input((3,), name="other", optional=True)
    model = keras.Model(
        [one, other], Sum()(layers.BatchNormalization()(layers.Dense(3)(one)), other)
    )
    x = np.ones((2, 3), "float32")
    assert np.abs(numpy(fold(model)([x, None])) - numpy(model([x, None]))).max() < 1e-5
    pair = involution.Involution2D(3, return_kernel=True)
    sequential = keras.Sequential([keras.Input((6, 6, 8)), pair])
    assert [tuple(y.shape) for y in fold(sequential).outputs] == [
        (None, 6, 6, 8),
        (None, 6, 6, 9, 1),
    ]


def test_inputs_of_a_dictionary_keep_their_names():
    inputs = {"wide": keras.Input((7,), name="wide"), "narrow": keras.Input((3,), name="narrow")}
    x = layers.Concatenate()([inputs["wide"], inputs["narrow"]])
    model = keras.Model(inputs, layers.BatchNormalization()(layers.Dense(4)(x)))
    folded = fold(with_statistics(model))
    x = {"wide": np.ones((2, 7), "float32"), "narrow": np.full((2, 3), 2, "float32")}
    assert np.abs(numpy(folded(x)) - numpy(model(x, training=False))).max() < 1e-5
    assert {name: tuple(tensor.shape) for name, tensor in folded.input.items()} == {
        "wide": (None, 7),
        "narrow": (None, 3),
    }


def test_lora_raises():
    layer = involution.Involution2D(3)
    inputs = keras.Input((6, 6, 8))
    model = keras.Model(inputs, layer(inputs))
    layer.kernel_generator.expand.enable_lora(2)
    with pytest.raises(ValueError, match=r"without LoRA or quantization\. Received: involution2d"):
        fold(model)


def test_vocabularies_are_copied():
    lookup = layers.IntegerLookup()
    lookup.adapt(np.array([12, 36, 1138, 42, 42]))
    inputs = keras.Input((4,), dtype="int64")
    x = layers.BatchNormalization()(layers.Dense(3)(layers.Embedding(9, 5)(lookup(inputs))))
    model = with_statistics(keras.Model(inputs, x))
    values = np.array([[12, 42, 7, 1138]])
    expected, actual = (numpy(m(values)) for m in (model, fold(model)))
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()
