"""The operator for tensors with channels on axis 1, in the terms of PyTorch."""

import dataclasses

import torch

from involution.compat import (
    adaptive_conv,
    carafe,
    convex_upsample,
    headwise_dynamic_convolution,
    lowrank_dynamic_convolution,
    outlook_attention,
    propagate,
    ska,
)
from involution.ops import calls
from involution.ops.dispatch import select
from involution.ops.frameworks.torch import autocast
from involution.ops.problem import check_generator, problem_of
from involution.ops.validation import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    CONTIGUOUS,
    SYMMETRIC,
    standardize_tuple,
)
from involution.ops.window import Window

__all__ = [
    "adaptive_conv",
    "carafe",
    "convex_upsample",
    "headwise_dynamic_convolution",
    "involution",
    "lowrank_dynamic_convolution",
    "outlook_attention",
    "propagate",
    "ska",
]

CONVOLVE = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}


def involution(
    x,
    kernel,
    kernel_size,
    *,
    stride=1,
    padding=SYMMETRIC,
    dilation=1,
    group_layout=CONTIGUOUS,
    implementation=None,
):
    """Applies a separate kernel at each position of ``x``, shared by the channels of a group.

    Args:
        x: Tensor (B, C, *spatial), with one, two or three spatial dimensions.
        kernel: Tensor (B, groups, taps, *out_spatial), of the dtype of ``x``: a kernel map (B,
            groups * taps, *out_spatial), as of a convolution, with the channel axis split. Taps
            are in row-major order.
        kernel_size: Integer, or one for each spatial dimension.
        stride: Integer, or one for each spatial dimension.
        padding: ``"symmetric"`` (floor((kernel_size - 1) * dilation / 2) zeros on both sides, as in
            the paper's code), ``"valid"``, ``"same"`` (ceil(n / stride) positions, as in Keras), an
            integer, an integer for each spatial dimension, or a pair (before, after) for each.
        dilation: Integer, or one for each spatial dimension.
        group_layout: ``"contiguous"``: channel c belongs to group c // (C / groups), as in the
            paper; ``"interleaved"``: to group c % groups.
        implementation: As for ``involution.ops.involution``.

    Returns:
        Tensor (B, C, *out_spatial), of the dtype and memory format of ``x``.

    Raises:
        ValueError: An argument is out of its range, or the shapes or dtypes do not match.

    Example:

    >>> import torch
    >>> from involution.torch import functional
    >>> x, kernel = torch.ones(1, 6, 4, 5), torch.ones(1, 2, 9, 4, 5)
    >>> y = functional.involution(x, kernel, kernel_size=3)
    >>> y.shape, float(y[0, 0, 0, 0]), float(y[0, 0, 1, 1])
    (torch.Size([1, 6, 4, 5]), 4.0, 9.0)

    Source: Li et al., arXiv:2103.06255.
    """
    rank = calls.rank_of(x)
    if kernel.dim() != rank + 3:
        raise ValueError(
            f"`kernel` must have the axes of batch, groups and taps, and {rank} spatial axes. "
            f"Received: kernel.shape={tuple(kernel.shape)}"
        )
    window = make_window(
        kernel_size, stride, padding, dilation, kernel.shape[1], group_layout, rank
    )
    return apply_kernel(x, kernel, window, implementation)


def make_window(kernel_size, stride, padding, dilation, groups, group_layout, rank) -> Window:
    """The window of PyTorch's arguments, channels last."""
    if not isinstance(padding, str) and hasattr(padding, "__len__"):
        # Integers, in PyTorch's sense: before and after.
        padding = tuple(p if hasattr(p, "__len__") else (p, p) for p in padding)
    stride = standardize_tuple("stride", stride, rank)
    dilation = standardize_tuple("dilation", dilation, rank)
    return Window(kernel_size, stride, padding, dilation, groups, group_layout, CHANNELS_LAST, rank)


def apply_kernel(x, kernel, window, implementation=None):
    """``involution`` with a window."""
    x, kernel = autocast(x, kernel)
    expected = (x.shape[0], window.groups, window.taps, *window.output_sizes(x.shape[2:]))
    if tuple(kernel.shape) != expected:
        raise ValueError(
            f"`kernel` must have the shape {expected}: batch, groups, taps, and spatial sizes of "
            f"the output. Received: kernel.shape={tuple(kernel.shape)}"
        )
    if window.group_layout == CONTIGUOUS and x.is_contiguous():
        # Groups are folded into the batch: no tensor is copied.
        batch, groups, taps, *sizes = kernel.shape
        y = calls.involution(
            dataclasses.replace(window, groups=1, data_format=CHANNELS_FIRST),
            implementation,
            x.reshape(-1, x.shape[1] // groups, *x.shape[2:]),
            kernel.reshape(-1, taps, 1, *sizes),
        )
        return y.reshape(batch, x.shape[1], *sizes)
    y = calls.involution(window, implementation, to_last(x), kernel.movedim((2, 1), (-2, -1)))
    return from_last(y, x)


def apply_generated(x, hidden, weight, bias, window, implementation=None):
    """``apply_kernel`` with the kernels of a 1x1 convolution of ``hidden``, fused where possible.

    Args:
        hidden: Tensor (B, H, *out_spatial).
        weight: The convolution's weight, (groups * taps, H, 1, ...).
        bias: Its bias, (groups * taps,).
    """
    x, hidden, weight, bias = autocast(x, hidden, weight, bias)
    selection = select(problem_of(window, to_last(x), weight.shape[1]), implementation)
    if selection.name != "fused":
        kernel = CONVOLVE[window.rank](hidden, weight, bias)
        kernel = kernel.unflatten(1, (window.groups, window.taps))
        return apply_kernel(x, kernel, window, implementation)
    # Also for contiguous ``x``, which is copied twice: at RedNet's sizes on a CPU, stored kernels
    # take 1.2 to 1.5 times as long in inference, 0.9 to 1.1 times as long in training, and many
    # times the memory.
    # The operator's kernels have groups as the last axis. Reordering the weight is cheaper than
    # reordering the kernels.
    weight = weight.reshape(window.groups, window.taps, -1).permute(2, 1, 0).flatten(1)
    bias = bias.reshape(window.groups, window.taps).t().flatten()
    operands = to_last(hidden), weight, bias
    check_generator(selection.problem, *operands)
    return from_last(calls.apply_generated(selection, to_last(x), *operands), x)


def to_last(x):
    """A view with the channels on the last axis; contiguous for PyTorch's memory format
    ``channels_last``."""
    return x.movedim(1, -1)


def from_last(y, x):
    """The inverse of ``to_last``, in the memory format of ``x``."""
    y = y.movedim(-1, 1)
    return y.contiguous() if x.is_contiguous() else y
