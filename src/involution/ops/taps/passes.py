"""The passes as sums of shifted products.

Each sum is a chain of additions over slices, which XLA and inductor fuse into one loop; no tensor
of taps x channels elements is stored. The input gradient is a gather, not a scatter: each input
position sums over the windows that contain it.
"""

import itertools

from involution.ops.autodiff import FORWARD, INPUT_GRAD, KERNEL_GRAD
from involution.ops.frameworks import namespace
from involution.ops.tensor_utils import (
    merge_groups,
    merge_kernel,
    merge_output,
    pad_and_split,
    pad_spatial,
    pads,
    spatial_axis,
    split_kernel,
    split_output,
    strided_slice,
    tap_kernel,
    to_accumulation_dtype,
)
from involution.ops.validation import CHANNELS_LAST
from involution.ops.window import Window

# Unrolled additions before a partial sum is stored; bounds the program's size.
MAX_UNROLL = 16
# Larger groups are transposed first, channels outermost, for a contiguous inner loop. Under XLA:
# 19 ms instead of 49 for the 16 channels of case red1, but 2.7 instead of 1.4 for the 3 of tut.
SMALL_GROUP_CHANNELS = 4


def compute(pass_, window: Window, x_sizes, a, b):
    """One pass of ``autodiff``."""
    result = {FORWARD: _output, INPUT_GRAD: _input_gradient, KERNEL_GRAD: _kernel_gradient}[pass_](
        to_accumulation_dtype(a), to_accumulation_dtype(b), x_sizes, window
    )
    return namespace(a).cast(result, a.dtype)


def _output(x, kernel, x_sizes, window):
    padded = pad_and_split(x, x_sizes, window)
    count, kernel = window.window_counts(x_sizes), split_kernel(kernel, window)
    return merge_output(
        _sum(
            tap_kernel(kernel, tap, window)
            * strided_slice(padded, offset, window.strides, count, window)
            for tap, offset in enumerate(window.tap_offsets)
        ),
        window,
    )


def _input_gradient(kernel, dy, x_sizes, window):
    """Input gradient by polyphase components.

    Padded input position s*u + r is read by output u - offset // s at every tap whose offset has
    the remainder r modulo the stride s. Each remainder gives one sum over slices, as in the output.
    """
    padding = pads(x_sizes, window)
    count = tuple(
        -(-(n + before + after) // s)
        for n, (before, after), s in zip(x_sizes, padding, window.strides, strict=True)
    )
    reach = tuple(o // s for o, s in zip(window.last_offset, window.strides, strict=True))
    # For unknown sizes, an upper bound of the positions after the last output.
    margin = [
        (r, n - out if isinstance(n, int) and isinstance(out, int) else r + 2)
        for r, n, out in zip(reach, count, window.window_counts(x_sizes), strict=True)
    ]
    kernel = pad_spatial(split_kernel(kernel, window), margin, window)
    dy = pad_spatial(split_output(dy, window), margin, window)
    ones = (1,) * window.rank

    terms: dict = {}
    for tap, offset in enumerate(window.tap_offsets):
        start = tuple(r - o // s for r, o, s in zip(reach, offset, window.strides, strict=True))
        remainder = tuple(o % s for o, s in zip(offset, window.strides, strict=True))
        terms.setdefault(remainder, []).append((tap, start))

    def product(tap, start):
        terms = tap_kernel(
            strided_slice(kernel, start, ones, count, window), tap, window
        ) * strided_slice(dy, start, ones, count, window)
        if window.phases == 1:
            return terms
        return namespace(terms).sum(terms, window.channel_axis, keepdims=True)

    def phase_sum(taps):
        return _sum(product(tap, start) for tap, start in taps)

    padded_gradient = _interleave_phases(
        {remainder: phase_sum(taps) for remainder, taps in terms.items()}, window
    )
    return merge_groups(
        strided_slice(padded_gradient, [before for before, _ in padding], ones, x_sizes, window),
        window,
    )


def _interleave_phases(phases, window):
    """The full tensor from its polyphase components, zero at remainders without one.

    Each component contains every s-th position; its key is its remainder in each dimension.
    """
    for i in reversed(range(window.rank)):
        rows: dict = {}
        for remainder in sorted(phases):
            row = rows.setdefault(remainder[:i], {})
            row[remainder[i]] = phases[remainder]
        phases = {
            r: _interleave_axis(row, window.strides[i], spatial_axis(window) + i)
            for r, row in rows.items()
        }
    return phases[()]


def _interleave_axis(parts, stride, axis):
    """Interleaves components along ``axis``; each is keyed by its remainder modulo ``stride``."""
    if stride == 1:
        return parts[0]
    ops = namespace(parts[min(parts)])
    shape = list(ops.shape(parts[min(parts)]))
    pieces: list = []
    for r, end in itertools.pairwise([*parts, stride]):
        piece = ops.expand_dims(parts[r], axis + 1)
        missing = (0 if pieces else r, end - r - 1)
        if any(missing):
            pad_width = [(0, 0)] * len(piece.shape)
            pad_width[axis + 1] = missing
            piece = ops.pad(piece, pad_width)
        pieces.append(piece)
    shape[axis] *= stride
    return ops.reshape(ops.concatenate(pieces, axis + 1), shape)


def _kernel_gradient(x, dy, x_sizes, window):
    padded = pad_and_split(x, x_sizes, window)
    count = window.window_counts(x_sizes)
    xs, dys = _group_channels(padded, window), _group_channels(split_output(dy, window), window)
    last = window.data_format == CHANNELS_LAST
    first = 2 if last else spatial_axis(window)  # spatial axis of one of these

    def tap(offset):
        partial = _sum(
            strided_slice(a, offset, window.strides, count, window, first) * b
            for a, b in zip(xs, dys, strict=True)
        )
        return _sum(partial[i] for i in range(partial.shape[0]))

    taps = [tap(offset) for offset in window.tap_offsets]
    return merge_kernel(namespace(x).stack(taps, axis=window.tap_axis), window)


def _group_channels(grouped, window):
    """Splits the channels of every group into at most ``MAX_UNROLL`` tensors (parts, B, *spatial,
    groups) or (parts, B, groups, *spatial). A sum over the channels of a group is a sum over these
    tensors and over their first axis."""
    axis = window.group_channel_axis
    channels = grouped.shape[axis]
    if channels <= SMALL_GROUP_CHANNELS:
        return [grouped[(None,) + (slice(None),) * axis + (j,)] for j in range(channels)]
    ops = namespace(grouped)
    grouped = ops.moveaxis(grouped, axis, 0)
    parts = -(-channels // MAX_UNROLL)
    count = -(-channels // parts)
    rest = [(0, 0)] * (len(grouped.shape) - 1)
    grouped = ops.pad(grouped, [(0, count * parts - channels), *rest])
    grouped = ops.reshape(grouped, (count, parts, *ops.shape(grouped)[1:]))
    return [grouped[j] for j in range(count)]


def _sum(terms):
    terms = iter(terms)
    total = next(terms)
    for term in terms:
        # In place on PyTorch: no caller uses the first term again.
        total += term
    return total
