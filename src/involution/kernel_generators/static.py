"""A generator of one kernel for all positions."""

import keras
from keras import ops

from involution.kernel_generators.base import KernelGenerator, check_names


@keras.saving.register_keras_serializable(package="involution")
class Static(KernelGenerator):
    """One kernel for all positions: depthwise convolution, expressed as involution.

    With as many groups as channels, the layer is ``keras.layers.DepthwiseConv2D`` without a bias;
    with fewer, channels share their kernels.

    Args:
        kernel_size, groups, strides, data_format: As for ``Linear``.
        kernel_initializer, kernel_regularizer: Of the weight (*kernel_size, groups).
        **kwargs: ``name``, ``dtype`` and so on, as in ``keras.layers.Layer``.

    Example:

    >>> import keras, numpy as np, involution
    >>> static = involution.kernel_generators.Static(kernel_initializer="ones")
    >>> layer = involution.Involution2D(3, groups=4, kernel_generator=static)
    >>> y = layer(np.ones((1, 5, 5, 4), "float32"))
    >>> float(keras.ops.convert_to_numpy(y)[0, 0, 0, 0])
    4.0
    """

    @check_names
    def __init__(
        self,
        kernel_size=None,
        *,
        groups=None,
        strides=None,
        data_format=None,
        kernel_initializer="glorot_uniform",
        kernel_regularizer=None,
        **kwargs,
    ) -> None:
        super().__init__(
            kernel_size, groups=groups, strides=strides, data_format=data_format, **kwargs
        )
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)

    def _build_generator(self, channels):
        self.kernel = self.add_weight(
            shape=(*self.kernel_size, self.groups),
            initializer=self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            name="kernel",
        )

    def _generate(self, features):
        batch, *sizes, _ = ops.shape(features)
        kernel = ops.reshape(self.kernel, (self.kernel_channels,))
        return ops.broadcast_to(
            ops.cast(kernel, self.compute_dtype),
            (batch, *self.output_sizes(sizes), self.kernel_channels),
        )

    def count_multiply_adds(self) -> int:
        """Multiply-adds for each position: 0, because nothing is generated."""
        return 0

    def get_config(self):
        return {
            **super().get_config(),
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
        }
