"""Kernel generators: Keras layers from features to involution kernels.

A generator is any layer that turns features (B, *spatial, C) into a kernel map
(B, *out_spatial, taps * groups), or both with the channels on axis 1 for ``"channels_first"``. The
channels of the map are tap-major: ``tap * groups + group``. Where an attribute ``kernel_size``,
``groups``, ``strides`` or ``data_format`` is None, the involution layer fills it in when built.
"""

import math

import keras
from keras import ops

from involution.ops.api import integers, standardize_data_format
from involution.ops.geometry import CHANNELS_FIRST, CHANNELS_LAST
from involution.ops.views import wide

# The paper's code: Kaiming's normal distribution over the outputs of a layer.
KAIMING = {
    "class_name": "VarianceScaling",
    "config": {"scale": 2.0, "mode": "fan_out", "distribution": "untruncated_normal"},
}


@keras.saving.register_keras_serializable(package="involution")
class Linear(keras.layers.Layer):
    """The simplest generator: average pooling by the strides, then one 1x1 convolution.

    Args:
        kernel_size: Window sizes, one for each spatial dimension; None: the involution layer's.
        groups: Number of kernels at each position; None: the involution layer's.
        strides: Size and distance of the pooled windows; None: the involution layer's.
        data_format: ``"channels_last"`` or ``"channels_first"``; None: the involution layer's.
        kernel_initializer, bias_initializer, kernel_regularizer, bias_regularizer: As in
            ``keras.layers.Conv2D``. The initial values are those of the paper's code.
        **kwargs: ``name``, ``dtype`` and so on, as in ``keras.layers.Layer``.

    Call arguments:
        features: Tensor (B, *spatial, C), or (B, C, *spatial) for ``"channels_first"``.

    Returns:
        Tensor (B, *out_spatial, taps * groups), or (B, taps * groups, *out_spatial), with
        ceil(n / stride) positions for n of the features.

    Example:

    >>> import numpy as np, involution
    >>> layer = involution.Involution2D(3, kernel_generator=involution.kernel_generators.Linear())
    >>> tuple(layer(np.ones((1, 8, 8, 32), "float32")).shape)
    (1, 8, 8, 32)
    """

    def __init__(
        self,
        kernel_size=None,
        groups=None,
        strides=None,
        data_format=None,
        kernel_initializer=KAIMING,
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.kernel_size = kernel_size
        self.groups = groups
        self.strides = strides
        self.data_format = data_format
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)

    def build(self, input_shape):
        rank = len(input_shape) - 2
        self.kernel_size = integers("kernel_size", self.kernel_size, rank)
        self.groups = integers("groups", self.groups, 1)[0]
        self.strides = integers("strides", 1 if self.strides is None else self.strides, rank)
        self.data_format = standardize_data_format(self.data_format)
        channels = input_shape[-1 if self.data_format == CHANNELS_LAST else 1]
        self._build_generator(channels)

    def _build_generator(self, channels):
        """Makes the sublayers for features of so many channels."""
        self.expand = self._pointwise(self._kernel_channels, channels)

    def _generate(self, features):
        """The kernel map of pooled features, both with the channels last."""
        return self.expand(features)

    @property
    def _kernel_channels(self) -> int:
        return math.prod(self.kernel_size) * self.groups

    def _pointwise(self, filters, channels, use_bias=True):
        """A 1x1 convolution with the channels last, which every backend has on every device."""
        rank = len(self.kernel_size)
        layer = getattr(keras.layers, f"Conv{rank}D")(
            filters,
            1,
            data_format=CHANNELS_LAST,
            use_bias=use_bias,
            kernel_initializer=_copy(self.kernel_initializer),
            bias_initializer=_copy(self.bias_initializer),
            kernel_regularizer=self.kernel_regularizer,
            bias_regularizer=self.bias_regularizer,
            dtype=self.dtype_policy,
        )
        layer.build((None,) * (rank + 1) + (channels,))
        return layer

    def call(self, features):
        if self.data_format == CHANNELS_FIRST:
            features = ops.moveaxis(features, 1, -1)
        kernel = self._generate(average_pool(features, self.strides))
        return ops.moveaxis(kernel, -1, 1) if self.data_format == CHANNELS_FIRST else kernel

    def compute_output_shape(self, input_shape):
        first = self.data_format == CHANNELS_FIRST
        spatial = tuple(input_shape[2:] if first else input_shape[1:-1])
        out = (
            None if n is None else -(-n // s) for n, s in zip(spatial, self.strides, strict=True)
        )
        if first:
            return (input_shape[0], self._kernel_channels, *out)
        return (input_shape[0], *out, self._kernel_channels)

    def get_config(self):
        return {
            **super().get_config(),
            "kernel_size": self.kernel_size,
            "groups": self.groups,
            "strides": self.strides,
            "data_format": self.data_format,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
        }


@keras.saving.register_keras_serializable(package="involution")
class Bottleneck(Linear):
    """The paper's generator: average pooling by the strides, a 1x1 convolution to
    C // reduction_ratio channels, batch normalization, ReLU, a 1x1 convolution to taps * groups.

    The first convolution has no bias; batch normalization has momentum 0.9 and epsilon 1e-5, as in
    the paper's code (0.99, 1e-3 and a bias in the keras.io example).

    Args:
        reduction_ratio: Channels of the features for each hidden channel.
        **kwargs: As for ``Linear``.

    Raises:
        ValueError: ``reduction_ratio`` leaves no hidden channel.

    Source: Li et al., arXiv:2103.06255, section 3 and algorithm 1.

    Example:

    >>> import numpy as np, involution
    >>> generator = involution.kernel_generators.Bottleneck(8, kernel_size=3, groups=2)
    >>> tuple(generator(np.ones((1, 8, 8, 32), "float32")).shape)
    (1, 8, 8, 18)
    """

    def __init__(self, reduction_ratio=4, **kwargs):
        super().__init__(**kwargs)
        self.reduction_ratio = integers("reduction_ratio", reduction_ratio, 1)[0]

    def _build_generator(self, channels):
        hidden = channels // self.reduction_ratio
        if hidden == 0:
            raise ValueError(
                "`reduction_ratio` must leave at least one hidden channel. "
                f"Received: reduction_ratio={self.reduction_ratio}, channels={channels}"
            )
        self.reduce = self._pointwise(hidden, channels, use_bias=False)
        self.normalization = keras.layers.BatchNormalization(
            momentum=0.9, epsilon=1e-5, dtype=self.dtype_policy
        )
        self.normalization.build((None,) * (len(self.kernel_size) + 1) + (hidden,))
        self.expand = self._pointwise(self._kernel_channels, hidden)

    def _generate(self, features):
        return self.expand(ops.relu(self.normalization(self.reduce(features))))

    def get_config(self):
        return {**super().get_config(), "reduction_ratio": self.reduction_ratio}


def average_pool(x, strides, centred=False):
    """Means over windows that tile ``x`` (B, *spatial, C): (B, *ceil(n / stride), C).

    The windows start at position 0, so that the last may be partial; ``centred`` they start as
    "same" places them, so that the first may be partial too. A partial window's mean is that of
    its real values.
    """
    if all(s == 1 for s in strides):
        return x
    shape = ops.shape(x)
    counts = [-(-n // s) for n, s in zip(shape[1:-1], strides, strict=True)]
    missing = [c * s - n for c, s, n in zip(counts, strides, shape[1:-1], strict=True)]
    around = [(m // 2, m - m // 2) if centred else (0, m) for m in missing]
    tiles = [size for pair in zip(counts, strides, strict=True) for size in pair]
    axes = tuple(range(2, 2 + 2 * len(strides), 2))

    def sums(values):
        padded = ops.pad(wide(values), [(0, 0), *around, (0, 0)])
        lead = ops.shape(values)
        return ops.sum(ops.reshape(padded, (lead[0], *tiles, lead[-1])), axis=axes)

    if all(isinstance(m, int) and m == 0 for m in missing):
        return ops.cast(sums(x) / math.prod(strides), x.dtype)
    return ops.cast(sums(x) / sums(ops.ones_like(x[:1, ..., :1])), x.dtype)


def _copy(initializer):
    """An initializer of its own for every weight: two weights from one would be equal."""
    return initializer.clone() if hasattr(initializer, "clone") else initializer


def get(identifier, reduction_ratio=4, dtype=None):
    """A generator from its name, its configuration or itself; None is ``"bottleneck"``.

    ``reduction_ratio`` and ``dtype`` are for a generator that is named.
    """
    if isinstance(identifier, dict):
        return keras.saving.deserialize_keras_object(identifier)
    if isinstance(identifier, keras.layers.Layer):
        return identifier
    name = "bottleneck" if identifier is None else str(identifier).lower()
    if name == "bottleneck":
        return Bottleneck(reduction_ratio, dtype=dtype)
    if name == "linear":
        return Linear(dtype=dtype)
    raise ValueError(
        "`kernel_generator` must be a Keras layer or one of bottleneck, linear. "
        f"Received: kernel_generator={identifier!r}"
    )
