"""The command ``involution``.

Separate from the package ``involution``, whose import loads Keras (2-5 s): this package parses the
command line, prints the first line and selects the backend before it imports ``involution``.
"""

from involution_cli.commands import app, main

__all__ = ["app", "main"]
