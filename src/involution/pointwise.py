"""Convolutions with windows of one position as products of matrices, which they are.

On PyTorch Keras copies channels-last images twice on their way into a convolution: in RedNet the
convolutions of this kind take twice as long that way. Elsewhere it makes no difference.
"""

import keras

from involution.ops.problem import check_axes
from involution.ops.views import matmul


class _Pointwise(keras.layers.Layer):
    """For a Keras convolution with a window of 1, channels last: its product, by ``matmul``."""

    rank: int
    strides: tuple[int, ...]

    def build(self, input_shape):
        check_axes(self, input_shape, self.rank)
        super().build(input_shape)
        # Keras sets the least number of axes; the product would take more, and leave them as is.
        axes = {-1: input_shape[-1]}
        self.input_spec = keras.layers.InputSpec(ndim=self.rank + 2, axes=axes)

    def compute_output_shape(self, input_shape):
        check_axes(self, input_shape, self.rank)
        return super().compute_output_shape(input_shape)

    def convolution_op(self, inputs, kernel):
        if any(s > 1 for s in self.strides):
            inputs = inputs[(slice(None), *(slice(None, None, s) for s in self.strides))]
        return matmul(inputs, kernel[(0,) * self.rank])


@keras.saving.register_keras_serializable(package="involution")
class PointwiseConv1D(_Pointwise, keras.layers.Conv1D):
    """``keras.layers.Conv1D`` with a window of 1, channels last."""


@keras.saving.register_keras_serializable(package="involution")
class PointwiseConv2D(_Pointwise, keras.layers.Conv2D):
    """``keras.layers.Conv2D`` with a window of 1, channels last."""


@keras.saving.register_keras_serializable(package="involution")
class PointwiseConv3D(_Pointwise, keras.layers.Conv3D):
    """``keras.layers.Conv3D`` with a window of 1, channels last."""


POINTWISE = {1: PointwiseConv1D, 2: PointwiseConv2D, 3: PointwiseConv3D}


def convolution(rank, kernel_size):
    """The layer class for a convolution, channels last, with windows of this side."""
    return POINTWISE[rank] if kernel_size == 1 else getattr(keras.layers, f"Conv{rank}D")
