"""Array functions of JAX."""

import jax
import jax.numpy as jnp

concatenate = jnp.concatenate
expand_dims = jnp.expand_dims
matmul = jnp.matmul
moveaxis = jnp.moveaxis
ones_like = jnp.ones_like
pad = jnp.pad
reshape = jnp.reshape
softmax = jax.nn.softmax
stack = jnp.stack
sum = jnp.sum
swapaxes = jnp.swapaxes
where = jnp.where
zeros_like = jnp.zeros_like


def convert_to_tensor(x, like):
    return jnp.asarray(x)


def shape(x) -> tuple:
    return x.shape


def cast(x, dtype):
    return x.astype(dtype)
