"""Involution for Keras 3: the operator, its layers and its models.

Importing registers the layers with Keras, so that saved models load without ``custom_objects``.
"""

# ruff: noqa: E402 - the backend is selected before Keras is imported.
import involution.utils.errors  # noqa: F401 - used by involution_cli.session if Keras's import fails
from involution.backend import select

select()

from involution import kernel_generators, models, ops, renamed
from involution.layers import Involution, Involution1D, Involution2D, Involution3D

renamed.install()

__version__ = "0.1.0"

__all__ = [
    "Involution",
    "Involution1D",
    "Involution2D",
    "Involution3D",
    "kernel_generators",
    "models",
    "ops",
]
