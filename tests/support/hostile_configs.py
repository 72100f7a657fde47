"""Configurations of every accepted layer, in which one integer is replaced by a huge one."""

import copy
import inspect
import json
import re
import zipfile
from collections.abc import Iterator

import keras

import involution
from involution.saving import keras_archive

HUGE = 10**9
L, G = keras.layers, involution.kernel_generators

# Values of required arguments, by name.
REQUIRED = {
    "activation": "relu",
    "axes": -1,
    "cell": lambda: L.LSTMCell(3),
    "cells": lambda: [L.LSTMCell(3), L.GRUCell(2)],
    "dims": (2, 1),
    "equation": "abc,cd->abd",
    "factor": 0.5,
    "filters": 4,
    "head_dim": 2,
    "height": 2,
    "height_factor": 0.5,
    "input_dim": 5,
    "key_dim": 2,
    "kernel_size": 2,
    "n": 2,
    "num_heads": 2,
    "num_key_value_heads": 2,
    "num_query_heads": 4,
    "output_dim": 3,
    "pool_size": 2,
    "rate": 0.5,
    "scale": 2,
    "stddev": 0.5,
    "target_shape": (6, 4),
    "units": 4,
    "width": 2,
    "width_factor": 0.5,
}
# Optional arguments whose values add integers to the configuration.
OPTIONAL = {
    "Dense": {"lora_rank": 2},
    "EinsumDense": {"output_shape": (None, 3), "bias_axes": "d", "lora_rank": 2},
    "Embedding": {"lora_rank": 2},
    "GroupNormalization": {"groups": 2},
    "SpectralNormalization": {"layer": lambda: L.Dense(3)},
    "TimeDistributed": {"layer": lambda: L.Dense(3)},
    "Bidirectional": {"layer": lambda: L.LSTM(3)},
    "MultiHeadAttention": {"value_dim": 3, "output_shape": 5, "attention_axes": 1},
    "Conv2D": {"lora_rank": 2},
}
OWN = {
    "Involution": {},
    "Involution1D": {"kernel_size": 3},
    "Involution2D": {"kernel_size": 3, "filters": 4},
    "Involution3D": {"kernel_size": 3},
    "contextual": {"kernel_size": 3, "kernel_generator": lambda: G.Contextual(2)},
    "pairwise": {"kernel_size": 3, "kernel_generator": lambda: G.PairwiseAttention()},
    "static": {"kernel_size": 3, "kernel_generator": lambda: G.Static()},
}
TWO_INPUTS = ("AdditiveAttention", "Attention", "Dot", "GroupQueryAttention", "MultiHeadAttention")
MERGING_LAYERS = (
    *("Add", "Average", "Concatenate", "Maximum", "Minimum", "Multiply", "Subtract", "Dot"),
    *("Attention", "AdditiveAttention"),
)


def _value(argument):
    return argument() if callable(argument) else argument


def valid_model(name) -> keras.Model:
    """A model with one layer."""
    if name in OWN:
        kind = getattr(involution, name, involution.Involution2D)
        arguments = OWN[name]
    else:
        kind = getattr(L, name)
        parameters = inspect.signature(kind.__init__).parameters.values()
        required = [p.name for p in parameters if p.name in REQUIRED and p.default is p.empty]
        arguments = {key: REQUIRED[key] for key in required} | OPTIONAL.get(name, {})
    layer = kind(**{key: _value(value) for key, value in arguments.items()})
    if name == "Embedding":
        inputs = [keras.Input((4,), dtype="int32")]
    elif name == "RepeatVector":
        inputs = [keras.Input((4,))]
    else:
        inputs = [
            keras.Input(_shape(name))
            for _ in range(2 if name in TWO_INPUTS + MERGING_LAYERS else 1)
        ]
    if name.endswith("Cell") or name == "StackedRNNCells":
        inputs, layer = [keras.Input((5, 3))], L.RNN(layer)
    if name in ("GroupQueryAttention", "MultiHeadAttention"):
        return keras.Model(inputs, layer(*inputs))
    return keras.Model(inputs, layer(inputs if len(inputs) > 1 else inputs[0]))


def _shape(name):
    if name.startswith("ConvLSTM"):
        return (2, *(5,) * int(name[-2]), 3)
    rank = next((int(n) for n in "123" if f"{n}D" in name), None)
    if name.startswith(("Random", "Resizing", "CenterCrop")) or name in OWN:
        rank = rank or 2
    return ((6,) * rank if rank else (4,)) + (6,)


def numbers(value, path=()) -> Iterator[tuple]:
    """Paths to values in a configuration that could be sizes."""
    if isinstance(value, dict):
        if value.get("class_name") in ("DTypePolicy", "__keras_tensor__"):
            return
        for key, part in value.items():
            yield from numbers(part, (*path, key))
    elif isinstance(value, list):
        for key, part in enumerate(value):
            yield from numbers(part, (*path, key))
    elif value is None or (isinstance(value, int) and not isinstance(value, bool)):
        yield path


SKIPPED = re.compile(
    "registered_name|module|seed|shared_object_id|.*_(regularizer|constraint)|mask"
)


def with_one_huge_integer(config, within=()) -> Iterator[tuple[str, dict]]:
    """Yields (path, configuration with ``HUGE`` at this path of a layer).

    With ``within``, paths begin with one of these keys, and input layers are skipped.
    """
    for index, layer in enumerate(config["config"]["layers"]):
        for path in numbers(layer):
            if any(SKIPPED.fullmatch(str(key)) for key in path) or "kernel_initializer" in path:
                continue
            if within and (path[0] not in within or layer["class_name"] == "InputLayer"):
                continue
            changed = copy.deepcopy(config)
            target = changed["config"]["layers"][index]
            for key in path[:-1]:
                target = target[key]
            target[path[-1]] = HUGE
            yield "/".join(map(str, (layer["class_name"], *path))), changed


def parts(model, folder) -> dict[str, bytes]:
    model.save(folder / "valid.keras")
    with zipfile.ZipFile(folder / "valid.keras") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path, parts, config):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**parts, "config.json": json.dumps(config)}.items():
            archive.writestr(name, content)
    return path


NAMES = [name for name in keras_archive.LAYERS.split() if name != "InputLayer"] + list(OWN)
