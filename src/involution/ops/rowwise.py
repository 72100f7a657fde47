"""Functions of rows whose bits do not depend on the number of rows: a row is a position of a
sequence, and sequences come in steps of any length.

The frameworks choose the order of a sum, and the code of an exponential, by the number of elements.
"""

import functools
import math

from involution.ops.calls import apply_generated
from involution.ops.dispatch import preferred, select
from involution.ops.frameworks import framework_of, namespace
from involution.ops.problem import problem_of
from involution.ops.validation import CHANNELS_LAST
from involution.ops.window import Window


def rowwise_matmul(x, weight):
    """``x @ weight`` for ``x`` (B, length, n) and ``weight`` (n, m); by the framework, whose bits
    depend on the length, where ``rowwise_linear`` cannot run."""
    ops = namespace(x)
    product = rowwise_linear(x, weight, ops.zeros_like(weight[0]))
    return ops.matmul(x, weight) if product is None else product


def rowwise_linear(x, weight, bias):
    """``x @ weight + bias``, or None where ``fused`` does not run.

    The product is expressed as kernels of one tap, for a group of one channel each, that are
    applied to ones.
    """
    ops = namespace(x)
    outputs = weight.shape[-1]
    window = Window(1, groups=outputs, data_format=CHANNELS_LAST, rank=1)
    ones = ops.ones((*ops.shape(x)[:-1], outputs), x)
    problem = problem_of(window, ones, weight.shape[0])
    if "fused" in preferred(problem):
        selection = select(problem, ("fused", "reference"))
        if selection.name == "fused":
            return apply_generated(selection, ones, x, weight, bias)
    return None


# A multiple of the lanes of every vector: no exponential is computed by scalar code.
EXP_BLOCK = 64


def rowwise_softmax(x, axis):
    """softmax over a short axis; its exponentials are computed in whole blocks."""
    ops = namespace(x)
    parts = [x[(slice(None),) * axis + (n,)] for n in range(x.shape[axis])]
    largest = functools.reduce(lambda a, b: ops.where(a > b, a, b), parts)
    shifted = ops.stack([part - largest for part in parts], 0)
    shape = ops.shape(shifted)
    count = math.prod(shape)
    if framework_of(x) == "jax" and not isinstance(count, int):
        exponentials = ops.exp(shifted)  # its exporter supports no reshape of unknown sizes
    else:
        flat = ops.reshape(shifted, (-1,))
        # Not -count % EXP_BLOCK: exporters round the quotient of a negative size toward zero.
        flat = ops.pad(flat, [(0, (EXP_BLOCK - count % EXP_BLOCK) % EXP_BLOCK)])
        exponentials = ops.reshape(ops.exp(flat)[:count], shape)
    parts = [exponentials[n] for n in range(len(parts))]
    total = functools.reduce(lambda a, b: a + b, parts)
    return ops.stack([part / total for part in parts], axis)
