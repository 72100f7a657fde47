"""``fold``: batch normalization merged into the convolutions before it, for inference."""

import collections
import tempfile
import typing

import keras
import numpy as np
from keras import tree

from involution.kernel_generators.convolutional import Bottleneck, Contextual
from involution.kernel_generators.large_context import LargeContext
from involution.kernel_generators.pointwise import AFFINE
from involution.layers.base import BaseInvolution

# Compared by exact type: a subclass may compute something else.
DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
LAYERS = (*AFFINE, *DEPTHWISE, keras.layers.Dense)
GENERATORS = (Bottleneck, Contextual, LargeContext)


def fold(model: keras.Model) -> keras.Model:
    """A copy of a functional model for inference, without batch normalization where a convolution
    precedes it.

    The normalization's scale and offset become part of the weights of the convolution or dense
    layer before it, if this has no activation and no other layer uses its output, and of the
    convolutions of ``Bottleneck``, ``Contextual`` and ``LargeContext`` generators. Other
    normalization stays, for example after an involution, whose channels share kernels. Functional
    models inside the model are folded too. Outputs equal those of ``model`` with
    ``training=False`` up to rounding.

    Args:
        model: A functional or sequential model that is built. It is not modified.

    Returns:
        The folded model, not trainable, with the names of the model and its layers.

    Raises:
        ValueError: The model is a subclass of ``keras.Model``, or not built, or a layer's
            configuration does not describe its weights, as with LoRA.

    Example:

    >>> import involution
    >>> folded = involution.models.fold(involution.models.RedNet26((32, 32, 3), classes=5))
    >>> sum("bn" in layer.name for layer in folded.layers)
    9
    """
    if not is_functional(model):
        raise ValueError(
            "A folded model must be functional or sequential, and built. "
            f"Received: {getattr(model, 'name', model)}, of {type(model).__name__}"
        )
    graph = model
    if isinstance(model, keras.Sequential):
        outputs = model.outputs if len(model.outputs) > 1 else model.outputs[0]
        graph = keras.Model(model.inputs[0], outputs, name=model.name)
    normalization = _normalization_by_layer(graph)
    removed = {bn.name for bn in normalization.values()}

    def clone(layer):
        if is_functional(layer):
            return fold(layer)
        config = layer.get_config()
        if layer.name in normalization:
            config["use_bias"] = True
        elif _has_folded_generator(layer):
            generator = layer.kernel_generator
            without = type(generator).from_config(
                {**generator.get_config(), "use_normalization": False}
            )
            config["kernel_generator"] = keras.saving.serialize_keras_object(without)
        return type(layer).from_config(config)

    def call(layer, *args, **kwargs):
        if layer.name not in removed:
            return layer(*args, **kwargs)
        return args[0] if args else kwargs["inputs"]

    # Keras names the inputs of a clone after tensors. Matched by identity, because the order of a
    # dictionary depends on the backend.
    layers = {
        id(layer.output): layer
        for layer in graph.layers
        if isinstance(layer, keras.layers.InputLayer)
    }
    inputs = tree.map_structure(
        lambda tensor: keras.Input(**layers[id(tensor)].get_config()), graph.input
    )
    folded = keras.models.clone_model(graph, inputs, clone, call)
    for layer in folded.layers:
        source = graph.get_layer(layer.name)
        if is_functional(source):
            continue
        if layer.name in normalization:
            bias = [] if source.use_bias else [layer.bias]
            _copy_state(source, layer, added=bias)
            _merge(source, normalization[layer.name], layer)
        elif _has_folded_generator(source):
            old, new = source.kernel_generator, layer.kernel_generator
            parts = [
                (getattr(old, name), getattr(old, bn), getattr(new, name))
                for name, bn in old.NORMALIZED
            ]
            removed_weights = [weight for _, bn, _ in parts for weight in bn.weights]
            _copy_state(source, layer, removed_weights, [target.bias for *_, target in parts])
            for part in parts:
                _merge(*part)
        else:
            _copy_state(source, layer)
    folded.trainable = False
    return folded


def is_functional(model) -> bool:
    """Whether ``fold`` supports a model: Keras's own classes, of layers called on tensors."""
    own = isinstance(model, keras.Model) and type(model).__module__.startswith("keras.")
    return own and model.built and bool(getattr(model, "inputs", None))


def _normalization_by_layer(model) -> dict:
    """For each layer that can be folded, by its name, the batch normalization of its output."""
    config = model.get_config()
    sources = {layer["name"]: _sources(layer["inbound_nodes"]) for layer in config["layers"]}
    uses = collections.Counter(name for names in sources.values() for name in names)
    uses.update(_layer_names(config["output_layers"]))
    nodes = {layer["name"]: len(layer["inbound_nodes"]) for layer in config["layers"]}
    found = {}
    for bn in model.layers:
        if type(bn) is not keras.layers.BatchNormalization or nodes[bn.name] != 1:
            continue
        name, *mask = sources[bn.name]
        layer = model.get_layer(name)
        if (
            type(layer) in LAYERS
            and not mask
            and nodes[name] == 1
            and uses[name] == 1
            and layer.activation in (None, keras.activations.linear)
            and layer.compute_dtype == bn.compute_dtype
            and _has_plain_weights(layer)
            and _channel_axis(layer) == bn.axis % len(layer.output.shape)
        ):
            found[name] = bn
    return found


def _layer_names(tensors) -> list[str]:
    """The layers of a model's input or output tensors, given by name, node and index."""
    return [leaf for leaf in tree.flatten(tensors) if isinstance(leaf, str)]


def _sources(config) -> list[str]:
    """The layers whose output tensors a part of a model's configuration contains."""
    if isinstance(config, dict):
        if config.get("class_name") == "__keras_tensor__":
            return [config["config"]["keras_history"][0]]
        config = config.values()
    elif not isinstance(config, (list, tuple)):
        return []
    return [name for part in config for name in _sources(part)]


def _channel_axis(layer) -> int:
    first = getattr(layer, "data_format", None) == "channels_first"
    return 1 if first else len(layer.output.shape) - 1


def _has_folded_generator(layer) -> bool:
    generator: typing.Any = getattr(layer, "kernel_generator", None)
    return (
        isinstance(layer, BaseInvolution)
        and type(generator) in GENERATORS
        and generator.use_normalization
        and all(
            _has_plain_weights(getattr(generator, name, None))
            for name in (*dict(generator.NORMALIZED), "expand")
        )
    )


def _has_plain_weights(layer) -> bool:
    """Whether a layer's configuration tells which weights it has: neither LoRA nor quantization."""
    return not getattr(layer, "lora_enabled", False) and layer.quantization_mode is None


def _copy_state(source, target, removed=(), added=()):
    """Copies weights in order, without those removed from ``source`` and added to ``target``, and
    what a layer keeps outside of its weights."""
    absent, new = {id(weight) for weight in removed}, {id(weight) for weight in added}
    values = [weight for weight in source.weights if id(weight) not in absent]
    weights = [weight for weight in target.weights if id(weight) not in new]
    if [tuple(w.shape) for w in values] != [tuple(w.shape) for w in weights]:
        raise ValueError(
            "A layer of a folded model must have the weights that its configuration describes, "
            f"without LoRA or quantization. Received: {source.name}, of {type(source).__name__}"
        )
    for weight, value in zip(weights, values, strict=True):
        weight.assign(value)
    if hasattr(source, "save_assets"):
        with tempfile.TemporaryDirectory() as folder:
            source.save_assets(folder)
            target.load_assets(folder)
    if hasattr(target, "finalize_state"):
        target.finalize_state()


def _merge(source, bn, target):
    """Sets the weights of ``target`` to those of ``source`` followed by ``bn``."""

    def values(variable, default=0.0):
        if variable is None:
            return np.float64(default)
        return keras.ops.convert_to_numpy(variable).astype("float64")

    scale = values(bn.gamma, 1.0) / np.sqrt(values(bn.moving_variance) + bn.epsilon)
    bias = values(source.bias if source.use_bias else None)
    # The output channels of a depthwise convolution are the last two axes of its kernel.
    by_channel = scale.reshape(source.kernel.shape[-2:]) if type(source) in DEPTHWISE else scale
    target.kernel.assign((values(source.kernel) * by_channel).astype(target.kernel.dtype))
    offset = values(bn.beta) + (bias - values(bn.moving_mean)) * scale
    target.bias.assign(offset.astype(target.bias.dtype))
