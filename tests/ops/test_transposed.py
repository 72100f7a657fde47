"""Transposed involution: the gradient of an involution for its input, as an operator."""

import keras
import numpy as np
import pytest
from keras import ops

from involution.ops import transposed_involution
from tests.support.backends import BACKEND, IMPLEMENTATIONS, gradients, in_graph, numpy
from tests.support.oracle import groups_of


def formula(x, kernel, kernel_size, strides, dilation_rate, before, sizes, layout="contiguous"):
    """The formula as loops, channels last, for an output of these sizes."""
    group_of = groups_of(x.shape[-1], kernel.shape[-1], layout)
    y = np.zeros((len(x), *sizes, x.shape[-1]))
    for p in np.ndindex(*x.shape[1:-1]):
        for tap, k in enumerate(np.ndindex(*kernel_size)):
            q = tuple(
                p[i] * strides[i] - before[i] + k[i] * dilation_rate[i] for i in range(len(p))
            )
            if all(0 <= n < size for n, size in zip(q, sizes, strict=True)):
                terms = kernel[(slice(None), *p, tap)][:, group_of] * x[(slice(None), *p)]
                y[(slice(None), *q)] += terms
    return y


# sizes, kernel size, strides, padding, output padding, dilation, pads before, output sizes
CASES = [
    ((4, 5), (3, 3), (1, 1), "same", None, (1, 1), (1, 1), (4, 5)),
    ((4, 5), (3, 2), (2, 3), "same", None, (1, 1), (0, 0), (8, 15)),
    ((3, 4), (5, 4), (2, 2), "same", None, (1, 2), (1, 2), (6, 8)),
    ((4, 3), (3, 2), (2, 3), "valid", None, (1, 1), (0, 0), (9, 9)),
    ((4, 3), (3, 3), (2, 2), ((1, 0), (2, 1)), (1, 0), (1, 1), (1, 2), (9, 4)),
    ((6,), (4,), (3,), "symmetric", 2, (2,), (3,), (18,)),
    ((2, 3, 2), (2, 1, 3), (1, 2, 2), "same", None, (1, 1, 1), (0, 0, 0), (2, 6, 4)),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula_with_gradients(case, implementation):
    sizes, kernel_size, strides, padding, output_padding, dilation, before, out = case
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *sizes, 6))
    kernel = rng.normal(size=(2, *sizes, int(np.prod(kernel_size)), 2))
    dy = rng.normal(size=(2, *out, 6))

    def apply(x, kernel):
        return transposed_involution(
            x,
            kernel,
            kernel_size,
            strides,
            padding,
            dilation,
            groups=2,
            output_padding=output_padding,
            implementation=implementation,
        )

    y = formula(x, kernel, kernel_size, strides, dilation, before, out)
    np.testing.assert_allclose(numpy(apply(x, kernel)), y, 1e-12, 1e-12)
    dx, dkernel = gradients(apply, (x, kernel), dy)
    # Bilinear: a gradient's product with any direction is the output's.
    for gradient, arguments in (
        (dx, (rng.normal(size=x.shape), kernel)),
        (dkernel, (x, rng.normal(size=kernel.shape))),
    ):
        direction = arguments[0] if gradient is dx else arguments[1]
        along = formula(*arguments, kernel_size, strides, dilation, before, out)
        np.testing.assert_allclose((gradient * direction).sum(), (along * dy).sum(), 1e-11)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_formats_and_layouts(implementation):
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(size=(1, 3, 4, 6)), rng.normal(size=(1, 3, 4, 9, 3))
    y = formula(x, kernel, (3, 3), (2, 2), (1, 1), (0, 0), (6, 8), "interleaved")
    found = transposed_involution(
        np.moveaxis(x, -1, 1),
        np.moveaxis(kernel, (-2, -1), (1, 2)),
        3,
        2,
        groups=3,
        group_layout="interleaved",
        data_format="channels_first",
        implementation=implementation,
    )
    np.testing.assert_allclose(np.moveaxis(numpy(found), 1, -1), y, 1e-12, 1e-12)


# Fewer additional positions than strides: beyond, no window reaches.
SIZES = [
    (kernel_size, strides, output_padding)
    for kernel_size, strides in ((3, 2), (4, 2), (2, 3), (5, 1), (1, 2))
    for output_padding in (None, 0, 1)
    if output_padding is None or output_padding < strides
]


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(("kernel_size", "strides", "output_padding"), SIZES)
def test_sizes_are_those_of_keras_convolutions(kernel_size, strides, output_padding, padding):
    layer = keras.layers.Conv2DTranspose(
        1, kernel_size, strides, padding, output_padding=output_padding
    )
    expected = layer.compute_output_shape((1, 5, 6, 1))
    x, kernel = np.zeros((1, 5, 6, 1)), np.zeros((1, 5, 6, kernel_size**2, 1))
    y = transposed_involution(
        x, kernel, kernel_size, strides, padding, output_padding=output_padding
    )
    assert tuple(y.shape) == tuple(expected)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras pads otherwise on PyTorch")
@pytest.mark.parametrize(("kernel_size", "strides"), [(3, 2), (4, 2), (5, 3), (3, 1), (2, 3)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_one_kernel_for_all_positions_is_transposed_convolution(kernel_size, strides, padding):
    rng = np.random.default_rng(2)
    x, weight = rng.normal(size=(2, 4, 5, 1)), rng.normal(size=(kernel_size, kernel_size, 1, 1))
    expected = ops.conv_transpose(x, weight, strides, padding)
    kernel = np.broadcast_to(weight.reshape(-1, 1), (2, 4, 5, kernel_size**2, 1))
    y = transposed_involution(x, np.array(kernel), kernel_size, strides, padding)
    np.testing.assert_allclose(numpy(y), numpy(expected), 1e-10, 1e-10)


def test_sizes_unknown_until_run_time():
    rng = np.random.default_rng(3)
    x, kernel = rng.normal(size=(2, 5, 4, 2)), rng.normal(size=(2, 5, 4, 9, 1))
    for implementation in IMPLEMENTATIONS:

        def apply(x, kernel, implementation=implementation):
            return transposed_involution(x, kernel, 3, 2, implementation=implementation)

        compiled = in_graph(apply, [(None, None, None, 2), (None, None, None, 9, 1)])
        for n in (5, 3):
            arrays = x[:, :n], kernel[:, :n]
            y = compiled(*(ops.convert_to_tensor(a, "float64") for a in arrays))
            want = formula(*arrays, (3, 3), (2, 2), (1, 1), (0, 0), (2 * n, 8))
            np.testing.assert_allclose(numpy(y), want, 1e-12, 1e-12)


def test_in_a_functional_model():
    inputs = keras.Input((None, 4, 4)), keras.Input((None, 4, 9, 2))
    outputs = transposed_involution(*inputs, kernel_size=3, strides=2, groups=2)
    assert outputs.shape == (None, None, 8, 4)
    model = keras.Model(inputs, outputs)
    model = keras.Model.from_config(model.get_config())
    y = numpy(model([np.ones((1, 3, 4, 4), "float32"), np.ones((1, 3, 4, 9, 2), "float32")]))
    assert y.shape == (1, 6, 8, 4)
    assert y[0, 2, 2, 0] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"padding": "causal"}, "`padding` 'causal' requires one spatial dimension"),
        ({"upsampling": 2}, "unexpected keyword argument 'upsampling'"),
        ({"output_padding": 5}, r"fewer additional positions .* Received: output_padding=5"),
        ({"output_padding": -1}, r"`output_padding` must be .* Received: output_padding=-1"),
        ({"padding": 9}, r"Every output size must be at least 1. Received: output sizes \(-9, -7"),
        ({"kernel_size": 5}, r"`kernel` must have the shape \(1, 4, 5, 25, 1\)"),
    ],
)
def test_invalid_arguments_raise(change, message):
    x, kernel = np.zeros((1, 4, 5, 2)), np.zeros((1, 4, 5, 9, 1))
    arguments = {"kernel_size": 3, "strides": 2, **change}
    with pytest.raises((ValueError, TypeError), match=message):
        transposed_involution(x, kernel, **arguments)


def test_causal_padding_is_refused():
    with pytest.raises(ValueError, match=r"neither `padding` 'causal' nor `upsampling`"):
        transposed_involution(np.zeros((1, 4, 2)), np.zeros((1, 4, 3, 1)), 3, 1, "causal")
