"""The command ``involution``.

Separate from the package ``involution``, most of whose modules import Keras, which takes seconds:
this package parses the command line, prints the first line and selects the backend before that.
"""

from involution_cli.commands import app, main

__all__ = ["app", "main"]
