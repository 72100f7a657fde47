"""Heat maps of one's own images: what ``involution explain`` draws and says."""

import collections
import pathlib

import keras
import numpy as np

from involution.saving.classifier import Classifier
from involution.utils.atomic_files import atomic_write
from involution.utils.errors import InputError
from involution.visualize.activations import looks

TEMPLATE = pathlib.Path(__file__).with_name("explain.html.j2")

# By the names that the command knows: what is drawn, in the order of a page.
FIGURES = {
    "maps": "At each place the sum of the kernel generated there, over its window and the groups, "
    "beside the image and over it.",
    "outputs": "The same beside what the involution gives: the root mean square of its output over "
    "the channels.",
    "place": "What one place looks at: the window on the image, and the kernel there, the mean "
    "over its groups, before training (the same network with fresh weights) and after it.",
    "groups": "The kernels' sums for each group of channels.",
}


def write(
    classifier: Classifier, images, output, show="maps", place=(0.5, 0.5), top=3
) -> list[str]:
    """Draws images with the kernels of a model's involutions.

    Args:
        classifier: The model.
        images: Pairs: the name of a file, and the image as the classifier reads it.
        output: The file: .png and .svg get the figure ``show``, .html a page with all of them that
            opens without a network.
        show: One of ``FIGURES``. ``"place"`` and ``"groups"`` take one image.
        place: (row, column) that ``"place"`` is about, as shares of the image's sizes.
        top: How many classes a page shows.

    Returns:
        Lines that say what was drawn: each image's class, and the range of every map.

    Raises:
        InputError: The model has no involution, or what is asked for cannot be drawn or written.
    """
    try:
        from involution.visualize import html
    except ImportError as error:
        raise InputError(
            "Figures are drawn with Matplotlib: pip install 'involution[compare]'. "
            f"Received: no module {error.name}"
        ) from error
    output = pathlib.Path(output)
    _check(output, show, place, images)
    names, tensors = zip(*images, strict=True)
    pixels = np.concatenate(tensors)
    drawing = _Drawing(classifier, pixels, place)
    scores = classifier.predict_proba(pixels)
    best = [f"{classifier.class_names[s.argmax()]} {s.max():.2f}" for s in scores]
    try:
        if output.suffix == ".html":
            html.write(
                output,
                TEMPLATE,
                model=classifier.model.name,
                images=[
                    {
                        "name": str(names[i]),
                        "scores": [(classifier.class_names[k], scores[i, k]) for k in ranked],
                        "figures": {
                            name: html.data_url(html.png(getattr(drawing, name)([i])))
                            for name in FIGURES
                        },
                    }
                    for i, ranked in enumerate(scores.argsort(axis=-1)[:, ::-1][:, :top])
                ],
                captions=FIGURES,
            )
        else:
            figure = getattr(drawing, show)(range(len(names)), best)
            with atomic_write(output) as temporary:
                temporary.write_bytes(html.image(figure, output.suffix[1:]))
    except OSError as error:
        raise InputError(
            f"The output file must be writable. Received: {output}: {error.strerror}"
        ) from error
    lines = []
    for i, name in enumerate(names):
        ranges = (
            f"{layer} {m.shape[1]}x{m.shape[0]} from {m.min():.3g} to {m.max():.3g}"
            for layer, m in ((k, look.maps[i].sum(axis=-1)) for k, look in drawing.looks.items())
        )
        lines.append(f"{name}: {best[i]}; {', '.join(ranges)}")
    ran = collections.Counter(look.implementation for look in drawing.looks.values())
    counts = ", ".join(f"{count} x {name}" for name, count in ran.items())
    lines.append(f"Predictions run {counts}; here kernels were stored to be drawn")
    return [*lines, f"{'Page' if output.suffix == '.html' else 'Figure'}: {output}"]


def _check(output, show, place, images):
    if output.suffix not in (".png", ".svg", ".html"):
        raise InputError(f"The output must be a .png, .svg or .html file. Received: {output}")
    if len(place) != 2 or not all(0 <= share <= 1 for share in place):
        raise InputError(
            "A place must be its row and column as shares of the image's sizes, from 0 to 1. "
            f"Received: {', '.join(map(str, place))}"
        )
    if show in ("place", "groups") and output.suffix != ".html" and len(images) > 1:
        raise InputError(
            f"The figure {show} is of one image; a page (.html) takes several. "
            f"Received: {len(images)} images"
        )


class _Drawing:
    """The figures of some images; each method is one of ``FIGURES``, for some of the images."""

    def __init__(self, classifier, pixels, place):
        self.model, self.pixels, self.place_ = classifier.model, pixels, place
        self.looks = _looks_2d(self.model, pixels)
        if not self.looks:
            raise InputError(
                "A model must have an involution of images to be explained. "
                f"Received: {self.model.name}, which has none"
            )

    def maps(self, chosen, titles=None, **options):
        from involution.visualize import figures

        chosen = list(chosen)
        maps = {name: look.maps[chosen] for name, look in self.looks.items()}
        options = options or {"overlay": True}
        return figures.heat_maps(self.pixels[chosen], maps, titles, **options)

    def outputs(self, chosen, titles=None):
        chosen = list(chosen)
        activations = {name: look.activations[chosen] for name, look in self.looks.items()}
        return self.maps(chosen, titles, activations=activations)

    def groups(self, chosen, titles=None):
        from involution.visualize import figures

        (i,) = chosen
        return figures.group_maps({name: look.maps[i] for name, look in self.looks.items()})

    def place(self, chosen, titles=None):
        from involution.visualize import figures

        (i,) = chosen
        keras.utils.set_random_seed(0)
        fresh = keras.models.clone_model(self.model)
        kernels = {
            title: {name: look.kernel_at(i, self.place_) for name, look in found.items()}
            for title, found in (
                ("before training", _looks_2d(fresh, self.pixels)),
                ("after training", self.looks),
            )
        }
        windows = {name: look.window_at(self.place_) for name, look in self.looks.items()}
        return figures.place_kernels(self.pixels[i], self.place_, kernels, windows)


def _looks_2d(model, pixels):
    return {k: look for k, look in looks(model, pixels).items() if len(look.sizes) == 2}
