"""The involution operator and its implementations."""

from involution.ops.api import implementations, involution, use

__all__ = ["implementations", "involution", "use"]
