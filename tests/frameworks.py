"""What the tests ask of whichever framework runs: arrays in and out, and gradients."""

import keras
import numpy as np

BACKEND = keras.config.backend()


def numpy(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor))


def gradients(function, arguments, cotangent):
    """Gradients of sum(function(*arguments) * cotangent) for every argument, as NumPy arrays."""
    if BACKEND == "jax":
        import jax

        _, pullback = jax.vjp(function, *map(jax.numpy.asarray, arguments))
        return [np.asarray(g) for g in pullback(jax.numpy.asarray(cotangent))]
    if BACKEND == "torch":
        import torch

        tensors = [torch.tensor(a, requires_grad=True) for a in arguments]
        return [
            g.numpy()
            for g in torch.autograd.grad(function(*tensors), tensors, torch.tensor(cotangent))
        ]
    import tensorflow as tf

    tensors = [tf.constant(a) for a in arguments]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        y = function(*tensors)
    return [g.numpy() for g in tape.gradient(y, tensors, tf.constant(cotangent))]


def in_graph(function):
    """``function`` as a compiled program where the framework has one: a second way to run it."""
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    return function
