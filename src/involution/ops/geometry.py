"""Where windows lie: what every implementation agrees on.

Output position ``p`` reads, for the tap ``k`` of a window, the input position

    p * strides - pad_before + k * dilation_rate

in every spatial dimension. Taps are counted row-major (the last dimension runs fastest), the
kernel's channels are tap-major (``tap * groups + group``), and positions outside the input are 0.
"""

import dataclasses
import itertools
import math

SAME, VALID, SYMMETRIC = "same", "valid", "symmetric"
CONTIGUOUS, INTERLEAVED = "contiguous", "interleaved"
CHANNELS_LAST, CHANNELS_FIRST = "channels_last", "channels_first"

Pads = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Everything about one involution except the sizes and the types of its tensors."""

    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str | Pads
    dilation_rate: tuple[int, ...]
    groups: int
    group_layout: str
    data_format: str

    @property
    def rank(self) -> int:
        return len(self.kernel_size)

    @property
    def taps(self) -> int:
        """Number of positions in one window."""
        return math.prod(self.kernel_size)

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
        """A whole shape, in this data format."""
        if self.data_format == CHANNELS_LAST:
            return (batch, *spatial, *channels)
        return (batch, *channels, *spatial)

    def split_channels(self, channels: int) -> tuple[int, int]:
        """The channel axis as two: (groups, channels of a group), in the order of the layout."""
        pair = (self.groups, channels // self.groups)
        return pair if self.group_layout == CONTIGUOUS else pair[::-1]

    @property
    def member_axis(self) -> int:
        """With the channel axis split in two: the one that counts the channels of a group."""
        return self.channel_axis + (1 if self.group_layout == CONTIGUOUS else 0)

    def pads(self, sizes, maximum=max) -> tuple:
        """(before, after) for every spatial dimension of an input of these sizes.

        ``maximum`` compares two sizes; tensors standing for unknown sizes need their own.
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
    def first_centre(self) -> tuple[int, ...]:
        """Where the first window's centre lies in each dimension; 0 for "same" by definition."""
        if self.padding == SAME:
            return (0,) * self.rank
        # Outside of "same" the zeros before do not depend on the input's size.
        before = (pair[0] for pair in self.pads((1,) * self.rank))
        return tuple(last // 2 - pad for last, pad in zip(self.last_offset, before, strict=True))

    def output_sizes(self, sizes) -> tuple:
        """Spatial sizes of the output; None where the input's size is None."""
        return tuple(None if n is None else self._output_size(i, n) for i, n in enumerate(sizes))

    def _output_size(self, i, n):
        stride = self.strides[i]
        if self.padding == SAME:
            return ceil_divide(n, stride)
        span = self.dilation_rate[i] * (self.kernel_size[i] - 1)
        if isinstance(self.padding, tuple):
            total = sum(self.padding[i])
        else:
            total = 2 * (span // 2) if self.padding == SYMMETRIC else 0
        return (n + total - span - 1) // stride + 1

    def without_excess(self, sizes) -> "Geometry":
        """The same involution of an input of these sizes, with no steps that lead far beyond it.

        Taps that meet only padding may lie anywhere outside, and the stride to a second window
        that there is not counts for nothing. Memory and time would go with both.
        """
        strides, rates = list(self.strides), list(self.dilation_rate)
        for i, n in enumerate(sizes):
            if n is None:
                continue
            if self.padding in (SAME, SYMMETRIC):
                # From either side of a window's middle the first tap is half a step away at least:
                # now beyond the other end of the input, from any window. Half of the change, which
                # must be even, moves into the padding.
                rates[i] = min(rates[i], 2 * n + 2 + rates[i] % 2)
            if self._output_size(i, n) == 1:
                around = self.padding[i] if isinstance(self.padding, tuple) else (0, 0)
                strides[i] = min(strides[i], n + sum(around))
        return dataclasses.replace(self, strides=tuple(strides), dilation_rate=tuple(rates))


def ceil_divide(n, stride):
    """How many strides cover a size n, which may be a tensor."""
    # Not -(-n // stride): in ONNX the division of a negative integer rounds towards zero.
    return (n + stride - 1) // stride


def _pads(padding, n, kernel, stride, dilation, maximum):
    span = dilation * (kernel - 1)
    if padding == VALID:
        return (0, 0)
    if padding == SYMMETRIC:
        return (span // 2, span // 2)
    if stride == 1:
        total = span
    elif n is None:
        raise ValueError("'same' padding with strides above 1 depends on the input's size")
    else:
        total = (ceil_divide(n, stride) - 1) * stride + span + 1 - n
        if span + 1 < stride:
            total = maximum(total, 0)
    return (total // 2, total - total // 2)
