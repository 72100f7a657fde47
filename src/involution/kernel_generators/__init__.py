"""Kernel generators: Keras layers from features to involution kernels.

A generator is any layer that turns features (B, *spatial, C) into a kernel map
(B, *out_spatial, taps * groups), or both with the channels on axis 1 for ``"channels_first"``. The
channels of the map are tap-major: ``tap * groups + group``. Where an attribute ``kernel_size``,
``groups``, ``strides``, ``padding``, ``dilation_rate`` or ``data_format`` is None, the involution
layer fills it in when built, and again when a layer of the same configuration is built; the
configuration has None. Features begin at the first window's centre; a generator with a true
attribute ``whole_input`` gets the layer's input as it is.

The last convolution of ``Linear`` and its subclasses may be applied without being called, so that
no kernels are stored: see ``expansion``.
"""

from involution.kernel_generators.generators import (
    GENERATORS,
    Bottleneck,
    Contextual,
    KernelGenerator,
    Linear,
    PairwiseAttention,
    Static,
    average_pool,
    current_training,
    get,
    nearly_static,
    training_scope,
)

__all__ = [
    "GENERATORS",
    "Bottleneck",
    "Contextual",
    "KernelGenerator",
    "Linear",
    "PairwiseAttention",
    "Static",
    "average_pool",
    "current_training",
    "get",
    "nearly_static",
    "training_scope",
]
