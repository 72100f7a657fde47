"""The layers: the keras.io example's, and the paper's in one to three dimensions."""

import keras

from involution import renamed
from involution.kernel_generators.attachment import layers_within
from involution.layers.base import BaseInvolution
from involution.layers.involution_nd import (
    Involution1D,
    Involution2D,
    Involution3D,
    InvolutionND,
)
from involution.layers.keras_io import Involution
from involution.layers.offset_attention import OffsetAttention
from involution.layers.recording import InvolutionTrace, record_involutions
from involution.layers.transposed import (
    Involution1DTranspose,
    Involution2DTranspose,
    Involution3DTranspose,
)
from involution.layers.upsampling import (
    InvolutionUpSampling1D,
    InvolutionUpSampling2D,
    InvolutionUpSampling3D,
)

__all__ = [
    "Involution",
    "Involution1D",
    "Involution1DTranspose",
    "Involution2D",
    "Involution2DTranspose",
    "Involution3D",
    "Involution3DTranspose",
    "InvolutionND",
    "InvolutionTrace",
    "InvolutionUpSampling1D",
    "InvolutionUpSampling2D",
    "InvolutionUpSampling3D",
    "OffsetAttention",
    "involutions",
    "record_involutions",
]

__getattr__ = renamed.attributes(
    __name__, {"Call": "InvolutionTrace", "recording": "record_involutions"}
)


def involutions(layer) -> list[keras.layers.Layer]:
    """The involution layers in a layer or model, each once: the layer itself, and those in nested
    models and in attributes of other layers, such as wrappers."""
    return [sublayer for sublayer in layers_within(layer) if isinstance(sublayer, BaseInvolution)]
