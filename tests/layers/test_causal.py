"""Causal sequences: no look-ahead, steps with a cache, masks, softmax in bounds, low rank."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops

import involution
from involution.kernel_generators import LowRank
from tests.support import oracle
from tests.support.backends import in_graph, mostly_slow_on_jax, numpy, requires_native
from tests.support.keras_io_formula import randomize


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def causal(kernel_size, **arguments):
    layer = involution.Involution1D(kernel_size, padding="causal", **arguments)
    layer.build((None, None, 48))
    randomize(layer)
    return layer


GENERATORS = ("bottleneck", "contextual", "linear", "low_rank", "static")


@pytest.mark.parametrize(
    "case",
    mostly_slow_on_jax(
        [
            *itertools.product(GENERATORS, (False, True, "in_bounds")),
            ("pairwise_attention", False),  # a softmax already
        ],
        8,
    ),
)
@pytest.mark.parametrize(("strides", "rate"), [(1, 1), (1, 3), (3, 1), (2, 2)])
def test_later_inputs_change_no_bit_of_an_output(strides, rate, case):
    generator, softmax = case
    layer = causal(
        4,
        strides=strides,
        dilation_rate=rate,
        kernel_generator=generator,
        kernel_softmax=softmax,
    )
    x = random(2, 17, 48)
    y = numpy(layer(x))
    assert y.shape == (2, -(-17 // strides), 48)
    for t in (0, 1, 6, 15):
        changed = x.copy()
        changed[:, t + 1 :] = random(2, 16 - t, 48, seed=t)
        # The last output whose position is at most t.
        last = t // strides + 1
        z = numpy(layer(changed))
        np.testing.assert_array_equal(z[:, :last], y[:, :last])
        assert last == y.shape[1] or (z[:, last:] != y[:, last:]).any()


def stepped(layer, x, bounds):
    """The outputs of steps with these bounds, and the last cache."""
    cache, parts = layer.initial_cache(len(x)), []
    for begin, end in itertools.pairwise(bounds):
        part, cache = layer.step(x[:, begin:end], cache)
        parts.append(numpy(part))
    return np.concatenate(parts, 1), cache


@requires_native
@pytest.mark.long
@pytest.mark.parametrize(
    "case",
    mostly_slow_on_jax(
        [
            *itertools.product(("bottleneck", "low_rank"), (False, True, "in_bounds")),
            ("contextual", False),
            ("linear", False),
            ("static", False),
        ],
        5,
    ),
)
@pytest.mark.parametrize("kernel_size", mostly_slow_on_jax(range(2, 8), 3))
def test_steps_equal_the_whole_sequence_bit_for_bit(kernel_size, case):
    generator, softmax = case
    for rate in (1, 2, 3):
        layer = causal(
            kernel_size,
            dilation_rate=rate,
            kernel_generator=generator,
            group_channels=16 if rate % 2 else 1,
            kernel_softmax=softmax,
            filters=None,
        )
        x = random(2, 23, 48, seed=rate)
        y, cache = stepped(layer, x, (0, 5, 6, 7, 8, 10, 20, 23))
        np.testing.assert_array_equal(y, numpy(layer(x)))
        assert cache[0].shape[1] == cache[1].shape[1]


@requires_native
@pytest.mark.parametrize(("channels", "filters"), [(48, 64), (256, 300)])
def test_steps_with_filters_equal_the_whole_sequence_bit_for_bit(channels, filters):
    layer = involution.Involution1D(3, padding="causal", filters=filters, groups=8)
    x = random(1, 37, channels)
    whole = numpy(layer(x))
    y, _ = stepped(layer, x, (0, 1, 2, 7, 9, 10, 26, 37))
    np.testing.assert_array_equal(y, whole)


@requires_native
def test_compiled_steps_equal_the_compiled_whole_bit_for_bit():
    layer = causal(4, kernel_generator=LowRank(7), groups=48)
    x = ops.convert_to_tensor(random(2, 20, 48))
    whole = numpy(in_graph(lambda x: layer(x))(x))
    step = in_graph(lambda x, inputs, valid: layer.step(x, (inputs, valid)))
    cache = layer.initial_cache(2)
    for t in range(20):
        y, cache = step(x[:, t : t + 1], *cache)
        np.testing.assert_array_equal(numpy(y)[:, 0], whole[:, t])


@requires_native
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "mixed_float16"])
def test_steps_of_other_dtypes(dtype):
    layer = causal(3, dtype=dtype, dilation_rate=2)
    x = ops.cast(random(1, 9, 48), layer.compute_dtype)
    whole = numpy(ops.cast(layer(x), "float64"))
    cache, parts = layer.initial_cache(1), []
    for t in range(9):
        part, cache = layer.step(x[:, t : t + 1], cache)
        parts.append(numpy(ops.cast(part, "float64")))
    np.testing.assert_array_equal(np.concatenate(parts, 1), whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding": "same"}, "Steps require padding='causal'"),
        ({"strides": 2}, r"strides=1.* Received: padding='causal', strides=\(2,\)"),
        ({"data_format": "channels_first"}, "data_format='channels_last'"),
        ({"return_kernel": True}, "return_kernel=False"),
        ({"kernel_generator": "pairwise_attention"}, "a generator of single positions"),
    ],
)
def test_layers_without_steps_raise(arguments, message):
    layer = involution.Involution1D(3, **{"padding": "causal", **arguments})
    layer.build((None, 48, 48))
    with pytest.raises(ValueError, match=message):
        layer.initial_cache(1)


def test_layer_without_weights_has_no_cache():
    with pytest.raises(ValueError, match="must be built"):
        involution.Involution1D(3, padding="causal").initial_cache(1)


# --- Low rank ------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("padding", "tap"), [("causal", 3), ("same", 1)])
@pytest.mark.parametrize("groups", [48, 6])
def test_low_rank_kernels(groups, padding, tap, residual):
    generator = LowRank(5, residual=residual, dtype="float64")
    layer = involution.Involution1D(
        4, padding=padding, groups=groups, kernel_generator=generator, dtype="float64"
    )
    x = random(2, 9, 48).astype("float64")
    layer.build(x.shape)
    randomize(layer)
    projection, weight, static = (numpy(w.value) for w in layer.weights)
    kernel = (x @ projection[0] @ weight[0] + static).reshape(2, 9, 4, groups)
    kernel[:, :, tap] += residual
    y, _ = oracle.involution(x, kernel, (4,), (1,), padding, (1,))
    np.testing.assert_allclose(numpy(layer(x)), y, 1e-11, 1e-11)
    np.testing.assert_allclose(
        numpy(layer.generate_kernel(ops.convert_to_tensor(x))), kernel, 1e-11, 1e-11
    )


@requires_native
def test_low_rank_with_a_kernel_for_each_channel_is_fused():
    layer = causal(4, groups=48, kernel_generator=LowRank(15))
    assert layer.chosen_implementation(ops.convert_to_tensor(random(1, 9, 48))) == "fused"


def test_low_rank_starts_as_a_depthwise_convolution():
    layer = involution.Involution1D(
        4, padding="causal", groups=8, kernel_generator=LowRank(3), return_kernel=True
    )
    kernel = numpy(layer(random(2, 9, 8))[1])
    assert np.ptp(kernel, axis=(0, 1)).max() == 0
    static = kernel[0, 0] - np.eye(4)[3][:, None]
    assert 0.3 < np.abs(static).max() <= 0.5


# --- Masks and softmax ---------------------------------------------------------------------------


def in_bounds_formula(x, logits, mask, kernel_size, rate):
    """Loops: softmax over the taps inside the sequence and not masked; outputs of masked are 0."""
    batch, length, channels = x.shape
    groups = logits.shape[-1]
    y = np.zeros(x.shape)
    for b, t in np.ndindex(batch, length):
        if not mask[b, t]:
            continue
        places = [t - (kernel_size - 1 - k) * rate for k in range(kernel_size)]
        valid = [k for k, q in enumerate(places) if q >= 0 and mask[b, q]]
        weights = np.exp(logits[b, t, valid])
        weights /= weights.sum(0)
        for k, weight in zip(valid, weights, strict=True):
            y[b, t] += weight.repeat(channels // groups) * x[b, places[k]]
    return y


@pytest.mark.parametrize("masked", [False, True])
def test_softmax_in_bounds(masked):
    layer = involution.Involution1D(
        3,
        padding="causal",
        dilation_rate=2,
        groups=2,
        kernel_generator="linear",
        kernel_softmax="in_bounds",
        dtype="float64",
    )
    x, mask = random(2, 9, 8).astype("float64"), np.ones((2, 9), bool)
    layer.build(x.shape)
    randomize(layer)
    if masked:
        mask[0, 6:] = mask[1, :3] = False
    kernel, bias = (numpy(w.value) for w in layer.weights)
    seen = x * mask[..., None]
    logits = (seen @ kernel[0] + bias).reshape(2, 9, 3, 2)
    y = layer(x, mask=ops.convert_to_tensor(mask)) if masked else layer(x)
    np.testing.assert_allclose(numpy(y), in_bounds_formula(seen, logits, mask, 3, 2), 1e-11, 1e-11)


@pytest.mark.parametrize("softmax", [False, True, "in_bounds"])
@pytest.mark.parametrize("padding", ["causal", "same", "valid"])
def test_masked_positions_give_nothing_and_get_nothing(padding, softmax):
    layer = involution.Involution1D(3, padding=padding, strides=1, kernel_softmax=softmax)
    x, mask = random(2, 9, 32), np.ones((2, 9), bool)
    mask[0, 5:] = mask[1, 2] = False
    y = numpy(layer(x, mask=ops.convert_to_tensor(mask)))
    changed = np.where(mask[..., None], x, np.float32(np.nan))
    np.testing.assert_array_equal(numpy(layer(changed, mask=ops.convert_to_tensor(mask))), y)
    centers = mask[:, 1:-1] if padding == "valid" else mask
    assert not y[~centers].any()
    assert np.abs(y[centers]).max(-1).min() > 0
    np.testing.assert_array_equal(
        numpy(layer.compute_mask(None, ops.convert_to_tensor(mask))), centers
    )


@pytest.mark.parametrize("padding", ["causal", "same"])
@pytest.mark.parametrize("generator", [*GENERATORS, "pairwise_attention"])
def test_a_padded_sequence_gives_the_outputs_of_the_sequence(generator, padding):
    layer = involution.Involution1D(5, padding=padding, kernel_generator=generator)
    layer.build((None, None, 16))
    randomize(layer)
    x, mask = random(2, 10, 16), np.arange(10) < [[6], [6]]
    padded = numpy(layer(x, mask=ops.convert_to_tensor(mask)))
    expected = numpy(layer(x[:, :6]))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(padded[:, :6], expected, 1e-5, 1e-5)


def test_masks_of_generators_that_see_all_positions_are_refused():
    layer = involution.Involution1D(5, kernel_generator="large_context")
    x = random(2, 10, 16)
    layer(x)
    with pytest.raises(ValueError, match=r"without a mask.*kernel_generator=large_context"):
        layer(x, mask=ops.ones((2, 10), "bool"))


def test_mask_of_an_embedding_passes_through_the_layers():
    seen = []

    class Probe(keras.layers.Layer):
        supports_masking = True

        def call(self, inputs, mask=None):
            seen.append(mask)
            return inputs

    model = keras.Sequential(
        [
            keras.layers.Embedding(10, 16, mask_zero=True),
            involution.Involution1D(3, padding="causal", strides=2),
            Probe(),
        ]
    )
    tokens = np.array([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]])
    y = numpy(model(tokens))
    np.testing.assert_array_equal(numpy(seen[-1]), tokens[:, ::2] != 0)
    assert not y[0, 2].any()


def test_mask_in_two_dimensions():
    layer = involution.Involution2D(3, kernel_softmax="in_bounds", return_kernel=True)
    x, mask = random(1, 4, 5, 16), np.ones((1, 4, 5), bool)
    mask[0, :, 3:] = False
    y, kernel = (numpy(t) for t in layer(x, mask=ops.convert_to_tensor(mask)))
    assert not y[:, :, 3:].any()
    kernel = kernel[0, 1, 2, :, 0].reshape(3, 3)
    np.testing.assert_allclose(kernel.sum(), 1, 1e-6)
    assert not kernel[:, 2].any()
