"""The members as Triton programs for CUDA devices: each gathers, so that results are the same bits
every time.

A program makes a block of the result: positions, groups, and members, which are the channels of a
group. Offsets are of 64 bits. Tensors come as they lie in memory, by their strides, seen with three
spatial dimensions, of which missing ones have the size 1.
"""

import torch
import triton
import triton.language as tl

# Taps whose kernels a program generates at once: the least that matrix units take.
TAPS_AT_ONCE = tl.constexpr(16)


@triton.jit
def _axes(positions, groups, members, POSITIONS_LAST: tl.constexpr):
    """The three vectors as axes of a block, that which lies closest in memory as the last."""
    if POSITIONS_LAST:
        return positions[None, None, :], groups[:, None, None], members[None, :, None]
    return positions[:, None, None], groups[None, :, None], members[None, None, :]


@triton.jit
def _block(count, groups, members, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr):
    """First position, group and member of this program's block."""
    along_m = tl.cdiv(members, M)
    along_g = tl.cdiv(groups, G)
    block = tl.program_id(0).to(tl.int64)
    return block // (along_m * along_g) * P, block // along_m % along_g * G, block % along_m * M


@triton.jit
def _place(n, sizes_d, sizes_h, sizes_w):
    """Sample and coordinates of positions that are counted over all samples."""
    w = n % sizes_w
    rest = n // sizes_w
    h = rest % sizes_h
    rest = rest // sizes_h
    return rest // sizes_d, rest % sizes_d, h, w


@triton.jit
def _read(o, tap, stride, rate, pad, size):
    """What a window at the output position reads for a tap, and whether it lies in the input."""
    i = o * stride - pad + tap * rate
    return i, (i >= 0) & (i < size)


@triton.jit
def _reader(i, tap, stride, rate, pad, size):
    """Which output position reads the input position for a tap, and whether one does."""
    reach = i + pad - tap * rate
    o = reach // stride
    return o, (reach >= 0) & (o * stride == reach) & (o < size)


# In what follows, after a tensor's name: b, d, h, w, k, g and c are its strides of the batch, the
# spatial dimensions, the taps, the groups and the channels. `cg` and `cm` are those of the groups
# and of the members among channels; `count` is all samples' positions together, and `scale` its
# magnitude, by which block sizes are remembered. Numbers that fit into 32 bits come as such: so a
# product must begin with one of 64.


@triton.jit
def output(
    x, xb, xd, xh, xw, xc,
    kernel, kb, kd, kh, kw, kk, kg,
    y, yb, yd, yh, yw, yc,
    scale, count, groups, members, cg, cm,
    id_, ih, iw, od, oh, ow, sd, sh, sw, rd, rh, rw, pd, ph, pw,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    WIDE: tl.constexpr, POSITIONS_LAST: tl.constexpr,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    first_p, first_g, first_m = _block(count, groups, members, P, G, M)
    p, g, m = _axes(
        first_p + tl.arange(0, P), first_g + tl.arange(0, G), first_m + tl.arange(0, M),
        POSITIONS_LAST,
    )  # fmt: skip
    b, z, v, u = _place(p, od, oh, ow)
    there = (p < count) & (g < groups)
    channel = g * cg + m * cm
    mine = there & (m < members)
    kernel_at = kernel + b * kb + z * kd + v * kh + u * kw + g * kg
    x_at = x + b * xb + channel * xc
    total = tl.zeros(mine.shape, WIDE)
    for i in range(KD * KH * KW):
        tap = first_p * 0 + i
        iz, in_z = _read(z, tap // (KH * KW), sd, rd, pd, id_)
        iv, in_v = _read(v, tap // KW % KH, sh, rh, ph, ih)
        iu, in_u = _read(u, tap % KW, sw, rw, pw, iw)
        inside = in_z & in_v & in_u
        # Also where nothing is read: its product with 0 may be NaN.
        weight = tl.load(kernel_at + tap * kk, mask=there, other=0.0)
        value = tl.load(x_at + iz * xd + iv * xh + iu * xw, mask=mine & inside, other=0.0)
        total += weight.to(WIDE) * value.to(WIDE)
    y_at = y + b * yb + z * yd + v * yh + u * yw + channel * yc
    tl.store(y_at, total.to(y.dtype.element_ty), mask=mine)


@triton.jit
def input_gradient(
    kernel, kb, kd, kh, kw, kk, kg,
    dy, yb, yd, yh, yw, yc,
    dx, xb, xd, xh, xw, xc,
    scale, count, groups, members, cg, cm,
    id_, ih, iw, od, oh, ow, sd, sh, sw, rd, rh, rw, pd, ph, pw,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    WIDE: tl.constexpr, POSITIONS_LAST: tl.constexpr,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    first_p, first_g, first_m = _block(count, groups, members, P, G, M)
    p, g, m = _axes(
        first_p + tl.arange(0, P), first_g + tl.arange(0, G), first_m + tl.arange(0, M),
        POSITIONS_LAST,
    )  # fmt: skip
    b, z, v, u = _place(p, id_, ih, iw)
    there = (p < count) & (g < groups)
    channel = g * cg + m * cm
    mine = there & (m < members)
    kernel_at = kernel + b * kb + g * kg
    dy_at = dy + b * yb + channel * yc
    total = tl.zeros(mine.shape, WIDE)
    for i in range(KD * KH * KW):
        tap = first_p * 0 + i
        oz, of_z = _reader(z, tap // (KH * KW), sd, rd, pd, od)
        ov, of_v = _reader(v, tap // KW % KH, sh, rh, ph, oh)
        ou, of_u = _reader(u, tap % KW, sw, rw, pw, ow)
        read = of_z & of_v & of_u
        at = oz * kd + ov * kh + ou * kw + tap * kk
        weight = tl.load(kernel_at + at, mask=there & read, other=0.0)
        value = tl.load(dy_at + oz * yd + ov * yh + ou * yw, mask=mine & read, other=0.0)
        total += weight.to(WIDE) * value.to(WIDE)
    dx_at = dx + b * xb + z * xd + v * xh + u * xw + channel * xc
    tl.store(dx_at, total.to(dx.dtype.element_ty), mask=mine)


@triton.jit
def kernel_gradient(
    x, xb, xd, xh, xw, xc,
    dy, yb, yd, yh, yw, yc,
    dkernel, kb, kd, kh, kw, kk, kg,
    scale, count, groups, members, cg, cm,
    id_, ih, iw, od, oh, ow, sd, sh, sw, rd, rh, rw, pd, ph, pw,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    WIDE: tl.constexpr, POSITIONS_LAST: tl.constexpr,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    # All members in turn: they are what is summed over.
    first_p, first_g, _ = _block(count, groups, 1, P, G, M)
    p, g, m = _axes(
        first_p + tl.arange(0, P),
        first_g + tl.arange(0, G),
        first_p * 0 + tl.arange(0, M),
        POSITIONS_LAST,
    )
    b, z, v, u = _place(p, od, oh, ow)
    there = (p < count) & (g < groups)
    x_at = x + b * xb + g * cg * xc
    dy_at = dy + b * yb + z * yd + v * yh + u * yw + g * cg * yc
    dkernel_at = dkernel + b * kb + z * kd + v * kh + u * kw + g * kg
    axis: tl.constexpr = 1 if POSITIONS_LAST else 2
    for i in range(KD * KH * KW):
        tap = first_p * 0 + i
        iz, in_z = _read(z, tap // (KH * KW), sd, rd, pd, id_)
        iv, in_v = _read(v, tap // KW % KH, sh, rh, ph, ih)
        iu, in_u = _read(u, tap % KW, sw, rw, pw, iw)
        inside = in_z & in_v & in_u
        at = iz * xd + iv * xh + iu * xw
        total = tl.zeros(there.shape, WIDE)
        for first in range(0, members, M):
            mine = there & (first + m < members)
            member = (first + m) * cm
            value = tl.load(x_at + at + member * xc, mask=mine & inside, other=0.0)
            # Also where nothing is read, as in `output`.
            by = tl.load(dy_at + member * yc, mask=mine, other=0.0)
            total += tl.sum(value.to(WIDE) * by.to(WIDE), axis, keep_dims=True)
        tl.store(dkernel_at + tap * kk, total.to(dkernel.dtype.element_ty), mask=there)


@triton.jit
def fused_output(
    x, xb, xd, xh, xw, xc,
    # Contiguous: (positions, hidden channels), (groups, hidden channels, taps), (groups, taps).
    hidden, weight, bias,
    y, yb, yd, yh, yw, yc,
    scale, count, groups, members, cg, cm, channels,
    id_, ih, iw, od, oh, ow, sd, sh, sw, rd, rh, rw, pd, ph, pw,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    AS_FLOAT32: tl.constexpr,
    P: tl.constexpr, M: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = KD * KH * KW
    first_p, g, first_m = _block(count, groups, members, P, 1, M)
    p = first_p + tl.arange(0, P)
    m = first_m + tl.arange(0, M)
    b, z, v, u = _place(p, od, oh, ow)
    channel = g * cg + m * cm
    x_at = x + b[:, None, None] * xb + channel[None, None, :] * xc
    total = tl.zeros((P, M), tl.float32)
    for first in range(0, TAPS, TAPS_AT_ONCE):
        tap = first_p * 0 + first + tl.arange(0, TAPS_AT_ONCE)
        taps_there = tap < TAPS
        start = tl.load(bias + g * TAPS + tap, mask=taps_there, other=0.0).to(tl.float32)
        kernel = tl.zeros((P, TAPS_AT_ONCE), tl.float32) + start[None, :]
        for low in range(0, channels, H):
            h = low + tl.arange(0, H)
            rows = tl.load(
                hidden + p[:, None] * channels + h[None, :],
                mask=(p[:, None] < count) & (h[None, :] < channels),
                other=0.0,
            )
            columns = tl.load(
                weight + (g * channels + h[:, None]) * TAPS + tap[None, :],
                mask=(h[:, None] < channels) & taps_there[None, :],
                other=0.0,
            )
            if AS_FLOAT32:
                rows, columns = rows.to(tl.float32), columns.to(tl.float32)
            kernel = tl.dot(rows, columns, kernel, input_precision="ieee")
        iz, in_z = _read(z[:, None], tap[None, :] // (KH * KW), sd, rd, pd, id_)
        iv, in_v = _read(v[:, None], tap[None, :] // KW % KH, sh, rh, ph, ih)
        iu, in_u = _read(u[:, None], tap[None, :] % KW, sw, rw, pw, iw)
        inside = in_z & in_v & in_u & (p[:, None] < count) & taps_there[None, :]
        at = iz * xd + iv * xh + iu * xw
        values = tl.load(
            x_at + at[:, :, None],
            mask=inside[:, :, None] & (m[None, None, :] < members),
            other=0.0,
        )
        # Where a tap meets nothing it is multiplied by 0, which may make NaN. What is no tap is
        # not: of an infinite hidden channel and no weight it has NaN already.
        kernel = tl.where(taps_there[None, :], kernel, 0.0)
        total += tl.sum(kernel[:, :, None] * values.to(tl.float32), 1)
    y_at = y + (b * yb + z * yd + v * yh + u * yw)[:, None] + channel[None, :] * yc
    mine = (p[:, None] < count) & (m[None, :] < members)
    tl.store(y_at, total.to(y.dtype.element_ty), mask=mine)


INTERPRETED = not isinstance(output, triton.JITFunction)
KEY = ["scale", "groups", "members", "KD", "KH", "KW", "POSITIONS_LAST"]


def _tuned(function, key, positions):
    """The fastest of some block sizes, measured once for a problem and remembered on disk."""
    configs = [triton.Config({"P": p}, num_warps=warps) for p in positions for warps in (4, 8)]
    # The interpreter has no speed to measure.
    chosen = configs[:1] if INTERPRETED else configs
    return triton.autotune(chosen, key=key, cache_results=True)(function)


PROGRAMS = {
    name: _tuned(function, KEY, (8, 16, 32, 64))
    for name, function in (
        ("output", output),
        ("input", input_gradient),
        ("kernel", kernel_gradient),
    )
}
FUSED = _tuned(fused_output, [*KEY[:-1], "channels"], (16, 32))


def width(dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32
