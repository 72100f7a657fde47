"""The folder format of models: ``config.json`` and the weights, ``model.safetensors``.

The format contains no code, and loading executes none: the configuration has the name of a function
of ``involution.models.MODELS`` and its arguments. A folder can be loaded on every backend.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_arrays

from involution.models.checkpoint_readers.errors import CheckpointError
from involution.models.registry import MODELS
from involution.utils import atomic_files
from involution.utils.abstract_build import build_abstract
from involution.utils.errors import convert_exceptions, one_line
from involution.utils.layer_names import base_name, has_automatic_name

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT, VERSION = "involution model", 1
CONFIG_LIMIT = 2**20
# The floating-point dtypes of safetensors that NumPy has.
DTYPES = ("F16", "F32", "F64")
MAX_SHOWN = 20


def save(
    folder: str | os.PathLike[str],
    name: str,
    arguments: dict[str, Any],
    model: keras.Model,
    extra: dict[str, Any] | None = None,
) -> None:
    """Writes a model to a folder, which is created if missing.

    Args:
        folder: The folder. Existing files are replaced.
        name: Name of the function in ``involution.models.MODELS`` that built the model.
        arguments: Dictionary of its arguments: numbers, strings, booleans, None, or sequences of
            them.
        model: The model.
        extra: Dictionary of additional entries of the configuration, which ``read_config`` returns,
            such as class names or the source of the weights.

    Raises:
        ValueError: ``name`` is not in ``MODELS``, or two weights have the same name.

    Example:

    >>> import tempfile, involution
    >>> from involution.models import weights
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     weights.save(folder, "cnn", {"classes": 7}, involution.models.cnn(classes=7))
    ...     weights.load(folder).output_shape
    (None, 7)
    """
    if name not in MODELS:
        raise ValueError(f"`name` must be one of {', '.join(MODELS)}. Received: name={name!r}")
    tensors = {key: _to_numpy(variable) for key, variable in named_weights(model).items()}
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "arguments": dict(arguments),
        "extra": dict(extra or {}),
    }
    with (
        atomic_files.atomic_write(folder / CONFIG) as new_config,
        atomic_files.atomic_write(folder / WEIGHTS) as new_weights,
    ):
        new_config.write_text(atomic_files.json_text(config), encoding="utf-8", newline="\n")
        new_weights.write_bytes(save_arrays(tensors))
        # A folder with a configuration is a complete model, also while its files are replaced.
        (folder / CONFIG).unlink(missing_ok=True)


def load(folder) -> keras.Model:
    """Loads a model from a folder written by ``save``.

    The variables have the dtypes of the current dtype policy.

    Args:
        folder: The folder.

    Returns:
        The model, not compiled.

    Raises:
        CheckpointError: The folder has no such model, or tensors are missing, unknown or of wrong
            shape.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            shapes = {key: _shape(file, key) for key in file.keys()}  # noqa: SIM118 - no mapping
            build = _builder(folder, config, shapes)
            # Checked before memory is allocated for the model.
            stored = sum(map(math.prod, shapes.values()))
            expected = named_weights(build_abstract(build, stored))
            check_tensors(
                {key: tuple(v.shape) for key, v in expected.items()}, shapes, folder / WEIGHTS
            )
            model = build()
            for key, variable in named_weights(model).items():
                assign(variable, file.get_tensor(key))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            "A model's weights must be a complete safetensors file. "
            f"Received: {folder / WEIGHTS}: {type(error).__name__}: {one_line(error)}"
        ) from error
    return model


def read_config(folder) -> dict:
    """The configuration written by ``save``: a dictionary with ``name``, ``arguments``, ``extra``.

    Raises:
        CheckpointError: The configuration is missing or invalid.
    """
    path = pathlib.Path(folder) / CONFIG
    rule = f"A model folder must contain {CONFIG} and {WEIGHTS} as involution writes them."
    try:
        with open(path, "rb") as file:
            text = file.read(CONFIG_LIMIT + 1)
        if len(text) > CONFIG_LIMIT:
            raise ValueError(f"more than {CONFIG_LIMIT} bytes")
        config = json.loads(text)
        if (config["format"], config["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {config['format']!r}, version {config['version']!r}")
        if config["name"] not in MODELS:
            raise ValueError(f"unknown model {config['name']!r}")
        if not isinstance(config["arguments"], dict) or not isinstance(config["extra"], dict):
            raise TypeError("arguments and extra must be objects")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{rule} Received: {path}: {type(error).__name__}: {one_line(error)}"
        ) from error
    return config


def named_weights(model) -> dict:
    """The variables of a model by names that do not depend on models built before.

    A name is that of the layer in ``model.layers``, then the path inside the layer. In automatic
    names Keras counts the layers of a class in the process; here they are counted per model, and
    inside a layer per parent.

    Args:
        model: A built ``keras.Model``.

    Returns:
        A dictionary from names to ``keras.Variable``, in the order of the layers.

    Raises:
        ValueError: Two weights have the same name.

    Example:

    >>> import involution
    >>> from involution.models.weights import named_weights
    >>> list(named_weights(involution.models.cnn()))[:3]
    ['conv2d/kernel', 'conv2d/bias', 'conv2d_1/kernel']
    """
    named: dict = {}
    seen: dict[str, str] = {}
    for layer in model.layers:
        if not layer.weights:
            continue
        outer = _renumber(layer.name, seen) if has_automatic_name(layer) else layer.name
        for inner, variable in _layer_weights(layer):
            name = f"{outer}/{inner}"
            if name in named:
                raise ValueError(f"Weights must have unique names. Received: {name} twice")
            named[name] = variable
    return named


def check_tensors(expected, received, source):
    """Compares the names and shapes of tensors.

    Args:
        expected: Dictionary from names to shapes; None for any shape.
        received: Dictionary from names to shapes.
        source: The file of the received tensors, for the message.

    Raises:
        CheckpointError: They differ; the message lists the tensors.
    """
    missing = [name for name in expected if name not in received]
    unknown = [name for name in received if name not in expected]
    mismatched = [
        f"{name} {received[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in received and shape not in (None, received[name])
    ]
    parts = [
        f"{len(names)} {what}: {format_names(names)}"
        for what, names in (
            ("missing", missing),
            ("unknown", unknown),
            ("of another shape", mismatched),
        )
        if names
    ]
    if parts:
        raise CheckpointError(
            "Tensors must match the names and shapes of the model's weights. "
            f"Received: {source}, with {'; '.join(parts)}"
        )


def assign(variable, array):
    """Sets a variable from a NumPy array of its shape and any floating-point dtype."""
    # A copy: PyTorch warns about read-only arrays.
    variable.assign(np.array(array, dtype=_numpy_dtype(variable), order="C"))


def format_names(names, shown=MAX_SHOWN) -> str:
    """The first names and the number of the others, in one line."""
    names = [str(name)[:200].encode("unicode_escape").decode() for name in names]
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _builder(folder, config, shapes) -> Callable[[], keras.Model]:
    """A function that builds the model; CheckpointError if its arguments could exhaust memory."""
    arguments = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in config["arguments"].items()
    }
    # A dictionary could be the configuration of a layer of any class.
    for key, value in arguments.items():
        parts = value if isinstance(value, tuple) else (value,)
        if any(isinstance(part, (dict, list)) for part in parts):
            raise CheckpointError(
                "A model's arguments must be numbers, strings, booleans, null, or lists of them. "
                f"Received: {folder / CONFIG} with {format_names([key])}={str(value)[:100]!a}"
            )
    # Every block has weights, which bounds the number of blocks.
    blocks = arguments.get("blocks", ())
    counts = blocks if isinstance(blocks, tuple) else (blocks,)
    if sum(n for n in counts if isinstance(n, int) and n > 0) > len(shapes):
        raise CheckpointError(
            "`blocks` must not exceed the number of tensors. "
            f"Received: {folder / CONFIG} with blocks={str(blocks)[:50]} and {len(shapes)} tensors"
        )

    def build():
        # Keras raises many exception types for invalid arguments.
        rule = f"A model's arguments must be valid for {config['name']}."
        with convert_exceptions(CheckpointError, rule, folder / CONFIG):
            return MODELS[config["name"]](**arguments)

    return build


def _shape(file, key) -> tuple[int, ...]:
    tensor = file.get_slice(key)
    if tensor.get_dtype() not in DTYPES:
        raise CheckpointError(
            f"A model's tensors must have a dtype of {', '.join(DTYPES)}. "
            f"Received: {format_names([key])} of dtype {tensor.get_dtype()}"
        )
    return tuple(tensor.get_shape())


def _numpy_dtype(variable):
    """The dtype of a variable; float32 for bfloat16, which NumPy lacks."""
    name = keras.backend.standardize_dtype(variable.dtype)
    return name if name in ("float16", "float32", "float64") else "float32"


def _to_numpy(variable):
    return np.ascontiguousarray(
        keras.ops.convert_to_numpy(variable.value), dtype=_numpy_dtype(variable)
    )


def _layer_weights(layer):
    """Pairs (path inside the layer, variable) of a layer's weights."""
    seen: dict[str, dict[str, str]] = {}
    for variable in layer.weights:
        *scopes, last = variable.path.split("/")
        # A layer built before its parent, as in loading, lacks the parent's name in its paths.
        if layer.name in scopes:
            scopes = scopes[scopes.index(layer.name) + 1 :]
        path = ""
        for scope in scopes:
            path += _renumber(scope, seen.setdefault(path, {})) + "/"
        yield path + last, variable


def _renumber(name, seen) -> str:
    """A name numbered among those in ``seen``, to which it is added."""
    if name not in seen:
        base = base_name(name)
        before = sum(base_name(other) == base for other in seen)
        seen[name] = f"{base}_{before}" if before else base
    return seen[name]
