"""The warning about layers that a loop in plain PyTorch trains in inference mode."""

import gc
import io
import re
import warnings
import weakref

import keras
import numpy as np
import pytest
import torch

import involution
from involution.layers import record_involutions, torch_training

WARNING = r"was called without `training`, which means inference: batch normalization used its"


@pytest.fixture(autouse=True)
def _not_warned_yet(monkeypatch):
    monkeypatch.setattr(torch_training, "_warned", False)


def images():
    return torch.randn(2, 6, 6, 16)


def linear():
    return involution.Involution2D(3, kernel_generator="linear")


def custom():
    layers = [keras.layers.GaussianNoise(0.1), keras.layers.Conv2D(9, 1)]
    return involution.Involution2D(3, kernel_generator=keras.Sequential(layers))


def built(layer):
    with torch.no_grad():
        layer(images())
    return layer


def trained(function):
    """The warnings of ``function`` and of a backward pass through its result."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = function()
        assert not caught
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            output.sum().backward(retain_graph=True)
    return [str(w.message) for w in caught]


# --- Warning -------------------------------------------------------------------------------------

LAYERS = {
    "1D": (1, lambda: involution.Involution1D(3)),
    "2D": (2, lambda: involution.Involution2D(3)),
    "3D": (3, lambda: involution.Involution3D(3)),
    "drop-in": (2, lambda: involution.Involution(return_kernel=False)),
    "drop-in with kernels": (2, lambda: involution.Involution()),
    "contextual": (2, lambda: involution.Involution2D(3, kernel_generator="contextual")),
    "dropout": (2, lambda: involution.Involution2D(3, kernel_dropout=0.5)),
    "custom": (2, custom),
}


@pytest.mark.parametrize(("rank", "make"), LAYERS.values(), ids=LAYERS)
def test_first_backward_pass_warns_once(rank, make):
    layer = make()
    x = torch.randn(2, *(5,) * rank, 16)
    layer(x)  # a call without a backward pass does not warn
    (message,) = trained(lambda: layer(x))
    assert re.search(WARNING, message)
    assert message.startswith(f"{type(layer).__name__} {layer.name!r} ")
    assert "training=True" in message
    assert f"involution.torch.Involution{rank}d" in message
    assert "\n" not in message
    assert trained(lambda: layer(x)) == []
    assert trained(lambda: built(involution.Involution2D(3))(images())) == []


def test_models_in_a_loop_warn():
    model = keras.Sequential([keras.Input((6, 6, 16)), involution.Involution2D(3, name="inner")])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match=rf"Involution2D 'inner' {WARNING}"):
        model(images()).square().mean().backward()
    optimizer.step()


def test_gradients_of_the_input_warn_too():
    layer = built(involution.Involution2D(3))
    x = images().requires_grad_()
    with pytest.warns(UserWarning, match=WARNING):
        torch.autograd.grad(layer(x).sum(), x)


def test_results_are_those_of_inference():
    layer = built(involution.Involution2D(3))
    x = images().requires_grad_()
    weights = [x, *(p for p in layer.parameters() if p.requires_grad)]
    y = layer(x, training=False)
    expected = torch.autograd.grad(y.square().sum(), weights)
    z = layer(x)
    with pytest.warns(UserWarning, match=WARNING):
        found = torch.autograd.grad(z.square().sum(), weights)
    assert torch.equal(y, z)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)


# --- No warning ----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_explicit_training_is_silent(training):
    layer = built(involution.Involution2D(3))
    assert trained(lambda: layer(images(), training=training)) == []


def test_layers_without_normalization_are_silent():
    layer = built(linear())
    assert trained(lambda: layer(images())) == []


def test_calls_without_gradients_are_silent():
    layer = built(involution.Involution2D(3))
    weight = torch.ones((), requires_grad=True)
    with torch.no_grad():
        y = layer(images())
    assert trained(lambda: weight * y) == []
    with torch.inference_mode():
        y = layer(images())
    assert trained(lambda: weight * y.clone()) == []


def test_eval_is_silent_and_train_warns_again():
    layer = built(involution.Involution2D(3))
    network = torch.nn.Sequential(layer)
    network.eval()
    assert trained(lambda: network(images())) == []
    network.train()
    assert len(trained(lambda: network(images()))) == 1


def test_layers_frozen_after_a_call_are_silent():
    layer = built(involution.Involution2D(3, kernel_dropout=0.5))
    x = images().requires_grad_()
    layer(x)
    layer.trainable = False
    layer.kernel_dropout.rate = 0.0
    assert trained(lambda: layer(x)) == []
    layer.kernel_dropout.rate = 0.5
    assert len(trained(lambda: layer(x))) == 1


@pytest.mark.parametrize("functional", [True, False])
def test_fit_is_silent(functional):
    inputs = keras.Input((6, 6, 16))
    hidden = involution.Involution2D(3)(inputs)
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(hidden))
    if not functional:
        model = Subclassed()
    model.compile("sgd", "mse")
    x, y = np.ones((4, 6, 6, 16), "float32"), np.zeros((4, 16), "float32")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x, y, batch_size=2, epochs=2, validation_data=(x, y), verbose=0)
        model.train_on_batch(x, y)
        model.evaluate(x, y, verbose=0)
        model.predict(x, verbose=0)
    assert not [w for w in caught if re.search(WARNING, str(w.message))]


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.involution = Plain(3)
        self.pool = keras.layers.GlobalAveragePooling2D()

    def call(self, x, training=None):
        return self.pool(self.involution(x))


class Plain(involution.Involution2D):
    """Keras does not pass ``training`` to this ``call``, but to the layers inside."""

    def call(self, x):
        return super().call(x)


def test_recorded_calls_are_silent():
    layer = built(involution.Involution2D(3))
    with record_involutions() as traces:
        assert trained(lambda: layer(images())) == []
    assert len(traces) == 1


@pytest.mark.long
def test_compiled_and_traced_programs_are_silent():
    layer = built(involution.Involution2D(3))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert trained(lambda: compiled(images())) == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about the Python values it makes constant
        traced = torch.jit.trace(layer, images(), check_trace=False)
    assert trained(lambda: traced(images())) == []
    assert len(trained(lambda: layer(images()))) == 1


# --- No other effect -----------------------------------------------------------------------------


def test_the_warning_keeps_nothing_alive():
    layer = built(involution.Involution2D(3))
    y = layer(images())
    output, owner = weakref.ref(y), weakref.ref(layer)
    del layer
    gc.collect()
    assert owner() is None
    with pytest.warns(UserWarning, match=WARNING):
        y.sum().backward()
    del y
    assert output() is None


def test_outputs_can_be_saved_and_changed_in_place():
    layer = built(involution.Involution2D(3))
    y = layer(images())
    torch.save(y, io.BytesIO())  # PyTorch warns if this loses a hook
    y.add_(1)
    with pytest.warns(UserWarning, match=WARNING):
        y.sum().backward()


def test_gradients_of_functions_can_be_nested():
    layer = built(involution.Involution2D(3))
    x = images()
    with pytest.warns(UserWarning, match=WARNING):
        found = torch.func.grad(lambda x: layer(x).square().sum())(x)
    expected = torch.func.grad(lambda x: layer(x, training=False).square().sum())(x)
    assert torch.equal(found, expected)
    torch.func.vmap(lambda x: layer(x[None])[0])(x)
