"""Sphinx configuration; `make docs` builds docs/en and docs/ko."""

import inspect
import re
from importlib import metadata

project = "involution"
author = copyright = "The involution authors"
release = metadata.version("involution")
extensions = [
    "myst_parser",  # pages are Markdown
    "sphinx.ext.autodoc",  # the API reference, from docstrings
    "sphinx.ext.napoleon",  # Google style, as in Keras
]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "involution"
html_show_sourcelink = False
html_copy_source = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Call arguments", "params_style"), "Source"]


def setup(app):
    app.connect("autodoc-process-docstring", _escape, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", _signature)


def _signature(app, what, name, obj, options, signature, returns):
    """The signature of a Keras layer is that of its constructor, which Keras wraps."""
    if what == "class" and "__init__" in vars(obj):
        init = inspect.signature(obj.__init__)
        return str(init.replace(parameters=list(init.parameters.values())[1:])), returns
    for base in obj.__mro__[1:] if what == "class" else ():
        if "__init__" in vars(base) and base.__module__.startswith("involution"):
            return _signature(app, what, name, base, options, signature, returns)
    return None


def _escape(app, what, name, obj, options, lines):
    """Escapes asterisks in shapes such as (B, *spatial, C), which are not emphasis."""
    lines[:] = [
        line if line.lstrip().startswith(">>>") else re.sub(r"(?<![*`\w])\*(?=\w)", r"\\*", line)
        for line in lines
    ]
