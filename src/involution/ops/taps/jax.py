"""The passes in JAX, each compiled to one program."""

import jax

from involution.ops.autodiff.jax import differentiable
from involution.ops.taps.passes import compute

call = differentiable(jax.jit(compute, static_argnums=(0, 1, 2)))
