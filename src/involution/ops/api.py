"""The operator: its contract, and the choice of an implementation."""

import contextlib
import dataclasses
import threading
from collections.abc import Sequence

import keras

from involution.ops import fused, native, reference, rows, taps, triton
from involution.ops.geometry import CHANNELS_LAST
from involution.ops.problem import (
    fits,
    make_generating_problem,
    make_problem,
    shape_of,
    standardize_data_format,
)
from involution.ops.tensor_utils import matmul

# In order of preference: the first that can run is taken. One with a ``reluctance(problem)`` says
# where the one after it is faster.
IMPLEMENTATIONS = (
    ("triton", triton),
    ("native", native),
    ("taps", taps),
    ("reference", reference),
)
# Taken where it is named, and nowhere else.
ROWS = ("rows", rows)
# Where kernels are generated, it comes before the others.
FUSED = ("fused", fused)


class _Forced(threading.local):
    """What ``use`` forces in this thread. No context variable: torch.compile cannot trace those."""

    names: tuple[str, ...] | None = None


_forced = _Forced()


def involution(
    x,
    kernel,
    kernel_size,
    strides=1,
    padding="same",
    dilation_rate=1,
    groups=1,
    group_layout="contiguous",
    data_format=None,
    implementation=None,
):
    """Applies to every position of ``x`` a kernel of its own, shared by the channels of a group.

    With the taps k of a window, the output position p and the group g(c) of channel c,

        y[b, p, c] = sum over k of
            kernel[b, p, k, g(c)] * x[b, p * strides - pad + k * dilation_rate, c]

    where ``x`` is 0 outside. Sums are made in float32, or float64 for float64. The result is exact
    in both gradients and differentiable in reverse mode to any order; JAX has no forward mode of
    ``native``, ``taps`` and ``fused``, and says so.

    Infinities and NaN follow IEEE arithmetic, in every implementation. A tap outside the input is a
    product with 0: where its kernel value is infinite or NaN, the output is NaN, and where the
    output's gradient is, so is the kernel's gradient at that tap. The gradient of ``x`` has no such
    terms. What is not finite reaches only the windows that hold it.

    Args:
        x: Tensor (B, *spatial, C), or (B, C, *spatial) for ``"channels_first"``, with one, two or
            three spatial dimensions; float64, float32, bfloat16 or float16.
        kernel: Tensor (B, *out_spatial, taps, groups), or (B, taps, groups, *out_spatial) for
            ``"channels_first"``, of the type of ``x``; taps is the product of ``kernel_size``,
            counted row-major.
        kernel_size: Integer, or one for each spatial dimension. Even and unequal sizes are fine.
        strides: Integer, or one for each spatial dimension.
        padding: ``"same"`` (as Keras places it: ceil(n / stride) positions), ``"valid"``,
            ``"symmetric"`` (floor((kernel_size - 1) * dilation_rate / 2) zeros on both sides, as in
            the paper's code), an integer, or a pair (before, after) for each spatial dimension.
        dilation_rate: Integer, or one for each spatial dimension.
        groups: Number of groups; divides C.
        group_layout: ``"contiguous"``: channel c belongs to group c // (C / groups), as in the
            paper; ``"interleaved"``: to group c % groups, as in the keras.io example.
        data_format: ``"channels_last"``, ``"channels_first"``, or None for Keras's setting.
        implementation: None for the best that can run here, a name, or a sequence of names to be
            tried in order. A single name runs that one or raises with its reason.

    Returns:
        Tensor (B, *out_spatial, C) or (B, C, *out_spatial), of the type of ``x``.

    Raises:
        ValueError: An argument is out of its range, or the shapes or types do not fit. It is raised
            before anything runs.

    Example:

    >>> import numpy as np, involution
    >>> x = np.ones((1, 4, 5, 6), "float32")
    >>> kernel = np.ones((1, 4, 5, 9, 2), "float32")
    >>> y = involution.ops.involution(x, kernel, kernel_size=3, groups=2)
    >>> tuple(y.shape), float(y[0, 0, 0, 0]), float(y[0, 1, 1, 0])
    ((1, 4, 5, 6), 4.0, 9.0)

    Source: Li et al., "Involution: Inverting the Inherence of Convolution for Visual Recognition",
    CVPR 2021, arXiv:2103.06255.
    """
    arguments = _arguments(
        kernel_size, strides, padding, dilation_rate, groups, group_layout, data_format
    )
    if isinstance(x, keras.KerasTensor) or isinstance(kernel, keras.KerasTensor):
        return InvolutionOperation(implementation, **arguments)(x, kernel)
    return _run(x, kernel, implementation, arguments)


def window_products(
    x,
    y,
    kernel_size,
    strides=1,
    padding="same",
    dilation_rate=1,
    groups=1,
    group_layout="contiguous",
    data_format=None,
    implementation=None,
):
    """Products of every position with the positions of its window, summed over a group's channels.

        products[b, p, k, g] = sum over channels c of group g of
            y[b, p, c] * x[b, p * strides - pad + k * dilation_rate, c]

    The windows are those of ``involution``, of which this is the gradient for the kernel: local
    attention's scores, as fast as that gradient, and differentiable like it. At a tap outside the
    input, where ``x`` is 0, the sum is 0, or NaN where a value of ``y`` in it is infinite or NaN.

    Args:
        x: Tensor (B, *spatial, C), or (B, C, *spatial) for ``"channels_first"``.
        y: Tensor (B, *out_spatial, C) or (B, C, *out_spatial), of the type of ``x``.
        kernel_size, strides, padding, dilation_rate: As for ``involution``.
        groups, group_layout, data_format, implementation: As for ``involution``.

    Returns:
        Tensor (B, *out_spatial, taps, groups) or (B, taps, groups, *out_spatial), of the type of
        ``x``, ready to be a kernel of ``involution``.

    Raises:
        ValueError: An argument is out of its range, or the shapes or types do not fit.

    Example:

    >>> import numpy as np, involution
    >>> x = np.ones((1, 4, 5, 6), "float32")
    >>> scores = involution.ops.window_products(x, x, kernel_size=3, groups=2)
    >>> tuple(scores.shape), float(scores[0, 0, 0, 0, 0]), float(scores[0, 0, 0, 4, 0])
    ((1, 4, 5, 9, 2), 0.0, 3.0)
    """
    arguments = _arguments(
        kernel_size, strides, padding, dilation_rate, groups, group_layout, data_format
    )
    if isinstance(x, keras.KerasTensor) or isinstance(y, keras.KerasTensor):
        return WindowProductsOperation(implementation, **arguments)(x, y)
    return _products(x, y, implementation, arguments)


def generate_and_apply(
    x,
    hidden,
    weight,
    bias,
    kernel_size,
    strides=1,
    padding="same",
    dilation_rate=1,
    groups=1,
    group_layout="contiguous",
    data_format=None,
    implementation=None,
):
    """``involution`` with the kernels hidden[b, p] . weight + bias, in one step where that can be.

    Kernels take taps * groups numbers at every place, which is often many times what the features
    take. ``fused``, the implementation that is preferred, makes them where they are used and stores
    none, in the gradients neither. Where it cannot run, they are made first and then applied.
    Infinities and NaN follow ``involution``'s rule: a kernel value at a tap outside the input is
    multiplied by 0, however it was made.

    Args:
        x: Tensor (B, *spatial, C), or (B, C, *spatial) for ``"channels_first"``.
        hidden: Tensor (B, *out_spatial, H) or (B, H, *out_spatial): what the kernels depend on.
        weight: Tensor (H, taps * groups), channels tap-major.
        bias: Tensor (taps * groups,).
        kernel_size, strides, padding, dilation_rate: As for ``involution``.
        groups, group_layout, data_format: As for ``involution``.
        implementation: As for ``involution``, and ``"fused"``; the other names make kernels first.

    Returns:
        Tensor (B, *out_spatial, C) or (B, C, *out_spatial), of the type of ``x``. Sums are made as
        in ``involution``; in one step kernels are not rounded to the type of ``x``.

    Raises:
        ValueError: An argument is out of its range, or the shapes or types do not fit.

    Example:

    >>> import numpy as np, involution
    >>> x, hidden = np.ones((1, 4, 5, 6), "float32"), np.ones((1, 4, 5, 2), "float32")
    >>> weight, bias = np.ones((2, 18), "float32"), np.ones(18, "float32")
    >>> y = involution.ops.generate_and_apply(x, hidden, weight, bias, kernel_size=3, groups=2)
    >>> float(y[0, 0, 0, 0]), float(y[0, 1, 1, 0])
    (12.0, 27.0)
    """
    arguments = _arguments(
        kernel_size, strides, padding, dilation_rate, groups, group_layout, data_format
    )
    if any(isinstance(t, keras.KerasTensor) for t in (x, hidden, weight, bias)):
        operation = GenerateAndApplyOperation(implementation, **arguments)
        return operation(x, hidden, weight, bias)
    return _generate_and_run(x, hidden, weight, bias, implementation, arguments)


def _arguments(
    kernel_size, strides, padding, dilation_rate, groups, group_layout, data_format
) -> dict:
    return {
        "kernel_size": kernel_size,
        "strides": strides,
        "padding": padding,
        "dilation_rate": dilation_rate,
        "groups": groups,
        "group_layout": group_layout,
        # A model keeps the format that it was made with, whatever Keras's setting becomes.
        "data_format": standardize_data_format(data_format),
    }


class _Node(keras.Operation):
    """A node of a functional Keras model, with a function's arguments by name."""

    def __init__(self, implementation=None, name=None, **arguments):
        super().__init__(name=name)
        self.implementation = implementation
        self.arguments = arguments

    def _spec(self, problem):
        _choose(problem, self.implementation)
        return keras.KerasTensor(problem.output_shape, dtype=problem.dtype)

    def get_config(self):
        return {"name": self.name, "implementation": self.implementation, **self.arguments}


@keras.saving.register_keras_serializable(package="involution")
class InvolutionOperation(_Node):
    """``involution`` as a node."""

    def call(self, x, kernel):
        return _run(x, kernel, self.implementation, self.arguments)

    def compute_output_spec(self, x, kernel):
        return self._spec(make_problem(x, kernel, **self.arguments))


@keras.saving.register_keras_serializable(package="involution")
class WindowProductsOperation(_Node):
    """``window_products`` as a node."""

    def call(self, x, y):
        return _products(x, y, self.implementation, self.arguments)

    def compute_output_spec(self, x, y):
        problem = _products_problem(x, y, self.arguments)
        _choose(problem, self.implementation)
        return keras.KerasTensor(problem.kernel_shape, dtype=problem.dtype)


@keras.saving.register_keras_serializable(package="involution")
class GenerateAndApplyOperation(_Node):
    """``generate_and_apply`` as a node."""

    def call(self, x, hidden, weight, bias):
        return _generate_and_run(x, hidden, weight, bias, self.implementation, self.arguments)

    def compute_output_spec(self, x, hidden, weight, bias):
        return self._spec(make_generating_problem(x, hidden, weight, bias, **self.arguments))


def implementations(x, kernel, kernel_size, hidden=None, **arguments):
    """Which implementations can compute a call, in order of preference.

    Args:
        x, kernel, kernel_size: As for ``involution``; tensors, or ``keras.KerasTensor`` for their
            shapes and types alone. ``kernel`` may be None, for the one that fits.
        hidden: How many hidden channels ``generate_and_apply`` is given; None for ``involution``.
        **arguments: The other arguments of ``involution``, without ``implementation``.

    Returns:
        List of (name, reason): the reason why it cannot run, or None where it can. The first one
        that can is what is taken.

    Example:

    >>> import keras, involution
    >>> x, kernel = keras.KerasTensor((None, 8, 8, 6)), keras.KerasTensor((None, 8, 8, 9, 1))
    >>> [name for name, reason in involution.ops.implementations(x, kernel, 3)]
    ['triton', 'native', 'taps', 'reference']
    """
    problem = make_problem(x, kernel, kernel_size, **arguments)
    problem = dataclasses.replace(problem, hidden=hidden)
    modules = _modules()
    return [(name, modules[name].refusal(problem)) for name in _preference(problem)]


@contextlib.contextmanager
def use(implementation):
    """Within the block every involution takes this implementation, whatever its own argument says.

    It is chosen when Python code runs. A program that was traced before, by ``jax.jit``,
    ``tf.function`` or ``torch.compile``, keeps what it was traced with, and one that is traced
    within the block keeps that outside: trace anew, as with a new function.

    Args:
        implementation: As for ``involution``: a name, or a sequence of names tried in order.

    Example:

    >>> import numpy as np, involution
    >>> with involution.ops.use("reference"):
    ...     y = involution.ops.involution(np.ones((1, 4, 6)), np.ones((1, 4, 3, 1)), 3)
    """
    before, _forced.names = _forced.names, implementation_names(implementation)
    try:
        yield
    finally:
        _forced.names = before


def _run(x, kernel, implementation, arguments):
    x, kernel = _tensor(x), _tensor(kernel)
    problem = make_problem(x, kernel, **arguments)
    kernel = _sized(kernel, x, problem, problem.geometry.taps, problem.geometry.groups)
    return _choose(problem, implementation).apply(x, kernel, problem)


def _products(x, y, implementation, arguments):
    x, y = _tensor(x), _tensor(y)
    problem = _products_problem(x, y, arguments)
    y = _sized(y, x, problem, problem.x_shape[problem.geometry.channel_axis])
    return _choose(problem, implementation).products(x, y, problem)


def _products_problem(x, y, arguments):
    problem = make_problem(x, None, **arguments)
    if not fits(problem.output_shape, shape_of("y", y)) or y.dtype != x.dtype:
        raise ValueError(
            f"`y` must have the shape of the output, {problem.output_shape}, and the type of `x`, "
            f"{problem.dtype}. Received: y.shape={tuple(y.shape)}, y.dtype={y.dtype}"
        )
    return problem


def _generate_and_run(x, hidden, weight, bias, implementation, arguments):
    x, hidden, weight, bias = (_tensor(t) for t in (x, hidden, weight, bias))
    problem = make_generating_problem(x, hidden, weight, bias, **arguments)
    hidden = _sized(hidden, x, problem, problem.hidden)
    module = _choose(problem, implementation)
    if module is FUSED[1]:
        return module.apply(x, (hidden, weight, bias), problem)
    g = problem.geometry
    last = g.data_format == CHANNELS_LAST
    kernel = matmul(hidden if last else keras.ops.moveaxis(hidden, 1, -1), weight) + bias
    shape = keras.ops.shape(hidden)
    kernel = kernel if last else keras.ops.moveaxis(kernel, -1, 1)
    kernel = keras.ops.reshape(kernel, g.shape(shape[0], g.spatial(shape), g.taps, g.groups))
    return module.apply(x, kernel, problem)


def chosen(x, hidden=None, implementation=None, **arguments) -> str:
    """The name that ``involution`` takes for an input, or ``generate_and_apply`` with so many
    hidden channels. ``x`` may be a ``keras.KerasTensor``."""
    problem = dataclasses.replace(make_problem(x, None, **arguments), hidden=hidden)
    return _chosen(problem, implementation)


def _sized(tensor, x, problem, *channels):
    """``tensor``, which has the output's sizes, where only the running program knows them: another
    size would be broadcast in silence."""
    if None not in problem.output_shape:
        return tensor
    g = problem.geometry
    shape = keras.ops.shape(x)
    return keras.ops.reshape(tensor, g.shape(shape[0], g.output_sizes(g.spatial(shape)), *channels))


def _tensor(value):
    """Tensors stay as they are, on the device they are on."""
    return value if keras.ops.is_tensor(value) else keras.ops.convert_to_tensor(value)


def implementation_names(implementation) -> tuple[str, ...]:
    """The names to be tried in order; ValueError unless all are known."""
    known = list(_modules())
    names = (implementation,) if isinstance(implementation, str) else implementation
    if not isinstance(names, Sequence) or not names or any(name not in known for name in names):
        raise ValueError(
            f"`implementation` must be one of {known}, or a sequence of them. "
            f"Received: implementation={implementation!r}"
        )
    return tuple(names)


def _modules() -> dict:
    return dict((*IMPLEMENTATIONS, ROWS, FUSED))


def _preference(problem) -> list[str]:
    """All names, the fastest first."""
    names = [name for name, _ in IMPLEMENTATIONS]
    for i, (_, module) in enumerate(IMPLEMENTATIONS[:-1]):
        reluctance = getattr(module, "reluctance", None)
        if reluctance is not None and reluctance(problem) is not None:
            names[i], names[i + 1] = names[i + 1], names[i]
    if problem.hidden is None:
        return names
    name = FUSED[0]
    return [name, *names] if fused.reluctance(problem) is None else [*names, name]


def _choose(problem, implementation=None):
    return _modules()[_chosen(problem, implementation)]


def _chosen(problem, implementation) -> str:
    modules = _modules()
    names = _forced.names or (
        _preference(problem) if implementation is None else implementation_names(implementation)
    )
    reasons = {}
    for name in names:
        reasons[name] = modules[name].refusal(problem)
        if reasons[name] is None:
            return name
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ValueError(f"No implementation named can run here ({why}). Received: {problem}")
