"""Tensor operations of the portable implementations, for any rank, data format and group layout.

Grouped tensors have two channel axes, groups and channels of a group, over which one tap of the
kernel broadcasts. With upsampling they have a third one before these, the phases; its size is 1 for
the operator's input, so that each window broadcasts over the outputs that share it.
"""

import math
import sys

from involution.ops.frameworks import framework_of, namespace
from involution.ops.validation import CHANNELS_LAST


def as_tensors(**values) -> list:
    """The values as tensors of one framework: of that of the tensors among them, or of Keras's
    backend if there are none. Tensors stay on their devices; symbolic Keras tensors stay symbolic.

    Raises:
        ValueError: The tensors are of different frameworks.
    """
    frameworks = [framework_of(value) for value in values.values()]
    if frameworks[0] is not None and frameworks.count(frameworks[0]) == len(frameworks):
        return list(values.values())
    return _converted(values)


def _converted(values) -> list:
    keras = sys.modules.get("keras")
    if keras is not None:
        values = {n: v.value if isinstance(v, keras.Variable) else v for n, v in values.items()}
        if any_symbolic(*values.values()):
            return [_keras_tensor(value) for value in values.values()]
    tensors = {name: value for name, value in values.items() if framework_of(value)}
    if not tensors:
        return [_keras_tensor(value) for value in values.values()]
    if len({framework_of(tensor) for tensor in tensors.values()}) > 1:
        received = ", ".join(f"{name} of {framework_of(t)}" for name, t in tensors.items())
        raise ValueError(f"All tensors must be of one framework. Received: {received}")
    like = next(iter(tensors.values()))
    convert = namespace(like).convert_to_tensor
    return [value if name in tensors else convert(value, like) for name, value in values.items()]


def _keras_tensor(value):
    import keras

    if isinstance(value, keras.KerasTensor) or keras.ops.is_tensor(value):
        return value
    return keras.ops.convert_to_tensor(value)


def any_symbolic(*tensors) -> bool:
    """Whether a tensor is symbolic, of a functional Keras model."""
    keras = sys.modules.get("keras")
    return keras is not None and any(isinstance(t, keras.KerasTensor) for t in tensors)


def to_accumulation_dtype(x):
    """``x`` in the dtype of sums: float32, or float64 for float64."""
    return x if "64" in str(x.dtype) else namespace(x).cast(x, "float32")


def spatial_shape(x, window) -> tuple:
    """Spatial sizes of ``x``: integers, or tensors if TensorFlow knows them at run time only."""
    return window.spatial(namespace(x).shape(x))


def _maximum(a, b):
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    return namespace(b if isinstance(a, int) else a).maximum(a, b)


def spatial_axis(window) -> int:
    """First spatial axis of a grouped tensor or a split kernel tensor."""
    return 1 if window.data_format == CHANNELS_LAST else 3 + (window.phases > 1)


def split_groups(x, window):
    """The grouped tensor of an input of the operator: C becomes (groups, channels of a group),
    ordered by the group layout."""
    ops = namespace(x)
    shape = ops.shape(x)
    channels = window.split_channels(x.shape[window.channel_axis])
    if window.phases > 1:
        channels = (1, *channels)
    return ops.reshape(x, window.shape(shape[0], window.spatial(shape), *channels))


def merge_groups(grouped, window):
    """The inverse of ``split_groups``."""
    ops = namespace(grouped)
    shape = ops.shape(grouped)
    first, axis = spatial_axis(window), window.channel_axis
    channels = math.prod(grouped.shape[axis : axis + 2 + (window.phases > 1)])
    return ops.reshape(
        grouped, window.shape(shape[0], shape[first : first + window.rank], channels)
    )


def split_output(y, window):
    """The grouped tensor of an output of the operator."""
    if window.phases == 1:
        return split_groups(y, window)
    y, ops = _split_phases(y, window, 0), namespace(y)
    shape, first = list(ops.shape(y)), window.channel_axis + 1
    shape[first : first + 1] = window.split_channels(y.shape[first])
    return ops.reshape(y, shape)


def merge_output(grouped, window):
    """The inverse of ``split_output``."""
    if window.phases == 1:
        return merge_groups(grouped, window)
    ops = namespace(grouped)
    shape, first = list(ops.shape(grouped)), window.channel_axis + 1
    shape[first : first + 2] = [grouped.shape[first] * grouped.shape[first + 1]]
    return _merge_phases(ops.reshape(grouped, shape), window, 0)


def split_kernel(kernel, window):
    """A kernel tensor with an axis of phases between taps and groups, if there is upsampling."""
    return kernel if window.phases == 1 else _split_phases(kernel, window, 1)


def merge_kernel(kernel, window):
    """The inverse of ``split_kernel``."""
    return kernel if window.phases == 1 else _merge_phases(kernel, window, 1)


def depth_to_space(tensor, upsampling):
    """(B, *spatial, n * phases) to (B, *fine, n), finer by ``upsampling`` in each dimension; phases
    vary fastest in the channels, row-major."""
    ops, rank, phases = namespace(tensor), len(upsampling), math.prod(upsampling)
    batch, *sizes, channels = ops.shape(tensor)
    split = ops.reshape(tensor, (batch, *sizes, channels // phases, *upsampling))
    # Each phase axis after its spatial axis.
    pairs = [axis for i in range(rank) for axis in (1 + i, 2 + rank + i)]
    split = ops.transpose(split, (0, *pairs, 1 + rank))
    fine = [n * u for n, u in zip(sizes, upsampling, strict=True)]
    return ops.reshape(split, (batch, *fine, channels // phases))


def _split_phases(tensor, window, position):
    """Space to depth: moves the phases of the outputs from the spatial axes to an axis of their
    own, before the channel axis of this position."""
    ops, rank = namespace(tensor), window.rank
    batch, *rest = ops.shape(tensor)
    last = window.data_format == CHANNELS_LAST
    sizes, channels = (rest[:rank], rest[rank:]) if last else (rest[-rank:], rest[:-rank])
    counts = [n // u for n, u in zip(sizes, window.upsampling, strict=True)]
    pairs = [n for pair in zip(counts, window.upsampling, strict=True) for n in pair]
    split = ops.reshape(tensor, (batch, *pairs, *channels) if last else (batch, *channels, *pairs))
    split = ops.transpose(split, _phases_last(window, len(channels), position))
    channels.insert(position, window.phases)
    return ops.reshape(split, window.shape(batch, counts, *channels))


def _merge_phases(tensor, window, position):
    """The inverse of ``_split_phases``."""
    ops, rank = namespace(tensor), window.rank
    batch, *rest = ops.shape(tensor)
    last = window.data_format == CHANNELS_LAST
    counts, channels = (rest[:rank], rest[rank:]) if last else (rest[-rank:], rest[:-rank])
    del channels[position]
    split = [*channels[:position], *window.upsampling, *channels[position:]]
    split = ops.reshape(tensor, window.shape(batch, counts, *split))
    axes = _phases_last(window, len(channels), position)
    split = ops.transpose(split, [axes.index(i) for i in range(len(axes))])
    sizes = [n * u for n, u in zip(counts, window.upsampling, strict=True)]
    return ops.reshape(split, window.shape(batch, sizes, *channels))


def _phases_last(window, channel_axes, position) -> list[int]:
    """The order of axes that moves the phase of each spatial axis, which follows it, before the
    channel axis of this position."""
    last = window.data_format == CHANNELS_LAST
    first = 1 if last else 1 + channel_axes
    counts = [first + 2 * i for i in range(window.rank)]
    start = 1 + 2 * window.rank if last else 1
    channels = list(range(start, start + channel_axes))
    channels[position:position] = [axis + 1 for axis in counts]
    return [0, *counts, *channels] if last else [0, *channels, *counts]


def pad_and_split(x, x_sizes, window):
    """The zero-padded ``x``, grouped; for unknown sizes with one more position at the end."""
    padding = pads(x_sizes, window)
    if not all(isinstance(n, int) for n in x_sizes):
        # PyTorch's exporter specializes on whether a slice ends where its tensor does: here, none.
        padding = tuple((before, after + 1) for before, after in padding)
    return pad_spatial(split_groups(x, window), padding, window)


def pads(x_sizes, window) -> tuple:
    """(before, after) for every spatial dimension, tensors where the sizes are."""
    return window.pads(x_sizes, _maximum)


# Maximum positions of a padded input. A larger input is a mistake, or needs an implementation that
# does not pad.
MAX_PADDED_POSITIONS = 2**31


def unsupported_reason(problem) -> str | None:
    """Why the input cannot be padded, or None."""
    window = problem.window
    known = [n if isinstance(n, int) else 1 for n in window.spatial(problem.x_shape)]
    # A list: PyTorch's compiler supports no generator here.
    padded = math.prod([n + sum(p) for n, p in zip(known, window.pads(known), strict=True)])
    if padded > MAX_PADDED_POSITIONS:
        return f"a padded input would have {padded} positions, more than {MAX_PADDED_POSITIONS}"
    return None


def pad_spatial(grouped, pads, window):
    """Pads the spatial axes of a grouped tensor or a kernel tensor with zeros."""
    if all(isinstance(p, int) and p == 0 for pair in pads for p in pair):
        return grouped
    pad_width = [(0, 0)] * spatial_axis(window) + list(pads)
    pad_width += [(0, 0)] * (len(grouped.shape) - len(pad_width))
    return namespace(grouped).pad(grouped, pad_width)


def insert_zeros(grouped, window):
    """Follows each position by ``strides`` - 1 zeros, in every spatial dimension."""
    ops = namespace(grouped)
    for axis, stride in enumerate(window.strides, spatial_axis(window)):
        if stride > 1:
            shape = list(ops.shape(grouped))
            pad_width = [(0, 0)] * (len(shape) + 1)
            pad_width[axis + 1] = (0, stride - 1)
            shape[axis] *= stride
            grouped = ops.reshape(ops.pad(ops.expand_dims(grouped, axis + 1), pad_width), shape)
    return grouped


def strided_slice(grouped, start, strides, count, window, first=None):
    """Every ``strides``-th position from ``start``, ``count`` in each spatial dimension.

    ``first`` is the first spatial axis; None: that of a grouped tensor.
    """
    parts = tuple(
        slice(i, i + (n - 1) * s + 1, s) for i, s, n in zip(start, strides, count, strict=True)
    )
    first = spatial_axis(window) if first is None else first
    return grouped[(slice(None),) * first + parts]


def tap_kernel(kernel, tap, window):
    """One tap of a split kernel tensor, with an axis of size 1 for the channels of a group."""
    return namespace(kernel).expand_dims(
        kernel[(slice(None),) * window.tap_axis + (tap,)], window.group_channel_axis
    )
