"""Gradients of both inputs, of any order, against differences of the float64 oracle."""

import hashlib

import keras
import numpy as np
import pytest

from tests.support.backends import (
    BACKEND,
    IMPLEMENTATIONS,
    fresh_process,
    grad,
    gradients,
    in_graph,
    numpy,
    operation,
    tensors,
    to_float64,
)
from tests.support.oracle import Call, error_bound, random_calls, relative

STRIDED = Call(2, (5, 7), 10, (3, 2), (2, 3), "same", (1, 2), 2)
DILATED = Call(1, (7, 5), 6, (2, 3), (1, 1), ((2, 1), (0, 3)), (2, 1), 3, "interleaved")
LINE = Call(2, (7,), 5, (4,), (2,), "symmetric", (1,), 1, "contiguous", "channels_first")


def worst_errors(call, implementation):
    """The errors of both gradients, and of the identity <dy, y> = <dx, x> = <dkernel, kernel>."""
    x, kernel, dy = call.arrays(seed=3)
    apply = operation(call, implementation)
    y, (dx, dkernel) = numpy(apply(x, kernel)), gradients(apply, (x, kernel), dy)
    expected_dx, expected_dkernel = call.central_differences(x, kernel, dy)
    products = np.array([(dy * y).sum(), (dx * x).sum(), (dkernel * kernel).sum()])
    _, magnitude = call.involution(x, kernel)
    scale = (np.abs(dy) * magnitude).sum()
    return {
        "input": relative(dx, expected_dx),
        "kernel": relative(dkernel, expected_dkernel),
        "adjoint": np.ptp(products) / max(scale, 1e-300),
    }


@pytest.mark.long
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("count", [48, pytest.param(300, marks=pytest.mark.slow)])
def test_gradients_of_random_calls(count, implementation):
    if count == 48:
        # The framework differentiates `reference`; XLA compiles each shape for about a second.
        count = 4 if implementation == "reference" else 12 if BACKEND == "jax" else 48
    worst = dict.fromkeys(("input", "kernel", "adjoint"), (0.0, None))
    for call in random_calls(count, seed=1):
        for name, error in worst_errors(call, implementation).items():
            assert error < 1e-12, (name, call)
            worst[name] = max(worst[name], (error, call), key=lambda pair: pair[0])
    for name, (error, call) in worst.items():
        print(f"{BACKEND}, {implementation}, {count} calls, {name}: worst {error:.1e} at {call}")


@pytest.mark.long
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("call", [STRIDED, LINE])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gradients_in_low_precision(dtype, call, implementation):
    """Sums of n terms in float32, rounded once."""
    arrays = [to_float64(t) for t in tensors(call.arrays(seed=4), dtype)]

    # The casts are exact in both directions, and so are their gradients.
    def in_dtype(x, kernel):
        y = operation(call, implementation)(*(keras.ops.cast(a, dtype) for a in (x, kernel)))
        return keras.ops.cast(y, "float64")

    terms = max(call.taps, call.channels // call.groups)
    for value, expected, magnitude in zip(
        gradients(in_dtype, arrays[:2], arrays[2]),
        call.central_differences(*arrays),
        call.central_differences(*map(np.abs, arrays)),
        strict=True,
    ):
        assert (np.abs(value - expected) <= error_bound(expected, magnitude, terms, dtype)).all()


def scalar(call, implementation):
    """A scalar function, nonlinear in both inputs, so that its derivatives have many terms."""

    def function(x, kernel):
        y = operation(call, implementation)(x, kernel)
        return keras.ops.sum(y * y * y)

    return function


def derivative(function, directions):
    """The scalar function <gradient of ``function``, directions>."""

    def along(*tensors):
        products = zip(grad(function)(*tensors), directions, strict=True)
        return sum(keras.ops.sum(g * d) for g, d in products)

    return along


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("order", ["expanded", "reversed", "strided"])
def test_f09_non_contiguous_output_gradient(order, implementation):
    """On frameworks with views: a view of a single number, or of another tensor."""
    x, kernel, _ = STRIDED.arrays()
    y, _ = STRIDED.involution(x, kernel)
    weights = np.arange(2.0 * y.size).reshape(*y.shape, 2)[..., 0]
    if order == "expanded":
        weights = np.full_like(y, 3)

    def function(x, kernel):
        y = operation(STRIDED, implementation)(x, kernel)
        if order == "expanded":
            return 3 * keras.ops.sum(y)
        if order == "reversed":
            return keras.ops.sum(
                keras.ops.transpose(y, (3, 2, 1, 0)) * tensors([weights.T], "float64")[0]
            )
        pairs = keras.ops.stack([y, y], axis=-1) * tensors([weights[..., None]], "float64")[0]
        return keras.ops.sum(pairs[..., 0])

    wanted = STRIDED.gradients(x, kernel, weights)
    for value, want in zip(grad(function)(*tensors((x, kernel), "float64")), wanted, strict=True):
        assert relative(numpy(value), want) < 1e-12


def test_oracle_gradients_equal_central_differences():
    for call in random_calls(24, seed=7):
        arrays = call.arrays()
        pairs = zip(call.gradients(*arrays), call.central_differences(*arrays), strict=True)
        for value, want in pairs:
            np.testing.assert_allclose(value, want, rtol=0, atol=1e-11)


@pytest.mark.long
@pytest.mark.parametrize("order", [2, pytest.param(3, marks=pytest.mark.any_backend)])
@pytest.mark.parametrize("call", [STRIDED, DILATED])
def test_f17_higher_order_derivatives(call, order):
    """Custom gradients equal those that the framework derives from the reference."""
    arguments = tensors(call.arrays(seed=5)[:2], "float64")
    results = {}
    for implementation in IMPLEMENTATIONS:
        function = scalar(call, implementation)
        for seed in range(1, order):
            function = derivative(function, tensors(call.arrays(seed)[:2], "float64"))
        results[implementation] = [numpy(g) for g in in_graph(grad(function))(*arguments)]
    truth = results.pop("reference")
    assert all(np.abs(expected).max() > 0.1 for expected in truth)
    for name, values in results.items():
        for value, expected in zip(values, truth, strict=True):
            assert relative(value, expected) < 1e-11, name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_f02_gradients_in_a_graph_of_unknown_sizes(padding, data_format, implementation):
    def call(sizes):
        return Call(2, sizes, 6, (2, 2), (2, 3), padding, (1, 2), 3, "contiguous", data_format)

    if data_format == "channels_last":
        shapes = (None, None, None, 6), (None, None, None, 4, 3)
    else:
        shapes = (None, 6, None, None), (None, 4, 3, None, None)
    program = in_graph(grad(scalar(call((5, 7)), implementation)), shapes)
    for sizes in [(5, 7), (6, 4), (7, 9)]:
        sized = call(sizes)
        x, kernel, _ = sized.arrays(seed=6)
        y, _ = sized.involution(x, kernel)
        expected = sized.central_differences(x, kernel, 3 * y * y)
        results = program(*tensors((x, kernel), "float64"))
        for value, want in zip(results, expected, strict=True):
            assert relative(numpy(value), want) < 1e-12


def has_custom_gradient(apply, x, kernel):
    """Whether the framework's graph of the call contains a custom gradient."""
    if BACKEND == "torch":
        import torch

        y = apply(torch.tensor(x, requires_grad=True), torch.tensor(kernel))
        node = y.grad_fn
        return isinstance(node, torch.autograd.function.BackwardCFunction)
    if BACKEND == "jax":
        import jax

        return "custom_vjp_call" in str(jax.make_jaxpr(apply)(x, kernel))
    import tensorflow as tf

    graph = tf.function(apply).get_concrete_function(tf.constant(x), tf.constant(kernel)).graph
    return any(
        "_gradient_op_type" in op.node_def.attr or op.type.startswith("Involution")
        for op in graph.get_operations()
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_implementation_but_the_reference_has_a_custom_gradient(implementation):
    x, kernel, _ = STRIDED.arrays()
    custom = has_custom_gradient(operation(STRIDED, implementation), x, kernel)
    assert custom == (implementation != "reference")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_f21_zero_output_gradient_gives_exactly_zero(implementation):
    x, kernel, dy = STRIDED.arrays()
    for g in gradients(operation(STRIDED, implementation), (x, kernel), 0 * dy):
        assert (g == 0).all()


def digests(implementation, runs):
    """Hashes of both gradients, which depend on the output, for a call split among threads."""
    call = Call(8, (33, 47), 48, (3, 3), (2, 2), "same", (1, 1), 3)
    arguments = tensors(call.arrays(seed=7)[:2], "float32")
    program = in_graph(grad(scalar(call, implementation)))
    for _ in range(runs):
        yield hashlib.sha256(b"".join(numpy(g).tobytes() for g in program(*arguments))).hexdigest()


# Not the reference: TensorFlow's own gradients are not bitwise reproducible.
REPRODUCIBLE = IMPLEMENTATIONS[:-1]


@pytest.fixture(scope="module")
def digests_of_another_process():
    """By implementation."""
    code = (
        "import tests.ops.test_gradients as t;"
        "print(*(d for name in t.REPRODUCIBLE for d in t.digests(name, 1)))"
    )
    return dict(zip(REPRODUCIBLE, fresh_process(code).split(), strict=True))


@pytest.mark.long
@pytest.mark.any_backend
@pytest.mark.parametrize("implementation", REPRODUCIBLE)
def test_f18_same_bits_in_every_run_and_every_process(implementation, digests_of_another_process):
    assert {*digests(implementation, 2)} == {digests_of_another_process[implementation]}
