"""PaddlePaddle's ``.pdparams``: a pickled dictionary from names to NumPy arrays.

``paddle.save`` writes pickle protocols 2 to 4, a parameter as its array or as the pair (name,
array), and an additional entry that maps names to names. The format is defined by
PaddlePaddle/Paddle, ``python/paddle/framework/io.py`` and ``io_utils.py``.
"""

import mmap
from collections.abc import Callable

import numpy as np

from involution.models.checkpoint_readers import restricted_unpickler
from involution.models.checkpoint_readers.arrays import array
from involution.models.checkpoint_readers.errors import CheckpointError

NAMES = "StructuredToParameterName@@"
PARTS = "UnpackBigParamInfor@@"
TYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


def read(file) -> dict[str, np.ndarray]:
    """The arrays of a ``.pdparams`` file by name.

    Args:
        file: An open file; arrays are copies of its content.

    Raises:
        CheckpointError: The file has objects other than arrays, or parameters in several parts.
    """
    # read(n) of a file allocates n bytes, however large n is; that of a mapped file does not.
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        pickled = restricted_unpickler.read(mapped, _functions())
    if not isinstance(pickled, dict):
        raise CheckpointError(
            f"A .pdparams file must be a dictionary of arrays. Received: {type(pickled).__name__}"
        )
    if PARTS in pickled:
        raise CheckpointError(
            "A .pdparams file must contain each array as one part: save parameters above 1 GB with "
            f"protocol 4. Received: a file with {PARTS}"
        )
    pickled.pop(NAMES, None)
    return {name: _value(name, entry) for name, entry in pickled.items()}


def _value(name, entry):
    if isinstance(entry, tuple) and len(entry) == 2:
        entry = entry[1]
    if not isinstance(name, str) or not isinstance(entry, _Array) or entry.value is None:
        raise CheckpointError(
            "A .pdparams file must contain arrays by name only. "
            f"Received: {ascii(name)[:200]} of type {type(entry).__name__}"
        )
    return entry.value


class _Type:
    """A NumPy dtype in a pickle: created from a type code; ``build`` sets the byte order."""

    def __init__(self, code, *_):
        if code not in TYPES:
            raise CheckpointError(
                f"An array must have a dtype of {', '.join(TYPES)}. "
                f"Received: {ascii(code)[:50] if isinstance(code, str) else type(code).__name__}"
            )
        self.name = f"<{code}"

    def build(self, state):
        _, order, *fields = state
        if order not in ("<", ">", "|") or fields[:3] != [None] * 3:
            raise CheckpointError("An array must have a numeric dtype. Received: another")
        self.name = order + self.name[1:]


class _Array:
    """An array in a pickle: created empty; ``build`` sets its value."""

    value = None

    def build(self, state):
        _, shape, kind, fortran, data = state
        self.value = _array(data, kind, shape, "F" if fortran else "C")


def _array(data, kind, shape, order):
    if not isinstance(kind, _Type) or not isinstance(data, (bytes, bytearray)):
        raise CheckpointError(
            f"An array must have bytes and a dtype. Received: {type(data).__name__}"
        )
    return array(data, kind.name, shape, "an array", order)


def _functions():
    """The globals in a pickle of NumPy arrays."""
    encoded: dict[int, tuple[str, bytes]] = {}

    def reconstruct(kind, *_):
        if kind != restricted_unpickler.GlobalRef("numpy.ndarray"):
            raise CheckpointError("An array must be a numpy.ndarray. Received: another class")
        return _Array()

    def from_buffer(data, kind, shape, order):
        result = _Array()
        result.value = _array(data, kind, shape, "F" if order == "F" else "C")
        return result

    def encode(text, encoding):
        """Bytes as protocol 2 writes them, cached: a file may refer to one string many times."""
        if encoding not in ("latin1", "latin-1"):
            raise CheckpointError("Bytes must be encoded as latin1. Received: another encoding")
        if id(text) not in encoded:
            encoded[id(text)] = (text, text.encode("latin-1"))
        return encoded[id(text)][1]

    def pair(values):
        # Not tuple(values): copies of a long list, referred to many times, would fill the memory.
        if not isinstance(values, tuple):
            raise TypeError(f"tuple of {type(values).__name__}")
        return values

    functions: dict[str, Callable | None] = {
        "numpy.ndarray": None,
        "numpy.dtype": _Type,
        "_codecs.encode": encode,
        "collections.OrderedDict": restricted_unpickler.empty_dict,
        "builtins.tuple": pair,
        "__builtin__.tuple": pair,
    }
    for module in ("numpy.core", "numpy._core"):
        functions[f"{module}.multiarray._reconstruct"] = reconstruct
        functions[f"{module}.numeric._frombuffer"] = from_buffer
    return functions
