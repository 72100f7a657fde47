"""A drop-in replacement for the layer of the keras.io example."""

from typing import Any

import keras
from keras import ops

from involution.kernel_generators.base import training_argument
from involution.kernel_generators.convolutional import projection_of
from involution.kernel_generators.pointwise import has_plain_call
from involution.kernel_generators.pooling import average_pool
from involution.layers.base import BaseInvolution, input_channels
from involution.ops.centers import check_groups
from involution.ops.validation import CHANNELS_LAST, INTERLEAVED, check_axes, standardize_tuple
from involution.ops.window import Window


@keras.saving.register_keras_serializable(package="involution")
class Involution(BaseInvolution):
    """The layer of the keras.io example "Involutional neural networks", as a drop-in.

    It has the same arguments and weights in the same order, and computes the same numbers;
    ``.keras`` and ``.weights.h5`` files of the example load into it. Unlike the original, it
    supports unknown and changing sizes, odd sizes with strides, every backend, saving and loading.

    It differs from the paper's layer (``Involution2D``) as the example does: channel c belongs to
    group c % group_number, padding and the strided average pooling are ``"same"``, the first
    convolution has a bias, and batch normalization has Keras's defaults.

    Args:
        channel: Sets the hidden width of the kernel generator, channel // reduction_ratio. It does
            not change the output, which always has the input's channels. None: the input's.
        group_number: Number of groups; divides the input's channels.
        kernel_size: Side of the square window.
        stride: Stride along height and width.
        reduction_ratio: See ``channel``.
        name: Name of the layer.
        return_kernel: Whether to return (output, kernel), as the example does, or only the output,
            as a ``keras.Sequential`` requires.
        **kwargs: ``dtype``, ``trainable`` and so on, as in ``keras.layers.Layer``.

    Call arguments:
        inputs: Tensor (B, H, W, C).
        training: Whether batch normalization uses the batch's statistics. None: inherited from the
            enclosing layer or model, or False if there is none.

    Returns:
        ``(output, kernel)`` with shapes (B, H', W', C) and (B, H', W', kernel_size**2, 1,
        group_number), where H' = ceil(H / stride); or ``output`` alone.

    Raises:
        ValueError: An argument is out of its range, the hidden width is 0, ``group_number`` does
            not divide the input's channels, or the input does not have four axes.

    Example:

    >>> import numpy as np, involution
    >>> output, kernel = involution.Involution(3, 1, 5, 2, 1, "inv")(np.ones((2, 33, 32, 3)))
    >>> tuple(output.shape), tuple(kernel.shape)
    ((2, 17, 16, 3), (2, 17, 16, 25, 1, 1))
    """

    def __init__(
        self,
        channel: int | None = None,
        group_number: int = 1,
        kernel_size: int = 3,
        stride: int = 1,
        reduction_ratio: int = 1,
        name: str | None = None,
        return_kernel: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, **kwargs)
        self.channel = None if channel is None else standardize_tuple("channel", channel, 1)[0]
        self.group_number = standardize_tuple("group_number", group_number, 1)[0]
        self.kernel_size = standardize_tuple("kernel_size", kernel_size, 1)[0]
        self.stride = standardize_tuple("stride", stride, 1)[0]
        self.reduction_ratio = standardize_tuple("reduction_ratio", reduction_ratio, 1)[0]
        self.return_kernel = bool(return_kernel)
        self.input_spec = keras.layers.InputSpec(ndim=4)
        self.window = Window(
            self.kernel_size,
            self.stride,
            groups=self.group_number,
            group_layout=INTERLEAVED,
            data_format=CHANNELS_LAST,
            rank=2,
        )

    def build(self, input_shape):
        check_axes(self, input_shape, 2)
        channels = input_channels(input_shape, CHANNELS_LAST)
        check_groups("group_number", self.group_number, channels)
        width = channels if self.channel is None else self.channel
        hidden = width // self.reduction_ratio
        if hidden == 0:
            raise ValueError(
                "`channel` // `reduction_ratio` must be at least 1. "
                f"Received: channel={width}, reduction_ratio={self.reduction_ratio}"
            )
        layers = keras.layers
        common = {"data_format": CHANNELS_LAST, "dtype": self.dtype_policy}
        # Keras's automatic names depend on a process-wide count, which would give equal models
        # different weight paths. These are the names of the first layers of their classes.
        self.kernel_gen = keras.Sequential(
            [
                layers.Conv2D(hidden, 1, name="conv2d", **common),
                layers.BatchNormalization(dtype=self.dtype_policy, name="batch_normalization"),
                layers.ReLU(dtype=self.dtype_policy, name="re_lu"),
                layers.Conv2D(self.window.taps * self.group_number, 1, name="conv2d_1", **common),
            ],
            name="sequential",
        )
        # A Sequential casts its input to its own policy's dtype.
        self.kernel_gen.dtype_policy = self.dtype_policy
        self.kernel_gen.build((None, None, None, channels))

    def generate_kernel(self, inputs, **context):
        """The kernels for ``inputs``: (B, H', W', kernel_size**2, group_number)."""
        pooled = self._pooled(inputs)
        kernel = self.kernel_gen(pooled, **training_argument())
        batch, height, width, _ = ops.shape(kernel)
        shape = (batch, height, width, self.window.taps, self.group_number)
        return ops.cast(ops.reshape(kernel, shape), inputs.dtype)

    def _generator_projection(self, inputs):
        overridden = (
            getattr(self.generate_kernel, "__func__", None) is not Involution.generate_kernel
        )
        generator = self.kernel_gen
        # A subclass may set any layer as its generator.
        if self.return_kernel or overridden or type(generator) is not keras.Sequential:
            return None
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        if generator.compute_dtype != dtype or not has_plain_call(generator):
            return None
        layers = generator.layers
        channels = self.window.taps * self.group_number
        return projection_of(layers[-1], dtype, channels) if layers else None

    def _generator_hidden(self, inputs):
        hidden = self._pooled(inputs)
        for layer in self.kernel_gen.layers[:-1]:
            hidden = layer(hidden, **training_argument())
        return hidden

    def generator_input_shape(self, input_shape):
        """Shape of the generator's input, for a layer input of this shape."""
        batch, *sizes, channels = input_shape
        return (batch, *self.window.output_sizes(sizes), channels)

    def _pooled(self, inputs):
        # Keras's "same" pooling computes different means on PyTorch than on TensorFlow and JAX.
        return average_pool(inputs, (self.stride,) * 2, centered=True)

    def _returned(self, kernel):
        return ops.expand_dims(kernel, -2)

    def compute_output_shape(self, input_shape):
        check_axes(self, input_shape, 2)
        batch, height, width, channels = input_shape
        height, width = self.window.output_sizes((height, width))
        output = (batch, height, width, channels)
        if not self.return_kernel:
            return output
        return output, (batch, height, width, self.window.taps, 1, self.group_number)

    def get_config(self):
        return {
            **super().get_config(),
            "channel": self.channel,
            "group_number": self.group_number,
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "reduction_ratio": self.reduction_ratio,
            "return_kernel": self.return_kernel,
        }
