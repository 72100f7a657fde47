"""Trained models as the start of further training, with a new head for other classes."""

import contextlib
import functools

import keras

from involution.models import weights
from involution.models.specs import Builder
from involution.saving import classifier
from involution.training.recipes import PRECISIONS
from involution.utils.errors import InputError

POLICIES = frozenset(PRECISIONS.values())
# May follow the last Dense layer.
ACTIVATIONS = (keras.layers.Activation, keras.layers.Softmax)


def is_trained(text) -> bool:
    """Whether this is a pretrained model's name, a ``.keras`` file, or a folder with a model."""
    path = classifier.resolve(text)
    is_folder = (path / weights.CONFIG).is_file() and (path / weights.WEIGHTS).is_file()
    return path.suffix == ".keras" or is_folder


def builder(spec) -> Builder | None:
    """The builder of a trained model, for ``specs.parse``; None if the spec is not one."""
    return functools.partial(build, spec) if is_trained(spec) else None


def image_size(text) -> tuple[int, int] | None:
    """(height, width) of the images that a trained model was trained on; None if unknown."""
    with contextlib.suppress(InputError):
        return classifier.image_shape(text)[:2]
    return None


def build(text, input_shape, classes) -> keras.Model:
    """Loads a trained model; with another number of classes, its last layer is new.

    Its layers have Keras's dtype policy, whatever the precision that they were trained with.

    Args:
        text: A pretrained model's name, a ``.keras`` file, or a folder with a model.
        input_shape: (height, width, channels) of the images.
        classes: Number of classes.

    Raises:
        InputError: The model cannot be loaded, is for images of another size, or does not end in a
            Dense layer, which an activation may follow, and has another number of classes.
    """
    model = _with_dtype_policy(classifier.load_model(classifier.resolve(text)))
    expected = model.input_shape[1:]
    if any(n is not None and n != m for n, m in zip(expected, input_shape, strict=True)):
        raise InputError(
            f"Images must have the size of the trained model, {expected[0]}x{expected[1]}; set "
            f"`image_size`. Received: {input_shape[0]}x{input_shape[1]}"
        )
    *_, before, last = model.layers
    activations = [last] if isinstance(last, ACTIVATIONS) else []
    dense = before if activations else last
    if model.output_shape[1:] == (classes,):
        return model
    if not isinstance(dense, keras.layers.Dense):
        raise InputError(
            "The last layer of a trained model must be Dense, to be replaced for other classes. "
            f"Received: {type(dense).__name__} in {text}"
        )
    outputs = keras.layers.Dense.from_config(dense.get_config() | {"units": classes})(dense.input)
    for layer in activations:
        outputs = type(layer).from_config(layer.get_config())(outputs)
    return keras.Model(model.input, outputs, name=model.name)


def _with_dtype_policy(model) -> keras.Model:
    """The model, or a copy of it if layers have the dtype policy of another precision."""
    config = keras.saving.serialize_keras_object(model)
    converted = _converted(config, keras.config.dtype_policy().name)
    if converted == config:
        return model
    copy = keras.saving.deserialize_keras_object(converted)
    copy.set_weights(model.get_weights())
    return copy


def _converted(config, policy):
    """A serialized object with this dtype policy in place of those of a run's precision."""
    if isinstance(config, (list, tuple)):
        return type(config)(_converted(value, policy) for value in config)
    if not isinstance(config, dict):
        return config
    if config.get("class_name") == "DTypePolicy" and config["config"]["name"] in POLICIES:
        return config | {"config": config["config"] | {"name": policy}}
    return {key: _converted(value, policy) for key, value in config.items()}
