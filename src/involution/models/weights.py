"""A model in a folder: ``config.json``, how to build it, and ``model.safetensors``, its weights.

No code is stored, so that loading runs none: the configuration names a function of
``involution.models.MODELS`` and its arguments. The folder loads on every backend.
"""

import json
import math
import pathlib
from collections.abc import Callable

import keras
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_arrays

from involution.kernel_generators.generators import base_name
from involution.models.checkpoint_readers.errors import CheckpointError
from involution.models.registry import MODELS
from involution.utils import atomic_files
from involution.utils.abstract_build import outline

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT, VERSION = "involution model", 1
CONFIG_LIMIT = 2**20
# What NumPy reads of safetensors' types and a weight can be.
TYPES = ("F16", "F32", "F64")
SHOWN = 20


def save(folder, name, arguments, model, extra=None):
    """Writes a model into a folder, which is made where it is missing.

    Args:
        folder: The folder. Files of the same names in it are replaced.
        name: Name of the function in ``involution.models.MODELS`` that built the model.
        arguments: Dictionary of the arguments it was called with, of numbers, texts, booleans, None
            and sequences of them.
        model: The model.
        extra: Dictionary of what else the configuration shall hold, as ``read_config`` gives it
            back: where the weights come from, names of classes.

    Raises:
        ValueError: ``name`` is no such function, or two weights would have one name.

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
    tensors = {key: _array(variable) for key, variable in named_weights(model).items()}
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_files.replacing(folder / WEIGHTS) as temporary:
        temporary.write_bytes(save_arrays(tensors))
    # Last, because a folder is a model from here on.
    atomic_files.write_json(
        folder / CONFIG,
        {
            "format": FORMAT,
            "version": VERSION,
            "name": name,
            "arguments": dict(arguments),
            "extra": dict(extra or {}),
        },
    )


def load(folder) -> keras.Model:
    """Builds the model of a folder that ``save`` wrote, and sets its weights.

    The weights take the types of the current dtype policy.

    Args:
        folder: The folder.

    Returns:
        The model, not compiled.

    Raises:
        CheckpointError: It is no such folder; tensors are missing, unknown or of other shapes.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            shapes = {key: _shape(file, key) for key in file.keys()}  # noqa: SIM118 - no mapping
            build = _builder(folder, config, shapes)
            # Before the model takes memory.
            stored = sum(map(math.prod, shapes.values()))
            expected = named_weights(outline(build, stored))
            check_tensors(
                {key: tuple(v.shape) for key, v in expected.items()}, shapes, folder / WEIGHTS
            )
            model = build()
            for key, variable in named_weights(model).items():
                assign(variable, file.get_tensor(key))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            "A model's weights must be a whole safetensors file. "
            f"Received: {folder / WEIGHTS}: {_one_line(error)}"
        ) from error
    return model


def read_config(folder) -> dict:
    """The configuration that ``save`` wrote: ``name``, ``arguments``, ``extra``.

    Raises:
        CheckpointError: There is none, or it is not of that form.
    """
    path = pathlib.Path(folder) / CONFIG
    rule = f"A model's folder must hold {CONFIG} and {WEIGHTS} as involution writes them."
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
        raise CheckpointError(f"{rule} Received: {path}: {_one_line(error)}") from error
    return config


def named_weights(model) -> dict:
    """The variables of a model by names that do not depend on what was built before.

    A name is that of the layer in ``model.layers``, then the path inside it. Numbers that Keras
    puts behind names of its own making count how many layers of a class the process has built;
    here they are counted anew in every model, and inside every layer.

    Args:
        model: A built ``keras.Model``.

    Returns:
        A dictionary from names to ``keras.Variable``, in the order of the layers.

    Raises:
        ValueError: Two weights would have one name.

    Example:

    >>> import involution
    >>> from involution.models.weights import named_weights
    >>> list(named_weights(involution.models.cnn()))[:3]
    ['conv2d/kernel', 'conv2d/bias', 'conv2d_1/kernel']
    """
    named: dict = {}
    given: dict[str, str] = {}
    for layer in model.layers:
        if not layer.weights:
            continue
        automatic = base_name(layer.name).replace("_", "") == type(layer).__name__.lower()
        outer = _numbered(layer.name, given) if automatic else layer.name
        for inner, variable in _inside(layer):
            name = f"{outer}/{inner}"
            if name in named:
                raise ValueError(f"Weights must have names of their own. Received: {name} twice")
            named[name] = variable
    return named


def check_tensors(expected, received, source):
    """Compares names and shapes, before anything is changed.

    Args:
        expected: Dictionary from names to shapes; None for any shape.
        received: Dictionary from names to shapes.
        source: What the received ones come from, for the message.

    Raises:
        CheckpointError: They differ; the message names the tensors.
    """
    missing = [name for name in expected if name not in received]
    unknown = [name for name in received if name not in expected]
    wrong = [
        f"{name} {received[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in received and shape not in (None, received[name])
    ]
    parts = [
        f"{len(names)} {what}: {listed(names)}"
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", wrong))
        if names
    ]
    if parts:
        raise CheckpointError(
            "The tensors must be the model's, with its shapes. "
            f"Received: {source}, with {'; '.join(parts)}"
        )


def assign(variable, array):
    """Sets a variable from a NumPy array of its shape and of any floating type."""
    # A copy: PyTorch warns of memory that it must not write.
    variable.assign(np.array(array, dtype=_numpy_type(variable), order="C"))


def listed(names, shown=SHOWN) -> str:
    """Names in a line: the first ones, and how many more there are."""
    names = [str(name)[:200].encode("unicode_escape").decode() for name in names]
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _builder(folder, config, shapes) -> Callable[[], keras.Model]:
    """The function that builds the model, its arguments being such that it ends."""
    arguments = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in config["arguments"].items()
    }
    # A dictionary would be a layer, of whatever class it names.
    for key, value in arguments.items():
        parts = value if isinstance(value, tuple) else (value,)
        if any(isinstance(part, (dict, list)) for part in parts):
            raise CheckpointError(
                "A model's arguments must be numbers, texts, booleans, null, or lists of them. "
                f"Received: {folder / CONFIG} with {listed([key])}={str(value)[:100]!a}"
            )
    # Every block has weights; without an end the building would have none.
    blocks = arguments.get("blocks", ())
    counts = blocks if isinstance(blocks, tuple) else (blocks,)
    if sum(n for n in counts if isinstance(n, int) and n > 0) > len(shapes):
        raise CheckpointError(
            "A model must have tensors for all its `blocks`. "
            f"Received: {folder / CONFIG} with blocks={str(blocks)[:50]}, and {len(shapes)} tensors"
        )

    def build():
        try:
            return MODELS[config["name"]](**arguments)
        except Exception as error:  # a builder, and Keras, raise many kinds for wrong arguments
            raise CheckpointError(
                f"A model's arguments must suit {config['name']}. "
                f"Received: {folder / CONFIG}: {_one_line(error)}"
            ) from error

    return build


def _shape(file, key) -> tuple[int, ...]:
    tensor = file.get_slice(key)
    if tensor.get_dtype() not in TYPES:
        raise CheckpointError(
            f"A model's tensors must be of the types {', '.join(TYPES)}. "
            f"Received: {listed([key])} of type {tensor.get_dtype()}"
        )
    return tuple(tensor.get_shape())


def _numpy_type(variable):
    """The variable's own type where NumPy has it, and float32 for bfloat16."""
    name = keras.backend.standardize_dtype(variable.dtype)
    return name if name in ("float16", "float32", "float64") else "float32"


def _array(variable):
    return np.ascontiguousarray(
        keras.ops.convert_to_numpy(variable.value), dtype=_numpy_type(variable)
    )


def _inside(layer):
    """Pairs (path inside the layer, variable)."""
    given: dict[str, dict[str, str]] = {}
    for variable in layer.weights:
        *scopes, last = variable.path.split("/")
        # A layer that was built before its outer one, as in loading, lacks the outer one's name.
        if layer.name in scopes:
            scopes = scopes[scopes.index(layer.name) + 1 :]
        path = ""
        for scope in scopes:
            path += _numbered(scope, given.setdefault(path, {})) + "/"
        yield path + last, variable


def _numbered(name, given) -> str:
    """A name with its number counted among those in ``given``, which takes it up."""
    if name not in given:
        base = base_name(name)
        before = sum(base_name(other) == base for other in given)
        given[name] = f"{base}_{before}" if before else base
    return given[name]


def _one_line(error) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
