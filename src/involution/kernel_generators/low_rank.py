"""Kernels of low rank around a static kernel: dynamic short convolutions of language models."""

import math

import keras
import numpy as np

from involution.kernel_generators.base import check_names
from involution.kernel_generators.convolutional import Linear
from involution.kernel_generators.pooling import average_pool
from involution.ops.validation import CAUSAL, standardize_tuple


@keras.saving.register_keras_serializable(package="involution")
class LowRank(Linear):
    """Kernels (features @ P) @ U + static: a product of low rank, and a static kernel.

    P has ``rank`` columns and no bias; U starts at zero, so that the layer starts as a depthwise
    convolution. With ``residual``, 1 is added to the tap at the position itself: the output is the
    input, plus what the kernels make of its window. With as many groups as channels each channel
    has its own kernel at each position; the implementation ``fused`` stores none of them.

    Args:
        rank: Columns of P, the hidden channels.
        residual: Whether to add 1 to the last tap of causal windows, or to the center of others.
        kernel_initializer: Of P. U starts at zero.
        bias_initializer: Of the static kernel; None: uniform between -1 / sqrt(taps) and 1 /
            sqrt(taps).
        **kwargs: As for ``Linear``.

    Source: Sieberling et al., "Dynamic Short Convolutions Improve Transformers", arXiv:2606.03825.

    Example:

    >>> import numpy as np, involution
    >>> generator = involution.kernel_generators.LowRank(15)
    >>> layer = involution.Involution1D(
    ...     4, padding="causal", groups=64, kernel_generator=generator
    ... )
    >>> tuple(layer(np.ones((2, 10, 64), "float32")).shape)
    (2, 10, 64)
    """

    accepts_initializers = False

    @check_names
    def __init__(self, rank=16, *, residual=True, bias_initializer=None, **kwargs) -> None:
        super().__init__(bias_initializer=bias_initializer, **kwargs)
        self.rank = standardize_tuple("rank", rank, 1)[0]
        self.residual = bool(residual)

    def _build_generator(self, channels):
        initializers = self.kernel_initializer, self.bias_initializer
        self.reduce = self.make_convolution("reduce", self.rank, channels, use_bias=False)
        bound = 1 / math.sqrt(math.prod(self.kernel_size))
        self.kernel_initializer = keras.initializers.Zeros()
        if self.bias_initializer is None:
            self.bias_initializer = keras.initializers.RandomUniform(-bound, bound)
        self.expand = self.make_convolution("expand", self.kernel_channels, self.rank)
        # The arguments: the configuration has them.
        self.kernel_initializer, self.bias_initializer = initializers

    def hidden(self, features):
        return self.reduce(average_pool(features, self.strides))

    def kernel_offset(self):
        if not self.residual:
            return None
        taps = math.prod(self.kernel_size)
        center = np.ravel_multi_index([(k - 1) // 2 for k in self.kernel_size], self.kernel_size)
        offset = np.zeros((taps, self.groups), "float32")
        offset[taps - 1 if self.padding == CAUSAL else center] = 1
        return offset.reshape(-1)

    def count_multiply_adds(self) -> int:
        return super().count_multiply_adds() + math.prod(self.reduce.kernel.shape)

    def get_config(self):
        return {**super().get_config(), "rank": self.rank, "residual": self.residual}
