"""The operator's public functions."""

from collections.abc import Sequence
from typing import Any

from involution import renamed
from involution.ops import calls
from involution.ops.calls import rank_of
from involution.ops.dispatch import IMPLEMENTATIONS, preferred
from involution.ops.problem import check_kernel, problem_of
from involution.ops.tensor_utils import any_symbolic, as_tensors
from involution.ops.transposed import TransposedWindow
from involution.ops.window import Window


def involution(
    x: Any,
    kernel: Any,
    kernel_size: int | Sequence[int],
    strides: int | Sequence[int] = 1,
    padding: Any = "same",
    dilation_rate: int | Sequence[int] = 1,
    groups: int = 1,
    group_layout: str = "contiguous",
    data_format: str | None = None,
    implementation: str | Sequence[str] | None = None,
    *,
    upsampling: int | Sequence[int] = 1,
) -> Any:
    """Applies a separate kernel at each position of ``x``, shared by the channels of a group.

    For output position p and the group g(c) of channel c, with a sum over the taps k of the window,

        y[b, p, c] = sum over k of
            kernel[b, p, k, g(c)] * x[b, floor(p / upsampling) * strides - pad + k * dilation_rate,
            c]

    where ``x`` is 0 out of bounds. Sums are accumulated in float32 (float64 inputs: float64). Both
    gradients are exact, and reverse mode supports any order; under ``torch.compile``, ``fused``
    supports the first only. On JAX, ``native``, ``taps`` and ``fused`` do not support forward mode.
    What is not supported raises an error.

    The framework is that of the tensors, TensorFlow, JAX or PyTorch, whatever Keras's backend is;
    arrays of NumPy become tensors of the other arguments' framework, or of Keras's backend.

    Infinities and NaN follow IEEE arithmetic, in every implementation. A tap outside the input
    multiplies its kernel value by 0: if that value is infinite or NaN, the output is NaN; if the
    output's gradient is infinite or NaN, the kernel's gradient at that tap is NaN. The gradient of
    ``x`` has no such terms. Non-finite values affect only the windows that contain them.

    Args:
        x: Tensor (B, *spatial, C), or (B, C, *spatial) for ``"channels_first"``, with one, two or
            three spatial dimensions; float64, float32, bfloat16 or float16.
        kernel: Tensor (B, *out_spatial, taps, groups), or (B, taps, groups, *out_spatial) for
            ``"channels_first"``, of the dtype of ``x``; taps is the product of ``kernel_size``,
            in row-major order.
        kernel_size: Integer, or one for each spatial dimension. Sizes may be even and unequal.
        strides: Integer, or one for each spatial dimension.
        padding: ``"same"`` (as in Keras: ceil(n / stride) positions), ``"valid"``,
            ``"symmetric"`` (floor((kernel_size - 1) * dilation_rate / 2) zeros on both sides, as in
            the paper's code), ``"causal"`` (one dimension; the last tap of a window is at p *
            strides), an integer, or a pair (before, after) for each spatial dimension.
        dilation_rate: Integer, or one for each spatial dimension.
        groups: Number of groups; divides C.
        group_layout: ``"contiguous"``: channel c belongs to group c // (C / groups), as in the
            paper; ``"interleaved"``: to group c % groups, as in the keras.io example.
        data_format: ``"channels_last"``, ``"channels_first"``, or None for Keras's setting.
        implementation: None for the first in order of preference that supports the call, a name,
            a sequence of names that are tried in order, or ``"portable"``, the names for exported
            programs. If none of them supports the call, a ValueError gives the reasons.
        upsampling: Integer, or one for each spatial dimension: the outputs for each window. The
            windows are those of the input's positions, the kernels and the output are on a grid
            that is finer by this factor, as in CARAFE. Above 1, ``strides`` must be 1. The input is
            not copied to the fine grid.

    Returns:
        Tensor (B, *out_spatial, C) or (B, C, *out_spatial), of the dtype of ``x``.

    Raises:
        ValueError: An argument is out of its range, the shapes or dtypes do not match, or the
            tensors are of two frameworks. It is raised before the computation starts. Of sizes that
            a ``tf.function`` does not know, only their product is checked, when it runs.

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
    x, kernel = as_tensors(x=x, kernel=kernel)
    window = Window(
        kernel_size,
        strides,
        padding,
        dilation_rate,
        groups,
        group_layout,
        data_format,
        rank_of(x),
        upsampling,
    )
    if any_symbolic(x, kernel):
        from involution.ops import symbolic

        return symbolic.InvolutionOperation(implementation, **window.arguments())(x, kernel)
    return calls.involution(window, implementation, x, kernel)


def window_products(
    x: Any,
    y: Any,
    kernel_size: int | Sequence[int],
    strides: int | Sequence[int] = 1,
    padding: Any = "same",
    dilation_rate: int | Sequence[int] = 1,
    groups: int = 1,
    group_layout: str = "contiguous",
    data_format: str | None = None,
    implementation: str | Sequence[str] | None = None,
    *,
    upsampling: int | Sequence[int] = 1,
) -> Any:
    """Dot products of each position of ``y`` with its window of ``x``, by groups of channels.

        products[b, p, k, g] = sum over channels c of group g of
            y[b, p, c] * x[b, floor(p / upsampling) * strides - pad + k * dilation_rate, c]

    This is the gradient of ``involution`` for its kernel, with the same windows, speed and
    derivatives; in local attention, the scores. At a tap outside the input, where ``x`` is 0, the
    sum is 0, or NaN if a value of ``y`` in it is infinite or NaN.

    Args:
        x: Tensor (B, *spatial, C), or (B, C, *spatial) for ``"channels_first"``.
        y: Tensor (B, *out_spatial, C) or (B, C, *out_spatial), of the dtype of ``x``.
        kernel_size, strides, padding, dilation_rate, upsampling: As for ``involution``.
        groups, group_layout, data_format, implementation: As for ``involution``.

    Returns:
        Tensor (B, *out_spatial, taps, groups) or (B, taps, groups, *out_spatial), of the dtype of
        ``x``: the shape of a kernel of ``involution``.

    Raises:
        ValueError: An argument is out of its range, or the shapes or dtypes do not match.

    Example:

    >>> import numpy as np, involution
    >>> x = np.ones((1, 4, 5, 6), "float32")
    >>> scores = involution.ops.window_products(x, x, kernel_size=3, groups=2)
    >>> tuple(scores.shape), float(scores[0, 0, 0, 0, 0]), float(scores[0, 0, 0, 4, 0])
    ((1, 4, 5, 9, 2), 0.0, 3.0)
    """
    x, y = as_tensors(x=x, y=y)
    window = Window(
        kernel_size,
        strides,
        padding,
        dilation_rate,
        groups,
        group_layout,
        data_format,
        rank_of(x),
        upsampling,
    )
    if any_symbolic(x, y):
        from involution.ops import symbolic

        return symbolic.WindowProductsOperation(implementation, **window.arguments())(x, y)
    return calls.window_products(window, implementation, x, y)


def fused_involution(
    x: Any,
    hidden: Any,
    weight: Any,
    bias: Any,
    kernel_size: int | Sequence[int],
    strides: int | Sequence[int] = 1,
    padding: Any = "same",
    dilation_rate: int | Sequence[int] = 1,
    groups: int = 1,
    group_layout: str = "contiguous",
    data_format: str | None = None,
    implementation: str | Sequence[str] | None = None,
    *,
    upsampling: int | Sequence[int] = 1,
) -> Any:
    """``involution`` with the kernels hidden[b, p] @ weight + bias, fused where possible.

    Kernels have taps * groups elements at every position, often many times the size of the
    features. The implementation ``fused``, preferred where available, computes them where they are
    used and does not store them, in the gradients too. The others compute and store them first.
    Infinities and NaN follow the rule of ``involution``: a kernel value at a tap outside the input
    is multiplied by 0.

    Args:
        x: Tensor (B, *spatial, C), or (B, C, *spatial) for ``"channels_first"``.
        hidden: Features from which the kernels are computed: tensor (B, *out_spatial, H) or (B, H,
            *out_spatial).
        weight: Tensor (H, taps * groups), channels tap-major.
        bias: Tensor (taps * groups,).
        kernel_size, strides, padding, dilation_rate, upsampling: As for ``involution``.
        groups, group_layout, data_format: As for ``involution``.
        implementation: As for ``involution``, and ``"fused"``; the others store the kernels.

    Returns:
        Tensor (B, *out_spatial, C) or (B, C, *out_spatial), of the dtype of ``x``. Sums are
        accumulated as in ``involution``; ``fused`` does not round kernels to the dtype of ``x``.

    Raises:
        ValueError: An argument is out of its range, or the shapes or dtypes do not match.

    Example:

    >>> import numpy as np, involution
    >>> x, hidden = np.ones((1, 4, 5, 6), "float32"), np.ones((1, 4, 5, 2), "float32")
    >>> weight, bias = np.ones((2, 18), "float32"), np.ones(18, "float32")
    >>> y = involution.ops.fused_involution(x, hidden, weight, bias, kernel_size=3, groups=2)
    >>> float(y[0, 0, 0, 0]), float(y[0, 1, 1, 0])
    (12.0, 27.0)
    """
    x, hidden, weight, bias = as_tensors(x=x, hidden=hidden, weight=weight, bias=bias)
    window = Window(
        kernel_size,
        strides,
        padding,
        dilation_rate,
        groups,
        group_layout,
        data_format,
        rank_of(x),
        upsampling,
    )
    if any_symbolic(x, hidden, weight, bias):
        from involution.ops import symbolic

        operation = symbolic.FusedInvolutionOperation(implementation, **window.arguments())
        return operation(x, hidden, weight, bias)
    return calls.fused_involution(window, implementation, x, hidden, weight, bias)


generate_and_apply = fused_involution


def transposed_involution(
    x: Any,
    kernel: Any,
    kernel_size: int | Sequence[int],
    strides: int | Sequence[int] = 1,
    padding: Any = "same",
    dilation_rate: int | Sequence[int] = 1,
    groups: int = 1,
    group_layout: str = "contiguous",
    data_format: str | None = None,
    implementation: str | Sequence[str] | None = None,
    *,
    output_padding: Any = None,
) -> Any:
    """Each position of ``x`` adds its channels, times its own kernel, to a window of the output.

    With a sum over all positions p and taps k for which q = p * strides - pad + k * dilation_rate,

        y[b, q, c] = sum over p, k of kernel[b, p, k, g(c)] * x[b, p, c]

    Kernels belong to the positions that are read, not to those that are written: the operator is
    the gradient of ``involution`` for its input, as transposed convolution is of convolution. With
    strides it upsamples; without, it is learned propagation (CSPN). It has the speed, dtypes and
    derivatives of ``involution``.

    Args:
        x: Tensor (B, *spatial, C), or (B, C, *spatial) for ``"channels_first"``.
        kernel: Tensor (B, *spatial, taps, groups), or (B, taps, groups, *spatial), of the dtype of
            ``x``.
        kernel_size, strides, dilation_rate: As for ``involution``.
        padding: Positions cut off the output: ``"same"``, ``"valid"``, ``"symmetric"``, an integer
            or pairs, as for ``involution``.
        groups, group_layout, data_format, implementation: As for ``involution``.
        output_padding: Integer, or one for each spatial dimension: additional positions at the end
            of the output, as in ``keras.layers.Conv2DTranspose``. None: for ``"same"`` as many as
            give n * strides positions for n of ``x``; for ``"valid"`` as many as give (n - 1) *
            strides + max(extent, strides), where extent = (kernel_size - 1) * dilation_rate + 1;
            else 0, which gives (n - 1) * strides + extent - pad_before - pad_after.

    Returns:
        Tensor (B, *out_spatial, C) or (B, C, *out_spatial), of the dtype of ``x``.

    Raises:
        ValueError: An argument is out of its range, or the shapes or dtypes do not match.

    Example:

    >>> import numpy as np, involution
    >>> x, kernel = np.ones((1, 4, 5, 6), "float32"), np.ones((1, 4, 5, 9, 2), "float32")
    >>> y = involution.ops.transposed_involution(x, kernel, kernel_size=3, strides=2, groups=2)
    >>> tuple(y.shape), float(y[0, 1, 1, 0]), float(y[0, 2, 2, 0])
    ((1, 8, 10, 6), 1.0, 4.0)

    Source: Cheng et al., "Learning Depth with Convolutional Spatial Propagation Network",
    arXiv:1810.02695, for propagation.
    """
    x, kernel = as_tensors(x=x, kernel=kernel)
    window = Window(
        kernel_size, strides, padding, dilation_rate, groups, group_layout, data_format, rank_of(x)
    )
    transposed = TransposedWindow.of(window, output_padding)
    if any_symbolic(x, kernel):
        from involution.ops import symbolic

        operation = symbolic.TransposedInvolutionOperation(
            implementation, output_padding=output_padding, **window.arguments()
        )
        return operation(x, kernel)
    return calls.transposed_involution(transposed, implementation, x, kernel)


@renamed.arguments(hidden="hidden_channels")
def implementations(
    x: Any,
    kernel: Any,
    kernel_size: int | Sequence[int],
    hidden_channels: int | None = None,
    **arguments: Any,
) -> list[tuple[str, str | None]]:
    """The implementations in order of preference, and why each cannot compute a call.

    Args:
        x, kernel, kernel_size: As for ``involution``; tensors, or ``keras.KerasTensor`` for their
            shapes and dtypes. ``kernel`` may be None: its shape follows from the others.
        hidden_channels: Channels of ``hidden`` of ``fused_involution``; None for ``involution``.
        **arguments: The other arguments of ``involution``, without ``implementation``.

    Returns:
        List of (name, reason): why the implementation cannot compute the call, or None. The first
        without a reason is selected.

    Example:

    >>> import keras, involution
    >>> x, kernel = keras.KerasTensor((None, 8, 8, 6)), keras.KerasTensor((None, 8, 8, 9, 1))
    >>> [name for name, reason in involution.ops.implementations(x, kernel, 3)]
    ['triton', 'native', 'taps', 'reference']
    """
    problem = problem_of(Window(kernel_size, **arguments, rank=rank_of(x)), x, hidden_channels)
    if kernel is not None:
        check_kernel(problem, kernel)
    return [
        (name, IMPLEMENTATIONS[name].unsupported_reason(problem)) for name in preferred(problem)
    ]
