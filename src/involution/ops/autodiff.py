"""Derivatives of any order, for implementations that compute their gradients themselves.

Involution is linear in its input and linear in its kernel, so it comes with two companions, each
again linear in both arguments:

    output(x, kernel) -> y        input(kernel, dy) -> dx        kernel(x, dy) -> dkernel

The derivative of any of the three is given by the other two, so one table closes the family.
``differentiable`` gives that table to the framework in use, by the framework's own mechanism.
"""

import dataclasses
import functools
import operator
from typing import Any

import keras

OUTPUT, INPUT, KERNEL = "output", "input", "kernel"

# For a member(a, b) with the cotangent c: the gradients of a and of b, each as a member of the
# family and where in (a, b, c) its two arguments stand.
VJP_RULES = {
    OUTPUT: ((INPUT, (1, 2)), (KERNEL, (0, 2))),
    INPUT: ((KERNEL, (2, 1)), (OUTPUT, (2, 0))),
    KERNEL: ((INPUT, (2, 1)), (OUTPUT, (0, 2))),
}


@dataclasses.dataclass(frozen=True)
class Which:
    """A member and what it is told, as one argument that frameworks do not look into."""

    member: str
    g: Any
    sizes: tuple


def _gradients(call, member, g, sizes, abc, needed=(True, True)):
    return tuple(
        call(rule, g, sizes, *(abc[i] for i in arguments)) if need else None
        for (rule, arguments), need in zip(VJP_RULES[member], needed, strict=True)
    )


def tangent(call, arguments, tangents):
    """Of what is linear in each argument: the sum of it with one argument's tangent in its place.
    None stands for a tangent of zero; one at least is none."""
    return sum_of(
        call(*arguments[:n], along, *arguments[n + 1 :])
        for n, along in enumerate(tangents)
        if along is not None
    )


def sum_of(terms):
    return functools.reduce(operator.add, terms)


def _jax(compute, plain):
    import jax

    call = jax.custom_vjp(compute, nondiff_argnums=(0, 1, 2))

    def forward(member, g, sizes, a, b):
        return call(member, g, sizes, a, b), (a, b)

    def backward(member, g, sizes, ab, c):
        return _gradients(call, member, g, sizes, (*ab, c))

    call.defvjp(forward, backward)
    return call


def _tensorflow(compute, plain):
    import tensorflow as tf

    def call(member, g, sizes, a, b):
        # A variable is read here: in the gradient it may have changed.
        a, b = tf.convert_to_tensor(a), tf.convert_to_tensor(b)
        if _has_tangents(a, b):
            # In a graph TensorFlow would take the tangents of the operations and of the function,
            # and in reverse mode over forward mode add both.
            return plain(member, g, sizes, a, b)

        @tf.custom_gradient
        def member_of(a, b):
            def gradient(c):
                return _gradients(call, member, g, sizes, (a, b, c))

            if tf.executing_eagerly():
                # A tape would record what happens inside, and keep every tensor of it. In a graph
                # nothing does, and vectorized_map, which forgets this gradient, finds its own.
                return compute(member, g, sizes, tf.stop_gradient(a), tf.stop_gradient(b)), gradient
            return compute(member, g, sizes, a, b), gradient

        return member_of(a, b)

    return call


def _has_tangents(*tensors) -> bool:
    """Whether a graph that is being traced for TensorFlow's forward mode differentiates these."""
    import tensorflow as tf

    if tf.executing_eagerly():
        return False
    try:
        from tensorflow.python.eager.forwardprop_util import pack_tangents
    except ImportError:
        return False  # not public
    return bool(pack_tangents(tensors).tangents)


def _torch(compute, plain):
    import torch

    class Compiled(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(which, a, b):
            return compute(which.member, which.g, which.sizes, a, b)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.which, a, b = inputs
            ctx.save_for_backward(a, b)
            ctx.save_for_forward(a, b)

        @staticmethod
        def backward(ctx, c):
            which, needed = ctx.which, ctx.needs_input_grad[1:]
            abc = (*ctx.saved_tensors, c)
            return None, *_gradients(call, which.member, which.g, which.sizes, abc, needed)

    class Eager(Compiled):
        @staticmethod
        def jvp(ctx, _, *tangents):
            return tangent(functools.partial(Eager.apply, ctx.which), ctx.saved_tensors, tangents)

    def call(member, g, sizes, a, b):
        # PyTorch's compiler takes no function with a ``jvp``, and derives one from ``compute``.
        function = Compiled if torch.compiler.is_compiling() else Eager
        return function.apply(Which(member, g, sizes), a, b)

    return call


def beyond_functions() -> bool:
    """Whether PyTorch would find, in silence, derivatives of zero for a function with derivatives
    of its own, so that its own operations alone are right: forward mode within forward mode."""
    import torch

    if torch.compiler.is_compiling():
        return False
    try:
        from torch._C._functorch import TransformType, get_interpreter_stack
    except ImportError:
        return False  # not public
    levels = get_interpreter_stack()
    return bool(levels) and [level.key() for level in levels].count(TransformType.Jvp) > 1


def traced() -> str | None:
    """Why PyTorch's tracer takes no operation of ours, or None where it does not trace."""
    if keras.config.backend() != "torch":
        return None
    import torch

    # The compiler does not look into what it is not.
    if torch.compiler.is_compiling() or not torch.jit.is_tracing():
        return None
    return (
        "torch.jit.trace and exporters that use it take PyTorch's operations only: "
        'use("reference"), or `involution export`'
    )


MECHANISMS = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}


def differentiable(compute, plain=None):
    """``compute(member, geometry, sizes, a, b)`` with the gradients of the table above.

    ``sizes`` are the spatial sizes of the involution's input: the one thing about it that the
    other tensors do not tell. ``plain`` is the same in operations that the framework differentiates
    itself, which TensorFlow's forward mode needs in graphs. None where the backend in use has no
    mechanism here.
    """
    mechanism = MECHANISMS.get(keras.config.backend())
    return mechanism(compute, plain) if mechanism else None
