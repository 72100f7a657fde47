"""InvolutionTranspose equals PyTorch's transposed convolution, and the formula in loops."""

import numpy as np
import pytest
import torch
from torch import nn

from involution.torch import (
    Involution2d,
    InvolutionTranspose1d,
    InvolutionTranspose2d,
    InvolutionTranspose3d,
    functional,
)
from tests.support import oracle

MODULES = {1: InvolutionTranspose1d, 2: InvolutionTranspose2d, 3: InvolutionTranspose3d}
CONVOLVE = {
    1: nn.functional.conv_transpose1d,
    2: nn.functional.conv_transpose2d,
    3: nn.functional.conv_transpose3d,
}


def scattered(x, kernel, kernel_size, stride, before, dilation, out, group_of):
    """x (B, C, *sizes), kernel (B, G, taps, *sizes): every position adds to its window."""
    y = np.zeros((*x.shape[:2], *out))
    for p in np.ndindex(*x.shape[2:]):
        for tap, k in enumerate(np.ndindex(*kernel_size)):
            q = [p[i] * stride[i] - before[i] + k[i] * dilation[i] for i in range(len(out))]
            if all(0 <= q[i] < out[i] for i in range(len(out))):
                y[(..., *q)] += kernel[(slice(None), group_of, tap, *p)] * x[(..., *p)]
    return y


CALLS = [
    # sizes, kernel_size, stride, padding, output_padding, dilation, groups, layout
    ((7,), (4,), (2,), ((1, 2),), (1,), (1,), 2, "contiguous"),
    ((5,), (2,), (3,), ((0, 0),), (2,), (1,), 1, "interleaved"),
    ((4, 5), (3, 3), (1, 1), ((1, 1), (1, 1)), (0, 0), (1, 1), 6, "contiguous"),
    ((4, 3), (3, 5), (2, 3), ((1, 1), (2, 0)), (1, 2), (1, 2), 3, "interleaved"),
    ((2, 3, 2), (3, 2, 1), (1, 2, 2), ((0, 1), (0, 0), (0, 0)), (0, 1, 0), (1, 1, 1), 2,
     "contiguous"),
]  # fmt: skip


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("implementation", [None, "taps", "reference"])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_function_equals_the_formula(call, implementation, memory):
    sizes, kernel_size, stride, padding, rest, dilation, groups, layout = call
    generator = np.random.default_rng(0)
    dimensions = zip(sizes, kernel_size, stride, padding, rest, dilation, strict=True)
    out = [(n - 1) * s + (k - 1) * d + 1 - sum(pair) + r for n, k, s, pair, r, d in dimensions]
    x = generator.normal(size=(2, 6, *sizes))
    kernel = generator.normal(size=(2, groups, np.prod(kernel_size), *sizes))
    dy = generator.normal(size=(2, 6, *out))
    tensors = [torch.tensor(a) for a in (x, kernel)]
    if memory == "channels_last":
        tensors = [t.movedim(1, -1).contiguous().movedim(-1, 1) for t in tensors]
    tensors = [t.requires_grad_() for t in tensors]
    y = functional.transposed_involution(
        *tensors,
        kernel_size,
        stride=stride,
        padding=padding,
        output_padding=rest,
        dilation=dilation,
        group_layout=layout,
        implementation=implementation,
    )
    assert y.is_contiguous() == (memory == "contiguous")
    before, group_of = [pair[0] for pair in padding], oracle.groups_of(6, groups, layout)

    def apply(x, kernel):
        return scattered(x, kernel, kernel_size, stride, before, dilation, out, group_of)

    np.testing.assert_allclose(y.detach(), apply(x, kernel), rtol=1e-12, atol=1e-12)
    # Both gradients, by the linearity of the formula in each: along random directions.
    for i, gradient in enumerate(torch.autograd.grad(y, tensors, torch.tensor(dy))):
        for _ in range(3):
            direction = generator.normal(size=gradient.shape)
            arguments = [x, kernel]
            arguments[i] = direction
            expected = (apply(*arguments) * dy).sum()
            found = (gradient.numpy() * direction).sum()
            np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("rank", "kernel_size", "arguments"),
    [
        (1, 4, {"stride": 2, "padding": 1}),
        (2, 3, {"stride": 2, "output_padding": 1}),
        (2, (5, 3), {"stride": (3, 1), "dilation": (1, 2), "output_padding": (2, 0)}),
        (2, 4, {"stride": 3, "padding": "valid"}),
        (2, 3, {}),
        (3, 2, {"stride": 2, "padding": (0, 1, 0)}),
    ],
)
def test_static_kernels_are_a_transposed_depthwise_convolution(rank, kernel_size, arguments):
    module = MODULES[rank](
        6, kernel_size, groups=6, kernel_generator="static", dtype=torch.float64, **arguments
    )
    sizes = module.window.kernel_size
    dilation = module.window.dilation_rate
    padding = arguments.get("padding", "symmetric")
    if padding == "symmetric":
        padding = [(k - 1) * d // 2 for k, d in zip(sizes, dilation, strict=True)]
    x = torch.randn(2, 6, *(5, 4, 3)[:rank], dtype=torch.float64)
    expected = CONVOLVE[rank](
        x,
        module.kernel_generator.weight.reshape(6, 1, *sizes),
        stride=arguments.get("stride", 1),
        padding=0 if padding == "valid" else padding,
        output_padding=arguments.get("output_padding", 0),
        dilation=dilation,
        groups=6,
    )
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 2), (4, 2), (2, 3), (5, 3), (3, 1)])
def test_same_padding_multiplies_the_sizes(kernel_size, stride):
    module = InvolutionTranspose2d(4, kernel_size, stride=stride, padding="same", groups=1)
    assert module(torch.ones(1, 4, 5, 3)).shape == (1, 4, 5 * stride, 3 * stride)


def test_kernels_are_those_of_the_paper_at_the_input():
    arguments = {"groups": 2, "kernel_softmax": True, "return_kernel": True}
    module = InvolutionTranspose2d(8, 3, stride=2, output_padding=1, **arguments)
    plain = Involution2d(8, 3, **arguments)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(2, 8, 5, 4)
    y, kernel = module(x)
    assert y.shape == (2, 8, 10, 8)
    torch.testing.assert_close(kernel, plain(x)[1])
    # A softmax spreads each position: none of the input is lost or added, without cut-off.
    uncut = InvolutionTranspose2d(8, 3, stride=2, padding="valid", groups=2, kernel_softmax=True)
    uncut.load_state_dict(module.state_dict())
    torch.testing.assert_close(uncut(x).sum((2, 3)), x.sum((2, 3)), rtol=1e-4, atol=1e-4)


def test_projection_and_dropout():
    module = InvolutionTranspose2d(8, 3, stride=2, out_channels=5, kernel_dropout=1.0)
    x = torch.randn(1, 8, 4, 4)
    bias = module.projection.bias.detach()
    torch.testing.assert_close(module(x).detach(), bias[:, None, None].expand(1, 5, 7, 7))
    assert module.eval()(x).std() > 0


def test_representation():
    module = InvolutionTranspose2d(
        8, 3, stride=2, padding="valid", output_padding=1, dilation=2, groups=2
    )
    text = "8, kernel_size=(3, 3), stride=(2, 2), padding='valid', output_padding=(1, 1), "
    assert module.extra_repr() == text + "dilation=(2, 2), groups=2"


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: InvolutionTranspose2d(8, 16, 3), TypeError, "Only channels and kernel_size"),
        (lambda: InvolutionTranspose2d(8, strides=2), TypeError, "use `stride`"),
        (lambda: InvolutionTranspose2d(8, 3, output_padding=1), ValueError, "fewer additional"),
        (lambda: InvolutionTranspose2d(8, 3, output_padding=-1), ValueError, "`output_padding` m"),
        (lambda: InvolutionTranspose2d(8, 3, stride=0), ValueError, "`stride` must be"),
        (lambda: InvolutionTranspose1d(8, 3, padding="causal"), ValueError, "'causal'"),
        (lambda: InvolutionTranspose2d(8, kernel_softmax="in_bounds"), ValueError, "are cut off"),
        (lambda: InvolutionTranspose2d(8, 3, groups=3), ValueError, "`groups` must divide"),
    ],
)
def test_unsuitable_arguments_are_refused(build, error, message):
    with pytest.raises(error, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_unsuitable_tensors_are_refused():
    x = torch.ones(1, 4, 3, 3)
    with pytest.raises(ValueError, match=r"shape \(1, 1, 9, 3, 3\): .* sizes of the input"):
        functional.transposed_involution(x, torch.ones(1, 1, 9, 6, 6), 3, stride=2)
    with pytest.raises(ValueError, match="axes of batch, groups and taps"):
        functional.transposed_involution(x, torch.ones(1, 9, 3, 3), 3)
    with pytest.raises(ValueError, match="must have 8 channels"):
        InvolutionTranspose2d(8, 3)(x)
    with pytest.raises(ValueError, match="output size must be at least 1"):
        InvolutionTranspose2d(4, 3, padding=5)(torch.ones(1, 4, 2, 2))
