"""Layers of causal generators: values at a position do not depend on the number of positions.

PyTorch's matrix products and convolutions choose the order of their sums by the number of rows, so
that a sequence computed step by step would differ from the whole in the last bit. Here the order is
fixed: in eval mode, in which sequences are generated. Exported programs, which other libraries may
run, contain PyTorch's own layers.
"""

import torch
from torch import nn

from involution.ops.dispatch import PREFERENCE
from involution.ops.frameworks.torch import autocast
from involution.ops.rowwise import rowwise_linear
from involution.ops.tensor_utils import to_accumulation_dtype
from involution.torch.functional import apply_generated, to_last
from involution.utils.torch_hooks import is_hooked

# The choice by size would change the order of the sums.
EXACT = ("fused", *PREFERENCE)
# Maximum number of products stored at once; bounds the memory without the compiled core.
MAX_PRODUCTS = 2**22


def is_exact(module) -> bool:
    """Whether a causal module's values are computed position by position."""
    if module.training:
        return False
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    return not torch.jit.is_tracing()


def has_plain_call(module) -> bool:
    """Whether calling a module runs its class's ``forward`` and has no other effect."""
    return "forward" not in vars(module) and not is_hooked(module)


def evaluate(module, x):
    """``module(x)``, position by position for the layers of this package's generators, alone or in
    an ``nn.Sequential``; other modules are called."""
    if not has_plain_call(module):
        return module(x)
    if type(module) is nn.Sequential:
        for child in module:
            x = evaluate(child, x)
        return x
    if type(module) is nn.Conv1d and is_exact(module) and _is_valid(module):
        return convolve(x, module.weight, module.bias)
    if type(module) is nn.BatchNorm1d and is_exact(module) and module.running_mean is not None:
        return _normalize(
            x, module.running_mean, module.running_var, module.weight, module.bias, module.eps
        )
    return module(x)


def _is_valid(conv) -> bool:
    """Whether ``convolve`` computes this convolution."""
    return (
        conv.stride == conv.dilation == (1,)
        and conv.groups == 1
        # Without effect on a kernel of one tap.
        and (conv.padding in ((0,), "valid") or (conv.padding == "same" and _has_one_tap(conv)))
    )


def _has_one_tap(conv) -> bool:
    return conv.kernel_size == (1,)


# Functions that inspect shapes are nodes of the graphs of torch.fx.
@torch.fx.wrap
def convolve(x, weight, bias=None):
    """``torch.conv1d(x, weight, bias)``, position by position."""
    x, weight = autocast(x, weight)
    outputs, _, taps = weight.shape
    features = to_last(x)
    if taps > 1:
        features = features.unfold(1, taps, 1).flatten(2)
    bias = weight.new_zeros(outputs) if bias is None else bias.to(weight.dtype)
    y = rowwise_linear(features, weight.flatten(1).t(), bias)
    if y is None:
        y = _products(features, weight.flatten(1), bias)
    return y.movedim(-1, 1)


@torch.fx.wrap
def apply_generated_exactly(x, hidden, weight, bias, window, implementation=None):
    """``apply_generated``, position by position."""
    names = EXACT if implementation is None else implementation
    return apply_generated(x, hidden, weight, bias, window, names, convolve)


def _products(x, weight, bias):
    """x @ weight.t() + bias, by sums in pairs: each of the operations acts on single elements."""
    dtype, weight = x.dtype, to_accumulation_dtype(weight)
    count = max(MAX_PRODUCTS // max(x.shape[0] * weight.numel(), 1), 1)
    parts = []
    for part in to_accumulation_dtype(x).split(count, 1):
        terms = part.unsqueeze(-2) * weight
        while (n := terms.shape[-1]) > 1:
            pairs = terms[..., : n // 2] + terms[..., n // 2 : n // 2 * 2]
            terms = torch.cat((pairs, terms[..., n - 1 :]), -1) if n % 2 else pairs
        parts.append(terms.squeeze(-1))
    return (torch.cat(parts, 1) + bias).to(dtype)


@torch.fx.wrap
def _normalize(x, mean, variance, weight, bias, eps):
    """Batch normalization by running statistics."""
    mean, variance = to_accumulation_dtype(mean), to_accumulation_dtype(variance)
    scale = torch.rsqrt(variance + eps)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    # Two operations, because PyTorch's own rounds a product before the sum at some positions only.
    y = to_accumulation_dtype(x) * scale[:, None]
    return (y + shift[:, None]).to(x.dtype)
