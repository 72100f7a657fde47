"""The operator under the names, signatures and layouts of other libraries.

Each function computes with tensors of TensorFlow, JAX or PyTorch, or with arrays of NumPy, which
become tensors of Keras's backend. Keras is not imported for tensors.
"""

from involution.compat.causal import headwise_dynamic_convolution, lowrank_dynamic_convolution
from involution.compat.outlook import outlook_attention
from involution.compat.upsampling import carafe, convex_upsample
from involution.compat.windows import adaptive_conv, propagate, ska

__all__ = [
    "adaptive_conv",
    "carafe",
    "convex_upsample",
    "headwise_dynamic_convolution",
    "lowrank_dynamic_convolution",
    "outlook_attention",
    "propagate",
    "ska",
]
