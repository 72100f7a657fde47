"""RedNet for PyTorch: the official checkpoints' names, the independent network, and Keras's."""

import keras
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

import involution.torch
from involution import models
from involution.models import checkpoint_readers, convert, weights
from involution.torch import Involution2d, generators, rednet_tiny
from tests.support import rednet_torch

DEPTHS = (26, 38, 50, 101, 152)
# Millions of parameters, from the paper.
PARAMETERS = {26: 9.23, 38: 12.39, 50: 15.54, 101: 25.65, 152: 33.99}
each_depth = pytest.mark.parametrize(
    "depth", [26, *(pytest.param(d, marks=pytest.mark.slow) for d in DEPTHS[1:])]
)


def network(depth, *arguments, **options):
    return getattr(involution.torch, f"rednet{depth}")(*arguments, **options)


def images(*sizes, batch=2, **arguments):
    return torch.randn(batch, 3, *(sizes or (65, 47)), **arguments)


def maximum_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


# The official networks.


@pytest.mark.parametrize("depth", DEPTHS)
def test_names_shapes_and_parameters_of_the_official_checkpoints(depth):
    model = network(depth, device="meta")
    with torch.device("meta"):
        official = rednet_torch.Classifier(depth, 1000)
    found, expected = (
        {n: (t.shape, t.dtype) for n, t in m.state_dict().items()} for m in (model, official)
    )
    assert found == expected
    assert list(dict(model.named_parameters())) == list(dict(official.named_parameters()))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(millions - PARAMETERS[depth]) < 0.02


@pytest.mark.long
@each_depth
@pytest.mark.parametrize("stem_size", [3, pytest.param(7, marks=pytest.mark.slow)])
def test_equal_to_the_independent_network(depth, stem_size):
    official = rednet_torch.network(depth, classes=5, stem_size=stem_size)
    model = network(depth, 5, stem_kernel_size=stem_size, dtype=torch.float64).eval()
    model.load_state_dict(official.state_dict(), strict=True)
    x = images(dtype=torch.float64)
    with torch.no_grad():
        assert maximum_error(model(x), official(x)) < 1e-9
        maps = model.backbone(x)
        for found, expected in zip(maps, official.backbone(x), strict=True):
            assert maximum_error(found, expected) < 1e-9
    assert [m.shape[1:] for m in maps] == [
        *((256, 17, 12), (512, 9, 6), (1024, 5, 3), (2048, 3, 2))
    ]


@pytest.mark.long
def test_gradients_equal_those_of_the_independent_network():
    official = rednet_torch.network(26, classes=5).train()
    model = network(26, 5, dtype=torch.float64)
    model.load_state_dict(official.state_dict())
    x, labels = images(33, 40, dtype=torch.float64), torch.tensor([1, 3])
    for each in (official, model):
        nn.functional.cross_entropy(each(x), labels).backward()
    expected = dict(official.named_parameters())
    for name, parameter in model.named_parameters():
        assert maximum_error(parameter.grad, expected[name].grad) < 1e-7, name
    buffers = dict(official.named_buffers())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=1e-9, atol=1e-12)


@pytest.mark.long
@each_depth
def test_weights_are_those_of_the_keras_model(depth):
    model = network(depth, 5).eval()
    model.load_state_dict(rednet_torch.network(depth, classes=5).state_dict())
    keras_model = models.MODELS[f"rednet{depth}"]((None, None, 3), classes=5)
    variables = weights.named_weights(keras_model)
    state, names = model.state_dict(), convert.strip_prefixes(model.state_dict())
    maps = convert.rednet_weight_maps(
        checkpoint_readers.PYTORCH, models.rednet.VARIANTS[f"rednet{depth}"].blocks
    )
    assert {n for n in names.values() if n} == set(maps)
    for name, stripped in names.items():
        if stripped is not None:
            target, weight_map = maps[stripped]
            variables[target].assign(weight_map.convert(state[name].numpy()))
    x = images()
    with torch.no_grad():
        found = model(x)
        expected = torch.as_tensor(keras.ops.convert_to_numpy(keras_model(x.movedim(1, -1))))
    assert maximum_error(found, expected) < 1e-4


def test_initial_values_are_those_of_the_paper():
    model = network(26)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            expected = (2 / fan_out) ** 0.5
            assert abs(module.weight.std().item() / expected - 1) < 0.15, name
            assert module.bias is None or not module.bias.any(), name
        elif isinstance(module, nn.BatchNorm2d):
            is_last = name.endswith("bn3")
            assert torch.equal(module.weight, torch.full_like(module.weight, float(not is_last)))
    assert abs(model.head.fc.weight.std().item() / 0.01 - 1) < 0.05
    assert not model.head.fc.bias.any()


def test_blocks_are_initially_their_shortcuts():
    model = network(26).eval()
    block = model.backbone.layer2[1]
    x = torch.rand(1, 512, 6, 5)
    assert torch.equal(block(x), x)


@pytest.mark.long
def test_memory_format_goes_through_the_network():
    model = network(26, 5).eval()
    model.load_state_dict(rednet_torch.network(26, classes=5).state_dict())
    x = images()
    with torch.no_grad():
        expected = model(x)
        model = model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
        maps = model.backbone(x)
        assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)
        assert maximum_error(model(x), expected) < 1e-4


@pytest.mark.long
def test_stages_can_be_checkpointed():
    model = network(26, 5).eval()
    stages = nn.Sequential(*model.backbone.layer2, *model.backbone.layer3)
    features = torch.randn(1, 256, 9, 8, requires_grad=True)
    stages(features).sum().backward()
    expected, features.grad = features.grad, None
    checkpoint_sequential(stages, 3, features, use_reentrant=False).sum().backward()
    torch.testing.assert_close(features.grad, expected)


@pytest.mark.parametrize(
    "arguments", [{"num_classes": 0}, {"in_channels": 0}, {"stem_kernel_size": 0}]
)
def test_unsuitable_arguments_are_refused(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1.*{name}=0$"):
        network(26, device="meta", **arguments)


# The small network.


def copied_to_keras(model, **arguments):
    """The Keras ``rednet_tiny`` with the parameters and statistics of a module."""
    blocks = models.rednet_tiny((None, None, 3), **arguments)
    variables = weights.named_weights(blocks)
    state = {n: t.numpy() for n, t in model.state_dict().items() if "num_batches" not in n}
    left = dict(variables)
    for name, value in state.items():
        target, converted = keras_weight(name, value, model)
        left.pop(target).assign(converted)
    assert not left
    return blocks


def keras_weight(name, value, model):
    """The Keras name of a module's tensor, and the value in Keras's layout."""
    part, _, suffix = name.rpartition(".")
    suffix = {
        "running_mean": "moving_mean",
        "running_var": "moving_variance",
        "weight": "gamma" if value.ndim == 1 else "kernel",
        "bias": "beta" if f"{part}.running_mean" in model.state_dict() else "bias",
    }[suffix]
    if part.endswith("conv2.conv"):
        taps = model.get_submodule(part.removesuffix(".conv2.conv")).window.taps
        value = value.reshape(-1, taps, *value.shape[1:]).swapaxes(0, 1).reshape(value.shape)
    if value.ndim == 4:
        value = value.transpose(2, 3, 1, 0)
    elif value.ndim == 2:
        value = value.T
    part = part.removeprefix("backbone.")
    if part == "head.fc":
        return f"logits/{suffix}", value
    if part.startswith("stem"):
        return f"stem_{part.split('.')[-1]}/{suffix}", value
    stage, block, *inner = part.removeprefix("layer").split(".")
    inner = {
        "conv1": "_1_conv",
        "bn1": "_1_bn",
        "conv2.conv1.conv": "_2_involution/bottleneck/reduce",
        "conv2.conv1.bn": "_2_involution/bottleneck/normalization",
        "conv2.conv2.conv": "_2_involution/bottleneck/expand",
        "bn2": "_2_bn",
        "conv3": "_3_conv",
        "bn3": "_3_bn",
        "downsample.0": "_shortcut_conv",
        "downsample.1": "_shortcut_bn",
    }[".".join(inner)]
    return f"stage{stage}_block{int(block) + 1}{inner}/{suffix}", value


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"stem_pool": False, "blocks": (1, 2), "widths": (8, 16), "group_channels": 4}],
)
def test_small_network_equals_the_keras_model(arguments, training):
    model = rednet_tiny(4, **arguments).train(training)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("bn3.weight", "running_var")):
                tensor.uniform_(0.5, 1.5)  # so that the blocks have an effect
    keras_model = copied_to_keras(model, classes=4, **arguments)
    x = images(33, 31)
    expected = keras.ops.convert_to_numpy(keras_model(x.movedim(1, -1), training=training))
    assert np.abs(model(x).detach().numpy() - expected).max() < 1e-4 * np.abs(expected).max()


def test_small_network_has_the_parameters_of_the_keras_model():
    assert sum(p.numel() for p in rednet_tiny().parameters()) == 29_894


@pytest.mark.long
def test_small_network_learns():
    torch.manual_seed(0)
    model = rednet_tiny(4, blocks=(1, 1), in_channels=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        labels = torch.randint(4, (32,))
        x = 0.5 * torch.randn(32, 1, 16, 16)
        # The class is the quarter with a bright square.
        for i, label in enumerate(labels):
            row, column = divmod(int(label), 2)
            x[i, 0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


@pytest.mark.parametrize("name", [*generators.GENERATORS])
def test_small_network_with_each_generator(name):
    model = rednet_tiny(kernel_generator=name)
    involutions = [m for m in model.modules() if isinstance(m, Involution2d)]
    generators_of = {id(m.kernel_generator) for m in involutions}
    assert len(generators_of) == (1 if name == "bottleneck" else len(involutions))  # 1: all None
    assert model(images(32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": (1, 2, 3)}, "one integer for each stage"),
        ({"kernel_size": 4}, "`kernel_size` must be odd"),
        ({"stem_pool": 1}, "`stem_pool` must be True or False"),
        ({"kernel_generator": nn.Identity()}, "each involution has its own"),
    ],
)
def test_unsuitable_arguments_of_the_small_network_are_refused(arguments, message):
    with pytest.raises(ValueError, match=rf"{message}.*Received: "):
        rednet_tiny(**arguments)
