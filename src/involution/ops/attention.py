"""Local self-attention: kernels from the products of queries and keys."""

import dataclasses
import math

from involution.ops.calls import apply_window_products
from involution.ops.dispatch import select
from involution.ops.frameworks import namespace
from involution.ops.problem import problem_of
from involution.ops.rowwise import rowwise_softmax
from involution.ops.tensor_utils import to_accumulation_dtype

# Score of a masked position: zero after softmax; finite, so fully masked windows give no NaN.
MASK_VALUE = -1e9


def attention_kernel(query, key, window, mask=None):
    """softmax over taps k of query[p] . key[position k of the window of p] / sqrt(channels of a
    head), where positions outside the input, or masked, have zero weight; the groups are the heads.

    Args:
        query: Tensor (B, *out_spatial, groups * channels of a head).
        key: Tensor (B, *spatial, groups * channels of a head).
        window: The windows, channels last.
        mask: None, or a boolean tensor (B, *spatial).

    Returns:
        Tensor (B, *out_spatial, taps, groups), in the dtype of sums.
    """
    query = query / math.sqrt(query.shape[-1] // window.groups)
    return tap_softmax(_products(key, query, window), window, (key, mask))


def tap_softmax(kernel, window, inside=None, rowwise=False):
    """softmax over the taps of each window, in the dtype of sums.

    Args:
        kernel: Tensor (B, *out_spatial, taps, groups), or (B, taps, groups, *out_spatial).
        window: The windows.
        inside: None, or (x, mask): taps outside ``x``, or where ``mask`` is false, have no weight.
            The mask is None or a boolean tensor (B, *spatial).
        rowwise: Whether the bits of a kernel must not depend on the number of kernels.
    """
    ops, kernel = namespace(kernel), to_accumulation_dtype(kernel)
    if inside is not None:
        kernel = ops.where(_taps_inside(kernel, window, *inside), kernel, MASK_VALUE)
    return (rowwise_softmax if rowwise else ops.softmax)(kernel, window.tap_axis)


def _taps_inside(kernel, window, x, mask):
    """Which taps are inside ``x`` and not masked: one group, and one sample if there is no mask."""
    ops, axis = namespace(kernel), window.channel_axis
    window = dataclasses.replace(window, groups=1)
    channel = (slice(None),) * axis + (slice(0, 1),)
    if mask is None:
        x, kernel = ops.ones_like(to_accumulation_dtype(x[channel][:1])), kernel[:1]
    else:
        x = ops.cast(ops.expand_dims(mask, axis), kernel.dtype)
    # One channel at each output: the first tap of the first group.
    y = ops.ones_like(kernel[(slice(None),) * axis + (0, slice(0, 1))])
    return _products(ops.cast(x, kernel.dtype), y, window) > 0.5


def _products(x, y, window):
    return apply_window_products(select(problem_of(window, x)), x, y)
