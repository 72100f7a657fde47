"""``involution.compat``: each function against its own formula, as loops over positions in NumPy.

The formulas are analytic, so that complex steps give their gradients without rounding.
"""

import dataclasses
import itertools

import numpy as np
import pytest

import involution
from involution import compat
from tests.support.backends import (
    BACKEND,
    fresh_process,
    gradients,
    in_graph,
    numpy,
    tensors,
    to_float64,
)
from tests.support.paths import FILES


def carafe(features, masks, kernel_size, group_size=1, scale_factor=2):
    batch, channels, height, width = features.shape
    fine = height * scale_factor, width * scale_factor
    y = np.zeros((batch, channels, *fine), np.result_type(features, masks))
    padded = pad_spatial(features, kernel_size // 2, 2)
    for i, j in np.ndindex(*fine):
        rows, columns = window(i // scale_factor, j // scale_factor, kernel_size)
        kernel = masks[:, :, i, j].reshape(batch, group_size, 1, kernel_size, kernel_size)
        kernel = np.repeat(kernel, channels // group_size, 2).reshape(
            batch, channels, *kernel.shape[3:]
        )
        y[:, :, i, j] = (kernel * padded[:, :, rows, columns]).sum((2, 3))
    return y


def convex_upsample(flow, up_mask, factor=8):
    batch, channels, height, width = flow.shape
    y = np.zeros((batch, channels, height * factor, width * factor), np.result_type(flow, up_mask))
    padded = pad_spatial(flow, 1, 2)
    for i, j in np.ndindex(*y.shape[2:]):
        row, column = i // factor, j // factor
        phase = i % factor * factor + j % factor
        logits = up_mask[:, phase :: factor**2, row, column]
        weights = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        rows, columns = window(row, column, 3)
        values = factor * padded[:, :, rows, columns].reshape(batch, channels, 9)
        y[:, :, i, j] = (weights[:, None] * values).sum(2)
    return y


def ska(x, w):
    size = int(w.shape[2] ** 0.5)
    y = np.zeros(x.shape, np.result_type(x, w))
    padded = pad_spatial(x, size // 2, 2)
    for channel, i, j in np.ndindex(*x.shape[1:]):
        rows, columns = window(i, j, size)
        kernel = w[:, channel % w.shape[1], :, i, j]
        y[:, channel, i, j] = (
            kernel * padded[:, channel, rows, columns].reshape(kernel.shape)
        ).sum(1)
    return y


def adaptive_conv(input, filters):
    batch, height, width, rows, columns = filters.shape
    y = np.zeros((batch, input.shape[1], height, width), np.result_type(input, filters))
    for i, j in np.ndindex(height, width):
        values = input[:, :, i : i + rows, j : j + columns]
        y[:, :, i, j] = (filters[:, None, i, j] * values).sum((2, 3))
    return y


def outlook_attention(value, attention, kernel_size=3, padding=1, stride=1):
    batch, height, width, channels = value.shape
    heads = attention.shape[1]
    padded = pad_spatial(value, padding, 1)
    folded = np.zeros(padded.shape, np.result_type(value, attention))
    starts = [range(0, n + 2 * padding - kernel_size + 1, stride) for n in (height, width)]
    for place, (i, j) in enumerate(itertools.product(*starts)):
        rows, columns = window(i, j, kernel_size)
        values = padded[:, rows, columns].reshape(batch, kernel_size**2, heads, -1)
        mixed = np.einsum("nhij,njhc->nihc", attention[:, :, place], values)
        folded[:, rows, columns] += mixed.reshape(batch, kernel_size, kernel_size, channels)
    return folded[:, padding : padding + height, padding : padding + width]


def headwise_dynamic_convolution(x, weight, static_w=None, residual=False):
    heads, taps = weight.shape[2:]
    static_w = np.zeros((taps, x.shape[2])) if static_w is None else static_w
    y = np.zeros(x.shape, np.result_type(x, weight, static_w)) + (x if residual else 0)
    for t, tap in itertools.product(range(x.shape[1]), range(taps)):
        if t >= tap:
            kernel = np.repeat(weight[:, t, :, tap], x.shape[2] // heads, 1)
            y[:, t] += (kernel + static_w[tap]) * x[:, t - tap]
    return y


def lowrank_dynamic_convolution(x, z, U, static_w=None, residual=False):  # noqa: N803 - as in compat
    weight = (z @ U).reshape(*x.shape[:2], -1, x.shape[2])
    weight = np.moveaxis(weight, 2, 3)
    return headwise_dynamic_convolution(x, weight, static_w, residual)


def propagate(x, weights, kernel_size=3):
    batch, channels, height, width = x.shape
    weights = weights.reshape(batch, -1, kernel_size**2, height, width)
    weights = np.repeat(weights, channels // weights.shape[1], 1)
    half = kernel_size // 2
    padded = np.zeros(
        (batch, channels, height + 2 * half, width + 2 * half), np.result_type(x, weights)
    )
    for i, j in np.ndindex(height, width):
        kernel = weights[:, :, :, i, j].reshape(batch, channels, kernel_size, kernel_size)
        rows, columns = window(i, j, kernel_size)
        padded[:, :, rows, columns] += kernel * x[:, :, i, j, None, None]
    return padded[:, :, half : half + height, half : half + width]


def window(i, j, size):
    return slice(i, i + size), slice(j, j + size)


def pad_spatial(x, pad, axis):
    widths = [(0, 0)] * 4
    widths[axis] = widths[axis + 1] = (pad, pad)
    return np.pad(x, widths)


@dataclasses.dataclass(frozen=True)
class Case:
    """A call: the shapes of its tensors, in the order of the signature, and other arguments."""

    function: str
    shapes: tuple
    arguments: dict = dataclasses.field(default_factory=dict)

    def arrays(self, seed=0):
        generator = np.random.default_rng(seed)
        return [generator.standard_normal(shape) for shape in self.shapes]

    def compat(self, *arrays):
        return getattr(compat, self.function)(*arrays, **self.arguments)

    def formula(self, *arrays):
        return globals()[self.function](*arrays, **self.arguments)

    def gradients(self, arrays, cotangent):
        """Gradients of sum(formula * cotangent) by complex steps, exact to rounding."""
        found = []
        for n, array in enumerate(arrays):
            gradient = np.zeros(array.shape)
            for index in np.ndindex(*array.shape):
                stepped = array.astype(complex)
                stepped[index] += 1e-30j
                y = self.formula(*arrays[:n], stepped, *arrays[n + 1 :])
                gradient[index] = (y.imag * cotangent).sum() / 1e-30
            found.append(gradient)
        return found

    def __str__(self):
        shapes = "-".join("x".join(map(str, shape)) for shape in self.shapes)
        arguments = "".join(f"-{name}={value}" for name, value in self.arguments.items())
        return f"{self.function}-{shapes}{arguments}"


CASES = [
    Case("carafe", [(1, 4, 2, 3), (1, 18, 4, 6)], {"kernel_size": 3, "group_size": 2}),
    Case("carafe", [(2, 3, 3, 1), (2, 1, 9, 3)], {"kernel_size": 1, "scale_factor": 3}),
    Case(
        "carafe",
        [(1, 2, 3, 2), (1, 50, 3, 2)],
        {"kernel_size": 5, "group_size": 2, "scale_factor": 1},
    ),
    Case("convex_upsample", [(1, 2, 3, 2), (1, 36, 3, 2)], {"factor": 2}),
    Case("convex_upsample", [(2, 1, 1, 3), (2, 81, 1, 3)], {"factor": 3}),
    Case("convex_upsample", [(1, 2, 1, 1), (1, 576, 1, 1)]),
    Case("ska", [(1, 6, 3, 5), (1, 2, 9, 3, 5)]),
    Case("ska", [(2, 3, 1, 4), (2, 3, 25, 1, 4)]),
    Case("adaptive_conv", [(2, 3, 5, 4), (2, 3, 2, 3, 3)]),
    Case("adaptive_conv", [(1, 2, 4, 7), (1, 3, 3, 2, 5)]),
    Case("outlook_attention", [(1, 3, 2, 4), (1, 2, 6, 9, 9)]),
    Case("outlook_attention", [(1, 5, 4, 2), (1, 1, 6, 9, 9)], {"stride": 2}),
    Case("outlook_attention", [(2, 1, 3, 2), (2, 2, 2, 9, 9)], {"stride": 2}),
    Case(
        "outlook_attention",
        [(1, 4, 5, 2), (1, 1, 4, 4, 4)],
        {"kernel_size": 2, "padding": 0, "stride": 2},
    ),
    Case(
        "outlook_attention",
        [(1, 6, 7, 1), (1, 1, 4, 4, 4)],
        {"kernel_size": 2, "padding": 0, "stride": 3},
    ),
    Case("headwise_dynamic_convolution", [(2, 5, 6), (2, 5, 2, 4)]),
    Case("headwise_dynamic_convolution", [(1, 5, 4), (1, 5, 2, 3)], {"residual": True}),
    Case("headwise_dynamic_convolution", [(2, 3, 4), (2, 3, 2, 4), (4, 4)], {"residual": True}),
    Case("headwise_dynamic_convolution", [(2, 5, 4), (2, 5, 1, 3), (3, 4)]),
    Case("headwise_dynamic_convolution", [(2, 5, 3), (2, 5, 3, 4), (4, 3)], {"residual": True}),
    Case("headwise_dynamic_convolution", [(1, 4, 3), (1, 4, 3, 1)], {"residual": True}),
    Case("lowrank_dynamic_convolution", [(2, 5, 6), (2, 5, 2), (2, 24)]),
    Case("lowrank_dynamic_convolution", [(1, 7, 5), (1, 7, 3), (3, 15)], {"residual": True}),
    Case(
        "lowrank_dynamic_convolution", [(2, 3, 4), (2, 3, 2), (2, 16), (4, 4)], {"residual": True}
    ),
    Case("lowrank_dynamic_convolution", [(1, 4, 4), (1, 4, 1), (1, 12), (3, 4)]),
    Case("propagate", [(2, 2, 3, 5), (2, 9, 3, 5)]),
    Case("propagate", [(1, 4, 3, 2), (1, 2, 9, 3, 2)]),
    Case("propagate", [(1, 1, 3, 4), (1, 25, 3, 4)], {"kernel_size": 5}),
]
# The first case of each function.
FIRST = list({case.function: case for case in reversed(CASES)}.values())
# JAX compiles each case for seconds.
MOSTLY_SLOW = [
    pytest.param(case, marks=pytest.mark.slow if BACKEND == "jax" and case not in FIRST else ())
    for case in CASES
]


@pytest.mark.parametrize("case", MOSTLY_SLOW, ids=str)
def test_outputs_and_gradients_equal_the_formulas(case):
    arrays = case.arrays()
    expected = case.formula(*arrays)
    y = numpy(in_graph(case.compat)(*tensors(arrays, "float64")))
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)
    cotangent = np.random.default_rng(1).standard_normal(expected.shape)
    # Compiled: on JAX, each operation would be compiled separately.
    found = gradients(in_graph(case.compat), arrays, cotangent)
    for gradient, reference in zip(found, case.gradients(arrays, cotangent), strict=True):
        assert gradient.shape == reference.shape
        np.testing.assert_allclose(gradient, reference, rtol=0, atol=1e-12)


# Sums of softmax weights and of overlapping windows are rounded more than once.
TOLERANCES = {"float16": 1e-2, "bfloat16": 8e-2, "float32": 1e-5}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_dtypes(case, dtype):
    arrays = tensors(case.arrays(), dtype)
    y = case.compat(*arrays)
    assert str(y.dtype).endswith(dtype) or y.dtype.name == dtype
    expected = case.formula(*map(to_float64, arrays))
    error = np.abs(to_float64(y) - expected).max()
    assert error <= TOLERANCES[dtype] * np.abs(expected).max()


def unknown(case):
    """The case's shapes with unknown sizes, except those that determine the kernel."""
    known = {
        "carafe": [[1], [1]],
        "convex_upsample": [[1], [1]],
        "ska": [[1], [1, 2]],
        "adaptive_conv": [[1], [3, 4]],
        "outlook_attention": [[3], [1, 3, 4]],
        "headwise_dynamic_convolution": [[2], [2, 3], [0, 1]],
        "lowrank_dynamic_convolution": [[2], [2], [0, 1], [0, 1]],
        "propagate": [[1], [1, 2] if len(case.shapes[1]) == 5 else [1]],
    }[case.function]
    return [
        [n if axis in axes else None for axis, n in enumerate(shape)]
        for shape, axes in zip(case.shapes, known, strict=False)
    ]


@pytest.mark.parametrize(
    "case",
    [*FIRST, *(case for case in CASES if case.arguments.get("stride"))],
    ids=str,
)
def test_compiled_with_unknown_sizes(case):
    arrays = case.arrays()
    run = in_graph(case.compat, unknown(case))
    y = numpy(run(*tensors(arrays, "float64")))
    np.testing.assert_allclose(y, case.formula(*arrays), rtol=0, atol=1e-12)


def test_carafe_equals_the_published_data():
    def read(name, *shape):
        return np.fromfile(FILES / "carafe" / f"{name}.bin", "float32").reshape(shape)

    features, masks = read("feat", 2, 64, 3, 3), read("mask", 2, 100, 6, 6)

    def run(features, masks):
        return compat.carafe(features, masks, 5, 4, 2)

    y = numpy(run(*tensors([features, masks], "float32")))
    np.testing.assert_allclose(y, read("output", 2, 64, 6, 6), rtol=0, atol=1e-6)
    for gradient, name, shape in zip(
        gradients(run, [features, masks], np.ones_like(y)),
        ("feat_grad", "mask_grad"),
        (features.shape, masks.shape),
        strict=True,
    ):
        np.testing.assert_allclose(gradient, read(name, *shape), rtol=1e-6, atol=1e-6)


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("name", "arrays", "arguments", "message"),
    [
        ("carafe", [(1, 4, 2, 3), (1, 9, 4, 6)], {"kernel_size": 4}, "`kernel_size` must be odd. "),
        ("carafe", [(1, 4, 2, 3), (1, 9, 4, 6)], {"kernel_size": "3"}, "`kernel_size` must be an "),
        ("carafe", [(4, 2, 3), (1, 9, 4, 6)], {"kernel_size": 3}, "`features` must have the axes "),
        (
            "carafe",
            [(1, 4, 2, 3), (1, 9, 4, 7)],
            {"kernel_size": 3},
            "`masks` must have the shape ",
        ),
        (
            "carafe",
            [(1, 4, 2, 3), (1, 27, 4, 6)],
            {"kernel_size": 3, "group_size": 3},
            "by group_size",
        ),
        (
            "carafe",
            [(1, 4, 2, 3), (1, 9, 2, 3)],
            {"kernel_size": 3, "scale_factor": 0},
            "`scale_factor`",
        ),
        ("convex_upsample", [(1, 2, 2, 3), (1, 64, 2, 3)], {}, "`up_mask` must have the shape "),
        ("convex_upsample", [(1, 2, 2, 3), (1, 9, 2, 3)], {"factor": 1.5}, "`factor` must be an "),
        ("ska", [(1, 4, 2, 3), (1, 2, 8, 2, 3)], {}, "square of an odd integer. "),
        ("ska", [(1, 4, 2, 3), (1, 2, 4, 2, 3)], {}, "square of an odd integer. "),
        ("ska", [(1, 4, 2, 3), (1, 2, 9, 2, 2)], {}, "`w` must have the shape "),
        ("ska", [(1, 4, 2, 3), (1, 3, 9, 2, 3)], {}, "divisible by C'"),
        ("adaptive_conv", [(1, 4, 4, 5), (1, 2, 3, 9)], {}, "`filters` must have the axes "),
        ("adaptive_conv", [(1, 4, 4, 5), (1, 4, 5, 3, 3)], {}, "`filters` must have the shape "),
        ("adaptive_conv", [(1, 4, 4, 5), (1, 4, 5, 0, 3)], {}, "must be known and not 0. "),
        (
            "outlook_attention",
            [(1, 3, 2, 4), (1, 2, 5, 9, 9)],
            {},
            "`attention` must have the shape ",
        ),
        ("outlook_attention", [(1, 3, 2, 4), (1, 3, 6, 9, 9)], {}, "divisible by heads"),
        (
            "outlook_attention",
            [(1, 3, 2, 4), (1, 2, 6, 9, 9)],
            {"padding": -1},
            "`padding` must be ",
        ),
        (
            "outlook_attention",
            [(1, 1, 1, 4), (1, 2, 1, 9, 9)],
            {"padding": 0},
            "The window must fit ",
        ),
        ("headwise_dynamic_convolution", [(1, 5, 4), (1, 5, 3, 4)], {}, "divisible by H"),
        (
            "headwise_dynamic_convolution",
            [(1, 5, 4), (1, 4, 2, 4)],
            {},
            "`weight` must have the shape",
        ),
        (
            "headwise_dynamic_convolution",
            [(1, 5, 4), (1, 5, 2, 0)],
            {},
            "must be known and not 0. ",
        ),
        (
            "headwise_dynamic_convolution",
            [(1, 5, 4), (1, 5, 2, 3), (4, 4)],
            {},
            "`static_w` must have ",
        ),
        (
            "headwise_dynamic_convolution",
            [(1, 5, 4), (1, 5, 4, 3), (1, 4)],
            {},
            "`static_w` must have ",
        ),
        ("lowrank_dynamic_convolution", [(1, 5, 4), (1, 5, 2), (2, 14)], {}, "divisible by D"),
        (
            "lowrank_dynamic_convolution",
            [(1, 5, 4), (1, 5, 3), (2, 16)],
            {},
            "`z` must have the shape ",
        ),
        (
            "lowrank_dynamic_convolution",
            [(1, 5), (1, 5, 3), (3, 16)],
            {},
            "`x` must have the axes ",
        ),
        (
            "propagate",
            [(1, 4, 2, 3), (1, 9, 2, 3)],
            {"kernel_size": 2},
            "`kernel_size` must be odd. ",
        ),
        ("propagate", [(1, 4, 2, 3), (1, 3, 9, 2, 3)], {}, "divisible by G"),
        ("propagate", [(1, 4, 2, 3), (1, 2, 8, 2, 3)], {}, "`weights` must have the shape "),
    ],
)
def test_bad_arguments_are_errors_of_one_line(name, arrays, arguments, message):
    with pytest.raises(ValueError, match=r"^.* Received: .*=") as error:
        getattr(compat, name)(*(zeros(*shape) for shape in arrays), **arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("int32", "int32")])
def test_wrong_dtypes_are_errors(dtypes):
    message = rf"same of the dtypes .* Received: x.dtype={dtypes[0]}, w.dtype={dtypes[1]}$"
    with pytest.raises(ValueError, match=message):
        compat.ska(zeros(1, 2, 3, 4, dtype=dtypes[0]), zeros(1, 2, 9, 3, 4, dtype=dtypes[1]))


@pytest.mark.any_backend
def test_package_is_an_attribute_without_keras():
    code = """
import sys, involution
assert "involution.compat" not in sys.modules
functions = involution.compat.__all__
import involution.compat
assert "keras" not in sys.modules
print(*functions)
"""
    assert fresh_process(code).split() == compat.__all__
    assert "compat" in dir(involution)


@pytest.mark.any_backend
def test_functions_have_examples():
    for name in compat.__all__:
        documentation = getattr(compat, name).__doc__
        assert ">>> " in documentation, name
        assert "Source: " in documentation, name


if BACKEND == "torch":
    import torch

    from involution.torch import functional

    def test_torch_functional_has_the_functions():
        for name in compat.__all__:
            assert getattr(functional, name) is getattr(compat, name)
            assert name in functional.__all__

    @pytest.mark.parametrize("case", FIRST, ids=str)
    def test_autocast_computes_in_its_dtype(case):
        first, *others = tensors(case.arrays(), "float32")
        with torch.autocast("cpu", torch.bfloat16):
            # Under autocast a softmax is float32, and a convolution bfloat16.
            y = case.compat(first.bfloat16(), *others)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, case.compat(*(t.bfloat16() for t in (first, *others))))

    def test_convex_upsample_copies_no_windows():
        """The largest tensor kept for the backward pass has the size of the mask."""
        flow = torch.randn(1, 2, 5, 6, requires_grad=True)
        up_mask = torch.randn(1, 576, 5, 6, requires_grad=True)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            compat.convex_upsample(flow, up_mask)
        assert max(sizes) == up_mask.numel()
