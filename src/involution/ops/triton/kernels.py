"""The passes as Triton kernels for CUDA devices. Each gathers, so that results are deterministic.

A program computes a block of the result: BLOCK_P positions x BLOCK_G groups x BLOCK_C channels of a
group. Offsets are 64-bit. Tensors are strided and have three spatial dimensions, of which missing
ones have size 1.
"""

import torch
import triton
import triton.language as tl

from involution.ops.autodiff import FORWARD, INPUT_GRAD, KERNEL_GRAD

# Taps for which a program generates kernels at once: the smallest dimension of ``tl.dot``.
BLOCK_TAPS = tl.constexpr(16)


@triton.jit
def _axes(positions, groups, group_channels, CHANNELS_FIRST: tl.constexpr):
    """The three vectors as axes of a block, the contiguous one last."""
    if CHANNELS_FIRST:
        return positions[None, None, :], groups[:, None, None], group_channels[None, :, None]
    return positions[:, None, None], groups[None, :, None], group_channels[None, None, :]


@triton.jit
def _block(
    count,
    groups,
    group_channels,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """First position, group and channel of this program's block."""
    blocks_c = tl.cdiv(group_channels, BLOCK_C)
    blocks_g = tl.cdiv(groups, BLOCK_G)
    block = tl.program_id(0).to(tl.int64)
    return (
        block // (blocks_c * blocks_g) * BLOCK_P,
        block // blocks_c % blocks_g * BLOCK_G,
        block % blocks_c * BLOCK_C,
    )


@triton.jit
def _unravel(n, sizes_d, sizes_h, sizes_w):
    """Sample and coordinates of positions, which are numbered over all samples."""
    w = n % sizes_w
    rest = n // sizes_w
    h = rest % sizes_h
    rest = rest // sizes_h
    return rest // sizes_d, rest % sizes_d, h, w


@triton.jit
def _input_index(o, tap, stride, rate, pad, size):
    """The input position of a tap at an output position, and whether it is in bounds."""
    i = o * stride - pad + tap * rate
    return i, (i >= 0) & (i < size)


@triton.jit
def _output_index(i, tap, stride, rate, pad, size):
    """The output position that reads an input position at a tap, and whether there is one."""
    numerator = i + pad - tap * rate
    o = numerator // stride
    return o, (numerator >= 0) & (o * stride == numerator) & (o < size)


# Suffixes of a tensor's name are strides: b batch; d, h, w spatial; k taps; g groups; c channels.
# `cg` and `cc` are the strides of groups and of a group's channels in units of channels; `count` is
# the number of positions of all samples, and `size_bucket` its bit length, an autotuning key. Small
# integers are passed in 32 bits: products must start with a 64-bit factor. UD, UH, UW: upsampling.


@triton.jit
def forward(
    x, xb, xd, xh, xw, xc,
    kernel, kb, kd, kh, kw, kk, kg,
    y, yb, yd, yh, yw, yc,
    size_bucket, count, groups, group_channels, cg, cc,
    id_, ih, iw, od, oh, ow, sd, sh, sw, rd, rh, rw, pd, ph, pw,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    UD: tl.constexpr, UH: tl.constexpr, UW: tl.constexpr,
    ACC_DTYPE: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    start_p, start_g, start_c = _block(count, groups, group_channels, BLOCK_P, BLOCK_G, BLOCK_C)
    p, g, c = _axes(
        start_p + tl.arange(0, BLOCK_P),
        start_g + tl.arange(0, BLOCK_G),
        start_c + tl.arange(0, BLOCK_C),
        CHANNELS_FIRST,
    )
    b, z, v, u = _unravel(p, od, oh, ow)
    valid_position = (p < count) & (g < groups)
    channel = g * cg + c * cc
    valid_channel = valid_position & (c < group_channels)
    kernel_at = kernel + b * kb + z * kd + v * kh + u * kw + g * kg
    x_at = x + b * xb + channel * xc
    total = tl.zeros(valid_channel.shape, ACC_DTYPE)
    for i in range(KD * KH * KW):
        tap = start_p * 0 + i
        iz, in_z = _input_index(z // UD, tap // (KH * KW), sd, rd, pd, id_)
        iv, in_v = _input_index(v // UH, tap // KW % KH, sh, rh, ph, ih)
        iu, in_u = _input_index(u // UW, tap % KW, sw, rw, pw, iw)
        in_bounds = in_z & in_v & in_u
        # Also out of bounds: the product of a non-finite weight with 0 is NaN.
        weight = tl.load(kernel_at + tap * kk, mask=valid_position, other=0.0)
        value = tl.load(
            x_at + iz * xd + iv * xh + iu * xw, mask=valid_channel & in_bounds, other=0.0
        )
        total += weight.to(ACC_DTYPE) * value.to(ACC_DTYPE)
    y_at = y + b * yb + z * yd + v * yh + u * yw + channel * yc
    tl.store(y_at, total.to(y.dtype.element_ty), mask=valid_channel)


@triton.jit
def input_grad(
    kernel, kb, kd, kh, kw, kk, kg,
    dy, yb, yd, yh, yw, yc,
    dx, xb, xd, xh, xw, xc,
    size_bucket, count, groups, group_channels, cg, cc,
    id_, ih, iw, od, oh, ow, sd, sh, sw, rd, rh, rw, pd, ph, pw,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    UD: tl.constexpr, UH: tl.constexpr, UW: tl.constexpr,
    ACC_DTYPE: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    start_p, start_g, start_c = _block(count, groups, group_channels, BLOCK_P, BLOCK_G, BLOCK_C)
    p, g, c = _axes(
        start_p + tl.arange(0, BLOCK_P),
        start_g + tl.arange(0, BLOCK_G),
        start_c + tl.arange(0, BLOCK_C),
        CHANNELS_FIRST,
    )
    b, z, v, u = _unravel(p, id_, ih, iw)
    valid_position = (p < count) & (g < groups)
    channel = g * cg + c * cc
    valid_channel = valid_position & (c < group_channels)
    kernel_at = kernel + b * kb + g * kg
    dy_at = dy + b * yb + channel * yc
    total = tl.zeros(valid_channel.shape, ACC_DTYPE)
    # The windows that contain a position, and the outputs of each: its phases.
    for i in range(KD * KH * KW * UD * UH * UW):
        phase = (start_p * 0 + i) % (UD * UH * UW)
        tap = (start_p * 0 + i) // (UD * UH * UW)
        oz, of_z = _output_index(z, tap // (KH * KW), sd, rd, pd, od // UD)
        ov, of_v = _output_index(v, tap // KW % KH, sh, rh, ph, oh // UH)
        ou, of_u = _output_index(u, tap % KW, sw, rw, pw, ow // UW)
        oz = oz * UD + phase // (UH * UW)
        ov = ov * UH + phase // UW % UH
        ou = ou * UW + phase % UW
        read = of_z & of_v & of_u
        at = oz * kd + ov * kh + ou * kw + tap * kk
        weight = tl.load(kernel_at + at, mask=valid_position & read, other=0.0)
        value = tl.load(dy_at + oz * yd + ov * yh + ou * yw, mask=valid_channel & read, other=0.0)
        total += weight.to(ACC_DTYPE) * value.to(ACC_DTYPE)
    dx_at = dx + b * xb + z * xd + v * xh + u * xw + channel * xc
    tl.store(dx_at, total.to(dx.dtype.element_ty), mask=valid_channel)


@triton.jit
def kernel_grad(
    x, xb, xd, xh, xw, xc,
    dy, yb, yd, yh, yw, yc,
    dkernel, kb, kd, kh, kw, kk, kg,
    size_bucket, count, groups, group_channels, cg, cc,
    id_, ih, iw, od, oh, ow, sd, sh, sw, rd, rh, rw, pd, ph, pw,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    UD: tl.constexpr, UH: tl.constexpr, UW: tl.constexpr,
    ACC_DTYPE: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Channels are reduced: a program loops over all channels of a group.
    start_p, start_g, _ = _block(count, groups, 1, BLOCK_P, BLOCK_G, BLOCK_C)
    p, g, c = _axes(
        start_p + tl.arange(0, BLOCK_P),
        start_g + tl.arange(0, BLOCK_G),
        start_p * 0 + tl.arange(0, BLOCK_C),
        CHANNELS_FIRST,
    )
    b, z, v, u = _unravel(p, od, oh, ow)
    valid_position = (p < count) & (g < groups)
    x_at = x + b * xb + g * cg * xc
    dy_at = dy + b * yb + z * yd + v * yh + u * yw + g * cg * yc
    dkernel_at = dkernel + b * kb + z * kd + v * kh + u * kw + g * kg
    axis: tl.constexpr = 1 if CHANNELS_FIRST else 2
    for i in range(KD * KH * KW):
        tap = start_p * 0 + i
        iz, in_z = _input_index(z // UD, tap // (KH * KW), sd, rd, pd, id_)
        iv, in_v = _input_index(v // UH, tap // KW % KH, sh, rh, ph, ih)
        iu, in_u = _input_index(u // UW, tap % KW, sw, rw, pw, iw)
        in_bounds = in_z & in_v & in_u
        at = iz * xd + iv * xh + iu * xw
        total = tl.zeros(valid_position.shape, ACC_DTYPE)
        for first in range(0, group_channels, BLOCK_C):
            valid_channel = valid_position & (first + c < group_channels)
            channel_offset = (first + c) * cc
            value = tl.load(
                x_at + at + channel_offset * xc, mask=valid_channel & in_bounds, other=0.0
            )
            # Also out of bounds, as in `forward`.
            dy_value = tl.load(dy_at + channel_offset * yc, mask=valid_channel, other=0.0)
            total += tl.sum(value.to(ACC_DTYPE) * dy_value.to(ACC_DTYPE), axis, keep_dims=True)
        tl.store(dkernel_at + tap * kk, total.to(dkernel.dtype.element_ty), mask=valid_position)


@triton.jit
def fused_forward(
    x, xb, xd, xh, xw, xc,
    # Contiguous: (positions, hidden channels), (groups, hidden channels, taps), (groups, taps).
    hidden, weight, bias,
    y, yb, yd, yh, yw, yc,
    size_bucket, count, groups, group_channels, cg, cc, hidden_channels,
    id_, ih, iw, od, oh, ow, sd, sh, sw, rd, rh, rw, pd, ph, pw,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    UD: tl.constexpr, UH: tl.constexpr, UW: tl.constexpr,
    CAST_TO_FLOAT32: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = KD * KH * KW
    start_p, g, start_c = _block(count, groups, group_channels, BLOCK_P, 1, BLOCK_C)
    p = start_p + tl.arange(0, BLOCK_P)
    c = start_c + tl.arange(0, BLOCK_C)
    b, z, v, u = _unravel(p, od, oh, ow)
    channel = g * cg + c * cc
    x_at = x + b[:, None, None] * xb + channel[None, None, :] * xc
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, TAPS, BLOCK_TAPS):
        tap = start_p * 0 + first + tl.arange(0, BLOCK_TAPS)
        valid_tap = tap < TAPS
        start = tl.load(bias + g * TAPS + tap, mask=valid_tap, other=0.0).to(tl.float32)
        kernel = tl.zeros((BLOCK_P, BLOCK_TAPS), tl.float32) + start[None, :]
        for low in range(0, hidden_channels, BLOCK_H):
            h = low + tl.arange(0, BLOCK_H)
            rows = tl.load(
                hidden + p[:, None] * hidden_channels + h[None, :],
                mask=(p[:, None] < count) & (h[None, :] < hidden_channels),
                other=0.0,
            )
            columns = tl.load(
                weight + (g * hidden_channels + h[:, None]) * TAPS + tap[None, :],
                mask=(h[:, None] < hidden_channels) & valid_tap[None, :],
                other=0.0,
            )
            if CAST_TO_FLOAT32:
                rows, columns = rows.to(tl.float32), columns.to(tl.float32)
            kernel = tl.dot(rows, columns, kernel, input_precision="ieee")
        iz, in_z = _input_index(z[:, None] // UD, tap[None, :] // (KH * KW), sd, rd, pd, id_)
        iv, in_v = _input_index(v[:, None] // UH, tap[None, :] // KW % KH, sh, rh, ph, ih)
        iu, in_u = _input_index(u[:, None] // UW, tap[None, :] % KW, sw, rw, pw, iw)
        in_bounds = in_z & in_v & in_u & (p[:, None] < count) & valid_tap[None, :]
        at = iz * xd + iv * xh + iu * xw
        values = tl.load(
            x_at + at[:, :, None],
            mask=in_bounds[:, :, None] & (c[None, None, :] < group_channels),
            other=0.0,
        )
        # Out-of-bounds taps multiply 0 and may give NaN, as they should. Lanes beyond the last tap
        # must not: an infinite hidden channel times a masked weight is NaN.
        kernel = tl.where(valid_tap[None, :], kernel, 0.0)
        total += tl.sum(kernel[:, :, None] * values.to(tl.float32), 1)
    y_at = y + (b * yb + z * yd + v * yh + u * yw)[:, None] + channel[None, :] * yc
    valid_channel = (p[:, None] < count) & (c[None, :] < group_channels)
    tl.store(y_at, total.to(y.dtype.element_ty), mask=valid_channel)


IS_INTERPRETER = not isinstance(forward, triton.JITFunction)
AUTOTUNE_KEY = [
    *("size_bucket", "groups", "group_channels"),
    *("KD", "KH", "KW", "UD", "UH", "UW", "CHANNELS_FIRST"),
]


def _autotuned(function, key, positions):
    """Autotunes block sizes: measured once per problem and cached on disk."""
    configs = [
        triton.Config({"BLOCK_P": p}, num_warps=warps) for p in positions for warps in (4, 8)
    ]
    # Times in the interpreter are meaningless.
    chosen = configs[:1] if IS_INTERPRETER else configs
    return triton.autotune(chosen, key=key, cache_results=True)(function)


KERNELS = {
    name: _autotuned(function, AUTOTUNE_KEY, (8, 16, 32, 64))
    for name, function in (
        (FORWARD, forward),
        (INPUT_GRAD, input_grad),
        (KERNEL_GRAD, kernel_grad),
    )
}
FUSED = _autotuned(fused_forward, [*AUTOTUNE_KEY[:-1], "hidden_channels"], (16, 32))


def acc_dtype(dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32
