"""Calls of the operator with a window: checked, and computed by the implementation selected."""

from involution.ops.dispatch import Selection, select
from involution.ops.frameworks import namespace
from involution.ops.problem import check_generator, check_kernel, check_output, problem_of
from involution.ops.transposed import TransposedWindow
from involution.ops.validation import CHANNELS_LAST, static_shape
from involution.ops.window import Window


def involution(window: Window, implementation, x, kernel):
    """``involution.ops.involution`` of tensors."""
    problem = problem_of(window, x)
    check_kernel(problem, kernel)
    return apply_kernels(select(problem, implementation), x, kernel)


def window_products(window: Window, implementation, x, y):
    """``involution.ops.window_products`` of tensors."""
    problem = problem_of(window, x)
    check_output(problem, y)
    return apply_window_products(select(problem, implementation), x, y)


def fused_involution(window: Window, implementation, x, hidden, weight, bias):
    """``involution.ops.fused_involution`` of tensors."""
    problem = problem_of(window, x, hidden_channels_of(weight))
    check_generator(problem, hidden, weight, bias)
    return apply_generated(select(problem, implementation), x, hidden, weight, bias)


def transposed_involution(transposed: TransposedWindow, implementation, x, kernel):
    """``involution.ops.transposed_involution`` of tensors."""
    problem = transposed.problem_of(x)
    check_kernel(problem, kernel)
    window, shape = problem.window, namespace(x).shape(x)
    if None in problem.output_shape:
        kernel = namespace(x).reshape(
            kernel, window.shape(shape[0], window.spatial(shape), window.taps, window.groups)
        )
    sizes = transposed.output_sizes(window.spatial(shape))
    return select(problem, implementation).implementation.input_grad(kernel, x, sizes, problem)


def apply_kernels(selection: Selection, x, kernel):
    """``involution`` of checked operands, with the implementation selected."""
    problem = selection.problem
    if not selection.checks_shapes:
        kernel = _with_static_shape(kernel, x, problem, problem.window.taps, problem.window.groups)
    return selection.implementation.apply(x, kernel, problem)


def apply_window_products(selection: Selection, x, y):
    """``window_products`` of checked operands, with the implementation selected."""
    problem = selection.problem
    y = _with_static_shape(y, x, problem, problem.x_shape[problem.window.channel_axis])
    return selection.implementation.kernel_grad(x, y, problem)


def apply_generated(selection: Selection, x, hidden, weight, bias):
    """``fused_involution`` of checked operands, with the implementation selected."""
    problem, window = selection.problem, selection.problem.window
    if not selection.checks_shapes:
        hidden = _with_static_shape(hidden, x, problem, problem.hidden_channels)
    if selection.generates:
        return selection.implementation.apply_generated(x, hidden, weight, bias, problem)
    ops, last = namespace(x), window.data_format == CHANNELS_LAST
    kernel = ops.matmul(hidden if last else ops.moveaxis(hidden, 1, -1), weight) + bias
    shape = ops.shape(hidden)
    kernel = kernel if last else ops.moveaxis(kernel, -1, 1)
    shape = window.shape(shape[0], window.spatial(shape), window.taps, window.groups)
    return selection.implementation.apply(x, ops.reshape(kernel, shape), problem)


def rank_of(x) -> int:
    """Number of spatial dimensions of ``x``, or ValueError."""
    shape = static_shape("x", x)
    if len(shape) not in (3, 4, 5):
        raise ValueError(
            "`x` must have a batch axis, a channel axis and one, two or three spatial axes. "
            f"Received: x.shape={shape}"
        )
    return len(shape) - 2


def hidden_channels_of(weight) -> int:
    """Number of hidden channels of a generator's weight, or ValueError."""
    shape = static_shape("weight", weight)
    if len(shape) != 2 or not shape[0]:
        raise ValueError(
            "`weight` must have the shape (hidden channels, taps * groups), with at least one "
            f"hidden channel. Received: weight.shape={shape}"
        )
    return shape[0]


def _with_static_shape(tensor, x, problem, *channels):
    """``tensor`` reshaped to the output's sizes if they are known at run time only, because any
    other size would broadcast without an error."""
    if None not in problem.output_shape:
        return tensor
    ops, window = namespace(x), problem.window
    shape = ops.shape(x)
    sizes = window.output_sizes(window.spatial(shape))
    return ops.reshape(tensor, window.shape(shape[0], sizes, *channels))
