"""Self-contained HTML pages: templates, and figures as data URLs."""

import base64
import io
import pathlib

from PIL import Image

from involution.utils.atomic_files import write_text
from involution.utils.errors import CONTROL, InputError, escape_controls

try:
    import jinja2
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    from involution.visualize import fonts
except ImportError as error:
    raise InputError(
        "Reports require Matplotlib and Jinja: pip install 'involution[compare]'. "
        f"Received: no module {error.name}"
    ) from error


def write(path, template: pathlib.Path, **values):
    """Renders a template to a file. Values are HTML-escaped, and control characters in them become
    escape sequences. The template may include files from its folder and from this one."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, pathlib.Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: escape_controls(value, "\t\n") if type(value) is str else value,
    )
    write_text(path, environment.get_template(template.name).render(values))


def image(figure: Figure, format) -> bytes:
    """Encodes a figure as "png" or "svg", deterministically."""
    buffer = io.BytesIO()
    for text in figure.findobj(Text):
        # SVG files may not contain control characters.
        if CONTROL.search(text.get_text()):
            text.set_text(escape_controls(text.get_text(), "\n"))
    fonts.use_installed(figure)
    with matplotlib.rc_context({"svg.hashsalt": "involution"}):
        metadata = {"Date": None} if format == "svg" else None
        figure.savefig(buffer, format=format, dpi=110, metadata=metadata)
    return buffer.getvalue()


def png(figure: Figure) -> bytes:
    return image(figure, "png")


def thumbnail(pixels, side=128) -> str:
    """An image, uint8 (height, width, 3), as a data URL, reduced to at most ``side`` pixels."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    image.save(buffer, format="png")
    return data_url(buffer.getvalue())


def data_url(image: bytes) -> str:
    """A PNG file as a data URL."""
    return "data:image/png;base64," + base64.b64encode(image).decode()
