"""The involution operator and its implementations."""

from involution.ops.api import generate_and_apply, implementations, involution, use, window_products

__all__ = ["generate_and_apply", "implementations", "involution", "use", "window_products"]
