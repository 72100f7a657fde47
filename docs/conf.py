"""Sphinx configuration; `make docs` builds docs/en and docs/ko."""

import inspect
import pathlib
import re
from importlib import metadata

from cyclopts.docs import generate_rst_docs
from docutils import nodes
from docutils.utils.math import latex2mathml

import involution_cli

DOCS = pathlib.Path(__file__).parent

project = "involution"
author = copyright = "The involution authors"
release = metadata.version("involution")
extensions = [
    "myst_parser",  # pages are Markdown
    "sphinx.ext.autodoc",  # the API reference, from docstrings
    "sphinx.ext.napoleon",  # Google style, as in Keras
]
myst_heading_anchors = 3
myst_enable_extensions = [
    "attrs_inline",  # links to English pages from Korean ones, see _link_english
    "dollarmath",
]
smartquotes_action = "qe"  # without dashes: options begin with two hyphens
html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"involution {release}"
html_static_path = ["static"]
html_css_files = ["pages.css"]
templates_path = ["templates"]
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "language.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}
html_context = {
    "translated": [
        page.relative_to(DOCS / "ko").with_suffix("").as_posix()
        for page in DOCS.glob("ko/**/*.md")
        if (DOCS / "en" / page.relative_to(DOCS / "ko")).is_file()
    ]
}
html_show_sourcelink = False
html_copy_source = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False  # "List of (name, reason)" is a text, not a type
napoleon_custom_sections = [("Call arguments", "params_style"), "Source"]


def setup(app):
    app.connect("autodoc-process-docstring", _escape, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", _signature)
    app.connect("source-read", _link_english)
    app.connect("source-read", _add_commands)
    app.connect("include-read", _link_benchmarks)
    app.add_html_math_renderer("mathml", (_math, None), (_math, None))


def _math(translator, node):
    """Writes MathML, which browsers show without scripts, fonts or a network."""
    is_block = node.tagname == "math_block"
    translator.body.append(latex2mathml.tex2mathml(node.astext(), as_block=is_block))
    raise nodes.SkipNode


def _link_english(app, page, source):
    """Links of Korean pages to English ones, which are files in the repository, lead to the pages
    of the English build."""
    if app.config.language == "ko":
        source[0] = re.sub(r"\]\(((?:\.\./)+en/[^)]*)\.md\)", r"](\1.html){.external}", source[0])


def _signature(app, what, name, obj, options, signature, returns):
    """The signature of a Keras layer is that of its constructor, which Keras wraps."""
    if what == "class" and "__init__" in vars(obj):
        init = inspect.signature(obj.__init__)
        # Without types, as all signatures: the descriptions have them.
        parameters = [p.replace(annotation=p.empty) for p in init.parameters.values()]
        return str(inspect.Signature(parameters[1:])), returns
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


def _add_commands(app, page, source):
    """Adds the reference of the commands, from their signatures and docstrings, to its page.

    The directive of cyclopts would show examples, which its plain text only indents, as quotations.
    """
    if page != "commands":
        return
    text = generate_rst_docs(
        involution_cli.app,
        heading_level=2,
        generate_toc=False,
        no_root_title=True,
        skip_preamble=True,
        usage_name="involution",
    )
    text, examples = re.subn(r"^For example:$", "For example::", text, flags=re.MULTILINE)
    if not examples:
        raise ValueError("The help of the commands must contain examples. Received: none")
    text = re.sub(r"^(--\S+)\n(-+)$", r"``\1``\n\2----", text, flags=re.MULTILINE)
    # cyclopts replaces the first word only of the running program, `python -m sphinx`.
    text = text.replace(" -m sphinx", "")
    source[0] += f"\n```{{eval-rst}}\n{text}\n```\n"


def _link_benchmarks(app, path, page, content):
    """Links of the changelog to the benchmark results lead to their page."""
    content[0] = content[0].replace("](benchmarks/results/README.md", "](docs/en/benchmarks.md")
