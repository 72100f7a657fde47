"""Dynamic short convolutions of sequence models: kernels whose taps are counted backwards."""

from typing import Any

from involution import ops
from involution.compat.operands import check_divisible, check_shape, operands, shape_of
from involution.ops.frameworks import namespace
from involution.ops.tensor_utils import to_accumulation_dtype


def headwise_dynamic_convolution(
    x: Any, weight: Any, static_w: Any = None, residual: bool = False
) -> Any:
    """A dynamic short convolution whose kernels are shared by the channels of a head.

        y[b, t, d] = sum over taps w of
            (weight[b, t, d // (D / H), w] + static_w[w, d]) * x[b, t - w, d]

    and x[b, t, d] is added for ``residual``. Positions before the first are 0. It is a causal
    involution with a group for each head. Differences from the paper's code: it also runs on CPUs
    and on tensors of TensorFlow and JAX.

    Args:
        x: Tensor (B, T, D): float64, float32, bfloat16 or float16.
        weight: Tensor (B, T, H, W) of the dtype of ``x``: W taps, counted backwards from the
            position itself. H divides D; heads are contiguous.
        static_w: Tensor (W, D) of the dtype of ``x``, or None: weights that do not depend on x.
        residual: Whether x is added.

    Returns:
        Tensor (B, T, D), of the dtype of ``x``.

    Raises:
        ValueError: The shapes or dtypes do not match.

    Example:

    >>> import numpy as np
    >>> from involution.compat import headwise_dynamic_convolution
    >>> x = np.arange(1, 5, dtype="float32").reshape(1, 4, 1)
    >>> weight = np.tile(np.array([0, 1], "float32"), (1, 4, 1, 1))  # the previous position
    >>> [float(v) for v in headwise_dynamic_convolution(x, weight)[0, :, 0]]
    [0.0, 1.0, 2.0, 3.0]

    Source: arXiv:2606.03825.
    """
    x, weight, static_w = _operands(static_w, x=x, weight=weight)
    batch, length, channels = shape_of("x", x, "B, T, D")
    *_, heads, taps = shape_of("weight", weight, "B, T, H, W")
    _check_known("weight", heads=heads, taps=taps)
    check_shape("weight", weight, (batch, length, heads, taps), "B, T, H, W")
    check_divisible("x", channels, "H", heads)
    static_w = _checked_static(static_w, taps, channels)
    array = namespace(x)
    batch, length, _ = array.shape(x)
    # The heads as a spatial dimension: ``weight`` is a kernel but for the order of its taps.
    y = ops.involution(
        array.reshape(x, (batch, length, heads, channels // heads)),
        array.expand_dims(array.flip(weight, 3), -1),
        (taps, 1),
        padding=((taps - 1, 0), (0, 0)),
        data_format="channels_last",
    )
    y = array.reshape(y, (batch, length, channels))
    if static_w is None:
        return y + x if residual else y
    # Rounded once more at the end, not at each tap.
    y, static_w = to_accumulation_dtype(y), to_accumulation_dtype(static_w)
    padded = array.pad(to_accumulation_dtype(x), [(0, 0), (taps - 1, 0), (0, 0)])
    if residual:
        y = y + padded[:, taps - 1 :]
    for w in range(taps):
        first = taps - 1 - w
        y = y + static_w[w] * padded[:, first : first + length]
    return array.cast(y, x.dtype)


def lowrank_dynamic_convolution(
    x: Any,
    z: Any,
    U: Any,  # noqa: N803 - the name in the formula
    static_w: Any = None,
    residual: bool = False,
) -> Any:
    """A dynamic short convolution with a kernel for each channel, generated from few features.

        y[b, t, d] = sum over taps w of (kernel[b, t, w, d] + static_w[w, d]) * x[b, t - w, d]

    with kernel = (z @ U) viewed as (B, T, W, D), and x[b, t, d] is added for ``residual``.
    Positions before the first are 0. It is ``involution.ops.fused_involution``, causal, with a
    group for each channel: where the implementation ``fused`` is available, kernels, which have W
    times the size of x, are not stored.

    Args:
        x: Tensor (B, T, D): float64, float32, bfloat16 or float16.
        z: Tensor (B, T, R) of the dtype of ``x``: the features of each position.
        U: Tensor (R, W * D) of the dtype of ``x``: W taps, counted backwards from the position
            itself, of D channels.
        static_w: Tensor (W, D) of the dtype of ``x``, or None: weights that do not depend on x.
        residual: Whether x is added.

    Returns:
        Tensor (B, T, D), of the dtype of ``x``.

    Raises:
        ValueError: The shapes or dtypes do not match.

    Example:

    >>> import numpy as np
    >>> from involution.compat import lowrank_dynamic_convolution
    >>> x, z = np.arange(1, 5, dtype="float32").reshape(1, 4, 1), np.ones((1, 4, 1), "float32")
    >>> U = np.array([[0, 1]], "float32")  # the previous position
    >>> [float(v) for v in lowrank_dynamic_convolution(x, z, U, residual=True)[0, :, 0]]
    [1.0, 3.0, 5.0, 7.0]

    Source: arXiv:2606.03825.
    """
    x, z, U, static_w = _operands(static_w, x=x, z=z, U=U)  # noqa: N806 - as above
    batch, length, channels = shape_of("x", x, "B, T, D")
    rank, columns = shape_of("U", U, "R, W * D")
    _check_known("U", rank=rank, columns=columns)
    check_divisible("U", columns, "D", channels or 1)
    check_shape("z", z, (batch, length, rank), "B, T, R")
    taps = columns // channels
    static_w = _checked_static(static_w, taps, channels)
    array = namespace(x)
    by_tap = array.reshape(U, (rank, taps, channels))
    if static_w is None:
        # A sum, because x may have no positions.
        # Cast, because PyTorch's autocast gives float32.
        one_tap = array.cast(array.sum(array.zeros_like(x[:1, :1]), (0, 1)), x.dtype)
        static_w = array.stack([one_tap] * taps, 0)
    if residual:
        own = static_w[:1] + array.ones_like(static_w[:1])
        static_w = array.concatenate([own, static_w[1:]], 0)
    return ops.fused_involution(
        x,
        z,
        array.reshape(array.flip(by_tap, 1), (rank, columns)),
        array.reshape(array.flip(static_w, 0), (columns,)),
        taps,
        padding="causal",
        groups=channels,
        data_format="channels_last",
    )


def _operands(static_w, **values):
    """The operands, the last of them static_w, which may be None."""
    if static_w is None:
        return [*operands(**values), None]
    return operands(**values, static_w=static_w)


def _check_known(name, **sizes):
    """ValueError unless the sizes, which determine the kernel, are known and not 0."""
    if not all(sizes.values()):
        raise ValueError(
            f"The last two sizes of `{name}` must be known and not 0. Received: "
            f"{', '.join(f'{n}={size}' for n, size in sizes.items())}"
        )


def _checked_static(static_w, taps, channels):
    if static_w is not None:
        check_shape("static_w", static_w, (taps, channels), "W, D")
    return static_w
