"""The documentation: `make docs` builds docs/en and docs/ko with this."""

import inspect
import re
from importlib import metadata

project = "involution"
author = copyright = "The involution authors"
release = metadata.version("involution")
extensions = [
    "myst_parser",  # pages are Markdown
    "sphinx.ext.autodoc",  # the reference is the docstrings
    "sphinx.ext.napoleon",  # which are Google's form, as Keras's
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
    """Keras's layers hide what they take."""
    if what == "class" and "__init__" in vars(obj):
        taken = inspect.signature(obj.__init__)
        return str(taken.replace(parameters=list(taken.parameters.values())[1:])), returns
    for base in obj.__mro__[1:] if what == "class" else ():
        if "__init__" in vars(base) and base.__module__.startswith("involution"):
            return _signature(app, what, name, base, options, signature, returns)
    return None


def _escape(app, what, name, obj, options, lines):
    """Shapes are written (B, *spatial, C), which is no emphasis."""
    lines[:] = [
        line if line.lstrip().startswith(">>>") else re.sub(r"(?<![*`\w])\*(?=\w)", r"\\*", line)
        for line in lines
    ]
