"""The operator: values, shapes, selection and errors. Test names contain failure cases."""

import concurrent.futures
import dataclasses
import functools
import gc
import itertools
import os
import pathlib

import keras
import numpy as np
import pytest

import involution
from involution.ops import dispatch, native, taps
from involution.ops.cases import CASES
from involution.ops.native import library
from involution.ops.window import Window
from tests.support.backends import (
    ALL_IMPLEMENTATIONS,
    BACKEND,
    IMPLEMENTATIONS,
    assert_equals_oracle,
    fresh_process,
    grad,
    gradients,
    in_graph,
    jvp,
    native_missing_reason,
    numpy,
    operation,
    tensors,
    to_float64,
    vmap,
)
from tests.support.oracle import Call, random_calls, with_non_finite

PADDINGS = ("same", "valid", "symmetric", ((1, 2), (0, 3)))

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
each_format = pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])


def plane(sizes, kernel_size, **changes):
    """A two-dimensional call, plain except for ``changes``."""
    call = Call(2, sizes, 6, kernel_size, (1, 1), "same", (1, 1), 2)
    return dataclasses.replace(call, **changes)


SMALL = plane((5, 7), (3, 2))


def check(call, implementation, dtype="float64"):
    x, kernel = tensors(call.arrays()[:2], dtype)
    assert_equals_oracle(call, operation(call, implementation)(x, kernel), x, kernel)


@each_implementation
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("strides", [(2, 2), (3, 2)])
def test_f01_size_not_divisible_by_stride(strides, padding, implementation):
    check(plane((7, 11), (3, 2), strides=strides, padding=padding), implementation)


@each_implementation
def test_f01_same_output_size_is_the_ceiling_of_size_over_stride(implementation):
    call = Call(1, (33,), 2, (3,), (2,), "same", (1,))
    assert call.output_shape == (1, 17, 2)
    check(call, implementation)


@pytest.mark.long
@each_implementation
@each_format
@pytest.mark.parametrize("padding", PADDINGS)
def test_f02_graph_of_unknown_sizes_that_change(padding, data_format, implementation):
    call = plane((5, 7), (3, 2), strides=(2, 3), padding=padding, data_format=data_format)
    if data_format == "channels_last":
        shapes = (None, None, None, 6), (None, None, None, 6, 2)
    else:
        shapes = (None, 6, None, None), (None, 6, 2, None, None)
    program = in_graph(operation(call, implementation), shapes)
    for sizes in [(5, 7), (8, 6)]:
        sized = dataclasses.replace(call, sizes=sizes)
        x, kernel = tensors(sized.arrays()[:2], "float64")
        assert_equals_oracle(sized, program(x, kernel), x, kernel)


@each_implementation
def test_f02_functional_model_of_unknown_sizes(implementation):
    call = plane((5, 7), (3, 2), strides=(2, 2))
    inputs = [
        keras.Input((None, None, 6), dtype="float64"),
        keras.Input((None, None, 6, 2), dtype="float64"),
    ]
    y = operation(call, implementation)(*inputs)
    assert y.shape == (None, None, None, 6)
    model = keras.Model(inputs, y)
    for sizes in [(5, 7), (8, 6)]:
        sized = dataclasses.replace(call, sizes=sizes)
        x, kernel = tensors(sized.arrays()[:2], "float64")
        assert_equals_oracle(sized, model([x, kernel]), x, kernel)


@each_implementation
@each_format
@pytest.mark.parametrize(
    ("group_layout", "expected"),
    [("contiguous", [10, 20, 60, 80]), ("interleaved", [10, 40, 30, 80])],
)
def test_f03_group_of_a_channel(group_layout, expected, data_format, implementation):
    channels = (1, 1, 4) if data_format == "channels_last" else (1, 4, 1)
    window = (1, 1, 1, 2) if data_format == "channels_last" else (1, 1, 2, 1)
    y = involution.ops.involution(
        np.reshape([1.0, 2.0, 3.0, 4.0], channels),
        np.reshape([10.0, 20.0], window),
        kernel_size=1,
        groups=2,
        group_layout=group_layout,
        data_format=data_format,
        implementation=implementation,
    )
    assert numpy(y).ravel().tolist() == expected


@each_implementation
@each_format
@pytest.mark.parametrize("sizes", [(3, 8), (9, 2)])
def test_f04_height_is_not_width(sizes, data_format, implementation):
    check(plane(sizes, (3, 3), data_format=data_format), implementation)


@each_implementation
@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("kernel_size", [(2, 4), (4, 1), (6, 7), (1, 1)])
def test_f05_even_unequal_large_and_single_windows(kernel_size, padding, implementation):
    if padding == "symmetric" and kernel_size == (6, 7):
        # For a symmetric even window wider than the input there is no position.
        kernel_size = (5, 7)
    call = plane((3, 5), kernel_size, padding=padding, strides=(1, 2))
    check(call, implementation)


@each_implementation
@pytest.mark.parametrize(("channels", "groups"), [(6, 4), (2, 3), (0, 1)])
def test_f06_channels_not_divisible_by_groups_raise(channels, groups, implementation):
    with pytest.raises(ValueError, match=rf"divisible by `groups`\. Received: groups={groups}"):
        involution.ops.involution(
            np.ones((1, 4, channels)),
            np.ones((1, 4, 3, groups)),
            kernel_size=3,
            groups=groups,
            implementation=implementation,
        )


@each_implementation
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_f08_partial_sums_beyond_half_precision(dtype, implementation):
    """300 * 200 * (1 + 1 - 1): two terms overflow float16. 256 + 1 - 256: bfloat16 has no 257."""
    terms = [300.0, 300.0, -300.0] if dtype == "float16" else [256.0, 1.0, -256.0]
    factor, result = (200.0, 60000.0) if dtype == "float16" else (1.0, 1.0)
    arguments = {"kernel_size": 3, "padding": "valid", "implementation": implementation}
    x, kernel = tensors([np.reshape(terms, (1, 3, 1)), np.full((1, 1, 3, 1), factor)], dtype)
    y = involution.ops.involution(x, kernel, **arguments)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    assert to_float64(y).ravel().tolist() == [result]

    # The kernel gradient has the same partial sums, over the channels.
    def apply(x, kernel):
        x, kernel = keras.ops.cast(x, dtype), keras.ops.cast(kernel, dtype)
        return keras.ops.cast(involution.ops.involution(x, kernel, **arguments), "float32")

    x, kernel, dy = np.tile(terms, (1, 3, 1)), np.ones((1, 1, 3, 1)), np.full((1, 1, 3), factor)
    _, dkernel = gradients(apply, [a.astype("float32") for a in (x, kernel)], dy.astype("float32"))
    assert dkernel.ravel().tolist() == [result] * 3


@each_implementation
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_f08_partial_sums_of_input_gradients_beyond_half_precision(dtype, implementation):
    """One position, read by three taps: the same sums as above."""
    terms = [300.0, 300.0, -300.0] if dtype == "float16" else [256.0, 1.0, -256.0]
    factor, result = (200.0, 60000.0) if dtype == "float16" else (1.0, 1.0)

    def apply(x, kernel):
        x, kernel = keras.ops.cast(x, dtype), keras.ops.cast(kernel, dtype)
        y = involution.ops.involution(x, kernel, 3, padding=2, implementation=implementation)
        return keras.ops.cast(y, "float32")

    # The output at p reads the position with the tap 2 - p.
    kernel = np.diag(terms)[:, ::-1].reshape(1, 3, 3, 1)
    x, dy = np.zeros((1, 1, 1)), np.full((1, 3, 1), factor)
    dx, _ = gradients(apply, [a.astype("float32") for a in (x, kernel)], dy.astype("float32"))
    assert dx.ravel().tolist() == [result]


@each_implementation
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_f08_low_precision_dtypes(dtype, implementation):
    check(SMALL, implementation, dtype)


@each_implementation
def test_f10_non_contiguous_inputs(implementation):
    """Transposed and expanded inputs, transposed gradient: views on frameworks that have them."""
    x, kernel, dy = SMALL.arrays()
    x, kernel, dy = x[:, :, :, :1], kernel[:1], dy.transpose(3, 2, 1, 0)

    def apply(x, kernel):
        x = keras.ops.broadcast_to(keras.ops.transpose(x, (3, 0, 1, 2)), SMALL.x_shape)
        kernel = keras.ops.broadcast_to(
            keras.ops.transpose(kernel, (4, 3, 2, 1, 0)), SMALL.kernel_shape
        )
        return keras.ops.transpose(operation(SMALL, implementation)(x, kernel), (3, 2, 1, 0))

    moved = x.transpose(1, 2, 3, 0), kernel.transpose()
    expanded = np.broadcast_to(x, SMALL.x_shape), np.broadcast_to(kernel, SMALL.kernel_shape)
    y, _ = SMALL.involution(*expanded)
    np.testing.assert_allclose(numpy(apply(*tensors(moved, "float64"))), y.T, rtol=0, atol=1e-13)
    dx, dkernel = SMALL.central_differences(*expanded, dy.T)
    expected = dx.sum(-1, keepdims=True).transpose(1, 2, 3, 0), dkernel.sum(0, keepdims=True).T
    for value, want in zip(gradients(apply, moved, dy), expected, strict=True):
        np.testing.assert_allclose(value, want, rtol=0, atol=1e-12)


@each_implementation
@pytest.mark.parametrize(
    "changes",
    [
        {"dilation_rate": (10**15,)},
        {"dilation_rate": (10**15 + 1,), "kernel_size": (4,), "strides": (2,)},
        {"dilation_rate": (10**15 + 1,), "kernel_size": (4,), "padding": "symmetric"},
        {"dilation_rate": (10**15,), "kernel_size": (2,), "strides": (3,)},
        {"strides": (2**40,)},
        {"strides": (2**40,), "dilation_rate": (2**40,)},
        {"padding": ((100_000, 0),), "strides": (50_000,)},
    ],
)
def test_f12_absurd_steps(changes, implementation):
    call = dataclasses.replace(Call(1, (5,), 2, (3,), (1,), "same", (1,)), **changes)
    check(call, implementation)
    x, kernel, dy = call.arrays()
    values = gradients(operation(call, implementation), (x, kernel), dy)
    for value, want in zip(values, call.gradients(x, kernel, dy), strict=True):
        np.testing.assert_allclose(value, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", ["taps", "reference"])
def test_f12_padding_larger_than_memory_raises(implementation):
    call = Call(1, (5,), 2, (3,), (10**15,), ((10**15, 10**15),), (1,))
    arguments = tensors(call.arrays()[:2], "float64")
    reason = f"a padded input would have {2 * 10**15 + 5} positions, more than {2**31}"
    with pytest.raises(ValueError, match=reason):
        operation(call, implementation)(*arguments)


@pytest.mark.long
@pytest.mark.parametrize("padding", ["same", "symmetric"])
def test_clamped_steps_read_the_same_positions(padding):
    def read(g, n):
        """The input position of each window and tap inside the input."""
        before = g.pads((n,))[0][0]
        windows = range(g.output_sizes((n,))[0])
        taps = range(g.kernel_size[0])
        positions = {
            (p, k): p * g.strides[0] - before + k * g.dilation_rate[0]
            for p, k in itertools.product(windows, taps)
        }
        return {at: position for at, position in positions.items() if 0 <= position < n}

    changed = 0
    for n, k, s, d in itertools.product(range(1, 7), range(1, 6), range(1, 9), range(1, 25)):
        g = Window((k,), (s,), padding, (d,), 1, "contiguous", "channels_last")
        if g.output_sizes((n,))[0] < 1:
            continue
        clamped = g.clamp_steps((n,))
        assert clamped.output_sizes((n,)) == g.output_sizes((n,))
        assert read(clamped, n) == read(g, n), g
        changed += clamped != g
    assert changed > 1000


@each_implementation
@pytest.mark.parametrize("name", ["kernel_size", "padding"])
def test_f12_absurd_sizes_raise(name, implementation):
    arguments = {"kernel_size": 3, "implementation": implementation, name: 10**15}
    with pytest.raises(ValueError, match="`kernel` must have the shape"):
        involution.ops.involution(np.ones((1, 5, 2)), np.ones((1, 5, 3, 1)), **arguments)


each_axes = pytest.mark.parametrize("axes", [(0, 0), (1, 2), (0, None), (None, 0)])


def stacked(axes):
    """Three pairs of arguments of SMALL: stacked along the given axes, and as a list."""
    x, kernel, _ = SMALL.arrays()
    factors = [[1 if axis is None else n for n in (1, 2, 3)] for axis in axes]
    parts = [[a * n for n in by] for a, by in zip((x, kernel), factors, strict=True)]
    arguments = [
        copies[0] if axis is None else np.stack(copies, axis)
        for copies, axis in zip(parts, axes, strict=True)
    ]
    return tensors(arguments, "float64"), list(zip(*parts, strict=True))


@each_implementation
@each_axes
def test_f23_vmap_over_either_argument_or_both(axes, implementation):
    arguments, pairs = stacked(axes)
    y = numpy(vmap(operation(SMALL, implementation), axes)(*arguments))
    for value, pair in zip(y, pairs, strict=True):
        np.testing.assert_allclose(value, SMALL.involution(*pair)[0], rtol=0, atol=1e-12)


@each_implementation
@each_axes
def test_f23_vmap_of_the_gradient(axes, implementation):
    arguments, pairs = stacked(axes)

    def scalar(x, kernel):
        return keras.ops.sum(operation(SMALL, implementation)(x, kernel) ** 2)

    gradient = grad(scalar)
    if BACKEND == "torch":
        import torch

        # vmap supports only the gradients of torch.func.
        gradient = torch.func.grad(scalar, (0, 1))
    values = [numpy(g) for g in vmap(gradient, axes)(*arguments)]
    for i, pair in enumerate(pairs):
        wanted = SMALL.gradients(*pair, 2 * SMALL.involution(*pair)[0])
        for value, want in zip(values, wanted, strict=True):
            np.testing.assert_allclose(value[i], want, rtol=1e-11, atol=1e-11)


@each_implementation
@each_axes
def test_f23_gradient_of_vmap(axes, implementation):
    arguments, pairs = stacked(axes)

    def scalar(x, kernel):
        return keras.ops.sum(vmap(operation(SMALL, implementation), axes)(x, kernel) ** 2)

    values = [numpy(g) for g in grad(scalar)(*arguments)]
    wanted = [SMALL.gradients(*pair, 2 * SMALL.involution(*pair)[0]) for pair in pairs]
    for value, wants, axis in zip(values, zip(*wanted, strict=True), axes, strict=True):
        want = sum(wants) if axis is None else np.stack(wants, axis)
        np.testing.assert_allclose(value, want, rtol=1e-11, atol=1e-11)


# PyTorch calls its own deprecated function.
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@each_implementation
def test_f23_forward_mode_is_correct_or_raises(implementation):
    """The operator is bilinear: its derivative along (x, kernel) is twice the output."""
    arguments = tuple(tensors(SMALL.arrays()[:2], "float64"))
    apply = operation(SMALL, implementation)
    if BACKEND != "jax" or implementation == "reference":
        tangent = jvp(apply, arguments, arguments)
        np.testing.assert_allclose(numpy(tangent), 2 * numpy(apply(*arguments)), atol=1e-12)
    else:
        with pytest.raises((TypeError, NotImplementedError), match=r"jvp|forward-mode"):
            jvp(apply, arguments, arguments)


@each_implementation
@each_format
def test_f13_empty_batch(data_format, implementation):
    call = dataclasses.replace(SMALL, batch=0, strides=(2, 1), data_format=data_format)
    x, kernel, dy = call.arrays()
    check(call, implementation)
    dx, dkernel = gradients(operation(call, implementation), (x, kernel), dy)
    assert (dx.shape, dkernel.shape) == (call.x_shape, call.kernel_shape)


@each_implementation
def test_f13_empty_dimension(implementation):
    with pytest.raises(ValueError, match=r"every output size must be at least 1\. Received: "):
        involution.ops.involution(
            np.ones((1, 0, 4, 2)), np.ones((1, 0, 4, 9, 1)), 3, implementation=implementation
        )


@each_implementation
@pytest.mark.parametrize(
    ("sizes", "data_format"), [((0, 5), "channels_last"), ((2, 0, 3), "channels_first")]
)
def test_f13_input_without_positions_gives_zeros(sizes, data_format, implementation):
    """Its padding gives outputs, which are zero, as is the kernel gradient."""
    rank = len(sizes)
    call = Call(2, sizes, 6, (3, 3, 2)[:rank], (1, 2, 1)[:rank], ((2, 2),) * rank, (1,) * rank, 2)
    call = dataclasses.replace(call, data_format=data_format)
    x, kernel, dy = call.arrays()
    apply = operation(call, implementation)
    y = numpy(apply(*tensors((x, kernel), "float32")))
    dx, dkernel = gradients(apply, (x, kernel), dy)
    assert (y.shape, dx.shape) == (call.output_shape, call.x_shape)
    assert dkernel.shape == call.kernel_shape
    assert not y.any()
    assert not dkernel.any()
    products = products_of(call, implementation)(*tensors((x, dy), "float32"))
    assert not numpy(products).any()


def products_of(call, implementation):
    return functools.partial(
        involution.ops.window_products, **call.arguments, implementation=implementation
    )


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "rows"])
@pytest.mark.parametrize(
    ("compiled", "data_format"), [(False, "channels_last"), (True, "channels_first")]
)
def test_f20_taps_outside_the_input_are_multiplied_by_zero(compiled, data_format, implementation):
    """The product of 0 and a non-finite value is NaN."""
    call = plane((5, 7), (3, 4), strides=(2, 1), channels=10, data_format=data_format)
    x, kernel, dy = with_non_finite(call.arrays(), seed=2)
    first_tap = (0, 0, 0, 0) if data_format == "channels_last" else (0, 0, slice(None), 0, 0)
    kernel[first_tap] = np.inf
    dy[(slice(None), -1, -1) if data_format == "channels_last" else (..., -1, -1)][1, 3] = np.nan
    truths = call.involution(x, kernel)[0], *call.gradients(x, kernel, dy)
    apply = operation(call, implementation)
    y = (in_graph(apply) if compiled else apply)(*tensors((x, kernel), "float64"))
    for value, truth in zip((numpy(y), *gradients(apply, (x, kernel), dy)), truths, strict=True):
        np.testing.assert_allclose(value, truth, rtol=0, atol=1e-12)
        assert 0 < np.isnan(truth).sum() < truth.size
    products = products_of(call, implementation)
    products = (in_graph(products) if compiled else products)(*tensors((x, dy), "float64"))
    np.testing.assert_allclose(numpy(products), truths[2], rtol=0, atol=1e-12)


@each_implementation
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("compiled", [False, True])
def test_f20_memory_around_the_arrays_has_no_effect(compiled, padding, implementation):
    """The arrays are slices of larger ones, full of NaN and infinity."""
    call = plane((5, 7), (3, 2), strides=(2, 2), padding=padding)
    x, kernel, dy = call.arrays()
    buffers = []
    for a in (x, kernel):
        buffer = np.full([n + 4 for n in a.shape], np.nan)
        buffer[:2] = np.inf
        buffer[(slice(2, -2),) * a.ndim] = a
        buffers.append(buffer)

    def apply(*buffers):
        inside = (b[(slice(2, -2),) * len(b.shape)] for b in buffers)
        return operation(call, implementation)(*inside)

    y = (in_graph(apply) if compiled else apply)(*tensors(buffers, "float64"))
    np.testing.assert_allclose(numpy(y), call.involution(x, kernel)[0], rtol=0, atol=1e-13)
    expected = call.central_differences(x, kernel, dy)
    for value, want in zip(gradients(apply, buffers, dy), expected, strict=True):
        inside = value[(slice(2, -2),) * want.ndim]
        np.testing.assert_allclose(inside, want, rtol=0, atol=1e-12)


@each_implementation
def test_f24_symbolic_shape_equals_the_eager_shape(implementation):
    for call in random_calls(8, seed=2):
        x, kernel = (keras.KerasTensor(a.shape, "float64") for a in call.arrays()[:2])
        symbolic = operation(call, implementation)(x, kernel)
        eager = operation(call, implementation)(*tensors(call.arrays()[:2], "float64"))
        assert symbolic.shape == tuple(eager.shape) == call.output_shape
        assert symbolic.dtype == keras.backend.standardize_dtype(eager.dtype)


@each_format
def test_f24_unknown_symbolic_sizes_stay_unknown(data_format):
    call = plane((5, 7), (3, 2), strides=(2, 2), data_format=data_format)
    shapes = [
        tuple(
            n if i == (3 if data_format == "channels_last" else 1) else None
            for i, n in enumerate(shape)
        )
        for shape in (call.x_shape, call.output_shape)
    ]
    kernel_shape = (None,) * len(call.kernel_shape)
    x, kernel = keras.KerasTensor(shapes[0]), keras.KerasTensor(kernel_shape)
    assert operation(call, None)(x, kernel).shape == shapes[1]


@each_implementation
def test_f30_eight_threads(implementation, executed):
    """``force_implementation`` in one thread does not affect the others."""
    arrays = [tensors(SMALL.arrays(seed)[:2], "float64") for seed in range(8)]
    expected = [numpy(operation(SMALL, implementation)(*a)) for a in arrays]
    force = involution.ops.force_implementation
    with concurrent.futures.ThreadPoolExecutor(8) as pool, force("reference"):
        for _ in range(4):
            results = pool.map(lambda a: operation(SMALL, implementation)(*a), arrays)
            for value, want in zip(results, expected, strict=True):
                assert (numpy(value) == want).all()
    assert set(executed) == {implementation}


@each_implementation
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_named_cases(case, implementation):
    case = case.small()
    window = case.window
    call = Call(
        case.batch,
        case.sizes,
        case.channels,
        window.kernel_size,
        window.strides,
        window.padding,
        window.dilation_rate,
        window.groups,
        window.group_layout,
    )
    assert (case.x_shape, case.kernel_shape) == (call.x_shape, call.kernel_shape)
    x, kernel = tensors(call.arrays()[:2], "float32")
    y = involution.ops.involution(x, kernel, **case.arguments, implementation=implementation)
    assert_equals_oracle(call, y, x, kernel)


@each_implementation
def test_integers_apply_to_every_dimension(implementation):
    call = plane((5, 7), (3, 3), strides=(2, 2), padding=((2, 2), (2, 2)), dilation_rate=(2, 2))
    x, kernel = tensors(call.arrays()[:2], "float64")
    y = involution.ops.involution(x, kernel, 3, 2, 2, 2, groups=2, implementation=implementation)
    assert_equals_oracle(call, y, x, kernel)


def test_data_format_defaults_to_that_of_keras():
    call = dataclasses.replace(SMALL, data_format="channels_first")
    x, kernel = tensors(call.arrays()[:2], "float64")
    keras.config.set_image_data_format("channels_first")
    try:
        y = involution.ops.involution(x, kernel, (3, 2), groups=2)
    finally:
        keras.config.set_image_data_format("channels_last")
    assert_equals_oracle(call, y, x, kernel)


@pytest.mark.long
@pytest.mark.any_backend
@each_implementation
@each_format
def test_functional_model_is_saved_and_loaded(data_format, implementation, tmp_path):
    call = plane(
        (5, 7),
        (3, 2),
        strides=(1, 2),
        padding=((1, 2), (0, 3)),
        dilation_rate=(2, 1),
        group_layout="interleaved",
        data_format=data_format,
    )
    inputs = [keras.Input(s[1:], dtype="float64") for s in (call.x_shape, call.kernel_shape)]
    model = keras.Model(inputs, operation(call, implementation)(*inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x, kernel = tensors(call.arrays()[:2], "float64")
    assert_equals_oracle(call, loaded([x, kernel]), x, kernel)


@pytest.mark.long
def test_saved_model_keeps_the_default_data_format(tmp_path):
    call = dataclasses.replace(SMALL, data_format="channels_first")
    inputs = [keras.Input(s[1:], dtype="float64") for s in (call.x_shape, call.kernel_shape)]
    keras.config.set_image_data_format("channels_first")
    try:
        model = keras.Model(inputs, involution.ops.involution(*inputs, (3, 2), groups=2))
    finally:
        keras.config.set_image_data_format("channels_last")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x, kernel = tensors(call.arrays()[:2], "float64")
    assert_equals_oracle(call, loaded([x, kernel]), x, kernel)


def test_known_implementations_are_complete():
    assert dispatch.PREFERENCE == ALL_IMPLEMENTATIONS


def test_native_is_built_or_has_the_reason_of_the_installation():
    reasons = dict(involution.ops.implementations(*SMALL.arrays()[:2], (3, 2), groups=2))
    if native_missing_reason() is None:
        print("native was built, for the instructions", *library.targets())
        assert reasons["native"] is None
        assert "native" in IMPLEMENTATIONS
    else:
        print("native is missing:", reasons["native"])
        assert reasons["native"] == native_missing_reason()
        assert reasons["native"].startswith("the package was installed without it")
        assert "native" not in IMPLEMENTATIONS


@each_implementation
def test_f29_named_implementation_runs(implementation, executed):
    check(SMALL, implementation)
    assert executed == [implementation]


def test_first_supported_implementation_is_the_default(executed, monkeypatch):
    check(SMALL, None)
    monkeypatch.setattr(native, "FRAMEWORKS", ())
    check(SMALL, None)
    monkeypatch.setattr(taps, "FRAMEWORKS", ())
    check(SMALL, None)
    assert executed == [IMPLEMENTATIONS[0], "taps", "reference"]


def test_implementations_are_listed_with_unsupported_reasons(monkeypatch):
    arguments = *SMALL.arrays()[:2], (3, 2)
    pairs = involution.ops.implementations(*arguments, groups=2)
    assert pairs[0][0] == "triton"
    assert pairs[1:] == [("native", native_missing_reason()), ("taps", None), ("reference", None)]
    monkeypatch.setattr(native, "FRAMEWORKS", ())
    monkeypatch.setattr(taps, "FRAMEWORKS", ())
    pairs = involution.ops.implementations(*arguments, groups=2)
    assert tuple(name for name, _ in pairs) == ALL_IMPLEMENTATIONS
    assert pairs[1][1] == native_missing_reason() or BACKEND in pairs[1][1]
    assert BACKEND in pairs[2][1]
    assert pairs[3][1] is None


@pytest.mark.parametrize("channels", [3, 4])
def test_taps_precedes_native_where_xla_is_faster(channels):
    x, kernel = keras.KerasTensor((None, 8, 8, channels)), keras.KerasTensor((None, 8, 8, 9, 1))
    first, *names = (name for name, _ in involution.ops.implementations(x, kernel, 3))
    assert first == "triton"
    taps_first = BACKEND == "jax" and channels == 3
    assert names == (["taps", "native"] if taps_first else ["native", "taps"]) + ["reference"]


def test_f29_unsupported_implementation_raises(executed, monkeypatch):
    monkeypatch.setattr(taps, "FRAMEWORKS", ())
    with pytest.raises(ValueError, match=rf"taps: .*{BACKEND}.*Received: "):
        check(SMALL, "taps")
    assert executed == []
    check(SMALL, ("taps", "reference"))
    assert executed == ["reference"]


def test_force_implementation_nests_and_restores(executed):
    with involution.ops.force_implementation("reference"):
        check(SMALL, "taps")
        with involution.ops.force_implementation(("taps", "reference")):
            check(SMALL, "reference")
        check(SMALL, None)
    check(SMALL, None)
    with pytest.raises(KeyError), involution.ops.force_implementation("reference"):
        raise KeyError
    check(SMALL, None)
    best = IMPLEMENTATIONS[0]
    assert executed == ["reference", "taps", "reference", best, best]


@pytest.mark.parametrize("implementation", ["fast", (), ("taps", "fast"), ""])
def test_unknown_implementation_raises(implementation, executed):
    message = r"`implementation` must be one of .*taps.*reference.*Received: implementation="
    with pytest.raises(ValueError, match=message):
        check(SMALL, implementation)
    force = involution.ops.force_implementation
    with pytest.raises(ValueError, match=message), force(implementation):
        pass
    assert executed == []


@each_implementation
@pytest.mark.parametrize(
    ("x", "kernel", "rule", "received"),
    [
        ((5, 2), (1, 5, 3, 1), "one, two or three spatial axes", "x.shape=(5, 2)"),
        ((1, 1, 1, 1, 5, 2), (1, 5, 3, 1), "one, two or three spatial axes", "x.shape=(1, 1, 1"),
        ((1, 5, 2), (1, 5, 2, 1), "must have the shape (1, 5, 3, 1)", "kernel.shape=(1, 5, 2, 1)"),
        ((1, 5, 2), (1, 4, 3, 1), "must have the shape (1, 5, 3, 1)", "kernel.shape=(1, 4, 3, 1)"),
        ((2, 5, 2), (1, 5, 3, 1), "must have the shape (2, 5, 3, 1)", "kernel.shape=(1, 5, 3, 1)"),
        ((1, 5, 2), (1, 5, 3), "must have the shape (1, 5, 3, 1)", "kernel.shape=(1, 5, 3)"),
    ],
)
def test_mismatched_shapes_raise(x, kernel, rule, received, implementation, executed):
    with pytest.raises(ValueError, match="Received: ") as caught:
        involution.ops.involution(np.ones(x), np.ones(kernel), 3, implementation=implementation)
    message, values = str(caught.value).split("Received: ")
    assert rule in message
    assert values.startswith(received)
    assert executed == []


@pytest.mark.parametrize(("x", "kernel"), [("float32", "float64"), ("int32", "int32")])
def test_mismatched_dtypes_raise(x, kernel, executed):
    message = {
        "float32": "`kernel` must have the dtype of `x`, float32. Received: kernel.dtype=float64",
        "int32": "`x` must have one of the dtypes .* Received: x.dtype=int32",
    }[x]
    with pytest.raises(ValueError, match=message):
        involution.ops.involution(np.ones((1, 5, 2), x), np.ones((1, 5, 3, 1), kernel), 3)
    assert executed == []


def test_window_larger_than_the_input_raises(executed):
    message = r"must fit into the padded input.*Received: output sizes \(-1,\), input sizes \(5,\)"
    with pytest.raises(ValueError, match=message):
        involution.ops.involution(np.ones((1, 5, 2)), np.ones((1, 1, 7, 1)), 7, padding="valid")
    assert executed == []


def im2col(x, kernel, case):
    """The usual implementation: stores all windows, multiplies and sums them."""
    k, groups, channels = case.window.kernel_size[0], case.window.groups, case.channels
    if BACKEND == "torch":
        import torch

        patches = torch.nn.functional.unfold(x.permute(0, 3, 1, 2), k, padding=k // 2)
        patches = patches.reshape(case.batch, channels, k * k, *case.sizes).permute(0, 3, 4, 2, 1)
    elif BACKEND == "jax":
        import jax.numpy as jnp

        # conv_general_dilated_patches takes 17 GB here.
        h, w = case.sizes
        padded = jnp.pad(x, [(0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)])
        corners = np.ndindex(k, k)
        patches = jnp.stack([padded[:, i : i + h, j : j + w] for i, j in corners], axis=3)
    else:
        import tensorflow as tf

        ones = [1, 1, 1, 1]
        patches = tf.image.extract_patches(x, [1, k, k, 1], ones, ones, "SAME")
    patches = keras.ops.reshape(patches, (*case.kernel_shape, channels // groups))
    y = keras.ops.sum(patches * keras.ops.expand_dims(kernel, -1), axis=-3)
    return keras.ops.reshape(y, case.x_shape)


def test_im2col_equals_the_operator():
    (case,) = (c.small() for c in CASES if c.name == "red1")
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s) for s in (case.x_shape, case.kernel_shape)]
    y = involution.ops.involution(*arrays, **case.arguments)
    stored = im2col(*tensors(arrays, "float64"), case)
    np.testing.assert_allclose(numpy(stored), numpy(y), rtol=0, atol=1e-12)


def peak_memory(*names):
    """Prints the peak memory of each implementation, forward and backward, without the inputs."""
    (case,) = (c for c in CASES if c.name == "red1")
    rng = np.random.default_rng(0)
    shapes = case.x_shape, case.kernel_shape, case.x_shape
    *arrays, dy = (rng.standard_normal(s, "float32") for s in shapes)

    def apply(name, x, kernel):
        if name == "im2col":
            return im2col(x, kernel, case)
        return involution.ops.involution(x, kernel, **case.arguments, implementation=name)

    def bytes_of(field):
        with open("/proc/self/status") as file:
            (line,) = (line for line in file if line.startswith(field))
        return int(line.split()[1]) * 1024

    for name in names:
        gc.collect()
        # Resets VmHWM, the peak.
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = bytes_of("VmRSS")
        gradients(functools.partial(apply, name), arrays, dy)
        print(bytes_of("VmHWM") - before)


@pytest.mark.long
@pytest.mark.any_backend
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_peak_memory_is_at_most_a_quarter_of_im2col(monkeypatch):
    # Freed arrays return to the system: reused ones would not count towards the next peak.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    names = *IMPLEMENTATIONS[:-1], "im2col"
    output = fresh_process(f"import tests.ops.test_operator as t; t.peak_memory(*{names})")
    used = dict(zip(names, map(int, output.split()), strict=True))
    print(BACKEND, {name: f"{count / 1e6:.0f} MB" for name, count in used.items()})
    for name in IMPLEMENTATIONS[:-1]:
        assert used[name] <= used["im2col"] / 4, used
