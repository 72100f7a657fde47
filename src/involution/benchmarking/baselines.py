"""Baselines of the benchmark: involution by im2col, and the convolutions that it replaces."""

import math

import keras
from keras import ops

from involution.benchmarking.timed_program import tensors
from involution.ops.validation import CONTIGUOUS


def im2col(x, kernel, window, pads=None):
    """Two-dimensional involution as in the keras.io example: extracted patches, product, sum.

    Patches are extracted by ``tf.image.extract_patches``, JAX's ``conv_general_dilated_patches`` or
    PyTorch's ``unfold``. Padding is ``"same"`` unless ``pads`` has (before, after) of height and
    width. Tensors are channels last; kernel size, strides and dilation rate are equal in both
    dimensions.
    """
    batch, *_, channels = ops.shape(x)
    out = ops.shape(kernel)[1:3]
    taps, groups, group_channels = window.taps, window.groups, channels // window.groups
    parameters = (window.kernel_size[0], window.strides[0], window.dilation_rate[0])
    patches = ops.reshape(
        _EXTRACT_PATCHES[keras.config.backend()](x, out, *parameters, pads),
        (batch, *out, taps, channels),
    )
    if window.group_layout == CONTIGUOUS:
        weights = ops.expand_dims(kernel, -1)
        shape = (batch, *out, taps, groups, group_channels)
    else:
        weights = ops.expand_dims(kernel, -2)
        shape = (batch, *out, taps, group_channels, groups)
    y = ops.sum(weights * ops.reshape(patches, shape), axis=3)
    return ops.reshape(y, (batch, *out, channels))


def _tensorflow_patches(x, out, k, s, d, pads):
    import tensorflow as tf

    padding = "SAME"
    if pads is not None:
        x, padding = tf.pad(x, [(0, 0), *pads, (0, 0)]), "VALID"
    return tf.image.extract_patches(x, [1, k, k, 1], [1, s, s, 1], [1, d, d, 1], padding)


def _jax_patches(x, out, k, s, d, pads):
    import jax

    channels = x.shape[-1]
    patches = jax.lax.conv_general_dilated_patches(
        x,
        (k, k),
        (s, s),
        "SAME" if pads is None else pads,
        rhs_dilation=(d, d),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        # On GPUs the default is TensorFloat-32, which would round the copied values.
        precision=jax.lax.Precision.HIGHEST,
    )
    return ops.swapaxes(ops.reshape(patches, (*patches.shape[:3], channels, k * k)), -1, -2)


def _torch_patches(x, out, k, s, d, pads):
    import torch

    if pads is None:
        totals = [
            max((m - 1) * s + (k - 1) * d + 1 - n, 0)
            for n, m in zip(x.shape[1:3], out, strict=True)
        ]
        pads = [(total // 2, total - total // 2) for total in totals]
    padding = [n for pair in reversed(pads) for n in pair]
    padded = torch.nn.functional.pad(x.permute(0, 3, 1, 2), padding)
    patches = torch.nn.functional.unfold(padded, k, dilation=d, stride=s)
    return patches.reshape(len(x), x.shape[-1], k * k, *out).permute(0, 3, 4, 2, 1)


_EXTRACT_PATCHES = {"tensorflow": _tensorflow_patches, "jax": _jax_patches, "torch": _torch_patches}


def convolution(case, rng, dtype):
    """(function, arguments) of Keras's convolution with kernel size 3, which RedNet replaces."""
    window = (3,) * len(case.sizes)
    return _convolution(ops.conv, case, rng, dtype, (*window, case.channels, case.channels))


def depthwise(case, rng, dtype):
    """(function, arguments) of Keras's depthwise convolution with the involution's kernel size."""
    if len(case.sizes) == 3:
        raise NotImplementedError("Keras has no depthwise convolution in three dimensions")
    window = case.window.kernel_size
    return _convolution(ops.depthwise_conv, case, rng, dtype, (*window, case.channels, 1))


def _convolution(operation, case, rng, dtype, shape):
    scale = 1 / math.sqrt(math.prod(shape[:-1]))
    arrays = rng.standard_normal(case.x_shape), rng.standard_normal(shape) * scale

    def apply(x, weights):
        return operation(
            x,
            weights,
            strides=case.window.strides,
            padding="same",
            data_format="channels_last",
        )

    return apply, tensors(arrays, dtype)


CONVOLUTIONS = {"conv3": convolution, "depthwise": depthwise}
