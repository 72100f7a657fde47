"""A warning for layers that a loop in plain PyTorch trains in inference mode.

On PyTorch, Keras's layers are modules, but ``train()`` and ``eval()`` do not change what they
compute: the argument ``training`` does, and None means inference. It cannot follow the module's
mode: a module is in training mode from its construction on, so that ``layer(x)`` would train on
PyTorch and infer on the other backends.
"""

import functools
import warnings
import weakref

import keras
import torch

from involution.kernel_generators.attachment import layers_within
from involution.kernel_generators.base import current_training
from involution.layers.recording import is_recording

_DEPEND_ON_TRAINING = (
    keras.layers.BatchNormalization,
    keras.layers.AlphaDropout,
    keras.layers.Dropout,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
)

# From a built layer to those of its sublayers that depend on ``training``.
_dependent: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

_warned = False


def warn_at_backward(layer, outputs):
    """Makes the first backward pass through a layer's outputs warn, once in a process.

    For the outputs of a call without ``training``. It has no effect on a layer that computes the
    same in training, after ``eval()``, without gradients, while calls are recorded, in a compiled
    program, or if a subclass's ``call`` has no ``training`` argument: only Keras knows then whether
    the enclosing model trains.
    """
    # First, so that compiled programs do not depend on the rest.
    if torch.compiler.is_compiling() or _warned:
        return
    node = (outputs[0] if isinstance(outputs, tuple) else outputs).grad_fn
    if node is None or not layer.training:
        return
    if current_training() is not None or is_recording():
        return
    if "training" in layer.call_signature_parameters and _depends_on_training(layer):
        # At the node: a hook of the tensor would be lost, with a warning, when it is pickled.
        names = type(layer).__name__, layer.name, layer.window.rank
        node.register_prehook(functools.partial(_warn, *names))


def _depends_on_training(layer) -> bool:
    if layer not in _dependent:
        sublayers = layers_within(layer)
        _dependent[layer] = weakref.WeakSet(
            sublayer for sublayer in sublayers if isinstance(sublayer, _DEPEND_ON_TRAINING)
        )
    return any(map(_is_active, _dependent[layer]))


def _is_active(sublayer) -> bool:
    """Whether training changes the sublayer's output: both can change between calls."""
    if isinstance(sublayer, keras.layers.BatchNormalization):
        return sublayer.trainable
    return getattr(sublayer, "rate", 0) > 0 or getattr(sublayer, "stddev", 0) > 0


def _warn(kind, name, rank, gradients):
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"{kind} {name!r} was called without `training`, which means inference: batch "
            "normalization used its moving statistics, and dropout was off. To train, pass "
            f"training=True to the layer or its model, or use involution.torch.Involution{rank}d, "
            "a plain module that follows train() and eval() and has its parameters before the "
            "first call. For gradients in inference, pass training=False.",
            stacklevel=2,
        )
