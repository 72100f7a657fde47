"""The involution operator and its implementations."""

from involution.ops.api import (
    fused_involution,
    generate_and_apply,
    implementations,
    involution,
    transposed_involution,
    window_products,
)
from involution.ops.dispatch import force_implementation, use

__all__ = [
    "force_implementation",
    "fused_involution",
    "generate_and_apply",
    "implementations",
    "involution",
    "transposed_involution",
    "use",
    "window_products",
]
