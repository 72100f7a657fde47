"""Involution for PyTorch: plain modules, channels on axis 1. Keras is not imported."""

from involution.torch import functional, generators
from involution.torch.lazy import LazyInvolution1d, LazyInvolution2d, LazyInvolution3d
from involution.torch.lsnet import LSNet, lsnet_b, lsnet_s, lsnet_t
from involution.torch.modules import Involution1d, Involution2d, Involution3d
from involution.torch.rednet import (
    RedNet,
    rednet26,
    rednet38,
    rednet50,
    rednet101,
    rednet152,
    rednet_tiny,
)
from involution.torch.transposed import (
    InvolutionTranspose1d,
    InvolutionTranspose2d,
    InvolutionTranspose3d,
)
from involution.torch.upsampling import (
    InvolutionUpsample1d,
    InvolutionUpsample2d,
    InvolutionUpsample3d,
)

__all__ = [
    "Involution1d",
    "Involution2d",
    "Involution3d",
    "InvolutionTranspose1d",
    "InvolutionTranspose2d",
    "InvolutionTranspose3d",
    "InvolutionUpsample1d",
    "InvolutionUpsample2d",
    "InvolutionUpsample3d",
    "LSNet",
    "LazyInvolution1d",
    "LazyInvolution2d",
    "LazyInvolution3d",
    "RedNet",
    "functional",
    "generators",
    "lsnet_b",
    "lsnet_s",
    "lsnet_t",
    "rednet26",
    "rednet38",
    "rednet50",
    "rednet101",
    "rednet152",
    "rednet_tiny",
]
