"""The frameworks whose tensors the operator accepts, and the array functions of each.

A module of this package has the functions of ``keras.ops`` that the portable implementations need,
for the tensors of one framework and without Keras. The tensors of a call decide which is used, not
Keras's backend.
"""

import functools
import sys
from typing import Any

FRAMEWORKS = ("tensorflow", "jax", "torch")


def framework_of(x) -> str | None:
    """``"tensorflow"``, ``"jax"`` or ``"torch"`` for a tensor; None for other values, among them
    NumPy arrays and symbolic Keras tensors."""
    # A tensor's framework is loaded. PyTorch first, because torch.compile cannot trace a cache.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, (torch.Tensor, torch.SymInt)):
        return "torch"
    kind: Any = type(x)
    return _framework_of_type(kind)


@functools.cache
def _framework_of_type(kind: Any) -> str | None:
    jax = sys.modules.get("jax")
    if jax is not None and issubclass(kind, (jax.Array, jax.core.Tracer)):
        return "jax"
    tf, keras = sys.modules.get("tensorflow"), sys.modules.get("keras")
    # Keras's variables are tensors of TensorFlow by inheritance only.
    is_keras = keras is not None and issubclass(kind, keras.Variable)
    if tf is not None and not is_keras and issubclass(kind, (tf.Tensor, tf.Variable)):
        return "tensorflow"
    return None


def namespace(x):
    """The module of array functions for ``x``; ``keras.ops`` if it is of no framework here."""
    framework = framework_of(x)
    if framework == "torch":
        from involution.ops.frameworks import torch

        return torch
    if framework == "jax":
        from involution.ops.frameworks import jax

        return jax
    if framework == "tensorflow":
        from involution.ops.frameworks import tensorflow

        return tensorflow
    import keras

    return keras.ops


def is_exporting() -> bool:
    """Whether PyTorch exports a program, whose conditions on symbolic sizes would limit them."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_exporting()


def dtype_name(dtype) -> str:
    """The name of a dtype of any framework, such as ``"float32"``."""
    if isinstance(dtype, str):
        return dtype
    # PyTorch's dtypes have no names.
    return getattr(dtype, "name", None) or str(dtype).removeprefix("torch.")
