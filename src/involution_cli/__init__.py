"""The command ``involution``.

A package beside ``involution``, whose import loads Keras (2-5 s): this one parses the command line,
prints its first line and selects the backend before it imports ``involution``.
"""

from involution_cli.commands import app, main

__all__ = ["app", "main"]
