"""Control models for rednet_tiny: without involution, and with a custom kernel generator.

Each function is a model for ``involution compare --models benchmarks/controls.py:NAME``.
"""

import keras
from keras import layers

from involution.models import conv_counterpart, rednet_tiny


def depthwise(input_shape, classes, kernel_size=3, **options):
    """rednet_tiny with depthwise convolutions instead of involutions."""
    return conv_counterpart(
        rednet_tiny(input_shape, classes, kernel_size=kernel_size, **options), "depthwise"
    )


def convolution(input_shape, classes, kernel_size=3, **options):
    """rednet_tiny with convolutions instead of involutions: a bottleneck ResNet."""
    return conv_counterpart(rednet_tiny(input_shape, classes, kernel_size=kernel_size, **options))


@keras.saving.register_keras_serializable(package="controls")
class Swish(keras.layers.Layer):
    """A custom kernel generator: average pooling with the strides, then two dense layers."""

    kernel_size = groups = strides = None  # set by the involution layer

    def build(self, shape):
        self.pool = layers.AveragePooling2D(self.strides, padding="same")
        self.hidden = layers.Dense(shape[-1] // 4, activation="swish")
        self.out = layers.Dense(self.kernel_size[0] * self.kernel_size[1] * self.groups)
        self.hidden.build(shape)
        self.out.build((*shape[:-1], shape[-1] // 4))

    def call(self, x):
        return self.out(self.hidden(self.pool(x)))


def swish(input_shape, classes, **options):
    """rednet_tiny with kernels from ``Swish``."""
    return rednet_tiny(input_shape, classes, kernel_generator=Swish(), **options)
