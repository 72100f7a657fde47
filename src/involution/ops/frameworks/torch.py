"""Array functions of PyTorch."""

import torch

broadcast_to = torch.broadcast_to
concatenate = torch.concatenate
exp = torch.exp
expand_dims = torch.unsqueeze
matmul = torch.matmul
maximum = torch.sym_max  # of sizes
moveaxis = torch.moveaxis
ones_like = torch.ones_like
reshape = torch.reshape
softmax = torch.softmax
stack = torch.stack
swapaxes = torch.transpose  # torch.swapaxes has no batching rule of autograd.grad(is_grads_batched)
transpose = torch.permute
where = torch.where
zeros_like = torch.zeros_like


def convert_to_tensor(x, like):
    return torch.as_tensor(x, device=like.device)


def shape(x) -> tuple:
    return tuple(x.shape)


def cast(x, dtype):
    return x.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def flip(x, axis):
    return torch.flip(x, (axis,))


def pad(x, pad_width):
    return torch.nn.functional.pad(x, [n for pair in reversed(pad_width) for n in pair])


def sum(x, axis, keepdims=False):
    return torch.sum(x, axis, keepdim=keepdims)


def take(x, indices, axis):
    return torch.index_select(x, axis, torch.as_tensor(indices, device=x.device))


def is_autocast(device) -> bool:
    """Whether ``torch.autocast`` is active for a type of device."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast(*tensors):
    """The tensors as a convolution uses them: within ``torch.autocast`` in its dtype."""
    device = tensors[0].device.type
    if not is_autocast(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def ones(shape, like):
    return torch.ones(shape, dtype=like.dtype, device=like.device)
