"""One validated call of the operator, as implementations receive it."""

import dataclasses
import functools
import sys
from typing import Any

from involution.ops.frameworks import dtype_name, framework_of, is_exporting
from involution.ops.validation import is_shape_compatible, static_shape
from involution.ops.window import Window

DTYPES = ("float64", "float32", "bfloat16", "float16")
# Maximum number of cached problems: a network has tens, at a few input sizes.
CACHE_SIZE = 1024


@dataclasses.dataclass(frozen=True)
class Problem:
    """A window with the shape, dtype and device of its input.

    Attributes:
        window: The window, its steps clamped to the input's sizes.
        x_shape: Shape of the input; None for each unknown size, here and below.
        dtype: Dtype of all tensors.
        framework: Framework of the tensors, "tensorflow", "jax" or "torch"; or another backend of
            Keras.
        device: Device type, such as "cpu" or "cuda"; None if the tensor has no device.
        hidden_channels: Channels from which kernels are generated; None if kernels are given.
        output_shape: Shape of the output.
        kernel_shape: Shape of the kernel tensor.
    """

    window: Window
    x_shape: tuple[int | None, ...]
    dtype: str
    framework: str
    device: str | None
    hidden_channels: int | None
    output_shape: tuple[int | None, ...]
    kernel_shape: tuple[int | None, ...]


def _is_compiling() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_compiling()


def cached(function):
    """Caches the results of ``function(window, shape, *others)`` for shapes of known sizes.

    PyTorch's compiler traces through caches with a warning, and symbolic sizes have no hash.
    """
    cache = functools.lru_cache(CACHE_SIZE)(function)

    @functools.wraps(function)
    def call(window, shape, *others):
        if _is_compiling() or not all(n is None or type(n) is int for n in shape):
            return function(window, shape, *others)
        return cache(window, shape, *others)

    return call


def problem_of(window: Window, x, hidden_channels: int | None = None) -> Problem:
    """The checked problem of one call. Raises ValueError with the rule and the value received."""
    return make_problem(window, static_shape("x", x), *description_of(x), hidden_channels)


def description_of(x) -> tuple[str, str, str | None]:
    """Dtype, framework and device type of a tensor."""
    framework = framework_of(x)
    if framework is None:
        import keras

        framework = keras.config.backend()
    return dtype_name(x.dtype), framework, getattr(getattr(x, "device", None), "type", None)


@cached
def make_problem(window, x_shape, dtype, framework, device=None, hidden_channels=None) -> Problem:
    """As ``problem_of``, from the shape, dtype, framework and device of the input."""
    if len(x_shape) != window.rank + 2:
        raise ValueError(
            f"`x` must have a batch axis, a channel axis and {window.rank} spatial axes. "
            f"Received: x.shape={x_shape}"
        )
    if dtype not in DTYPES:
        raise ValueError(
            f"`x` must have one of the dtypes {', '.join(DTYPES)}. Received: x.dtype={dtype}"
        )
    channels = x_shape[window.channel_axis]
    if channels is None or channels == 0 or channels % window.groups:
        raise ValueError(
            "The number of channels must be known, not 0, and divisible by `groups`. "
            f"Received: groups={window.groups}, x.shape={x_shape}"
        )
    sizes = output_sizes(window, x_shape)
    return Problem(
        window if is_exporting() else window.clamp_steps(window.spatial(x_shape)),
        x_shape,
        dtype,
        framework,
        device,
        hidden_channels,
        window.shape(x_shape[0], sizes, channels),
        window.shape(x_shape[0], sizes, window.taps, window.groups),
    )


def check_operand(problem: Problem, name: str, tensor: Any, shape, description: str):
    """ValueError unless ``tensor`` has this shape and the problem's dtype."""
    received = static_shape(name, tensor)
    if not is_shape_compatible(shape, received):
        raise ValueError(
            f"`{name}` must have the shape {shape}: {description}. "
            f"Received: {name}.shape={received}"
        )
    dtype = dtype_name(tensor.dtype)
    if dtype != problem.dtype:
        raise ValueError(
            f"`{name}` must have the dtype of `x`, {problem.dtype}. Received: {name}.dtype={dtype}"
        )


def check_kernel(problem: Problem, kernel):
    """ValueError unless ``kernel`` has the problem's kernel shape and dtype."""
    shape = problem.kernel_shape
    check_operand(
        problem,
        "kernel",
        kernel,
        shape,
        "batch, spatial sizes of the output, taps and groups, ordered by `data_format`",
    )


def check_output(problem: Problem, y):
    """ValueError unless ``y`` has the shape and dtype of the problem's output."""
    check_operand(problem, "y", y, problem.output_shape, "that of the output")


def check_generator(problem: Problem, hidden, weight, bias):
    """ValueError unless the generator's operands have the problem's shapes and dtype."""
    window, count = problem.window, problem.hidden_channels
    kernels = window.taps * window.groups
    sizes = window.spatial(problem.output_shape)
    batch = problem.output_shape[0]
    for name, tensor, shape, description in (
        (
            "hidden",
            hidden,
            window.shape(batch, sizes, count),
            "batch, spatial sizes of the output, hidden channels, ordered by `data_format`",
        ),
        ("weight", weight, (count, kernels), "hidden channels, and taps * groups"),
        ("bias", bias, (kernels,), "taps * groups"),
    ):
        check_operand(problem, name, tensor, shape, description)


def output_sizes(window, x_shape) -> tuple[int | None, ...]:
    """Spatial sizes of the output, at least 1 where known, or ValueError."""
    sizes = window.output_sizes(window.spatial(x_shape))
    if any(n is not None and n <= 0 for n in sizes):
        raise ValueError(
            "The window must fit into the padded input: every output size must be at least 1. "
            f"Received: output sizes {sizes}, input sizes {window.spatial(x_shape)}, "
            f"kernel_size={window.kernel_size}, strides={window.strides}, "
            f"padding={window.padding!r}, dilation_rate={window.dilation_rate}"
        )
    return sizes
