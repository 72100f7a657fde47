"""What the page says of an image: scores, heat maps and kernels, as HTML of one piece."""

import base64
import html
import io
import time

import numpy as np
from matplotlib import colormaps
from PIL import Image

from involution.saving.classifier import Classifier
from involution.utils.errors import InputError, escape_controls
from involution.visualize.activations import Look, looks

ORDERED, SIGNED = (colormaps[name] for name in ("cividis", "PuOr"))


def scores(classifiers: dict[str, Classifier], file) -> dict[str, dict[str, float]]:
    """Probabilities by model and class for an image file: what ``involution predict`` says."""
    return {
        name: dict(
            zip(
                map(escape_controls, classifier.class_names),
                map(float, classifier.predict_proba(_read(classifier, file))[0]),
                strict=True,
            )
        )
        for name, classifier in classifiers.items()
    }


def _read(classifier, file) -> np.ndarray:
    """An upload, whose path is nothing for a visitor to see: errors name none."""
    try:
        with open(file, "rb") as opened:
            return classifier.read(opened)
    except OSError as error:
        raise InputError(
            f"An image must be there, or be uploaded again. Received: {error.strerror}"
        ) from error


class Explanation:
    """One image, and what the involutions of several models make of it.

    Args:
        classifiers: By name; those without involutions say so.
        file: An image file.
    """

    def __init__(self, classifiers: dict[str, Classifier], file):
        start = time.perf_counter()
        self.images = {name: _read(c, file) for name, c in classifiers.items()}
        self.looks = {
            name: {k: v for k, v in looks(c.model, self.images[name]).items() if len(v.sizes) == 2}
            for name, c in classifiers.items()
        }
        self.seconds = time.perf_counter() - start

    def maps(self) -> str:
        """The heat maps of every involution, beside the image as its model sees it."""
        parts = []
        for name, of_model in self.looks.items():
            if not of_model:
                parts.append(_section(name, f"<p>{_escaped(name)} has no involutions.</p>"))
                continue
            image = _data_url(self.images[name][0])
            figures = [_figure(_picture(image, "the image"), "the image, as the model sees it")]
            for layer, look in of_model.items():
                values = look.maps[0].sum(axis=-1)
                text = f"heat map of {layer} over the image"
                figures.append(
                    _figure(
                        _picture(_data_url(_coloured(values)), f"heat map of {layer}")
                        + _picture(image, text, _data_url(_coloured(values))),
                        f"{_escaped(layer)}, {values.shape[1]}&times;{values.shape[0]}",
                        _bar(values.min(), values.max()),
                    )
                )
            parts.append(_section(name, f'<div class="maps">{"".join(figures)}</div>'))
        return "".join(parts)

    def kernels(self, place) -> str:
        """What a place looks at, (row, column) as shares of the image: windows and kernels."""
        parts = []
        for name, of_model in self.looks.items():
            figures = [self._kernel(name, layer, look, place) for layer, look in of_model.items()]
            if figures:
                parts.append(_section(name, f'<div class="maps">{"".join(figures)}</div>'))
        return "".join(parts) or "<p>These models have no involutions.</p>"

    def _kernel(self, name, layer, look: Look, place):
        kernel = look.kernel_at(0, place).mean(axis=-1)
        extreme = float(np.abs(kernel).max()) or 1.0
        (top, bottom), (left, right) = (
            (100 * begin, 100 * end) for begin, end in look.window_at(place)
        )
        box = (
            f'<i class="window" style="top:{top:.2f}%;left:{left:.2f}%;'
            f'height:{bottom - top:.2f}%;width:{right - left:.2f}%"></i>'
            f'<i class="place" style="top:{100 * place[0]:.2f}%;left:{100 * place[1]:.2f}%"></i>'
        )
        picture = _picture(_data_url(self.images[name][0]), f"window of {layer}", inside=box)
        colours = SIGNED((kernel / extreme + 1) / 2)[..., :3]
        text = f"kernel of {layer}: " + "; ".join(
            ", ".join(f"{value:.2f}" for value in row) for row in kernel
        )
        return _figure(
            picture + _picture(_data_url(colours), text, kind="kernel"),
            f"{_escaped(layer)}, window {kernel.shape[0]}&times;{kernel.shape[1]}, mean of "
            f"{look.kernels.shape[-1]} group{'s' if look.kernels.shape[-1] > 1 else ''}",
            _bar(-extreme, extreme, SIGNED),
        )


def _escaped(text) -> str:
    """A text of a file's as HTML."""
    return html.escape(escape_controls(text))


def _section(title, inside) -> str:
    return f"<section><h3>{_escaped(title)}</h3>{inside}</section>"


def _figure(pictures, caption, more="") -> str:
    """``caption`` and the rest are HTML."""
    return f"<figure>{pictures}<figcaption>{caption}</figcaption>{more}</figure>"


def _picture(url, text, over=None, inside="", kind="picture") -> str:
    above = f'<img class="over" src="{over}" alt="">' if over else ""
    return f'<span class="{kind}"><img src="{url}" alt="{_escaped(text)}">{above}{inside}</span>'


def _bar(low, high, colours=ORDERED) -> str:
    stops = ",".join(
        "rgb({:.0f},{:.0f},{:.0f})".format(*(255 * np.asarray(colours(share)[:3])))
        for share in np.linspace(0, 1, 9)
    )
    return (
        f'<div class="bar" style="background:linear-gradient(to right,{stops})"></div>'
        f'<div class="ends"><span>{low:.3g}</span><span>{high:.3g}</span></div>'
    )


def _coloured(values) -> np.ndarray:
    """A map as colours, (height, width, 3), from its lowest to its highest."""
    low, high = float(values.min()), float(values.max())
    return ORDERED((values - low) / (high - low) if high > low else np.zeros_like(values))[..., :3]


def _data_url(colours) -> str:
    """Colours from 0 to 1 as a PNG file within the page."""
    buffer = io.BytesIO()
    Image.fromarray((255 * colours + 0.5).astype("uint8")).save(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
