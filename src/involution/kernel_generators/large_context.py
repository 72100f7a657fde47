"""A generator whose kernels depend on a large neighborhood: LSNet's large-kernel perception."""

import math

import keras
from keras import ops

from involution.kernel_generators.base import check_names, training_argument
from involution.kernel_generators.convolutional import (
    EPSILON,
    Linear,
    clone_initializer,
    projection_of,
)
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

    The normalization is part of the last convolution, with weights for each sample; the kernels are
    therefore stored. Without it they are computed where they are applied.

    Args:
        reduction_ratio: Channels of the features for each hidden channel.
        context_size: Side of the window of the depthwise convolution, in output positions.
        kernel_normalization: Whether kernels are normalized.
        use_normalization: Whether the hidden channels are normalized, after each convolution but
            the last. If not, these convolutions have biases.
        **kwargs: As for ``Linear``; ``kernel_initializer`` is that of the 1x1 convolutions.

    Raises:
        ValueError: ``reduction_ratio`` leaves no hidden channel; the layer has three dimensions,
            for which Keras has no depthwise convolution, or causal padding, or is called with a
            mask: the kernels depend on all positions.

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

    refuses_mask = True
    # As in ``Bottleneck``.
    NORMALIZED = (
        ("reduce", "reduce_normalization"),
        ("context", "context_normalization"),
        ("mix", "mix_normalization"),
    )

    @check_names
    def __init__(
        self,
        reduction_ratio=2,
        *,
        context_size=7,
        kernel_normalization=True,
        use_normalization=True,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.use_normalization = bool(use_normalization)
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
        use_bias = not self.use_normalization
        self.reduce = self.make_convolution("reduce", hidden, channels, use_bias=use_bias)
        if self.use_normalization:
            self.reduce_normalization = self.make_normalization("reduce_normalization", hidden)
        self.context = getattr(keras.layers, f"DepthwiseConv{rank}D")(
            self.context_size,
            padding=SAME,
            data_format=CHANNELS_LAST,
            use_bias=use_bias,
            depthwise_initializer="he_normal",
            bias_initializer=clone_initializer(self.bias_initializer),
            depthwise_regularizer=self.kernel_regularizer,
            bias_regularizer=self.bias_regularizer,
            dtype=self.dtype_policy,
            name="context",
        )
        self.context.build((None,) * (rank + 1) + (hidden,))
        if self.use_normalization:
            self.context_normalization = self.make_normalization("context_normalization", hidden)
        self.mix = self.make_convolution("mix", hidden, hidden, use_bias=use_bias)
        if self.use_normalization:
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
        x = average_pool(features, self.strides)
        for convolution, normalization in self.NORMALIZED:
            x = getattr(self, convolution)(x)
            if self.use_normalization:
                x = getattr(self, normalization)(x, **training_argument())
            if convolution != "context":
                x = ops.relu(x)
        return x

    def normalized_kernels(self, hidden):
        """The kernels of ``expand``, normalized.

        The kernels are an affine map of ``hidden``, so its mean and covariance over the positions
        give theirs, and a matrix for each sample gives kernels that are normalized already: a pass
        over all kernels costs more than these products.
        """
        projection = projection_of(self.expand, self.compute_dtype, self.kernel_channels)
        if projection is None:
            hidden = self.expand(hidden)
            projection = ops.eye(self.kernel_channels), ops.zeros(self.kernel_channels)
        shape = ops.shape(hidden)
        hidden = ops.reshape(hidden, (shape[0], math.prod(shape[1:-1]), shape[-1]))
        weight, bias = self._normalized_projection(hidden, *projection)
        kernels = ops.matmul(hidden, ops.cast(weight, hidden.dtype))
        kernels = kernels + ops.cast(bias, hidden.dtype)
        return ops.reshape(kernels, (*shape[:-1], self.kernel_channels))

    def _normalized_projection(self, hidden, weight, bias):
        """Weights (B, hidden channels, taps * groups) and biases (B, 1, taps * groups)."""
        dtype = keras.backend.standardize_dtype(hidden.dtype)
        wide = "float64" if dtype == "float64" else "float32"  # squares overflow float16
        hidden, weight, bias, gamma, beta = (
            ops.cast(x, wide) for x in (hidden, weight, bias, self.gamma, self.beta)
        )

        def by_group(values):  # (B, taps * groups) to (B, taps, groups)
            return ops.reshape(values, (-1, self.kernel_channels // self.groups, self.groups))

        def by_channel(values):  # (B, 1, groups) to (B, 1, taps * groups)
            return ops.tile(values, (1, 1, self.kernel_channels // self.groups))

        mean_hidden = ops.mean(hidden, axis=1, keepdims=True)
        centered = hidden - mean_hidden
        covariance = ops.matmul(ops.transpose(centered, (0, 2, 1)), centered)
        covariance = covariance / ops.cast(ops.shape(hidden)[1], wide)
        # Of each tap over the positions; of each group over taps and positions.
        tap_mean = by_group(ops.matmul(mean_hidden, weight)[:, 0] + bias)
        tap_variance = by_group(ops.sum(ops.matmul(covariance, weight) * weight, axis=1))
        mean = ops.mean(tap_mean, axis=1, keepdims=True)
        variance = ops.mean(tap_variance + ops.square(tap_mean - mean), axis=1, keepdims=True)
        scale = ops.rsqrt(variance + EPSILON)
        gamma = by_channel(scale) * gamma
        return weight * gamma, (bias - by_channel(mean)) * gamma + beta

    def count_multiply_adds(self) -> int:
        layers = self.reduce, self.context, self.mix
        return super().count_multiply_adds() + sum(math.prod(la.kernel.shape) for la in layers)

    def get_config(self):
        return {
            **super().get_config(),
            "reduction_ratio": self.reduction_ratio,
            "context_size": self.context_size,
            "kernel_normalization": self.kernel_normalization,
            "use_normalization": self.use_normalization,
        }
