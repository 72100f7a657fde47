"""Arrays on bytes of a file, made after their sizes are checked."""

import math

import numpy as np

from involution.models.checkpoint_readers.errors import CheckpointError


def array(data, dtype, shape, what, order="C") -> np.ndarray:
    """The array of a shape whose values are all of ``data``: a view, no copy.

    Args:
        data: Bytes, or a view of them.
        dtype: NumPy's name of the type.
        shape: Any value; a tuple of sizes is right.
        what: Whose array it is, for the message.
        order: ``"C"`` or ``"F"``.

    Raises:
        CheckpointError: The shape is none, or needs other than all bytes.
    """
    dtype = np.dtype(dtype)
    if not is_sizes(shape) or math.prod(shape) * dtype.itemsize != len(data):
        raise CheckpointError(
            "A tensor must have as many bytes in the file as its shape takes. Received: "
            f"{what} with shape {shown(shape)} of {dtype}, and {len(data)} bytes"
        )
    if len(data) == 0:
        raise CheckpointError(
            f"A tensor must have values. Received: {what} with shape {shown(shape)}"
        )
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def is_sizes(value) -> bool:
    """Whether it is a tuple of at most 8 integers from 0 to 2**62."""
    return (
        isinstance(value, tuple)
        and len(value) <= 8
        and all(isinstance(n, int) and 0 <= n < 2**62 for n in value)
    )


def shown(value) -> str:
    """A value from a file in a message: short, one line, and nothing for what is no shape."""
    return str(value) if is_sizes(value) else f"{type(value).__name__}"
