"""Involution: the operator, its layers and its models, for Keras, PyTorch and JAX.

``involution.ops`` computes with tensors of PyTorch, JAX and TensorFlow; ``involution.torch`` has
modules for PyTorch. Neither imports Keras, and the other names are loaded when they are used. Once
this package and Keras are imported, in any order, the layers are registered with Keras, so that
saved models load without ``custom_objects``.
"""

import importlib
from typing import TYPE_CHECKING

import involution.utils.errors  # noqa: F401 - used by involution_cli.session if Keras's import fails
from involution import keras_import, ops, renamed

if TYPE_CHECKING:
    from involution import kernel_generators, models
    from involution.layers import (
        Involution,
        Involution1D,
        Involution1DTranspose,
        Involution2D,
        Involution2DTranspose,
        Involution3D,
        Involution3DTranspose,
        InvolutionUpSampling1D,
        InvolutionUpSampling2D,
        InvolutionUpSampling3D,
    )

renamed.install()
keras_import.install()

__version__ = "0.2.0"

__all__ = [
    "Involution",
    "Involution1D",
    "Involution1DTranspose",
    "Involution2D",
    "Involution2DTranspose",
    "Involution3D",
    "Involution3DTranspose",
    "InvolutionUpSampling1D",
    "InvolutionUpSampling2D",
    "InvolutionUpSampling3D",
    "kernel_generators",
    "models",
    "ops",
]

LAYERS = tuple(name for name in __all__ if name.startswith("Involution"))
KERAS_PACKAGES = ("kernel_generators", "layers", "models")
PACKAGES = (*KERAS_PACKAGES, "compat", "onnx", "torch")


def __getattr__(name):
    if name in LAYERS or name in KERAS_PACKAGES:
        # First, as a thread that imports Keras does: two orders would be a deadlock.
        importlib.import_module("keras")
    if name in LAYERS:
        return getattr(importlib.import_module("involution.layers"), name)
    if name in PACKAGES:
        return importlib.import_module(f"involution.{name}")
    raise AttributeError(f"module 'involution' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *LAYERS, *PACKAGES})
