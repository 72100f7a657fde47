"""``rows``, the implementation for exporters, against the float64 oracle."""

import itertools

import keras
import pytest

import involution
from tests.ops.test_gradients import relative
from tests.support.backends import (
    assert_equals_oracle,
    gradients,
    mostly_slow_on_jax,
    numpy,
    operation,
    tensors,
)
from tests.support.oracle import Call, random_calls

CALLS = [call for call in random_calls(48, seed=5) if len(call.sizes) < 3]


@pytest.mark.long
@pytest.mark.parametrize("call", mostly_slow_on_jax(CALLS, 12), ids=range(len(CALLS)))
def test_rows_equal_the_oracle(call):
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


def test_calls_cover_every_kind():
    kinds = {(len(c.sizes), c.group_layout, c.data_format) for c in CALLS}
    formats = "channels_last", "channels_first"
    assert kinds == set(itertools.product((1, 2), ("contiguous", "interleaved"), formats))
    assert any(max(c.strides) > 1 for c in CALLS)
    assert any(max(c.dilation_rate) > 1 for c in CALLS)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_accumulate_in_float32(dtype):
    call = CALLS[-1]
    x, kernel = tensors(call.arrays()[:2], dtype)
    assert_equals_oracle(call, operation(call, "rows")(x, kernel), x, kernel)


@pytest.mark.long
def test_three_dimensions_raise_or_select_the_next_name():
    call = Call(3, (3, 4, 5), 2, (2, 3, 1), (1, 1, 1), "same", (1, 1, 1), 1)
    x, kernel = tensors(call.arrays()[:2], "float64")
    with pytest.raises(ValueError, match="crashes when it compiles three-dimensional rows"):
        operation(call, "rows")(x, kernel)
    assert_equals_oracle(call, operation(call, ("rows", "reference"))(x, kernel), x, kernel)


def test_rows_are_selected_by_name_only():
    x, kernel = keras.KerasTensor((1, 8, 8, 6)), keras.KerasTensor((1, 8, 8, 9, 1))
    names = [name for name, _ in involution.ops.implementations(x, kernel, 3)]
    assert sorted(names) == ["native", "reference", "taps", "triton"]
