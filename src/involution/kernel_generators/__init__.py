"""Kernel generators: Keras layers from features to involution kernels.

A generator is any layer that turns features (B, *spatial, C) into a kernel map
(B, *out_spatial, taps * groups), or both with the channels on axis 1 for ``"channels_first"``. The
channels of the map are tap-major: ``tap * groups + group``. The involution layer, when built, sets
those attributes ``kernel_size``, ``groups``, ``strides``, ``padding``, ``dilation_rate`` and
``data_format`` that are None; the configuration keeps None, so that a layer built from it sets them
again. Features begin at the first window's center; if the generator's attribute ``uses_full_input``
is true, they are the layer's full input.

The last convolution of ``Linear`` and its subclasses may be applied without being called, so that
no kernels are stored: see ``final_projection``.
"""

from involution import renamed
from involution.kernel_generators.attention import PairwiseAttention
from involution.kernel_generators.base import (
    KernelGenerator,
    current_training,
    training_argument,
    training_scope,
)
from involution.kernel_generators.carafe import Carafe
from involution.kernel_generators.convolutional import (
    Bottleneck,
    Contextual,
    Linear,
    near_depthwise_init,
)
from involution.kernel_generators.large_context import LargeContext
from involution.kernel_generators.low_rank import LowRank
from involution.kernel_generators.pooling import average_pool
from involution.kernel_generators.registry import GENERATORS, get
from involution.kernel_generators.static import Static

__all__ = [
    "GENERATORS",
    "Bottleneck",
    "Carafe",
    "Contextual",
    "KernelGenerator",
    "LargeContext",
    "Linear",
    "LowRank",
    "PairwiseAttention",
    "Static",
    "average_pool",
    "current_training",
    "get",
    "near_depthwise_init",
    "training_argument",
    "training_scope",
]

__getattr__ = renamed.attributes(__name__, {"nearly_static": "near_depthwise_init"})
