"""One call of the operator, checked: what implementations are asked to compute."""

import dataclasses
import operator
from collections.abc import Sequence

import keras

from involution.ops.geometry import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    CONTIGUOUS,
    INTERLEAVED,
    SAME,
    SYMMETRIC,
    VALID,
    Geometry,
)

DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call of the operator, checked: what an implementation is asked to compute."""

    geometry: Geometry
    x_shape: tuple[int | None, ...]
    kernel_shape: tuple[int | None, ...]
    dtype: str
    device: str | None  # the kind, as "cpu" or "cuda", where a tensor tells it
    hidden: int | None = None  # channels that kernels are generated from; None: they are given

    @property
    def output_shape(self) -> tuple[int | None, ...]:
        g = self.geometry
        sizes = g.output_sizes(g.spatial(self.x_shape))
        return g.shape(self.x_shape[0], sizes, self.x_shape[g.channel_axis])


def make_problem(
    x,
    kernel,
    kernel_size,
    strides=1,
    padding="same",
    dilation_rate=1,
    groups=1,
    group_layout="contiguous",
    data_format=None,
) -> Problem:
    """Checks the arguments of one call. Raises ValueError with the rule and the value received.

    ``kernel`` may be None, for the one that fits.
    """
    x_shape = shape_of("x", x)
    rank = len(x_shape) - 2
    if rank not in (1, 2, 3):
        raise ValueError(
            "`x` must have a batch axis, a channel axis and one, two or three spatial axes. "
            f"Received: x.shape={x_shape}"
        )
    dtype = keras.backend.standardize_dtype(x.dtype)
    kernel_dtype = dtype if kernel is None else keras.backend.standardize_dtype(kernel.dtype)
    if dtype not in DTYPES or kernel_dtype != dtype:
        raise ValueError(
            f"`x` and `kernel` must have the same type, one of {', '.join(DTYPES)}. "
            f"Received: x.dtype={dtype}, kernel.dtype={kernel_dtype}"
        )
    geometry = Geometry(
        kernel_size=integers("kernel_size", kernel_size, rank),
        strides=integers("strides", strides, rank),
        padding=standardize_padding(padding, rank),
        dilation_rate=integers("dilation_rate", dilation_rate, rank),
        groups=integers("groups", groups, 1)[0],
        group_layout=one_of("group_layout", group_layout, (CONTIGUOUS, INTERLEAVED)),
        data_format=standardize_data_format(data_format),
    )
    device = getattr(getattr(x, "device", None), "type", None)
    fitting = _kernel_shape(geometry, x_shape)
    kernel_shape = fitting if kernel is None else shape_of("kernel", kernel)
    if not fits(fitting, kernel_shape):
        raise ValueError(
            f"`kernel` must have the shape {fitting}: a batch, the output's spatial sizes, the "
            f"taps of a window and the groups. Received: kernel.shape={kernel_shape}"
        )
    problem = Problem(geometry, x_shape, kernel_shape, dtype, device)
    nearer = geometry.without_excess(geometry.spatial(x_shape))
    return dataclasses.replace(problem, geometry=nearer)


def make_generating_problem(x, hidden, weight, bias, **arguments) -> Problem:
    """As ``make_problem``, for one call of ``generate_and_apply``."""
    problem = make_problem(x, None, **arguments)
    g = problem.geometry
    shapes = {
        name: shape_of(name, tensor)
        for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias))
    }
    count = shapes["weight"][0] if len(shapes["weight"]) == 2 else None
    batch, sizes = problem.output_shape[0], g.spatial(problem.output_shape)
    fitting = {
        "hidden": g.shape(batch, sizes, count),
        "weight": (count, g.taps * g.groups),
        "bias": (g.taps * g.groups,),
    }
    if not count or not all(fits(fitting[name], shapes[name]) for name in shapes):
        raise ValueError(
            "`hidden`, `weight` and `bias` must have the shapes (batch, output's sizes, hidden "
            f"channels), (hidden channels, {g.taps * g.groups}) and ({g.taps * g.groups},), with "
            f"the output's sizes {sizes}. Received: "
            + ", ".join(f"{name}.shape={shape}" for name, shape in shapes.items())
        )
    types = [keras.backend.standardize_dtype(t.dtype) for t in (hidden, weight, bias)]
    if any(dtype != problem.dtype for dtype in types):
        raise ValueError(
            f"`hidden`, `weight` and `bias` must have the type of `x`, {problem.dtype}. "
            f"Received: {', '.join(types)}"
        )
    return dataclasses.replace(problem, hidden=count)


def _kernel_shape(g, x_shape) -> tuple[int | None, ...]:
    channels = x_shape[g.channel_axis]
    if channels is None or channels == 0 or channels % g.groups:
        raise ValueError(
            "The number of channels must be known, not 0, and divisible by `groups`. "
            f"Received: groups={g.groups}, x.shape={x_shape}"
        )
    return g.shape(x_shape[0], output_sizes(g, x_shape), g.taps, g.groups)


def fits(expected, shape) -> bool:
    return len(expected) == len(shape) and all(
        want is None or have is None or want == have
        for want, have in zip(expected, shape, strict=True)
    )


def output_sizes(g, x_shape) -> tuple[int | None, ...]:
    """Spatial sizes of the output, at least 1 where known, or ValueError."""
    sizes = g.output_sizes(g.spatial(x_shape))
    if any(n is not None and n <= 0 for n in sizes):
        raise ValueError(
            "The window must fit into the padded input: every output size must be at least 1. "
            f"Received: output sizes {sizes}, input shape {tuple(x_shape)}, "
            f"kernel_size={g.kernel_size}, strides={g.strides}, padding={g.padding!r}, "
            f"dilation_rate={g.dilation_rate}"
        )
    return sizes


def shape_of(name, x) -> tuple[int | None, ...]:
    shape = getattr(x, "shape", None)
    if shape is None or getattr(shape, "rank", 0) is None:
        raise ValueError(f"`{name}` must be a tensor of known rank. Received: {name}={x!r}")
    return tuple(shape)


def integers(name, value, count, minimum=1) -> tuple[int, ...]:
    """``count`` integers, from one for all or one each."""
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
        each = "" if count == 1 else f", or {count} of them, one for each spatial dimension"
        raise ValueError(
            f"`{name}` must be an integer of at least {minimum}{each}. Received: {name}={value!r}"
        )
    return numbers


def one_of(name, value, allowed):
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(repr, allowed))}. Received: {name}={value!r}"
        )
    return value


def standardize_data_format(data_format) -> str:
    if data_format is None:
        return keras.config.image_data_format()
    return one_of("data_format", data_format, (CHANNELS_LAST, CHANNELS_FIRST))


def standardize_padding(padding, rank):
    """A word, or (before, after) for every spatial dimension."""
    if isinstance(padding, str) and padding in (SAME, VALID, SYMMETRIC):
        return padding
    try:
        if isinstance(padding, Sequence) and not isinstance(padding, str):
            if len(padding) == rank:
                return tuple(integers("padding", tuple(pair), 2, minimum=0) for pair in padding)
        elif not isinstance(padding, str):
            return (integers("padding", padding, 1, minimum=0) * 2,) * rank
    except (TypeError, ValueError):
        pass
    raise ValueError(
        "`padding` must be 'same', 'valid', 'symmetric', an integer of at least 0, or "
        f"a pair (before, after) of them for each of {rank} spatial dimensions. "
        f"Received: padding={padding!r}"
    )


def check_axes(layer, input_shape, rank):
    """ValueError unless a shape has a batch axis, ``rank`` spatial axes, and channels."""
    if len(input_shape) != rank + 2:
        raise ValueError(
            f"Input of {type(layer).__name__} must have a batch axis, {rank} spatial and one of "
            f"channels: expected ndim={rank + 2}, found ndim={len(input_shape)}. "
            f"Received: input_shape={tuple(input_shape)}, layer={layer.name}"
        )
