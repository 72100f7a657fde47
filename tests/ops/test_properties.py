"""The properties P1 to P14, which every call has.

XLA compiles each new shape: sizes come from short lists, and only values from random seeds.
"""

import collections
import dataclasses
import functools
import importlib.util
import types

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import involution
from involution.ops import dispatch
from tests.support.backends import (
    BACKEND,
    IMPLEMENTATIONS,
    assert_equals_oracle,
    each_other_backend,
    fresh_process,
    gradients,
    in_graph,
    numpy,
    operation,
    tensors,
)
from tests.support.oracle import Call, pads, random_calls

CALLS = (
    Call(2, (7,), 6, (3,), (2,), "same", (1,), 3),
    Call(1, (9,), 5, (4,), (1,), ((3, 1),), (2,), 1, "interleaved", "channels_first"),
    Call(2, (5, 7), 4, (3, 2), (1, 2), "same", (2, 1), 2),
    Call(1, (7, 3), 20, (2, 3), (3, 1), "symmetric", (1, 1), 1, "contiguous", "channels_first"),
    Call(1, (6, 7), 6, (3, 3), (1, 1), "valid", (1, 2), 2, "interleaved"),
    Call(1, (3, 4, 5), 4, (2, 1, 3), (2, 1, 1), ((1, 0), (0, 2), (1, 1)), (1, 1, 2), 2),
)

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
calls, seeds = st.sampled_from(CALLS), st.integers(0, 2**32 - 1)
# XLA compiles each example for up to a second.
EXAMPLES = 4 if BACKEND == "jax" else 20
quick = settings(derandomize=True, deadline=None, max_examples=EXAMPLES)


def run(call, implementation, *arrays):
    return numpy(operation(call, implementation)(*tensors(arrays, "float64")))


@functools.cache
def program(call, implementation, compiled):
    apply = operation(call, implementation)
    return in_graph(apply) if compiled else apply


def close(value, expected, tolerance=1e-12):
    np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance)


@pytest.mark.long
@each_implementation
@quick
@given(calls, seeds, st.sampled_from(["float64", "float32", "bfloat16", "float16"]))
def test_p01_equals_the_oracle(implementation, call, seed, dtype):
    x, kernel = tensors(call.arrays(seed)[:2], dtype)
    assert_equals_oracle(call, operation(call, implementation)(x, kernel), x, kernel)


@functools.cache
def pool():
    """Small calls of every kind with every dtype, twice with float64 and float32."""
    dtypes = ("float64", "float32", "bfloat16", "float16", "float64", "float32")
    return list(zip(random_calls(288, seed=10), np.repeat(dtypes, 48).tolist(), strict=True))


@pytest.mark.slow
def test_p01_equals_the_oracle_in_many_examples():
    """Values of very different magnitudes, eager and compiled.

    `--hypothesis-profile=long` sets the number of examples to 5,000.
    """
    errors = collections.defaultdict(list)

    @settings(derandomize=True, deadline=None)
    @given(
        st.sampled_from(pool()),
        st.sampled_from(IMPLEMENTATIONS),
        st.booleans(),
        st.integers(0, 3),
        seeds,
    )
    def holds(call_and_dtype, implementation, compiled, spread, seed):
        call, dtype = call_and_dtype
        scales = np.random.default_rng(seed)
        arrays = [
            a * 2.0 ** scales.integers(-spread, spread + 1, a.shape) for a in call.arrays(seed)
        ]
        x, kernel = tensors(arrays[:2], dtype)
        y = program(call, implementation, compiled)(x, kernel)
        errors[implementation, dtype].append(assert_equals_oracle(call, y, x, kernel))

    holds()
    for names, group in errors.items():
        count, error = len(group), max(group)
        print(f"{BACKEND}, {', '.join(names)}, {count} examples: at most {error:.4f} of the bound")
    print(f"{BACKEND}, {sum(map(len, errors.values()))} examples of {len(pool())} calls")


@each_implementation
@quick
@given(
    st.sampled_from(
        [
            Call(2, (9,), 4, (3,), (2,), "same", (1,), 2),
            Call(1, (7, 6), 6, (3, 2), (1, 1), "same", (2, 2), 3, "interleaved"),
            Call(2, (7, 8), 4, (3, 4), (2, 2), "valid", (1, 1), 1),
        ]
    ),
    seeds,
)
def test_p02_kernel_constant_over_positions_is_depthwise_convolution(implementation, call, seed):
    x, kernel, _ = call.arrays(seed)
    shared = kernel[(slice(1),) * (1 + len(call.sizes))]
    y = run(call, implementation, x, np.broadcast_to(shared, kernel.shape))
    channels_per_group = call.channels // call.groups
    by_channel = (
        np.repeat(shared, channels_per_group, axis=-1)
        if call.group_layout == "contiguous"
        else np.concatenate([shared] * channels_per_group, axis=-1)
    )
    expected = keras.ops.depthwise_conv(
        *tensors((x, by_channel.reshape(*call.kernel_size, call.channels, 1)), "float64"),
        strides=call.strides[0],
        padding=call.padding,
        data_format="channels_last",
        dilation_rate=call.dilation_rate,
    )
    close(y, numpy(expected))


@each_implementation
@quick
@given(
    st.sampled_from(
        [
            Call(2, (5,), 4, (1,), (1,), "same", (1,), 4),
            Call(2, (5, 3), 6, (1, 1), (2, 1), "valid", (3, 1), 3),
        ]
    ),
    seeds,
)
def test_p03_window_of_one_position_is_a_product(implementation, call, seed):
    x, kernel, _ = call.arrays(seed)
    read = x[(slice(None), *(slice(None, None, s) for s in call.strides))]
    channels_per_group = call.channels // call.groups
    expected = read * np.repeat(kernel[..., 0, :], channels_per_group, axis=-1)
    assert (run(call, implementation, x, kernel) == expected).all()


@each_implementation
@quick
@given(calls, seeds, st.floats(-4, 4), st.floats(-4, 4))
def test_p04_linear_in_both(implementation, call, seed, a, b):
    (x, kernel, _), (x2, kernel2, _) = call.arrays(seed), call.arrays(seed + 1)
    y = run(call, implementation, x, kernel)
    of_x = run(call, implementation, a * x + b * x2, kernel)
    of_kernel = run(call, implementation, x, a * kernel + b * kernel2)
    close(of_x, a * y + b * run(call, implementation, x2, kernel), 1e-11)
    close(of_kernel, a * y + b * run(call, implementation, x, kernel2), 1e-11)


@pytest.mark.long
@each_implementation
@settings(quick, max_examples=min(EXAMPLES, 8))
@given(st.sampled_from(CALLS[1:4]), seeds)
def test_p04_gradients_are_adjoint(implementation, call, seed):
    x, kernel, dy = call.arrays(seed)
    y = run(call, implementation, x, kernel)
    dx, dkernel = gradients(operation(call, implementation), (x, kernel), dy)
    products = (dy * y).sum(), (dx * x).sum(), (dkernel * kernel).sum()
    _, magnitude = call.involution(x, kernel)
    assert np.ptp(products) <= 1e-14 * (np.abs(dy) * magnitude).sum()


@each_implementation
@quick
@given(st.integers(0, 2), st.integers(0, 3), seeds)
def test_p05_shifting_input_and_kernel_shifts_the_output(implementation, down, right, seed):
    """By multiples of the strides; the border is zero, so that no value is shifted out."""
    call = Call(1, (13, 17), 4, (3, 2), (2, 1), "symmetric", (1, 2), 2)
    x, kernel, _ = call.arrays(seed)
    inside = np.zeros_like(x)
    inside[:, 2:7, 3:12] = x[:, 2:7, 3:12]
    y = run(call, implementation, inside, kernel)
    moved = run(
        call,
        implementation,
        np.roll(inside, (2 * down, right), (1, 2)),
        np.roll(kernel, (down, right), (1, 2)),
    )
    close(moved, np.roll(y, (down, right), (1, 2)))


@each_implementation
@quick
@given(st.sampled_from(["contiguous", "interleaved"]), st.permutations(range(3)), seeds)
def test_p06_permuting_groups_permutes_channels(implementation, group_layout, order, seed):
    call = Call(1, (5, 3), 6, (3, 2), (1, 1), "same", (1, 1), 3, group_layout)
    x, kernel, _ = call.arrays(seed)
    channels = np.arange(6)
    if group_layout == "contiguous":
        channels = channels.reshape(3, 2)[order].ravel()
    else:
        channels = channels.reshape(2, 3)[:, order].ravel()
    y = run(call, implementation, x[..., channels], kernel[..., order])
    close(y, run(call, implementation, x, kernel)[..., channels])


@pytest.mark.long
@pytest.mark.parametrize(
    ("implementation", "compiled"),
    [(name, compiled) for name in IMPLEMENTATIONS[:-1] for compiled in (False, True)]
    + [("reference", False)],
)
@settings(quick, max_examples=min(EXAMPLES, 8))
@given(
    st.sampled_from(
        [
            Call(3, (5, 7), 34, (3, 3), (1, 1), "same", (1, 1), 2),
            Call(5, (9,), 9, (4,), (2,), "same", (1,), 3, "interleaved", "channels_first"),
        ]
    ),
    st.integers(0, 2),
    seeds,
)
def test_p07_bits_of_a_sample_do_not_depend_on_the_batch(
    implementation, compiled, call, sample, seed
):
    apply = program(call, implementation, compiled)
    x, kernel, dy = (a.astype("float32") for a in call.arrays(seed))

    def results(part):
        y = apply(*tensors((x[part], kernel[part]), "float32"))
        return numpy(y), *gradients(apply, (x[part], kernel[part]), dy[part])

    one = slice(sample, sample + 1)
    for batched, single in zip(results(slice(None)), results(one), strict=True):
        assert single.dtype == np.float32
        assert (batched[one] == single).all()


@pytest.mark.long
@each_implementation
@settings(quick, max_examples=min(EXAMPLES, 8))
@given(st.sampled_from([CALLS[0], CALLS[2]]), seeds)
def test_p08_channels_first_is_channels_last_transposed(implementation, call, seed):
    x, kernel, dy = call.arrays(seed)

    def first(a, channel_axes=1):
        return np.moveaxis(a, range(-channel_axes, 0), range(1, 1 + channel_axes))

    transposed = dataclasses.replace(call, data_format="channels_first")
    moved = first(x), first(kernel, 2)
    close(run(transposed, implementation, *moved), first(run(call, implementation, x, kernel)))
    dx, dkernel = gradients(operation(call, implementation), (x, kernel), dy)
    dx_first, dkernel_first = gradients(operation(transposed, implementation), moved, first(dy))
    close(dx_first, first(dx))
    close(dkernel_first, first(dkernel, 2))


@each_implementation
@quick
@given(st.integers(0, 1), st.integers(0, 2), seeds)
def test_p09_dilation_is_subsampling(implementation, row, column, seed):
    call = Call(1, (8, 12), 4, (3, 2), (1, 1), "valid", (2, 3), 2)
    x, kernel, _ = call.arrays(seed)
    part = (slice(None), slice(row, None, 2), slice(column, None, 3))
    dense = dataclasses.replace(call, sizes=(4, 4), dilation_rate=(1, 1))
    y = run(call, implementation, x, kernel)
    close(y[part], run(dense, implementation, x[part], kernel[part]))


@each_implementation
@quick
@given(st.sampled_from(["valid", "symmetric", ((2, 1), (0, 3))]), seeds)
def test_p10_stride_is_subsampling_of_the_output(implementation, padding, seed):
    call = Call(1, (7, 10), 4, (3, 2), (1, 1), padding, (1, 2), 2)
    strided = dataclasses.replace(call, strides=(2, 3))
    x, kernel, _ = call.arrays(seed)
    part = (slice(None), slice(None, None, 2), slice(None, None, 3))
    y = run(call, implementation, x, kernel)
    close(run(strided, implementation, x, kernel[part]), y[part])


LINE = Call(1, (7,), 4, (3,), (2,), "same", (1,), 2)
PLANE = Call(1, (5, 7), 4, (3, 2), (1, 2), "same", (1, 1), 2)


@each_implementation
@quick
@given(
    st.sampled_from(
        [
            (LINE, 0, "same", 3),
            (LINE, 1, "symmetric", 1),
            (PLANE, 0, "same", 3),
            (PLANE, 1, "symmetric", 3),
            (PLANE, 2, "same", 1),
        ]
    ),
    seeds,
)
def test_p11_dimension_of_size_one_can_be_removed(implementation, kind, seed):
    """In that dimension, only the tap that reads the single position has an effect."""
    call, axis, padding, window = kind
    call = dataclasses.replace(call, padding=padding)
    x, kernel, _ = call.arrays(seed)
    tuples = {
        name: (*values[:axis], extra, *values[axis:])
        for name, values, extra in (
            ("sizes", call.sizes, 1),
            ("kernel_size", call.kernel_size, window),
            ("strides", call.strides, 2),
            ("dilation_rate", call.dilation_rate, 1),
        )
    }
    deeper = dataclasses.replace(call, **tuples)
    positions = deeper.kernel_shape[:-2]
    wide = np.random.default_rng(seed).standard_normal((*positions, *deeper.kernel_size, 2))
    windows = np.expand_dims(kernel, 1 + axis).reshape((*positions, *call.kernel_size, 2))
    wide[(slice(None),) * (len(positions) + axis) + (window // 2,)] = windows
    y = run(deeper, implementation, np.expand_dims(x, 1 + axis), wide.reshape(deeper.kernel_shape))
    close(np.squeeze(y, 1 + axis), run(call, implementation, x, kernel))


def compute(path, implementation):
    """Saves the outputs and gradients of all calls, in float32, to a file."""
    results = {}
    for i, call in enumerate(CALLS):
        x, kernel, dy = (a.astype("float32") for a in call.arrays(seed=i))
        apply = operation(call, implementation)
        results[f"y{i}"] = numpy(apply(*tensors((x, kernel), "float32")))
        results[f"dx{i}"], results[f"dkernel{i}"] = gradients(apply, (x, kernel), dy)
    np.savez(path, **results)


def compute_all(folder):
    for implementation in IMPLEMENTATIONS[:-1]:
        compute(f"{folder}/{implementation}.npz", implementation)


@pytest.mark.long
@pytest.mark.any_backend
@each_other_backend
def test_p12_backends_compute_the_same(other, tmp_path):
    if importlib.util.find_spec(other) is None:
        pytest.skip(f"{other} is not installed")
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    compute_all(here)
    fresh_process(f"import tests.ops.test_properties as t; t.compute_all({str(there)!r})", other)
    for implementation in IMPLEMENTATIONS[:-1]:
        file = f"{implementation}.npz"
        with np.load(here / file) as one, np.load(there / file) as two:
            assert set(one) == set(two)
            for name in one:
                if implementation == "native":
                    # The same code and the same order: the same bits.
                    np.testing.assert_array_equal(two[name], one[name])
                scale = np.abs(one[name]).max()
                np.testing.assert_allclose(two[name], one[name], rtol=0, atol=1e-6 * scale)


def padded(call, x):
    """(call, x) with the padding in the input, so that taps there multiply kernel values by 0."""
    dimensions = zip(call.sizes, call.kernel_size, call.strides, call.dilation_rate, strict=True)
    around = [pads(*d, call.padding, i) for i, d in enumerate(dimensions)]
    sizes = tuple(n + sum(pair) for n, pair in zip(call.sizes, around, strict=True))
    first = 1 if call.data_format == "channels_last" else 2
    around = [(0, 0)] * first + around + [(0, 0)] * (2 - first)
    return dataclasses.replace(call, sizes=sizes, padding="valid"), np.pad(x, around)


@each_implementation
@quick
@given(calls, seeds, st.sampled_from([np.nan, np.inf, -np.inf]))
def test_p13_non_finite_values_affect_only_windows_that_read_them(implementation, call, seed, bad):
    x, kernel, _ = call.arrays(seed)
    finite = run(call, implementation, x, kernel)
    rng = np.random.default_rng(seed)
    for corrupted in (x, kernel):
        index = rng.integers(corrupted.size)
        original, corrupted.flat[index] = corrupted.flat[index], bad
        y = run(call, implementation, x, kernel)
        padded_call, padded_x = padded(call, x)
        with np.errstate(invalid="ignore"):
            expected, _ = padded_call.involution(padded_x, kernel)
        untouched = np.isfinite(expected)
        assert not untouched.all() or corrupted is x  # A stride may skip this element of x.
        assert (y[untouched] == finite[untouched]).all()
        np.testing.assert_array_equal(y[~untouched], expected[~untouched])
        corrupted.flat[index] = original


@pytest.mark.long
@each_implementation
@settings(quick, max_examples=min(EXAMPLES, 8))
@given(st.sampled_from(CALLS[2:4]), seeds)
def test_p13_nan_output_gradient_affects_only_its_window(implementation, call, seed):
    x, kernel, dy = call.arrays(seed)
    index = np.random.default_rng(seed).integers(dy.size)
    one_hot = np.zeros_like(dy)
    one_hot.flat[index] = 1
    dy.flat[index] = np.nan
    dx, dkernel = gradients(operation(call, implementation), (x, kernel), dy)
    # With all inputs 1, the entries that this output depends on have nonzero derivatives.
    of_x, _ = call.central_differences(np.ones_like(x), np.ones_like(kernel), one_hot)
    padded_call, padded_x = padded(call, x)
    _, of_kernel = padded_call.central_differences(
        np.ones_like(padded_x), np.ones_like(kernel), one_hot
    )
    assert (np.isnan(dx) == (of_x != 0)).all()
    assert (np.isnan(dkernel) == (of_kernel != 0)).all()


INVALID = [
    ("kernel_size", 0),
    ("kernel_size", (3, 3, 3, 3)),
    ("kernel_size", ()),
    ("kernel_size", 3.0),
    ("kernel_size", True),
    ("kernel_size", None),
    ("strides", 0),
    ("strides", -1),
    ("strides", "2"),
    ("dilation_rate", 0),
    ("dilation_rate", (1.5,)),
    ("padding", "full"),
    ("padding", -1),
    ("padding", ((0, -1),)),
    ("padding", (1, 1, 1, 1)),
    ("padding", None),
    ("groups", 0),
    ("groups", (2,) * 2),
    ("groups", 1000),
    ("group_layout", "blocks"),
    ("group_layout", None),
    ("data_format", "NHWC"),
    ("data_format", ["channels_last"]),
    ("implementation", "cudnn"),
]


@each_implementation
@settings(quick, max_examples=100)
@given(calls, st.sampled_from(INVALID), st.booleans())
def test_p14_invalid_arguments_raise_before_anything_runs(implementation, call, invalid, symbolic):
    def never(*_):
        raise AssertionError("something ran")

    broken = types.SimpleNamespace(unsupported_reason=never, apply=never)
    name, value = invalid
    arguments = {**call.arguments, "implementation": implementation, name: value}
    x, kernel = call.arrays()[:2]
    if symbolic:
        x, kernel = (keras.KerasTensor(a.shape, "float64") for a in (x, kernel))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "IMPLEMENTATIONS", dict.fromkeys(dispatch.IMPLEMENTATIONS, broken))
        with pytest.raises(ValueError, match="Received: ") as caught:
            involution.ops.involution(x, kernel, **arguments)
    rule, received = str(caught.value).rsplit("Received: ", 1)
    assert f"`{name}`" in rule
    assert received.startswith(f"{name}={value!r}")
