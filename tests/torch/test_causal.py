"""Causal involutions: no output depends on later inputs, and steps equal the whole sequence."""

import copy
import functools
import io

import numpy as np
import pytest
import torch
from torch import nn

from involution.ops.native import library
from involution.torch import Involution1d, Involution2d, functional, generators, positionwise

GENERATORS = {
    "default": None,
    "linear": "linear",
    "low_rank": "low_rank",
    "static": "static",
    "contextual": functools.partial(generators.Contextual, context_size=2, reduction_ratio=2),
    "attention": "pairwise_attention",
    "own": lambda channels, window, **factory: nn.Sequential(
        nn.Conv1d(channels, 5, 1, **factory),
        nn.ReLU(),
        nn.Conv1d(5, window.groups * window.taps, 1, **factory),
    ),
}
each_generator = pytest.mark.parametrize("generator", GENERATORS)


def make(generator="default", kernel_size=4, channels=12, **arguments):
    """In eval mode, with random values for all parameters and statistics."""
    arguments = {"groups": 3, "padding": "causal", **arguments}
    module = Involution1d(
        channels, kernel_size, kernel_generator=GENERATORS[generator], **arguments
    )
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                is_scale = "running_var" in name or "bn.weight" in name
                nn.init.uniform_(tensor, 0.5 if is_scale else -1, 1.5 if is_scale else 1)
    return module.eval()


def stepped(module, x, lengths):
    cache, outputs = module.initial_cache(len(x)), []
    for part in x.split(lengths, 2):
        y, cache = module.step(part, cache)
        outputs.append(y)
    return torch.cat(outputs, 2)


# Of the parts of a sequence of 11.
LENGTHS = [[1] * 11, [3, 3, 3, 2], [10, 1], [1, 6, 4]]


@torch.no_grad()
@pytest.mark.long
@pytest.mark.parametrize("kernel_softmax", [False, True, "in_bounds"])
@each_generator
def test_steps_equal_the_sequence_to_the_bit(generator, kernel_softmax):
    for kernel_size in range(2, 8):
        for dilation in (1, 2, 3):
            module = make(generator, kernel_size, dilation=dilation, kernel_softmax=kernel_softmax)
            x = torch.randn(2, 12, 11)
            y = module(x)
            for lengths in LENGTHS[(kernel_size + dilation) % 2 :: 2]:
                assert torch.equal(stepped(module, x, lengths), y), (kernel_size, dilation)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"group_layout": "interleaved", "out_channels": 5}])
@each_generator
def test_steps_equal_the_sequence_in_other_dtypes_and_layouts(generator, options, dtype):
    module = make(generator, 5, channels=48, **options, dtype=dtype)
    for batch in (1, 3):
        x = torch.randn(batch, 48, 11, dtype=dtype)
        y = module(x)
        for lengths in LENGTHS:
            assert torch.equal(stepped(module, x, lengths), y)
        # Of the whole, another memory format.
        last = x.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(module(last), y)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["native", "taps", "reference"])
def test_steps_equal_the_sequence_in_every_implementation(implementation):
    module = make(implementation=implementation)
    x = torch.randn(2, 12, 11)
    for lengths in LENGTHS:
        assert torch.equal(stepped(module, x, lengths), module(x))


def test_a_step_has_positions():
    module = Involution1d(8, 3, padding="causal").eval()
    with pytest.raises(ValueError, match=r"at least one position. Received: \(1, 8, 0\)"):
        module.step(torch.zeros(1, 8, 0), module.initial_cache(1))


@torch.no_grad()
@each_generator
def test_steps_equal_the_sequence_without_the_compiled_core(generator, monkeypatch):
    monkeypatch.setattr(library, "core", lambda: (None, "not built"))
    monkeypatch.setattr(positionwise, "MAX_PRODUCTS", 1000)  # several parts
    module, x = make(generator), torch.randn(2, 12, 11)
    for lengths in LENGTHS:
        assert torch.equal(stepped(module, x, lengths), module(x))
    assert module(x[:0]).shape == (0, 12, 11)


@torch.no_grad()
@pytest.mark.parametrize("kernel_softmax", [False, "in_bounds"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@each_generator
def test_no_output_depends_on_later_inputs(generator, stride, kernel_softmax):
    module = make(generator, dilation=2, stride=stride, kernel_softmax=kernel_softmax)
    x = torch.randn(2, 12, 23)
    y = module(x)
    assert y.shape[2] == -(-23 // stride)
    for t in (0, 7, 21):
        changed = x.clone()
        changed[:, :, t + 1 :] = torch.randn(2, 12, 22 - t)
        unchanged = t // stride + 1
        z = module(changed)
        assert torch.equal(z[:, :, :unchanged], y[:, :, :unchanged])
        if unchanged < y.shape[2]:
            assert not torch.equal(z[:, :, -1], y[:, :, -1])


@torch.no_grad()
@pytest.mark.parametrize("core", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_convolutions_by_position_equal_those_of_pytorch(dtype, core, monkeypatch):
    if not core:
        monkeypatch.setattr(library, "core", lambda: (None, "not built"))
    for taps, channels, outputs in ((1, 1, 1), (1, 33, 7), (3, 8, 5)):
        x = torch.randn(2, channels, 9, dtype=dtype)
        weight = torch.randn(outputs, channels, taps, dtype=dtype)
        for bias in (None, torch.randn(outputs, dtype=dtype)):
            found = positionwise.convolve(x, weight, bias).double()
            expected = nn.functional.conv1d(
                *(t if t is None else t.double() for t in (x, weight, bias))
            )
            tolerance = 1e-13 if dtype == torch.float64 else 2**-7
            assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("kernel_softmax", [False, True, "in_bounds"])
@pytest.mark.parametrize("stride", [1, 3])
def test_module_equals_the_formula(stride, kernel_softmax):
    module = make(
        "linear", 3, dilation=2, stride=stride, kernel_softmax=kernel_softmax, dtype=torch.float64
    )
    x = torch.randn(2, 12, 11, dtype=torch.float64)
    weight, bias = (p.detach().numpy() for p in module.kernel_generator.conv2.parameters())
    expected = np.zeros((2, 12, -(-11 // stride)))
    for p in range(expected.shape[2]):
        end = p * stride
        maps = x.numpy()[:, :, end] @ weight[:, :, 0].T + bias
        kernel = maps.reshape(2, 3, 3)  # groups, taps
        positions = [end - 4, end - 2, end]
        if kernel_softmax:
            kernel = np.exp(kernel)
            if kernel_softmax == "in_bounds":
                kernel[:, :, [q < 0 for q in positions]] = 0
            kernel /= kernel.sum(2, keepdims=True)
        for tap, q in enumerate(positions):
            if q >= 0:
                expected[:, :, p] += np.repeat(kernel[:, :, tap], 4, 1) * x.numpy()[:, :, q]
    np.testing.assert_allclose(module(x).detach(), expected, rtol=1e-12, atol=1e-12)
    # In training, PyTorch's own convolutions.
    np.testing.assert_allclose(module.train()(x).detach(), expected, rtol=1e-12, atol=1e-12)


def test_default_generator_in_training_and_eval():
    module = make(dtype=torch.float64)
    x = torch.randn(2, 12, 11, dtype=torch.float64)
    kernel = module.conv2(module.conv1(x)).unflatten(1, (3, 4))
    expected = functional.involution(x, kernel, 4, padding=((3, 0),))
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)
    module.train()
    statistics = copy.deepcopy(module.conv1.bn.running_mean)
    kernel = copy.deepcopy(module).conv2(copy.deepcopy(module).conv1(x)).unflatten(1, (3, 4))
    expected = functional.involution(x, kernel, 4, padding="causal")
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(module.conv1.bn.running_mean, statistics)


def test_contextual_kernels_are_generated_from_the_past():
    module = make("contextual", dtype=torch.float64)
    generator = module.kernel_generator
    x = torch.randn(2, 12, 9, dtype=torch.float64)
    hidden = generator.conv1(nn.functional.pad(x, (1, 0)))
    kernel = generator.conv2(hidden).unflatten(1, (3, 4))
    expected = functional.involution(x, kernel, 4, padding="causal")
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


def test_attention_is_pytorch_s_with_a_causal_mask():
    module = make("attention", 5, dilation=2, stride=2, dtype=torch.float64)
    x = torch.randn(2, 12, 13, dtype=torch.float64)
    heads = [
        t.unflatten(1, (3, 4)).transpose(2, 3)
        for t in (module.kernel_generator.query(x), module.kernel_generator.key(x), x)
    ]
    distance = torch.arange(13)[:, None] - torch.arange(13)
    mask = (distance >= 0) & (distance < 10) & (distance % 2 == 0)
    y = nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask)
    expected = y.transpose(2, 3).flatten(1, 2)[:, :, ::2]
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("generator", ["default", "low_rank", "attention"])
def test_gradients_in_eval_mode(generator):
    module = make(generator, 3, channels=6, dtype=torch.float64)
    x = torch.randn(1, 6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, x, fast_mode=True)

    def from_parameters(*values):
        return torch.func.functional_call(
            module, dict(zip(dict(module.named_parameters()), values, strict=True)), x
        )

    assert torch.autograd.gradcheck(from_parameters, tuple(module.parameters()), fast_mode=True)


def test_caches():
    module = make(kernel_size=3, dilation=2)
    inputs, valid = module.initial_cache(2)
    assert (inputs.shape, valid.shape, valid.dtype) == ((2, 12, 4), (2, 4), torch.bool)
    assert not inputs.any()
    assert not valid.any()
    x = torch.randn(2, 12, 3)
    _, (inputs, valid) = module.step(x, (inputs, valid))
    assert torch.equal(inputs[:, :, 1:], x)
    assert valid.tolist() == [[False, True, True, True]] * 2
    # A cache that is saved continues the sequence.
    file = io.BytesIO()
    torch.save((inputs, valid), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert torch.equal(module.step(x, loaded)[0], module(torch.cat((x, x), 2))[:, :, 3:])


def test_steps_return_kernels():
    module = make(return_kernel=True, kernel_softmax="in_bounds")
    x = torch.randn(2, 12, 6)
    y, kernel = module(x)
    cache = module.initial_cache(2)
    (first, kernel_first), cache = module.step(x[:, :, :2], cache)
    (rest, kernel_rest), _ = module.step(x[:, :, 2:], cache)
    assert torch.equal(torch.cat((first, rest), 2), y)
    assert torch.equal(torch.cat((kernel_first, kernel_rest), 3), kernel)
    assert not kernel[:, :, :3, 0].any()


def test_hooks_and_own_layers_are_called():
    module, x = make(), torch.randn(2, 12, 7)
    plain = module(x)
    module.conv2.conv.register_forward_hook(lambda _, x, y: 2 * y)
    torch.testing.assert_close(module(x), 2 * plain)


class WholeInput(nn.Module):
    uses_full_input = True

    def forward(self, features):
        return torch.ones(len(features), 12, features.shape[2])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Involution1d(12, 4, padding=1, groups=3), r"Steps require padding='causal' and"),
        (lambda: make(stride=2), r"Received: padding='causal', stride=2$"),
        (lambda: make("contextual", 1), r"at most .* = 0 earlier inputs\. Received: 1$"),
        (
            lambda: Involution1d(12, 4, padding="causal", groups=3, kernel_generator=WholeInput()),
            r"kernel_generator=WholeInput, of the full input$",
        ),
    ],
)
def test_modules_without_steps_are_refused(build, message):
    module = build()
    with pytest.raises(ValueError, match=message):
        module.initial_cache(2)
    cache = torch.zeros(2, 12, 3), torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        module.step(torch.ones(2, 12, 1), cache)


def test_unsuitable_steps_are_refused():
    module = make()
    with pytest.raises(ValueError, match=r"`cache` must have the shapes \(1, 12, 3\)"):
        module.step(torch.ones(1, 12, 2), module.initial_cache(2))
    with pytest.raises(ValueError, match="must have 12 channels"):
        module.step(torch.ones(2, 5, 2), module.initial_cache(2))
    with pytest.raises(ValueError, match="`batch_size` must be"):
        module.initial_cache(0)
    with pytest.raises(ValueError, match="one spatial dimension"):
        Involution2d(12, padding="causal", groups=3)
    with pytest.raises(ValueError, match="`kernel_softmax` must be False, True or 'in_bounds'"):
        Involution1d(12, groups=3, kernel_softmax="inside")


# The generator of low rank.


@pytest.mark.parametrize("padding", ["causal", "symmetric"])
def test_low_rank_begins_as_a_depthwise_convolution_with_a_shortcut(padding):
    low_rank = functools.partial(generators.LowRank, rank=5)
    module = Involution1d(12, 3, padding=padding, groups=12, kernel_generator=low_rank)
    x = torch.randn(2, 12, 9)
    generator = module.kernel_generator
    assert generator.conv1.conv.weight.shape == (5, 12, 1)
    assert [n for n, _ in generator.named_parameters()] == [
        *("conv1.conv.weight", "conv2.conv.weight", "conv2.conv.bias")
    ]
    bias = generator.conv2.conv.bias.detach()
    assert 0.8 / 3**0.5 < bias.abs().max() <= 1 / 3**0.5
    pad = (2, 0) if padding == "causal" else (1, 1)
    convolved = nn.functional.conv1d(nn.functional.pad(x, pad), bias.reshape(12, 1, 3), groups=12)
    torch.testing.assert_close(module(x).detach(), x + convolved)
    plain = functools.partial(low_rank, residual=False)
    without = Involution1d(12, 3, padding=padding, groups=12, kernel_generator=plain)
    without.load_state_dict(module.state_dict())
    torch.testing.assert_close(without(x).detach(), convolved)


@pytest.mark.parametrize("residual", [True, False])
def test_low_rank_equals_the_formula(residual, executed):
    low_rank = functools.partial(generators.LowRank, residual=residual)
    module = Involution2d(20, (3, 2), groups=20, kernel_generator=low_rank, dtype=torch.float64)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    first, weight, bias = (p.detach() for p in module.parameters())
    x = torch.randn(2, 20, 5, 9, dtype=torch.float64)
    maps = torch.einsum("kr,rc,bcij->bkij", weight[..., 0, 0], first[..., 0, 0], x[..., :8])
    kernel = (maps + bias[:, None, None]).unflatten(1, (20, 6))
    if residual:
        kernel[:, :, 2] += 1  # of 3 x 2 taps, row 1 and column 0
    expected = functional.involution(x, kernel, (3, 2))
    del executed[:]
    torch.testing.assert_close(module(x).detach(), expected, rtol=1e-11, atol=1e-11)
    assert executed == ["fused"]


def test_rank_is_checked():
    with pytest.raises(ValueError, match=r"`rank` must be .*rank=0$"):
        generators.LowRank(12, Involution1d(12, 3).window, 0)


def test_caches_keep_no_graphs():
    module = Involution1d(12, 3, padding="causal", groups=3).eval()
    x = torch.randn(2, 12, 4, requires_grad=True)
    y, cache = module.step(x, module.initial_cache(2))
    assert y.requires_grad
    assert not any(part.requires_grad for part in cache)
