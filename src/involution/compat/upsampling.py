"""Upsampling with a kernel for each fine position: CARAFE, and the convex upsampling of RAFT."""

from typing import Any

from involution import ops
from involution.compat.grouped import by_groups
from involution.compat.operands import (
    check_divisible,
    check_shape,
    integer,
    operands,
    shape_of,
    times,
)
from involution.ops.frameworks import namespace


def carafe(
    features: Any,
    masks: Any,
    kernel_size: int,
    group_size: int = 1,
    scale_factor: int = 2,
) -> Any:
    """Content-aware reassembly of features, with the signature of ``mmcv.ops.carafe``.

        y[n, c, i, j] = sum over taps k of
            masks[n, g * kernel_size**2 + k, i, j] * features[n, c, window of (i // s, j // s) at k]

    where g = c // (C / group_size) and s = ``scale_factor``; features are 0 out of bounds. It is
    ``involution.ops.involution`` with ``upsampling``, for channels on axis 1.

    Differences from mmcv: it also runs on CPUs, on tensors of TensorFlow and JAX, in float64 and
    bfloat16, and its gradients can be differentiated again.

    Args:
        features: Tensor (N, C, H, W): float64, float32, bfloat16 or float16.
        masks: Tensor (N, group_size * kernel_size**2, s * H, s * W) of the dtype of ``features``,
            group-major, with taps in row-major order; in CARAFE, after the softmax over the taps.
        kernel_size: Odd integer.
        group_size: Number of groups, which divides C. As in mmcv, not the size of one.
        scale_factor: Integer s, the ratio of the sizes.

    Returns:
        Tensor (N, C, s * H, s * W), of the dtype of ``features``.

    Raises:
        ValueError: An argument is out of its range, or the shapes or dtypes do not match.

    Example:

    >>> import numpy as np
    >>> from involution.compat import carafe
    >>> features, masks = np.ones((1, 6, 4, 5), "float32"), np.ones((1, 18, 8, 10), "float32")
    >>> y = carafe(features, masks, kernel_size=3, group_size=2)
    >>> tuple(y.shape), float(y[0, 0, 0, 0]), float(y[0, 0, 2, 2])
    ((1, 6, 8, 10), 4.0, 9.0)

    Source: Wang et al., "CARAFE: Content-Aware ReAssembly of FEatures", ICCV 2019,
    arXiv:1905.02188.
    """
    features, masks = operands(features=features, masks=masks)
    size, groups = integer("kernel_size", kernel_size), integer("group_size", group_size)
    factor = integer("scale_factor", scale_factor)
    if size % 2 == 0:
        raise ValueError(f"`kernel_size` must be odd. Received: kernel_size={kernel_size}")
    batch, channels, *sizes = shape_of("features", features, "N, C, H, W")
    check_divisible("features", channels, "group_size", groups)
    check_shape(
        "masks",
        masks,
        (batch, groups * size**2, *(times(n, factor) for n in sizes)),
        "N, group_size * kernel_size**2, scale_factor * H, scale_factor * W",
    )
    return by_groups(
        ops.involution, features, masks, groups, size, padding="symmetric", upsampling=factor
    )


def convex_upsample(flow: Any, up_mask: Any, factor: int = 8) -> Any:
    """Upsampling by convex combinations, with the signature of torchvision's ``upsample_flow``.

        y[n, c, f * i + a, f * j + b] = f * sum over taps k of
            weights[n, k, f * a + b, i, j] * flow[n, c, window of (i, j) at k]

    where f = ``factor``, the 3x3 window is 0 out of bounds, and the weights are the softmax of
    ``up_mask`` over the taps. The values are multiplied by f because a flow is measured in pixels.

    It is an involution whose windows are on the coarse grid and whose kernels are on the fine one,
    followed by a pixel shuffle: windows are not copied. Differences from torchvision: ``up_mask``
    is required, because without it ``upsample_flow`` is a bilinear interpolation.

    Args:
        flow: Tensor (N, C, H, W): float64, float32, bfloat16 or float16; C is 2 for optical flow.
        up_mask: Tensor (N, 9 * f * f, H, W) of the dtype of ``flow``, before the softmax; its
            channels are tap-major, then rows and columns of a cell.
        factor: Integer f.

    Returns:
        Tensor (N, C, f * H, f * W), of the dtype of ``flow``.

    Raises:
        ValueError: An argument is out of its range, or the shapes or dtypes do not match.

    Example:

    >>> import numpy as np
    >>> from involution.compat import convex_upsample
    >>> flow, up_mask = np.ones((1, 2, 4, 5), "float32"), np.zeros((1, 9 * 4, 4, 5), "float32")
    >>> y = convex_upsample(flow, up_mask, factor=2)
    >>> tuple(y.shape), round(float(y[0, 0, 2, 2]), 4)
    ((1, 2, 8, 10), 2.0)

    Source: Teed and Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow", ECCV 2020,
    arXiv:2003.12039.
    """
    flow, up_mask = operands(flow=flow, up_mask=up_mask)
    factor = integer("factor", factor)
    cells = factor**2
    batch, channels, *sizes = shape_of("flow", flow, "N, C, H, W")
    check_divisible("flow", channels, "groups", 1)
    check_shape("up_mask", up_mask, (batch, 9 * cells, *sizes), "N, 9 * factor**2, H, W")
    array = namespace(flow)
    batch, _, height, width = array.shape(flow)
    weights = array.softmax(array.reshape(up_mask, (batch, 9, 1, cells, height, width)), 1)
    weights = array.cast(weights, flow.dtype)  # PyTorch's autocast gives float32
    # The positions of a cell are a dimension that is upsampled from size 1: neither `up_mask` nor
    # `flow` is copied, and vectors are along rows of the image.
    y = ops.involution(
        array.expand_dims(factor * flow, 2),
        weights,
        (1, 3, 3),
        padding="symmetric",
        data_format="channels_first",
        upsampling=(cells, 1, 1),
    )
    y = array.reshape(y, (batch, channels, factor, factor, height, width))
    y = array.moveaxis(array.moveaxis(y, 2, 4), 2, -1)
    return array.reshape(y, (batch, channels, height * factor, width * factor))
