"""Array functions of TensorFlow."""

import math

import tensorflow as tf

broadcast_to = tf.broadcast_to
concatenate = tf.concat
exp = tf.exp
expand_dims = tf.expand_dims
maximum = tf.maximum
ones_like = tf.ones_like
pad = tf.pad
reshape = tf.reshape
stack = tf.stack
transpose = tf.transpose
where = tf.where
zeros_like = tf.zeros_like
cast = tf.cast


def convert_to_tensor(x, like):
    return tf.convert_to_tensor(x)


def shape(x) -> tuple:
    """Integers, or tensors for sizes that are known at run time only."""
    sizes = x.shape.as_list()
    if None not in sizes:
        return tuple(sizes)
    dynamic = tf.shape(x)
    return tuple(dynamic[i] if n is None else n for i, n in enumerate(sizes))


def flip(x, axis):
    return tf.reverse(x, [axis])


def moveaxis(x, source, destination):
    axes = list(range(len(x.shape)))
    axes.insert(destination % len(axes), axes.pop(source % len(axes)))
    return tf.transpose(x, axes)


def swapaxes(x, first, second):
    axes = list(range(len(x.shape)))
    axes[first], axes[second] = axes[second], axes[first]
    return tf.transpose(x, axes)


def sum(x, axis, keepdims=False):
    return tf.reduce_sum(x, axis, keepdims)


def matmul(a, b):
    # One product: tf.matmul would repeat a matrix for every index of the other axes.
    if len(b.shape) == 2 and len(a.shape) > 2:
        return tf.tensordot(a, b, axes=[[-1], [0]])
    return tf.matmul(a, b)


def softmax(x, axis):
    # With oneDNN, TensorFlow's supports at most five axes.
    sizes = shape(x)
    axis %= len(sizes)
    before, after = (math.prod(part) for part in (sizes[:axis], sizes[axis + 1 :]))
    return tf.reshape(tf.nn.softmax(tf.reshape(x, (before, sizes[axis], after)), axis=1), sizes)


def take(x, indices, axis):
    return tf.gather(x, indices, axis=axis)


def ones(shape, like):
    return tf.ones(shape, like.dtype)
