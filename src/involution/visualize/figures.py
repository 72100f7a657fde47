"""Figures: curves, samples, and the kernels of involutions as heat maps.

Every function returns a ``matplotlib.figure.Figure`` of its own; nothing is shown and no global
state of Matplotlib is touched. The colours (cividis, Okabe and Ito's) keep their order in print and
for the colour-blind.
"""

import itertools

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from involution.visualize.activations import kernel_maps, looks

__all__ = [
    "costs",
    "curves",
    "group_maps",
    "heat_maps",
    "kernel_maps",
    "looks",
    "place_kernels",
    "samples",
    "words",
]

TRAIN, TEST = "#0072B2", "#D55E00"
# Of Okabe and Ito's palette, which most people can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# For values in order, and for values around 0.
COLOURS, SIGNED = "cividis", "PuOr"


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
    figure = Figure(figsize=(11, 4.6 + 0.2 * len(models)), layout="constrained")
    columns = {"trainable_params": "trainable parameters", "multiply_adds": "multiply-adds"}
    # Models that are alike lie on each other: their names stand beside signs of their own.
    every = itertools.cycle((marker, color) for marker in "os^D" for color in COLORS)
    signs = dict(zip(models, every, strict=False))
    found = {}
    for ax, (cost, title) in zip(figure.subplots(1, 2, sharey=True), columns.items(), strict=True):
        for label, model in models.items():
            if None in (model[cost], model["test_accuracy"]):
                continue
            marker, color = signs[label]
            found[label] = ax.plot(
                model[cost],
                model["test_accuracy"],
                marker,
                color=color,
                markersize=9,
                markerfacecolor="none",
                markeredgewidth=2,
            )[0]
        ax.set_xscale("log")
        ax.set_xlabel(title)
        ax.margins(x=0.25, y=0.15)
        ax.grid(alpha=0.3)
    legend = figure.legend(found.values(), found, loc="outside lower center", ncols=2, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
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


def heat_maps(images, maps, titles=None, overlay=False, activations=None, shared=True) -> Figure:
    """One row for each image: the image, and beside it each involution's kernels as a heat map.

    With the maps of three involutions it is the grid of the keras.io example. A value is the sum of
    the kernel generated at that place over its window and the groups. What is constant is drawn
    flat and says so.

    Args:
        images: (N, height, width, 3), uint8, or float from 0 to 1.
        maps: By title, (N, height, width, groups) as ``kernel_maps`` gives them for these images,
            or (N, height, width).
        titles: What to write over each image.
        overlay: Whether to draw every map a second time, over the image.
        activations: By the same titles, what to draw beside each map: (N, height, width), as
            ``Look.activations``.
        shared: Whether a column has one scale, so that images can be compared; otherwise every map
            has its own, as in the example.

    Raises:
        ValueError: A map is not one of images: those of series and volumes are for drawings of
            one's own.
    """
    columns: list[tuple[str, np.ndarray, bool]] = []
    for name, values in maps.items():
        values = values.sum(axis=-1) if values.ndim == 4 else values
        columns.append((name, values, False))
        if overlay:
            columns.append((f"{name} over the image", values, True))
        if activations is not None:
            columns.append((f"{name}: output", activations[name], False))
    for name, values, _ in columns:
        if values.ndim != 3:
            raise ValueError(
                "`maps` must be of images: (N, height, width, groups). "
                f"Received: {name} of shape {values.shape}"
            )
    figure = Figure(figsize=(2.6 * (1 + len(columns)), 2.3 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), 1 + len(columns), squeeze=False)
    for row, image in enumerate(images):
        axes[row, 0].imshow(image)
        title = titles[row] if titles else "image"
        axes[row, 0].set_title(title, fontsize=9, parse_math=False)
    for column, (name, values, over) in enumerate(columns, start=1):
        for row, image in enumerate(images):
            drawn = _heat_map(
                axes[row, column],
                name,
                values[row],
                _limits(values if shared else values[row]),
                image if over else None,
            )
            if not shared:
                _bar(figure, drawn, axes[row, column])
        if shared:
            _bar(figure, drawn, axes[:, column])
    _bare(axes)
    return figure


def group_maps(maps, image=None, columns=8) -> Figure:
    """The kernels of each group as heat maps, for one image: one involution after another.

    Args:
        maps: By title, (height, width, groups): one image's of what ``kernel_maps`` gives.
        image: What to draw each map over; None: nothing.
        columns: Most maps in a row. All maps of an involution have one scale.
    """
    rows = {name: -(-values.shape[-1] // columns) for name, values in maps.items()}
    width = min(columns, max(values.shape[-1] for values in maps.values()))
    height = sum(rows.values())
    figure = Figure(
        figsize=(max(1.5 * width + 1, 3), 1.6 * height + 0.5 * len(rows)), layout="constrained"
    )
    parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=list(rows.values()))
    for part, (name, values) in zip(parts[:, 0], maps.items(), strict=True):
        axes = part.subplots(rows[name], width, squeeze=False)
        for group, ax in enumerate(axes.ravel()):
            if group >= values.shape[-1]:
                ax.axis("off")
                continue
            title = f"group {group}"
            drawn = _heat_map(ax, title, values[..., group], _limits(values), image, size=False)
        _bar(part, drawn, axes)
        part.suptitle(f"{name} ({values.shape[1]}x{values.shape[0]})", fontsize=10)
        _bare(axes)
    return figure


def place_kernels(image, place, kernels, windows) -> Figure:
    """What one place looks at: each involution's window on the image, and its kernel there.

    Args:
        image: (height, width, 3), uint8, or float from 0 to 1.
        place: (row, column) as shares of the image's sizes.
        kernels: By title, as "before training" and "after training", a row each: by name of the
            layer, (rows, columns, groups), as ``Look.kernel_at``. Drawn is the mean over groups; a
            layer has one scale in all rows.
        windows: By name of the layer, as ``Look.window_at``.
    """
    height, width = image.shape[:2]
    figure = Figure(
        figsize=(max(2.2 * len(windows), 4), 1.9 * (1 + len(kernels))), layout="constrained"
    )
    axes = figure.subplots(1 + len(kernels), len(windows), squeeze=False)
    for column, (name, ((top, bottom), (left, right))) in enumerate(windows.items()):
        ax = axes[0, column]
        ax.imshow(image, extent=(0, width, height, 0))
        # White within black: seen on any image.
        for colour, line in (("black", 3.5), ("white", 1.5)):
            corner = (left * width, top * height)
            sizes = ((right - left) * width, (bottom - top) * height)
            ax.add_patch(Rectangle(corner, *sizes, fill=False, edgecolor=colour, linewidth=line))
        ax.plot(place[1] * width, place[0] * height, "o", color="white", mec="black", ms=4)
        ax.set_title(name, fontsize=9, parse_math=False)
        means = [of_layer[name].mean(axis=-1) for of_layer in kernels.values()]
        extreme = float(np.nanmax(np.abs(means), initial=0)) or 1.0
        for ax, title, mean in zip(axes[1:, column], kernels, means, strict=True):
            drawn = ax.imshow(mean, cmap=SIGNED, vmin=-extreme, vmax=extreme)
            ax.set_title(title, fontsize=9, parse_math=False)
        _bar(figure, drawn, axes[1:, column])
    _bare(axes)
    return figure


def _limits(values) -> tuple[float, float]:
    """The lowest and the highest of the finite values."""
    finite = values[np.isfinite(values)]
    # A model that diverged has no finite kernels; the picture then says so.
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def _is_flat(low, high) -> bool:
    # Differences below the precision of the sum are rounding, not a pattern.
    return high - low <= 1e-6 * max(abs(low), abs(high))


def _heat_map(ax, name, values, limits, image=None, size=True):
    low, high = _limits(values)
    flat = _is_flat(low, high)
    remarks = [f"{values.shape[1]}x{values.shape[0]}"] if size else []
    if not np.isfinite(values).all():
        remarks.append("not finite")
    elif flat:
        remarks.append("constant")
    if _is_flat(*limits):
        limits = (limits[0] - 0.5, limits[0] + 0.5)
    extent = (0, values.shape[1], values.shape[0], 0)
    if image is not None:
        ax.imshow(image, extent=extent)
    title = f"{name} ({', '.join(remarks)})" if remarks else name
    # Long names must leave room for the neighbour's bar and title.
    ax.set_title(title, fontsize=min(9, max(5, 9 * 24 / len(title))), parse_math=False)
    return ax.imshow(
        np.where(np.isfinite(values), low, np.nan) if flat else values,
        cmap=COLOURS,
        extent=extent,
        alpha=None if image is None else 0.6,
        interpolation="nearest",
        vmin=limits[0],
        vmax=limits[1],
    )


def _bar(figure, drawn, axes):
    bar = figure.colorbar(drawn, ax=axes, shrink=0.85)
    bar.ax.tick_params(labelsize=7)


def _bare(axes):
    for ax in axes.ravel():
        ax.set_xticks([])
        ax.set_yticks([])


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
