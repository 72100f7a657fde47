"""The passes in TensorFlow, compiled by XLA in graphs."""

import functools

import tensorflow as tf

from involution.ops.autodiff.tensorflow import differentiable
from involution.ops.taps.passes import compute


def _compiled_in_graph(pass_, window, x_sizes, a, b):
    # Compiling takes some 0.5 s for each new shape: too long for one eager call.
    if tf.executing_eagerly():
        return compute(pass_, window, x_sizes, a, b)
    compiled = tf.function(functools.partial(compute, pass_, window, x_sizes), jit_compile=True)
    return compiled(a, b)


call = differentiable(_compiled_in_graph, compute)
