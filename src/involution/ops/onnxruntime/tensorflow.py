"""Nodes in a graph that tf2onnx converts.

tf2onnx converts a function of Python by a handler. The function's last argument is a constant, the
node's name and attributes; it is never called.
"""

import json

import tensorflow as tf

from involution.ops.onnxruntime.domain import DOMAIN


def node(name, tensors, attributes, shape):
    description = tf.constant(json.dumps([name, attributes]))
    y = tf.numpy_function(_run, [*tensors, description], tensors[0].dtype)
    return tf.ensure_shape(y, shape)


def _run(*_):
    raise NotImplementedError("an operator of onnxruntime: TensorFlow can export it, not run it")


def convert(context, node, name, args):
    """tf2onnx's handler of a function of Python."""
    description = node.inputs[-1]
    if not (description.is_const() and node.get_attr_value("token")):
        raise ValueError("tf.numpy_function and tf.py_function cannot be exported")
    operator, attributes = json.loads(description.get_tensor_value())
    node.type, node.domain = operator, DOMAIN
    for attribute in list(node.attr):
        del node.attr[attribute]
    for attribute, value in attributes.items():
        node.set_attr(attribute, value)
    context.replace_inputs(node, list(node.input[:-1]))


# The argument ``custom_op_handlers`` of tf2onnx.
HANDLERS: dict[str, tuple] = {"PyFunc": (convert, [])}
