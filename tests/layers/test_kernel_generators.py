"""Standalone kernel generators: kernel maps of features."""

import keras
import numpy as np
import pytest

from involution import kernel_generators
from involution.kernel_generators.convolutional import Bottleneck, Linear
from involution.kernel_generators.pooling import average_pool
from tests.support.backends import numpy
from tests.support.keras_io_formula import randomize, relative_error

SIZES = {1: (7,), 2: (5, 6), 3: (3, 4, 5)}


def features(rank, channels=6):
    return np.random.default_rng(0).normal(size=(2, *SIZES[rank], channels)).astype("float32")


def pooled(x, stride):
    """Means over windows of ``stride`` positions per dimension; the last window may be partial."""
    x = np.float64(x)
    for axis in range(1, x.ndim - 1):
        starts = range(0, x.shape[axis], stride)
        parts = [x.take(range(i, min(i + stride, x.shape[axis])), axis) for i in starts]
        # One dimension at a time: the mean over a box is the mean of its means along each axis.
        x = np.concatenate([part.mean(axis, keepdims=True) for part in parts], axis)
    return x


@pytest.mark.long
def test_average_pool_excludes_padding():
    x = np.arange(9, dtype="float32").reshape(1, 3, 3, 1)
    assert numpy(average_pool(x, (2, 2)))[0, ..., 0].tolist() == [[2, 3.5], [6.5, 8]]
    assert numpy(average_pool(x, (3, 1)))[0, ..., 0].tolist() == [[3, 4, 5]]
    assert numpy(average_pool(x, (1, 5)))[0, ..., 0].tolist() == [[1], [4], [7]]
    assert average_pool(x, (1, 1)) is x


def test_average_pool_accumulates_in_float32():
    # The sum overflows in float16.
    x = np.full((1, 64, 1), 60_000, "float16")
    assert numpy(average_pool(x, (64,))).ravel().tolist() == [60_000]


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("rank", SIZES)
def test_linear_matches_pooling_and_a_matrix_product(rank, stride, data_format):
    x = features(rank)
    generator = Linear(2, groups=3, strides=stride, data_format=data_format)
    generator(to_format(x, data_format))
    randomize(generator)
    got = from_format(generator(to_format(x, data_format)), data_format)
    weights, bias = (np.float64(w).squeeze() for w in generator.get_weights())
    assert weights.shape == (6, 2**rank * 3)
    assert relative_error(got, pooled(x, stride) @ weights + bias) < 1e-5


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("rank", SIZES)
def test_bottleneck_matches_the_paper(rank, stride, data_format):
    x = features(rank)
    generator = Bottleneck(2, kernel_size=2, groups=3, strides=stride, data_format=data_format)
    generator(to_format(x, data_format))
    randomize(generator)
    got = from_format(generator(to_format(x, data_format)), data_format)
    bn = generator.normalization
    variables = [generator.reduce.kernel, bn.gamma, bn.beta, bn.moving_mean, bn.moving_variance]
    variables += [generator.expand.kernel, generator.expand.bias]
    reduce, gamma, beta, mean, variance, expand, bias = (np.squeeze(numpy(v)) for v in variables)
    hidden = pooled(x, stride) @ reduce
    hidden = np.maximum((hidden - mean) / np.sqrt(variance + 1e-5) * gamma + beta, 0)
    assert hidden.shape[-1] == 3
    assert relative_error(got, hidden @ expand + bias) < 1e-5


@pytest.mark.long
def test_bottleneck_normalization_has_momentum_0_9():
    generator = Bottleneck(1, kernel_size=1, groups=1)
    x = features(1, 1)
    generator(x)
    generator.reduce.kernel.assign([[[1.0]]])
    generator(x, training=True)
    mean = float(numpy(generator.normalization.moving_mean)[0])
    assert mean == pytest.approx(0.1 * x.mean(), rel=1e-5)


def to_format(x, data_format):
    return np.moveaxis(x, -1, 1) if data_format == "channels_first" else x


def from_format(x, data_format):
    return np.moveaxis(numpy(x), 1, -1) if data_format == "channels_first" else numpy(x)


@pytest.mark.any_backend
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("make", [Linear, Bottleneck])
def test_computed_symbolic_and_eager_shapes_are_equal(make, data_format):
    generator = make(kernel_size=(2, 3), groups=2, strides=(2, 4), data_format=data_format)
    x = to_format(features(2), data_format)
    eager = tuple(generator(x).shape)
    assert eager == tuple(generator.compute_output_shape(x.shape))
    assert eager == tuple(generator(keras.KerasTensor(x.shape)).shape)
    unknown = [None, None, None, None]
    unknown[3 if data_format == "channels_last" else 1] = 6
    computed = generator.compute_output_shape(unknown)
    assert tuple(computed) == tuple(generator(keras.KerasTensor(unknown)).shape)
    assert computed.count(None) == 3


@pytest.mark.any_backend
@pytest.mark.parametrize("make", [Linear, Bottleneck])
def test_config_round_trip(make):
    generator = make(
        kernel_size=(2, 3),
        groups=2,
        strides=2,
        kernel_initializer="he_normal",
        bias_initializer=keras.initializers.Constant(0.5),
        kernel_regularizer=keras.regularizers.L2(0.25),
        bias_regularizer="l1",
        dtype="mixed_bfloat16",
        name="generates",
    )
    assert make.from_config(generator.get_config()).get_config() == generator.get_config()
    x = features(2)
    generator(x)
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(generator))
    assert type(copy) is make
    # Deserialization also builds the copy, which standardizes its attributes.
    assert copy.get_config() == generator.get_config()
    assert (copy.kernel_size, copy.strides) == ((2, 3), (2, 2))
    copy(x)
    copy.set_weights(generator.get_weights())
    np.testing.assert_array_equal(
        *(numpy(keras.ops.cast(g(x), "float32")) for g in (generator, copy))
    )


def test_bottleneck_config_has_the_reduction_ratio():
    generator = Bottleneck(3)
    assert Bottleneck.from_config(generator.get_config()).reduction_ratio == 3


@pytest.mark.parametrize(
    ("make", "kernels"), [(Linear, ["expand"]), (Bottleneck, ["reduce", "expand"])]
)
def test_regularizers_add_to_the_losses_of_a_model(make, kernels):
    import involution

    generator = make(kernel_regularizer=keras.regularizers.L2(0.5), bias_regularizer="l1")
    model = keras.Sequential(
        [keras.Input((5, 6, 6)), involution.Involution2D(3, kernel_generator=generator)]
    )
    randomize(model)
    want = [0.5 * (numpy(getattr(generator, name).kernel) ** 2).sum() for name in kernels]
    want.append(0.01 * np.abs(numpy(generator.expand.bias)).sum())
    losses = sorted(float(numpy(loss)) for loss in model.losses)
    assert losses == pytest.approx(sorted(want), rel=1e-5)


def test_initial_values_match_the_paper():
    keras.utils.set_random_seed(1)
    generator = Bottleneck(1, kernel_size=5, groups=10)
    generator.build((None, None, None, 250))
    for layer, outputs in (generator.reduce, 250), (generator.expand, 250):
        values = numpy(layer.kernel)
        # 62,500 values estimate the deviation to 0.3 %.
        assert values.std() == pytest.approx(np.sqrt(2 / outputs), rel=0.02)
        assert abs(values.mean()) < 0.002
        # Not truncated.
        assert np.abs(values).max() > 3 * values.std()
    assert not numpy(generator.expand.bias).any()


def test_weights_of_equal_shape_are_initialized_differently():
    generator = Bottleneck(1, kernel_size=3, groups=1)
    generator.build((None, None, None, 9))
    assert not np.array_equal(numpy(generator.reduce.kernel), numpy(generator.expand.kernel))


@pytest.mark.any_backend
def test_initial_values_are_reproducible():
    def initial_weights():
        keras.utils.set_random_seed(1)
        generator = Bottleneck(kernel_size=3, groups=1)
        generator.build((None, None, None, 8))
        return generator.get_weights()

    for a, b in zip(initial_weights(), initial_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.any_backend
def test_custom_initializers():
    generator = Linear(3, groups=2, kernel_initializer="zeros", bias_initializer="ones")
    assert (numpy(generator(features(2))) == 1).all()


def test_get_accepts_names_configurations_and_layers():
    assert type(kernel_generators.get(None)) is Bottleneck
    assert type(kernel_generators.get("Linear")) is Linear
    generator = Bottleneck(2)
    assert kernel_generators.get(generator) is generator
    stored = keras.saving.serialize_keras_object(generator)
    assert kernel_generators.get(stored).get_config() == generator.get_config()


@pytest.mark.parametrize("identifier", ["conv", 3])
def test_get_rejects_unknown_identifiers(identifier):
    with pytest.raises(ValueError, match=f"bottleneck, .*, static. Received: .*={identifier!r}"):
        kernel_generators.get(identifier)


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        (lambda: Bottleneck(7, kernel_size=3, groups=1), "reduction_ratio=7, channels=6"),
        (lambda: Bottleneck(0), "reduction_ratio=0"),
        (lambda: Linear(groups=1), "kernel_size=None"),
        (lambda: Linear((3, 3, 3), groups=1), r"kernel_size=\(3, 3, 3\)"),
        (lambda: Linear(3), "groups=None"),
        (lambda: Linear(3, groups=1, strides=0), "strides=0"),
        (lambda: Linear(3, groups=1, data_format="first"), "data_format='first'"),
    ],
)
def test_invalid_arguments_raise(generator, message):
    with pytest.raises(ValueError, match="Received: " + message):
        generator().build((None, 5, 6, 6))
