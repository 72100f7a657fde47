"""Involution for PyTorch: plain modules, channels on axis 1. Keras is not imported."""

from involution.torch import functional, generators
from involution.torch.modules import Involution1d, Involution2d, Involution3d

__all__ = [
    "Involution1d",
    "Involution2d",
    "Involution3d",
    "functional",
    "generators",
]
