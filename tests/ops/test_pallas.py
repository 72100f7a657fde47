"""``pallas``, on a GPU or else in Pallas's interpreter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import involution
from involution.ops import pallas
from involution.ops.autodiff import FORWARD, INPUT_GRAD, KERNEL_GRAD
from involution.ops.dispatch import PREFERENCE, select
from involution.ops.pallas import kernels
from involution.ops.problem import problem_of
from involution.ops.window import Window
from tests.support import native_core
from tests.support.native_core import ARGUMENTS
from tests.support.oracle import Call, error_bound, ieee, random_calls, with_non_finite

DTYPES = ("float32", "bfloat16", "float16")
CALL = Call(2, (4, 5), 6, (3, 2), (2, 1), "same", (1, 2), 3)
FIRST = dataclasses.replace(CALL, data_format="channels_first", group_layout="interleaved")
# More channels of a group, groups and positions than a block has.
CALLS = (
    CALL,
    FIRST,
    Call(1, (5, 6), 130, (3, 5), (1, 1), "same", (1, 1), 1),
    Call(1, (5, 3), 70, (1, 3), (1, 2), "symmetric", (1, 1), 70, "interleaved"),
)
INTERPRETED = jax.default_backend() != "gpu"


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if INTERPRETED:
        monkeypatch.setenv("INVOLUTION_PALLAS_INTERPRET", "1")


@ieee
def check(call, dtype, change=list):
    given = [jnp.asarray(a, dtype) for a in change(call.arrays(0))]
    wide = [np.asarray(t.astype("float32"), "float64") for t in given]
    truth, magnitude = (
        native_core.expected(call, *wide),
        native_core.expected(call, *map(np.abs, wide)),
    )
    window = Window(**call.arguments)
    for pass_, arguments in ARGUMENTS.items():
        result = kernels.call(pass_, window, call.sizes, *arguments(*given))
        assert result.dtype == dtype
        found = np.asarray(result.astype("float32"), "float64")
        terms = call.channels // call.groups if pass_ == KERNEL_GRAD else call.taps
        if np.isfinite(truth[pass_]).all():
            limit = error_bound(truth[pass_], magnitude[pass_], terms, dtype)
            assert (np.abs(found - truth[pass_]) <= limit).all(), (pass_, call)
        else:
            np.testing.assert_allclose(found, truth[pass_], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS)
def test_passes_match_the_oracle(call, dtype):
    check(call, dtype)


# Every rank, padding, layout and format; compiling an interpreted kernel takes a second.
@pytest.mark.parametrize("number", range(52))
def test_passes_of_random_calls_match_the_oracle(number):
    check(random_calls(52, seed=5)[number], DTYPES[number % 2])


@pytest.mark.parametrize("call", [CALL, FIRST])
def test_non_finite_values_spread_as_in_the_formula(call):
    check(call, "float32", lambda arrays: with_non_finite(arrays))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("pass_", [FORWARD, INPUT_GRAD, KERNEL_GRAD])
def test_kernels_are_lowered_for_cuda(pass_, dtype, monkeypatch):
    """Without a device the program contains Triton's intermediate code."""
    monkeypatch.delenv("INVOLUTION_PALLAS_INTERPRET", raising=False)
    for call in CALLS:
        window = Window(**call.arguments)
        a, b = ARGUMENTS[pass_](*(jnp.asarray(t, dtype) for t in call.arrays(0)))
        # A new function, traced at once: JAX caches the traces of the interpreted one.
        traced = jax.jit(lambda a, b: kernels.compute(pass_, window, call.sizes, a, b)).trace(a, b)  # noqa: B023
        assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_results_are_reproducible_under_transformations():
    x, kernel, dy = (jnp.asarray(a, "float32") for a in CALL.arrays(0))

    def loss(x, kernel):
        y = involution.ops.involution(x, kernel, implementation="pallas", **CALL.arguments)
        return jnp.sum(y * dy)

    grad = jax.grad(loss, (0, 1))
    first = grad(x, kernel)
    reference = jax.grad(
        lambda x, kernel: jnp.sum(
            involution.ops.involution(x, kernel, implementation="taps", **CALL.arguments) * dy
        ),
        (0, 1),
    )(x, kernel)
    for a, b, c in zip(first, jax.jit(grad)(x, kernel), reference, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, rtol=1e-5, atol=1e-5)
    mapped = jax.vmap(grad)(jnp.stack([x, 2 * x]), jnp.stack([kernel, kernel]))
    for a, b in zip(first, mapped, strict=True):
        np.testing.assert_allclose(b[0], a, rtol=1e-6, atol=1e-6)
    second = jax.grad(lambda x: jnp.sum(grad(x, kernel)[1] ** 2))(x)
    assert bool(jnp.isfinite(second).all())
    assert float(jnp.abs(second).max()) > 0


def test_second_derivatives_match_taps():
    x, kernel, dy = (jnp.asarray(a, "float32") for a in CALL.arrays(0))

    def of_second_order(implementation):
        def loss(x, kernel):
            y = involution.ops.involution(
                x, kernel, implementation=implementation, **CALL.arguments
            )
            return jnp.sum(y**3 * dy)

        inner = jax.grad(loss, (0, 1))
        return jax.grad(lambda x, k: sum(jnp.sum(g**2) for g in inner(x, k)), (0, 1))(x, kernel)

    for a, b in zip(of_second_order("pallas"), of_second_order("taps"), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * float(jnp.abs(b).max()))


def test_the_device_in_effect_decides(monkeypatch):
    """On a machine with a GPU, ``jax.default_device`` and ``keras.device`` can name the CPU."""
    monkeypatch.delenv("INVOLUTION_PALLAS_INTERPRET", raising=False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    problem = problem_of(Window(**CALL.arguments), jnp.asarray(CALL.arrays(0)[0], "float32"))
    assert pallas.unsupported_reason(problem) is None
    for device in (jax.devices("cpu")[0], "cpu"):
        with jax.default_device(device):
            reason = pallas.unsupported_reason(problem)
        assert reason == "it requires a GPU, and JAX's default device is a cpu"


@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 0, 5, 6)])
def test_empty_tensors(shape):
    x, kernel = jnp.ones(shape), jnp.ones((*shape[:-1], 9, 3))
    if shape[1] == 0:
        kernel = jnp.ones((2, 2, 5, 9, 3))
    padding = "same" if shape[0] == 0 else ((2, 2), (1, 1))
    y = involution.ops.involution(x, kernel, 3, groups=3, padding=padding, implementation="pallas")
    assert y.size == 0 or not np.asarray(y).any()


def test_unsupported_reasons(monkeypatch):
    window = Window(**CALL.arguments)
    problem = problem_of(window, jnp.asarray(CALL.arrays(0)[0], "float32"))
    assert pallas.unsupported_reason(problem) is None
    torch = dataclasses.replace(problem, framework="torch")
    assert pallas.unsupported_reason(torch) == "it requires JAX arrays"
    unknown = dataclasses.replace(problem, x_shape=(None, *problem.x_shape[1:]))
    assert pallas.unsupported_reason(unknown) == "it requires known sizes"
    large = dataclasses.replace(problem, x_shape=(2**29, *problem.x_shape[1:]))
    assert pallas.unsupported_reason(large).startswith("a tensor has 64424509440 elements")
    if INTERPRETED:
        monkeypatch.delenv("INVOLUTION_PALLAS_INTERPRET")
        expected = f"it requires a GPU, and JAX's default device is a {jax.default_backend()}"
        assert pallas.unsupported_reason(problem) == expected


def test_it_is_selected_by_name_only():
    problem = problem_of(Window(**CALL.arguments), jnp.asarray(CALL.arrays(0)[0], "float32"))
    assert "pallas" not in PREFERENCE
    assert select(problem).name != "pallas"
    assert select(problem, "pallas").name == "pallas"
