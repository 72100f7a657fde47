"""The operator for tensors with channels on axis 1, in the terms of PyTorch."""

import dataclasses
from collections.abc import Sequence
from typing import Any

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
from involution.ops.transposed import TransposedWindow
from involution.ops.validation import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    CONTIGUOUS,
    SAME,
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
    "transposed_involution",
]

CONVOLVE = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}


def involution(
    x: torch.Tensor,
    kernel: torch.Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: Any = SYMMETRIC,
    dilation: int | Sequence[int] = 1,
    group_layout: str = CONTIGUOUS,
    implementation: str | Sequence[str] | None = None,
    upsampling: int | Sequence[int] = 1,
) -> torch.Tensor:
    """Applies a separate kernel at each position of ``x``, shared by the channels of a group.

    Args:
        x: Tensor (B, C, *spatial), with one, two or three spatial dimensions.
        kernel: Tensor (B, groups, taps, *out_spatial), of the dtype of ``x``: a kernel map (B,
            groups * taps, *out_spatial), as of a convolution, with the channel axis split. Taps
            are in row-major order.
        kernel_size: Integer, or one for each spatial dimension.
        stride: Integer, or one for each spatial dimension.
        padding: ``"symmetric"`` (floor((kernel_size - 1) * dilation / 2) zeros on both sides, as in
            the paper's code), ``"valid"``, ``"same"`` (ceil(n / stride) positions, as in Keras),
            ``"causal"`` (one dimension: windows end at p * stride), an integer, an integer for each
            spatial dimension, or a pair (before, after) for each.
        dilation: Integer, or one for each spatial dimension.
        group_layout: ``"contiguous"``: channel c belongs to group c // (C / groups), as in the
            paper; ``"interleaved"``: to group c % groups.
        implementation: As for ``involution.ops.involution``.
        upsampling: Integer, or one for each spatial dimension: output position p uses the window of
            position floor(p / upsampling), with its own kernel, so that the spatial sizes of the
            kernel and of the output are multiplied; above 1, ``stride`` must be 1.

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
        kernel_size, stride, padding, dilation, kernel.shape[1], group_layout, rank, upsampling
    )
    return apply_kernel(x, kernel, window, implementation)


def transposed_involution(
    x: torch.Tensor,
    kernel: torch.Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: Any = SYMMETRIC,
    output_padding: Any = 0,
    dilation: int | Sequence[int] = 1,
    group_layout: str = CONTIGUOUS,
    implementation: str | Sequence[str] | None = None,
) -> torch.Tensor:
    """Each position of ``x`` adds its channels, times its own kernel, to a window of the output.

    Kernels belong to the positions that are read. As a transposed convolution is the gradient of a
    convolution for its input, this is the gradient of ``involution``; with a stride, it upsamples.

    Args:
        x: Tensor (B, C, *spatial), with one, two or three spatial dimensions.
        kernel: Tensor (B, groups, taps, *spatial), of the dtype of ``x``.
        kernel_size, stride, dilation: As for ``involution``.
        padding: As for ``involution``, without ``"causal"``: positions cut off the output at both
            ends. ``"same"``: as many as leave n * stride positions, as in Keras.
        output_padding: Integer, or one for each spatial dimension: additional positions at the end
            of the output, fewer than ``stride``; for ``"same"``, 0 are as many as Keras adds.
        group_layout, implementation: As for ``involution``.

    Returns:
        Tensor (B, C, *out_spatial), of the dtype and memory format of ``x``. Except for ``"same"``
        it has the sizes of PyTorch's transposed convolutions, (n - 1) * stride + (kernel_size - 1)
        * dilation + 1 - padding before and after + output_padding.

    Raises:
        ValueError: An argument is out of its range, or the shapes or dtypes do not match.

    Example:

    >>> import torch
    >>> from involution.torch import functional
    >>> x, kernel = torch.ones(1, 6, 4, 5), torch.ones(1, 2, 9, 4, 5)
    >>> y = functional.transposed_involution(x, kernel, 3, stride=2, output_padding=1)
    >>> y.shape, float(y[0, 0, 0, 0]), float(y[0, 0, 1, 1])
    (torch.Size([1, 6, 8, 10]), 1.0, 4.0)
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
    transposed = make_transposed(window, output_padding)
    return apply_transposed(x, kernel, transposed, implementation)


def make_window(
    kernel_size, stride, padding, dilation, groups, group_layout, rank, upsampling=1
) -> Window:
    """The window of PyTorch's arguments, channels last."""
    if not isinstance(padding, str) and hasattr(padding, "__len__"):
        # Integers, in PyTorch's sense: before and after.
        padding = tuple(p if hasattr(p, "__len__") else (p, p) for p in padding)
    stride = standardize_tuple("stride", stride, rank)
    dilation = standardize_tuple("dilation", dilation, rank)
    return Window(
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        group_layout,
        CHANNELS_LAST,
        rank,
        upsampling,
    )


def make_transposed(window, output_padding) -> TransposedWindow:
    """The transposed window of PyTorch's arguments: its sizes are those of ``ConvTranspose2d``."""
    rest = standardize_tuple("output_padding", output_padding, window.rank, minimum=0)
    return TransposedWindow.of(window, None if window.padding == SAME and not any(rest) else rest)


def apply_kernel(x, kernel, window, implementation=None):
    """``involution`` with a window."""
    x, kernel = autocast(x, kernel)
    _check_shape(kernel, x, window, window.output_sizes(x.shape[2:]), "the output")

    def apply(window, x, kernel):
        return calls.involution(window, implementation, x, kernel)

    return _apply_to_groups(apply, x, kernel, window)


def apply_transposed(x, kernel, transposed: TransposedWindow, implementation=None):
    """``transposed_involution`` with a window."""
    x, kernel = autocast(x, kernel)
    _check_shape(kernel, x, transposed.window, x.shape[2:], "the input")

    def apply(window, x, kernel):
        of_groups = dataclasses.replace(transposed, window=window)
        return calls.transposed_involution(of_groups, implementation, x, kernel)

    return _apply_to_groups(apply, x, kernel, transposed.window)


def _check_shape(kernel, x, window, sizes, owner):
    if x.shape[1] == 0 or x.shape[1] % window.groups:
        raise ValueError(
            "The number of channels must be divisible by `groups`. "
            f"Received: groups={window.groups}, x.shape={tuple(x.shape)}"
        )
    expected = (x.shape[0], window.groups, window.taps, *sizes)
    if tuple(kernel.shape) != expected:
        raise ValueError(
            f"`kernel` must have the shape {expected}: batch, groups, taps, and spatial sizes of "
            f"{owner}. Received: kernel.shape={tuple(kernel.shape)}"
        )


def _apply_to_groups(apply, x, kernel, window):
    """``apply(window, x, kernel)``, whose tensors have the channels where the window says."""
    if window.group_layout == CONTIGUOUS and x.is_contiguous():
        # Groups are folded into the batch: no tensor is copied.
        batch, groups, taps, *sizes = kernel.shape
        y = apply(
            dataclasses.replace(window, groups=1, data_format=CHANNELS_FIRST),
            x.reshape(-1, x.shape[1] // groups, *x.shape[2:]),
            kernel.reshape(-1, taps, 1, *sizes),
        )
        # The portable transposed implementations return a slice.
        return y.reshape(batch, x.shape[1], *y.shape[2:]).contiguous()
    return from_last(apply(window, to_last(x), kernel.movedim((2, 1), (-2, -1))), x)


def apply_generated(x, hidden, weight, bias, window, implementation=None, convolve=None):
    """``apply_kernel`` with the kernels of a 1x1 convolution of ``hidden``, fused where possible.

    Args:
        hidden: Tensor (B, H, *out_spatial).
        weight: The convolution's weight, (groups * taps, H, 1, ...).
        bias: Its bias, (groups * taps,).
        convolve: The convolution, for kernels that are stored; None: PyTorch's.
    """
    x, hidden, weight, bias = autocast(x, hidden, weight, bias)
    selection = select(problem_of(window, to_last(x), weight.shape[1]), implementation)
    if not selection.generates:
        kernel = (convolve or CONVOLVE[window.rank])(hidden, weight, bias)
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
    """The inverse of ``to_last``, in the memory format that a convolution gives its output: that of
    ``x``, and ``contiguous_format`` if it has none, as a view."""
    y = y.movedim(-1, 1)
    if x.is_contiguous():
        return y.contiguous()
    strides = to_last(x).stride()
    is_last = strides[-1] == 1 and list(strides) == sorted(strides, reverse=True)
    return y if is_last else y.contiguous()
