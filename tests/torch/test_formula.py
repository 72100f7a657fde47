"""Outputs and gradients equal the formula in float64, and the Keras generators."""

import functools

import keras
import numpy as np
import pytest
import torch

import involution
from involution.ops.centers import every_center
from involution.torch import Involution1d, Involution2d, Involution3d, functional, generators
from tests.support import oracle
from tests.support.backends import numpy

MODULES = {1: Involution1d, 2: Involution2d, 3: Involution3d}
BELOW = 1e-12


def group_major(kernel):
    """From (B, *out, taps, groups) to (B, groups, taps, *out), NumPy arrays."""
    return np.moveaxis(kernel, (-1, -2), (1, 2))


def channels_first(call):
    """The call's arrays x, kernel and dy with channels on axis 1, as float64 tensors."""
    x, kernel, dy = call.arrays()
    arrays = np.moveaxis(x, -1, 1), group_major(kernel), np.moveaxis(dy, -1, 1)
    return [torch.tensor(a).contiguous() for a in arrays]


CALLS = [c for c in oracle.random_calls(48, seed=5) if c.data_format == "channels_last"]


@pytest.mark.parametrize("is_channels_last", [False, True])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_function_equals_formula(call, is_channels_last):
    x, kernel, dy = channels_first(call)
    expected, _ = call.involution(*call.arrays()[:2])
    gradients = call.gradients(*call.arrays())
    if is_channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    x.requires_grad_()
    kernel.requires_grad_()
    y = functional.involution(
        x,
        kernel,
        call.kernel_size,
        stride=call.strides,
        padding=call.padding,
        dilation=call.dilation_rate,
        group_layout=call.group_layout,
        upsampling=call.upsampling or 1,
    )
    assert np.abs(y.detach().numpy() - np.moveaxis(expected, -1, 1)).max() < BELOW
    dx, dkernel = torch.autograd.grad(y, (x, kernel), dy)
    assert np.abs(dx.numpy() - np.moveaxis(gradients[0], -1, 1)).max() < BELOW
    assert np.abs(dkernel.numpy() - group_major(gradients[1])).max() < BELOW


def arguments_of(call):
    return {
        "stride": call.strides,
        "padding": call.padding,
        "dilation": call.dilation_rate,
        "groups": call.groups,
        "group_layout": call.group_layout,
    }


WINDOWS = [
    oracle.Call(2, (9,), 6, (3,), (2,), "symmetric", (1,), 2),
    oracle.Call(2, (8,), 6, (4,), (1,), "same", (2,), 3, "interleaved"),
    oracle.Call(2, (7, 6), 6, (3, 5), (1, 2), "symmetric", (1, 1), 2),
    oracle.Call(2, (7, 6), 6, (2, 4), (2, 1), "same", (1, 1), 2),
    oracle.Call(2, (7, 8), 6, (4, 2), (1, 3), "symmetric", (1, 2), 3),
    oracle.Call(2, (7, 8), 6, (3, 3), (2, 2), "valid", (1, 1), 2, "interleaved"),
    oracle.Call(2, (7, 6), 4, (3, 3), (1, 1), ((1, 0), (0, 1)), (1, 1), 2),
    oracle.Call(1, (4, 5, 3), 4, (3, 2, 3), (1, 2, 1), "symmetric", (1, 1, 1), 2),
    oracle.Call(1, (5, 4, 3), 4, (1, 3, 2), (2, 1, 2), "same", (1, 1, 1), 4, "interleaved"),
]


def pooled(features, strides, sizes):
    """Means of the windows of the strides, of the positions inside; channels last."""
    result = np.zeros((len(features), *sizes, features.shape[-1]))
    for p in np.ndindex(*sizes):
        parts = tuple(slice(i * s, i * s + s) for i, s in zip(p, strides, strict=True))
        window = features[(slice(None), *parts)]
        result[(slice(None), *p)] = window.mean(tuple(range(1, window.ndim - 1)))
    return result


def features_of(x, call):
    """The input from the first window's center on."""
    parts = []
    for i, (out, stride) in enumerate(zip(call.output_sizes, call.strides, strict=True)):
        center = first_center(call, i)
        parts.append(slice(center, center + out * stride))
    return x[(slice(None), *parts)]


def kernels_of(module, hidden, call):
    """The kernels (B, *out, taps, groups) of the paper's generator in inference, in NumPy."""
    state = {n: p.detach().numpy() for n, p in module.state_dict().items()}
    if "conv1.conv.weight" in state:
        hidden = hidden @ state["conv1.conv.weight"].reshape(-1, hidden.shape[-1]).T
        scale = state["conv1.bn.weight"] / np.sqrt(state["conv1.bn.running_var"] + 1e-5)
        hidden = (hidden - state["conv1.bn.running_mean"]) * scale + state["conv1.bn.bias"]
        hidden = np.maximum(hidden, 0)
    last = "conv2.conv" if "conv2.conv.weight" in state else "kernel_generator.conv2.conv"
    kernel = (
        hidden @ state[f"{last}.weight"].reshape(-1, hidden.shape[-1]).T + state[f"{last}.bias"]
    )
    return np.moveaxis(kernel.reshape(*kernel.shape[:-1], call.groups, call.taps), -1, -2)


def randomize(module):
    """Random values for all parameters and statistics, so that none is without effect."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                positive = "running_var" in name or "bn.weight" in name
                torch.nn.init.uniform_(tensor, 0.5 if positive else -1, 1.5 if positive else 1)
    return module.eval()


@pytest.mark.parametrize("generator", [None, "linear"])
@pytest.mark.parametrize("call", WINDOWS, ids=str)
def test_module_equals_formula(call, generator):
    module = MODULES[len(call.sizes)](
        call.channels,
        call.kernel_size,
        **arguments_of(call),
        reduction_ratio=2,
        kernel_generator=generator,
        dtype=torch.float64,
    )
    randomize(module)
    x = call.arrays()[0]
    hidden = pooled(features_of(x, call), call.strides, call.output_sizes)
    expected, _ = call.involution(x, kernels_of(module, hidden, call))
    contiguous = torch.tensor(np.moveaxis(x, -1, 1).copy())
    for tensor in (contiguous, torch.tensor(x).movedim(-1, 1)):
        y = module(tensor).detach().numpy()
        assert y.shape[2:] == call.output_sizes
        assert np.abs(y - np.moveaxis(expected, -1, 1)).max() < BELOW


def test_kernel_softmax_normalizes_over_the_taps():
    plain = Involution2d(8, 3, groups=2, return_kernel=True, dtype=torch.float64)
    module = Involution2d(
        8, 3, groups=2, return_kernel=True, kernel_softmax=True, dtype=torch.float64
    )
    module.load_state_dict(plain.state_dict())
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    exponentials = plain(x)[1].exp()
    expected = exponentials / exponentials.sum(2, keepdim=True)
    y, kernel = module(x)
    assert (kernel - expected).abs().max() < BELOW
    assert (functional.involution(x, expected, 3) - y).abs().max() < BELOW


def test_projection_follows_the_involution():
    module = Involution2d(8, 3, groups=2, out_channels=5, dtype=torch.float64)
    plain = Involution2d(8, 3, groups=2, dtype=torch.float64)
    missing, unexpected = plain.load_state_dict(module.state_dict(), strict=False)
    assert (missing, sorted(unexpected)) == ([], ["projection.bias", "projection.weight"])
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    weight, bias = module.projection.weight[:, :, 0, 0], module.projection.bias
    expected = torch.einsum("oc,bchw->bohw", weight, plain(x)) + bias[:, None, None]
    assert (module(x) - expected).abs().max() < BELOW


# From a Keras weight to the PyTorch parameter, by the order of a generator's weights.
def convolution_weight(weight):
    return np.moveaxis(weight, (-1, -2), (0, 1))


def last_weight(weight, taps):
    """Channels tap-major to group-major."""
    *rest, channels = weight.shape
    weight = weight.reshape(*rest, taps, channels // taps).swapaxes(-1, -2)
    return weight.reshape(*rest, channels)


def copy_from_keras(module, layer, taps):
    """Sets the parameters of a module's generator to the weights of a Keras generator."""
    owner = module if module.kernel_generator is None else module.kernel_generator
    source = {"/".join(w.path.split("/")[-2:]): numpy(w.value) for w in layer.weights}
    found = dict(owner.named_parameters()) | dict(owner.named_buffers())
    targets = {
        "reduce/kernel": ("conv1.conv.weight", convolution_weight),
        "normalization/gamma": ("conv1.bn.weight", np.asarray),
        "normalization/beta": ("conv1.bn.bias", np.asarray),
        "normalization/moving_mean": ("conv1.bn.running_mean", np.asarray),
        "normalization/moving_variance": ("conv1.bn.running_var", np.asarray),
        "expand/kernel": ("conv2.conv.weight", lambda w: convolution_weight(last_weight(w, taps))),
        "expand/bias": ("conv2.conv.bias", lambda b: last_weight(b, taps)),
        "query/kernel": ("query.weight", convolution_weight),
        "query/bias": ("query.bias", np.asarray),
        "key/kernel": ("key.weight", convolution_weight),
        "key/bias": ("key.bias", np.asarray),
        "static/kernel": ("weight", lambda w: w.reshape(taps, -1).T),
    }
    for name, value in source.items():
        target, convert = targets[name]
        with torch.no_grad():
            found.pop(target).copy_(torch.tensor(convert(value)))
    assert [n for n in found if "num_batches_tracked" not in n] == []


GENERATORS = {
    "bottleneck": ("bottleneck", lambda k: k.Bottleneck(2)),
    "contextual": (
        functools.partial(generators.Contextual, reduction_ratio=2, context_size=5),
        lambda k: k.Contextual(2, context_size=5),
    ),
    "linear": ("linear", lambda k: k.Linear()),
    "pairwise_attention": (
        functools.partial(generators.PairwiseAttention, key_channels=3),
        lambda k: k.PairwiseAttention(key_channels=3),
    ),
    "static": ("static", lambda k: k.Static()),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("index", [0, 2, 5, 7])
def test_generators_equal_those_for_keras(index, name, training):
    call = WINDOWS[index]
    generator, make_keras_generator = GENERATORS[name]
    module = MODULES[len(call.sizes)](
        call.channels,
        call.kernel_size,
        **arguments_of(call),
        reduction_ratio=2,
        kernel_generator=generator,
    )
    layer = getattr(involution, f"Involution{len(call.sizes)}D")(
        call.kernel_size,
        strides=call.strides,
        padding=call.padding,
        dilation_rate=call.dilation_rate,
        groups=call.groups,
        group_layout=call.group_layout,
        kernel_generator=make_keras_generator(involution.kernel_generators),
        data_format="channels_last",
    )
    x = call.arrays()[0].astype("float32")
    layer(x)
    for weight in layer.weights:
        weight.assign(keras.random.uniform(weight.shape, 0.5, 1.5))
    copy_from_keras(module, layer.kernel_generator, call.taps)
    expected = np.moveaxis(numpy(layer(x, training=training)), -1, 1)
    y = module.train(training)(torch.tensor(np.moveaxis(x, -1, 1))).detach().numpy()
    assert np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max()
    statistics = [n for n in module.state_dict() if "running" in n]
    assert bool(statistics) == (name in ("bottleneck", "contextual"))


def has_centers_inside(call):
    """Whether the center of every window is inside the input."""
    dimensions = enumerate(zip(call.sizes, call.output_sizes, call.strides, strict=True))
    return all(
        first_center(call, i) >= 0 and first_center(call, i) + (out - 1) * stride < n
        for i, (n, out, stride) in dimensions
    )


def first_center(call, i):
    if call.padding == "same":
        return 0
    last = (call.kernel_size[i] - 1) * call.dilation_rate[i]
    return last // 2 - oracle.pads(0, last + 1, 1, 1, call.padding, i)[0]


CENTERED = [
    call
    for call in oracle.random_calls(200, seed=6)
    if not call.upsampling and call.padding != "causal" and has_centers_inside(call)
]


@pytest.mark.parametrize("call", CENTERED, ids=str)
def test_queries_are_at_the_centers_of_the_windows(call):
    window = functional.make_window(
        *(call.kernel_size, call.strides, call.padding, call.dilation_rate),
        *(1, "contiguous", len(call.sizes)),
    )
    positions = torch.tensor(np.stack(np.indices(call.sizes))[None])
    expected = np.stack(np.indices(call.output_sizes))
    for i, stride in enumerate(call.strides):
        expected[i] = first_center(call, i) + stride * expected[i]
    found = positions[(0, slice(None), *every_center(window))]
    np.testing.assert_array_equal(found, expected)
