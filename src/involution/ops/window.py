"""Window positions: the part of the contract that every implementation shares.

Output position ``p`` reads, at tap ``k`` of its window, the input position

    floor(p / upsampling) * strides - pad_before + k * dilation_rate

in every spatial dimension. Taps are in row-major order (the last dimension varies fastest), the
kernel's channels are tap-major (``tap * groups + group``), and positions outside the input are 0.

With upsampling, ``upsampling`` consecutive outputs in each dimension have the same window. Their
positions modulo ``upsampling`` are their phases; a phase is an involution without upsampling.
"""

import dataclasses
import itertools
import math
from typing import Any

from involution.ops.validation import (
    CAUSAL,
    CHANNELS_LAST,
    CONTIGUOUS,
    INTERLEAVED,
    SAME,
    SYMMETRIC,
    VALID,
    check_choice,
    standardize_data_format,
    standardize_padding,
    standardize_tuple,
)

# Passed as an integer or a sequence, stored as a tuple.
Ints = Any


def _integer(name, value, rank):
    return standardize_tuple(name, value, 1)[0]


def _layout(name, value, rank):
    return check_choice(name, value, (CONTIGUOUS, INTERLEAVED))


@dataclasses.dataclass(frozen=True)
class Window:
    """The operator's validated arguments: all of a call except its tensors.

    Arguments are passed in any form that the public functions accept, and stored in standard form:
    a tuple of one integer for each spatial dimension, a padding mode or pairs, a data format. The
    metadata of a field contains its check, ``standardize(name, value, rank)``.

    Args:
        rank: Number of spatial dimensions; None: as many as ``kernel_size`` has integers.

    Raises:
        ValueError: An argument is out of its range.
    """

    kernel_size: Ints = dataclasses.field(metadata={"standardize": standardize_tuple})
    strides: Ints = dataclasses.field(default=1, metadata={"standardize": standardize_tuple})
    padding: Any = dataclasses.field(default=SAME, metadata={"standardize": standardize_padding})
    dilation_rate: Ints = dataclasses.field(default=1, metadata={"standardize": standardize_tuple})
    groups: int = dataclasses.field(default=1, metadata={"standardize": _integer})
    group_layout: str = dataclasses.field(default=CONTIGUOUS, metadata={"standardize": _layout})
    data_format: Any = dataclasses.field(
        default=None, metadata={"standardize": standardize_data_format}
    )
    rank: int = None  # type: ignore[assignment]  # set by __post_init__
    upsampling: Ints = dataclasses.field(default=1, metadata={"standardize": standardize_tuple})

    def __post_init__(self):
        if self.rank is None:
            object.__setattr__(self, "rank", len(self.kernel_size))
        for name, standardize in STANDARDIZE:
            object.__setattr__(self, name, standardize(name, getattr(self, name), self.rank))
        if self.phases > 1 and max(self.strides) > 1:
            raise ValueError(
                "`strides` must be 1 where `upsampling` is above 1. "
                f"Received: strides={self.strides}, upsampling={self.upsampling}"
            )

    def arguments(self) -> dict:
        """The keyword arguments of the public functions."""
        return {name: getattr(self, name) for name, _ in STANDARDIZE}

    @property
    def taps(self) -> int:
        """Number of positions in one window."""
        return math.prod(self.kernel_size)

    @property
    def phases(self) -> int:
        """Number of outputs that share a window."""
        return math.prod(self.upsampling)

    @property
    def tap_offsets(self) -> list[tuple[int, ...]]:
        """Distance of every tap from the first one, in input positions, row-major."""
        steps = (
            range(0, k * d, d) for k, d in zip(self.kernel_size, self.dilation_rate, strict=True)
        )
        return list(itertools.product(*steps))

    @property
    def last_offset(self) -> tuple[int, ...]:
        """Distance of the last tap from the first one, in input positions."""
        return tuple((k - 1) * d for k, d in zip(self.kernel_size, self.dilation_rate, strict=True))

    @property
    def spatial_axis(self) -> int:
        """First spatial axis of ``x`` and of the output."""
        return 1 if self.data_format == CHANNELS_LAST else 2

    @property
    def channel_axis(self) -> int:
        return self.rank + 1 if self.data_format == CHANNELS_LAST else 1

    @property
    def tap_axis(self) -> int:
        """The kernel tensor's axis of taps; the axis of groups follows it."""
        return self.channel_axis

    def spatial(self, shape) -> tuple:
        """The spatial part of a shape of ``x`` or of the output."""
        return tuple(shape[self.spatial_axis : self.spatial_axis + self.rank])

    def shape(self, batch, spatial, *channels) -> tuple:
        """A shape in this data format."""
        if self.data_format == CHANNELS_LAST:
            return (batch, *spatial, *channels)
        return (batch, *channels, *spatial)

    def split_channels(self, channels: int) -> tuple[int, int]:
        """The channel axis split in two: groups and channels of a group, ordered by the layout."""
        pair = (self.groups, channels // self.groups)
        return pair if self.group_layout == CONTIGUOUS else pair[::-1]

    @property
    def group_channel_axis(self) -> int:
        """The axis of the channels of a group in a grouped tensor (see ``ops/tensor_utils``)."""
        return self.channel_axis + (self.phases > 1) + (1 if self.group_layout == CONTIGUOUS else 0)

    def pads(self, sizes, maximum=max) -> tuple:
        """(before, after) for every spatial dimension of an input of these sizes.

        ``maximum`` returns the larger of two sizes; sizes that are tensors need a framework's.
        """
        if isinstance(self.padding, tuple):
            return self.padding
        return tuple(
            _pads(self.padding, n, k, s, d, maximum)
            for n, k, s, d in zip(
                sizes, self.kernel_size, self.strides, self.dilation_rate, strict=True
            )
        )

    @property
    def first_center(self) -> tuple[int, ...]:
        """The first window's center in each dimension; 0 for "same" by definition, and for
        "causal", whose windows are generated from their last position."""
        if self.padding in (SAME, CAUSAL):
            return (0,) * self.rank
        # Except for "same", the padding before does not depend on the input's size.
        before = (pair[0] for pair in self.pads((1,) * self.rank))
        return tuple(last // 2 - pad for last, pad in zip(self.last_offset, before, strict=True))

    def output_sizes(self, sizes) -> tuple:
        """Spatial sizes of the output; None where the input's size is None."""
        counts = self.window_counts(sizes)
        if self.phases == 1:
            return counts
        return tuple(
            None if n is None else n * u for n, u in zip(counts, self.upsampling, strict=True)
        )

    def window_counts(self, sizes) -> tuple:
        """Number of windows in each dimension: the output's sizes without upsampling."""
        return tuple(None if n is None else self._window_count(i, n) for i, n in enumerate(sizes))

    def _window_count(self, i, n):
        stride = self.strides[i]
        if self.padding in (SAME, CAUSAL):
            return ceil_div(n, stride)
        span = self.dilation_rate[i] * (self.kernel_size[i] - 1)
        if isinstance(self.padding, tuple):
            total = sum(self.padding[i])
        else:
            total = 2 * (span // 2) if self.padding == SYMMETRIC else 0
        return (n + total - span - 1) // stride + 1

    def clamp_steps(self, sizes) -> "Window":
        """An equivalent window for inputs of these sizes, whose steps stay near the input.

        Taps that read only padding may be at any distance from the input, and with one output
        position the stride has no effect. Without this limit, memory and time would grow with
        strides and dilation rates.
        """
        strides, rates = list(self.strides), list(self.dilation_rate)
        for i, n in enumerate(sizes):
            if n is None:
                continue
            if self.padding == CAUSAL:
                # All taps but the last are before the input.
                rates[i] = min(rates[i], max(n, 1))
            elif self.padding in (SAME, SYMMETRIC):
                # The taps nearest to a window's center are at least half a step from it: with this
                # rate, beyond either end of the input. The rate changes by an even number, because
                # the padding is half of the window's extent.
                rates[i] = min(rates[i], 2 * n + 2 + rates[i] % 2)
            if self._window_count(i, n) == 1:
                pair = self.padding[i] if isinstance(self.padding, tuple) else (0, 0)
                strides[i] = min(strides[i], n + sum(pair))
        if (*strides, *rates) == (*self.strides, *self.dilation_rate):
            return self
        return dataclasses.replace(self, strides=tuple(strides), dilation_rate=tuple(rates))


# Each argument with its check, in the order of the public signatures.
STANDARDIZE = tuple(
    (field.name, field.metadata["standardize"])
    for field in dataclasses.fields(Window)
    if field.metadata
)


def ceil_div(n, stride):
    """The number of strides that cover a size ``n``, which may be a tensor."""
    # Not -(-n // stride): in ONNX the division of a negative integer rounds toward zero.
    return (n + stride - 1) // stride


def _pads(padding, n, kernel, stride, dilation, maximum):
    span = dilation * (kernel - 1)
    if padding == VALID:
        return (0, 0)
    if padding == SYMMETRIC:
        return (span // 2, span // 2)
    if padding == CAUSAL:
        return (span, 0)
    if stride == 1:
        total = span
    elif n is None:
        raise ValueError("'same' padding with strides above 1 depends on the input's size")
    else:
        total = (ceil_div(n, stride) - 1) * stride + span + 1 - n
        if span + 1 < stride:
            total = maximum(total, 0)
    return (total // 2, total - total // 2)
