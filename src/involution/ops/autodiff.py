"""Registers derivatives of any order, for implementations that compute their gradients themselves.

Involution is bilinear in its input and its kernel, and so are its two gradients. An implementation
computes three passes:

    forward(x, kernel) -> y    input_grad(kernel, dy) -> dx    kernel_grad(x, dy) -> dkernel

The derivatives of each pass are given by the other two, so that one table, ``VJP_RULES``, covers
all orders. ``differentiable`` registers it with the backend in use.
"""

import dataclasses
import functools
import operator
from typing import Any

import keras

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


def _gradients(call, pass_, window, sizes, operands, needs_grad=(True, True)):
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


def _jax(compute, composite):
    import jax

    call = jax.custom_vjp(compute, nondiff_argnums=(0, 1, 2))

    def forward(pass_, window, sizes, a, b):
        return call(pass_, window, sizes, a, b), (a, b)

    def backward(pass_, window, sizes, ab, c):
        return _gradients(call, pass_, window, sizes, (*ab, c))

    call.defvjp(forward, backward)
    return call


def _tensorflow(compute, composite):
    import tensorflow as tf

    def call(pass_, window, sizes, a, b):
        # Variables are read here: they may change before the gradient is computed.
        a, b = tf.convert_to_tensor(a), tf.convert_to_tensor(b)
        if _has_tangents(a, b):
            # In a graph, reverse mode over forward mode would add the derivatives of the ops and
            # those of the custom gradient.
            return composite(pass_, window, sizes, a, b)

        @tf.custom_gradient
        def run_pass(a, b):
            def gradient(c):
                return _gradients(call, pass_, window, sizes, (a, b, c))

            if tf.executing_eagerly():
                # stop_gradient: a tape would record the ops inside and keep their tensors. In a
                # graph no tape does, and vectorized_map, which drops custom gradients, needs the
                # gradients of the ops.
                return compute(
                    pass_, window, sizes, tf.stop_gradient(a), tf.stop_gradient(b)
                ), gradient
            return compute(pass_, window, sizes, a, b), gradient

        return run_pass(a, b)

    return call


def _has_tangents(*tensors) -> bool:
    """Whether TensorFlow's forward mode traces a graph with tangents of these tensors."""
    import tensorflow as tf

    if tf.executing_eagerly():
        return False
    try:
        from tensorflow.python.eager.forwardprop_util import pack_tangents
    except ImportError:
        return False  # private API, which may be missing
    return bool(pack_tangents(tensors).tangents)


def _torch(compute, composite):
    import torch

    class TracedPass(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(spec, a, b):
            return compute(spec.pass_, spec.window, spec.sizes, a, b)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.spec, a, b = inputs
            ctx.save_for_backward(a, b)
            ctx.save_for_forward(a, b)

        @staticmethod
        def backward(ctx, c):
            spec, needs_grad = ctx.spec, ctx.needs_input_grad[1:]
            operands = (*ctx.saved_tensors, c)
            return None, *_gradients(
                call, spec.pass_, spec.window, spec.sizes, operands, needs_grad
            )

    class EagerPass(TracedPass):
        @staticmethod
        def jvp(ctx, _, *tangents):
            return tangent(
                functools.partial(EagerPass.apply, ctx.spec), ctx.saved_tensors, tangents
            )

    def call(pass_, window, sizes, a, b):
        # torch.compile supports no autograd.Function with a ``jvp``; it derives one from
        # ``compute``.
        function = TracedPass if torch.compiler.is_compiling() else EagerPass
        return function.apply(PassSpec(pass_, window, sizes), a, b)

    return call


def nested_forward_mode() -> bool:
    """Whether PyTorch nests forward mode in forward mode.

    It then silently treats the derivatives of an ``autograd.Function`` as zero; only compositions
    of PyTorch's own ops are differentiated correctly.
    """
    import torch

    if torch.compiler.is_compiling():
        return False
    try:
        from torch._C._functorch import TransformType, get_interpreter_stack
    except ImportError:
        return False  # private API, which may be missing
    levels = get_interpreter_stack()
    return bool(levels) and [level.key() for level in levels].count(TransformType.Jvp) > 1


def tracing_reason() -> str | None:
    """Why custom ops are unavailable: PyTorch's tracer is active. None if it is not."""
    if keras.config.backend() != "torch":
        return None
    import torch

    # Checked first, because torch.compile cannot trace ``is_tracing``.
    if torch.compiler.is_compiling() or not torch.jit.is_tracing():
        return None
    return (
        "torch.jit.trace, and exporters that use it, support only PyTorch's own ops; trace within "
        'involution.ops.force_implementation(("rows", "reference")), or use `involution export`'
    )


CUSTOM_GRADIENT = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}


def differentiable(compute, composite=None):
    """``compute`` with the derivatives of ``VJP_RULES``.

    Args:
        compute: ``compute(pass_, window, sizes, a, b)`` computes a pass. ``sizes`` are the spatial
            sizes of the operator's input, which the other tensors do not determine.
        composite: The same as a composition of the framework's own differentiable ops, for
            TensorFlow's forward mode in graphs.

    Returns:
        A function like ``compute``; None on a backend that is not in ``CUSTOM_GRADIENT``.
    """
    custom_gradient = CUSTOM_GRADIENT.get(keras.config.backend())
    return custom_gradient(compute, composite) if custom_gradient else None
