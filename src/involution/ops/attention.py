"""Local self-attention: kernels from the products of queries and keys."""

import dataclasses
import math

from involution.ops.calls import apply_window_products
from involution.ops.dispatch import select
from involution.ops.frameworks import namespace
from involution.ops.problem import problem_of
from involution.ops.tensor_utils import to_accumulation_dtype

# Score of a masked position: zero after softmax; finite, so fully masked windows give no NaN.
MASK_VALUE = -1e9


def attention_kernel(query, key, window):
    """softmax over taps k of query[p] . key[position k of the window of p] / sqrt(channels of a
    head), where positions outside the input have zero weight; the groups are the heads.

    Args:
        query: Tensor (B, *out_spatial, groups * channels of a head).
        key: Tensor (B, *spatial, groups * channels of a head).
        window: The windows, channels last.

    Returns:
        Tensor (B, *out_spatial, taps, groups), in the dtype of sums.
    """
    ops = namespace(query)
    query = query / math.sqrt(query.shape[-1] // window.groups)
    scores = to_accumulation_dtype(_products(key, query, window))
    one_group = dataclasses.replace(window, groups=1)
    inside = _products(_ones(key), _ones(query), one_group)
    return ops.softmax(ops.where(inside > 0.5, scores, MASK_VALUE), -2)


def _ones(tensor):
    """Ones of the same spatial sizes, with one sample and one channel."""
    return namespace(tensor).ones_like(to_accumulation_dtype(tensor[:1, ..., :1]))


def _products(x, y, window):
    return apply_window_products(select(problem_of(window, x)), x, y)
