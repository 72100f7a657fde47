"""Derivatives of any order of involution with kernels that are generated where they are used.

With the kernels bias + hidden * weight it has a family of its own, of which each member has four
arguments and two results, the second empty but for the kernel's gradient:

    output(x, hidden, weight, bias) -> y
    input(hidden, weight, bias, dy) -> dx
    kernel(x, hidden, weight, dy) -> dhidden, dweights

``dweights`` are each sample's own, the weight's and below it the bias's. The output's derivative is
given by the other two. Theirs, which few ask for, are those of the same in two steps, ``plain``.
"""

import functools

import keras
from keras import ops

from involution.ops.gradients import INPUT, KERNEL, OUTPUT
from involution.ops.native_call import wide_type
from involution.ops.views import matmul


def plain(call, member, g, sizes, *arguments):
    """A member by the family of ``gradients.py``, whose ``call`` this takes: kernels are stored."""
    if member == OUTPUT:
        x, hidden, weight, bias = arguments
        return call(OUTPUT, g, sizes, x, _kernel(g, hidden, weight, bias)), _nothing(x)
    if member == INPUT:
        hidden, weight, bias, dy = arguments
        return call(INPUT, g, sizes, _kernel(g, hidden, weight, bias), dy), _nothing(dy)
    x, hidden, weight, dy = arguments
    dkernel = call(KERNEL, g, sizes, x, dy)
    # One row for each position.
    shape = ops.shape(hidden)
    dkernel = ops.reshape(dkernel, (shape[0], -1, g.taps * g.groups))
    dhidden = ops.reshape(matmul(dkernel, ops.transpose(weight)), shape)
    wide = wide_type(x.dtype)
    dkernel, rows = (
        ops.cast(t, wide) for t in (dkernel, ops.reshape(hidden, (shape[0], -1, shape[-1])))
    )
    dweight = matmul(ops.swapaxes(rows, 1, 2), dkernel)
    return dhidden, ops.concatenate([dweight, ops.sum(dkernel, axis=1, keepdims=True)], axis=1)


def _kernel(g, hidden, weight, bias):
    kernel = matmul(hidden, weight) + bias
    return ops.reshape(kernel, (*ops.shape(hidden)[:-1], g.taps, g.groups))


def _nothing(like):
    return ops.zeros((0,), dtype=wide_type(like.dtype))


def output_gradients(call, g, sizes, arguments, dy):
    """Those of x, hidden, weight and bias, by the ``call`` of a member of this family."""
    x, hidden, weight, bias = arguments
    dx, _ = call(INPUT, g, sizes, hidden, weight, bias, dy)
    dhidden, dweights = call(KERNEL, g, sizes, x, hidden, weight, dy)
    dweights = ops.cast(_total(dweights), weight.dtype)
    return dx, dhidden, dweights[:-1], dweights[-1]


def _total(tensor):
    """The sum over the samples, as a product of matrices: XLA's sums over a first axis are up to
    forty times slower on CPUs."""
    shape = ops.shape(tensor)
    rows = ops.reshape(tensor, (shape[0], shape[1] * shape[2]))
    total = matmul(ops.ones((1, shape[0]), tensor.dtype), rows)
    return ops.reshape(total, shape[1:])


def _jax(compute, two_steps):
    import jax

    call = jax.custom_vjp(compute, nondiff_argnums=(0, 1, 2))

    def forward(member, g, sizes, *arguments):
        return call(member, g, sizes, *arguments), arguments

    def backward(member, g, sizes, arguments, cotangents):
        if member == OUTPUT:
            return output_gradients(call, g, sizes, arguments, cotangents[0])
        _, gradients = jax.vjp(functools.partial(two_steps, member, g, sizes), *arguments)
        return gradients(cotangents)

    call.defvjp(forward, backward)
    return call


def _tensorflow(compute, two_steps):
    import tensorflow as tf

    def call(member, g, sizes, *arguments):
        @tf.custom_gradient
        def member_of(*arguments):
            def gradient(*cotangents):
                if member == OUTPUT:
                    return output_gradients(call, g, sizes, arguments, cotangents[0])
                with tf.GradientTape() as tape:
                    tape.watch(arguments)
                    results = two_steps(member, g, sizes, *arguments)
                return tape.gradient(results, arguments, output_gradients=cotangents)

            inside = arguments
            if tf.executing_eagerly():
                # A tape would record what happens inside, and keep every tensor of it.
                inside = tuple(tf.stop_gradient(a) for a in arguments)
            return compute(member, g, sizes, *inside), gradient

        # A variable is read here: in the gradient it may have changed.
        return member_of(*(tf.convert_to_tensor(a) for a in arguments))

    return call


def _torch(compute, two_steps):
    import torch

    class Member(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(member, g, sizes, *arguments):
            return compute(member, g, sizes, *arguments)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.member, ctx.g, ctx.sizes, *arguments = inputs
            ctx.save_for_backward(*arguments)

        @staticmethod
        def backward(ctx, *cotangents):
            arguments = ctx.saved_tensors
            if ctx.member == OUTPUT:
                gradients = output_gradients(
                    Member.apply, ctx.g, ctx.sizes, arguments, cotangents[0]
                )
            else:
                again = functools.partial(two_steps, ctx.member, ctx.g, ctx.sizes)
                gradients = torch.func.vjp(again, *arguments)[1](cotangents)
            return None, None, None, *gradients

    return Member.apply


MECHANISMS = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}


def differentiable(compute, call):
    """``compute(member, geometry, sizes, *arguments)`` with the gradients above; ``call`` is that
    of the family in ``gradients.py``, on the same backend."""
    mechanism = MECHANISMS.get(keras.config.backend())
    return mechanism(compute, functools.partial(plain, call)) if mechanism else None
