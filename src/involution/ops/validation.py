"""Checks of single arguments. Each raises ValueError with the rule and the value received."""

import operator
from collections.abc import Sequence

from involution.backend import image_data_format

SAME, VALID, SYMMETRIC, CAUSAL = "same", "valid", "symmetric", "causal"
# Softmax over the taps inside the input.
IN_BOUNDS = "in_bounds"
CONTIGUOUS, INTERLEAVED = "contiguous", "interleaved"
CHANNELS_LAST, CHANNELS_FIRST = "channels_last", "channels_first"


def reduced_channels(channels, reduction_ratio) -> int:
    """Hidden channels of a generator, at least one, or ValueError."""
    hidden = channels // reduction_ratio
    if hidden == 0:
        raise ValueError(
            "`reduction_ratio` must leave at least one hidden channel. "
            f"Received: reduction_ratio={reduction_ratio}, channels={channels}"
        )
    return hidden


def standardize_tuple(name, value, count, minimum=1) -> tuple[int, ...]:
    """``count`` integers, from one integer or a sequence."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * count
    try:
        numbers = tuple(operator.index(v) for v in values)
    except TypeError:
        numbers = ()
    if (
        len(numbers) != count
        or any(isinstance(v, bool) for v in values)
        or any(n < minimum for n in numbers)
    ):
        each = "" if count == 1 else f", or a sequence of {count}, one for each spatial dimension"
        raise ValueError(
            f"`{name}` must be an integer of at least {minimum}{each}. Received: {name}={value!r}"
        )
    return numbers


def standardize_padding(name, padding, rank):
    """A mode, or (before, after) for every spatial dimension."""
    if isinstance(padding, str) and padding in (SAME, VALID, SYMMETRIC):
        return padding
    if isinstance(padding, str) and padding == CAUSAL:
        if rank != 1:
            raise ValueError(
                "`padding` 'causal' requires one spatial dimension. "
                f"Received: {name}={padding!r}, with {rank} spatial dimensions"
            )
        return padding
    try:
        if isinstance(padding, Sequence) and not isinstance(padding, str):
            if len(padding) == rank:
                return tuple(standardize_tuple(name, tuple(pair), 2, minimum=0) for pair in padding)
        elif not isinstance(padding, str):
            return (standardize_tuple(name, padding, 1, minimum=0) * 2,) * rank
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"`{name}` must be 'same', 'valid', 'symmetric', 'causal' (one dimension), an integer of "
        f"at least 0, or a sequence of {rank} pairs (before, after) of such integers, one for each "
        f"spatial dimension. "
        f"Received: {name}={padding!r}"
    )


def standardize_data_format(name, data_format, rank=None) -> str:
    if data_format is None:
        return image_data_format()
    return check_choice(name, data_format, (CHANNELS_LAST, CHANNELS_FIRST))


def check_rate(name, value):
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}` must be a number from 0 to 1. Received: {name}={value}")


def standardize_softmax(value) -> bool | str:
    """The argument ``kernel_softmax``: False, True or "in_bounds"; ValueError for other strings."""
    if value == IN_BOUNDS:
        return IN_BOUNDS
    if isinstance(value, str):
        raise ValueError(
            "`kernel_softmax` must be False, True or 'in_bounds'. "
            f"Received: kernel_softmax={value!r}"
        )
    return bool(value)


def check_choice(name, value, allowed):
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(repr, allowed))}. Received: {name}={value!r}"
        )
    return value


def static_shape(name, x) -> tuple[int | None, ...]:
    """The shape of a tensor or ``keras.KerasTensor``; None for each unknown size."""
    shape = getattr(x, "shape", None)
    if shape is None or getattr(shape, "rank", 0) is None:
        raise ValueError(f"`{name}` must be a tensor of known rank. Received: {name}={x!r}")
    return tuple(shape)


def is_shape_compatible(expected, shape) -> bool:
    """Whether two shapes have equal rank and no two known sizes differ."""
    if len(expected) != len(shape):
        return False
    for e, n in zip(expected, shape, strict=True):  # a loop: it runs in every call
        if e is not None and n is not None and e != n:
            return False
    return True


def check_axes(layer, input_shape, rank):
    """ValueError unless a shape has a batch axis, ``rank`` spatial axes, and channels."""
    if len(input_shape) != rank + 2:
        raise ValueError(
            f"Input of {type(layer).__name__} must have a batch axis, {rank} spatial axes and a "
            f"channel axis: expected ndim={rank + 2}, found ndim={len(input_shape)}. "
            f"Received: input_shape={tuple(input_shape)}, layer={layer.name}"
        )
