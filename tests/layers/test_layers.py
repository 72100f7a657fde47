"""The layers: the drop-in for the keras.io example, and the paper's in one to three dimensions."""

import concurrent.futures
import inspect
import itertools
import json

import keras
import numpy as np
import pytest

from involution import (
    Involution,
    Involution1D,
    Involution2D,
    Involution2DTranspose,
    Involution3D,
    InvolutionUpSampling2D,
)
from involution.kernel_generators.attention import PairwiseAttention
from involution.kernel_generators.convolutional import Contextual, Linear
from involution.kernel_generators.registry import GENERATORS
from involution.kernel_generators.static import Static
from tests.support import keras_io_formula as formula
from tests.support import oracle
from tests.support.backends import in_graph, numpy
from tests.support.keras_io_formula import randomize, relative_error

LAYERS = {1: Involution1D, 2: Involution2D, 3: Involution3D}
SIZES = {1: (11,), 2: (7, 10), 3: (5, 6, 7)}
GROUP_ERROR = "for 6 channels one of 1, 2, 3, 6. Received: {}=4"


def random(*shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@pytest.fixture(scope="module")
def recorded_errors(request):
    """Relative errors by name; the largest of each is printed after the module's tests."""
    errors = {}
    yield errors
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        for name, values in errors.items():
            print(f"\nworst relative error of {len(values)}, {name}: {max(values):.1e}")


def compare(recorded_errors, name, got, want):
    for a, b in zip(got, want, strict=True):
        error = relative_error(numpy(a), b)
        recorded_errors.setdefault(name, []).append(error)
        assert error <= 1e-5


# --- The drop-in ---------------------------------------------------------------------------------

# One even and one odd side: the axes are independent.
FORMULA_CASES = [(1, (7, 10)), (2, (8, 7))]


@pytest.mark.long
@pytest.mark.parametrize(("stride", "sides"), FORMULA_CASES)
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_drop_in_matches_the_example(recorded_errors, size, groups, stride, sides):
    x = random(2, *sides, 6)
    layer = Involution(4, groups, size, stride, 2)
    layer(x)
    randomize(layer)
    want = formula.example(x, layer.get_weights(), size, stride, groups)
    compare(recorded_errors, "the drop-in", layer(x), want)


@pytest.mark.long
@pytest.mark.parametrize("sides", [(7, 8), (10, 9)])
def test_drop_in_pooling_matches_keras_at_stride_3(recorded_errors, sides):
    # From stride 3 on, Keras's "same" can also pad before the first window.
    x = random(2, *sides, 6)
    layer = Involution(6, 2, 3, 3, 1)
    layer(x)
    randomize(layer)
    want = formula.example(x, layer.get_weights(), 3, 3, 2)
    compare(recorded_errors, "the drop-in", layer(x), want)


@pytest.mark.any_backend
def test_drop_in_signature_matches_the_example():
    parameters = list(inspect.signature(Involution).parameters.values())[:6]
    assert [(p.name, p.default) for p in parameters] == [
        ("channel", None),
        ("group_number", 1),
        ("kernel_size", 3),
        ("stride", 1),
        ("reduction_ratio", 1),
        ("name", None),
    ]
    config = Involution(12, 3, 5, 2, 4, "positional").get_config()
    assert [config[p.name] for p in parameters] == [12, 3, 5, 2, 4, "positional"]


EXAMPLE_SHAPES = [(3, 1, 1, 256, 3), (3, 2, 1, 128, 3), (16, 1, 2, 256, 8)]


@pytest.mark.any_backend
@pytest.mark.parametrize("batch", [2, pytest.param(32, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("channel", "stride", "ratio", "side", "hidden"), EXAMPLE_SHAPES)
def test_drop_in_shapes_match_the_example(batch, channel, stride, ratio, side, hidden):
    layer = Involution(channel, 1, 5, stride, ratio, "inv")
    output, kernel = layer(random(batch, 256, 256, 3))
    assert tuple(output.shape) == (batch, side, side, 3)
    assert tuple(kernel.shape) == (batch, side, side, 25, 1, 1)
    assert [tuple(w.shape) for w in layer.weights] == [
        (1, 1, 3, hidden),
        *[(hidden,)] * 5,
        (1, 1, hidden, 25),
        (25,),
    ]


@pytest.mark.any_backend
def test_drop_in_generator_is_the_examples_sequential():
    layer = Involution()
    layer.build((None, None, None, 3))
    assert isinstance(layer.kernel_gen, keras.Sequential)
    names = [type(part).__name__ for part in layer.kernel_gen.layers]
    assert names == ["Conv2D", "BatchNormalization", "ReLU", "Conv2D"]


@pytest.mark.long
def test_drop_in_without_its_kernel_works_in_a_sequential():
    model = keras.Sequential([Involution(return_kernel=False, stride=2), keras.layers.ReLU()])
    assert tuple(model(random(2, 9, 7, 3)).shape) == (2, 5, 4, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channel": 1, "reduction_ratio": 2}, "Received: channel=1, reduction_ratio=2"),
        ({"group_number": 4}, GROUP_ERROR.format("group_number")),
    ],
)
def test_drop_in_build_rejects_invalid_channels(arguments, message):
    with pytest.raises(ValueError, match=message):
        Involution(**arguments).build((None, 8, 8, 6))


@pytest.mark.parametrize("name", ["channel", "group_number", "kernel_size", "stride"])
def test_drop_in_rejects_arguments_below_1(name):
    with pytest.raises(ValueError, match=f"Received: {name}=0"):
        Involution(**{name: 0})


@pytest.mark.parametrize("channels", [1, 3, 16, 20])
def test_f07_channel_sets_the_hidden_width_only(channels):
    layer = Involution(channel=16, reduction_ratio=2)
    output, _ = layer(keras.KerasTensor((2, 5, 4, channels)))
    assert tuple(output.shape) == (2, 5, 4, channels)
    assert tuple(layer.weights[0].shape) == (1, 1, channels, 8)


def test_f07_channel_defaults_to_the_input_channels():
    layer = Involution(reduction_ratio=4)
    layer.build((None, None, None, 20))
    assert tuple(layer.weights[0].shape) == (1, 1, 20, 5)


# --- The paper's layer ---------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(("stride", "sides"), FORMULA_CASES)
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_involution2d_matches_the_paper(recorded_errors, size, groups, stride, sides):
    x = random(2, *sides, 6)
    layer = Involution2D(
        size,
        strides=stride,
        padding="symmetric",
        groups=groups,
        reduction_ratio=2,
        return_kernel=True,
    )
    layer(x)
    randomize(layer)
    # By name: the order of this layer's weights is not part of its interface.
    g = layer.kernel_generator
    bn = g.normalization
    tap_major = [g.expand.kernel, g.expand.bias]
    group_major = [
        numpy(w).reshape(*w.shape[:-1], size * size, groups).swapaxes(-1, -2).reshape(w.shape)
        for w in tap_major
    ]
    weights = [g.reduce.kernel, bn.gamma, bn.beta, bn.moving_mean, bn.moving_variance]
    want = formula.paper(x, [*map(numpy, weights), *group_major], size, stride, groups)
    compare(recorded_errors, "Involution2D", layer(x), want)


ORACLE_CASES = [
    (1, {"kernel_size": 4, "groups": 2}),
    (1, {"kernel_size": 3, "strides": 3, "groups": 6, "data_format": "channels_first"}),
    (1, {"kernel_size": 3, "dilation_rate": 4, "padding": "valid", "strides": 2}),
    (1, {"kernel_size": 5, "padding": 1, "groups": 3, "group_layout": "interleaved"}),
    (2, {"kernel_size": (2, 5), "groups": 2}),
    (2, {"kernel_size": 3, "strides": (2, 3), "groups": 3}),
    (2, {"kernel_size": 3, "strides": 2, "padding": "symmetric", "data_format": "channels_first"}),
    (2, {"kernel_size": (3, 1), "padding": "valid", "strides": (2, 1), "groups": 2}),
    (2, {"kernel_size": 3, "padding": ((1, 0), (0, 2)), "groups": 2, "dilation_rate": (1, 2)}),
    (2, {"kernel_size": (9, 2), "groups": 2, "group_layout": "interleaved"}),
    (2, {"kernel_size": (3, 2), "strides": 2, "kernel_softmax": True, "groups": 2}),
    (2, {"kernel_size": 3, "strides": (2, 1), "kernel_generator": "contextual"}),
    (2, {"kernel_size": (4, 3), "padding": 1, "strides": 2, "kernel_generator": "static"}),
    (
        2,
        {
            "kernel_size": (3, 4),
            "padding": "valid",
            "strides": (1, 2),
            "groups": 3,
            "kernel_generator": "pairwise_attention",
            "data_format": "channels_first",
        },
    ),
    (1, {"kernel_size": 5, "strides": 2, "kernel_generator": "pairwise_attention", "groups": 2}),
    (3, {"kernel_size": (3, 2, 3), "groups": 2}),
    (3, {"kernel_size": (1, 2, 3), "strides": (1, 2, 2), "data_format": "channels_first"}),
    (3, {"kernel_size": (2, 3, 2), "padding": "valid", "dilation_rate": (1, 2, 3), "groups": 3}),
]
ids = [f"{rank}D-" + "-".join(f"{k}={v}" for k, v in case.items()) for rank, case in ORACLE_CASES]
every_case = pytest.mark.parametrize(("rank", "arguments"), ORACLE_CASES, ids=ids)


def layer_and_input(rank, arguments, **more):
    """A layer that also returns its kernels, and an input with 6 channels."""
    layer = LAYERS[rank](reduction_ratio=2, return_kernel=True, **arguments, **more)
    x = random(2, *SIZES[rank], 6)
    return layer, to_format(x, layer.data_format)


def to_format(x, data_format):
    return np.moveaxis(x, -1, 1) if data_format == "channels_first" else x


def to_last(x, data_format, channel_axes=1):
    """Converts to channels_last; features have one channel axis, kernels two: taps and groups."""
    if data_format == "channels_last":
        return x
    return np.moveaxis(x, range(1, 1 + channel_axes), range(-channel_axes, 0))


@pytest.mark.long
@every_case
def test_layers_match_the_oracle_for_their_own_kernels(rank, arguments):
    layer, x = layer_and_input(rank, arguments)
    layer(x)
    randomize(layer)
    y, kernel = (numpy(t) for t in layer(x))
    want, magnitude = oracle.involution(
        to_last(x, layer.data_format),
        to_last(kernel, layer.data_format, 2),
        layer.kernel_size,
        layer.strides,
        layer.padding,
        layer.dilation_rate,
        layer.group_layout,
    )
    taps = np.prod(layer.kernel_size)
    bound = (taps + 1) * np.finfo("float32").eps * magnitude
    assert (np.abs(to_last(y, layer.data_format) - want) <= bound).all()


@every_case
def test_f24_computed_symbolic_and_eager_shapes_are_equal(rank, arguments):
    layer, x = layer_and_input(rank, arguments)
    computed = [tuple(shape) for shape in layer.compute_output_shape(x.shape)]
    assert computed == [tuple(t.shape) for t in layer(x)]
    assert computed == [tuple(t.shape) for t in layer(keras.KerasTensor(x.shape))]
    without_kernel = LAYERS[rank](**arguments, reduction_ratio=2)
    assert tuple(without_kernel.compute_output_shape(x.shape)) == computed[0]
    assert tuple(without_kernel(keras.KerasTensor(x.shape)).shape) == computed[0]


@every_case
def test_f24_unknown_sizes_stay_unknown(rank, arguments):
    layer, x = layer_and_input(rank, arguments)
    axis = 1 if layer.data_format == "channels_first" else -1
    shape = [None] * x.ndim
    shape[axis] = 6
    computed = layer.compute_output_shape(shape)
    assert [tuple(t.shape) for t in layer(keras.KerasTensor(shape))] == [tuple(s) for s in computed]
    assert [s.count(None) for s in computed] == [rank + 1] * 2


@pytest.mark.any_backend
@pytest.mark.parametrize("return_kernel", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_f24_shapes_of_the_drop_in(stride, return_kernel):
    layer = Involution(None, 3, 3, stride, return_kernel=return_kernel)
    for shape in [(2, 7, 10, 6), (None, None, None, 6)]:
        computed = layer.compute_output_shape(shape)
        symbolic = layer(keras.KerasTensor(shape))
        assert computed == keras.tree.map_structure(lambda t: tuple(t.shape), symbolic)
    computed = layer.compute_output_shape((2, 7, 10, 6))
    eager = layer(random(2, 7, 10, 6))
    assert computed == keras.tree.map_structure(lambda t: tuple(t.shape), eager)


def traced_without_sizes(model):
    """A model as a compiled function; on TensorFlow, with one trace for all sizes."""
    if keras.backend.backend() != "tensorflow":
        return in_graph(model)
    import tensorflow as tf

    return tf.function(model, input_signature=[tf.TensorSpec(model.inputs[0].shape)])


@pytest.mark.long
@pytest.mark.parametrize(
    "layer",
    [
        lambda: Involution(None, 2, 3, 2, return_kernel=False),
        lambda: Involution1D(3, strides=2, padding="valid", groups=2),
        lambda: Involution2D(3, strides=2, groups=2),
        lambda: Involution2D(3, strides=2, groups=2, data_format="channels_first"),
        lambda: Involution3D(3, strides=(1, 2, 1), padding=((1, 0), (0, 1), (1, 1)), groups=2),
    ],
)
def test_f02_one_model_accepts_every_size(layer):
    layer = layer()
    rank = getattr(layer, "rank", 2)
    data_format = getattr(layer, "data_format", "channels_last")
    inputs = keras.Input(
        (6, *[None] * rank) if data_format == "channels_first" else (*[None] * rank, 6)
    )
    model = traced_without_sizes(keras.Model(inputs, layer(inputs)))
    randomize(layer)
    for size in (8, 6, 5), (5, 9, 4):
        x = to_format(random(2, *size[:rank], 6), data_format)
        np.testing.assert_allclose(numpy(model(x)), numpy(layer(x)), rtol=1e-5, atol=1e-5)


# --- Groups --------------------------------------------------------------------------------------


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("channels", "arguments", "groups"),
    [
        (6, {}, 1),
        (15, {}, 1),
        (16, {}, 1),
        (48, {}, 3),
        (6, {"group_channels": 2}, 3),
        (6, {"groups": 6}, 6),
    ],
)
def test_f06_number_of_groups(channels, arguments, groups):
    layer = Involution2D(3, return_kernel=True, **arguments)
    _, kernel = layer(keras.KerasTensor((1, 4, 5, channels)))
    assert tuple(kernel.shape) == (1, 4, 5, 9, groups)
    assert layer.groups == groups


def test_f06_indivisible_channels_raise_with_the_divisors():
    with pytest.raises(ValueError, match=GROUP_ERROR.format("groups")):
        Involution2D(3, groups=4)(random(1, 4, 4, 6))
    with pytest.raises(ValueError, match=GROUP_ERROR.format("group_channels")):
        Involution2D(3, group_channels=4)(random(1, 4, 4, 6))
    with pytest.raises(ValueError, match=r"one of 1, 2, 4, 5, 10, 20\. Received: group_"):
        Involution2D(3)(random(1, 4, 4, 20))


# --- Empty batches -------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    "make",
    [
        lambda: Involution(None, 2, 3, 2, return_kernel=False),
        lambda: Involution2D(3, strides=2, groups=2),
        lambda: Involution2D(3, strides=2, groups=2, kernel_generator="pairwise_attention"),
        # Convolutions of windows, and batch normalization.
        lambda: Involution2D(3, strides=2, groups=2, kernel_generator="contextual"),
        lambda: Involution2D(3, strides=2, groups=2, kernel_generator="large_context"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_f13_empty_batch_gives_empty_output(make, training):
    layer = make()
    y = layer(np.zeros((0, 7, 10, 6), "float32"), training=training)
    assert tuple(y.shape) == (0, 4, 5, 6)
    assert all(np.isfinite(numpy(weight)).all() for weight in layer.weights)


@pytest.mark.long
def test_f13_empty_batch_of_layers_that_enlarge():
    x, guide = np.zeros((0, 4, 5, 16), "float32"), np.zeros((0, 8, 10, 3), "float32")
    assert tuple(InvolutionUpSampling2D(2)(x).shape) == (0, 8, 10, 16)
    assert tuple(InvolutionUpSampling2D(2)(x, guide).shape) == (0, 8, 10, 16)
    assert tuple(Involution2DTranspose(3, strides=2)(x).shape) == (0, 8, 10, 16)
    y, kernel = Involution2DTranspose(3, strides=2, return_kernel=True)(x)
    assert (tuple(y.shape), tuple(kernel.shape)) == ((0, 8, 10, 16), (0, 4, 5, 9, 1))


# --- Strides and padding -------------------------------------------------------------------------


def summing(**arguments):
    """A Linear generator for which every kernel value is the sum of the pooled channels."""
    return Linear(kernel_initializer="ones", **arguments)


def test_strided_generators_exclude_padding_from_averages():
    x = np.float32([1, 3, 5, 7, 10]).reshape(1, 5, 1)
    layer = Involution1D(1, strides=2, kernel_generator=summing(), return_kernel=True)
    y, kernel = layer(x)
    assert numpy(kernel).ravel().tolist() == [2, 6, 10]
    assert numpy(y).ravel().tolist() == [2 * 1, 6 * 5, 10 * 10]


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        # Windows of 3 around 1, 3, 5: the pooled pairs start at their centers.
        ({"padding": "valid"}, [1.5, 3.5, 5.5]),
        # Around 0, 2, 4, 6; the last pair has one value inside the input.
        ({"padding": "symmetric"}, [0.5, 2.5, 4.5, 6]),
        ({"padding": 1}, [0.5, 2.5, 4.5, 6]),
        # Around 1, 3, 5; one zero after the input changes nothing.
        ({"padding": ((0, 1),)}, [1.5, 3.5, 5.5]),
        # Windows of 3 taps, 2 apart, around 1, 3.
        ({"padding": ((1, 0),), "dilation_rate": 2}, [1.5, 3.5]),
    ],
)
def test_kernels_are_generated_at_window_centers(arguments, want):
    x = np.arange(7, dtype="float32").reshape(1, 7, 1)
    layer = Involution1D(3, strides=2, kernel_generator=summing(), return_kernel=True, **arguments)
    _, kernel = layer(x)
    assert numpy(kernel)[0, :, 0, 0].tolist() == want


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("size", "dilation"), [((4,), (1,)), ((3, 4), (2, 1)), ((2, 5, 2), (1, 1, 1))]
)
def test_valid_is_the_interior_of_same(size, dilation):
    rank = len(size)
    x = random(1, *SIZES[rank], 6)
    same, valid = (
        LAYERS[rank](
            size,
            padding=padding,
            dilation_rate=dilation,
            groups=2,
            reduction_ratio=2,
            return_kernel=True,
        )
        for padding in ("same", "valid")
    )
    for layer in (same, valid):
        layer(x)
        randomize(layer)
    spans = [(k - 1) * d for k, d in zip(size, dilation, strict=True)]
    inner = tuple(
        slice(span // 2, n - (span + 1) // 2) for span, n in zip(spans, SIZES[rank], strict=True)
    )
    for full, interior in zip(same(x), valid(x), strict=True):
        np.testing.assert_allclose(
            numpy(interior), numpy(full)[(slice(None), *inner)], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("padding", [2, ((2, 0),), ((0, 3),)])
def test_window_centers_outside_the_input_raise(padding):
    with pytest.raises(ValueError, match=r"center of every window .* Received: padding="):
        Involution1D(3, padding=padding).build((None, 8, 6))


@pytest.mark.long
def test_window_centers_outside_an_input_of_unknown_size_raise_in_the_call():
    layer = Involution1D(3, strides=2, padding=((0, 2),))
    layer.build((None, None, 6))
    assert tuple(layer(random(1, 8, 6)).shape) == (1, 4, 6)
    with pytest.raises(ValueError, match=r"Received: padding=.*input sizes \(7,\)"):
        layer(random(1, 7, 6))


@pytest.mark.parametrize("padding", ["valid", 1])
@pytest.mark.parametrize("strides", [1, 2])
def test_window_larger_than_the_padded_input_raises(strides, padding):
    layer = Involution2D(9, strides=strides, padding=padding)
    for x in random(1, 5, 6, 8), keras.KerasTensor((1, 5, 6, 8)):
        with pytest.raises(ValueError, match=r"every output size must be at least 1.* Received: "):
            layer(x)


def test_unknown_implementation_raises_in_the_constructor():
    with pytest.raises(ValueError, match="Received: implementation='fast'"):
        Involution2D(implementation="fast")


@pytest.mark.parametrize("make", [Involution, Involution2D])
def test_unknown_channels_raise(make):
    with pytest.raises(ValueError, match=r"Received: input shape \(None, 5, 6, None\)"):
        make()(keras.KerasTensor((None, 5, 6, None)))


# --- Custom generators ---------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="involution_tests")
class Doubled(keras.layers.Layer):
    """A custom generator that inherits its sizes from the involution layer."""

    def __init__(self, kernel_size=None, groups=None, **kwargs):
        super().__init__(**kwargs)
        self.kernel_size = kernel_size
        self.groups = groups

    def build(self, input_shape):
        taps = int(np.prod(self.kernel_size))
        self.scale = self.add_weight((input_shape[-1], taps * self.groups))

    def call(self, features):
        return keras.ops.matmul(features, 2.0 * self.scale)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], int(np.prod(self.kernel_size)) * self.groups)

    def get_config(self):
        return {
            **super().get_config(),
            "kernel_size": self.kernel_size,
            "groups": self.groups,
        }


def test_custom_generator_inherits_unset_arguments():
    generator = Doubled()
    layer = Involution2D((3, 2), groups=3, kernel_generator=generator, return_kernel=True)
    x = random(1, 4, 5, 6)
    _, kernel = layer(x)
    assert (generator.kernel_size, generator.groups) == ((3, 2), 3)
    want = (2 * x @ numpy(generator.scale)).reshape(1, 4, 5, 6, 3)
    np.testing.assert_allclose(numpy(kernel), want, rtol=1e-5, atol=1e-5)


def test_kernel_map_with_wrong_channels_raises():
    layer = Involution2D(3, groups=2, kernel_generator=keras.layers.Conv2D(9, 1, name="nine"))
    with pytest.raises(ValueError, match=r"taps \* groups = 9 \* 2 .*Received: .*9\) from nine"):
        layer(random(1, 6, 6, 6))


class Shrunk(keras.layers.Layer):
    """A generator that returns a kernel for one position only."""

    def call(self, features):
        return keras.ops.repeat(features[:, :1, :1, :1], 9, axis=-1)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], 1, 1, 9)


@pytest.mark.parametrize(
    "generator",
    [
        lambda: keras.layers.Conv2D(9, 1, strides=2),
        lambda: keras.layers.Conv2D(9, 3, padding="valid"),
        Shrunk,
    ],
)
def test_kernel_map_of_wrong_size_raises(generator):
    layer = Involution2D(3, kernel_generator=generator())
    with pytest.raises(ValueError, match=r"`kernel` must have the shape .* Received: kernel"):
        layer(random(1, 6, 6, 6))


@pytest.mark.parametrize("generator", [lambda: keras.layers.Conv2D(9, 1, strides=2), Shrunk])
def test_kernel_map_of_wrong_size_raises_for_unknown_sizes(generator):
    inputs = keras.Input((None, None, 6))
    model = keras.Model(inputs, Involution2D(3, kernel_generator=generator())(inputs))
    model = traced_without_sizes(model)
    # TensorFlow knows the sizes only at run time, and raises its own errors.
    with pytest.raises(Exception, match=r"(?i)shape|size|dimension"):
        model(random(1, 6, 6, 6))


# --- Batch normalization and dtypes (F25, F8) ----------------------------------------------------

DROP_IN = {"return_kernel": False}


@pytest.mark.long
@pytest.mark.parametrize("make", [lambda **k: Involution(**DROP_IN, **k), Involution2D])
def test_f25_frozen_layers_keep_their_statistics(make):
    x = random(3, 5, 4, 8)
    layer = make()
    layer(x)
    randomize(layer)
    layer.trainable = False
    before = layer.get_weights()
    trained = layer(x, training=True)
    np.testing.assert_array_equal(numpy(trained), numpy(layer(x, training=False)))
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("make", [lambda **k: Involution(**DROP_IN, **k), Involution2D])
@pytest.mark.parametrize("dtype", ["float32", "float16", "mixed_float16", "mixed_bfloat16"])
def test_f25_training_on_one_position_is_finite_in_every_dtype(make, dtype):
    layer = make(dtype=dtype)
    # One position: the batch variance is 0.
    y = layer(random(1, 1, 1, 8), training=True)
    assert keras.backend.standardize_dtype(y.dtype) == layer.compute_dtype
    assert np.isfinite(numpy(keras.ops.cast(y, "float32"))).all()
    for weight in layer.weights:
        assert weight.dtype == layer.variable_dtype
        assert np.isfinite(numpy(keras.ops.cast(weight, "float32"))).all()


@pytest.mark.long
@pytest.mark.parametrize("training", [True, False])
def test_f25_channels_first_matches_channels_last(training):
    last, first = (
        Involution2D(3, strides=2, groups=2, data_format=f)
        for f in ("channels_last", "channels_first")
    )
    x = random(3, 7, 6, 8)
    for layer, inputs in [(last, x), (first, to_format(x, "channels_first"))]:
        layer(inputs)
        randomize(layer)
    want = numpy(last(x, training=training))
    got = numpy(first(to_format(x, "channels_first"), training=training))
    np.testing.assert_allclose(to_last(got, "channels_first"), want, rtol=1e-5, atol=1e-5)
    for a, b in zip(last.get_weights(), first.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [lambda **k: Involution(**DROP_IN, **k), Involution2D])
@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_f08_mixed_precision_matches_float32(make, dtype):
    x = random(2, 6, 5, 8)
    full, mixed = make(), make(dtype=dtype)
    for layer in (full, mixed):
        layer(x)
        randomize(layer)
    eps = {"mixed_float16": 2**-10, "mixed_bfloat16": 2**-7}[dtype]
    got = numpy(keras.ops.cast(mixed(x), "float32"))
    # The generator rounds a few times, and the input and the output are rounded once each.
    assert relative_error(got, numpy(full(x))) < 8 * eps


def compiled_model(layer):
    """A compiled model of one layer with random weights, its inputs and its targets."""
    rank = getattr(layer, "rank", 2)
    model = keras.Sequential([keras.Input((*SIZES[rank], 6)), layer, keras.layers.Flatten()])
    randomize(model)
    model.compile(keras.optimizers.SGD(0.01), "mse")
    return model, random(4, *SIZES[rank], 6), random(4, *model.output_shape[1:], seed=1)


@pytest.mark.long
@pytest.mark.parametrize("make", [lambda **k: Involution(**DROP_IN, **k), Involution2D])
@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_f08_mixed_precision_training_step_is_finite(make, dtype):
    model, x, target = compiled_model(make(dtype=dtype))
    before = model.get_weights()
    assert np.isfinite(model.train_on_batch(x, target))
    after = model.get_weights()
    assert all(np.isfinite(w).all() for w in after)
    assert not np.array_equal(before[0], after[0])


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("make", "without_gradient"),
    [
        # A bias before batch normalization has no effect: its gradient is 0.
        (lambda: Involution(4, 2, 3, 2, **DROP_IN), [1]),
        (lambda: Involution1D(3, strides=2, groups=2, reduction_ratio=2), []),
        (lambda: Involution2D(3, strides=2, groups=2, reduction_ratio=2), []),
        (lambda: Involution3D((3, 1, 2), strides=2, groups=2, reduction_ratio=2), []),
    ],
)
def test_f18_training_step_changes_every_weight_reproducibly(make, without_gradient):
    model, x, target = compiled_model(make())
    before = model.get_weights()
    steps = []
    for _ in range(2):
        model.set_weights(before)
        model.train_on_batch(x, target)
        steps.append(model.get_weights())
    for i, (old, new, again) in enumerate(zip(before, *steps, strict=True)):
        assert i in without_gradient or not np.array_equal(old, new)
        np.testing.assert_array_equal(new, again)


@pytest.mark.long
def test_f30_eight_threads_match_one():
    layer = Involution2D(3, strides=2, groups=2)
    inputs = [random(2, 9, 8, 8, seed=seed) for seed in range(8)]
    expected = [numpy(layer(x)) for x in inputs]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        results = threads.map(lambda x: numpy(layer(x)), inputs * 4)
        for got, want in zip(results, expected * 4, strict=True):
            np.testing.assert_array_equal(got, want)


# --- Saving (F27) --------------------------------------------------------------------------------

SAVED = {
    "drop-in": (2, lambda: Involution(4, 2, 5, 2, 2, **DROP_IN)),
    "drop-in, bfloat16": (2, lambda: Involution(4, 2, dtype="mixed_bfloat16", **DROP_IN)),
    "1D": (
        1,
        lambda: Involution1D(5, strides=2, padding="valid", groups=3, implementation="reference"),
    ),
    "2D": (
        2,
        lambda: Involution2D(
            (3, 2), strides=1, padding=((1, 0), (0, 1)), groups=2, group_layout="interleaved"
        ),
    ),
    "2D, mixed": (2, lambda: Involution2D(3, dtype="mixed_float16")),
    "2D, float64": (2, lambda: Involution2D(3, dtype="float64", dilation_rate=(1, 2))),
    "2D, by name": (2, lambda: Involution2D(3, kernel_generator="linear")),
    "2D, Linear": (2, lambda: Involution2D(3, strides=2, kernel_generator=summing(name="sums"))),
    "2D, Conv2D": (2, lambda: Involution2D(3, kernel_generator=keras.layers.Conv2D(9, 1))),
    "2D, user's": (2, lambda: Involution2D(3, groups=3, kernel_generator=Doubled())),
    "2D, Contextual": (2, lambda: Involution2D(3, kernel_generator=Contextual(3, context_size=5))),
    "2D, Static": (2, lambda: Involution2D(3, kernel_generator=Static(kernel_regularizer="l2"))),
    "2D, attention": (
        2,
        lambda: Involution2D(
            3,
            strides=2,
            padding="symmetric",
            dilation_rate=(1, 2),
            kernel_generator=PairwiseAttention(3),
            filters=4,
            kernel_softmax=True,
            kernel_dropout=0.5,
        ),
    ),
    "3D": (3, lambda: Involution3D(3, group_channels=2, reduction_ratio=1)),
}
every_saved = pytest.mark.parametrize(("rank", "make"), SAVED.values(), ids=SAVED)


@pytest.mark.any_backend
def test_f27_config_has_every_argument():
    arguments = {
        "kernel_size": (3, 5),
        "strides": (2, 1),
        "padding": ((1, 0), (2, 2)),
        "dilation_rate": (1, 2),
        "groups": 2,
        "group_channels": 8,
        "reduction_ratio": 2,
        "return_kernel": True,
        "group_layout": "interleaved",
        "data_format": "channels_first",
        "implementation": "reference",
        "filters": 5,
        "kernel_softmax": True,
        "kernel_dropout": 0.25,
        "name": "named",
        "trainable": False,
    }
    config = Involution2D(**arguments).get_config()
    assert {name: config[name] for name in arguments} == arguments
    assert set(config) == {*arguments, "kernel_generator", "dtype"}


@pytest.mark.any_backend
@every_saved
def test_f27_config_round_trip(rank, make):
    layer = make()
    copy = type(layer).from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()
    for one in (layer, copy):
        one.build((None, *SIZES[rank], 6))
    assert copy.get_config() == layer.get_config()
    assert type(layer).from_config(layer.get_config()).get_config() == layer.get_config()
    assert [w.shape for w in copy.weights] == [w.shape for w in layer.weights]


def json_config(layer):
    # JSON has no tuples: a custom generator loads lists.
    return json.loads(json.dumps(layer.get_config()))


@pytest.mark.long
@pytest.mark.any_backend
@every_saved
def test_f27_saved_models_load_without_custom_objects_twice(rank, make, tmp_path):
    layer = make()
    model = keras.Sequential([keras.Input((*SIZES[rank], 6)), layer])
    randomize(model)
    x = random(2, *SIZES[rank], 6)
    want = numpy(keras.ops.cast(model(x), "float32"))
    for generation in "first", "second":
        path = tmp_path / f"{generation}.keras"
        model.save(path)
        model = keras.models.load_model(path)
        got = numpy(keras.ops.cast(model(x), "float32"))
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
        loaded = model.layers[0]
        assert type(loaded) is type(layer)
        assert json_config(loaded) == json_config(layer)
        assert loaded.dtype_policy == layer.dtype_policy


def test_named_generators_inherit_the_dtype_policy():
    for name in GENERATORS:
        layer = Involution2D(3, kernel_generator=name, dtype="float64")
        assert layer.kernel_generator.dtype_policy == layer.dtype_policy


def test_named_bottleneck_inherits_the_reduction_ratio():
    layer = Involution2D(3, kernel_generator="bottleneck", reduction_ratio=2)
    assert layer.kernel_generator.reduction_ratio == 2


# --- Location-specific and channel-agnostic kernels ----------------------------------------------


def impulse_responses(layer):
    """(2 positions, 3, 3, channels): responses to an impulse of 1 in all channels at one position,
    and of 2 at another, each divided by the impulse."""
    x = np.zeros((1, 9, 9, 4), "float32")
    x[0, 2, 2], x[0, 6, 5] = 1, 2
    layer(x)
    randomize(layer)
    y = numpy(layer(x))[0]
    return np.stack([y[1:4, 1:4] / 1, y[5:8, 4:7] / 2])


def is_close(a, b):
    return np.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_involution_is_location_specific_and_channel_agnostic():
    layer = Involution2D(3, groups=2, reduction_ratio=1)
    first, second = impulse_responses(layer)
    assert not is_close(first, second)
    assert is_close(first[..., 0], first[..., 1])
    assert is_close(first[..., 2], first[..., 3])
    assert not is_close(first[..., 1], first[..., 2])


def test_convolution_is_location_agnostic_and_channel_specific():
    first, second = impulse_responses(keras.layers.Conv2D(4, 3, padding="same", use_bias=False))
    assert is_close(first, second)
    assert not any(
        is_close(first[..., a], first[..., b]) for a, b in itertools.combinations(range(4), 2)
    )
