"""The Triton programs as PyTorch's custom operations: how they are launched."""

import contextlib
import math

import torch
from triton import cdiv, next_power_of_2

from involution.ops import torch_custom_ops
from involution.ops.autodiff import INPUT, KERNEL, OUTPUT
from involution.ops.triton import kernels

NAMES = torch_custom_ops.NAMES
# Groups and members of a block, together and of the latter alone, at most.
BLOCK, MOST_MEMBERS = 64, 64
# Hidden channels that are multiplied at once.
MOST_HIDDEN = 64
# Of kernels, or of their gradients, that lie in memory at a time: no more than a cache holds.
PIECE_BYTES = 2**25


class _Told:
    """What ``numbers`` says, as ``csrc/involution.h`` has it."""

    def __init__(self, numbers):
        self.member = NAMES[numbers[0]]
        self.channels_first, interleaved, channels, self.groups = numbers[2:6]
        self.members = channels // self.groups
        # Strides of the groups and of the members among the channels.
        self.steps = (1, self.groups) if interleaved else (self.members, 1)
        self.x_sizes, self.y_sizes, self.kernel_size = numbers[6:9], numbers[9:12], numbers[12:15]
        # Sizes of the input and the output, strides, dilation rates, zeros before.
        self.window = (*self.x_sizes, *self.y_sizes, *numbers[15:24])

    @property
    def taps(self):
        return math.prod(self.kernel_size)


def _run(numbers, rank, a, b, result):
    _launch(_Told(numbers), rank, a, b, result)


def _launch(told, rank, a, b, result):
    if result.numel() == 0:
        return
    sizes = told.x_sizes if told.member == INPUT else told.y_sizes
    count = len(a) * math.prod(sizes)
    members = min(next_power_of_2(told.members), MOST_MEMBERS)
    groups = min(next_power_of_2(told.groups), max(BLOCK // members, 1))
    tensors = [t.resolve_neg() for t in (a, b, result)]
    strides = [_strides(t, told.channels_first, rank) for t in tensors]
    blocks = cdiv(told.groups, groups)
    if told.member != KERNEL:
        blocks *= cdiv(told.members, members)
    with _device(result):
        kernels.PROGRAMS[told.member][lambda meta: (cdiv(count, meta["P"]) * blocks,)](
            *(value for t, s in zip(tensors, strides, strict=True) for value in (t, *s)),
            count.bit_length(),
            count,
            told.groups,
            told.members,
            *told.steps,
            *told.window,
            *told.kernel_size,
            WIDE=kernels.width(result.dtype),
            POSITIONS_LAST=bool(told.channels_first),
            G=groups,
            M=members,
        )


def _strides(tensor, channels_first, rank):
    """Of the batch, three spatial dimensions, and the channels, or taps and groups."""
    batch, *rest = tensor.stride()
    last = tensor.dim() - 1 - rank
    spatial, channels = (rest[last:], rest[:last]) if channels_first else (rest[:rank], rest[rank:])
    return batch, *[0] * (3 - rank), *spatial, *channels


def _device(tensor):
    """Programs are launched on the device that is the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _run_fused(numbers, rank, arguments, results):
    told = _Told(numbers)
    run = {OUTPUT: _fused_output, INPUT: _fused_input, KERNEL: _fused_kernel}[told.member]
    run(told, rank, *arguments, *results)


def _fused_output(told, rank, x, hidden, weight, bias, y, _):
    if y.numel() == 0:
        return
    channels = hidden.shape[-1]
    count = hidden.numel() // channels
    # Programs do not see that a tensor is to be negated.
    x, hidden, weight, bias = (t.resolve_neg() for t in (x, hidden, weight, bias))
    # The groups first: a program makes the kernels of one.
    weight = weight.reshape(channels, told.taps, told.groups).permute(2, 0, 1).contiguous()
    bias = bias.reshape(told.taps, told.groups).t().contiguous()
    members = min(next_power_of_2(told.members), MOST_MEMBERS)
    blocks = told.groups * cdiv(told.members, members)
    hidden = hidden.contiguous()
    with _device(y):
        kernels.FUSED[lambda meta: (cdiv(count, meta["P"]) * blocks,)](
            x,
            *_strides(x, False, rank),
            hidden,
            weight,
            bias,
            y,
            *_strides(y, False, rank),
            count.bit_length(),
            count,
            told.groups,
            told.members,
            *told.steps,
            channels,
            *told.window,
            *told.kernel_size,
            # The interpreter's products of bfloat16 are wrong.
            AS_FLOAT32=kernels.INTERPRETED,
            M=members,
            H=min(max(next_power_of_2(channels), 16), MOST_HIDDEN),
        )


def _pieces(told, hidden):
    """Slices of samples whose kernels take no more than ``PIECE_BYTES``, or one at a time."""
    each = math.prod(told.y_sizes) * told.taps * told.groups * hidden.element_size()
    count = max(PIECE_BYTES // max(each, 1), 1)
    return [slice(first, first + count) for first in range(0, len(hidden), count)]


def _fused_input(told, rank, hidden, weight, bias, dy, dx, _):
    for piece in _pieces(told, hidden):
        rows = hidden[piece]
        kernel = torch.addmm(bias, rows.reshape(-1, rows.shape[-1]), weight)
        kernel = kernel.reshape(*rows.shape[:-1], told.taps, told.groups)
        _launch(told, rank, kernel, dy[piece], dx[piece])


def _fused_kernel(told, rank, x, hidden, weight, dy, dhidden, dweights):
    for piece in _pieces(told, hidden):
        rows = hidden[piece]
        dkernel = x.new_empty((*rows.shape[:-1], told.taps, told.groups))
        _launch(told, rank, x[piece], dy[piece], dkernel)
        dkernel = dkernel.reshape(len(rows), -1, told.taps * told.groups)
        rows = rows.reshape(len(rows), -1, rows.shape[-1])
        dhidden[piece] = torch.matmul(dkernel, weight.t()).reshape(dhidden[piece].shape)
        dweights[piece, :-1] = _wide_product(rows.transpose(1, 2), dkernel, dweights.dtype)
        dweights[piece, -1] = dkernel.sum(1, dtype=dweights.dtype)


def _wide_product(a, b, dtype):
    """``a @ b`` as it was summed, not rounded to the type of its factors."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


operations = torch_custom_ops.define("triton", _run, _run_fused)
