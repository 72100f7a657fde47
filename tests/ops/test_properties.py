"""What holds for every call: the properties P1 to P14.

XLA compiles every new shape anew, so that sizes come from short lists and values from any seed.
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
some = settings(derandomize=True, deadline=None, max_examples=20)


def run(call, implementation, *arrays):
    return numpy(operation(call, implementation)(*tensors(arrays, "float64")))


@functools.cache
def program(call, implementation, compiled):
    apply = operation(call, implementation)
    return in_graph(apply) if compiled else apply


def close(value, expected, tolerance=1e-12):
    np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance)


@each_implementation
@some
@given(calls, seeds, st.sampled_from(["float64", "float32", "bfloat16", "float16"]))
def test_p01_equals_the_oracle(implementation, call, seed, dtype):
    x, kernel = tensors(call.arrays(seed)[:2], dtype)
    assert_equals_oracle(call, operation(call, implementation)(x, kernel), x, kernel)


@functools.cache
def pool():
    """Small calls, each with a type: every kind of call with every type, twice the exact ones."""
    types = ("float64", "float32", "bfloat16", "float16", "float64", "float32")
    return list(zip(random_calls(288, seed=10), np.repeat(types, 48).tolist(), strict=True))


@pytest.mark.slow
def test_p01_equals_the_oracle_at_length():
    """Numbers of very different sizes, eager and compiled; `--hypothesis-profile=long`: 5,000."""
    errors = collections.defaultdict(list)

    @settings(derandomize=True, deadline=None)
    @given(
        st.sampled_from(pool()),
        st.sampled_from(IMPLEMENTATIONS),
        st.booleans(),
        st.integers(0, 3),
        seeds,
    )
    def holds(call_and_type, implementation, compiled, spread, seed):
        call, dtype = call_and_type
        scales = np.random.default_rng(seed)
        arrays = [
            a * 2.0 ** scales.integers(-spread, spread + 1, a.shape) for a in call.arrays(seed)
        ]
        x, kernel = tensors(arrays[:2], dtype)
        y = program(call, implementation, compiled)(x, kernel)
        errors[implementation, dtype].append(assert_equals_oracle(call, y, x, kernel))

    holds()
    for names, some_errors in errors.items():
        count, error = len(some_errors), max(some_errors)
        print(f"{BACKEND}, {', '.join(names)}, {count} examples: at most {error:.4f} of the bound")
    print(f"{BACKEND}, {sum(map(len, errors.values()))} examples of {len(pool())} calls")


@each_implementation
@some
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
def test_p02_a_kernel_constant_over_places_is_depthwise_convolution(implementation, call, seed):
    x, kernel, _ = call.arrays(seed)
    everywhere = kernel[(slice(1),) * (1 + len(call.sizes))]
    y = run(call, implementation, x, np.broadcast_to(everywhere, kernel.shape))
    members = call.channels // call.groups
    of_channels = (
        np.repeat(everywhere, members, axis=-1)
        if call.group_layout == "contiguous"
        else np.concatenate([everywhere] * members, axis=-1)
    )
    expected = keras.ops.depthwise_conv(
        *tensors((x, of_channels.reshape(*call.kernel_size, call.channels, 1)), "float64"),
        strides=call.strides[0],
        padding=call.padding,
        data_format="channels_last",
        dilation_rate=call.dilation_rate,
    )
    close(y, numpy(expected))


@each_implementation
@some
@given(
    st.sampled_from(
        [
            Call(2, (5,), 4, (1,), (1,), "same", (1,), 4),
            Call(2, (5, 3), 6, (1, 1), (2, 1), "valid", (3, 1), 3),
        ]
    ),
    seeds,
)
def test_p03_a_window_of_one_is_a_product(implementation, call, seed):
    x, kernel, _ = call.arrays(seed)
    read = x[(slice(None), *(slice(None, None, s) for s in call.strides))]
    members = call.channels // call.groups
    expected = read * np.repeat(kernel[..., 0, :], members, axis=-1)
    assert (run(call, implementation, x, kernel) == expected).all()


@each_implementation
@some
@given(calls, seeds, st.floats(-4, 4), st.floats(-4, 4))
def test_p04_linear_in_both(implementation, call, seed, a, b):
    (x, kernel, _), (x2, kernel2, _) = call.arrays(seed), call.arrays(seed + 1)
    y = run(call, implementation, x, kernel)
    of_x = run(call, implementation, a * x + b * x2, kernel)
    of_kernel = run(call, implementation, x, a * kernel + b * kernel2)
    close(of_x, a * y + b * run(call, implementation, x2, kernel), 1e-11)
    close(of_kernel, a * y + b * run(call, implementation, x, kernel2), 1e-11)


@each_implementation
@settings(some, max_examples=8)
@given(st.sampled_from(CALLS[1:4]), seeds)
def test_p04_gradients_are_adjoint(implementation, call, seed):
    x, kernel, dy = call.arrays(seed)
    y = run(call, implementation, x, kernel)
    dx, dkernel = gradients(operation(call, implementation), (x, kernel), dy)
    products = (dy * y).sum(), (dx * x).sum(), (dkernel * kernel).sum()
    _, magnitude = call.involution(x, kernel)
    assert np.ptp(products) <= 1e-14 * (np.abs(dy) * magnitude).sum()


@each_implementation
@some
@given(st.integers(0, 2), st.integers(0, 3), seeds)
def test_p05_shifting_input_and_kernel_shifts_the_output(implementation, down, right, seed):
    """By whole strides, with zeros all around so that nothing falls off."""
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
@some
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


@pytest.mark.parametrize(
    ("implementation", "compiled"),
    [(name, compiled) for name in IMPLEMENTATIONS[:-1] for compiled in (False, True)]
    + [("reference", False)],
)
@settings(some, max_examples=8)
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
def test_p07_a_sample_alone_has_the_bits_it_has_in_a_batch(
    implementation, compiled, call, sample, seed
):
    apply = program(call, implementation, compiled)
    x, kernel, dy = (a.astype("float32") for a in call.arrays(seed))

    def results(part):
        y = apply(*tensors((x[part], kernel[part]), "float32"))
        return numpy(y), *gradients(apply, (x[part], kernel[part]), dy[part])

    one = slice(sample, sample + 1)
    for together, alone in zip(results(slice(None)), results(one), strict=True):
        assert alone.dtype == np.float32
        assert (together[one] == alone).all()


@each_implementation
@settings(some, max_examples=8)
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
@some
@given(st.integers(0, 1), st.integers(0, 2), seeds)
def test_p09_dilation_is_subsampling(implementation, row, column, seed):
    call = Call(1, (8, 12), 4, (3, 2), (1, 1), "valid", (2, 3), 2)
    x, kernel, _ = call.arrays(seed)
    part = (slice(None), slice(row, None, 2), slice(column, None, 3))
    dense = dataclasses.replace(call, sizes=(4, 4), dilation_rate=(1, 1))
    y = run(call, implementation, x, kernel)
    close(y[part], run(dense, implementation, x[part], kernel[part]))


@each_implementation
@some
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
@some
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
def test_p11_a_side_of_one_is_a_dimension_less(implementation, kind, seed):
    """Of the window along that side, the tap that reads the one position is all that counts."""
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
    places = deeper.kernel_shape[:-2]
    wide = np.random.default_rng(seed).standard_normal((*places, *deeper.kernel_size, 2))
    windows = np.expand_dims(kernel, 1 + axis).reshape((*places, *call.kernel_size, 2))
    wide[(slice(None),) * (len(places) + axis) + (window // 2,)] = windows
    y = run(deeper, implementation, np.expand_dims(x, 1 + axis), wide.reshape(deeper.kernel_shape))
    close(np.squeeze(y, 1 + axis), run(call, implementation, x, kernel))


def compute(path, implementation):
    """Outputs and gradients of all calls, in float32, into a file."""
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


@each_other_backend
def test_p12_another_backend_computes_the_same(other, tmp_path):
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
    """The same call with its zeros as a part of the input: 0 times what is not finite is NaN."""
    dimensions = zip(call.sizes, call.kernel_size, call.strides, call.dilation_rate, strict=True)
    around = [pads(*d, call.padding, i) for i, d in enumerate(dimensions)]
    sizes = tuple(n + sum(pair) for n, pair in zip(call.sizes, around, strict=True))
    first = 1 if call.data_format == "channels_last" else 2
    around = [(0, 0)] * first + around + [(0, 0)] * (2 - first)
    return dataclasses.replace(call, sizes=sizes, padding="valid"), np.pad(x, around)


@each_implementation
@some
@given(calls, seeds, st.sampled_from([np.nan, np.inf, -np.inf]))
def test_p13_what_is_not_finite_stays_where_it_is_read(implementation, call, seed, bad):
    x, kernel, _ = call.arrays(seed)
    finite = run(call, implementation, x, kernel)
    rng = np.random.default_rng(seed)
    for spoiled in (x, kernel):
        place = rng.integers(spoiled.size)
        kept, spoiled.flat[place] = spoiled.flat[place], bad
        y = run(call, implementation, x, kernel)
        whole, zeros_around = padded(call, x)
        with np.errstate(invalid="ignore"):
            expected, _ = whole.involution(zeros_around, kernel)
        untouched = np.isfinite(expected)
        assert not untouched.all() or spoiled is x  # A stride may skip the place.
        assert (y[untouched] == finite[untouched]).all()
        if implementation == "native":
            # It may leave out the zeros around the input instead of multiplying by them.
            with np.errstate(invalid="ignore"):
                read, _ = call.involution(x, kernel)
            assert not np.isfinite(y[~np.isfinite(read)]).any()
        else:
            np.testing.assert_array_equal(y[~untouched], expected[~untouched])
        spoiled.flat[place] = kept


@each_implementation
@settings(some, max_examples=8)
@given(st.sampled_from(CALLS[2:4]), seeds)
def test_p13_a_nan_gradient_stays_within_its_window(implementation, call, seed):
    x, kernel, dy = call.arrays(seed)
    place = np.random.default_rng(seed).integers(dy.size)
    only = np.zeros_like(dy)
    only.flat[place] = 1
    dy.flat[place] = np.nan
    dx, dkernel = gradients(operation(call, implementation), (x, kernel), dy)
    # Every entry that the spoiled output depends on has a slope there, where all others are 1.
    of_x, _ = call.central_differences(np.ones_like(x), np.ones_like(kernel), only)
    whole, everywhere = padded(call, x)
    _, of_kernel = whole.central_differences(np.ones_like(everywhere), np.ones_like(kernel), only)
    assert (np.isnan(dx) == (of_x != 0)).all()
    if implementation == "native":
        _, of_read = call.central_differences(np.ones_like(x), np.ones_like(kernel), only)
        assert np.isnan(dkernel)[of_read != 0].all()
        assert not np.isnan(dkernel)[of_kernel == 0].any()
    else:
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
@settings(some, max_examples=100)
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
