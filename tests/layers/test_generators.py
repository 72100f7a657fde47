"""Kernel generators in layers: window products, equivalent layers, options, training, saving."""

import functools

import keras
import numpy as np
import pytest

import involution
from involution import Involution1D, Involution2D, Involution3D
from involution.kernel_generators.attention import PairwiseAttention
from involution.kernel_generators.convolutional import Contextual
from involution.kernel_generators.registry import GENERATORS
from tests.support import oracle
from tests.support.backends import (
    IMPLEMENTATIONS,
    fresh_process,
    gradients,
    mostly_slow_on_jax,
    numpy,
    to_float64,
)
from tests.support.keras_io_formula import randomize, relative_error


def random(*shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


# --- Window products -----------------------------------------------------------------------------

# kernel_size, strides, padding, dilation_rate, groups, group_layout; for inputs of (7, 10, 12).
WINDOWS = [
    ((3, 3), (1, 1), "same", (1, 1), 4, "contiguous"),
    ((2, 5), (2, 3), "symmetric", (2, 1), 3, "interleaved"),
    ((4, 3), (3, 2), ((0, 3), (2, 1)), (1, 3), 1, "contiguous"),
    ((3, 1), (1, 2), "valid", (2, 2), 12, "contiguous"),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("windows", mostly_slow_on_jax(WINDOWS, len(WINDOWS)))
def test_window_products_match_the_oracles_kernel_gradient(
    executed, windows, data_format, implementation
):
    size, strides, padding, rate, groups, layout = windows
    arguments = (size, strides, padding, rate, groups, layout, data_format, implementation)
    x = random(2, 7, 10, 12, dtype="float64")
    out = oracle.tap_pairs((7, 10), size, strides, padding, rate)[0]
    y = random(2, *out, 12, seed=1, dtype="float64")
    no_kernel = np.zeros((2, *out, size[0] * size[1], groups))
    _, want = oracle.gradients(x, no_kernel, y, size, strides, padding, rate, layout)
    if data_format == "channels_first":
        x, y = (np.moveaxis(a, -1, 1) for a in (x, y))

    def products(x, y):
        return involution.ops.window_products(x, y, *arguments)

    x, y = (keras.ops.convert_to_tensor(a, "float64") for a in (x, y))
    got = to_float64(products(x, y))
    assert executed[0] == implementation
    if data_format == "channels_first":
        got = np.moveaxis(got, (1, 2), (3, 4))
    assert relative_error(got, want) < 1e-14
    # The products are linear in x and in y, so a directional derivative is a product itself.
    cotangent = random(*products(x, y).shape, seed=2, dtype="float64")
    for i, (argument, gradient) in enumerate(
        zip((x, y), gradients(products, map(to_float64, (x, y)), cotangent), strict=True)
    ):
        direction = random(*argument.shape, seed=3 + i, dtype="float64")
        pair = (direction, y) if i == 0 else (x, direction)
        want = (
            to_float64(products(*(keras.ops.convert_to_tensor(a) for a in pair))) * cotangent
        ).sum()
        assert (gradient * direction).sum() == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_window_products_of_symbolic_tensors_are_saved(data_format, tmp_path):
    """Attention scores of symbolic tensors, in a model that is saved and loaded."""
    arguments = {"groups": 3, "strides": (2, 1), "data_format": data_format}
    shapes = [(None, 10, 12), (None, 10, 12)]
    x, y = random(2, 7, 10, 12), random(2, 4, 10, 12, seed=1)
    if data_format == "channels_first":
        shapes = [(12, None, 10)] * 2
        x, y = (np.moveaxis(a, -1, 1) for a in (x, y))
    inputs = [keras.Input(shape) for shape in shapes]
    scores = involution.ops.window_products(*inputs, 3, **arguments)
    model = keras.Model(inputs, scores)
    taps, groups = (1, 2) if data_format == "channels_first" else (3, 4)
    assert (model.output_shape[taps], model.output_shape[groups]) == (9, 3)
    model.save(tmp_path / "model.keras")
    pair = [keras.ops.convert_to_tensor(a) for a in (x, y)]
    want = numpy(involution.ops.window_products(*pair, 3, **arguments))
    for one in (model, keras.saving.load_model(tmp_path / "model.keras")):
        np.testing.assert_allclose(numpy(one(pair)), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="`y` must have the shape"):
        involution.ops.window_products(inputs[0], keras.Input((3, 4, 5)), 3, **arguments)


@pytest.mark.parametrize(
    ("y", "received"),
    [
        (random(2, 7, 9, 12), r"y.shape=\(2, 7, 9, 12\)"),
        (random(2, 7, 10, 6), r"y.shape=\(2, 7, 10, 6\)"),
        (random(2, 7, 10, 12, dtype="float64"), "float64"),
    ],
)
def test_window_products_reject_incompatible_y(y, received):
    with pytest.raises(ValueError, match=f"`y` must .*Received: .*{received}"):
        involution.ops.window_products(
            keras.ops.convert_to_tensor(random(2, 7, 10, 12)),
            keras.ops.convert_to_tensor(y, str(y.dtype)),
            3,
        )


# --- Equivalent layers ---------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("size", [(3, 3), (4, 5)])
def test_static_matches_depthwise_convolution(size, padding, strides):
    x = random(2, 9, 12, 6)
    layer = Involution2D(
        size, strides=strides, padding=padding, groups=6, kernel_generator="static"
    )
    layer(x)
    randomize(layer)
    depthwise = keras.layers.DepthwiseConv2D(size, strides, padding, use_bias=False)
    depthwise.build(x.shape)
    depthwise.kernel.assign(numpy(layer.kernel_generator.kernel)[..., None])
    want = numpy(depthwise(x))
    assert numpy(layer(x)).shape == want.shape
    assert relative_error(numpy(layer(x)), want) < 1e-5


def local_attention(x, query, key, heads, geometry):
    """(y, kernel) by loops in float64; the softmax omits positions outside the input."""
    size, strides, padding, rate = geometry
    sizes = x.shape[1:-1]
    out, _ = oracle.tap_pairs(sizes, size, strides, padding, rate)
    before = [
        oracle.pads(n, k, s, d, padding, i)[0]
        for i, (n, k, s, d) in enumerate(zip(sizes, size, strides, rate, strict=True))
    ]
    x = np.float64(x)
    keys = x @ key[0] + key[1]
    key_width = keys.shape[-1] // heads
    value_width = x.shape[-1] // heads
    taps = list(np.ndindex(*size))
    y = np.zeros((len(x), *out, x.shape[-1]))
    kernel = np.zeros((len(x), *out, len(taps), heads))
    for b, *p in np.ndindex(len(x), *out):
        # The package defines the center of a "same" window as the position times the stride.
        center = [
            i * s + (0 if padding == "same" else (k - 1) * d // 2 - o)
            for i, s, k, d, o in zip(p, strides, size, rate, before, strict=True)
        ]
        q = x[(b, *center)] @ query[0] + query[1]
        for h in range(heads):
            key_slice = slice(h * key_width, (h + 1) * key_width)
            value_slice = slice(h * value_width, (h + 1) * value_width)
            positions = {}
            for t, k in enumerate(taps):
                position = [
                    i * s - o + j * d
                    for i, s, o, j, d in zip(p, strides, before, k, rate, strict=True)
                ]
                if all(0 <= a < n for a, n in zip(position, sizes, strict=True)):
                    positions[t] = (b, *position)
            scores = np.array([q[key_slice] @ keys[at][key_slice] for at in positions.values()])
            weights = np.exp(scores / np.sqrt(key_width) - (scores / np.sqrt(key_width)).max())
            weights /= weights.sum()
            for weight, (t, position) in zip(weights, positions.items(), strict=True):
                kernel[(b, *p, t, h)] = weight
                y[(b, *p, value_slice)] += weight * x[position][value_slice]
    return y, kernel


@pytest.mark.long
@pytest.mark.parametrize(
    ("rank", "arguments"),
    [
        (2, {"kernel_size": 3, "groups": 2}),
        (2, {"kernel_size": (4, 3), "strides": (1, 2), "padding": "symmetric", "groups": 3}),
        (2, {"kernel_size": 3, "padding": "valid", "strides": 2, "groups": 1}),
        (2, {"kernel_size": 3, "dilation_rate": 2, "padding": 1, "groups": 2, "key_channels": 5}),
        (1, {"kernel_size": 5, "strides": 3, "groups": 2}),
        (3, {"kernel_size": (1, 2, 3), "groups": 6}),
    ],
)
def test_pairwise_attention_matches_local_self_attention(rank, arguments):
    arguments = dict(arguments)
    generator = PairwiseAttention(arguments.pop("key_channels", None))
    layer = {1: Involution1D, 2: Involution2D, 3: Involution3D}[rank](
        kernel_generator=generator, return_kernel=True, **arguments
    )
    x = random(2, *{1: (11,), 2: (7, 6), 3: (3, 4, 5)}[rank], 6)
    layer(x)
    randomize(layer)
    query, key = (
        (np.float64(numpy(c.kernel))[(0,) * rank], np.float64(numpy(c.bias)))
        for c in (generator.query, generator.key)
    )
    y, kernel = layer(x)
    geometry = (layer.kernel_size, layer.strides, layer.padding, layer.dilation_rate)
    want = local_attention(x, query, key, layer.groups, geometry)
    assert relative_error(numpy(y), want[0]) < 1e-5
    assert relative_error(numpy(kernel), want[1]) < 1e-5


def test_zeros_given_to_pairwise_attention_are_not_the_defaults():
    x = random(1, 8, 7, 16)
    attention = PairwiseAttention(kernel_size=3, groups=2, padding=0)
    assert tuple(attention(x).shape) == (1, 6, 5, 18)
    with pytest.raises(ValueError, match="dilation_rate=0"):
        PairwiseAttention(kernel_size=3, groups=2, dilation_rate=0)(x)


@pytest.mark.any_backend
def test_pairwise_attention_over_the_full_map_matches_multi_head_attention():
    # On JAX, Keras requires values to be as wide as keys.
    height, width, channels, heads, head_width = 5, 4, 12, 3, 4
    generator = PairwiseAttention(key_channels=head_width)
    layer = Involution2D((2 * height - 1, 2 * width - 1), groups=heads, kernel_generator=generator)
    x = random(2, height, width, channels)
    layer(x)
    randomize(layer)
    reference = keras.layers.MultiHeadAttention(heads, head_width)
    flat = x.reshape(2, height * width, channels)
    reference.build(flat.shape, flat.shape)
    identity = np.eye(channels).reshape(channels, heads, head_width)
    reference.set_weights(
        [
            numpy(generator.query.kernel).reshape(channels, heads, head_width),
            numpy(generator.query.bias).reshape(heads, head_width),
            numpy(generator.key.kernel).reshape(channels, heads, head_width),
            numpy(generator.key.bias).reshape(heads, head_width),
            identity,
            np.zeros((heads, head_width)),
            identity.transpose(1, 2, 0),
            np.zeros(channels),
        ]
    )
    want = numpy(reference(flat, flat)).reshape(x.shape)
    assert relative_error(numpy(layer(x)), want) < 1e-5


@pytest.mark.long
def test_attention_is_zero_where_the_window_misses_the_input():
    # Two taps, 9 apart, lie on both sides of the 3 positions.
    layer = Involution1D(2, dilation_rate=9, groups=1, kernel_generator="pairwise_attention")
    y = numpy(layer(random(1, 3, 4)))
    assert (y == 0).all()


@pytest.mark.long
def test_contextual_receptive_field_is_the_context_size():
    layer = Involution2D(3, groups=1, kernel_generator=Contextual(2, context_size=5))
    x = random(1, 11, 11, 6)
    layer(x)
    randomize(layer)
    changed_input = x.copy()
    changed_input[0, 5, 5] += 1
    before, after = (numpy(layer.generate_kernel(a))[0] for a in (x, changed_input))
    changed = np.abs(before - after).max((-2, -1)) > 0
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (3, 7, 3, 7)


# --- Options -------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_kernel_softmax_normalizes_every_window(rank, data_format):
    make = {1: Involution1D, 2: Involution2D, 3: Involution3D}[rank]
    arguments = {"kernel_size": 3, "groups": 2, "data_format": data_format, "return_kernel": True}
    sizes = (5, 6, 4)[:rank]
    x = random(2, *sizes, 4) if data_format == "channels_last" else random(2, 4, *sizes)
    plain = make(**arguments)
    plain(x)
    randomize(plain)
    layer = make(kernel_softmax=True, **arguments)
    layer(x)
    layer.set_weights(plain.get_weights())
    axis = -2 if data_format == "channels_last" else 1
    raw = np.float64(numpy(plain(x)[1]))
    exponentials = np.exp(raw - raw.max(axis, keepdims=True))
    want = exponentials / exponentials.sum(axis, keepdims=True)
    assert relative_error(numpy(layer(x)[1]), want) < 1e-5


@pytest.mark.long
def test_kernel_dropout_scales_kept_values_in_training_only():
    layer = Involution2D(3, groups=1, kernel_generator="static", kernel_dropout=0.25)
    layer.return_kernel = True
    x = random(4, 20, 20, 4)
    plain = numpy(layer(x)[1])
    dropped = numpy(layer(x, training=True)[1])
    np.testing.assert_array_equal(numpy(layer(x)[1]), plain)
    is_dropped = dropped == 0
    assert 0.2 < is_dropped.mean() < 0.3
    np.testing.assert_allclose(dropped[~is_dropped], plain[~is_dropped] / 0.75, rtol=1e-6)


def test_kernel_dropout_out_of_range_raises():
    with pytest.raises(ValueError, match=r"from 0 to 1\. Received: kernel_dropout=1.5"):
        Involution2D(3, kernel_dropout=1.5)


@pytest.mark.long
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_filters_project_the_output(rank, data_format):
    make = {1: Involution1D, 2: Involution2D, 3: Involution3D}[rank]
    x = random(2, *(5, 4, 3)[:rank], 6)
    if data_format == "channels_first":
        x = np.moveaxis(x, -1, 1)
    layer = make(3, filters=10, data_format=data_format)
    assert tuple(layer.compute_output_shape(x.shape)) == tuple(layer(x).shape)
    randomize(layer)
    plain = make(3, data_format=data_format)
    plain(x)
    plain.set_weights(weights_without_projection(layer))
    axis = -1 if data_format == "channels_last" else 1
    y = np.moveaxis(numpy(plain(x)), axis, -1)
    kernel, bias = (np.float64(numpy(w)) for w in layer.projection.weights)
    want = np.moveaxis(y @ kernel[(0,) * rank] + bias, -1, axis)
    assert relative_error(numpy(layer(x)), want) < 1e-5


def weights_without_projection(layer):
    projection = {id(w) for w in layer.projection.weights}
    return [numpy(w) for w in layer.weights if id(w) not in projection]


def test_filters_below_1_raise():
    with pytest.raises(ValueError, match="Received: filters=0"):
        Involution2D(filters=0)


# --- Every generator -----------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="involution_tests")
class DenseGenerator(keras.layers.Layer):
    """A custom generator of one dense layer."""

    kernel_size = groups = None

    def build(self, input_shape):
        taps = self.kernel_size[0] * self.kernel_size[1]
        self.dense = keras.layers.Dense(taps * self.groups, activation="tanh")
        self.dense.build(input_shape)

    def call(self, features):
        return self.dense(features)


ALL_GENERATORS = {**GENERATORS, "user": DenseGenerator}


@functools.cache
def trained(name):
    """A model trained for 4 epochs, its inputs, its initial weights and its losses."""
    keras.utils.set_random_seed(1)
    layer = Involution2D(3, groups=2, kernel_generator=ALL_GENERATORS[name](), filters=8)
    model = keras.Sequential(
        [
            keras.Input((9, 7, 4)),
            layer,
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3),
        ]
    )
    x, y = random(12, 9, 7, 4), np.arange(12) % 3
    before = [numpy(w).copy() for w in model.trainable_weights]
    model.compile(
        keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    history = model.fit(x, y, batch_size=6, epochs=4, verbose=0).history["loss"]
    return model, x, before, history


# The default generator on every backend, the others on the last.
@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "bottleneck" else pytest.mark.any_backend)
        for name in ALL_GENERATORS
    ],
)
def test_every_generator_trains(name):
    model, _, before, history = trained(name)
    assert history[-1] < history[0]
    for weight, old in zip(model.trainable_weights, before, strict=True):
        changed = np.abs(numpy(weight) - old).max()
        # A key's bias adds a constant to a window's scores, to which the softmax is invariant.
        assert changed > 0 or weight.path.endswith("key/bias"), weight.path


@pytest.mark.long
@pytest.mark.any_backend
def test_every_generator_loads_in_another_process(tmp_path):
    for name in ALL_GENERATORS:
        model, x, _, _ = trained(name)
        model.save(tmp_path / f"{name}.keras")
        np.savez(tmp_path / f"{name}.npz", x=x, y=model.predict(x, verbose=0))
    output = fresh_process(
        f"""
import keras, numpy as np, involution
for name in {list(ALL_GENERATORS)}:
    if name == "user":
        from tests.layers.test_generators import DenseGenerator
    data = np.load(r"{tmp_path}/" + name + ".npz")
    y = keras.models.load_model(r"{tmp_path}/" + name + ".keras").predict(data["x"], verbose=0)
    print(name, np.abs(y - data["y"]).max() / np.abs(data["y"]).max())
"""
    )
    errors = dict(line.split() for line in output.splitlines())
    assert list(errors) == list(ALL_GENERATORS)
    assert all(float(error) < 1e-5 for error in errors.values()), errors


@pytest.mark.any_backend
def test_generators_in_bfloat16_match_float32():
    for name in GENERATORS:
        layer = Involution2D(3, groups=2, kernel_generator=name, dtype="mixed_bfloat16")
        full = Involution2D(3, groups=2, kernel_generator=name)
        x = random(1, 6, 7, 8)
        y = layer(x)
        full(x)
        full.set_weights(layer.get_weights())
        assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
        assert relative_error(to_float64(y), to_float64(full(x))) < 0.05
