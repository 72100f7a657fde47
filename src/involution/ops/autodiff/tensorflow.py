"""The passes with derivatives in TensorFlow."""

import tensorflow as tf

from involution.ops.autodiff import gradients


def differentiable(compute, composite):
    """``compute(pass_, window, sizes, a, b)`` with the derivatives of ``VJP_RULES``.

    Args:
        compute: Computes a pass. ``sizes`` are the spatial sizes of the operator's input, which the
            other tensors do not determine.
        composite: The same as a composition of TensorFlow's own differentiable ops, for forward
            mode in graphs.
    """

    def call(pass_, window, sizes, a, b):
        # Variables are read here: they may change before the gradient is computed.
        a, b = tf.convert_to_tensor(a), tf.convert_to_tensor(b)
        if _has_tangents(a, b):
            # In a graph, reverse mode over forward mode would add the derivatives of the ops and
            # those of the custom gradient.
            return composite(pass_, window, sizes, a, b)

        @tf.custom_gradient
        def run_pass(a, b):
            def gradient(c):
                return gradients(call, pass_, window, sizes, (a, b, c))

            if tf.executing_eagerly():
                # stop_gradient: a tape would record the ops inside and keep their tensors. In a
                # graph no tape does, and vectorized_map, which drops custom gradients, needs the
                # gradients of the ops.
                return compute(
                    pass_, window, sizes, tf.stop_gradient(a), tf.stop_gradient(b)
                ), gradient
            return compute(pass_, window, sizes, a, b), gradient

        return run_pass(a, b)

    return call


def _has_tangents(*tensors) -> bool:
    """Whether TensorFlow's forward mode traces a graph with tangents of these tensors."""
    if tf.executing_eagerly():
        return False
    try:
        from tensorflow.python.eager.forwardprop_util import pack_tangents
    except ImportError:
        return False  # private API, which may be missing
    return bool(pack_tangents(tensors).tangents)
