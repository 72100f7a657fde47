"""Equality with the paper's module, and with the Keras layers in a training loop."""

import copy
import itertools

import keras
import numpy as np
import pytest
import torch
from torch import nn

import involution
from involution.torch import Involution2d
from tests.support import rednet_torch

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def relative(a, b):
    return (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)).item()


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.01)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("size", "stride", "sizes"),
    [*itertools.product((3, 5, 7), (1, 2), [(12, 10), (13, 11)]), (7, 2, (3, 2)), (3, 3, (7, 8))],
)
def test_equal_to_the_paper_in_training(size, stride, sizes, memory_format):
    paper = rednet_torch.Involution(32, size, stride)
    module = Involution2d(32, size, stride=stride)
    assert list(module.state_dict()) == list(paper.state_dict())
    module.load_state_dict(paper.state_dict(), strict=True)
    # Normalization of four values: rounding errors of 2e-6 against float64, in the paper's too.
    bound = 4e-6 if sizes == (3, 2) else 1e-6
    optimizers = sgd(paper), sgd(module)
    for step in range(5):
        images = torch.randn(2, 32, *sizes).to(memory_format=FORMATS[memory_format])
        results = []
        for model, optimizer in zip((paper, module), optimizers, strict=True):
            x = images.clone().requires_grad_()
            y = model(x)
            optimizer.zero_grad()
            (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).mean().backward()
            results.append((y, x.grad, *(p.grad for p in model.parameters())))
            optimizer.step()
        for expected, found in zip(*results, strict=True):
            assert relative(found, expected) < bound, step
        assert results[1][0].is_contiguous(memory_format=FORMATS[memory_format])
    for name, value in paper.state_dict().items():
        assert relative(module.state_dict()[name].float(), value.float()) < bound, name
    paper.eval()
    module.eval()
    assert relative(module(images), paper(images)) < bound


def test_wrong_kernel_order_would_be_found():
    paper, module = rednet_torch.Involution(32, 3, 1), Involution2d(32, 3)
    state = paper.state_dict()
    weight = state["conv2.conv.weight"]
    state["conv2.conv.weight"] = weight.reshape(2, 9, -1).swapaxes(0, 1).reshape(weight.shape)
    module.load_state_dict(state)
    images = torch.randn(2, 32, 9, 9)
    assert relative(module(images), paper(images)) > 0.1


class Block(nn.Module):
    """A residual block of plain PyTorch."""

    def __init__(self, channels):
        super().__init__()
        self.mixer = Involution2d(channels, 5, group_channels=8)
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x + self.conv(torch.relu(self.norm(self.mixer(x))))


def plain_network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        Block(16),
        Involution2d(16, 3, stride=2, group_channels=8),
        Block(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def keras_network():
    layers = keras.layers

    def block(x):
        y = involution.Involution2D(5, group_channels=8, padding="symmetric")(x)
        y = layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(y)
        return layers.Add()([x, layers.Conv2D(16, 1)(layers.ReLU()(y))])

    inputs = keras.Input((11, 9, 3))
    x = block(layers.ReLU()(layers.Conv2D(16, 3, padding="same")(inputs)))
    x = involution.Involution2D(3, strides=2, group_channels=8, padding="symmetric")(x)
    x = layers.GlobalAveragePooling2D()(block(x))
    return keras.Model(inputs, layers.Dense(4)(x))


def copy_weights(module, model):
    """Copies a plain network's parameters to the Keras model: both have the same order."""
    values = []
    parts = [m for m in module.modules() if isinstance(m, Involution2d)]
    taps_of = {p.conv2.conv: p.window.taps for p in parts}
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            weight, bias = part.weight.detach(), part.bias
            if part in taps_of:
                order = torch.arange(len(weight)).reshape(-1, taps_of[part]).T.flatten()
                weight, bias = weight[order], bias[order]
            axes = (2, 3, 1, 0) if weight.ndim == 4 else (1, 0)
            values += [weight.permute(axes), *([] if bias is None else [bias.detach()])]
        elif isinstance(part, nn.BatchNorm2d):
            values += [part.weight.detach(), part.bias.detach()]
    for variable, value in zip(model.trainable_variables, values, strict=True):
        variable.assign(value.numpy())


@pytest.mark.long
def test_plain_loop_equals_training_by_keras():
    network, model = plain_network(), keras_network()
    copy_weights(network, model)
    generator = np.random.default_rng(0)
    images = generator.normal(size=(200, 8, 11, 9, 3)).astype("float32")
    # The class is the contrast of a pattern of stripes.
    labels = generator.integers(4, size=(200, 8))
    images[:, :, ::2, :, 0] += labels[..., None, None]

    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    network.train()
    plain = []
    for x, y in zip(images, labels, strict=True):
        optimizer.zero_grad()
        logits = network(torch.tensor(x.transpose(0, 3, 1, 2)))
        loss = nn.functional.cross_entropy(logits, torch.tensor(y))
        loss.backward()
        optimizer.step()
        plain.append(loss.item())

    model.compile(
        keras.optimizers.SGD(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    trained = [float(model.train_on_batch(x, y)) for x, y in zip(images, labels, strict=True)]
    assert np.abs(np.subtract(plain, trained))[:10].max() < 1e-4
    assert np.mean(plain[-20:]) < 0.7 * np.mean(plain[:20])
    assert np.mean(trained[-20:]) < 0.7 * np.mean(trained[:20])


def test_copies_are_independent():
    module = Involution2d(32, 3)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.conv2.conv.weight.zero_()
    assert module.conv2.conv.weight.abs().sum() > 0
