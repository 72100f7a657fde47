"""The generator of CARAFE: kernels for upsampling, from coarse features and from fine ones."""

import math

import keras
from keras import ops

from involution.kernel_generators.base import KernelGenerator, check_names
from involution.kernel_generators.pointwise import conv_class
from involution.ops.tensor_utils import depth_to_space
from involution.ops.validation import CAUSAL, CHANNELS_LAST, SAME, standardize_tuple


@keras.saving.register_keras_serializable(package="involution")
class Carafe(KernelGenerator):
    """Kernels on a grid that is finer than the features by ``upsampling``, as in CARAFE.

    A 1x1 convolution to ``hidden_channels``, a convolution of ``encoder_size`` to taps * groups
    channels for each phase of the fine grid, and a pixel shuffle; no normalization, no activation.
    With a guide, which has features at the fine positions, two such convolutions of the guide give
    kernels that are added, as in FADE. In causal layers the convolutions are causal.

    Args:
        hidden_channels: Channels after the 1x1 convolutions.
        encoder_size: Kernel size of the other convolutions.
        kernel_size, groups, upsampling, data_format: None: the involution layer's.
        kernel_initializer: Of the 1x1 convolutions.
        encoder_initializer: Of the other convolutions. Biases start at zero.
        **kwargs: ``name``, ``dtype`` and so on, as in ``keras.layers.Layer``.

    Call arguments:
        features: Tensor (B, *spatial, C), or (B, C, *spatial) for ``"channels_first"``; or a list
            of it and of the guide, (B, *out_spatial, D) or (B, D, *out_spatial).

    Returns:
        Tensor (B, *out_spatial, taps * groups), or (B, taps * groups, *out_spatial), with
        ``upsampling`` times the positions of the features.

    Source: Wang et al., "CARAFE: Content-Aware ReAssembly of FEatures", ICCV 2019,
    arXiv:1905.02188; with a guide Lu et al., "FADE", ECCV 2022, arXiv:2207.10392.

    Example:

    >>> import numpy as np, involution
    >>> generator = involution.kernel_generators.Carafe(32, kernel_size=5, groups=1, upsampling=2)
    >>> tuple(generator(np.ones((1, 8, 7, 16), "float32")).shape)
    (1, 16, 14, 25)
    """

    padding = None  # the involution layer's

    @check_names
    def __init__(
        self,
        hidden_channels=64,
        *,
        encoder_size=3,
        kernel_size=None,
        groups=None,
        upsampling=None,
        data_format=None,
        kernel_initializer="glorot_uniform",
        encoder_initializer=None,
        **kwargs,
    ) -> None:
        super().__init__(kernel_size, groups=groups, data_format=data_format, **kwargs)
        self.hidden_channels = standardize_tuple("hidden_channels", hidden_channels, 1)[0]
        self.encoder_size = standardize_tuple("encoder_size", encoder_size, 1)[0]
        self.upsampling = upsampling
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        # As in the authors' code.
        self.encoder_initializer = keras.initializers.get(
            {"class_name": "RandomNormal", "config": {"stddev": 0.001}}
            if encoder_initializer is None
            else encoder_initializer
        )
        self._given = {
            "kernel_size": kernel_size,
            "groups": groups,
            "upsampling": upsampling,
            "data_format": data_format,
        }

    def build(self, input_shape):
        shapes = _shapes(input_shape)
        self.standardize_attributes(shapes[0])
        axis = -1 if self.data_format == CHANNELS_LAST else 1
        kernels = self.kernel_channels
        self.compressor = self._convolution("compressor", 1, self.hidden_channels, shapes[0][axis])
        self.encoder = self._convolution(
            "encoder",
            self.encoder_size,
            kernels * math.prod(self.upsampling),
            self.hidden_channels,
        )
        self.has_guide = len(shapes) > 1
        if self.has_guide:
            self.guide_compressor = self._convolution(
                "guide_compressor", 1, self.hidden_channels, shapes[1][axis]
            )
            self.guide_encoder = self._convolution(
                "guide_encoder", self.encoder_size, kernels, self.hidden_channels
            )

    def standardize_attributes(self, input_shape):
        super().standardize_attributes(input_shape)
        self.upsampling = standardize_tuple(
            "upsampling", 1 if self.upsampling is None else self.upsampling, len(self.kernel_size)
        )

    def _convolution(self, name, kernel_size, filters, channels):
        rank = len(self.kernel_size)
        padding = CAUSAL if self.padding == CAUSAL else SAME
        initializer = self.kernel_initializer if kernel_size == 1 else self.encoder_initializer
        layer = conv_class(rank, kernel_size, padding)(
            filters,
            kernel_size,
            padding=padding,
            data_format=CHANNELS_LAST,
            kernel_initializer=initializer.clone(),
            dtype=self.dtype_policy,
            name=name,
        )
        layer.build((None,) * (rank + 1) + (channels,))
        return layer

    def output_sizes(self, sizes) -> tuple:
        return tuple(
            None if n is None else n * u for n, u in zip(sizes, self.upsampling, strict=True)
        )

    def call(self, features, training=None):
        features, guide = features if isinstance(features, (list, tuple)) else (features, None)
        last = self.data_format == CHANNELS_LAST
        if not last:
            features = ops.moveaxis(features, 1, -1)
        kernels = self.encoder(self.compressor(features))
        kernels = depth_to_space(kernels, self.upsampling)
        if guide is not None:
            guide = guide if last else ops.moveaxis(guide, 1, -1)
            kernels = kernels + self.guide_encoder(self.guide_compressor(guide))
        return kernels if last else ops.moveaxis(kernels, -1, 1)

    def compute_output_shape(self, input_shape):
        return super().compute_output_shape(_shapes(input_shape)[0])

    def count_multiply_adds(self) -> int:
        """Multiply-adds of the guide's convolutions, for each output position."""
        layers = (self.guide_compressor, self.guide_encoder) if self.has_guide else ()
        return sum(math.prod(layer.kernel.shape) for layer in layers)

    def count_input_multiply_adds(self) -> int:
        """Multiply-adds of the features' convolutions, for each input position."""
        return sum(math.prod(layer.kernel.shape) for layer in (self.compressor, self.encoder))

    def get_config(self):
        config = {
            **super().get_config(),
            "hidden_channels": self.hidden_channels,
            "encoder_size": self.encoder_size,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "encoder_initializer": keras.initializers.serialize(self.encoder_initializer),
        }
        config.pop("strides", None)
        return config


def _shapes(input_shape) -> list:
    """The shapes of the features and of the guide, if there is one."""
    return list(input_shape) if isinstance(input_shape[0], (tuple, list)) else [input_shape]
