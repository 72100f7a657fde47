"""Local self-attention as a kernel generator."""

import math

import keras
from keras import ops

from involution.kernel_generators.base import INHERITED_ARGUMENTS, check_names
from involution.kernel_generators.convolutional import Linear
from involution.ops.attention import attention_kernel
from involution.ops.centers import every_center
from involution.ops.validation import CHANNELS_LAST, SAME, standardize_padding, standardize_tuple
from involution.ops.window import Window


@keras.saving.register_keras_serializable(package="involution")
class PairwiseAttention(Linear):
    """Local self-attention: dot products of each center with its window, softmax over the window.

    The groups are the heads. 1x1 convolutions compute a query from the features at each window's
    center, and a key from the features at every position; a kernel is

        softmax over taps k of query[p] . key[position k of the window of p] / sqrt(key_channels)

    where positions outside the input have zero weight. The values are the input itself. With a
    window that covers the map, this is ``keras.layers.MultiHeadAttention`` with identities as value
    and output projections.

    Args:
        key_channels: Channels of a head's queries and keys; None: the channels of a group.
        padding, dilation_rate: Positions of the windows; None: the involution layer's.
        **kwargs: As for ``Linear``.

    Call arguments:
        features: The involution's whole input, (B, *spatial, C) or (B, C, *spatial).
        mask: None, or a boolean tensor (B, *spatial): positions where it is False have zero weight.

    Source: Li et al., arXiv:2103.06255, section 3.3, on self-attention and involution.

    Example:

    >>> import numpy as np, involution
    >>> attention = involution.kernel_generators.PairwiseAttention()
    >>> layer = involution.Involution2D(5, kernel_generator=attention, return_kernel=True)
    >>> y, kernel = layer(np.ones((1, 8, 8, 32), "float32"))
    >>> tuple(kernel.shape)
    (1, 8, 8, 25, 2)
    """

    uses_full_input = True
    uses_mask = True
    accepts_initializers = False  # its convolutions compute queries and keys, not kernels

    @check_names
    def __init__(self, key_channels=None, *, padding=None, dilation_rate=None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.key_channels = (
            None if key_channels is None else standardize_tuple("key_channels", key_channels, 1)[0]
        )
        self.padding = padding
        self.dilation_rate = dilation_rate
        self._given = {
            **self._given,
            "key_channels": self.key_channels,
            "padding": padding,
            "dilation_rate": dilation_rate,
        }

    def standardize_attributes(self, input_shape):
        super().standardize_attributes(input_shape)
        rank = len(self.kernel_size)
        self.padding = standardize_padding(
            "padding", SAME if self.padding is None else self.padding, rank
        )
        self.dilation_rate = standardize_tuple(
            "dilation_rate", 1 if self.dilation_rate is None else self.dilation_rate, rank
        )
        inherited = {
            name: getattr(self, name) for name in INHERITED_ARGUMENTS if name != "upsampling"
        }
        # Queries and keys have the channels last.
        self.window = Window(**{**inherited, "data_format": CHANNELS_LAST})

    def _build_generator(self, channels):
        if self.key_channels is None:
            self.key_channels = max(channels // self.groups, 1)
        width = self.groups * self.key_channels
        self.query = self.make_convolution("query", width, channels)
        self.key = self.make_convolution("key", width, channels)

    def output_sizes(self, sizes):
        return self.window.output_sizes(sizes)

    def call(self, features, training=None, mask=None):
        return self.run_call(features, training, **({} if mask is None else {"mask": mask}))

    def _generate(self, features, mask=None):
        query = self.query(features[(slice(None), *every_center(self.window))])
        kernel = attention_kernel(query, self.key(features), self.window, mask)
        shape = (*ops.shape(query)[:-1], self.kernel_channels)
        return ops.reshape(ops.cast(kernel, self.compute_dtype), shape)

    def compute_mask(self, inputs, previous_mask):
        return None  # of the kernels

    def count_multiply_adds(self) -> int:
        """Multiply-adds of the queries and of the products, for each output position."""
        products = math.prod(self.kernel_size) * self.query.filters
        return math.prod(self.query.kernel.shape) + products

    def count_input_multiply_adds(self) -> int:
        """Multiply-adds of the keys, for each input position."""
        return math.prod(self.key.kernel.shape)
