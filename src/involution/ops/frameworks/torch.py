"""Array functions of PyTorch."""

import torch

concatenate = torch.concatenate
expand_dims = torch.unsqueeze
matmul = torch.matmul
maximum = torch.sym_max  # of sizes
moveaxis = torch.moveaxis
ones_like = torch.ones_like
reshape = torch.reshape
softmax = torch.softmax
stack = torch.stack
swapaxes = torch.swapaxes
transpose = torch.permute
where = torch.where
zeros_like = torch.zeros_like


def convert_to_tensor(x, like):
    return torch.as_tensor(x, device=like.device)


def shape(x) -> tuple:
    return tuple(x.shape)


def cast(x, dtype):
    return x.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def pad(x, pad_width):
    return torch.nn.functional.pad(x, [n for pair in reversed(pad_width) for n in pair])


def sum(x, axis, keepdims=False):
    return torch.sum(x, axis, keepdim=keepdims)
