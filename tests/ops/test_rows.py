"""The formula by rows of taps, which exporters write, against the float64 oracle."""

import itertools

import keras
import pytest

import involution
from tests.ops.test_gradients import relative
from tests.support.backends import (
    BACKEND,
    assert_equals_oracle,
    gradients,
    numpy,
    operation,
    tensors,
)
from tests.support.oracle import Call, random_calls

CALLS = [call for call in random_calls(48, seed=5) if len(call.sizes) < 3]


# XLA compiles each call for some seconds: `make test` has every third.
EACH = [
    pytest.param(call, marks=pytest.mark.slow if BACKEND == "jax" and i % 3 else ())
    for i, call in enumerate(CALLS)
]


@pytest.mark.parametrize("call", EACH, ids=range(len(CALLS)))
def test_rows_are_the_formula(call):
    x, kernel, dy = call.arrays(seed=5)
    apply = operation(call, "rows")
    assert_equals_oracle(call, apply(*tensors([x, kernel], "float64")), x, kernel)
    expected_dx, expected_dkernel = call.gradients(x, kernel, dy)
    dx, dkernel = gradients(apply, (x, kernel), dy)
    assert relative(dx, expected_dx) < 1e-12
    assert relative(dkernel, expected_dkernel) < 1e-12
    products = involution.ops.window_products(
        *tensors([x, dy], "float64"), implementation="rows", **call.arguments
    )
    assert relative(numpy(products), expected_dkernel) < 1e-12


def test_the_calls_are_of_every_kind():
    kinds = {(len(c.sizes), c.group_layout, c.data_format) for c in CALLS}
    formats = "channels_last", "channels_first"
    assert kinds == set(itertools.product((1, 2), ("contiguous", "interleaved"), formats))
    assert any(max(c.strides) > 1 for c in CALLS)
    assert any(max(c.dilation_rate) > 1 for c in CALLS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_sum_in_float32(dtype):
    call = CALLS[-1]
    x, kernel = tensors(call.arrays()[:2], dtype)
    assert_equals_oracle(call, operation(call, "rows")(x, kernel), x, kernel)


def test_volumes_are_refused_and_left_to_the_next_named():
    call = Call(3, (3, 4, 5), 2, (2, 3, 1), (1, 1, 1), "same", (1, 1, 1), 1)
    x, kernel = tensors(call.arrays()[:2], "float64")
    with pytest.raises(ValueError, match="rows in three dimensions crashes"):
        operation(call, "rows")(x, kernel)
    assert_equals_oracle(call, operation(call, ("rows", "reference"))(x, kernel), x, kernel)


def test_rows_are_taken_only_where_they_are_named():
    x, kernel = keras.KerasTensor((1, 8, 8, 6)), keras.KerasTensor((1, 8, 8, 9, 1))
    names = [name for name, _ in involution.ops.implementations(x, kernel, 3)]
    assert sorted(names) == ["native", "reference", "taps", "triton"]
