"""Arrays that view the bytes of a file, created after a check of their sizes."""

import math

import numpy as np

from involution.models.checkpoint_readers.errors import CheckpointError


def array(data, dtype, shape, what, order="C") -> np.ndarray:
    """An array that views all bytes of ``data``.

    Args:
        data: Bytes, or a view of them.
        dtype: Name of a NumPy dtype.
        shape: Value from the file; must be a tuple of integers.
        what: The name of the array, for the message.
        order: ``"C"`` or ``"F"``.

    Raises:
        CheckpointError: The shape is invalid, empty, or does not match the number of bytes.
    """
    dtype = np.dtype(dtype)
    if not is_shape(shape) or math.prod(shape) * dtype.itemsize != len(data):
        raise CheckpointError(
            "A tensor must have as many bytes in the file as its shape needs. Received: "
            f"{what} with shape {format_shape(shape)} of {dtype}, and {len(data)} bytes"
        )
    if len(data) == 0:
        raise CheckpointError(
            f"A tensor must have values. Received: {what} with shape {format_shape(shape)}"
        )
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def is_shape(value) -> bool:
    """Whether a value is a tuple of at most 8 integers from 0 to 2**62."""
    return (
        isinstance(value, tuple)
        and len(value) <= 8
        and all(isinstance(n, int) and 0 <= n < 2**62 for n in value)
    )


def format_shape(value) -> str:
    """A shape from a file, for a message; for any other value, whose text may be long, the name of
    its type."""
    return str(value) if is_shape(value) else f"{type(value).__name__}"
