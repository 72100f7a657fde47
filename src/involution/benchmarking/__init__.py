"""Time and memory of implementations, and the check of an installation."""
