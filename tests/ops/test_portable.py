"""``banded`` and ``rows``, the implementations for exporters, against the float64 oracle."""

import itertools

import keras
import numpy as np
import pytest

import involution
from tests.support.backends import (
    assert_equals_oracle,
    gradients,
    mostly_slow_on_jax,
    numpy,
    operation,
    tensors,
)
from tests.support.oracle import Call, random_calls, relative

ROWS = [call for call in random_calls(48, seed=5) if len(call.sizes) < 3]
BANDED = [call for call in ROWS if call.upsampling is None]
CALLS = [*(("rows", call) for call in ROWS), *(("banded", call) for call in BANDED)]


@pytest.mark.long
@pytest.mark.parametrize("case", mostly_slow_on_jax(CALLS, 20), ids=range(len(CALLS)))
def test_portable_implementations_equal_the_oracle(case):
    implementation, call = case
    x, kernel, dy = call.arrays(seed=5)
    apply = operation(call, implementation)
    assert_equals_oracle(call, apply(*tensors([x, kernel], "float64")), x, kernel)
    expected_dx, expected_dkernel = call.gradients(x, kernel, dy)
    dx, dkernel = gradients(apply, (x, kernel), dy)
    assert relative(dx, expected_dx) < 1e-12
    assert relative(dkernel, expected_dkernel) < 1e-12
    products = involution.ops.window_products(
        *tensors([x, dy], "float64"), implementation=implementation, **call.arguments
    )
    assert relative(numpy(products), expected_dkernel) < 1e-12


@pytest.mark.parametrize("call", BANDED, ids=range(len(BANDED)))
def test_kernels_generated_in_bands_equal_stored_ones(call):
    rng = np.random.default_rng(2)
    x = rng.normal(size=call.x_shape)
    taps, groups = call.taps, call.groups
    last = call.data_format == "channels_last"
    sizes = call.output_shape[1:-1] if last else call.output_shape[2:]
    hidden = rng.normal(size=(call.batch, *sizes, 3))
    weight, bias = rng.normal(size=(3, taps * groups)), rng.normal(size=taps * groups)
    kernel = (hidden @ weight + bias).reshape(*hidden.shape[:-1], taps, groups)
    if not last:
        hidden = np.moveaxis(hidden, -1, 1)
        kernel = np.moveaxis(kernel, (-2, -1), (1, 2))
    y = involution.ops.fused_involution(
        *tensors([x, hidden, weight, bias], "float64"), implementation="banded", **call.arguments
    )
    assert relative(numpy(y), call.involution(x, kernel)[0]) < 1e-12


def test_calls_cover_every_kind():
    formats = "channels_last", "channels_first"
    for calls in ROWS, BANDED:
        kinds = {(len(c.sizes), c.group_layout, c.data_format) for c in calls}
        assert kinds == set(itertools.product((1, 2), ("contiguous", "interleaved"), formats))
        assert any(max(c.strides) > 1 for c in calls)
        assert any(max(c.dilation_rate) > 1 for c in calls)


@pytest.mark.long
@pytest.mark.parametrize("implementation", ["rows", "banded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_they_accumulate_in_float32(dtype, implementation):
    call = BANDED[-1]
    x, kernel = tensors(call.arrays()[:2], dtype)
    assert_equals_oracle(call, operation(call, implementation)(x, kernel), x, kernel)


@pytest.mark.long
@pytest.mark.parametrize(
    ("implementation", "reason"),
    [
        ("rows", "crashes when it compiles three-dimensional rows"),
        ("banded", "supports one and two spatial dimensions"),
    ],
)
def test_three_dimensions_raise_or_select_the_next_name(implementation, reason):
    call = Call(3, (3, 4, 5), 2, (2, 3, 1), (1, 1, 1), "same", (1, 1, 1), 1)
    x, kernel = tensors(call.arrays()[:2], "float64")
    with pytest.raises(ValueError, match=reason):
        operation(call, implementation)(x, kernel)
    y = operation(call, (implementation, "reference"))(x, kernel)
    assert_equals_oracle(call, y, x, kernel)


@pytest.mark.parametrize(
    ("sizes", "options", "reason"),
    [
        ((4, 4), {"upsampling": 2}, "does not support upsampling"),
        ((None, 4), {}, "requires sizes that are known when the program is traced"),
        ((4, 64), {"dilation_rate": (1, 9)}, "a tile covers 26 columns for 3 taps"),
    ],
)
def test_bands_refuse_what_they_do_not_support(sizes, options, reason):
    upsampling = options.get("upsampling", 1)
    x = keras.KerasTensor((1, *sizes, 6))
    kernel = keras.KerasTensor((1, *(n and n * upsampling for n in sizes), 9, 1))
    with pytest.raises(ValueError, match=reason):
        involution.ops.involution(x, kernel, 3, implementation="banded", **options)


def test_portable_implementations_are_selected_by_name_only():
    x, kernel = keras.KerasTensor((1, 8, 8, 6)), keras.KerasTensor((1, 8, 8, 9, 1))
    names = [name for name, _ in involution.ops.implementations(x, kernel, 3)]
    assert sorted(names) == ["native", "reference", "taps", "triton"]
