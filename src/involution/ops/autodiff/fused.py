"""Registers derivatives of any order of fused involution, whose kernels are never stored.

With the kernels hidden @ weight + bias, each pass has four arguments and two results. The second
result is empty except in the kernel gradient:

    forward(x, hidden, weight, bias) -> y
    input_grad(hidden, weight, bias, dy) -> dx
    kernel_grad(x, hidden, weight, dy) -> dhidden, dweights

``dweights`` has, for each sample, the gradient of the weight and, as its last row, that of the
bias. The derivative of the forward pass is given by the other two passes. The derivatives of those
two are rarely needed, and are computed by ``unfused``, which stores the kernels.
"""

from involution.ops.autodiff import FORWARD, INPUT_GRAD, KERNEL_GRAD, sum_of
from involution.ops.frameworks import namespace
from involution.ops.native.params import accumulation_dtype


def unfused(call, pass_, window, sizes, *arguments):
    """A fused pass with stored kernels; ``call`` computes the passes of ``autodiff``."""
    if pass_ == FORWARD:
        x, hidden, weight, bias = arguments
        return call(FORWARD, window, sizes, x, _kernel(window, hidden, weight, bias)), _empty(x)
    if pass_ == INPUT_GRAD:
        hidden, weight, bias, dy = arguments
        return call(INPUT_GRAD, window, sizes, _kernel(window, hidden, weight, bias), dy), _empty(
            dy
        )
    x, hidden, weight, dy = arguments
    ops = namespace(x)
    dkernel = call(KERNEL_GRAD, window, sizes, x, dy)
    shape = ops.shape(hidden)
    dkernel = ops.reshape(dkernel, (shape[0], -1, window.taps * window.groups))
    dhidden = ops.reshape(ops.matmul(dkernel, ops.swapaxes(weight, 0, 1)), shape)
    dtype = accumulation_dtype(x.dtype)
    dkernel, rows = (
        ops.cast(t, dtype) for t in (dkernel, ops.reshape(hidden, (shape[0], -1, shape[-1])))
    )
    dweight = ops.matmul(ops.swapaxes(rows, 1, 2), dkernel)
    return dhidden, ops.concatenate([dweight, ops.sum(dkernel, axis=1, keepdims=True)], axis=1)


def _kernel(window, hidden, weight, bias):
    ops = namespace(hidden)
    kernel = ops.matmul(hidden, weight) + bias
    return ops.reshape(kernel, (*ops.shape(hidden)[:-1], window.taps, window.groups))


def _empty(like):
    ops = namespace(like)
    empty = ops.zeros_like(ops.reshape(like, (-1,))[:0])
    return ops.cast(empty, accumulation_dtype(like.dtype))


def output_gradients(call, window, sizes, arguments, dy, needs_grad=(True,) * 4):
    """Gradients of the forward pass with respect to x, hidden, weight and bias, computed with
    ``call`` for the fused passes. None if not needed; the last three are computed together."""
    x, hidden, weight, bias = arguments
    dx = dhidden = dweight = dbias = None
    if needs_grad[0]:
        dx, _ = call(INPUT_GRAD, window, sizes, hidden, weight, bias, dy)
    if any(needs_grad[1:]):
        dhidden, dweights = call(KERNEL_GRAD, window, sizes, x, hidden, weight, dy)
        dweights = namespace(dy).cast(_sum_over_batch(dweights), weight.dtype)
        dweight, dbias = dweights[:-1], dweights[-1]
    return dx, dhidden, dweight, dbias


def input_gradients(call, window, sizes, arguments, c):
    """Gradients of the input gradient with respect to hidden, weight, bias and dy, given its
    cotangent ``c``."""
    hidden, weight, bias, dy = arguments
    dhidden, dweights = call(KERNEL_GRAD, window, sizes, c, hidden, weight, dy)
    dweights = namespace(dy).cast(_sum_over_batch(dweights), weight.dtype)
    return (
        dhidden,
        dweights[:-1],
        dweights[-1],
        call(FORWARD, window, sizes, c, hidden, weight, bias)[0],
    )


def kernel_gradients(call, window, sizes, arguments, cotangents):
    """Gradients of the kernel gradient with respect to x, hidden, weight and dy, computed with
    ``call`` for the passes of ``autodiff``: its cotangent defines new kernels for each sample,
    which are stored."""
    x, hidden, weight, dy = arguments
    c_hidden, c_weights = cotangents
    ops = namespace(x)
    dkernel = call(KERNEL_GRAD, window, sizes, x, dy)
    shape, dtype = ops.shape(hidden), c_weights.dtype

    def rows(tensor, last):
        return ops.cast(ops.reshape(tensor, (shape[0], -1, last)), dtype)

    c_rows, hidden_rows = rows(c_hidden, hidden.shape[-1]), rows(hidden, hidden.shape[-1])
    c_kernel = ops.matmul(c_rows, ops.cast(weight, dtype))
    kernel = c_kernel + ops.matmul(hidden_rows, c_weights[:, :-1]) + c_weights[:, -1:]
    kernel = ops.cast(ops.reshape(kernel, ops.shape(dkernel)), x.dtype)
    dkernel = rows(dkernel, weight.shape[-1])
    dhidden = ops.matmul(dkernel, ops.swapaxes(c_weights[:, :-1], 1, 2))
    dweight = _sum_over_batch(ops.matmul(ops.swapaxes(c_rows, 1, 2), dkernel))
    return (
        call(INPUT_GRAD, window, sizes, kernel, dy),
        ops.cast(ops.reshape(dhidden, shape), hidden.dtype),
        ops.cast(dweight, weight.dtype),
        call(FORWARD, window, sizes, x, kernel),
    )


def output_tangent(call, arguments, tangents):
    """Tangents of the results of ``call``, the forward pass; None is a tangent of zero."""
    x, hidden, weight, bias = arguments
    t_x, t_hidden, t_weight, t_bias = tangents
    ops = namespace(x)
    zero = ops.zeros_like(bias)
    terms = []
    if t_x is not None:
        terms.append((t_x, hidden, weight, bias))
    if t_weight is not None:
        # The tangent of the bias is added in one term only.
        terms.append((x, hidden, t_weight, zero if t_bias is None else t_bias))
        t_bias = None
    if t_hidden is not None:
        terms.append((x, t_hidden, weight, zero if t_bias is None else t_bias))
    elif t_bias is not None:
        terms.append((x, ops.zeros_like(hidden), weight, t_bias))
    return sum_of(call(*term)[0] for term in terms), _empty(x)


def _sum_over_batch(tensor):
    """The sum over the batch axis as a matrix product: on CPUs, XLA's reduction over the first axis
    is up to 40 times slower."""
    ops = namespace(tensor)
    shape = ops.shape(tensor)
    rows = ops.reshape(tensor, (shape[0], shape[1] * shape[2]))
    ones = ops.swapaxes(ops.ones_like(rows[:, :1]), 0, 1)
    total = ops.matmul(ones, rows)
    return ops.reshape(total, shape[1:])
