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

from involution.ops.autodiff import INPUT, KERNEL, OUTPUT, Which, sum_of
from involution.ops.native.params import wide_type
from involution.ops.tensor_utils import matmul


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


def output_gradients(call, g, sizes, arguments, dy, needed=(True,) * 4):
    """Those of x, hidden, weight and bias, by the ``call`` of a member of this family; None where
    neither it nor, of the last three, another is needed."""
    x, hidden, weight, bias = arguments
    dx = dhidden = dweight = dbias = None
    if needed[0]:
        dx, _ = call(INPUT, g, sizes, hidden, weight, bias, dy)
    if any(needed[1:]):
        dhidden, dweights = call(KERNEL, g, sizes, x, hidden, weight, dy)
        dweights = ops.cast(_total(dweights), weight.dtype)
        dweight, dbias = dweights[:-1], dweights[-1]
    return dx, dhidden, dweight, dbias


def input_gradients(call, g, sizes, arguments, c):
    """Those of hidden, weight, bias and dy, of the input's gradient, whose cotangent is ``c``."""
    hidden, weight, bias, dy = arguments
    dhidden, dweights = call(KERNEL, g, sizes, c, hidden, weight, dy)
    dweights = ops.cast(_total(dweights), weight.dtype)
    return dhidden, dweights[:-1], dweights[-1], call(OUTPUT, g, sizes, c, hidden, weight, bias)[0]


def kernel_gradients(call, g, sizes, arguments, cotangents):
    """Those of x, hidden, weight and dy, of the kernel's gradient, by the ``call`` of the family of
    ``gradients.py``: its cotangent takes other kernels for every sample, which are stored."""
    x, hidden, weight, dy = arguments
    c_hidden, c_weights = cotangents
    product = call(KERNEL, g, sizes, x, dy)
    shape, dtype = ops.shape(hidden), c_weights.dtype

    def rows(tensor, last):
        return ops.cast(ops.reshape(tensor, (shape[0], -1, last)), dtype)

    c_rows, own = rows(c_hidden, hidden.shape[-1]), rows(hidden, hidden.shape[-1])
    wide = ops.cast(weight, dtype)
    kernel = matmul(c_rows, wide) + matmul(own, c_weights[:, :-1]) + c_weights[:, -1:]
    kernel = ops.cast(ops.reshape(kernel, ops.shape(product)), x.dtype)
    product = rows(product, weight.shape[-1])
    dhidden = matmul(product, ops.swapaxes(c_weights[:, :-1], 1, 2))
    dweight = _total(matmul(ops.swapaxes(c_rows, 1, 2), product))
    return (
        call(INPUT, g, sizes, kernel, dy),
        ops.cast(ops.reshape(dhidden, shape), hidden.dtype),
        ops.cast(dweight, weight.dtype),
        call(OUTPUT, g, sizes, x, kernel),
    )


def output_tangent(call, arguments, tangents):
    """The output's, and nothing, by the ``call`` of that member; None is a tangent of zero."""
    x, hidden, weight, bias = arguments
    along_x, along_hidden, along_weight, along_bias = tangents
    zero = ops.zeros_like(bias)
    terms = []
    if along_x is not None:
        terms.append((along_x, hidden, weight, bias))
    if along_weight is not None:
        # What hidden does not scale stands here or in the next.
        terms.append((x, hidden, along_weight, zero if along_bias is None else along_bias))
        along_bias = None
    if along_hidden is not None:
        terms.append((x, along_hidden, weight, zero if along_bias is None else along_bias))
    elif along_bias is not None:
        terms.append((x, ops.zeros_like(hidden), weight, along_bias))
    return sum_of(call(*term)[0] for term in terms), _nothing(x)


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


def _torch(compute, two_steps):
    import torch

    class Member(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(which, *arguments):
            return compute(which.member, which.g, which.sizes, *arguments)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.which, *arguments = inputs
            ctx.save_for_backward(*arguments)
            ctx.save_for_forward(*arguments)

        @staticmethod
        def backward(ctx, *cotangents):
            which, arguments = ctx.which, ctx.saved_tensors
            if which.member == OUTPUT:
                return None, *output_gradients(call, which.g, which.sizes, arguments, cotangents[0])
            return None, *torch.func.vjp(again(which), *arguments)[1](cotangents)

        @staticmethod
        def jvp(ctx, _, *tangents):
            which, arguments = ctx.which, ctx.saved_tensors
            if which.member == OUTPUT:
                of = functools.partial(Member.apply, which)
                return output_tangent(of, arguments, tangents)
            along = tuple(
                torch.zeros_like(a) if t is None else t
                for a, t in zip(arguments, tangents, strict=True)
            )
            return torch.func.jvp(again(which), arguments, along)[1]

    def again(which):
        return functools.partial(two_steps, which.member, which.g, which.sizes)

    def call(member, g, sizes, *arguments):
        return Member.apply(Which(member, g, sizes), *arguments)

    return call


MECHANISMS = {"jax": _jax, "torch": _torch}


def differentiable(compute, call):
    """``compute(member, geometry, sizes, *arguments)`` with the gradients above; ``call`` is that
    of the family in ``gradients.py``, on the same backend."""
    mechanism = MECHANISMS.get(keras.config.backend())
    return mechanism(compute, functools.partial(plain, call)) if mechanism else None
