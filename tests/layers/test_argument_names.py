"""Arguments that are habits from other layers: the errors name the right ones."""

import inspect
import re

import keras
import numpy as np
import pytest

from involution import Involution1D, Involution2D, Involution3D
from involution.kernel_generators import (
    GENERATORS,
    Bottleneck,
    Contextual,
    KernelGenerator,
    Linear,
    PairwiseAttention,
    Static,
)
from involution.layers import InvolutionND, involution_nd
from involution.utils import arguments
from tests.support.backends import numpy

pytestmark = pytest.mark.any_backend


class Inherits(Involution2D):
    pass


class Passes(Involution2D):
    def __init__(self, kernel_size, strides):
        super().__init__(kernel_size, strides)


class OwnGenerator(KernelGenerator):
    pass


def message(make):
    with pytest.raises(TypeError) as error:
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_convolution_arguments_in_full():
    assert message(lambda: Involution2D(64, 3)) == (
        "Only kernel_size of Involution2D() may be positional. An involution keeps the input's "
        "channels: for Conv2D(64, 3) write "
        "Involution2D(3), or Involution2D(3, filters=64) with a 1x1 convolution. "
        "Received: Involution2D(64, 3)"
    )


@pytest.mark.parametrize(
    ("make", "start", "received"),
    [
        (lambda: Involution1D(64, 3, "same"), "Involution1D", "Involution1D(64, 3, 'same')"),
        (lambda: Involution3D(64, (3, 3, 3)), "Involution3D", "Involution3D(64, (3, 3, 3))"),
        (lambda: Inherits(3, 2), "Inherits", "Inherits(3, 2)"),
        (lambda: Passes(3, 2), "Involution2D", "Involution2D(3, 2)"),
        (lambda: Linear(64, 32), "Linear", "Linear(64, 32)"),
        (lambda: Static(3, 2), "Static", "Static(3, 2)"),
        (lambda: Bottleneck(4, 3), "Bottleneck", "Bottleneck(4, 3)"),
        (lambda: Contextual(4, 3), "Contextual", "Contextual(4, 3)"),
        (lambda: PairwiseAttention(8, "same"), "PairwiseAttention", "PairwiseAttention(8, 'same')"),
        (lambda: OwnGenerator(3, 2), "OwnGenerator", "OwnGenerator(3, 2)"),
    ],
)
def test_one_positional_argument(make, start, received):
    text = message(make)
    assert re.match(rf"Only \w+ of {start}\(\) may be positional\. ", text)
    assert text.endswith(f"Received: {received}")


def test_advice_has_the_rank_of_the_layer():
    for rank, kind in ((1, Involution1D), (3, Involution3D)):
        text = message(lambda kind=kind: kind(64, 3))
        assert f"for Conv{rank}D(64, 3) write Involution{rank}D(3)" in text


def test_positional_values_are_shown_on_one_line():
    text = message(lambda: Involution2D(3, np.zeros((9, 9))))
    assert len(text) < 400


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda: Involution2D(3, stride=2, name="a"),
            "Involution2D() has no argument `stride`: use `strides`. Received: stride=2",
        ),
        (lambda: Involution2D(3, dilation=2), "use `dilation_rate`. Received: dilation=2"),
        (lambda: Involution2D(3, out_channels=8), "use `filters`, for a 1x1 convolution"),
        (lambda: Involution2D(3, in_channels=8), "the input's channels are known when"),
        (lambda: Involution2D(3, channels=8), "the input's channels are known when"),
        (lambda: Involution2D(3, channel=8), "the input's channels are known when"),
        (lambda: Involution2D(3, group_number=2), "use `groups`. Received: group_number=2"),
        (lambda: Involution2D(3, bias=True), "normalization after it, or `filters`, adds a bias"),
        (lambda: Involution2D(3, use_bias=True), "normalization after it, or `filters`, adds"),
        (lambda: Involution2D(3, activation="relu"), "apply it to the output"),
        (
            lambda: Involution2D(3, kernel_initializer="zeros"),
            "kernel_generator=Bottleneck(kernel_initializer=...)",
        ),
        (lambda: Inherits(3, stride=2), "Inherits() has no argument `stride`: use `strides`."),
        (lambda: Bottleneck(stride=2), "Bottleneck() has no argument `stride`: use `strides`."),
        (lambda: Static(filters=8), "a kernel map has taps * groups channels: use `groups`."),
        (lambda: Linear(3, out_channels=8), "a kernel map has taps * groups channels"),
    ],
)
def test_keywords_of_other_libraries(make, expected):
    assert expected in message(make)


def test_hints_name_arguments_that_exist():
    text = inspect.getsource(arguments) + inspect.getsource(involution_nd)
    hints = set(re.findall(r"use `(\w+)`", text))
    assert {"strides", "groups", "dilation_rate", "filters"} <= hints
    assert hints <= inspect.signature(Involution2D).parameters.keys()
    shared = set(re.findall(r"use `(\w+)`", inspect.getsource(arguments)))
    assert {"strides", "groups"} == shared <= inspect.signature(Linear).parameters.keys()


def test_unknown_keywords_keep_keras_error():
    for make in (lambda: Involution2D(3, unknown=1), lambda: Linear(3, unknown=1)):
        with pytest.raises(ValueError, match=r"Unrecognized keyword arguments passed to"):
            make()


@pytest.mark.parametrize("kind", [InvolutionND, Involution2D, *GENERATORS.values()])
def test_signature_is_readable(kind):
    """Help, and Keras, see the arguments themselves."""
    parameters = inspect.signature(kind).parameters
    kinds = [p.kind for p in parameters.values()]
    assert kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) == 1
    assert inspect.Parameter.VAR_POSITIONAL not in kinds
    # Keras's automatic configuration drops the arguments of other signatures.
    assert inspect.getfullargspec(kind.__init__).args == ["self", next(iter(parameters))]


@keras.saving.register_keras_serializable(package="tests")
class Striped(Involution2D):
    """A subclass with its own arguments."""

    def __init__(self, rows=3, **kwargs):
        super().__init__((rows, 1), **{"strides": 2, **kwargs})
        self.rows = rows

    def get_config(self):
        config = super().get_config()
        del config["kernel_size"]
        return {**config, "rows": self.rows}


def test_subclasses_are_saved_and_cloned(tmp_path):
    inputs = keras.Input((7, 6, 8))
    model = keras.Model(inputs, Striped(5, groups=2, name="striped")(inputs))
    x = np.random.default_rng(0).random((2, 7, 6, 8), "float32")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numpy(loaded(x)), numpy(model(x)))
    layer = keras.models.clone_model(model).get_layer("striped")
    assert (layer.rows, layer.kernel_size, layer.strides, layer.groups) == (5, (5, 1), (2, 2), 2)
