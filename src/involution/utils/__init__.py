"""Utilities without knowledge of involution."""
