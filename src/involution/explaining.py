"""Heat maps of one's own images: what ``involution explain`` draws and says."""

import pathlib

import numpy as np

from involution.errors import InputError
from involution.files import replacing
from involution.saved_model import Classifier


def write(classifier: Classifier, images, output) -> list[str]:
    """Draws the images with their kernels' heat maps, beside and over them, into a PNG file.

    ``images`` are pairs: the name of a file, and the image as the classifier reads it.

    Returns:
        Lines that say what was drawn: each image's class, and the range of every map.

    Raises:
        InputError: The model has no involution, or the file cannot be written.
    """
    try:
        from involution import visualize
    except ImportError as error:
        raise InputError(
            "Figures are drawn with Matplotlib: pip install 'involution[compare]'. "
            f"Received: no module {error.name}"
        ) from error
    files, tensors = zip(*images, strict=True)
    pixels = np.concatenate(tensors)
    maps = visualize.kernel_maps(classifier.model, pixels)
    if not maps:
        raise InputError(
            "A model must have an involution to be explained. "
            f"Received: {classifier.model.name}, which has none"
        )
    scores = classifier.scores(pixels)
    best = [f"{classifier.class_names[s.argmax()]} {s.max():.2f}" for s in scores]
    figure = visualize.heat_maps(pixels, maps, best, overlay=True)
    output = pathlib.Path(output)
    try:
        with replacing(output) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
    except OSError as error:
        raise InputError(
            f"The output file must be writable. Received: {output}: {error.strerror}"
        ) from error
    lines = []
    for i, file in enumerate(files):
        ranges = (
            f"{name} {m.shape[2]}x{m.shape[1]} from {m[i].min():.3g} to {m[i].max():.3g}"
            for name, m in maps.items()
        )
        lines.append(f"{file}: {best[i]}; {', '.join(ranges)}")
    return [*lines, f"Figure: {output}"]
