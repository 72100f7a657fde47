"""What classifiers return, by the last operation of their graph."""

import keras
import pytest

from involution.models.outputs import outputs_of
from involution.models.registry import MODELS

pytestmark = pytest.mark.any_backend
layers = keras.layers


def dense(activation=None):
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.Dense(3, activation=activation)(inputs))


def followed_by(function, model=None):
    model = model or dense()
    return keras.Model(model.input, function(model.output))


def nested(model):
    inputs = keras.Input(model.input_shape[1:])
    return keras.Model(inputs, model(inputs))


def average(*models):
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.Average()([model(inputs) for model in models]))


def second_call():
    """A softmax whose first call is not the output."""
    inputs = keras.Input((4,))
    softmax = layers.Softmax()
    gate = softmax(layers.Dense(4)(inputs))
    return keras.Model(inputs, softmax(layers.Dense(3)(layers.Multiply()([gate, inputs]))))


class OfTensors(keras.Model):
    """A subclass that is functional."""

    def __init__(self):
        inputs = keras.Input((4,))
        super().__init__(inputs, layers.Dense(3, activation="softmax")(inputs))


PROBABILITIES = {
    "the activation of Dense": lambda: dense("softmax"),
    "Activation": lambda: followed_by(layers.Activation("softmax", dtype="float32")),
    "Softmax": lambda: followed_by(layers.Softmax()),
    "the layer as an activation": lambda: dense(layers.Softmax()),
    "keras.ops.softmax": lambda: followed_by(keras.ops.softmax),
    "keras.activations.softmax": lambda: followed_by(keras.activations.softmax),
    "Sequential": lambda: keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Softmax()]),
    "a model as the last layer": lambda: nested(nested(dense("softmax"))),
    "converted to float32": lambda: followed_by(
        layers.Activation("linear", dtype="float32"), nested(dense("softmax"))
    ),
    "an ensemble": lambda: average(dense("softmax"), nested(dense("softmax"))),
    "a softmax called twice": second_call,
    "a functional subclass": OfTensors,
}
LOGITS = {
    "Dense": dense,
    "a softmax that is not last": lambda: followed_by(layers.Dense(3), dense("softmax")),
    "log_softmax": lambda: followed_by(keras.ops.log_softmax),
    "sigmoid": lambda: dense("sigmoid"),
    "a mean of both": lambda: average(dense("softmax"), dense()),
    "a softmax over the batch": lambda: followed_by(layers.Softmax(axis=0)),
    "a layer with the name softmax": lambda: followed_by(layers.ReLU(name="softmax")),
}


@pytest.mark.parametrize("name", PROBABILITIES)
def test_a_softmax_at_the_end_gives_probabilities(name):
    assert outputs_of(PROBABILITIES[name]()) == "probabilities"


@pytest.mark.parametrize("name", LOGITS)
def test_other_outputs_are_logits(name):
    assert outputs_of(LOGITS[name]()) == "logits"


@pytest.mark.long
@pytest.mark.parametrize("name", ["cnn", "inn", "rednet_tiny", "lsnet_t"])
def test_models_of_the_comparison_return_logits(name):
    assert outputs_of(MODELS[name]((64, 64, 3), classes=5)) == "logits"
