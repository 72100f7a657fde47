"""InvolutionUpSampling: CARAFE, with and without a guide."""

import keras
import numpy as np
import pytest
from keras import ops

import involution
from involution.kernel_generators import Carafe
from tests.support.backends import gradients, in_graph, numpy
from tests.support.keras_io_formula import randomize
from tests.support.paths import FILES


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def published(name, *shape):
    return np.fromfile(FILES / "carafe" / f"{name}.bin", "float32").reshape(shape)


class Given(keras.layers.Layer):
    """A generator that returns given kernels."""

    def __init__(self, kernels, **kwargs):
        super().__init__(**kwargs)
        self.kernels = kernels

    def call(self, features):
        return ops.convert_to_tensor(self.kernels)


def published_kernels():
    """The masks of CARAFE's data, group-major, as tap-major kernel maps, channels last."""
    mask = published("mask", 2, 4, 25, 6, 6)
    return np.ascontiguousarray(mask.transpose(0, 3, 4, 2, 1)).reshape(2, 6, 6, 100)


@pytest.mark.parametrize("guided", [False, True])
def test_causal_upsampling_does_not_look_ahead(guided):
    layer = involution.InvolutionUpSampling1D(
        2, kernel_size=3, padding="causal", kernel_generator=Carafe(8)
    )
    x, guide = random(2, 8, 6), random(2, 16, 4, seed=1)
    layer.build(*((x.shape, guide.shape) if guided else (x.shape,)))
    randomize(layer)

    def outputs(x, guide):
        return numpy(layer(x, guide=guide) if guided else layer(x))

    y = outputs(x, guide)
    for t in (0, 3, 6):
        later, fine = x.copy(), guide.copy()
        later[:, t + 1 :] += 1
        fine[:, 2 * t + 2 :] += 1
        changed = outputs(later, fine)
        np.testing.assert_array_equal(changed[:, : 2 * t + 2], y[:, : 2 * t + 2])
        assert (changed[:, 2 * t + 2 :] != y[:, 2 * t + 2 :]).any()


def test_layer_and_operator_equal_published_data_with_gradients():
    x = published("feat", 2, 64, 3, 3).transpose(0, 2, 3, 1)
    kernels = published_kernels()
    layer = involution.InvolutionUpSampling2D(
        2, groups=4, kernel_generator=Given(kernels), kernel_softmax=False
    )
    want = published("output", 2, 64, 6, 6).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(numpy(layer(x)), want, 1e-6, 1e-6)

    def apply(x, kernel):
        return involution.ops.involution(x, kernel, 5, groups=4, upsampling=2)

    kernel = kernels.reshape(2, 6, 6, 25, 4)
    np.testing.assert_allclose(numpy(apply(x, kernel)), want, 1e-6, 1e-6)
    dx, dkernel = gradients(apply, (x, kernel), np.ones_like(want))
    np.testing.assert_allclose(
        dx, published("feat_grad", 2, 64, 3, 3).transpose(0, 2, 3, 1), 1e-6, 2e-6
    )
    want = published("mask_grad", 2, 4, 25, 6, 6).transpose(0, 3, 4, 2, 1)
    np.testing.assert_allclose(dkernel, want, 1e-6, 2e-6)


def convolve(x, layer):
    """A convolution with "same" padding in NumPy, channels last, in one or two dimensions."""
    weight, bias = (numpy(w).astype("float64") for w in (layer.kernel, layer.bias))
    size = weight.shape[:-2]
    padded = np.pad(x, [(0, 0), *(((k - 1) // 2, k // 2) for k in size), (0, 0)])
    y = np.zeros((*x.shape[:-1], weight.shape[-1])) + bias
    for tap in np.ndindex(*size):
        part = padded[
            (slice(None), *(slice(t, t + n) for t, n in zip(tap, x.shape[1:-1], strict=True)))
        ]
        y += part @ weight[tap]
    return y


def carafe_formula(layer, x, guide=None):
    """CARAFE in NumPy loops over the fine grid, in two dimensions, softmax over all taps."""
    generator, (u, v), (kh, kw) = layer.kernel_generator, layer.size, layer.kernel_size
    batch, height, width, channels = x.shape
    encoded = convolve(convolve(x, generator.compressor), generator.encoder)
    logits = np.zeros((batch, height * u, width * v, kh * kw * layer.groups))
    for i, j in np.ndindex(height * u, width * v):
        phase = i % u * v + j % v
        logits[:, i, j] = encoded[:, i // u, j // v, phase :: u * v]
    if guide is not None:
        logits += convolve(convolve(guide, generator.guide_compressor), generator.guide_encoder)
    logits = logits.reshape(*logits.shape[:3], kh * kw, layer.groups)
    kernel = np.exp(logits - logits.max(-2, keepdims=True))
    kernel /= kernel.sum(-2, keepdims=True)
    padded = np.pad(x, [(0, 0), ((kh - 1) // 2, kh // 2), ((kw - 1) // 2, kw // 2), (0, 0)])
    y = np.zeros((batch, height * u, width * v, channels))
    for i, j in np.ndindex(height * u, width * v):
        window = padded[:, i // u : i // u + kh, j // v : j // v + kw].reshape(batch, -1, channels)
        weights = kernel[:, i, j].repeat(channels // layer.groups, -1)
        y[:, i, j] = (weights * window).sum(1)
    return y


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    ("size", "kernel_size", "groups"), [(2, 5, 1), ((3, 2), (3, 4), 2), ((1, 4), 3, 6)]
)
def test_equals_carafe(size, kernel_size, groups, guided):
    layer = involution.InvolutionUpSampling2D(
        size,
        kernel_size=kernel_size,
        groups=groups,
        kernel_generator=Carafe(8, encoder_initializer="glorot_uniform", dtype="float64"),
        dtype="float64",
    )
    x = random(2, 5, 4, 6).astype("float64")
    fine = [n * u for n, u in zip(x.shape[1:3], layer.size, strict=True)]
    guide = random(2, *fine, 3, seed=1).astype("float64") if guided else None
    layer.build(x.shape, guide.shape if guided else None)
    randomize(layer)
    y = layer(x, guide=guide) if guided else layer(x)
    np.testing.assert_allclose(numpy(y), carafe_formula(layer, x, guide), 1e-10, 1e-10)


def test_formats_and_dimensions_agree():
    x = random(2, 5, 4, 6)
    last = involution.InvolutionUpSampling2D(2, kernel_size=3, groups=3)
    first = involution.InvolutionUpSampling2D(
        2, kernel_size=3, groups=3, data_format="channels_first"
    )
    y = last(x)
    first.build((2, 6, 5, 4))
    first.set_weights(last.get_weights())
    other = first(np.ascontiguousarray(np.moveaxis(x, -1, 1)))
    np.testing.assert_allclose(np.moveaxis(numpy(other), 1, -1), numpy(y), 1e-5, 1e-6)
    assert involution.InvolutionUpSampling1D(4)(x[:, 0]).shape == (2, 16, 6)
    volume = involution.InvolutionUpSampling3D((1, 2, 3), kernel_size=3)
    assert volume(x[..., None]).shape == (2, 5, 8, 18, 1)


def test_kernel_softmax_in_bounds_keeps_constant_inputs_constant():
    x = np.full((1, 4, 5, 3), 2.5, "float32")
    y = numpy(involution.InvolutionUpSampling2D(3, kernel_softmax="in_bounds")(x))
    np.testing.assert_allclose(y, 2.5, 1e-6)
    y = numpy(involution.InvolutionUpSampling2D(3)(x))
    assert y[0, 0, 0, 0] < 2


def test_functional_model_with_a_guide_of_unknown_sizes_saves_and_loads(tmp_path):
    coarse, fine = keras.Input((None, None, 8)), keras.Input((None, None, 3))
    outputs = involution.InvolutionUpSampling2D(2, groups=2)(coarse, guide=fine)
    assert outputs.shape == (None, None, None, 8)
    model = keras.Model([coarse, fine], outputs)
    randomize(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for n in (4, 5):
        arrays = [random(2, n, 3, 8), random(2, 2 * n, 6, 3)]
        y, expected = numpy(loaded(arrays)), numpy(model(arrays))
        # TensorFlow flushes subnormal numbers to zero in some of its threads only.
        np.testing.assert_allclose(y, expected, rtol=0, atol=np.finfo("float32").tiny)


def test_configuration_keeps_the_arguments():
    layer = involution.InvolutionUpSampling2D((2, 3), kernel_size=3, groups=2, name="up")
    layer.build((None, None, None, 4))
    config = layer.get_config()
    assert config["size"] == (2, 3)
    assert config["kernel_generator"] is None
    assert "strides" not in config
    other = involution.InvolutionUpSampling2D.from_config(config)
    assert other.get_config() == config
    own = involution.InvolutionUpSampling2D(kernel_generator=Carafe(5, encoder_size=1))
    own = involution.InvolutionUpSampling2D.from_config(own.get_config())
    assert own.kernel_generator.hidden_channels == 5


def test_own_generator_gets_the_features_and_the_guide():
    shapes = []

    class Own(keras.layers.Layer):
        def call(self, features):
            features, guide = features
            shapes.append((tuple(features.shape), tuple(guide.shape)))
            return ops.tile(guide[..., :1], (1, 1, 1, 9))

    layer = involution.InvolutionUpSampling2D(2, kernel_size=3, kernel_generator=Own())
    y = layer(random(1, 3, 4, 5), guide=random(1, 6, 8, 2))
    assert y.shape == (1, 6, 8, 5)
    assert set(shapes) == {((1, 3, 4, 5), (1, 6, 8, 2))}


def test_trains_in_a_compiled_model():
    model = keras.Sequential(
        [
            keras.Input((4, 4, 3)),
            involution.InvolutionUpSampling2D(2, kernel_dropout=0.1),
            keras.layers.Conv2D(1, 1),
        ]
    )
    model.compile("adam", "mse")
    before = model.get_weights()
    model.fit(random(4, 4, 4, 3), random(4, 8, 8, 1), epochs=1, verbose=0)
    assert all(np.abs(a - b).max() > 0 for a, b in zip(before, model.get_weights(), strict=True))


def test_compiled_equals_eager():
    layer = involution.InvolutionUpSampling2D(2)
    x = ops.convert_to_tensor(random(2, 3, 5, 4))
    layer(x)
    compiled = in_graph(lambda x: layer(x))
    np.testing.assert_allclose(numpy(compiled(x)), numpy(layer(x)), 1e-5, 1e-6)


@pytest.mark.parametrize(
    ("make", "call", "error", "message"),
    [
        ({"size": 0}, {}, ValueError, "`size` must be an integer of at least 1"),
        ({"scale_factor": 2}, {}, TypeError, "no argument `scale_factor`: use `size`"),
        ({"groups": 3}, {}, ValueError, "`groups` must divide the input's channels"),
        ({}, {"guide": random(1, 5, 8, 2)}, ValueError, r"`guide` must have .* \(1, 6, 8, None\)"),
        (
            {"kernel_generator": "linear"},
            {},
            ValueError,
            "`kernel_generator` must be a Keras layer or one of carafe",
        ),
        (
            {"kernel_generator": keras.layers.Conv2D(25, 1)},
            {},
            ValueError,
            r"`kernel` must have the shape \(1, 6, 8, 25, 1\)",
        ),
    ],
)
def test_invalid_arguments_raise(make, call, error, message):
    with pytest.raises(error, match=message):
        involution.InvolutionUpSampling2D(**make)(random(1, 3, 4, 4), **call)


def test_guide_is_given_in_all_calls_or_in_none():
    layer = involution.InvolutionUpSampling2D(2)
    layer(random(1, 3, 4, 4))
    with pytest.raises(ValueError, match="built without a guide"):
        layer(random(1, 3, 4, 4), guide=random(1, 6, 8, 2))
