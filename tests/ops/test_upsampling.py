"""Upsampling: kernels on the fine grid, windows on the coarse one. Random calls with upsampling are
among those of test_gradients, test_properties, test_fused and native/test_core."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops

import involution
from involution.ops import fused_involution, window_products
from tests.support.backends import (
    IMPLEMENTATIONS,
    gradients,
    in_graph,
    numpy,
    operation,
    requires_native,
)
from tests.support.oracle import Call, with_non_finite

CALL = Call(
    2, (5, 4), 6, (3, 2), (1, 1), "same", (1, 2), 2, upsampling=(2, 3), data_format="channels_last"
)
VARIANTS = [
    CALL,
    dataclasses.replace(CALL, data_format="channels_first", group_layout="interleaved"),
    Call(1, (7,), 4, (3,), (1,), ((2, 1),), (2,), 4, upsampling=(4,)),
    Call(1, (3, 2, 4), 2, (2, 3, 1), (1, 1, 1), "symmetric", (1, 1, 1), upsampling=(1, 2, 2)),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("call", VARIANTS)
def test_equals_the_oracle_with_gradients(call, implementation):
    x, kernel, dy = call.arrays()
    apply = operation(call, implementation)
    np.testing.assert_allclose(numpy(apply(x, kernel)), call.involution(x, kernel)[0], 1e-12, 1e-12)
    for value, expected in zip(
        gradients(apply, (x, kernel), dy), call.gradients(x, kernel, dy), strict=True
    ):
        np.testing.assert_allclose(value, expected, 1e-12, 1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_nearest_upsampling_and_dilation(implementation):
    factor = 3
    call = Call(2, (5, 6), 4, (3, 5), (1, 1), "symmetric", (1, 1), 2, upsampling=(factor,) * 2)
    x, kernel, _ = call.arrays()
    y = operation(call, implementation)(x, kernel)
    nearest = x.repeat(factor, 1).repeat(factor, 2)
    dilated = involution.ops.involution(
        nearest,
        kernel,
        (3, 5),
        dilation_rate=factor,
        padding=((factor,) * 2, (2 * factor,) * 2),
        groups=2,
        implementation=implementation,
    )
    np.testing.assert_allclose(numpy(y), numpy(dilated), 1e-12, 1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("call", VARIANTS)
def test_window_products_are_the_gradient_of_the_kernel(call, implementation):
    x, _, dy = call.arrays()
    products = window_products(x, dy, **call.arguments, implementation=implementation)
    _, expected = call.gradients(x, np.zeros(call.kernel_shape), dy)
    np.testing.assert_allclose(numpy(products), expected, 1e-12, 1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_second_derivatives_equal_those_of_nearest_upsampling(implementation):
    from tests.support.backends import grad

    call = Call(1, (4,), 2, (3,), (1,), "symmetric", (1,), upsampling=(2,))
    arguments = call.arrays()[:2]

    def loss(apply):
        def gradient_norm(x, kernel):
            dx, dkernel = grad(lambda a, b: ops.sum(apply(a, b) ** 3))(x, kernel)
            return ops.sum(dx**2) + ops.sum(dkernel**2)

        return gradient_norm

    def by_nearest(x, kernel):
        return involution.ops.involution(
            ops.repeat(x, 2, 1),
            kernel,
            3,
            padding=((2, 2),),
            dilation_rate=2,
            implementation="reference",
        )

    tensors = [ops.convert_to_tensor(a, "float64") for a in arguments]
    found = grad(loss(operation(call, implementation)))(*tensors)
    for value, expected in zip(found, grad(loss(by_nearest))(*tensors), strict=True):
        np.testing.assert_allclose(numpy(value), numpy(expected), 1e-10)


@requires_native
def test_fused_equals_stored_kernels_with_gradients():
    call = dataclasses.replace(CALL, kernel_size=(3, 3))
    x, kernel, dy = call.arrays()
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(*kernel.shape[:3], 5))
    weight, bias = rng.normal(size=(5, 18)), rng.normal(size=18)

    def run(implementation):
        def apply(*operands):
            return fused_involution(*operands, **call.arguments, implementation=implementation)

        operands = (x, hidden, weight, bias)
        return [numpy(apply(*operands)), *gradients(apply, operands, dy)]

    for value, expected in zip(run("fused"), run("reference"), strict=True):
        np.testing.assert_allclose(value, expected, 1e-11, 1e-11)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_non_finite_values_affect_only_windows_that_contain_them(implementation):
    for seed, call in enumerate(VARIANTS):
        x, kernel, _ = call.arrays(seed)
        for bad in ((with_non_finite([x], seed)[0], kernel), (x, with_non_finite([kernel])[0])):
            expected, _ = call.involution(*bad)
            np.testing.assert_array_equal(
                np.isnan(numpy(operation(call, implementation)(*bad))), np.isnan(expected)
            )


def test_sizes_unknown_until_run_time():
    call = dataclasses.replace(CALL, upsampling=(2, 2), kernel_size=(3, 3))
    x, kernel, _ = call.arrays()
    shapes = [(None, None, None, 6), (None, None, None, 9, 2)]
    for implementation in IMPLEMENTATIONS:
        compiled = in_graph(operation(call, implementation), shapes)
        for n in (5, 3):
            part = dataclasses.replace(call, sizes=(n, 4))
            arrays = x[:, :n], kernel[:, : 2 * n]
            y = compiled(*(ops.convert_to_tensor(a, "float64") for a in arrays))
            np.testing.assert_allclose(numpy(y), part.involution(*arrays)[0], 1e-12, 1e-12)


def test_in_a_functional_model():
    inputs = keras.Input((None, None, 4)), keras.Input((None, None, 9, 2))
    outputs = involution.ops.involution(*inputs, kernel_size=3, groups=2, upsampling=2)
    assert outputs.shape == (None, None, None, 4)
    model = keras.Model(inputs, outputs)
    model = keras.Model.from_config(model.get_config())
    x, kernel = np.ones((1, 3, 4, 4), "float32"), np.ones((1, 6, 8, 9, 2), "float32")
    y = numpy(model([x, kernel]))
    assert y.shape == (1, 6, 8, 4)
    assert y[0, 2, 2, 0] == 9
    assert y[0, 1, 1, 0] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"upsampling": 0}, r"`upsampling` must be .* Received: upsampling=0"),
        ({"upsampling": (2,)}, r"sequence of 2.* Received: upsampling=\(2,\)"),
        ({"upsampling": 2.0}, r"Received: upsampling=2\.0"),
        ({"upsampling": 2, "strides": 2}, r"`strides` must be 1 .* Received: strides=\(2, 2\)"),
        ({"upsampling": 3}, r"`kernel` must have the shape \(1, 12, 15, 9, 1\)"),
    ],
)
def test_invalid_arguments_raise(change, message):
    x, kernel = np.zeros((1, 4, 5, 2)), np.zeros((1, 8, 10, 9, 1))
    with pytest.raises(ValueError, match=message):
        involution.ops.involution(x, kernel, 3, **{"upsampling": 2, **change})
