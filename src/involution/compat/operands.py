"""Checks of the operands of this package, with the names of the public functions."""

from involution.ops.frameworks import dtype_name, framework_of
from involution.ops.problem import DTYPES
from involution.ops.tensor_utils import as_tensors
from involution.ops.validation import is_shape_compatible, standardize_tuple, static_shape


def operands(**values) -> list:
    """The values as tensors of one framework, those of PyTorch in the dtype of ``torch.autocast``.

    Raises:
        ValueError: The tensors are of different frameworks, or have no common supported dtype.
    """
    tensors = as_tensors(**values)
    if framework_of(tensors[0]) == "torch":
        from involution.ops.frameworks.torch import autocast

        tensors = autocast(*tensors)
    dtypes = [dtype_name(tensor.dtype) for tensor in tensors]
    if dtypes[0] not in DTYPES or dtypes.count(dtypes[0]) != len(dtypes):
        received = ", ".join(f"{n}.dtype={d}" for n, d in zip(values, dtypes, strict=True))
        raise ValueError(
            f"All tensors must have the same of the dtypes {', '.join(DTYPES)}. "
            f"Received: {received}"
        )
    return list(tensors)


def integer(name, value, minimum=1) -> int:
    """``value``, or ValueError unless it is an integer of at least ``minimum``."""
    return standardize_tuple(name, value, 1, minimum)[0]


def shape_of(name, tensor, axes) -> tuple:
    """The static shape, or ValueError unless it has an axis for each name in ``axes``."""
    shape = static_shape(name, tensor)
    if len(shape) != len(axes.split(", ")):
        raise ValueError(
            f"`{name}` must have the axes ({axes}). Received: {name}.shape={tuple(shape)}"
        )
    return shape


def check_shape(name, tensor, expected, axes):
    """ValueError unless the static shape is ``expected``, whose None are unknown sizes."""
    shape = static_shape(name, tensor)
    if not is_shape_compatible(expected, shape):
        raise ValueError(
            f"`{name}` must have the shape {tuple(expected)}: ({axes}). "
            f"Received: {name}.shape={tuple(shape)}"
        )


def check_divisible(name, channels, groups_name, groups):
    """ValueError unless the number of channels is known and divisible by the number of groups."""
    if not channels or channels % groups:
        raise ValueError(
            f"The number of channels of `{name}` must be known, not 0, and divisible by "
            f"{groups_name}. Received: {channels} channels, {groups_name}={groups}"
        )


def times(size, factor):
    """``size * factor``; None for an unknown size."""
    return None if size is None else size * factor
