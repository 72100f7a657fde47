"""The passes with derivatives in JAX."""

import functools

import jax

from involution.ops.autodiff import FORWARD, fused, gradients


def differentiable(compute):
    """``compute(pass_, window, sizes, a, b)`` with the derivatives of ``VJP_RULES``.

    ``sizes`` are the spatial sizes of the operator's input, which the other tensors do not
    determine.
    """
    call = jax.custom_vjp(compute, nondiff_argnums=(0, 1, 2))

    def forward(pass_, window, sizes, a, b):
        return call(pass_, window, sizes, a, b), (a, b)

    def backward(pass_, window, sizes, ab, c):
        return gradients(call, pass_, window, sizes, (*ab, c))

    call.defvjp(forward, backward)
    return call


def differentiable_fused(compute, unfused_call):
    """``compute(pass_, window, sizes, *arguments)`` with the derivatives of ``fused``.

    ``unfused_call`` computes the passes with stored kernels: a result of ``differentiable``.
    """
    unfused = functools.partial(fused.unfused, unfused_call)
    call = jax.custom_vjp(compute, nondiff_argnums=(0, 1, 2))

    def forward(pass_, window, sizes, *arguments):
        return call(pass_, window, sizes, *arguments), arguments

    def backward(pass_, window, sizes, arguments, cotangents):
        if pass_ == FORWARD:
            return fused.output_gradients(call, window, sizes, arguments, cotangents[0])
        _, pullback = jax.vjp(functools.partial(unfused, pass_, window, sizes), *arguments)
        return pullback(cotangents)

    call.defvjp(forward, backward)
    return call
