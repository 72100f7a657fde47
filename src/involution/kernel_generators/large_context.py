"""A generator whose kernels depend on a large neighborhood: LSNet's large-kernel perception."""

import math

import keras
from keras import ops

from involution.kernel_generators.base import check_names, training_argument
from involution.kernel_generators.convolutional import EPSILON, Linear
from involution.kernel_generators.pooling import average_pool
from involution.ops.validation import (
    CAUSAL,
    CHANNELS_LAST,
    SAME,
    reduced_channels,
    standardize_tuple,
)


@keras.saving.register_keras_serializable(package="involution")
class LargeContext(Linear):
    """Kernels from a large neighborhood: a depthwise convolution between 1x1 convolutions.

    Average pooling by the strides; a 1x1 convolution to C // reduction_ratio channels, batch
    normalization, ReLU; a depthwise convolution with windows of ``context_size``, batch
    normalization; a 1x1 convolution, batch normalization, ReLU; a 1x1 convolution to taps * groups.
    Then the kernels of each group are normalized: by their mean and variance over the taps and all
    positions of the sample, with a scale and an offset for each tap and group.

    The normalization needs all kernels of a sample, which are therefore stored; without it they are
    computed where they are applied.

    Args:
        reduction_ratio: Channels of the features for each hidden channel.
        context_size: Side of the window of the depthwise convolution, in output positions.
        kernel_normalization: Whether kernels are normalized.
        **kwargs: As for ``Linear``.

    Raises:
        ValueError: ``reduction_ratio`` leaves no hidden channel; the layer has three dimensions,
            for which Keras has no depthwise convolution, or causal padding.

    Source: Wang et al., "LSNet: See Large, Focus Small", CVPR 2025, arXiv:2503.23135, where windows
    have 3x3 taps and kernels are shared by the channels of interleaved groups.

    Example:

    >>> import numpy as np, involution
    >>> generator = involution.kernel_generators.LargeContext()
    >>> layer = involution.Involution2D(
    ...     3, groups=4, group_layout="interleaved", kernel_generator=generator
    ... )
    >>> tuple(layer(np.ones((1, 9, 8, 32), "float32")).shape)
    (1, 9, 8, 32)
    """

    @check_names
    def __init__(self, reduction_ratio=2, *, context_size=7, kernel_normalization=True, **kwargs):
        super().__init__(**kwargs)
        (self.reduction_ratio,) = standardize_tuple("reduction_ratio", reduction_ratio, 1)
        (self.context_size,) = standardize_tuple("context_size", context_size, 1)
        self.kernel_normalization = self.normalizes_kernels = bool(kernel_normalization)

    def _build_generator(self, channels):
        rank, hidden = len(self.kernel_size), reduced_channels(channels, self.reduction_ratio)
        if rank == 3 or self.padding == CAUSAL:
            raise ValueError(
                "LargeContext requires one or two dimensions, and windows that see both sides: "
                f"padding other than 'causal'. Received: kernel_size={self.kernel_size}, "
                f"padding={self.padding!r}"
            )
        self.reduce = self.make_convolution("reduce", hidden, channels, use_bias=False)
        self.reduce_normalization = self.make_normalization("reduce_normalization", hidden)
        self.context = getattr(keras.layers, f"DepthwiseConv{rank}D")(
            self.context_size,
            padding=SAME,
            data_format=CHANNELS_LAST,
            use_bias=False,
            depthwise_initializer="he_normal",
            depthwise_regularizer=self.kernel_regularizer,
            dtype=self.dtype_policy,
            name="context",
        )
        self.context.build((None,) * (rank + 1) + (hidden,))
        self.context_normalization = self.make_normalization("context_normalization", hidden)
        self.mix = self.make_convolution("mix", hidden, hidden, use_bias=False)
        self.mix_normalization = self.make_normalization("mix_normalization", hidden)
        self.expand = self.make_convolution("expand", self.kernel_channels, hidden)
        if self.kernel_normalization:
            # In float32, as statistics are.
            shape, dtype = (self.kernel_channels,), self.dtype_policy.variable_dtype
            self.gamma = self.add_weight(
                shape=shape, initializer="ones", name="gamma", dtype=dtype, autocast=False
            )
            self.beta = self.add_weight(
                shape=shape, initializer="zeros", name="beta", dtype=dtype, autocast=False
            )

    def hidden(self, features):
        training = training_argument()
        x = self.reduce(average_pool(features, self.strides))
        x = ops.relu(self.reduce_normalization(x, **training))
        x = self.context_normalization(self.context(x), **training)
        return ops.relu(self.mix_normalization(self.mix(x), **training))

    def normalize_kernels(self, kernels):
        dtype = keras.backend.standardize_dtype(kernels.dtype)
        wide = "float64" if dtype == "float64" else "float32"  # squares overflow float16
        shape = ops.shape(kernels)
        taps = math.prod(self.kernel_size)
        grouped = ops.reshape(
            ops.cast(kernels, wide), (shape[0], math.prod(shape[1:-1]) * taps, self.groups)
        )
        mean = ops.mean(grouped, axis=1, keepdims=True)
        variance = ops.mean(ops.square(grouped - mean), axis=1, keepdims=True)
        grouped = (grouped - mean) * ops.rsqrt(variance + EPSILON)
        normalized = ops.reshape(grouped, shape) * ops.cast(self.gamma, wide)
        return ops.cast(normalized + ops.cast(self.beta, wide), dtype)

    def count_multiply_adds(self) -> int:
        layers = self.reduce, self.context, self.mix
        return super().count_multiply_adds() + sum(math.prod(la.kernel.shape) for la in layers)

    def get_config(self):
        return {
            **super().get_config(),
            "reduction_ratio": self.reduction_ratio,
            "context_size": self.context_size,
            "kernel_normalization": self.kernel_normalization,
        }
