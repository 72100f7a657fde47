"""Shift-and-multiply implementation: portable, with gradients written in the same form.

Each sum is a chain of additions over slices, which XLA and inductor fuse into one loop; no tensor
of taps x channels elements is stored. The input gradient gathers: each input position collects
from the windows that contain it, so nothing is scattered.
"""

import functools
import itertools

import keras
from keras import ops

from involution.ops import tensor_utils
from involution.ops.autodiff import (
    INPUT,
    KERNEL,
    MECHANISMS,
    OUTPUT,
    beyond_functions,
    differentiable,
    traced,
)
from involution.ops.tensor_utils import (
    merge_groups,
    pad_and_split,
    pad_spatial,
    pads,
    spatial_axis,
    spatial_shape,
    split_groups,
    strided_slice,
    tap_kernel,
    to_accumulation_dtype,
)
from involution.ops.window import Window

# Unrolled additions before a partial sum is stored; bounds the program's size.
MAX_UNROLL = 16
# Larger groups are transposed first, channels outermost, for a contiguous inner loop. Under XLA:
# 19 ms instead of 49 for the 16 channels of case red1, but 2.7 instead of 1.4 for the 3 of tut.
SMALL_GROUP_CHANNELS = 4


def unsupported_reason(problem) -> str | None:
    backend = keras.config.backend()
    if backend not in MECHANISMS:
        return f"its gradients need one of the backends {', '.join(MECHANISMS)}, not {backend}"
    return traced() or tensor_utils.unsupported_reason(problem)


def apply(x, kernel, problem):
    g = problem.window
    return call(OUTPUT, g, spatial_shape(x, g), x, kernel)


def products(x, y, problem):
    g = problem.window
    return call(KERNEL, g, spatial_shape(x, g), x, y)


def compute(member, g: Window, x_sizes, a, b):
    """One operation of the family in ``autodiff.py``."""
    result = {OUTPUT: _output, INPUT: _input_gradient, KERNEL: _kernel_gradient}[member](
        to_accumulation_dtype(a), to_accumulation_dtype(b), x_sizes, g
    )
    return ops.cast(result, a.dtype)


def _compiled(compute):
    """``compute`` compiled to one program, if the backend has a compiler."""
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        return jax.jit(compute, static_argnums=(0, 1, 2))
    if backend == "tensorflow":
        import tensorflow as tf

        def in_graph(member, g, x_sizes, a, b):
            # Compiling takes some 0.5 s for each new shape: too long for one eager call.
            if tf.executing_eagerly():
                return compute(member, g, x_sizes, a, b)
            fused = tf.function(functools.partial(compute, member, g, x_sizes), jit_compile=True)
            return fused(a, b)

        return in_graph
    return compute


_differentiable = differentiable(_compiled(compute), compute)


def call(member, g, x_sizes, a, b):
    if keras.config.backend() == "torch" and beyond_functions():
        return compute(member, g, x_sizes, a, b)
    return _differentiable(member, g, x_sizes, a, b)


def _output(x, kernel, x_sizes, g):
    padded = pad_and_split(x, x_sizes, g)
    count = g.output_sizes(x_sizes)
    return merge_groups(
        _sum(
            tap_kernel(kernel, tap, g) * strided_slice(padded, offset, g.strides, count, g)
            for tap, offset in enumerate(g.tap_offsets)
        ),
        g,
    )


def _input_gradient(kernel, dy, x_sizes, g):
    """Input gradient by polyphase components.

    Padded input position s*u + r is read by output u - offset // s at every tap whose offset has
    the remainder r modulo the stride s. Each remainder gives one sum over slices, as in the output.
    """
    around = pads(x_sizes, g)
    count = tuple(
        -(-(n + before + after) // s)
        for n, (before, after), s in zip(x_sizes, around, g.strides, strict=True)
    )
    reach = tuple(o // s for o, s in zip(g.last_offset, g.strides, strict=True))
    # For unknown sizes, the most positions that can follow the last output.
    margin = [
        (r, n - out if isinstance(n, int) and isinstance(out, int) else r + 2)
        for r, n, out in zip(reach, count, g.output_sizes(x_sizes), strict=True)
    ]
    kernel = pad_spatial(kernel, margin, g)
    dy = pad_spatial(split_groups(dy, g), margin, g)
    ones = (1,) * g.rank

    terms: dict = {}
    for tap, offset in enumerate(g.tap_offsets):
        start = tuple(r - o // s for r, o, s in zip(reach, offset, g.strides, strict=True))
        remainder = tuple(o % s for o, s in zip(offset, g.strides, strict=True))
        terms.setdefault(remainder, []).append((tap, start))

    def phase(members):
        return _sum(
            tap_kernel(strided_slice(kernel, start, ones, count, g), tap, g)
            * strided_slice(dy, start, ones, count, g)
            for tap, start in members
        )

    whole = _interleave_phases(
        {remainder: phase(members) for remainder, members in terms.items()}, g
    )
    return merge_groups(strided_slice(whole, [before for before, _ in around], ones, x_sizes, g), g)


def _interleave_phases(phases, g):
    """The full view from its polyphase components, zero at remainders without one.

    Each component holds every s-th position; the keys are remainders in each dimension.
    """
    for i in reversed(range(g.rank)):
        rows: dict = {}
        for remainder in sorted(phases):
            row = rows.setdefault(remainder[:i], {})
            row[remainder[i]] = phases[remainder]
        phases = {
            r: _interleave_axis(row, g.strides[i], spatial_axis(g) + i) for r, row in rows.items()
        }
    return phases[()]


def _interleave_axis(parts, stride, axis):
    """Interleaves components along ``axis``; each is keyed by its remainder modulo ``stride``."""
    if stride == 1:
        return parts[0]
    shape = list(ops.shape(parts[min(parts)]))
    pieces: list = []
    for r, end in itertools.pairwise([*parts, stride]):
        piece = ops.expand_dims(parts[r], axis + 1)
        missing = (0 if pieces else r, end - r - 1)
        if any(missing):
            around = [(0, 0)] * len(piece.shape)
            around[axis + 1] = missing
            piece = ops.pad(piece, around)
        pieces.append(piece)
    shape[axis] *= stride
    return ops.reshape(ops.concatenate(pieces, axis + 1), shape)


def _kernel_gradient(x, dy, x_sizes, g):
    padded = pad_and_split(x, x_sizes, g)
    count = g.output_sizes(x_sizes)
    xs, dys = _group_channels(padded, g), _group_channels(split_groups(dy, g), g)

    def tap(offset):
        partial = _sum(
            strided_slice(a, offset, g.strides, count, g, g.spatial_axis + 1) * b
            for a, b in zip(xs, dys, strict=True)
        )
        return _sum(partial[i] for i in range(partial.shape[0]))

    return ops.stack([tap(offset) for offset in g.tap_offsets], axis=g.tap_axis)


def _group_channels(view, g):
    """The channels of every group as at most ``WRITTEN_OUT`` tensors to be summed over: each
    (parts, B, *spatial, groups) or (parts, B, groups, *spatial), to be summed over parts too."""
    axis = g.group_channel_axis
    members = view.shape[axis]
    if members <= SMALL_GROUP_CHANNELS:
        return [view[(None,) + (slice(None),) * axis + (j,)] for j in range(members)]
    view = ops.moveaxis(view, axis, 0)
    parts = -(-members // MAX_UNROLL)
    count = -(-members // parts)
    view = ops.pad(view, [(0, count * parts - members)] + [(0, 0)] * (len(view.shape) - 1))
    view = ops.reshape(view, (count, parts, *ops.shape(view)[1:]))
    return [view[j] for j in range(count)]


def _sum(terms):
    terms = iter(terms)
    total = next(terms)
    for term in terms:
        # In place on PyTorch: no caller holds the first term.
        total += term
    return total
