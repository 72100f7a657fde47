"""The involution operator and its implementations."""

from involution.ops.api import implementations, involution, use, window_products

__all__ = ["implementations", "involution", "use", "window_products"]
