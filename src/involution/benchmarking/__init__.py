"""Benchmarks of the operator, and the diagnosis of an installation."""
