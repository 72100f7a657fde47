"""Registers derivatives of any order, for implementations that compute their gradients themselves.

Involution is bilinear in its input and its kernel, and so are its two gradients. An implementation
computes three passes:

    forward(x, kernel) -> y    input_grad(kernel, dy) -> dx    kernel_grad(x, dy) -> dkernel

The derivatives of each pass are given by the other two, so that one table, ``VJP_RULES``, covers
all orders. The module of each framework registers it: ``differentiable(compute)``.
"""

import dataclasses
import functools
import operator
import sys
from typing import Any

FORWARD, INPUT_GRAD, KERNEL_GRAD = "forward", "input_grad", "kernel_grad"

# For a pass(a, b) with the cotangent c: the gradients of a and of b, each as a pass and the indices
# of its two arguments in (a, b, c).
VJP_RULES = {
    FORWARD: ((INPUT_GRAD, (1, 2)), (KERNEL_GRAD, (0, 2))),
    INPUT_GRAD: ((KERNEL_GRAD, (2, 1)), (FORWARD, (2, 0))),
    KERNEL_GRAD: ((INPUT_GRAD, (2, 1)), (FORWARD, (0, 2))),
}


@dataclasses.dataclass(frozen=True)
class PassSpec:
    """The static arguments of a pass, as one object that frameworks do not inspect."""

    pass_: str
    window: Any
    sizes: tuple


def gradients(call, pass_, window, sizes, operands, needs_grad=(True, True)):
    return tuple(
        call(rule, window, sizes, *(operands[i] for i in indices)) if needed else None
        for (rule, indices), needed in zip(VJP_RULES[pass_], needs_grad, strict=True)
    )


def tangent(call, arguments, tangents):
    """The tangent of a multilinear ``call``: the sum over arguments of ``call`` with that argument
    replaced by its tangent. None is a tangent of zero; at least one is not None."""
    return sum_of(
        call(*arguments[:n], argument_tangent, *arguments[n + 1 :])
        for n, argument_tangent in enumerate(tangents)
        if argument_tangent is not None
    )


def sum_of(terms):
    return functools.reduce(operator.add, terms)


def tracing_reason(framework) -> str | None:
    """Why custom ops are unavailable: PyTorch's tracer is active. None if it is not."""
    if framework != "torch":
        return None
    torch = sys.modules["torch"]
    # Checked first, because torch.compile cannot trace ``is_tracing``.
    if torch.compiler.is_compiling() or not torch.jit.is_tracing():
        return None
    return (
        "torch.jit.trace, and exporters that use it, support only PyTorch's own ops; trace within "
        'involution.ops.force_implementation("portable"), or use `involution export`'
    )
