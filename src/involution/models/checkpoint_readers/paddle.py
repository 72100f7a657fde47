"""PaddlePaddle's ``.pdparams``: a pickled dictionary from names to NumPy arrays.

``paddle.save`` writes protocols 2 to 4, a parameter as its array or as the pair (name, array), and
one more entry that maps names to names. What it makes of them was read in PaddlePaddle/Paddle,
``python/paddle/framework/io.py`` and ``io_utils.py``.
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
        file: An open file; arrays are copies of what stands in it.

    Raises:
        CheckpointError: It holds something else than arrays, or was split for its size.
    """
    # A mapped file gives what it has; a file would first take the memory that it is asked for.
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        pickled = restricted_unpickler.read(mapped, _functions())
    if not isinstance(pickled, dict):
        raise CheckpointError(
            f"A .pdparams file must hold a dictionary of arrays. Received: {type(pickled).__name__}"
        )
    if PARTS in pickled:
        raise CheckpointError(
            "A .pdparams file must hold its arrays in one piece each: one with parameters above "
            f"1 GB is to be saved with protocol 4. Received: a file with {PARTS}"
        )
    pickled.pop(NAMES, None)
    return {name: _value(name, entry) for name, entry in pickled.items()}


def _value(name, entry):
    if isinstance(entry, tuple) and len(entry) == 2:
        entry = entry[1]
    if not isinstance(name, str) or not isinstance(entry, _Array) or entry.value is None:
        raise CheckpointError(
            "A .pdparams file must hold arrays by name alone. "
            f"Received: {ascii(name)[:200]} of type {type(entry).__name__}"
        )
    return entry.value


class _Type:
    """NumPy's dtype in the making: a code, then its byte order."""

    def __init__(self, code, *_):
        if code not in TYPES:
            raise CheckpointError(
                f"An array must be of one of the types {', '.join(TYPES)}. "
                f"Received: {ascii(code)[:50] if isinstance(code, str) else type(code).__name__}"
            )
        self.name = f"<{code}"

    def build(self, state):
        _, order, *fields = state
        if order not in ("<", ">", "|") or fields[:3] != [None] * 3:
            raise CheckpointError("An array's type must be a number's. Received: another")
        self.name = order + self.name[1:]


class _Array:
    """An array in the making: empty, then its state."""

    value = None

    def build(self, state):
        _, shape, kind, fortran, data = state
        self.value = _array(data, kind, shape, "F" if fortran else "C")


def _array(data, kind, shape, order):
    if not isinstance(kind, _Type) or not isinstance(data, (bytes, bytearray)):
        raise CheckpointError(
            f"An array must be made of bytes and a type. Received: {type(data).__name__}"
        )
    return array(data, kind.name, shape, "an array", order)


def _functions():
    """What the names in a pickle of NumPy arrays mean."""
    encoded: dict[int, tuple[str, bytes]] = {}

    def reconstruct(kind, *_):
        if kind != restricted_unpickler.Name("numpy.ndarray"):
            raise CheckpointError("An array must be a numpy.ndarray. Received: another class")
        return _Array()

    def from_buffer(data, kind, shape, order):
        made = _Array()
        made.value = _array(data, kind, shape, "F" if order == "F" else "C")
        return made

    def encode(text, encoding):
        """Bytes as protocol 2 writes them. One result for a text, however often it is asked for."""
        if encoding not in ("latin1", "latin-1"):
            raise CheckpointError("Bytes must be written as latin1. Received: another encoding")
        if id(text) not in encoded:
            encoded[id(text)] = (text, text.encode("latin-1"))
        return encoded[id(text)][1]

    def pair(values):
        # Not tuple(values): a long list, asked for often, would fill the memory.
        if not isinstance(values, tuple):
            raise TypeError(f"tuple of {type(values).__name__}")
        return values

    functions: dict[str, Callable | None] = {
        "numpy.ndarray": None,
        "numpy.dtype": _Type,
        "_codecs.encode": encode,
        "collections.OrderedDict": restricted_unpickler.empty_dictionary,
        "builtins.tuple": pair,
        "__builtin__.tuple": pair,
    }
    for module in ("numpy.core", "numpy._core"):
        functions[f"{module}.multiarray._reconstruct"] = reconstruct
        functions[f"{module}.numeric._frombuffer"] = from_buffer
    return functions
