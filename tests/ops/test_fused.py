"""Fused involution, which stores no kernels: the core, the operator, and the layers."""

import dataclasses
import functools
import json
import math

import keras
import numpy as np
import pytest

import involution
from involution import Involution2D, kernel_generators
from involution.layers import record_involutions
from involution.ops import api, dispatch, fused
from involution.ops.autodiff import FORWARD, INPUT_GRAD, KERNEL_GRAD
from involution.ops.native import library, params
from involution.ops.problem import problem_of
from involution.ops.window import Window
from tests.support import native_core
from tests.support.backends import (
    BACKEND,
    IMPLEMENTATIONS,
    fresh_process,
    grad,
    gradients,
    in_graph,
    jvp,
    numpy,
    requires_native,
    tensors,
    to_float64,
    vmap,
)
from tests.support.native_core import DTYPES, each_target
from tests.support.oracle import Call, error_bound, random_calls, with_non_finite

pytestmark = requires_native

TARGETS = library.targets()
# Odd and even: processors with bfloat16 dot products multiply even counts in pairs.
HIDDEN = (1, 2, 3, 8, 16, 17, 33)
CALL = Call(2, (5, 7), 12, (3, 3), (2, 1), "same", (1, 2), 3)
NAMES = ("x", "hidden", "weight", "bias")


def apply(call, implementation="fused"):
    """``fused_involution`` with the arguments of a call."""
    return functools.partial(
        involution.ops.fused_involution, **call.arguments, implementation=implementation
    )


# --- The core -------------------------------------------------------------------------------------


@functools.cache
def random_values(dtype):
    """Random calls with their arrays, and for each pass the expected results and error bounds."""
    cases = []
    for n, call in enumerate(random_calls(96, seed=3)):
        call = dataclasses.replace(call, data_format="channels_last")
        hidden = HIDDEN[n % len(HIDDEN)]
        arrays = [a.astype(DTYPES[dtype]) for a in native_core.fused_arrays(call, hidden, seed=n)]
        wide = [a.astype("float64") for a in arrays]
        truth = native_core.expected_fused(call, *wide)
        magnitude = native_core.expected_fused(call, *map(np.abs, wide))
        # Nested sums: over hidden channels, taps, the channels of a group, and positions.
        taps = call.taps * math.prod(call.upsampling or ())
        terms = sum((hidden + 1, taps, call.channels // call.groups, call.taps * call.groups))
        weight_terms = terms + call.batch * math.prod(call.output_sizes)
        kinds = dtype, "float64" if dtype == "float64" else "float32"
        bounds = {
            pass_: [
                (t, error_bound(t, m, n, kind))
                for t, m, n, kind in zip(
                    truth[pass_], magnitude[pass_], (terms, weight_terms), kinds, strict=True
                )
                if t is not None
            ]
            for pass_ in truth
        }
        cases.append((call, arrays, bounds))
    return cases


@pytest.mark.long
@each_target
@pytest.mark.parametrize("dtype", DTYPES)
def test_passes_of_random_calls_equal_the_oracle(dtype, target):
    for n, (call, arrays, bounds) in enumerate(random_values(dtype)):
        for pass_, arguments in native_core.FUSED_ARGUMENTS.items():
            first, second = native_core.execute_fused(
                pass_, call, arguments(*arrays), threads=1 + n % 3
            )
            results = first, second.astype("float64").sum(0)
            for result, (truth, bound) in zip(results, bounds[pass_], strict=False):
                error = np.abs(result.astype("float64") - truth)
                assert (error <= bound).all(), (pass_, call)


# Large enough that samples are split into many tiles, and the groups of the input gradient too.
LARGE = [
    Call(2, (30, 31), 64, (7, 7), (1, 1), "same", (1, 1), 4),
    Call(1, (70, 130), 32, (5, 5), (2, 1), "same", (1, 2), 16, "interleaved"),
    Call(1, (9, 12, 13), 48, (3, 3, 3), (1, 1, 1), "symmetric", (1, 1, 1), 12),
    Call(3, (700,), 32, (9,), (1,), "valid", (3,), 8),
]


@each_target
@pytest.mark.parametrize(
    ("dtype", "channels", "error"), [("float64", 19, 1e-12), ("bfloat16", 20, 2.0**-8)]
)
@pytest.mark.parametrize("call", LARGE, ids=str)
def test_large_calls_equal_the_unfused_results(call, dtype, channels, error, target):
    given = [a.astype(DTYPES[dtype]) for a in native_core.fused_arrays(call, hidden=channels)]
    arrays = [a.astype("float64") for a in given]
    x, hidden, weight, bias, dy = arrays
    kernel = native_core.generated(hidden, weight, bias, call.groups)
    unfused = native_core.results(call, x, kernel, dy)
    flat = unfused[KERNEL_GRAD].reshape(call.batch, -1, call.taps * call.groups)
    rows = hidden.reshape(call.batch, -1, hidden.shape[-1])
    by_sample = [np.concatenate([h.T @ k, k.sum(0)[None]]) for h, k in zip(rows, flat, strict=True)]
    expected = {
        FORWARD: [unfused[FORWARD]],
        INPUT_GRAD: [unfused[INPUT_GRAD]],
        KERNEL_GRAD: [(flat @ weight.T).reshape(hidden.shape), by_sample],
    }
    for pass_, arguments in native_core.FUSED_ARGUMENTS.items():
        results = native_core.execute_fused(pass_, call, arguments(*given), threads=3)
        for result, truth in zip(results, expected[pass_], strict=False):
            limit = error * np.abs(truth).max()
            np.testing.assert_allclose(result.astype("float64"), truth, rtol=0, atol=limit)


@pytest.mark.parametrize(("dtype", "hidden"), [("float32", 5), ("bfloat16", 5), ("bfloat16", 6)])
@pytest.mark.parametrize("call", LARGE[:2], ids=str)
def test_f18_bits_do_not_depend_on_threads_or_other_samples(call, dtype, hidden):
    call = dataclasses.replace(call, batch=3)
    single = dataclasses.replace(call, batch=1)
    arrays = [a.astype(DTYPES[dtype]) for a in native_core.fused_arrays(call, hidden)]
    for pass_, arguments in native_core.FUSED_ARGUMENTS.items():
        given = arguments(*arrays)
        results = native_core.execute_fused(pass_, call, given, threads=1)
        again = native_core.execute_fused(pass_, call, given, threads=4)
        last = [
            a[-1:] if has_batch else a
            for a, has_batch in zip(given, params.HAS_BATCH_AXIS[pass_], strict=True)
        ]
        of_last = native_core.execute_fused(pass_, single, last, threads=2)
        for result, same, last_result in zip(results, again, of_last, strict=True):
            assert result.tobytes() == same.tobytes()
            assert result[-1:].tobytes() == last_result.tobytes()


def test_nan_affects_only_windows_that_contain_it():
    x, hidden, weight, bias, _ = native_core.fused_arrays(CALL)
    x[0, 2, 3, 4] = np.nan
    hidden[1, 1, 1, 0] = np.nan
    y, _ = native_core.execute_fused(FORWARD, CALL, (x, hidden, weight, bias))
    expected = native_core.expected_fused(CALL, x, hidden, weight, bias, y)[FORWARD][0]
    assert (np.isnan(y) == np.isnan(expected)).all()
    assert 0 < np.isnan(y).sum() < y.size


@pytest.mark.long
@each_target
def test_f20_non_finite_values_propagate_as_in_the_formula(target):
    for n, call in enumerate(random_calls(48, seed=20)):
        call = dataclasses.replace(call, data_format="channels_last")
        arrays = native_core.fused_arrays(call, HIDDEN[n % len(HIDDEN)], seed=n)
        for which in range(5):
            mixed = list(arrays)
            (mixed[which],) = with_non_finite([arrays[which]], seed=n)
            truths = native_core.expected_fused(call, *mixed)
            for pass_, arguments in native_core.FUSED_ARGUMENTS.items():
                first, second = native_core.execute_fused(pass_, call, arguments(*mixed), threads=2)
                for value, truth in zip((first, second.sum(0)), truths[pass_], strict=True):
                    if truth is not None:
                        what = f"{pass_}, {which}, {call}"
                        np.testing.assert_allclose(value, truth, atol=1e-11, err_msg=what)


# All windows contain only padding.
PADDING_ONLY = [
    Call(2, (0,), 6, (3,), (1,), ((2, 1),), (1,), 2),
    Call(2, (0, 5), 4, (3, 3), (1, 1), ((2, 2), (1, 1)), (1, 1), 2),
    Call(1, (5, 0), 16, (2, 3), (2, 1), ((1, 1), (3, 3)), (1, 1), 8, "interleaved"),
    Call(1, (3, 0, 2), 6, (1, 2, 3), (1, 1, 2), ((0, 0), (1, 2), (2, 2)), (1, 1, 1), 2),
    Call(2, (1, 5), 6, (2, 3), (1, 1), ((4, 4), (1, 1)), (8, 1), 3),
]


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", PADDING_ONLY, ids=str)
def test_f13_windows_of_padding_only_give_zeros(call, dtype, target):
    arrays = [a.astype(DTYPES[dtype]) for a in native_core.fused_arrays(call)]
    for pass_, arguments in native_core.FUSED_ARGUMENTS.items():
        for result in native_core.execute_fused(pass_, call, arguments(*arrays), threads=2):
            assert not result.any(), pass_


def test_f13_gradients_without_outputs_are_zero():
    """In a traced program an output size may be 0."""
    call = Call(2, (5,), 6, (3,), (1,), "valid", (1,), 2)
    window = native_core.Window(**call.arguments)
    arrays = native_core.fused_arrays(call)
    empty = np.zeros(0)
    for pass_, shape in ((INPUT_GRAD, call.x_shape), (KERNEL_GRAD, (2, 6, 6))):
        given = native_core.FUSED_ARGUMENTS[pass_](*arrays)
        encoded = params.encode_fused(pass_, window, call.sizes, given)
        encoded = native_core.without_outputs(encoded)
        result = np.full(shape, np.nan)
        # Besides the weight and the bias, only x has elements.
        results = (result, empty) if pass_ == INPUT_GRAD else (empty, result)
        library.execute_fused(encoded, call.batch, 2, *(a.ctypes.data for a in (*given, *results)))
        assert not result.any()


@pytest.mark.parametrize("implementation", ["fused", "native", "taps"])
def test_f13_input_without_positions_gives_zeros(implementation):
    call = PADDING_ONLY[1]
    x, hidden, weight, bias, dy = native_core.fused_arrays(call)
    arguments = x, hidden, weight, bias
    operator = apply(call, implementation)
    y = numpy(operator(*tensors(arguments, "float64")))
    assert y.shape == call.output_shape
    assert not y.any()
    for gradient, argument in zip(gradients(operator, arguments, dy), arguments, strict=True):
        assert gradient.shape == argument.shape
        assert not gradient.any()


@pytest.mark.parametrize("implementation", ["fused", "native", "taps"])
def test_f20_taps_outside_the_input_are_multiplied_by_zero(implementation):
    """Non-finite: the kernels of one corner, and the output gradient of another."""
    arrays = native_core.fused_arrays(CALL)
    arrays[1][0, 0, 0, 0] = np.inf
    arrays[4][1, -1, -1, 3] = np.nan
    *arguments, dy = arrays
    truths = native_core.expected_fused(CALL, *arrays)
    both = truths[KERNEL_GRAD][1]
    expected = truths[INPUT_GRAD][0], truths[KERNEL_GRAD][0], both[:-1], both[-1]
    operator = apply(CALL, implementation)
    y = numpy(operator(*tensors(arguments, "float64")))
    np.testing.assert_allclose(y, truths[FORWARD][0], atol=1e-12)
    assert 0 < np.isnan(y).sum() < y.size / 2
    for value, truth in zip(gradients(operator, arguments, dy), expected, strict=True):
        np.testing.assert_allclose(value, truth, atol=1e-11)


def test_f13_empty_batch():
    call = dataclasses.replace(CALL, batch=0)
    arrays = native_core.fused_arrays(call)
    for pass_, arguments in native_core.FUSED_ARGUMENTS.items():
        first, second = native_core.execute_fused(pass_, call, arguments(*arrays))
        assert first.size == second.size == 0


# --- The operator ---------------------------------------------------------------------------------

CALLS = [
    CALL,
    Call(1, (11,), 8, (4,), (2,), ((3, 1),), (1,), 2, "interleaved"),
    Call(2, (3, 4, 5), 6, (2, 3, 1), (1, 2, 2), "valid", (1, 1, 1), 6),
    Call(3, (4, 6), 5, (3, 2), (1, 1), "symmetric", (1, 1), 1),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_output_and_gradients_equal_the_oracle(call):
    *arrays, dy = native_core.fused_arrays(call, hidden=3)
    expected = native_core.expected_fused(call, *arrays, dy)
    y = apply(call)(*tensors(arrays, "float64"))
    np.testing.assert_allclose(to_float64(y), expected[FORWARD][0], rtol=0, atol=1e-12)
    dx, dhidden, dweight, dbias = gradients(apply(call), arrays, dy)
    (dkernel, both) = expected[KERNEL_GRAD]
    np.testing.assert_allclose(dx, expected[INPUT_GRAD][0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(dhidden, dkernel, rtol=0, atol=1e-12)
    np.testing.assert_allclose(dweight, both[:-1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(dbias, both[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_dtypes_of_their_arguments(dtype):
    *arrays, dy = native_core.fused_arrays(CALL)
    given = tensors(arrays, dtype)
    y = apply(CALL)(*given)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    dy = tensors([dy], dtype)[0]
    fused_grads = grad(lambda *t: keras.ops.sum(apply(CALL)(*t) * dy))(*given)
    assert [keras.backend.standardize_dtype(g.dtype) for g in fused_grads] == [dtype] * 4
    expected = grad(lambda *t: keras.ops.sum(apply(CALL, IMPLEMENTATIONS)(*t) * dy))(*given)
    digits = {"float64": 53, "float32": 24, "bfloat16": 8, "float16": 11}[dtype]
    for value, want in zip(fused_grads, expected, strict=True):
        scale = np.abs(to_float64(want)).max()
        np.testing.assert_allclose(
            to_float64(value), to_float64(want), rtol=0, atol=64 * scale / 2**digits
        )


@pytest.mark.long
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_f17_second_derivatives_equal_the_unfused_ones(compiled):
    *arrays, dy = native_core.fused_arrays(CALL, hidden=3)
    given, (dy,) = tensors(arrays, "float64"), tensors([dy], "float64")

    def second(implementation):
        first = grad(lambda *t: keras.ops.sum(apply(CALL, implementation)(*t) ** 3 * dy))
        both = grad(lambda *t: sum(keras.ops.sum(g**2) for g in first(*t)))
        return (in_graph(both) if compiled else both)(*given)

    for name, value, want in zip(NAMES, second("fused"), second("native"), strict=True):
        scale = np.abs(to_float64(want)).max()
        np.testing.assert_allclose(
            to_float64(value), to_float64(want), atol=1e-11 * scale, err_msg=name
        )


def modes(implementation, directions):
    """Directional derivatives of first to third order, by nestings of forward and reverse mode."""
    operator = apply(CALL, implementation)

    def scalar(*arguments):
        return keras.ops.sum(operator(*arguments) ** 3)

    def along(function):
        return lambda *arguments: jvp(function, arguments, directions)

    def product(*arguments):
        return sum(
            keras.ops.sum(g * d)
            for g, d in zip(grad_of(scalar)(*arguments), directions, strict=True)
        )

    return {
        "forward": along(operator),
        "forward over reverse": along(lambda *a: tuple(grad_of(scalar)(*a))),
        "reverse over forward": grad_of(along(scalar)),
        "forward over forward": along(along(operator)),
        "forward over reverse over reverse": along(lambda *a: tuple(grad_of(product)(*a))),
    }


def grad_of(function):
    if BACKEND == "torch":
        import torch

        return lambda *a: torch.func.grad(function, tuple(range(len(a))))(*a)
    return grad(function)


# PyTorch calls its own deprecated function.
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.skipif(BACKEND == "jax", reason="jax.custom_vjp has no forward mode")
@pytest.mark.parametrize(
    "implementation",
    [pytest.param("fused", marks=pytest.mark.any_backend), *IMPLEMENTATIONS[:-1]],
)
def test_f23_nested_forward_and_reverse_mode_equals_the_reference(implementation):
    given, directions = (
        tuple(tensors(native_core.fused_arrays(CALL, hidden=3, seed=seed)[:-1], "float64"))
        for seed in (1, 2)
    )
    wanted = modes("reference", directions)
    for name, derivative in modes(implementation, directions).items():
        values, truth = derivative(*given), wanted[name](*given)
        pairs = (
            zip(values, truth, strict=True)
            if isinstance(truth, tuple | list)
            else [(values, truth)]
        )
        for value, want in pairs:
            scale = np.abs(to_float64(want)).max()
            assert scale > 0.1
            np.testing.assert_allclose(
                to_float64(value), to_float64(want), atol=1e-11 * scale, err_msg=name
            )


@pytest.mark.long
@pytest.mark.skipif(BACKEND == "jax", reason="jax.custom_vjp has no forward mode")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_f23_forward_mode_through_a_layer_with_default_settings(runs):
    layer = Involution2D(3, strides=1, group_channels=4)
    x = keras.ops.convert_to_tensor(IMAGES)
    layer(x)

    def residual(x):
        return x + layer(x)

    runs.clear()
    value = jvp(residual, (x,), (x,))
    assert runs
    with involution.ops.force_implementation("reference"):
        want = jvp(residual, (x,), (x,))
    np.testing.assert_allclose(numpy(value), numpy(want), rtol=0, atol=1e-4)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="vectorized_map does not support custom ops")
@pytest.mark.parametrize("axes", [(0, 0, None, None), (1, None, None, None), (None, 0, 0, None)])
def test_f23_vmap(axes):
    *arrays, _ = native_core.fused_arrays(CALL)
    given = tensors(arrays, "float64")
    doubled = [
        t if axis is None else keras.ops.stack([t, 2 * t], axis)
        for t, axis in zip(given, axes, strict=True)
    ]
    y = vmap(apply(CALL), axes)(*doubled)
    for n in (0, 1):
        scaled = [t if axis is None else (n + 1) * t for t, axis in zip(given, axes, strict=True)]
        np.testing.assert_allclose(
            to_float64(y[n]), to_float64(apply(CALL)(*scaled)), rtol=0, atol=1e-12
        )


@pytest.mark.long
@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's compiler")
def test_f22_torch_compile_has_no_graph_breaks():
    import torch

    *arrays, dy = native_core.fused_arrays(CALL)
    given = [torch.tensor(a, requires_grad=True) for a in arrays]
    y = torch.compile(apply(CALL), fullgraph=True, backend="aot_eager")(*given)
    values = torch.autograd.grad(y, given, torch.tensor(dy))
    for value, want in zip(values, gradients(apply(CALL), arrays, dy), strict=True):
        np.testing.assert_allclose(value, want, rtol=0, atol=1e-12)


@pytest.mark.long
@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's custom ops")
def test_custom_op_passes_opcheck():
    import torch

    from involution.ops.native import torch as native_torch

    arrays = native_core.fused_arrays(CALL)
    for pass_, arguments in native_core.FUSED_ARGUMENTS.items():
        given = [torch.tensor(a) for a in arguments(*arrays)]
        encoded = params.encode_fused(pass_, Window(**CALL.arguments), CALL.sizes, given)
        torch.library.opcheck(native_torch.operations.fused, (*given, encoded, 2))


def sharded():
    """Prints, as JSON, how two devices compute the gradients of a sharded batch."""
    import jax

    devices = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
    sharded_batch = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec("batch"))
    replicated = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec())
    *arrays, dy = native_core.fused_arrays(dataclasses.replace(CALL, batch=4))
    derive = jax.grad(lambda *t: (apply(CALL)(*t) * dy).sum(), range(4))
    shardings = sharded_batch, sharded_batch, replicated, replicated
    program = jax.jit(derive, in_shardings=shardings)
    given = [jax.device_put(a, s) for a, s in zip(arrays, shardings, strict=True)]
    text = program.lower(*given).compile().as_text()
    grads, unsharded = program(*given), jax.jit(derive)(*arrays)
    report = {word: text.count(f" {word}(") for word in ("all-gather", "all-to-all")}
    report["fused"] = text.count('custom_call_target="involution_fused"')
    report["shard_sizes"] = [g.addressable_shards[0].data.shape[0] for g in grads[:2]]
    report["errors"] = [float(np.abs(g - u).max()) for g, u in zip(grads, unsharded, strict=True)]
    print(json.dumps(report))


@pytest.mark.long
@pytest.mark.skipif(BACKEND != "jax", reason="JAX's partitioner")
def test_sharded_batch_is_not_gathered(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    report = json.loads(fresh_process("import tests.ops.test_fused as t; t.sharded()"))
    # The two gradients: XLA removes the forward pass, whose result is unused.
    assert (report["all-gather"], report["all-to-all"], report["fused"]) == (0, 0, 2)
    assert report["shard_sizes"] == [2, 2]
    assert np.max(report["errors"]) <= 1e-12


def test_sizes_unknown_until_run_time():
    shapes = [(None, None, None, 12), (None, None, None, 5), (5, 27), (27,)]
    *arrays, _ = native_core.fused_arrays(CALL)
    run = in_graph(apply(CALL), shapes)
    y = run(*tensors(arrays, "float64"))
    np.testing.assert_allclose(
        to_float64(y), to_float64(apply(CALL)(*tensors(arrays, "float64"))), rtol=0, atol=0
    )


def test_in_a_functional_model(tmp_path):
    inputs = [keras.Input((6, 8, 4)), keras.Input((6, 8, 3))]
    weight, bias = np.ones((3, 18), "float32"), np.zeros(18, "float32")
    y = involution.ops.fused_involution(*inputs, weight, bias, 3, groups=2, padding="same")
    assert y.shape == (None, 6, 8, 4)
    model = keras.Model(inputs, y)
    given = [np.ones((2, 6, 8, n), "float32") for n in (4, 3)]
    assert numpy(model(given))[0, 1, 1, 0] == 27


@pytest.mark.long
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_other_implementations_store_the_kernels(data_format):
    *arrays, _ = native_core.fused_arrays(CALL)
    x, hidden, weight, bias = tensors(arrays, "float32")
    expected = numpy(apply(CALL)(x, hidden, weight, bias))
    call = dataclasses.replace(CALL, data_format=data_format)
    if data_format == "channels_first":
        x, hidden = (keras.ops.moveaxis(t, -1, 1) for t in (x, hidden))
        expected = np.moveaxis(expected, -1, 1)
    for implementation in (None, *IMPLEMENTATIONS):
        y = numpy(apply(call, implementation)(x, hidden, weight, bias))
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-4)


def test_channels_first_raises():
    call = dataclasses.replace(CALL, data_format="channels_first")
    *arrays, _ = native_core.fused_arrays(CALL)
    x, hidden, *rest = tensors(arrays, "float32")
    x, hidden = (keras.ops.moveaxis(t, -1, 1) for t in (x, hidden))
    with pytest.raises(ValueError, match="fused: it requires channels_last"):
        apply(call)(x, hidden, *rest)


def test_fused_with_a_kernel_argument_raises():
    x, kernel, _ = CALL.arrays()
    with pytest.raises(
        ValueError, match="fused: it generates the kernels itself, but this call has stored kernels"
    ):
        involution.ops.involution(x, kernel, **CALL.arguments, implementation="fused")


def test_force_implementation_overrides_fused(monkeypatch):
    *arrays, _ = native_core.fused_arrays(CALL)
    monkeypatch.setattr(fused, "apply_generated", None)
    with involution.ops.force_implementation("reference"):
        apply(CALL, None)(*tensors(arrays, "float32"))
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        apply(CALL, None)(*tensors(arrays, "float32"))


def test_fewer_positions_than_hidden_channels_are_not_fused(monkeypatch):
    call = dataclasses.replace(CALL, strides=(1, 1))
    monkeypatch.setattr(fused, "apply_generated", lambda *arguments: "fused")
    fused_result, unfused_result = (
        apply(call, None)(*tensors(native_core.fused_arrays(call, hidden=n)[:-1], "float32"))
        for n in (35, 36)
    )
    assert fused_result == "fused"
    assert tuple(unfused_result.shape) == call.output_shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": np.ones((2, 3, 7, 5, 1))}, "`hidden` must have the shape"),
        ({"hidden": np.ones((2, 3, 6, 5))}, "`hidden` must have the shape"),
        ({"hidden": np.ones((1, 3, 7, 5))}, "`hidden` must have the shape"),
        ({"hidden": np.ones((2, 3, 7, 4))}, "`hidden` must have the shape"),
        ({"weight": np.ones((5, 26))}, r"`weight` must have the shape \(5, 27\)"),
        ({"weight": np.ones(27)}, "`weight` must have the shape"),
        ({"bias": np.ones((1, 27))}, r"`bias` must have the shape \(27,\)"),
        (
            {"hidden": np.ones((2, 3, 7, 0)), "weight": np.ones((0, 27))},
            "at least one hidden channel",
        ),
        ({"bias": np.ones(27, "float32")}, "`bias` must have the dtype of `x`, float64"),
    ],
)
def test_p14_mismatched_arguments_raise_before_anything_runs(change, message):
    given = dict(zip(NAMES, native_core.fused_arrays(CALL), strict=False)) | change
    given = {name: tensors([array], array.dtype.name)[0] for name, array in given.items()}
    with pytest.raises(ValueError, match=message) as error:
        apply(CALL, None)(**given)
    assert "Received: " in str(error.value)
    assert "\n" not in str(error.value)


# --- The layers -----------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch):
    """The arguments of every fused involution that ran."""
    calls = []
    original = fused.apply_generated

    def apply_generated(*given):
        calls.append(given)
        return original(*given)

    monkeypatch.setattr(fused, "apply_generated", apply_generated)
    return calls


IMAGES = np.random.default_rng(0).standard_normal((2, 9, 8, 16)).astype("float32")


def call_and_restore(layer, training):
    """The output of a layer and its weights after the call; restores the earlier weights."""
    before = layer.get_weights()
    result = layer(IMAGES, training=training)
    after = layer.get_weights()
    layer.set_weights(before)
    return result, after


def assert_same(first, second):
    """Compares two results of ``call_and_restore``."""
    np.testing.assert_allclose(numpy(first[0]), numpy(second[0]), rtol=0, atol=1e-5)
    # Including the moving statistics of batch normalization.
    for weight, same in zip(first[1], second[1], strict=True):
        np.testing.assert_array_equal(weight, same)


@pytest.mark.long
@pytest.mark.parametrize("kernel_generator", ["bottleneck", "contextual", "linear"])
@pytest.mark.parametrize("training", [False, True])
def test_layers_are_fused_and_equal_the_unfused_result(kernel_generator, training, runs):
    layer = Involution2D(
        3, strides=2, group_channels=4, kernel_generator=kernel_generator, filters=6
    )
    layer.build(IMAGES.shape)
    with involution.ops.force_implementation("native"):
        unfused = call_and_restore(layer, training)
    assert not runs
    assert_same(call_and_restore(layer, training), unfused)
    assert len(runs) == 1


@pytest.mark.long
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_drop_in_layer_equals_the_unfused_result(stride, training, runs):
    layer = involution.Involution(8, 4, 3, stride, 2, return_kernel=False)
    layer.build(IMAGES.shape)
    layer.return_kernel = True
    (y, _), weights = call_and_restore(layer, training)
    assert not runs
    layer.return_kernel = False
    assert_same(call_and_restore(layer, training), (y, weights))
    assert len(runs) == 1


@pytest.mark.long
def test_drop_in_layer_is_unfused_if_kernels_are_recorded_or_overridden(runs):
    class Negative(involution.Involution):
        def generate_kernel(self, inputs):
            return -super().generate_kernel(inputs)

    Negative(16, 4, return_kernel=False)(IMAGES)
    layer = involution.Involution(16, 4, return_kernel=False)
    with record_involutions() as calls:
        layer(IMAGES)
    assert not runs
    assert tuple(calls[0].kernel.shape) == (2, 9, 8, 9, 4)
    layer(IMAGES)
    assert len(runs) == 1


@pytest.mark.long
def test_training_updates_all_weights(runs):
    layer = Involution2D(3, group_channels=4)
    model = keras.Sequential([keras.Input((9, 8, 16)), layer, keras.layers.GlobalMaxPooling2D()])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    before = layer.get_weights()
    model.fit(IMAGES, np.zeros((2, 16)), verbose=0)
    assert runs
    for variable, old, new in zip(layer.weights, before, layer.get_weights(), strict=True):
        assert (old != new).any(), variable.path


class Doubled(kernel_generators.Linear):
    def call(self, features):
        return 2 * super().call(features)


class Sine(kernel_generators.Linear):
    def _generate(self, features):
        return keras.ops.sin(super()._generate(features))


@pytest.mark.parametrize(
    "options",
    [
        {"return_kernel": True},
        {"kernel_softmax": True},
        {"kernel_dropout": 0.5},
        {"kernel_generator": "static"},
        {"kernel_generator": "pairwise_attention"},
        {"kernel_generator": Doubled()},
        {"kernel_generator": Sine()},
        {"kernel_generator": keras.layers.Conv2D(9 * 4, 1)},
        {"kernel_generator": kernel_generators.Linear(dtype="mixed_bfloat16")},
        {"implementation": "native"},
    ],
    ids=str,
)
def test_options_that_require_stored_kernels_are_unfused(options, runs):
    Involution2D(3, **{"groups": 4, **options})(IMAGES)
    assert not runs


def test_overridden_generate_kernel_is_unfused(runs):
    class Negative(Involution2D):
        def generate_kernel(self, inputs):
            return -super().generate_kernel(inputs)

    layer = Negative(3, groups=4)
    y = numpy(layer(IMAGES))
    assert not runs
    plain = Involution2D(3, groups=4)
    plain.build(IMAGES.shape)
    plain.set_weights(layer.get_weights())
    np.testing.assert_allclose(-y, numpy(plain(IMAGES)), rtol=0, atol=1e-5)
    assert len(runs) == 1


def test_recorded_involutions_are_unfused(runs):
    layer = Involution2D(3, groups=4)
    with record_involutions() as calls:
        layer(IMAGES)
    assert not runs
    assert tuple(calls[0].kernel.shape) == (2, 9, 8, 9, 4)


def test_layer_with_fused_by_name_runs_or_raises(runs):
    Involution2D(3, groups=4, implementation=("fused", "native"))(IMAGES)
    assert len(runs) == 1
    layer = Involution2D(3, groups=4, implementation="fused", return_kernel=True)
    with pytest.raises(
        ValueError, match="fused: it generates the kernels itself, but this call has stored kernels"
    ):
        layer(IMAGES)


@pytest.mark.long
@pytest.mark.parametrize("policy", ["float64", "mixed_bfloat16"])
def test_dtype_policies(policy, runs):
    layer = Involution2D(3, groups=4, dtype=policy)
    y = layer(IMAGES)
    assert len(runs) == 1
    assert keras.backend.standardize_dtype(y.dtype) == layer.compute_dtype
    with involution.ops.force_implementation("native"):
        expected = to_float64(layer(IMAGES))
    bound = {"float64": 1e-12, "mixed_bfloat16": 0.05}[policy]
    np.testing.assert_allclose(to_float64(y), expected, rtol=0, atol=bound * np.abs(expected).max())


def selected(x, hidden=None, implementation=None, **arguments):
    problem = problem_of(Window(**arguments, rank=2), x, hidden)
    return dispatch.select(problem, implementation).name


def test_chosen_implementation_is_reported():
    x = keras.KerasTensor((2, 9, 8, 16))
    call = {"kernel_size": 3, "groups": 4}
    first = selected(x, **call)
    possible = [name for name, reason in api.implementations(x, None, **call) if reason is None]
    assert first == possible[0]
    assert selected(x, 4, **call) == "fused"
    assert api.implementations(x, None, hidden_channels=4, **call)[0] == ("fused", None)
    # Fewer positions than hidden channels.
    assert selected(x, 73, **call) == first
    assert api.implementations(x, None, hidden_channels=73, **call)[-1] == ("fused", None)
    assert selected(x, 73, implementation="fused", **call) == "fused"
    x_first = keras.KerasTensor((2, 16, 9, 8))
    assert selected(x_first, 4, data_format="channels_first", **call) == first
    layer = Involution2D(3, groups=4)
    layer.build(x.shape)
    with pytest.raises(
        ValueError, match=r"built: call it on an input first\. Received: \w+, not built"
    ):
        involution.Involution2D(3).chosen_implementation(x)
    assert layer.chosen_implementation(x) == "fused"
    layer.return_kernel = True
    assert layer.chosen_implementation(x) == first
    drop_in = involution.Involution(16, 4, 3, 1, 4)
    drop_in.build(x.shape)
    assert drop_in.chosen_implementation(x) == first
    drop_in.return_kernel = False
    assert drop_in.chosen_implementation(x) == "fused"
    x = keras.KerasTensor((2, 9, 8, 3))
    assert selected(x, 1, kernel_size=3) == selected(x, kernel_size=3)
