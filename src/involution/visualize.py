"""Figures: curves, samples, and the kernels of involutions as heat maps.

Every function returns a ``matplotlib.figure.Figure`` of its own; nothing is shown and no global
state of Matplotlib is touched. The colours (cividis, Okabe and Ito's) keep their order in print and
for the colour-blind.
"""

import keras
import numpy as np
from matplotlib.figure import Figure

from involution.layers import Involution, InvolutionND
from involution.ops.geometry import CHANNELS_LAST

TRAIN, TEST = "#0072B2", "#D55E00"
COLOURS = "cividis"


def involutions(model) -> list[keras.layers.Layer]:
    """The 2D involutions of a functional model, in its order; not those of models inside it."""
    return [
        layer
        for layer in model.layers
        if isinstance(layer, Involution) or (isinstance(layer, InvolutionND) and layer.rank == 2)
    ]


def kernels(model, images) -> dict[str, np.ndarray]:
    """The kernels that every 2D involution of a functional model generates for ``images``.

    Returns:
        By name of the layer, in the model's order: (N, height, width, taps, groups).
    """
    layers = involutions(model)
    if not layers:
        return {}
    features = keras.Model(model.input, [layer.input for layer in layers])
    found = {}
    for layer, x in zip(layers, _as_list(features(images, training=False)), strict=True):
        kernel = keras.ops.convert_to_numpy(layer.generate_kernel(x)).astype("float32")
        if getattr(layer, "data_format", CHANNELS_LAST) != CHANNELS_LAST:
            kernel = np.moveaxis(kernel, (1, 2), (-2, -1))
        found[layer.name] = kernel
    return found


def kernel_maps(model, images) -> dict[str, np.ndarray]:
    """The ``sums`` of the kernels that a model generates for ``images``."""
    return sums(kernels(model, images))


def sums(kernels) -> dict[str, np.ndarray]:
    """The sum of every kernel over its window and the groups: (N, height, width) by layer."""
    return {name: kernel.sum(axis=(-2, -1)) for name, kernel in kernels.items()}


def curves(histories) -> Figure:
    """Loss and accuracy by epoch, train and test, one column for each model on the same axes.

    Args:
        histories: By label, the rows of a model: dicts with ``epoch`` and the measures.
    """
    figure = Figure(figsize=(4.2 * max(len(histories), 2), 6.4), layout="constrained")
    axes = figure.subplots(2, len(histories), sharex=True, sharey="row", squeeze=False)
    for column, (label, rows) in enumerate(histories.items()):
        epochs = [row["epoch"] for row in rows]
        for ax, measure in zip(axes[:, column], ("loss", "accuracy"), strict=True):
            for part, colour, style in (("train", TRAIN, "-"), ("test", TEST, "--")):
                values = [row[f"{part}_{measure}"] for row in rows]
                ax.plot(epochs, values, style, color=colour, marker="o", ms=3, label=part)
            ax.set_title(f"{label}: {measure}", parse_math=False)
            ax.set_xlabel("epoch")
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.set_ylabel("cross-entropy (nats)" if measure == "loss" else "accuracy (share)")
            ax.tick_params(labelbottom=True, labelleft=True)
            ax.grid(alpha=0.3)
            ax.legend()
    return figure


def costs(models) -> Figure:
    """Accuracy on the test images against the trainable parameters and the multiply-adds.

    Args:
        models: By label, dictionaries with ``test_accuracy``, ``trainable_params`` and
            ``multiply_adds``; models that lack one of them are left out where it matters.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    columns = {"trainable_params": "trainable parameters", "multiply_adds": "multiply-adds"}
    for ax, (cost, title) in zip(figure.subplots(1, 2, sharey=True), columns.items(), strict=True):
        for label, model in models.items():
            if None in (model[cost], model["test_accuracy"]):
                continue
            point = (model[cost], model["test_accuracy"])
            ax.plot(*point, "o", color=TEST)
            ax.annotate(
                label,
                point,
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=8,
                parse_math=False,
            )
        ax.set_xscale("log")
        ax.set_xlabel(title)
        ax.margins(x=0.25, y=0.15)
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("accuracy on the test images (share)")
    return figure


def samples(images, labels, class_names, seed, rows=5, columns=5) -> Figure:
    """A grid of images with their classes, drawn by the seed: as many of every class as fit."""
    figure = Figure(figsize=(1.8 * columns, 2.0 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.axis("off")
    chosen = across_classes(labels, rows * columns, seed)
    for ax, i in zip(axes, chosen, strict=False):
        ax.imshow(images[i])
        ax.set_title(class_names[labels[i]], fontsize=9, parse_math=False)
    return figure


def across_classes(labels, count, seed) -> np.ndarray:
    """Indices of ``count`` examples, drawn by the seed, the classes taking turns."""
    random = np.random.default_rng(seed)
    mixed = random.permutation(len(labels))
    turn = np.zeros(len(labels), "int64")
    for name in np.unique(labels):
        of_class = mixed[labels[mixed] == name]
        turn[of_class] = np.arange(len(of_class))
    return mixed[np.lexsort((labels[mixed], turn[mixed]))][:count]


def heat_maps(images, maps, titles=None, overlay=False) -> Figure:
    """One row for each image: the image, and beside it each involution's kernels as a heat map.

    A value is the sum of the kernel generated at that place over its window and the groups. Every
    map has its own colour bar; a constant map is drawn flat and says so.

    Args:
        images: (N, height, width, 3), uint8, or float from 0 to 1.
        maps: As ``kernel_maps`` gives them for these images.
        titles: What to write over each image.
        overlay: Whether to draw every map a second time, over the image.
    """
    columns = 1 + len(maps) * (2 if overlay else 1)
    figure = Figure(figsize=(2.6 * columns, 2.3 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), columns, squeeze=False)
    for row, image in enumerate(images):
        axes[row, 0].imshow(image)
        title = titles[row] if titles else "image"
        axes[row, 0].set_title(title, fontsize=9, parse_math=False)
        free = iter(axes[row, 1:])
        for name, values in maps.items():
            _heat_map(figure, next(free), name, values[row])
            if overlay:
                _heat_map(figure, next(free), f"{name} over the image", values[row], image)
    for ax in axes.ravel():
        ax.set_xticks([])
        ax.set_yticks([])
    return figure


def _heat_map(figure, ax, name, values, image=None):
    finite = values[np.isfinite(values)]
    # A model that diverged has no finite kernels; the picture then says so.
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    # Differences below the precision of the sum are rounding, not a pattern.
    flat = high - low <= 1e-6 * max(abs(low), abs(high))
    remark = ", not finite" if finite.size < values.size else ", constant" if flat else ""
    height, width = values.shape
    extent = (0, width, height, 0)
    if image is not None:
        ax.imshow(image, extent=extent)
    limits = {"vmin": low - 0.5, "vmax": low + 0.5} if flat else {"vmin": low, "vmax": high}
    alpha = None if image is None else 0.6
    drawn = ax.imshow(
        np.where(np.isfinite(values), low, np.nan) if flat else values,
        cmap=COLOURS,
        extent=extent,
        alpha=alpha,
        interpolation="nearest",
        **limits,
    )
    bar = figure.colorbar(drawn, ax=ax, shrink=0.85)
    bar.ax.tick_params(labelsize=7)
    if flat:
        bar.set_ticks([low])
    ax.set_title(f"{name} ({width}x{height}{remark})", fontsize=9, parse_math=False)


def words(kernel, filters, places) -> Figure:
    """What "location-specific and channel-agnostic" means: kernels as each channel sees them.

    Args:
        kernel: An involution's kernels for one image, (height, width, K, K): one group.
        filters: A convolution's kernel, (K, K, channels).
        places: Up to four (row, column) of the image, to compare.
    """
    channels = filters.shape[-1]
    width = 1.3 * (2 * len(places) + 2)
    figure = Figure(figsize=(width, 1.4 * channels + 0.9), layout="constrained")
    left, right = np.asarray(figure.subfigures(1, 2))
    rows = [
        (
            left,
            "involution: differs between places,\nis shared by the channels of a group",
            lambda place, channel: kernel[place],
        ),
        (
            right,
            "convolution: is shared by all places,\ndiffers between channels",
            lambda place, channel: filters[..., channel],
        ),
    ]
    for part, title, kernel_of in rows:
        part.suptitle(title, fontsize=10)
        axes = part.subplots(channels, len(places), squeeze=False)
        shown = [[kernel_of(place, c) for place in places] for c in range(channels)]
        extreme = float(np.abs(shown).max()) or 1.0
        for c in range(channels):
            for column, place in enumerate(places):
                ax = axes[c, column]
                ax.imshow(shown[c][column], cmap=COLOURS, vmin=-extreme, vmax=extreme)
                ax.set_xticks([])
                ax.set_yticks([])
                if c == 0:
                    ax.set_title(f"place {place}", fontsize=8)
                if column == 0:
                    ax.set_ylabel(f"channel {c}", fontsize=8)
        part.colorbar(axes[0, 0].images[0], ax=axes, label="weight", shrink=0.8)
    return figure


def _as_list(value):
    return list(value) if isinstance(value, (list, tuple)) else [value]
