"""Names that Keras generates for layers."""

import keras
import pytest

from involution.utils.layer_names import base_name, has_automatic_name

pytestmark = pytest.mark.any_backend

L = keras.layers
CLASSES = ["Plain", "TwoWords", "HTTPLayer", "Conv4D", "Under_Score", "Two__Underscores", "Ending_"]


def layers(class_name, count=3, **arguments):
    cls = type(class_name, (L.Layer,), {})
    return [cls(**arguments) for _ in range(count)]


@pytest.mark.parametrize("class_name", CLASSES)
def test_generated_names_are_automatic(class_name):
    """Keras numbers all but the first layer of a class, whose name may contain underscores."""
    instances = layers(class_name)
    assert len({layer.name for layer in instances}) == 3
    assert all(map(has_automatic_name, instances)), [layer.name for layer in instances]
    assert len({base_name(layer.name) for layer in instances}) == 1


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("name", ["mine", "mine_3", "two_word", "plain_3_x", "3"])
def test_user_names_are_not_automatic(class_name, name):
    assert not any(map(has_automatic_name, layers(class_name, 1, name=name)))


def test_names_of_built_in_layers_are_automatic():
    automatic = [L.Conv2D(1, 1), L.ReLU(), L.GlobalAveragePooling2D(), L.LSTM(1), L.ELU()]
    assert all(map(has_automatic_name, automatic))
    # A name that Keras could generate for this class, and one for another class.
    assert has_automatic_name(L.Conv2D(1, 1, name="conv2d_7"))
    assert not has_automatic_name(L.Conv2DTranspose(1, 1, name="conv2d_7"))


@pytest.mark.parametrize(
    ("name", "base"),
    [("conv2d", "conv2d"), ("conv2d_0", "conv2d"), ("a_1_22", "a_1"), ("a_1b", "a_1b"), ("_1", "")],
)
def test_base_names(name, base):
    assert base_name(name) == base
