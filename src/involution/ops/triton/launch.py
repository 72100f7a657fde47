"""Launches the Triton kernels, as PyTorch custom ops."""

import contextlib
import math

import torch
from triton import cdiv, next_power_of_2

from involution.ops import torch_custom_ops
from involution.ops.autodiff import FORWARD, INPUT_GRAD, KERNEL_GRAD
from involution.ops.native.params import Params
from involution.ops.triton import kernels

# Limits of a block: groups x channels of a group, and channels of a group.
BLOCK_SIZE, MAX_GROUP_CHANNELS = 64, 64
# Limit of a block of hidden channels.
MAX_HIDDEN_BLOCK = 64
# Memory for the kernels, or their gradients, of a chunk of the batch: they should fit into L2.
CHUNK_BYTES = 2**25


def _channel_strides(p: Params) -> tuple[int, int]:
    """Strides of the groups, and of the channels of a group, on the channel axis."""
    return (1, p.groups) if p.interleaved else (p.channels_per_group, 1)


def _geometry(p: Params) -> tuple[int, ...]:
    """The spatial arguments of the kernels."""
    return (*p.input_size, *p.output_size, *p.strides, *p.dilation_rate, *p.pad_before)


def _execute(params, rank, a, b, result):
    _launch(Params.decode(params), rank, a, b, result)


def _launch(p: Params, rank, a, b, result):
    if result.numel() == 0:
        return
    count = len(a) * math.prod(p.result_size)
    block_c = min(next_power_of_2(p.channels_per_group), MAX_GROUP_CHANNELS)
    block_g = min(next_power_of_2(p.groups), max(BLOCK_SIZE // block_c, 1))
    tensors = [t.resolve_neg() for t in (a, b, result)]
    strides = [_strides(t, p.channels_first, rank) for t in tensors]
    blocks = cdiv(p.groups, block_g)
    if p.pass_name != KERNEL_GRAD:
        blocks *= cdiv(p.channels_per_group, block_c)
    with _device(result):
        kernels.KERNELS[p.pass_name][lambda meta: (cdiv(count, meta["BLOCK_P"]) * blocks,)](
            *(value for t, s in zip(tensors, strides, strict=True) for value in (t, *s)),
            count.bit_length(),
            count,
            p.groups,
            p.channels_per_group,
            *_channel_strides(p),
            *_geometry(p),
            *p.kernel_size,
            *p.upsampling,
            ACC_DTYPE=kernels.acc_dtype(result.dtype),
            CHANNELS_FIRST=bool(p.channels_first),
            BLOCK_G=block_g,
            BLOCK_C=block_c,
        )


def _strides(tensor, channels_first, rank):
    """Strides of the batch, of three spatial dimensions, and of channels or taps and groups."""
    batch, *rest = tensor.stride()
    last = tensor.dim() - 1 - rank
    spatial, channels = (rest[last:], rest[:last]) if channels_first else (rest[:rank], rest[rank:])
    return batch, *[0] * (3 - rank), *spatial, *channels


def _device(tensor):
    """Makes the tensor's device current: Triton launches kernels on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _execute_fused(params, rank, arguments, results):
    p = Params.decode(params)
    run = {FORWARD: _fused_forward, INPUT_GRAD: _fused_input_grad, KERNEL_GRAD: _fused_kernel_grad}
    run[p.pass_name](p, rank, *arguments, *results)


def _fused_forward(p, rank, x, hidden, weight, bias, y, _):
    if y.numel() == 0:
        return
    count = hidden.numel() // p.hidden_channels
    # Triton ignores the lazy negation of a tensor.
    x, hidden, weight, bias = (t.resolve_neg() for t in (x, hidden, weight, bias))
    # Groups first: a program generates the kernels of one group.
    weight = weight.reshape(p.hidden_channels, p.taps, p.groups).permute(2, 0, 1).contiguous()
    bias = bias.reshape(p.taps, p.groups).t().contiguous()
    block_c = min(next_power_of_2(p.channels_per_group), MAX_GROUP_CHANNELS)
    blocks = p.groups * cdiv(p.channels_per_group, block_c)
    hidden = hidden.contiguous()
    with _device(y):
        kernels.FUSED[lambda meta: (cdiv(count, meta["BLOCK_P"]) * blocks,)](
            x,
            *_strides(x, False, rank),
            hidden,
            weight,
            bias,
            y,
            *_strides(y, False, rank),
            count.bit_length(),
            count,
            p.groups,
            p.channels_per_group,
            *_channel_strides(p),
            p.hidden_channels,
            *_geometry(p),
            *p.kernel_size,
            *p.upsampling,
            # The interpreter's ``tl.dot`` of bfloat16 is wrong.
            CAST_TO_FLOAT32=kernels.IS_INTERPRETER,
            BLOCK_C=block_c,
            BLOCK_H=min(max(next_power_of_2(p.hidden_channels), 16), MAX_HIDDEN_BLOCK),
        )


def _batch_chunks(p, hidden):
    """Slices of the batch whose kernels take at most ``CHUNK_BYTES``, or of one sample."""
    bytes_per_sample = math.prod(p.output_size) * p.taps * p.groups * hidden.element_size()
    count = max(CHUNK_BYTES // max(bytes_per_sample, 1), 1)
    return [slice(first, first + count) for first in range(0, len(hidden), count)]


def _fused_input_grad(p, rank, hidden, weight, bias, dy, dx, _):
    for chunk in _batch_chunks(p, hidden):
        rows = hidden[chunk]
        kernel = torch.addmm(bias, rows.reshape(-1, rows.shape[-1]), weight)
        kernel = kernel.reshape(*rows.shape[:-1], p.taps, p.groups)
        _launch(p, rank, kernel, dy[chunk], dx[chunk])


def _fused_kernel_grad(p, rank, x, hidden, weight, dy, dhidden, dweights):
    for chunk in _batch_chunks(p, hidden):
        rows = hidden[chunk]
        dkernel = x.new_empty((*rows.shape[:-1], p.taps, p.groups))
        _launch(p, rank, x[chunk], dy[chunk], dkernel)
        dkernel = dkernel.reshape(len(rows), -1, p.taps * p.groups)
        rows = rows.reshape(len(rows), -1, rows.shape[-1])
        dhidden[chunk] = torch.matmul(dkernel, weight.t()).reshape(dhidden[chunk].shape)
        dweights[chunk, :-1] = _matmul_accumulate(rows.transpose(1, 2), dkernel, dweights.dtype)
        dweights[chunk, -1] = dkernel.sum(1, dtype=dweights.dtype)


def _matmul_accumulate(a, b, dtype):
    """``a @ b`` in the accumulation dtype, not rounded to that of ``a``."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


operations = torch_custom_ops.register_ops("triton", _execute, _execute_fused)
