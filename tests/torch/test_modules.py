"""Involution modules do what PyTorch users expect of a module."""

import copy
import io
import itertools
import os
import pickle
import subprocess
import sys

import keras
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import involution
from involution.torch import (
    Involution1d,
    Involution2d,
    Involution3d,
    LazyInvolution1d,
    LazyInvolution2d,
    functional,
    generators,
)
from tests.support import oracle
from tests.support.backends import fresh_process

# One of each path: fused, with pooling, stored kernels of each kind, a crop of the features.
VARIANTS = {
    "default": {},
    "strided": {"stride": 2},
    "linear": {"kernel_generator": "linear"},
    "contextual": {"kernel_generator": "contextual"},
    "large_context": {"kernel_generator": "large_context"},
    "low_rank": {"kernel_generator": "low_rank"},
    "static": {"kernel_generator": "static"},
    "attention": {"kernel_generator": "pairwise_attention"},
    "softmax": {"kernel_softmax": True, "padding": "valid"},
    "interleaved": {"group_layout": "interleaved", "dilation": 2},
    "projected": {"out_channels": 5},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def make(variant="default", channels=32, **arguments):
    return Involution2d(channels, 3, **VARIANTS[variant], **arguments)


def images(*sizes, **arguments):
    return torch.randn(2, 32, *(sizes or (9, 10)), **arguments)


# Faults of Keras layers that are used as PyTorch modules.


def test_train_and_eval_change_batch_normalization():
    module, x = make(), 3 + images()
    before = module.conv1.bn.running_mean.clone()
    trained = module.train()(x)
    assert not torch.equal(module.conv1.bn.running_mean, before)
    statistics = module.conv1.bn.running_mean.clone()
    assert not torch.allclose(module.eval()(x), trained)
    assert torch.equal(module.conv1.bn.running_mean, statistics)


@each_variant
def test_optimizer_made_before_the_first_call_trains_all_parameters(variant):
    module = make(variant)
    before = copy.deepcopy(module.state_dict())
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    for _ in range(2):  # in the first step, conv2 of low_rank is 0 and conv1 has no gradient
        (module(images()) * images(9, 10)[:, :1, :1, :1]).sum().backward()
        optimizer.step()
    for name, parameter in module.named_parameters():
        if name != "kernel_generator.key.bias":  # without effect on a softmax
            assert not torch.equal(parameter, before[name]), name


def test_state_dict_has_the_paper_s_names_each_once():
    names = [
        "conv1.conv.weight",
        *(f"conv1.bn.{n}" for n in ("weight", "bias", "running_mean", "running_var")),
        "conv1.bn.num_batches_tracked",
        "conv2.conv.weight",
        "conv2.conv.bias",
    ]
    module = make()
    assert list(module.state_dict()) == names
    assert {n for n, _ in module.named_parameters()} <= set(names)
    assert len(list(module.parameters())) == 5


@each_variant
def test_state_dict_loads_into_another_instance(variant):
    module, other = make(variant).eval(), make(variant).eval()
    file, x = io.BytesIO(), images()
    torch.save(module.state_dict(), file)
    file.seek(0)
    assert not torch.equal(other(x), module(x))
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(other(x), module(x))


@each_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_conversion_of_dtype(variant, dtype):
    module, x = make(variant).eval(), images().to(torch.bfloat16).float()
    module.load_state_dict({n: t.to(dtype).to(t.dtype) for n, t in module.state_dict().items()})
    expected = module(x)
    x = x.to(dtype).requires_grad_()
    y = module.to(dtype)(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert all(t.grad.dtype == dtype for t in (x, *module.parameters()) if t.grad is not None)
    tolerance = {torch.bfloat16: 0.05, torch.float16: 0.005, torch.float64: 1e-5}[dtype]
    scale = expected.abs().max()
    assert (y.float() - expected).abs().max() < tolerance * scale


def test_channels_last_axis_is_refused():
    message = (
        r"must have 32 channels on axis 1; for channels on the last axis, "
        r"x\.permute\(0, 3, 1, 2\)\. Received: x\.shape=\(2, 9, 10, 32\)$"
    )
    with pytest.raises(ValueError, match=message):
        make()(torch.ones(2, 9, 10, 32))


# Input that is refused.


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            torch.ones(32, 9, 10),
            r"\(batch, channels, 2 spatial\)\. Received: x.shape=\(32",
        ),
        (torch.ones(2, 16, 9, 10), r"32 channels on axis 1\. Received: x.shape=\(2, 16, 9, 10\)$"),
        (torch.ones(2, 32, 9, 10, dtype=torch.int64), r"floating-point .*x.dtype=torch.int64$"),
    ],
)
def test_unsuitable_input_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        make()(x)


def test_windows_that_do_not_fit_are_refused():
    rule = r"at least 1\. Received: output sizes \(-1, 3\), input sizes \(5, 9\)"
    with pytest.raises(ValueError, match=rule):
        Involution2d(32, 7, padding="valid")(images(5, 9))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: Involution2d(64, 64, 3),
            TypeError,
            r"^Only channels and kernel_size of Involution2d\(\) may be positional\. .*"
            r"Involution2d\(64, 3, out_channels=128\).*Received: Involution2d\(64, 64, 3\)$",
        ),
        (
            lambda: Involution2d(64, in_channels=3),
            TypeError,
            "no argument `in_channels`: ",
        ),
        (lambda: Involution2d(64, strides=2), TypeError, "no argument `strides`: use `stride`"),
        (lambda: Involution2d(64, dilation_rate=2), TypeError, "use `dilation`"),
        (lambda: Involution2d(64, filters=2), TypeError, "`out_channels` adds a 1x1"),
        (lambda: Involution2d(64, bias=True), TypeError, "an involution has none"),
        (
            lambda: Involution2d(64, padding_mode="reflect"),
            TypeError,
            "outside the input",
        ),
        (lambda: Involution2d(64, colour=1), TypeError, "colour"),
        (lambda: Involution2d(64, groups=5), ValueError, "`groups` must divide .*groups=5$"),
        (lambda: Involution2d(40), ValueError, "`group_channels` must divide .*group_channels=16$"),
        (lambda: Involution2d(0), ValueError, "`channels` must be .*channels=0$"),
        (lambda: Involution2d(64, 0), ValueError, "`kernel_size` must be .*kernel_size=0$"),
        (lambda: Involution2d(64, padding=4), ValueError, "inside the input: at most"),
        (lambda: Involution2d(64, padding="full"), ValueError, "`padding` must be .*'full'$"),
        (lambda: Involution2d(2), ValueError, "`reduction_ratio` must leave .*channels=2$"),
        (lambda: Involution2d(64, kernel_dropout=2), ValueError, "`kernel_dropout` must .*=2$"),
        (lambda: Involution2d(64, kernel_generator="x"), ValueError, "one of bottleneck, .*'x'$"),
        (lambda: Involution2d(64, implementation="x"), ValueError, "`implementation` must be"),
        (lambda: Involution2d(64, out_channels=0), ValueError, "`out_channels` must be"),
        (lambda: LazyInvolution2d(kernel_size=0), ValueError, "`kernel_size` must be"),
        (lambda: LazyInvolution2d(strides=1), TypeError, "use `stride`"),
    ],
)
def test_unsuitable_arguments_are_refused(build, error, message):
    with pytest.raises(error, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(2, 17, 9, 10), (2, 9, 9, 10), (2, 18, 9, 9), (2, 18, 90)])
def test_unsuitable_kernel_maps_are_refused(shape):
    class Generator(nn.Module):
        def forward(self, features):
            return torch.ones(shape)

    with pytest.raises(ValueError, match="Received: "):
        Involution2d(32, 3, kernel_generator=Generator())(images())


# The formula, in one to three dimensions, through `functional.involution`.


def as_last(array):
    return np.moveaxis(array, 1, -1)


@pytest.mark.parametrize("layout", ["contiguous", "interleaved"])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize(
    ("sizes", "kernel_size", "stride", "padding", "dilation"),
    [
        ((11,), (4,), (2,), "symmetric", (1,)),
        ((7, 8), (3, 2), (1, 2), "same", (2, 1)),
        ((7, 8), (3, 3), (1, 1), ((1, 0), (2, 2)), (1, 1)),
        ((7, 8), (5, 3), (3, 1), "valid", (1, 1)),
        ((3, 5, 4), (3, 1, 2), (1, 2, 1), "symmetric", (1, 1, 2)),
    ],
)
def test_operator_equals_the_formula(
    sizes, kernel_size, stride, padding, dilation, layout, contiguous
):
    generator = np.random.default_rng(0)
    call = kernel_size, stride, padding, dilation
    out = oracle.tap_pairs(sizes, *call)[0]
    x = generator.normal(size=(2, 6, *sizes))
    kernel = generator.normal(size=(2, 2, np.prod(kernel_size), *out))
    dy = generator.normal(size=(2, 6, *out))
    tensors = [torch.tensor(a) for a in (x, kernel)]
    if not contiguous:
        tensors = [t.movedim(1, -1).contiguous().movedim(-1, 1) for t in tensors]
    tensors = [t.requires_grad_() for t in tensors]
    y = functional.involution(
        *tensors,
        kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        group_layout=layout,
    )
    assert y.is_contiguous() == contiguous
    found = [y, *torch.autograd.grad(y, tensors, torch.tensor(dy))]
    last = as_last(x), np.moveaxis(kernel, (1, 2), (-1, -2))
    dx, dkernel = oracle.gradients(*last, as_last(dy), *call, layout)
    expected = (
        oracle.involution(*last, *call, layout)[0],
        dx,
        np.moveaxis(dkernel, (-1, -2), (1, 2)),
    )
    expected = [np.moveaxis(expected[0], -1, 1), np.moveaxis(expected[1], -1, 1), expected[2]]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.detach(), b, rtol=1e-12, atol=1e-12)


def test_integers_are_symmetric_padding():
    x, kernel = torch.randn(1, 2, 5, 6), torch.randn(1, 1, 15, 5, 8)
    y = functional.involution(x, kernel, (3, 5), padding=(1, 3))
    assert torch.equal(y, functional.involution(x, kernel, (3, 5), padding=((1, 1), (3, 3))))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [1, 2])
def test_groups_must_divide_the_channels(batch, memory_format):
    x = torch.ones(batch, 5, 4, 4).contiguous(memory_format=memory_format)
    for apply in (functional.involution, functional.transposed_involution):
        with pytest.raises(
            ValueError, match=r"divisible by `groups`.*groups=2, x\.shape=\(.*, 5, 4"
        ):
            apply(x, torch.ones(batch, 2, 9, 4, 4), 3)


def test_kernels_of_wrong_rank_are_refused():
    with pytest.raises(ValueError, match=r"axes of batch, groups and taps, and 2 spatial axes\. "):
        functional.involution(torch.ones(1, 2, 5, 6), torch.ones(1, 9, 5, 6), 3)


# The layers of Keras compute the same.


def keras_weights(module, taps):
    """A module's parameters and statistics, in the order and layout of the Keras layer."""
    for part in module.modules():
        if isinstance(part, nn.modules.conv._ConvNd):
            weight, bias = part.weight.detach(), part.bias
            if part is getattr(getattr(module, "conv2", None), "conv", None) or (
                part is getattr(getattr(module.kernel_generator, "conv2", None), "conv", None)
            ):
                order = torch.arange(len(weight)).reshape(-1, taps).T.flatten()
                weight, bias = weight[order], bias[order]
            yield weight.permute(*range(2, weight.ndim), 1, 0)
            if bias is not None:
                yield bias.detach()
        elif isinstance(part, nn.modules.batchnorm._BatchNorm):
            yield from (part.weight.detach(), part.bias.detach())


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("rank", "arguments"),
    [
        (1, {"kernel_size": 5, "stride": 2}),
        (2, {"kernel_size": (3, 5), "stride": (2, 1), "padding": "same"}),
        (2, {"kernel_size": 3, "padding": "valid", "dilation": 2, "kernel_softmax": True}),
        (2, {"kernel_size": 4, "kernel_generator": "linear", "stride": 3}),
        (2, {"kernel_size": 3, "kernel_generator": "contextual", "stride": 2}),
        (2, {"kernel_size": 3, "kernel_generator": "pairwise_attention", "stride": 2}),
        (2, {"kernel_size": 3, "group_layout": "interleaved", "out_channels": 7}),
        (3, {"kernel_size": 3, "stride": (1, 2, 2)}),
    ],
)
def test_equal_to_the_keras_layer(rank, arguments, training, memory):
    module = (Involution1d, Involution2d, Involution3d)[rank - 1](
        8, group_channels=4, dtype=torch.float64, **arguments
    )
    names = {"stride": "strides", "dilation": "dilation_rate", "out_channels": "filters"}
    options = {names.get(name, name): value for name, value in arguments.items()}
    layer = getattr(involution, f"Involution{rank}D")(
        **{"padding": "symmetric", "group_channels": 4, "dtype": "float64", **options}
    )
    sizes = ((13,), (9, 10), (4, 5, 6))[rank - 1]
    x = torch.randn(2, 8, *sizes, dtype=torch.float64)
    layer(x.movedim(1, -1))
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    values = list(keras_weights(module, module.window.taps))
    for variable, value in zip(layer.trainable_variables, values, strict=True):
        variable.assign(value.numpy())
    if memory == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    y = module.train(training)(x).detach()
    expected = keras.ops.convert_to_numpy(layer(x.movedim(1, -1), training=training))
    assert y.is_contiguous() == (memory == "contiguous")
    # Keras computes batch normalization in float32.
    scale = np.abs(expected).max()
    assert np.abs(as_last(y.numpy()) - expected).max() < 2e-6 * scale


def test_static_kernels_are_a_depthwise_convolution():
    module = Involution2d(6, 3, groups=6, stride=2, kernel_generator="static")
    x = torch.randn(2, 6, 9, 8)
    weight = module.kernel_generator.weight.reshape(6, 1, 3, 3)
    expected = nn.functional.conv2d(x, weight, stride=2, padding=1, groups=6)
    torch.testing.assert_close(module(x), expected)


# Fused only if nothing else depends on the kernels.


def fused(module):
    return module._fusable_convolution() is not None


def test_plain_generators_are_fused():
    assert [name for name in VARIANTS if fused(make(name))] == [
        *("default", "strided", "linear", "contextual", "low_rank", "interleaved", "projected")
    ]
    for options in ({"return_kernel": True}, {"kernel_dropout": 0.5}):
        assert not fused(make(**options))


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced(module):
    conv = module.conv2.conv
    twice = Doubled(conv.in_channels, conv.out_channels, 1)
    twice.load_state_dict(conv.state_dict())
    module.conv2.conv = twice


def parametrized(module):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(module.conv2.conv, "weight", Double())
    nn.utils.parametrize.register_parametrization(module.conv2.conv, "bias", Double())


def appended(module):
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    module.conv2.append(Double())


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.conv2.conv.register_forward_hook(lambda _, x, y: 2 * y),
        lambda m: m.conv2.register_forward_hook(lambda _, x, y: 2 * y),
        replaced,
        parametrized,
        appended,
    ],
)
def test_changes_of_the_last_convolution_take_effect(change):
    module, x = make().eval(), images()
    plain = module(x).detach()
    change(module)
    assert not fused(module)
    torch.testing.assert_close(module(x), 2 * plain)


@pytest.mark.parametrize("name", ["forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_the_last_convolution_are_called(name):
    module, seen = make(), []
    register = getattr(module.conv2.conv, f"register_{name}_hook")
    register(lambda *_: seen.append(name))
    module(images()).sum().backward()
    assert seen == [name]


def test_global_hooks_see_the_last_convolution():
    module, seen = make(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, x, y: seen.append(m))
    try:
        module(images())
    finally:
        handle.remove()
    assert module.conv2.conv in seen
    assert fused(module)


def test_pruned_generators_compute_with_the_mask():
    module, x = make().eval(), images()
    prune.random_unstructured(module.conv2.conv, "weight", amount=0.5)
    pruned = module(x)
    prune.remove(module.conv2.conv, "weight")
    assert fused(module)
    torch.testing.assert_close(module(x), pruned)


def test_returned_kernels_make_the_output():
    module, x = make(return_kernel=True, stride=2).eval(), images()
    y, kernel = module(x)
    assert kernel.shape == (2, 2, 9, 5, 5)
    torch.testing.assert_close(functional.involution(x, kernel, 3, stride=2), y)
    module.return_kernel = False
    torch.testing.assert_close(module(x), y)


def test_kernel_dropout_is_active_in_training_only():
    module, x = make(kernel_dropout=0.5), images()
    module.conv1.bn.eval()
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


# What PyTorch does with modules.


@each_variant
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_output_has_the_memory_format_of_the_input(variant, memory_format):
    x = images().contiguous(memory_format=memory_format)
    module = make(variant).to(memory_format=memory_format).eval()
    y = module(x)
    assert y.is_contiguous(memory_format=memory_format)
    plain = copy.deepcopy(module).to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(y, plain(x.contiguous()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["default", "static"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "view", [lambda x: x.chunk(2, 1)[0], lambda x: x[..., 1:], lambda x: x.transpose(2, 3)]
)
def test_views_have_the_format_that_a_convolution_gives_them(variant, memory_format, view):
    x = view(torch.randn(2, 64, 6, 7).contiguous(memory_format=memory_format))
    module = make(variant, channels=x.shape[1]).eval()
    y, plain = module(x), nn.Conv2d(x.shape[1], x.shape[1], 3, padding=1)(x)
    assert y.stride() == plain.stride()
    torch.testing.assert_close(y, module(x.contiguous()), rtol=1e-4, atol=1e-4)


def test_autocast_is_that_of_a_convolution():
    module, x = make(), images().requires_grad_()
    expected = module.eval()(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
        assert y.dtype == torch.bfloat16
        assert make("static")(x).dtype == torch.bfloat16
        kernel = torch.ones(2, 1, 9, 9, 10)
        assert functional.involution(x, kernel, 3).dtype == torch.bfloat16
        assert functional.involution(x.double(), kernel.double(), 3).dtype == torch.float64
    y.sum().backward()
    assert x.grad.dtype == module.conv2.conv.weight.grad.dtype == torch.float32
    assert (y - expected).abs().max() < 0.05 * expected.abs().max()


@each_variant
def test_pickle_and_deepcopy(variant):
    module, x = make(variant).eval(), images()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):  # noqa: S301 - our own
        assert torch.equal(other(x), module(x))
        assert str(other) == str(module)


def test_representation_names_the_arguments():
    module = Involution2d(32, 3, stride=2, padding=0, dilation=(1, 2), group_layout="interleaved")
    assert str(module).splitlines()[1].strip() == (
        "32, kernel_size=(3, 3), stride=(2, 2), padding=((0, 0), (0, 0)), dilation=(1, 2), "
        "groups=2, group_layout='interleaved'"
    )


@each_variant
def test_functional_call_with_stacked_parameters(variant):
    modules = [make(variant).eval() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    skeleton, x = copy.deepcopy(modules[0]).to("meta"), images()

    def call(parameters, buffers, x):
        return torch.func.functional_call(skeleton, (parameters, buffers), (x,))

    y = torch.func.vmap(call, in_dims=(0, 0, None))(parameters, buffers, x)
    for found, module in zip(y, modules, strict=True):
        torch.testing.assert_close(found, module(x))


@each_variant
def test_gradients_of_each_sample(variant):
    module, x = make(variant).eval(), images()
    parameters = dict(module.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, (x[None],)).pow(2).mean()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(2):
        module.zero_grad()
        module(x[i : i + 1]).pow(2).mean().backward()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(found[name][i], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # from PyTorch itself
@each_variant
def test_forward_mode_equals_reverse_mode(variant):
    module, x = make(variant).double().eval(), images(dtype=torch.float64)
    tangent, cotangent = images(dtype=torch.float64), torch.randn_like(module(x))
    _, forward = torch.func.jvp(module, (x,), (tangent,))
    _, pullback = torch.func.vjp(module, x)
    expected = (pullback(cotangent)[0] * tangent).sum()
    torch.testing.assert_close((forward * cotangent).sum(), expected)


@each_variant
def test_second_derivatives(variant):
    module = make(variant, channels=4, groups=2).double().eval()
    x = torch.randn(1, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, x)
    assert torch.autograd.gradgradcheck(module, x)


def test_activation_checkpointing():
    module, x = make(), images().requires_grad_()
    module(x).sum().backward()
    expected = [x.grad, *(p.grad for p in module.parameters())]
    x.grad = None
    module.zero_grad()
    checkpoint(module, x, use_reentrant=False).sum().backward()
    for found, want in zip([x.grad, *(p.grad for p in module.parameters())], expected, strict=True):
        torch.testing.assert_close(found, want)


def test_replicas_share_the_parameters():
    module, x = make().eval(), images()
    replica = module._replicate_for_data_parallel()
    assert torch.equal(replica(x), module(x))


@each_variant
def test_meta_device(variant):
    with torch.device("meta"):
        module = make(variant)
    assert {p.device.type for p in module.parameters()} == {"meta"}
    expected = make(variant)(images()).shape
    assert module(images(device="meta")).shape == expected
    assert make(variant, device="meta")(images(device="meta")).shape == expected


@each_variant
def test_modules_without_values_load_a_state_dict(variant):
    module, x = make(variant).eval(), images()
    with torch.device("meta"):
        assigned, emptied = make(variant).eval(), make(variant).eval()
    assigned.load_state_dict(module.state_dict(), assign=True)
    emptied.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert torch.equal(assigned(x), module(x))
    assert torch.equal(emptied(x), module(x))


def test_device_and_dtype_of_the_constructor():
    module = make("projected", dtype=torch.float64)
    assert {p.dtype for p in module.parameters()} == {torch.float64}


@each_variant
def test_empty_batch(variant):
    module = make(variant).eval()
    y = module(torch.empty(0, 32, 9, 10, requires_grad=True))
    assert y.shape == (0, *module(images()).shape[1:])
    y.sum().backward()


def test_lazy_modules_take_the_channels_of_the_input():
    module = LazyInvolution2d(3, stride=2).double()
    assert str(module) == "LazyInvolution2d(kernel_size=3, stride=2)"
    x = images(dtype=torch.float64)
    y = module.eval()(x)
    assert type(module) is Involution2d
    assert (module.channels, module.training) == (32, False)
    assert torch.equal(module(x), y)
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    assert list(module.state_dict()) == list(make().state_dict())


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "static"])
def test_lazy_modules_load_state_dicts(variant):
    module = make(variant).eval()
    lazy = nn.Sequential(LazyInvolution2d(3, **VARIANTS[variant])).eval()
    lazy.load_state_dict({f"0.{n}": t for n, t in module.state_dict().items()}, strict=True)
    x = images()
    assert torch.equal(lazy(x), module(x))
    assert type(lazy[0]) is Involution2d


def test_lazy_modules_stay_lazy_after_unsuitable_input():
    lazy = LazyInvolution2d(3)
    with pytest.raises(ValueError, match=r"\(batch, channels, 2 spatial\)\. Received: "):
        lazy(torch.ones(32, 9, 10))
    assert lazy(torch.ones(1, 32, 9, 10)).shape == (1, 32, 9, 10)


def test_generators_of_lazy_modules_are_their_children():
    lazy = LazyInvolution2d(3, groups=2, kernel_generator=nn.Conv2d(32, 18, 1)).double()
    assert lazy(images(dtype=torch.float64)).dtype == torch.float64
    assert len(list(lazy.parameters())) == 2


def test_functions_of_channels_and_window_are_generators():
    def make_generator(channels, window):
        return nn.Conv2d(channels, window.groups * window.taps, 1)

    assert Involution2d(32, 3, kernel_generator=make_generator)(images()).shape == (2, 32, 9, 10)
    lazy = LazyInvolution2d(3, kernel_generator=make_generator, out_channels=5).double()
    y = lazy(images(dtype=torch.float64))
    assert (y.shape, y.dtype) == ((2, 5, 9, 10), torch.float64)
    with_options = {"kernel_generator": generators.Linear, "dtype": torch.float64}
    assert LazyInvolution2d(3, **with_options)(images(dtype=torch.float64)).dtype == torch.float64
    for unsuitable in (3, lambda channels, window: None):
        with pytest.raises(ValueError, match=r"`kernel_generator` must be a module, a function"):
            Involution2d(32, 3, kernel_generator=unsuitable)


@pytest.mark.parametrize(
    ("name", "default"), [("bottleneck", 4), ("contextual", 4), ("large_context", 2)]
)
def test_reduction_ratio_of_named_generators(name, default):
    def hidden(**arguments):
        module = Involution2d(32, 3, kernel_generator=name, **arguments)
        counts = [p.shape[0] for p in module.parameters()]
        layer = involution.Involution2D(3, kernel_generator=name, **arguments)
        layer.build((None, 9, 9, 32))
        assert layer.kernel_generator.reduction_ratio == 32 // counts[0]
        return counts[0]

    assert hidden() == 32 // default
    assert hidden(reduction_ratio=8) == 4
    assert hidden(reduction_ratio=1) == 32


@pytest.mark.parametrize(
    "name", ["bottleneck", "contextual", "large_context", "linear", "low_rank"]
)
def test_near_depthwise_is_that_of_the_keras_network(name):
    build = {"blocks": 1, "widths": 64, "stem_width": 32, "kernel_generator": name}
    keras_network = involution.models.rednet_tiny((8, 8, 3), **build)
    generator = next(
        layer.kernel_generator
        for layer in keras_network._flatten_layers()
        if isinstance(layer, involution.Involution2D)
    )
    network = involution.torch.rednet_tiny(**build)
    module = next(m for m in network.modules() if isinstance(m, Involution2d))
    ours = module if module.kernel_generator is None else module.kernel_generator
    last = ours.cv4 if name == "large_context" else ours.conv2.conv
    for variable, parameter in zip(generator.expand.weights, last.parameters(), strict=True):
        deviation = float(np.std(keras.ops.convert_to_numpy(variable)))
        assert float(parameter.detach().std()) == pytest.approx(deviation, rel=0.3), parameter.shape


def test_arrays_of_numpy_are_refused():
    with pytest.raises(TypeError, match=r"must be a tensor\. Received: ndarray$"):
        make()(np.ones((2, 32, 9, 10), "float32"))


def test_errors_of_own_generators_are_not_replaced():
    class Generator(nn.Conv2d):
        def forward(self, x):
            raise RuntimeError("own error")

    module = Involution2d(32, 3, kernel_generator=Generator(32, 18, 1))
    with pytest.raises(RuntimeError, match="own error"):
        module(images(dtype=torch.bfloat16))


def test_exported_programs_run_at_all_sizes():
    # With fewer positions than hidden channels another implementation is faster.
    module, dynamic = Involution2d(512, 3).eval(), torch.export.Dim.DYNAMIC
    x, other = torch.randn(2, 512, 7, 7), torch.randn(1, 512, 13, 12)
    program = torch.export.export(
        module, (x,), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)
    )
    for images in (x, other):
        torch.testing.assert_close(program.module()(images), module(images))


def test_state_dict_without_channels_needs_a_call_of_a_lazy_module():
    lazy = LazyInvolution1d(3, kernel_generator="static")
    state = Involution1d(32, 3, kernel_generator="static").state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        lazy.load_state_dict(state)
    lazy(torch.ones(1, 32, 8))
    lazy.load_state_dict(state)


@pytest.mark.long
def test_import_loads_no_other_framework():
    code = (
        "import sys; import involution.torch;"
        "print([m for m in ('keras', 'tensorflow', 'jax') if m in sys.modules])"
    )
    for backend in ("jax", "tensorflow", "no such backend"):
        assert fresh_process(code, backend).strip() == "[]"


@pytest.mark.long
def test_keras_keeps_its_backend(tmp_path):
    if "jax" not in involution.backend.installed():
        pytest.skip("another backend is not installed")
    code = (
        "import torch, keras, involution.torch as it;"
        "print(keras.config.backend(), *it.Involution1d(4)(torch.ones(1, 4, 5)).shape)"
    )
    assert fresh_process(code, "jax").strip() == "jax 1 4 5"


WORKER = """
import os, sys, torch
import torch.distributed as dist
from torch import nn
from involution.torch import Involution2d

rank, file = int(sys.argv[1]), sys.argv[2]
if rank >= 0:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
torch.manual_seed(0)
module = Involution2d(32, 3, stride=2)
head = nn.Sequential(module, nn.Flatten(), nn.Linear(32 * 25, 3)).double()
module.conv1.bn.eval()  # a batch's statistics depend on its size
images, labels = torch.randn(5, 4, 32, 9, 10, dtype=torch.float64), torch.randint(3, (5, 4))
model = head
if rank >= 0:
    model = nn.parallel.DistributedDataParallel(head)
    images, labels = images[:, 2 * rank : 2 * rank + 2], labels[:, 2 * rank : 2 * rank + 2]
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for x, y in zip(images, labels):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
torch.save(head.state_dict(), f"{file}.{rank}")
"""


@pytest.mark.long
def test_two_processes_equal_one(tmp_path):
    file = tmp_path / "rendezvous"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(file)], env=environment)
        for rank in (-1, 0, 1)
    ]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    one, first, second = (torch.load(f"{file}.{rank}", weights_only=True) for rank in (-1, 0, 1))
    for name, value in one.items():
        torch.testing.assert_close(first[name], value, rtol=1e-10, atol=1e-12)
        assert torch.equal(first[name], second[name])


def test_products_of_variants_are_distinct():
    x = images()
    outputs = [make(v).eval()(x) for v in VARIANTS]
    pairs = itertools.combinations(outputs, 2)
    assert not any(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)
