"""Contents of the web demo: scores, and HTML with heat maps and kernels."""

import html
import io
import time

import keras
import matplotlib
import numpy as np
from PIL import Image

from involution.saving.classifier import Classifier
from involution.utils.errors import InputError, escape_controls
from involution.visualize.activations import (
    InvolutionRecord,
    capture_with_outputs,
    two_dimensional,
)
from involution.visualize.colors import DIVERGING_CMAP, SEQUENTIAL_CMAP
from involution.visualize.html import data_url


def classify(classifiers: dict[str, Classifier], file) -> dict[str, dict[str, float]]:
    """Probabilities by model and class for an image file, as from ``involution predict``."""
    images = _read(classifiers, file)
    return {
        name: _by_class(classifier, classifier.predict_proba(images[name])[0])
        for name, classifier in classifiers.items()
    }


def _by_class(classifier, scores) -> dict[str, float]:
    return dict(zip(map(escape_controls, classifier.class_names), map(float, scores), strict=True))


def _read(classifiers, file) -> dict[str, np.ndarray]:
    """The input of each classifier; the file is decoded once for each distinct preprocessing.

    Errors do not contain the path of the upload.
    """
    decoded: dict[tuple, np.ndarray] = {}
    try:
        for classifier in classifiers.values():
            preprocessing = classifier.image_shape, classifier.crop_fraction
            if preprocessing not in decoded:
                with open(file, "rb") as opened:
                    decoded[preprocessing] = classifier.read(opened)
    except OSError as error:
        raise InputError(
            f"The uploaded image must exist; upload it again. Received: {error.strerror}"
        ) from error
    return {name: decoded[c.image_shape, c.crop_fraction] for name, c in classifiers.items()}


class Explanation:
    """Scores, heat maps and kernels of several models for one image.

    They come from a single forward pass of each model.

    Args:
        classifiers: By name.
        file: An image file.

    Attributes:
        images: Each model's input, by name.
        scores: Probabilities by model and class.
        records: Each model's two-dimensional involutions, by model and layer name.
        seconds: Time of decoding and of the forward passes.
    """

    def __init__(self, classifiers: dict[str, Classifier], file):
        start = time.perf_counter()
        self.images = _read(classifiers, file)
        self.scores: dict[str, dict[str, float]] = {}
        self.records: dict[str, dict[str, InvolutionRecord]] = {}
        for name, classifier in classifiers.items():
            outputs, records = capture_with_outputs(classifier.model, self.images[name])
            outputs = keras.ops.convert_to_numpy(outputs)
            self.scores[name] = _by_class(classifier, classifier.probabilities(outputs)[0])
            self.records[name] = two_dimensional(records)
        self.seconds = time.perf_counter() - start

    def heat_maps(self) -> str:
        """Each model's input, and the heat map of every involution alone and as an overlay."""
        sections = []
        for name, records in self.records.items():
            if not records:
                sections.append(_section(name, f"<p>{_escape(name)} has no involutions.</p>"))
                continue
            image = _data_url(self.images[name][0])
            figures = [_figure(_img(image, "model input"), "model input")]
            for layer, record in records.items():
                values = record.heat_map[0].sum(axis=-1)
                heat_map = _data_url(_colorize(values))
                figures.append(
                    _figure(
                        _img(heat_map, f"heat map of {layer}")
                        + _img(image, f"heat map of {layer} over the image", overlay=heat_map),
                        f"{_escape(layer)}, {values.shape[1]}&times;{values.shape[0]}",
                        _colorbar(values.min(), values.max()),
                    )
                )
            sections.append(_section(name, f'<div class="maps">{"".join(figures)}</div>'))
        return "".join(sections)

    def kernels(self, point) -> str:
        """Every involution's window and kernel at a point, (row, column) from 0 to 1."""
        sections = []
        for name, records in self.records.items():
            figures = [self._kernel(name, *item, point) for item in records.items()]
            if figures:
                sections.append(_section(name, f'<div class="maps">{"".join(figures)}</div>'))
        return "".join(sections) or "<p>These models have no involutions.</p>"

    def _kernel(self, name, layer, record: InvolutionRecord, point):
        kernel = record.kernel_at(0, point).mean(axis=-1)
        extreme = float(np.abs(kernel).max()) or 1.0
        (top, bottom), (left, right) = (
            (100 * begin, 100 * end) for begin, end in record.window_at(point)
        )
        markers = (
            f'<i class="window" style="top:{top:.2f}%;left:{left:.2f}%;'
            f'height:{bottom - top:.2f}%;width:{right - left:.2f}%"></i>'
            f'<i class="point" style="top:{100 * point[0]:.2f}%;left:{100 * point[1]:.2f}%"></i>'
        )
        image = _img(_data_url(self.images[name][0]), f"window of {layer}", markers=markers)
        colors = matplotlib.colormaps[DIVERGING_CMAP]((kernel / extreme + 1) / 2)[..., :3]
        text = f"kernel of {layer}: " + "; ".join(
            ", ".join(f"{value:.2f}" for value in row) for row in kernel
        )
        groups = record.kernels.shape[-1]
        return _figure(
            image + _img(_data_url(colors), text, kind="kernel"),
            f"{_escape(layer)}, window {kernel.shape[0]}&times;{kernel.shape[1]}, mean of "
            f"{groups} group{'s' if groups > 1 else ''}",
            _colorbar(-extreme, extreme, DIVERGING_CMAP),
        )


def _escape(text) -> str:
    """Untrusted text as HTML."""
    return html.escape(escape_controls(text))


def _section(title, content) -> str:
    return f"<section><h3>{_escape(title)}</h3>{content}</section>"


def _figure(images, caption, colorbar="") -> str:
    """All arguments are HTML."""
    return f"<figure>{images}<figcaption>{caption}</figcaption>{colorbar}</figure>"


def _img(url, text, overlay=None, markers="", kind="clickable") -> str:
    above = f'<img class="overlay" src="{overlay}" alt="">' if overlay else ""
    return f'<span class="{kind}"><img src="{url}" alt="{_escape(text)}">{above}{markers}</span>'


def _colorbar(low, high, cmap=SEQUENTIAL_CMAP) -> str:
    colors = matplotlib.colormaps[cmap]
    stops = ",".join(
        "rgb({:.0f},{:.0f},{:.0f})".format(*(255 * np.asarray(colors(value)[:3])))
        for value in np.linspace(0, 1, 9)
    )
    return (
        f'<div class="colorbar" style="background:linear-gradient(to right,{stops})"></div>'
        f'<div class="limits"><span>{low:.3g}</span><span>{high:.3g}</span></div>'
    )


def _colorize(values) -> np.ndarray:
    """Colors of a map scaled from its minimum to its maximum, (height, width, 3)."""
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return matplotlib.colormaps[SEQUENTIAL_CMAP](scaled)[..., :3]


def _data_url(colors) -> str:
    """Colors from 0 to 1 as the data URL of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray((255 * colors + 0.5).astype("uint8")).save(buffer, format="png")
    return data_url(buffer.getvalue())
