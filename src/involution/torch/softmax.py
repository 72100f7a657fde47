"""Softmax over the taps of each window."""

import dataclasses

import torch

from involution.ops import calls
from involution.ops.attention import MASK_VALUE
from involution.torch.functional import to_last


def taps_inside(window, present):
    """Which taps of each window are inside the input.

    Args:
        window: The windows.
        present: Tensor (B or 1, 1, *spatial) of a floating-point dtype: 1 at the positions of the
            input, 0 at those of a cache that are before it.

    Returns:
        Tensor (B or 1, 1, taps, *out_spatial) of bool.
    """
    window = dataclasses.replace(window, groups=1)
    ones = present.new_ones((present.shape[0], *window.output_sizes(present.shape[2:]), 1))
    inside = calls.window_products(window, None, to_last(present), ones)
    return inside.movedim((-1, -2), (1, 2)) > 0.5


def softmax(kernel, inside=None, is_causal=False):
    """Softmax over the taps of kernels (B, groups, taps, *out_spatial), in the dtype of sums.

    Args:
        inside: Result of ``taps_inside``; the weights of other taps are zero.
        is_causal: Whether a kernel must not depend on the number of positions, to the last bit.
    """
    kernel = kernel.to(torch.promote_types(kernel.dtype, torch.float32))
    if inside is not None:
        kernel = torch.where(inside, kernel, MASK_VALUE)
    if not is_causal:
        return torch.softmax(kernel, 2)
    # On another axis than the last, PyTorch's softmax is another function for the positions that
    # fill no vector: the last bit of a kernel would depend on the number of positions.
    return torch.softmax(kernel.movedim(2, -1).contiguous(), -1).movedim(-1, 2)
