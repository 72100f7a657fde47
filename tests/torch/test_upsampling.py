"""InvolutionUpsample equals CARAFE's formula, and refuses what does not fit."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

from involution.torch import (
    InvolutionUpsample1d,
    InvolutionUpsample2d,
    InvolutionUpsample3d,
    functional,
    generators,
)
from tests.support import oracle
from tests.support.paths import FILES

MODULES = {1: InvolutionUpsample1d, 2: InvolutionUpsample2d, 3: InvolutionUpsample3d}


def upsampled(x, kernel, kernel_size, factors, dilation, group_of):
    """x (B, C, *sizes), kernel (B, G, taps, *fine): the formula, position by position."""
    fine = kernel.shape[3:]
    y = np.zeros((*x.shape[:2], *fine))
    for p in np.ndindex(*fine):
        for tap, k in enumerate(np.ndindex(*kernel_size)):
            q = [
                p[i] // factors[i] + k[i] * dilation[i] - (kernel_size[i] - 1) * dilation[i] // 2
                for i in range(len(fine))
            ]
            if all(0 <= q[i] < x.shape[2 + i] for i in range(len(fine))):
                weights = kernel[(slice(None), group_of, tap, *p)]
                y[(..., *p)] += weights * x[(..., *q)]
    return y


@pytest.mark.parametrize("rank", MODULES)
def test_empty_batch(rank):
    module = MODULES[rank](16, 2).eval()
    x = torch.empty(0, 16, *(5, 4, 3)[:rank], requires_grad=True)
    y = module(x)
    assert y.shape == (0, 16, *(10, 8, 6)[:rank])
    y.sum().backward()
    assert x.grad.shape == x.shape


CALLS = [
    # sizes, kernel_size, factors, dilation, groups, layout
    ((7,), (5,), (2,), (1,), 1, "contiguous"),
    ((6,), (4,), (3,), (2,), 3, "interleaved"),
    ((5, 4), (5, 5), (2, 2), (1, 1), 2, "contiguous"),
    ((3, 5), (3, 3), (3, 3), (1, 1), 1, "contiguous"),
    ((3, 4), (3, 5), (2, 3), (2, 1), 6, "interleaved"),
    ((2, 3, 3), (3, 3, 1), (1, 2, 3), (1, 1, 1), 2, "contiguous"),
]


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_function_equals_the_formula(call, memory):
    sizes, kernel_size, factors, dilation, groups, layout = call
    generator = np.random.default_rng(0)
    fine = [n * u for n, u in zip(sizes, factors, strict=True)]
    x = generator.normal(size=(2, 6, *sizes))
    kernel = generator.normal(size=(2, groups, np.prod(kernel_size), *fine))
    dy = generator.normal(size=(2, 6, *fine))
    tensors = [torch.tensor(a) for a in (x, kernel)]
    if memory == "channels_last":
        tensors = [t.movedim(1, -1).contiguous().movedim(-1, 1) for t in tensors]
    tensors = [t.requires_grad_() for t in tensors]
    y = functional.involution(
        *tensors,
        kernel_size,
        padding="same",
        dilation=dilation,
        group_layout=layout,
        upsampling=factors,
    )
    assert y.is_contiguous() == (memory == "contiguous")
    group_of = oracle.groups_of(6, groups, layout)
    apply = functools.partial(
        upsampled, kernel_size=kernel_size, factors=factors, dilation=dilation, group_of=group_of
    )
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


@pytest.mark.parametrize("implementation", ["native", "taps", "reference"])
def test_derivatives_of_second_order(implementation):
    x = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(1, 1, 9, 6, 6, dtype=torch.float64, requires_grad=True)

    def apply(x, kernel):
        return functional.involution(x, kernel, 3, upsampling=(2, 3), implementation=implementation)

    assert torch.autograd.gradgradcheck(apply, (x, kernel), fast_mode=True)


def carafe(module, x, guide=None):
    """The module's output in PyTorch's own operations, for images: CARAFE's published steps."""
    (u, v), (height, width) = module.window.upsampling, module.window.kernel_size
    groups, taps = module.window.groups, height * width
    batch, channels, rows, columns = x.shape
    maps = module.content_encoder(module.channel_compressor(x))
    maps = maps.reshape(batch, groups * taps, u, v, rows, columns)
    maps = torch.einsum("bkuvij->bkiujv", maps).reshape(batch, groups * taps, u * rows, v * columns)
    if guide is not None:
        maps = maps + module.guide_encoder(module.guide_compressor(guide))
    kernel = maps.reshape(batch, groups, taps, u * rows, v * columns).softmax(2)
    windows = nn.functional.unfold(x, (height, width), padding=(height // 2, width // 2))
    windows = windows.reshape(batch, channels * taps, rows, columns)
    windows = windows.repeat_interleave(u, 2).repeat_interleave(v, 3)
    windows = windows.reshape(batch, groups, channels // groups, taps, u * rows, v * columns)
    return (windows * kernel.unsqueeze(2)).sum(3).flatten(1, 2)


@pytest.mark.parametrize("guide_channels", [None, 3])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"scale_factor": 3, "kernel_size": 3, "groups": 2},
        {"scale_factor": (2, 3), "kernel_size": (3, 5), "groups": 4},
    ],
    ids=str,
)
def test_module_equals_carafe(arguments, guide_channels):
    module = InvolutionUpsample2d(8, **arguments, guide_channels=guide_channels).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 8, 5, 3, dtype=torch.float64, requires_grad=True)
    u, v = module.window.upsampling
    inputs = [x]
    if guide_channels:
        inputs.append(torch.randn(2, 3, 5 * u, 3 * v, dtype=torch.float64, requires_grad=True))
    y, expected = module(*inputs), carafe(module, *inputs)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy, sources = torch.randn_like(y), [*inputs, *module.parameters()]
    for found, gradient in zip(
        torch.autograd.grad(y, sources, dy),
        torch.autograd.grad(expected, sources, dy),
        strict=True,
    ):
        torch.testing.assert_close(found, gradient, rtol=1e-11, atol=1e-11)


def test_taps_outside_have_no_weight_in_bounds():
    module = InvolutionUpsample2d(
        4, kernel_size=3, kernel_softmax="in_bounds", return_kernel=True, dtype=torch.float64
    )
    nn.init.normal_(module.content_encoder.weight)
    x = torch.randn(1, 4, 3, 4, dtype=torch.float64)
    y, kernel = module(x)
    maps = module.content_encoder(module.channel_compressor(x))
    exponentials = nn.functional.pixel_shuffle(maps, 2).exp()  # (1, 9, 6, 8)
    inside = torch.zeros(9, 6, 8, dtype=torch.bool)
    for tap, (i, j) in enumerate(np.ndindex(3, 3)):
        for p in np.ndindex(6, 8):
            inside[(tap, *p)] = 0 <= p[0] // 2 + i - 1 < 3 and 0 <= p[1] // 2 + j - 1 < 4
    expected = torch.where(inside, exponentials, 0)
    expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(kernel[:, 0], expected, rtol=1e-12, atol=1e-12)
    # Weights that sum to 1 inside: a constant input is unchanged, also at its border.
    ones = torch.ones_like(x)
    torch.testing.assert_close(module(ones)[0], torch.ones_like(y), rtol=1e-12, atol=1e-12)


def test_state_dict_has_the_names_of_mmcv():
    module = InvolutionUpsample2d(32, scale_factor=3, kernel_size=5, groups=2)
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert shapes == {
        "channel_compressor.weight": (64, 32, 1, 1),
        "channel_compressor.bias": (64,),
        "content_encoder.weight": (25 * 2 * 9, 64, 3, 3),
        "content_encoder.bias": (25 * 2 * 9,),
    }


def test_initial_values_are_those_of_carafe():
    module = InvolutionUpsample2d(64, guide_channels=32)
    for name in ("channel_compressor", "guide_compressor"):
        weight = getattr(module, name).weight
        bound = (6 / (weight.shape[0] + weight.shape[1])) ** 0.5
        assert 0.95 * bound < weight.abs().max() <= bound
    for name in ("content_encoder", "guide_encoder"):
        assert 0.0009 < getattr(module, name).weight.std() < 0.0011
    assert all(not p.any() for n, p in module.named_parameters() if n.endswith("bias"))


def test_own_generators_get_the_guide():
    class Guided(nn.Module):
        def __init__(self, channels, window, guide_channels=None):
            super().__init__()
            self.factors = window.upsampling
            self.coarse = nn.Conv2d(channels, window.taps, 1)
            self.fine = nn.Conv2d(guide_channels, window.taps, 1)

        def forward(self, features, guide):
            return nn.functional.interpolate(
                self.coarse(features), scale_factor=self.factors
            ) + self.fine(guide)

    module = InvolutionUpsample2d(4, 2, 3, guide_channels=3, kernel_generator=Guided)
    x, guide = torch.randn(1, 4, 3, 2), torch.randn(1, 3, 6, 4)
    kernel = module.kernel_generator(x, guide).softmax(1).unsqueeze(1)
    expected = functional.involution(x, kernel, 3, padding="same", upsampling=2)
    torch.testing.assert_close(module(x, guide), expected)
    own = InvolutionUpsample2d(4, 2, 3, kernel_generator=nn.Upsample(scale_factor=2))
    with pytest.raises(ValueError, match=r"groups \* taps = 1 \* 9 .*\(1, 4, 6, 4\)$"):
        own(x)


def test_options_of_the_generator():
    small = functools.partial(generators.Carafe, hidden_channels=5, encoder_size=1)
    module = InvolutionUpsample1d(6, 2, 3, guide_channels=2, kernel_generator=small)
    assert module.channel_compressor.weight.shape == (5, 6, 1)
    assert module.content_encoder.weight.shape == (6, 5, 1)
    assert module.guide_encoder.weight.shape == (3, 5, 1)
    assert module(torch.ones(1, 6, 4), torch.ones(1, 2, 8)).shape == (1, 6, 8)


def test_dropout_of_kernels():
    module = InvolutionUpsample2d(4, kernel_dropout=1.0)
    x = torch.randn(1, 4, 3, 3)
    assert not module(x).any()
    assert module.eval()(x).any()


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: InvolutionUpsample2d(8, 2, 5, 1), TypeError, r"^Only channels and scale_factor"),
        (lambda: InvolutionUpsample2d(8, up_kernel=5), TypeError, "use `kernel_size`"),
        (lambda: InvolutionUpsample2d(8, out_channels=5), TypeError, "output have `channels`"),
        (lambda: InvolutionUpsample2d(0), ValueError, "`channels` must be"),
        (lambda: InvolutionUpsample2d(8, 0), ValueError, r"`scale_factor` must .*scale_factor=0$"),
        (lambda: InvolutionUpsample2d(8, 1.5), ValueError, r"`scale_factor` must .*=1.5$"),
        (lambda: InvolutionUpsample2d(8, groups=3), ValueError, r"`groups` must divide .*=3$"),
        (lambda: InvolutionUpsample2d(8, guide_channels=0), ValueError, "`guide_channels` must be"),
        (lambda: InvolutionUpsample2d(8, kernel_softmax="in"), ValueError, "`kernel_softmax` must"),
        (lambda: InvolutionUpsample2d(8, kernel_generator="x"), ValueError, r"'carafe', .*'x'$"),
        (lambda: InvolutionUpsample2d(8, kernel_dropout=-1), ValueError, "`kernel_dropout` must"),
        (lambda: InvolutionUpsample2d(8, implementation="x"), ValueError, "`implementation` must"),
        (
            lambda: functional.involution(
                torch.ones(1, 2, 4), torch.ones(1, 1, 3, 4), 3, stride=2, upsampling=2
            ),
            ValueError,
            "`strides` must be 1",
        ),
    ],
)
def test_unsuitable_arguments_are_refused(build, error, message):
    with pytest.raises(error, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("guide_channels", "inputs", "message"),
    [
        (None, [(1, 4, 3, 3), (1, 4, 6, 6)], r"only there\. .*guide=\(1, 4, 6, 6\)"),
        (2, [(1, 4, 3, 3)], r"only there\. .*guide=None, guide_channels=2$"),
        (2, [(1, 4, 3, 3), (1, 2, 6, 5)], r"must have the shape \(1, 2, 6, 6\)"),
        (2, [(1, 4, 3, 3), (1, 3, 6, 6)], r"must have the shape \(1, 2, 6, 6\)"),
        (2, [(1, 4, 3, 3), (2, 6, 6)], r"\(guide\) must have the axes"),
        (None, [(1, 5, 3, 3)], "must have 4 channels"),
    ],
)
def test_unsuitable_input_is_refused(guide_channels, inputs, message):
    module = InvolutionUpsample2d(4, guide_channels=guide_channels)
    with pytest.raises(ValueError, match=message):
        module(*map(torch.ones, inputs))


def test_other_dtypes_than_the_parameters_are_refused():
    with pytest.raises(ValueError, match=r"dtype of its parameters, torch\.float32"):
        InvolutionUpsample2d(4)(torch.ones(1, 4, 3, 3, dtype=torch.float64))
    guided = InvolutionUpsample2d(4, guide_channels=3)
    x, guide = torch.ones(1, 4, 3, 3), torch.ones(1, 3, 6, 6, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"`guide` must be of the dtype.*guide\.to\(torch\.float32"
    ):
        guided(x, guide)
    # Without autocast for such devices.
    with pytest.raises(ValueError, match=r"dtype of its parameters, torch\.float32"):
        guided.to("meta")(x.to("meta", torch.float64), guide.to("meta"))


def test_carafe_has_initial_values_of_its_own():
    module = InvolutionUpsample2d(4)
    before = [parameter.clone() for parameter in module.parameters()]
    assert generators.near_depthwise_(module) is module
    for a, b in zip(before, module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_function_equals_the_published_data_of_carafe():
    def load(name, *shape):
        return torch.tensor(np.fromfile(FILES / "carafe" / f"{name}.bin", "<f4").reshape(shape))

    x = load("feat", 2, 64, 3, 3).requires_grad_()
    mask = load("mask", 2, 100, 6, 6).requires_grad_()
    y = functional.involution(x, mask.unflatten(1, (4, 25)), 5, upsampling=2)
    torch.testing.assert_close(y, load("output", 2, 64, 6, 6), rtol=1e-6, atol=1e-6)
    y.sum().backward()
    torch.testing.assert_close(x.grad, load("feat_grad", 2, 64, 3, 3), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mask.grad, load("mask_grad", 2, 100, 6, 6), rtol=1e-5, atol=1e-5)
