"""What involution is measured against: the usual way to compute it, and what it replaces."""

import math

import keras
from keras import ops

from involution.benchmarking.timed_program import tensors
from involution.ops.validation import CONTIGUOUS


def patches(
    x, kernel, kernel_size, strides=1, dilation_rate=1, groups=1, group_layout=CONTIGUOUS, pads=None
):
    """Involution of images as the keras.io example writes it: patches, a product, a sum.

    The patches are the framework's own: ``tf.image.extract_patches``, JAX's
    ``conv_general_dilated_patches``, PyTorch's ``unfold``. Padding is ``"same"`` unless ``pads``
    gives (before, after) for height and width; data are channels last, all else is one integer.
    """
    batch, *_, channels = ops.shape(x)
    out = ops.shape(kernel)[1:3]
    taps, members = kernel_size**2, channels // groups
    seen = ops.reshape(
        _PATCHES[keras.config.backend()](x, out, kernel_size, strides, dilation_rate, pads),
        (batch, *out, taps, channels),
    )
    if group_layout == CONTIGUOUS:
        by = ops.expand_dims(kernel, -1)
        y = ops.sum(by * ops.reshape(seen, (batch, *out, taps, groups, members)), axis=3)
    else:
        by = ops.expand_dims(kernel, -2)
        y = ops.sum(by * ops.reshape(seen, (batch, *out, taps, members, groups)), axis=3)
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
    seen = jax.lax.conv_general_dilated_patches(
        x,
        (k, k),
        (s, s),
        "SAME" if pads is None else pads,
        rhs_dilation=(d, d),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return ops.swapaxes(ops.reshape(seen, (*seen.shape[:3], channels, k * k)), -1, -2)


def _torch_patches(x, out, k, s, d, pads):
    import torch

    if pads is None:
        totals = [
            max((m - 1) * s + (k - 1) * d + 1 - n, 0)
            for n, m in zip(x.shape[1:3], out, strict=True)
        ]
        pads = [(total // 2, total - total // 2) for total in totals]
    around = [n for pair in reversed(pads) for n in pair]
    padded = torch.nn.functional.pad(x.permute(0, 3, 1, 2), around)
    seen = torch.nn.functional.unfold(padded, k, dilation=d, stride=s)
    return seen.reshape(len(x), x.shape[-1], k * k, *out).permute(0, 3, 4, 2, 1)


_PATCHES = {"tensorflow": _tensorflow_patches, "jax": _jax_patches, "torch": _torch_patches}


def convolution(case, random, dtype):
    """(function, arguments) of Keras's convolution with a window of 3, which RedNet replaces."""
    window = (3,) * len(case.sizes)
    return _convolution(ops.conv, case, random, dtype, (*window, case.channels, case.channels))


def depthwise(case, random, dtype):
    """(function, arguments) of Keras's depthwise convolution with involution's own window."""
    if len(case.sizes) == 3:
        raise NotImplementedError("Keras has no depthwise convolution in three dimensions")
    window = (case.kernel_size,) * len(case.sizes)
    return _convolution(ops.depthwise_conv, case, random, dtype, (*window, case.channels, 1))


def _convolution(operation, case, random, dtype, shape):
    scale = 1 / math.sqrt(math.prod(shape[:-1]))
    arrays = random.standard_normal(case.x_shape), random.standard_normal(shape) * scale

    def apply(x, weights):
        return operation(
            x,
            weights,
            strides=case.strides,
            padding="same",
            data_format="channels_last",
        )

    return apply, tensors(arrays, dtype)


CONVOLUTIONS = {"conv3": convolution, "depthwise": depthwise}
