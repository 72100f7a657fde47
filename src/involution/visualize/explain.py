"""Figures of the kernels generated for images: ``involution explain``."""

import collections
import functools
import pathlib

import keras
import numpy as np

from involution.saving.classifier import Classifier
from involution.utils.atomic_files import atomic_write
from involution.utils.errors import InputError
from involution.utils.progress import NullProgress
from involution.visualize.ablation import kernel_use
from involution.visualize.activations import ATTENTION_CAPTION, capture, two_dimensional

TEMPLATE = pathlib.Path(__file__).with_name("explain.html.j2")

# Captions of the figures of an image, in the order of a page.
FIGURES = {
    "heatmap": "Sum of the generated kernel's weights at each position, over all groups: next to "
    "the image, and as an overlay. Each map has its own color scale, from the 1st to the 99th "
    "percentile of its values.",
    "activations": "The same sum, and the root mean square (RMS) of the involution's output over "
    "its channels.",
    "point": "The window at one point of the image, and the mean of the kernel there over its "
    "groups: before training (the same network with newly initialized weights) and after training.",
    "groups": "Sum of the generated kernel's weights at each position, by group of channels. The "
    "maps of a layer share a color scale.",
}
USE = "use"
USE_CAPTION = (
    "Fraction of the images whose class stays the same when the generated kernels of a layer, or "
    "of all, are replaced: where it stays at 1, a convolution would do as well. Right: how much "
    "kernels differ between the places of an image, relative to their taps."
)

RENAMED_FIGURES = {"maps": "heatmap", "outputs": "activations", "place": "point"}


def write(
    classifier: Classifier,
    images,
    output,
    figure="heatmap",
    point=(0.5, 0.5),
    top=3,
    progress: NullProgress | None = None,
) -> list[str]:
    """Draws the kernels that a model's involutions generate for images.

    Args:
        classifier: The model.
        images: Pairs of a file name and the image as returned by ``Classifier.read``.
        output: The file: .png and .svg contain the figure ``figure``, .html is a self-contained
            page with all figures.
        figure: A key of ``FIGURES`` or ``RENAMED_FIGURES``, or ``"use"``. ``"point"`` and
            ``"groups"`` require a single image, ``"use"`` at least two; on a page, which has all
            figures of every image, ``"use"`` adds that of all images.
        point: (row, column) of the figure ``"point"`` in relative coordinates, from 0 to 1.
        top: Number of classes on a page.
        progress: Receives the progress of ``"use"``; None: none is reported.

    Returns:
        Lines to print: each image's class and the range of its heat maps, or the table of
        ``"use"``; the implementations that run in inference; the output file.

    Raises:
        InputError: The model has no involution, or an argument is invalid.
    """
    try:
        from involution.visualize import fonts, html
    except ImportError as error:
        raise InputError(
            "Figures require Matplotlib: pip install 'involution[compare]'. "
            f"Received: no module {error.name}"
        ) from error
    output = pathlib.Path(output)
    figure = RENAMED_FIGURES.get(figure, figure)
    _check(output, figure, point, images)
    names, tensors = zip(*images, strict=True)
    pixels = np.concatenate(tensors)
    # The use has no figure of an image, whose kernels would be kept for it.
    recorded = 1 if figure == USE and output.suffix != ".html" else len(pixels)
    figures = _Figures(classifier, pixels, point, progress, recorded)
    scores = classifier.predict_proba(pixels)
    best = [f"{classifier.class_names[s.argmax()]} {s.max():.2f}" for s in scores]
    if output.suffix == ".html":
        html.write(
            output,
            TEMPLATE,
            model=classifier.model.name,
            use=_data_url(figures.draw(USE)) if figure == USE else None,
            use_caption=USE_CAPTION,
            images=[
                {
                    "name": str(names[i]),
                    "scores": [(classifier.class_names[k], scores[i, k]) for k in ranked],
                    "figures": {name: _data_url(figures.draw(name, [i])) for name in FIGURES},
                }
                for i, ranked in enumerate(scores.argsort(axis=-1)[:, ::-1][:, :top])
            ],
            captions=FIGURES,
            attention=figures.attention,
        )
    else:
        drawn = figures.draw(figure, range(len(names)), best)
        with atomic_write(output) as temporary:
            temporary.write_bytes(html.image(drawn, output.suffix[1:]))
    if figure == USE:
        lines = ["Fraction of the images whose class stays the same:", *figures.use.table()]
    else:
        lines = figures.ranges(names, best)
    used = collections.Counter(record.implementation for record in figures.records.values())
    counts = ", ".join(f"{count} x {name}" for name, count in used.items())
    lines.append(f"Implementations in inference: {counts}; kernels were stored for the figures")
    warning = None if output.suffix == ".html" else fonts.warning(best)
    if warning is not None:
        lines.append(warning)
    return [*lines, f"{'Page' if output.suffix == '.html' else 'Figure'}: {output}"]


def _data_url(figure):
    from involution.visualize import html

    return html.data_url(html.png(figure))


def _check(output, figure, point, images):
    if output.suffix not in (".png", ".svg", ".html"):
        raise InputError(f"The output must be a .png, .svg or .html file. Received: {output}")
    if not output.parent.is_dir():
        raise InputError(f"The folder of the output file must exist. Received: {output}")
    known = (*FIGURES, USE)
    if figure not in known:
        raise InputError(f"`figure` must be one of {', '.join(known)}. Received: {figure!r}")
    if figure == USE and len(images) < 2:
        raise InputError(f"The figure use requires at least two images. Received: {len(images)}")
    if len(point) != 2 or not all(0 <= coordinate <= 1 for coordinate in point):
        raise InputError(
            "A point must be ROW,COLUMN in relative coordinates from 0 to 1. "
            f"Received: {', '.join(map(str, point))}"
        )
    if figure in ("point", "groups") and output.suffix != ".html" and len(images) > 1:
        raise InputError(
            f"The figure {figure} requires a single image, or an .html page. "
            f"Received: {len(images)} images"
        )


class _Figures:
    """Draws figures of the first ``recorded`` images from one forward pass over them."""

    def __init__(self, classifier, pixels, point, progress, recorded):
        self.model, self.pixels, self.point = classifier.model, pixels, point
        self.progress = progress
        self.records = _capture_2d(self.model, pixels[:recorded])
        if not self.records:
            raise InputError(
                "The model must have an involution with two spatial dimensions. "
                f"Received: {self.model.name}, which has none"
            )

    @property
    def attention(self) -> str:
        shown = any(record.is_attention for record in self.records.values())
        return ATTENTION_CAPTION if shown else ""

    @functools.cached_property
    def use(self):
        return kernel_use(self.model, self.pixels, progress=self.progress)

    @functools.cached_property
    def untrained(self):
        keras.utils.set_random_seed(0)
        return _capture_2d(keras.models.clone_model(self.model), self.pixels)

    def draw(self, figure, indices=(), titles=None):
        if figure == USE:
            from involution.visualize import figures

            return figures.use_chart(self.use)
        indices = list(indices)
        if figure == "point":
            return self._point(*indices)
        if figure == "groups":
            return self._groups(*indices)
        return self._heat_maps(indices, titles, with_activations=figure == "activations")

    def ranges(self, names, titles) -> list[str]:
        """A line for each image: its title and the range of its heat maps."""
        lines = []
        for i, (name, title) in enumerate(zip(names, titles, strict=True)):
            maps = {layer: r.heat_map[i].sum(axis=-1) for layer, r in self.records.items()}
            ranges = (
                f"{layer} {m.shape[1]}x{m.shape[0]} from {m.min():.3g} to {m.max():.3g}"
                for layer, m in maps.items()
            )
            lines.append(f"{name}: {title}; {', '.join(ranges)}")
        return lines

    def _heat_maps(self, indices, titles, with_activations):
        from involution.visualize import figures

        maps = {name: record.heat_map[indices] for name, record in self.records.items()}
        activations = (
            {name: record.activations[indices] for name, record in self.records.items()}
            if with_activations
            else None
        )
        return figures.heat_maps(
            self.pixels[indices],
            maps,
            titles,
            overlay=not with_activations,
            activations=activations,
        )

    def _groups(self, index):
        from involution.visualize import figures

        return figures.group_maps({name: r.heat_map[index] for name, r in self.records.items()})

    def _point(self, index):
        from involution.visualize import figures

        kernels = {
            title: {name: r.kernel_at(index, self.point) for name, r in records.items()}
            for title, records in (
                ("before training", self.untrained),
                ("after training", self.records),
            )
        }
        windows = {name: record.window_at(self.point) for name, record in self.records.items()}
        return figures.kernels_at(self.pixels[index], self.point, kernels, windows)


def _capture_2d(model, pixels):
    return two_dimensional(capture(model, pixels))
