"""The passes as Pallas kernels for GPUs. Each gathers, so that results are deterministic.

A program computes a block of the result: positions x groups x channels of a group. Tensors are
contiguous and have three spatial dimensions, of which missing ones have size 1. All sizes are
constants of the program.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pallas_triton

from involution.ops.autodiff import FORWARD, INPUT_GRAD, KERNEL_GRAD
from involution.ops.autodiff.jax import differentiable
from involution.ops.native.params import Params, accumulation_dtype, encode, result_shape
from involution.ops.pallas.interpreter import is_interpreter

# Limits of a block, each a power of two.
MAX_POSITIONS, MAX_CHANNELS, MAX_GROUPS_AND_CHANNELS = 32, 64, 64
NUM_WARPS = 4


@dataclasses.dataclass(frozen=True)
class Strides:
    """Strides of a tensor in elements: of the batch, of three spatial dimensions, and of channels,
    or of taps and groups."""

    batch: int
    spatial: tuple[int, int, int]
    channels: tuple[int, ...]

    @classmethod
    def of(cls, shape, rank, channels_first) -> "Strides":
        steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        batch, *rest = steps
        last = len(rest) - rank
        spatial = rest[last:] if channels_first else rest[:rank]
        channels = rest[:last] if channels_first else rest[rank:]
        return cls(batch, (*[0] * (3 - rank), *spatial), tuple(channels))

    def at(self, batch, position):
        """The offset of a position of a sample."""
        return batch * self.batch + sum(
            n * step for n, step in zip(position, self.spatial, strict=True)
        )


def compute(pass_, window, x_sizes, a, b):
    """A pass of the operator, see ``autodiff``."""
    p = Params.decode(encode(pass_, window, x_sizes, a, b))
    shape = result_shape(pass_, window, x_sizes, a, b)
    size, interpret = math.prod(shape), is_interpreter()
    if size == 0:
        return jnp.zeros(shape, a.dtype)
    first = bool(p.channels_first)
    strides = [Strides.of(s, window.rank, first) for s in (a.shape, b.shape, shape)]
    count = len(a) * math.prod(p.result_size)
    block_p = min(pl.next_power_of_2(count), MAX_POSITIONS)
    block_c = min(pl.next_power_of_2(p.channels_per_group), MAX_CHANNELS)
    block_g = min(pl.next_power_of_2(p.groups), max(MAX_GROUPS_AND_CHANNELS // block_c, 1))
    blocks_c = 1 if pass_ == KERNEL_GRAD else pl.cdiv(p.channels_per_group, block_c)
    program = functools.partial(PROGRAMS[pass_], p, strides, count, (block_p, block_g, block_c))
    call = pl.pallas_call(
        program,
        out_shape=jax.ShapeDtypeStruct((size + interpret,), a.dtype),
        grid=(pl.cdiv(count, block_p), pl.cdiv(p.groups, block_g), blocks_c),
        compiler_params=pallas_triton.CompilerParams(num_warps=NUM_WARPS),
        interpret=interpret,
    )
    return call(_flat(a), _flat(b))[:size].reshape(shape)


def _flat(tensor):
    """One axis, of at least one element: programs mask what they must not read."""
    flat = tensor.reshape(-1)
    return flat if flat.size else jnp.zeros(1, flat.dtype)


def _axes(p, blocks):
    """Positions, groups and channels of a group as axes of a block, the contiguous one last."""
    block_p, block_g, block_c = blocks
    positions = pl.program_id(0) * block_p + jnp.arange(block_p)
    groups = pl.program_id(1) * block_g + jnp.arange(block_g)
    channels = pl.program_id(2) * block_c + jnp.arange(block_c)
    if p.channels_first:
        return positions[None, None, :], groups[:, None, None], channels[None, :, None]
    return positions[:, None, None], groups[None, :, None], channels[None, None, :]


def _channel(p, group, channel):
    """The index on the channel axis of a channel of a group."""
    if p.interleaved:
        return group + channel * p.groups
    return group * p.channels_per_group + channel


def _unravel(n, sizes):
    """Sample and coordinates of positions, which are numbered over all samples."""
    coordinates: list = []
    for size in reversed(sizes):
        coordinates.insert(0, lax.rem(n, size))
        n = lax.div(n, size)
    return n, tuple(coordinates)


def _tap_offsets(p, tap):
    _, offsets = _unravel(tap, p.kernel_size)
    return offsets


def _input_position(p, output, tap):
    """The input position of a tap at an output position, and whether it is in bounds."""
    position = tuple(
        lax.div(o, up) * stride - pad + k * rate
        for o, up, stride, pad, k, rate in zip(
            output,
            p.upsampling,
            p.strides,
            p.pad_before,
            _tap_offsets(p, tap),
            p.dilation_rate,
            strict=True,
        )
    )
    return position, _all((i >= 0) & (i < n) for i, n in zip(position, p.input_size, strict=True))


def _output_position(p, position, tap, phase):
    """The output position that reads an input position at a tap, for one of the outputs of a
    window, and whether there is one."""
    outputs, valid = [], []
    _, phases = _unravel(phase, p.upsampling)
    for i, up, stride, pad, k, rate, size, f in zip(
        position,
        p.upsampling,
        p.strides,
        p.pad_before,
        _tap_offsets(p, tap),
        p.dilation_rate,
        p.output_size,
        phases,
        strict=True,
    ):
        numerator = i + pad - k * rate
        window = lax.div(numerator, stride)
        outputs.append(window * up + f)
        valid.append((numerator >= 0) & (window * stride == numerator) & (window < size // up))
    return tuple(outputs), _all(valid)


def _all(conditions):
    return functools.reduce(jnp.logical_and, conditions)


def _load(ref, offset, mask, dtype):
    offset, mask = jnp.broadcast_arrays(offset, mask)
    value = pallas_triton.load(ref.at[offset], mask=mask, other=0)
    return value.astype(dtype)


def _store(ref, offset, mask, value):
    offset, mask = jnp.broadcast_arrays(offset, mask)
    if is_interpreter():
        # It writes the old values where the mask is false: to an element of their own.
        offset = jnp.where(mask, offset, ref.shape[0] - 1)
    pallas_triton.store(ref.at[offset], value.astype(ref.dtype), mask=mask)


def _shape(*axes):
    return jnp.broadcast_shapes(*(axis.shape for axis in axes))


def forward(p, strides, count, blocks, x, kernel, y):
    x_strides, kernel_strides, y_strides = strides
    dtype = accumulation_dtype(y.dtype)
    n, g, c = _axes(p, blocks)
    batch, output = _unravel(n, p.output_size)
    valid_position = (n < count) & (g < p.groups)
    valid = valid_position & (c < p.channels_per_group)
    channel = _channel(p, g, c)

    def add_tap(tap, total):
        position, in_bounds = _input_position(p, output, tap)
        of_tap, of_group = kernel_strides.channels
        at = kernel_strides.at(batch, output) + tap * of_tap + g * of_group
        # Also out of bounds: the product of a non-finite weight with 0 is NaN.
        weight = _load(kernel, at, valid_position, dtype)
        at = x_strides.at(batch, position) + channel * x_strides.channels[0]
        return total + weight * _load(x, at, valid & in_bounds, dtype)

    zeros = jnp.zeros(_shape(n, g, c), dtype)
    total = lax.fori_loop(0, p.taps, add_tap, zeros)
    _store(y, y_strides.at(batch, output) + channel * y_strides.channels[0], valid, total)


def input_grad(p, strides, count, blocks, kernel, dy, dx):
    kernel_strides, dy_strides, dx_strides = strides
    dtype = accumulation_dtype(dx.dtype)
    n, g, c = _axes(p, blocks)
    batch, position = _unravel(n, p.input_size)
    valid_position = (n < count) & (g < p.groups)
    valid = valid_position & (c < p.channels_per_group)
    channel = _channel(p, g, c)
    phases = math.prod(p.upsampling)

    def add_window(number, total):
        tap, phase = lax.div(number, phases), lax.rem(number, phases)
        output, reads = _output_position(p, position, tap, phase)
        of_tap, of_group = kernel_strides.channels
        at = kernel_strides.at(batch, output) + tap * of_tap + g * of_group
        weight = _load(kernel, at, valid_position & reads, dtype)
        at = dy_strides.at(batch, output) + channel * dy_strides.channels[0]
        return total + weight * _load(dy, at, valid & reads, dtype)

    zeros = jnp.zeros(_shape(n, g, c), dtype)
    total = lax.fori_loop(0, p.taps * phases, add_window, zeros)
    _store(dx, dx_strides.at(batch, position) + channel * dx_strides.channels[0], valid, total)


def kernel_grad(p, strides, count, blocks, x, dy, dkernel):
    x_strides, dy_strides, dkernel_strides = strides
    dtype = accumulation_dtype(dkernel.dtype)
    n, g, c = _axes(p, blocks)
    batch, output = _unravel(n, p.output_size)
    valid_position = (n < count) & (g < p.groups)
    axis = 1 if p.channels_first else 2
    block_c = blocks[2]

    def store_tap(tap, _):
        position, in_bounds = _input_position(p, output, tap)

        # Channels are reduced: a program loops over all channels of a group.
        def add_channels(block, total):
            of_group = block * block_c + c
            valid = valid_position & (of_group < p.channels_per_group)
            channel = _channel(p, g, of_group)
            at = x_strides.at(batch, position) + channel * x_strides.channels[0]
            value = _load(x, at, valid & in_bounds, dtype)
            # Also out of bounds, as in `forward`.
            at = dy_strides.at(batch, output) + channel * dy_strides.channels[0]
            return total + jnp.sum(value * _load(dy, at, valid, dtype), axis, keepdims=True)

        zeros = jnp.zeros(_shape(n, g), dtype)
        total = lax.fori_loop(0, pl.cdiv(p.channels_per_group, block_c), add_channels, zeros)
        of_tap, of_group = dkernel_strides.channels
        at = dkernel_strides.at(batch, output) + tap * of_tap + g * of_group
        _store(dkernel, at, valid_position, total)
        return 0

    lax.fori_loop(0, p.taps, store_tap, 0)


PROGRAMS = {FORWARD: forward, INPUT_GRAD: input_grad, KERNEL_GRAD: kernel_grad}

call = differentiable(jax.jit(compute, static_argnums=(0, 1, 2)))
