"""Relation of a generator to its involution layer: inherited arguments, names, ownership."""

import gc
import weakref

import keras

from involution.kernel_generators.base import INHERITED_ARGUMENTS
from involution.utils.layer_names import base_name, has_automatic_name

# From a generator to the names of the attributes inherited from its involution layer.
_inherited: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

# Generators built by an involution layer.
_built: weakref.WeakSet = weakref.WeakSet()

# From a generator, and from each layer inside it, to a weak reference to its involution layer.
_owners: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def layers_within(layer) -> list[keras.layers.Layer]:
    """A layer and the layers in its attributes, at any depth, each once and in order.

    Keras has a public list of sublayers for models only.
    """
    found: list[keras.layers.Layer] = []
    seen: dict[int, object] = {}  # keeps the objects alive: their ids must stay unique

    def visit(value):
        if id(value) in seen:
            return
        seen[id(value)] = value
        if isinstance(value, keras.layers.Layer):
            found.append(value)
            attributes = vars(value)
            # First a model's layers in their order. The order of ``vars`` differs on PyTorch, which
            # stores modules first.
            parts = [
                getattr(value, "layers", None),
                *(attributes[name] for name in sorted(attributes)),
            ]
        elif isinstance(value, dict):
            parts = list(value.values())
        elif isinstance(value, (list, tuple, set)):
            parts = list(value)
        else:
            return
        for part in parts:
            visit(part)

    visit(layer)
    return found


def inherit_arguments(generator, layer, arguments):
    """Sets the attributes of ``INHERITED_ARGUMENTS`` that are None in a generator to its layer's
    ``arguments``.

    Raises:
        ValueError: The generator was built with different values, of another layer.
    """
    inherited = _inherited.setdefault(generator, set())
    for name in INHERITED_ARGUMENTS:
        value = arguments[name]
        # Values that were not inherited are kept: a Conv2D has its own strides.
        if name not in inherited and getattr(generator, name, generator) is not None:
            continue
        if not generator.built:
            setattr(generator, name, value)
            inherited.add(name)
        elif getattr(generator, name) not in (None, value):
            raise ValueError(
                f"A kernel generator can be shared only by layers with equal `{name}`. "
                f"Received: kernel_generator={generator.name}, built with "
                f"{name}={getattr(generator, name)}, in layer {layer.name} with {name}={value}"
            )


def serialized(generator) -> dict:
    """The configuration of a generator, without attributes set by its involution layer."""
    stored = keras.saving.serialize_keras_object(generator)
    # Keras would build the generator before its layer sets the attributes.
    stored.pop("build_config", None)
    _remove_inherited(generator, stored["config"])
    return stored


def clone(identifier):
    """An identifier for ``get`` to use in one of several layers: layers are copied."""
    if isinstance(identifier, keras.layers.Layer):
        config = identifier.get_config()
        _remove_inherited(identifier, config)
        return type(identifier).from_config(config)
    return identifier


def _remove_inherited(generator, config):
    """Removes attributes set by an involution layer from a configuration."""
    for name in _inherited.get(generator, ()):
        if name in config:
            config[name] = None
    if generator in _built and isinstance(generator, keras.Sequential):
        # From these shapes Keras would build the generator before its layer sets the attributes.
        config.pop("build_input_shape", None)
        config["layers"] = [
            {key: value for key, value in part.items() if key != "build_config"}
            for part in config["layers"]
            if part["class_name"] != "InputLayer"
        ]


def check_unshared(generator, layer):
    """ValueError if a generator with weights, or a layer inside it, belongs to another layer.

    Training would work, but files store shared weights once and could not be loaded.
    """
    for part in layers_within(generator):
        if _other(part, layer) is None or not part.weights:
            continue
        # Keras's layers are in reference cycles: an unused one may still exist.
        gc.collect()
        other = _other(part, layer)
        if other is not None:
            raise ValueError(
                "A kernel generator with weights can belong to only one layer. Received: "
                f"kernel_generator={generator.name} in layer {layer.name}, with {part.name}, which "
                f"belongs to layer {other.name}"
            )


def build(generator, layer, input_shape):
    """Builds a generator if necessary, and records its layer."""
    if not generator.built:
        generator.build(input_shape)
        _built.add(generator)
    for part in layers_within(generator):
        _owners[part] = weakref.ref(layer)


def _other(part, layer):
    owner = _owners.get(part)
    found = None if owner is None else owner()
    return None if found is layer else found


def name_by_class(generator):
    """Renames automatically named layers of a generator by their classes.

    Keras numbers automatic names by a process-wide count, which would give equal models different
    weight paths. Here the numbers are local to the generator. Built layers keep their names, which
    are in the paths of their weights.
    """
    layers = layers_within(generator)
    named = [layer for layer in layers if not layer.built and has_automatic_name(layer)]
    taken = {layer.name for layer in layers if layer not in named}
    for layer in named:
        base = base_name(layer.name)
        names = (base if i == 0 else f"{base}_{i}" for i in range(len(layers) + 1))
        layer.name = next(name for name in names if name not in taken)
        taken.add(layer.name)
