"""Array functions of JAX: those of ``jax.numpy``, and the ones below."""

import jax
import jax.numpy as jnp


def __getattr__(name):
    # At each use: exporters to ONNX replace functions of jax.numpy while they trace.
    return getattr(jnp, name)


def convert_to_tensor(x, like):
    return jnp.asarray(x)


def shape(x) -> tuple:
    return x.shape


def cast(x, dtype):
    return x.astype(dtype)


def softmax(x, axis):
    return jax.nn.softmax(x, axis)


def ones(shape, like):
    return jnp.ones(shape, like.dtype)
