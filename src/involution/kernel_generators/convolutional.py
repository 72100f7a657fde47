"""Generators whose kernels are the output of a 1x1 convolution, and their initializers.

The last convolution of ``Linear`` and its subclasses may be applied without being called, so that
no kernels are stored: see ``final_projection``.
"""

import math

import keras
from keras import ops

from involution.kernel_generators.base import KernelGenerator, check_names, training_argument
from involution.kernel_generators.pointwise import (
    affine,
    conv_class,
    has_plain_call,
)
from involution.kernel_generators.pooling import average_pool
from involution.ops.validation import (
    CAUSAL,
    CHANNELS_LAST,
    SAME,
    reduced_channels,
    standardize_tuple,
)

# Of normalization, as in the paper's code and in LSNet's.
EPSILON = 1e-5


def _normal(scale):
    return {
        "class_name": "VarianceScaling",
        "config": {"scale": scale, "mode": "fan_out", "distribution": "untruncated_normal"},
    }


# As in the paper's code: Kaiming (He) normal initialization, fan-out mode.
KAIMING = _normal(2.0)


@keras.saving.register_keras_serializable(package="involution")
class Linear(KernelGenerator):
    """The simplest generator: average pooling by the strides, then one 1x1 convolution.

    Args:
        kernel_size: Window sizes, one for each spatial dimension; None: the involution layer's.
        groups: Number of kernels at each position; None: the involution layer's.
        strides: Pool size and stride; None: the involution layer's.
        data_format: ``"channels_last"`` or ``"channels_first"``; None: the involution layer's.
        kernel_initializer, bias_initializer, kernel_regularizer, bias_regularizer: As in
            ``keras.layers.Conv2D``. The initial values are those of the paper's code.
        **kwargs: ``name``, ``dtype`` and so on, as in ``keras.layers.Layer``.

    Call arguments:
        features: Tensor (B, *spatial, C), or (B, C, *spatial) for ``"channels_first"``.
        training: As for any Keras layer; used by the batch normalization of ``Bottleneck``.

    Returns:
        Tensor (B, *out_spatial, taps * groups), or (B, taps * groups, *out_spatial), with
        ceil(n / stride) positions for n of the features.

    Example:

    >>> import numpy as np, involution
    >>> layer = involution.Involution2D(3, kernel_generator=involution.kernel_generators.Linear())
    >>> tuple(layer(np.ones((1, 8, 8, 32), "float32")).shape)
    (1, 8, 8, 32)
    """

    accepts_initializers = True
    padding = None  # the involution layer's

    @check_names
    def __init__(
        self,
        kernel_size=None,
        *,
        groups=None,
        strides=None,
        data_format=None,
        kernel_initializer=KAIMING,
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        **kwargs,
    ) -> None:
        super().__init__(
            kernel_size, groups=groups, strides=strides, data_format=data_format, **kwargs
        )
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)

    def _build_generator(self, channels):
        self.expand = self.make_convolution("expand", self.kernel_channels, channels)

    # Whether the kernels are ``normalized_kernels`` instead of ``expand(hidden)``.
    normalizes_kernels = False

    def _generate(self, features):
        hidden, offset = self.hidden(features), self.kernel_offset()
        kernels = (self.normalized_kernels if self.normalizes_kernels else self.expand)(hidden)
        return kernels if offset is None else kernels + ops.cast(offset, kernels.dtype)

    def normalized_kernels(self, hidden):
        """Kernels (B, *out_spatial, taps * groups) that depend on all of a sample's ``hidden``
        features."""
        raise NotImplementedError  # each generator that does has its own

    def kernel_offset(self):
        """A constant (taps * groups,) that is added to all kernels, or None."""
        return None

    def hidden(self, features):
        """Input of the last convolution, ``expand``: (B, *out_spatial, hidden channels), from
        features (B, *spatial, C)."""
        return average_pool(features, self.strides)

    def count_multiply_adds(self) -> int:
        """Multiply-adds of the convolutions, for each output position."""
        return math.prod(self.expand.kernel.shape)

    def make_convolution(self, name, filters, channels, use_bias=True, kernel_size=1):
        """A channels-last convolution, which every backend supports on every device."""
        rank = len(self.kernel_size)
        padding = CAUSAL if self.padding == CAUSAL else SAME
        layer = conv_class(rank, kernel_size, padding)(
            filters,
            kernel_size,
            padding=padding,
            data_format=CHANNELS_LAST,
            use_bias=use_bias,
            kernel_initializer=clone_initializer(self.kernel_initializer),
            bias_initializer=clone_initializer(self.bias_initializer),
            kernel_regularizer=self.kernel_regularizer,
            bias_regularizer=self.bias_regularizer,
            dtype=self.dtype_policy,
            name=name,
        )
        layer.build((None,) * (rank + 1) + (channels,))
        return layer

    def make_normalization(self, name, channels):
        """Batch normalization of channels-last features, as in the paper's code."""
        layer = keras.layers.BatchNormalization(
            momentum=0.9, epsilon=EPSILON, dtype=self.dtype_policy, name=name
        )
        layer.build((None,) * (len(self.kernel_size) + 1) + (channels,))
        return layer

    def get_config(self):
        return {
            **super().get_config(),
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
        }


@keras.saving.register_keras_serializable(package="involution")
class Bottleneck(Linear):
    """The paper's generator: average pooling by the strides, a 1x1 convolution to
    C // reduction_ratio channels, batch normalization, ReLU, a 1x1 convolution to taps * groups.

    With normalization, the first convolution has no bias. The normalization has momentum 0.9 and
    epsilon 1e-5, as in the paper's code (0.99, 1e-3 and a bias in the keras.io example).

    Args:
        reduction_ratio: Channels of the features for each hidden channel.
        use_normalization: Whether the hidden channels are normalized. If not, the first convolution
            has a bias.
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

    # Convolutions, and the normalization that follows each, if ``use_normalization``.
    NORMALIZED = (("reduce", "normalization"),)
    # Kernel size of the first convolution.
    _context_size = 1

    @check_names
    def __init__(self, reduction_ratio=4, *, use_normalization=True, **kwargs) -> None:
        super().__init__(**kwargs)
        self.use_normalization = bool(use_normalization)
        self.reduction_ratio = standardize_tuple("reduction_ratio", reduction_ratio, 1)[0]

    def _build_generator(self, channels):
        hidden = reduced_channels(channels, self.reduction_ratio)
        self.reduce = self.make_convolution(
            "reduce",
            hidden,
            channels,
            use_bias=not self.use_normalization,
            kernel_size=self._context_size,
        )
        if self.use_normalization:
            self.normalization = self.make_normalization("normalization", hidden)
        self.expand = self.make_convolution("expand", self.kernel_channels, hidden)

    def hidden(self, features):
        pooled = average_pool(features, self.strides)
        hidden = self.reduce(pooled)
        if self.use_normalization:
            hidden = self.normalization(hidden, **training_argument())
        return ops.relu(hidden)

    def count_multiply_adds(self) -> int:
        return super().count_multiply_adds() + math.prod(self.reduce.kernel.shape)

    @property
    def look_back(self) -> int:
        return self._context_size - 1

    def get_config(self):
        return {
            **super().get_config(),
            "reduction_ratio": self.reduction_ratio,
            "use_normalization": self.use_normalization,
        }


@keras.saving.register_keras_serializable(package="involution")
class Contextual(Bottleneck):
    """A bottleneck that uses a neighborhood: its first convolution has a larger kernel.

    Args:
        reduction_ratio: Channels of the features for each hidden channel.
        context_size: Side of the window that a kernel is generated from, in output positions.
        **kwargs: As for ``Linear``.

    Raises:
        ValueError: ``reduction_ratio`` leaves no hidden channel.

    Example:

    >>> import numpy as np, involution
    >>> generator = involution.kernel_generators.Contextual(4, context_size=5)
    >>> layer = involution.Involution2D(3, strides=2, kernel_generator=generator)
    >>> tuple(layer(np.ones((1, 9, 8, 32), "float32")).shape)
    (1, 5, 4, 32)
    """

    @check_names
    def __init__(self, reduction_ratio=4, *, context_size=3, **kwargs) -> None:
        super().__init__(reduction_ratio, **kwargs)
        self.context_size = self._context_size = standardize_tuple("context_size", context_size, 1)[
            0
        ]

    def get_config(self):
        return {**super().get_config(), "context_size": self.context_size}


# Methods of ``Linear`` that compute the kernels as ``expand(hidden(features))``.
_LINEAR = ("__call__", "call", "_generate")


def final_projection(generator, dtype):
    """Weight (hidden channels, taps * groups) and bias that turn a generator's ``hidden`` features
    into kernels of ``dtype``; None unless applying them is equivalent to calling the generator."""
    if not isinstance(generator, Linear) or not has_plain_call(generator):
        return None
    if generator.normalizes_kernels:
        return None
    kind = type(generator)
    if any(getattr(kind, name) is not getattr(Linear, name) for name in _LINEAR):
        return None
    # A subclass may have replaced the last layer.
    if "_generate" in vars(generator) or generator.compute_dtype != dtype:
        return None
    found = projection_of(generator.expand, dtype, generator.kernel_channels)
    offset = generator.kernel_offset()
    if found is None or offset is None:
        return found
    weight, bias = found
    return weight, bias + ops.cast(offset, bias.dtype)


def projection_of(layer, dtype, channels):
    """``affine`` of a generator's last layer; None unless it computes in ``dtype`` and has
    ``channels`` output channels."""
    found = affine(layer)
    if found is None or layer.compute_dtype != dtype or layer.filters != channels:
        return None
    return found


def clone_initializer(initializer):
    """A copy for each weight: one seeded initializer would give two weights equal values."""
    return initializer.clone() if hasattr(initializer, "clone") else initializer


def near_depthwise_init(taps):
    """Initializers that start a generator close to a depthwise convolution.

    The kernels are dominated by the biases, which differ between groups and are equal at all
    positions, with the distribution of He's initializer for depthwise kernels. The features'
    contribution is small. The paper's initialization gives kernels without a shared part.

    Args:
        taps: Positions of a window: 9 for 3x3.

    Returns:
        Dictionary of the arguments ``kernel_initializer`` and ``bias_initializer`` for ``Linear``,
        ``Bottleneck`` and ``Contextual``.

    Example:

    >>> import keras
    >>> from involution.kernel_generators import Bottleneck, near_depthwise_init
    >>> generator = Bottleneck(kernel_size=3, groups=8, **near_depthwise_init(9))
    >>> features = keras.random.normal((1, 32, 32, 32))
    >>> kernels = keras.ops.convert_to_numpy(generator(features))
    >>> bool(kernels.std(axis=(1, 2)).mean() < kernels.mean(axis=(1, 2)).std() / 3)
    True
    """
    (taps,) = standardize_tuple("taps", taps, 1)
    return {
        # A tenth of the paper's standard deviation; without effect on the first convolution, which
        # batch normalization follows.
        "kernel_initializer": _normal(0.02),
        "bias_initializer": {
            "class_name": "RandomNormal",
            "config": {"stddev": math.sqrt(2 / taps)},
        },
    }
