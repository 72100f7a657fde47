"""The operator's values, shapes, choices and errors. The names hold the failure cases' numbers."""

import concurrent.futures
import dataclasses
import os
import types

import keras
import numpy as np
import pytest
from frameworks import (
    BACKEND,
    IMPLEMENTATIONS,
    assert_equals_oracle,
    exact,
    fresh_process,
    gradients,
    in_graph,
    numpy,
    operation,
    tensors,
)
from oracle import Call, random_calls

import involution
from involution.ops import api, taps
from involution.ops.cases import CASES

PADDINGS = ("same", "valid", "symmetric", ((1, 2), (0, 3)))

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
each_format = pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])


def plane(sizes, kernel_size, **changes):
    """A call in two dimensions, ordinary but for what is named."""
    call = Call(2, sizes, 6, kernel_size, (1, 1), "same", (1, 1), 2)
    return dataclasses.replace(call, **changes)


SMALL = plane((5, 7), (3, 2))


def check(call, implementation, dtype="float64"):
    x, kernel = tensors(call.arrays()[:2], dtype)
    assert_equals_oracle(call, operation(call, implementation)(x, kernel), x, kernel)


@pytest.fixture
def ran(monkeypatch):
    """The names of the implementations that ran, in order."""
    names = []

    def recorded(name, module):
        def apply(*arguments):
            names.append(name)
            return module.apply(*arguments)

        return name, types.SimpleNamespace(refusal=module.refusal, apply=apply)

    pairs = tuple(recorded(*pair) for pair in api.IMPLEMENTATIONS)
    monkeypatch.setattr(api, "IMPLEMENTATIONS", pairs)
    return names


@each_implementation
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("strides", [(2, 2), (3, 2)])
def test_f01_size_not_divisible_by_stride(strides, padding, implementation):
    check(plane((7, 11), (3, 2), strides=strides, padding=padding), implementation)


@each_implementation
def test_f01_same_has_the_ceiling_of_size_over_stride(implementation):
    call = Call(1, (33,), 2, (3,), (2,), "same", (1,))
    assert call.output_shape == (1, 17, 2)
    check(call, implementation)


@each_implementation
@each_format
@pytest.mark.parametrize("padding", PADDINGS)
def test_f02_sizes_that_a_program_does_not_know_and_that_change(
    padding, data_format, implementation
):
    call = plane((5, 7), (3, 2), strides=(2, 3), padding=padding, data_format=data_format)
    if data_format == "channels_last":
        shapes = (None, None, None, 6), (None, None, None, 6, 2)
    else:
        shapes = (None, 6, None, None), (None, 6, 2, None, None)
    program = in_graph(operation(call, implementation), shapes)
    for sizes in [(5, 7), (8, 6)]:
        this = dataclasses.replace(call, sizes=sizes)
        x, kernel = tensors(this.arrays()[:2], "float64")
        assert_equals_oracle(this, program(x, kernel), x, kernel)


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
        this = dataclasses.replace(call, sizes=sizes)
        x, kernel = tensors(this.arrays()[:2], "float64")
        assert_equals_oracle(this, model([x, kernel]), x, kernel)


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
        kernel_size = (5, 7)  # An even window wider than the input finds no place.
    call = plane((3, 5), kernel_size, padding=padding, strides=(1, 2))
    check(call, implementation)


@each_implementation
@pytest.mark.parametrize(("channels", "groups"), [(6, 4), (2, 3), (0, 1)])
def test_f06_channels_that_groups_do_not_divide(channels, groups, implementation):
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
def test_f08_sums_that_leave_half_precision_and_come_back(dtype, implementation):
    """300 * 200 * (1 + 1 - 1): two terms overflow float16. 256 + 1 - 256: bfloat16 has no 257."""
    terms = [300.0, 300.0, -300.0] if dtype == "float16" else [256.0, 1.0, -256.0]
    factor, result = (200.0, 60000.0) if dtype == "float16" else (1.0, 1.0)
    arguments = {"kernel_size": 3, "padding": "valid", "implementation": implementation}
    x, kernel = tensors([np.reshape(terms, (1, 3, 1)), np.full((1, 1, 3, 1), factor)], dtype)
    y = involution.ops.involution(x, kernel, **arguments)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    assert exact(y).ravel().tolist() == [result]

    # The kernel gradient is such a sum over the channels.
    def apply(x, kernel):
        x, kernel = keras.ops.cast(x, dtype), keras.ops.cast(kernel, dtype)
        return keras.ops.cast(involution.ops.involution(x, kernel, **arguments), "float32")

    x, kernel, dy = np.tile(terms, (1, 3, 1)), np.ones((1, 1, 3, 1)), np.full((1, 1, 3), factor)
    _, dkernel = gradients(apply, [a.astype("float32") for a in (x, kernel)], dy.astype("float32"))
    assert dkernel.ravel().tolist() == [result] * 3


@each_implementation
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_f08_every_type(dtype, implementation):
    check(SMALL, implementation, dtype)


@each_implementation
def test_f10_inputs_that_do_not_lie_in_order(implementation):
    """Transposed, expanded, and with a transposed gradient: views, where a framework has them."""
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
        {"dilation_rate": (100_000,)},
        {"strides": (2**31,)},
        {"padding": ((100_000, 0),), "strides": (50_000,)},
    ],
)
def test_f12_absurd_steps(changes, implementation):
    call = Call(1, (5,), 2, (3,), (1,), "same", (1,))
    check(dataclasses.replace(call, **changes), implementation)


@each_implementation
@pytest.mark.parametrize("name", ["kernel_size", "padding"])
def test_f12_absurd_sizes_do_not_fit_the_kernel(name, implementation):
    arguments = {"kernel_size": 3, "implementation": implementation, name: 10**15}
    with pytest.raises(ValueError, match="`kernel` must have the shape"):
        involution.ops.involution(np.ones((1, 5, 2)), np.ones((1, 5, 3, 1)), **arguments)


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
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("compiled", [False, True])
def test_f20_nothing_leaks_from_around_the_input(compiled, padding, implementation):
    """The arrays lie inside larger ones full of NaN, infinities before them."""
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
def test_f24_symbolic_shape_is_the_eager_shape(implementation):
    for call in random_calls(8, seed=2):
        x, kernel = (keras.KerasTensor(a.shape, "float64") for a in call.arrays()[:2])
        symbolic = operation(call, implementation)(x, kernel)
        eager = operation(call, implementation)(*tensors(call.arrays()[:2], "float64"))
        assert symbolic.shape == tuple(eager.shape) == call.output_shape
        assert symbolic.dtype == keras.backend.standardize_dtype(eager.dtype)


@each_format
def test_f24_sizes_unknown_in_a_symbolic_shape_stay_unknown(data_format):
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
def test_f30_eight_threads(implementation, ran):
    """Every thread gets its own result, and its own choice of an implementation."""
    arrays = [tensors(SMALL.arrays(seed)[:2], "float64") for seed in range(8)]
    expected = [numpy(operation(SMALL, implementation)(*a)) for a in arrays]
    with concurrent.futures.ThreadPoolExecutor(8) as pool, involution.ops.use("reference"):
        for _ in range(4):
            results = pool.map(lambda a: operation(SMALL, implementation)(*a), arrays)
            for value, want in zip(results, expected, strict=True):
                assert (numpy(value) == want).all()
    assert set(ran) == {implementation}


@each_implementation
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_named_cases(case, implementation):
    case = case.small()
    rank = len(case.sizes)
    call = Call(
        case.batch,
        case.sizes,
        case.channels,
        (case.kernel_size,) * rank,
        (case.strides,) * rank,
        case.padding,
        (case.dilation_rate,) * rank,
        case.groups,
        case.group_layout,
    )
    assert (case.x_shape, case.kernel_shape) == (call.x_shape, call.kernel_shape)
    x, kernel = tensors(call.arrays()[:2], "float32")
    y = involution.ops.involution(x, kernel, **case.arguments, implementation=implementation)
    assert_equals_oracle(call, y, x, kernel)


@each_implementation
def test_one_number_stands_for_every_dimension(implementation):
    call = plane((5, 7), (3, 3), strides=(2, 2), padding=((2, 2), (2, 2)), dilation_rate=(2, 2))
    x, kernel = tensors(call.arrays()[:2], "float64")
    y = involution.ops.involution(x, kernel, 3, 2, 2, 2, groups=2, implementation=implementation)
    assert_equals_oracle(call, y, x, kernel)


def test_data_format_is_that_of_keras_unless_told():
    call = dataclasses.replace(SMALL, data_format="channels_first")
    x, kernel = tensors(call.arrays()[:2], "float64")
    keras.config.set_image_data_format("channels_first")
    try:
        y = involution.ops.involution(x, kernel, (3, 2), groups=2)
    finally:
        keras.config.set_image_data_format("channels_last")
    assert_equals_oracle(call, y, x, kernel)


@each_implementation
@each_format
def test_in_a_functional_model_saved_and_loaded(data_format, implementation, tmp_path):
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


def test_a_saved_model_keeps_the_data_format_that_keras_had(tmp_path):
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


def test_these_tests_know_every_implementation():
    assert tuple(name for name, _ in api.IMPLEMENTATIONS) == IMPLEMENTATIONS


@each_implementation
def test_f29_the_implementation_named_is_the_one_that_runs(implementation, ran):
    check(SMALL, implementation)
    assert ran == [implementation]


def test_the_first_that_can_run_is_the_default(ran, monkeypatch):
    check(SMALL, None)
    monkeypatch.setattr(taps, "MECHANISMS", {})
    check(SMALL, None)
    assert ran == ["taps", "reference"]


def test_implementations_are_listed_with_what_hinders_them(monkeypatch):
    arguments = *SMALL.arrays()[:2], (3, 2)
    pairs = involution.ops.implementations(*arguments, groups=2)
    assert pairs == [("taps", None), ("reference", None)]
    monkeypatch.setattr(taps, "MECHANISMS", {})
    pairs = involution.ops.implementations(*arguments, groups=2)
    assert [name for name, _ in pairs] == ["taps", "reference"]
    assert BACKEND in pairs[0][1]
    assert pairs[1][1] is None


def test_f29_an_implementation_that_cannot_run_is_refused_not_replaced(ran, monkeypatch):
    monkeypatch.setattr(taps, "MECHANISMS", {})
    with pytest.raises(ValueError, match=rf"taps: .*{BACKEND}.*Received: "):
        check(SMALL, "taps")
    assert ran == []
    check(SMALL, ("taps", "reference"))
    assert ran == ["reference"]


def test_use_forces_nests_and_restores(ran):
    with involution.ops.use("reference"):
        check(SMALL, "taps")
        with involution.ops.use(("taps", "reference")):
            check(SMALL, "reference")
        check(SMALL, None)
    check(SMALL, None)
    with pytest.raises(KeyError), involution.ops.use("reference"):
        raise KeyError
    check(SMALL, None)
    assert ran == ["reference", "taps", "reference", "taps", "taps"]


@pytest.mark.parametrize("implementation", ["fast", (), ("taps", "fast"), ""])
def test_unknown_names_of_implementations_raise(implementation, ran):
    message = r"`implementation` must be one of .*taps.*reference.*Received: implementation="
    with pytest.raises(ValueError, match=message):
        check(SMALL, implementation)
    with pytest.raises(ValueError, match=message), involution.ops.use(implementation):
        pass
    assert ran == []


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
def test_shapes_that_do_not_fit(x, kernel, rule, received, implementation, ran):
    with pytest.raises(ValueError, match="Received: ") as caught:
        involution.ops.involution(np.ones(x), np.ones(kernel), 3, implementation=implementation)
    told, got = str(caught.value).split("Received: ")
    assert rule in told
    assert got.startswith(received)
    assert ran == []


@pytest.mark.parametrize(("x", "kernel"), [("float32", "float64"), ("int32", "int32")])
def test_types_that_do_not_fit(x, kernel, ran):
    message = rf"must have the same type.*Received: x.dtype={x}, kernel.dtype={kernel}"
    with pytest.raises(ValueError, match=message):
        involution.ops.involution(np.ones((1, 5, 2), x), np.ones((1, 5, 3, 1), kernel), 3)
    assert ran == []


def test_a_window_that_does_not_fit_raises(ran):
    message = r"must fit into the padded input.*Received: output sizes \(-1,\), .*\(1, 5, 2\)"
    with pytest.raises(ValueError, match=message):
        involution.ops.involution(np.ones((1, 5, 2)), np.ones((1, 1, 7, 1)), 7, padding="valid")
    assert ran == []


def unfolded(x, kernel, case):
    """The usual way: all windows stored, multiplied, summed."""
    k, groups, channels = case.kernel_size, case.groups, case.channels
    if BACKEND == "torch":
        import torch

        patches = torch.nn.functional.unfold(x.permute(0, 3, 1, 2), k, padding=k // 2)
        patches = patches.reshape(case.batch, channels, k * k, *case.sizes).permute(0, 3, 4, 2, 1)
    elif BACKEND == "jax":
        import jax.numpy as jnp

        # Its own function for this, conv_general_dilated_patches, takes 17 GB here.
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


def test_unfolding_is_the_same_operator():
    (case,) = (c.small() for c in CASES if c.name == "red1")
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s) for s in (case.x_shape, case.kernel_shape)]
    y = involution.ops.involution(*arrays, **case.arguments)
    other = unfolded(*tensors(arrays, "float64"), case)
    np.testing.assert_allclose(numpy(other), numpy(y), rtol=0, atol=1e-12)


def peak_memory(name):
    """Prints the bytes that one run, forward and backward, adds to those of its inputs."""
    (case,) = (c for c in CASES if c.name == "red1")
    rng = np.random.default_rng(0)
    shapes = case.x_shape, case.kernel_shape, case.x_shape
    *arrays, dy = (rng.standard_normal(s, "float32") for s in shapes)

    def apply(x, kernel):
        if name == "unfold":
            return unfolded(x, kernel, case)
        return involution.ops.involution(x, kernel, **case.arguments, implementation=name)

    def bytes_of(field):
        with open("/proc/self/status") as file:
            (line,) = (line for line in file if line.startswith(field))
        return int(line.split()[1]) * 1024

    # VmHWM, not getrusage's ru_maxrss: that one begins with the parent's.
    before = bytes_of("VmRSS")
    gradients(apply, arrays, dy)
    print(bytes_of("VmHWM") - before)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="measured as Linux tells it")
def test_peak_memory_is_at_most_a_quarter_of_unfolds():
    used = {
        name: int(fresh_process(f"import test_operator; test_operator.peak_memory({name!r})"))
        for name in ("taps", "unfold")
    }
    print(BACKEND, {name: f"{count / 1e6:.0f} MB" for name, count in used.items()})
    assert used["taps"] <= used["unfold"] / 4, used
