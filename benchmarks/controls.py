"""What rednet_tiny is compared with: the same network without involution, other networks of its
size, and generators of its own. Each function is a model for
``involution compare --models benchmarks/controls.py:NAME``.
"""

import keras
from keras import layers

from involution.models import conv_counterpart, rednet_tiny


def depthwise(input_shape, classes, kernel_size=3, **options):
    """rednet_tiny with a depthwise convolution in each involution's place."""
    return conv_counterpart(
        rednet_tiny(input_shape, classes, kernel_size=kernel_size, **options), "depthwise"
    )


def convolution(input_shape, classes, kernel_size=3, **options):
    """rednet_tiny with a convolution in each involution's place: a ResNet of bottlenecks."""
    return conv_counterpart(rednet_tiny(input_shape, classes, kernel_size=kernel_size, **options))


@keras.saving.register_keras_serializable(package="controls")
class Swish(keras.layers.Layer):
    """A generator of one's own in ten lines: two dense layers on means over the strides."""

    kernel_size = groups = strides = None  # which the involution fills in

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
