"""The layers."""

from involution.layers.involution_nd import (
    Call,
    Involution,
    Involution1D,
    Involution2D,
    Involution3D,
    InvolutionND,
    involutions,
    recording,
)

__all__ = [
    "Call",
    "Involution",
    "Involution1D",
    "Involution2D",
    "Involution3D",
    "InvolutionND",
    "involutions",
    "recording",
]
