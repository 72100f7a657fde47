"""Figures: learning curves, sample images, and heat maps of involution kernels.

Every function returns a new ``matplotlib.figure.Figure``; nothing is shown, and Matplotlib's global
state is not modified. The colors are those of ``colors.py``.
"""

import itertools

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from involution import renamed
from involution.visualize.ablation import REPLACEMENTS
from involution.visualize.colors import DIVERGING_CMAP, PALETTE, SEQUENTIAL_CMAP, TEST, TRAIN


def curves(histories) -> Figure:
    """Training and test loss and accuracy by epoch, one column per model with shared axes.

    Args:
        histories: By label, a model's rows: dictionaries with ``epoch``, ``train_loss``,
            ``test_loss``, ``train_accuracy`` and ``test_accuracy``.
    """
    figure = Figure(figsize=(4.2 * max(len(histories), 2), 6.4), layout="constrained")
    axes = figure.subplots(2, len(histories), sharex=True, sharey="row", squeeze=False)
    for column, (label, rows) in enumerate(histories.items()):
        epochs = [row["epoch"] for row in rows]
        for ax, metric in zip(axes[:, column], ("loss", "accuracy"), strict=True):
            for split, color, style in (("train", TRAIN, "-"), ("test", TEST, "--")):
                values = [row[f"{split}_{metric}"] for row in rows]
                ax.plot(epochs, values, style, color=color, marker="o", ms=3, label=split)
            ax.set_title(f"{label}: {metric}", parse_math=False)
            ax.set_xlabel("epoch")
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.set_ylabel("cross-entropy (nats)" if metric == "loss" else "accuracy")
            ax.tick_params(labelbottom=True, labelleft=True)
            ax.grid(alpha=0.3)
            ax.legend()
    return figure


def accuracy_vs_cost(models) -> Figure:
    """Test accuracy against trainable parameters and against multiply-adds.

    Args:
        models: By label, dictionaries with ``test_accuracy``, ``trainable_params`` and
            ``multiply_adds``; a panel omits models for which one of its values is None.
    """
    figure = Figure(figsize=(11, 4.6 + 0.2 * len(models)), layout="constrained")
    columns = {"trainable_params": "trainable parameters", "multiply_adds": "multiply-adds"}
    # Hollow markers and a legend: similar models overlap.
    styles = itertools.cycle((marker, color) for marker in "os^D" for color in PALETTE)
    style_of = dict(zip(models, styles, strict=False))
    handles = {}
    for ax, (cost, title) in zip(figure.subplots(1, 2, sharey=True), columns.items(), strict=True):
        for label, model in models.items():
            if None in (model[cost], model["test_accuracy"]):
                continue
            marker, color = style_of[label]
            handles[label] = ax.plot(
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
    legend = figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=2, fontsize=9
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.axes[0].set_ylabel("test accuracy")
    return figure


def image_grid(images, labels, class_names, seed, rows=5, columns=5) -> Figure:
    """A grid of random images titled with their classes, stratified by class."""
    figure = Figure(figsize=(1.8 * columns, 2.0 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.axis("off")
    sample = stratified_sample(labels, rows * columns, seed)
    for ax, i in zip(axes, sample, strict=False):
        ax.imshow(images[i])
        ax.set_title(class_names[labels[i]], fontsize=9, parse_math=False)
    return figure


def stratified_sample(labels, count, seed) -> np.ndarray:
    """Indices of ``count`` random examples, with class frequencies that differ by at most one.

    A class with fewer examples contributes all of them.
    """
    rng = np.random.default_rng(seed)
    permutation = rng.permutation(len(labels))
    rank_in_class = np.zeros(len(labels), "int64")
    for label in np.unique(labels):
        of_class = permutation[labels[permutation] == label]
        rank_in_class[of_class] = np.arange(len(of_class))
    order = np.lexsort((labels[permutation], rank_in_class[permutation]))
    return permutation[order][:count]


@renamed.arguments(shared="share_scale")
def heat_maps(
    images, maps, titles=None, overlay=False, activations=None, share_scale=True
) -> Figure:
    """One row per image: the image, then a heat map of each involution's kernels.

    With the maps of three involutions it is the grid of the keras.io example. A value is the sum of
    the kernel's weights at that position, over all groups. Constant maps are drawn in one color and
    titled "constant".

    Args:
        images: (N, height, width, 3), uint8, or float from 0 to 1.
        maps: By title, (N, height, width, groups) as returned by ``kernel_maps`` for these images,
            or (N, height, width).
        titles: A title for each image.
        overlay: Whether to draw each map also over its image.
        activations: By the same titles, maps to draw next to the kernels': (N, height, width), as
            ``InvolutionRecord.activations``.
        share_scale: Whether all maps of a column share a color scale, to compare images; otherwise
            each map has its own, as in the keras.io example.

    Raises:
        ValueError: A map is not two-dimensional, as those of sequences and volumes.
    """
    columns: list[tuple[str, np.ndarray, bool]] = []
    for name, values in maps.items():
        values = values.sum(axis=-1) if values.ndim == 4 else values
        columns.append((name, values, False))
        if overlay:
            columns.append((f"{name}, overlay", values, True))
        if activations is not None:
            columns.append((f"{name}: output RMS", activations[name], False))
    for name, values, _ in columns:
        if values.ndim != 3:
            raise ValueError(
                "`maps` must have shape (N, height, width, groups) or (N, height, width). "
                f"Received: {name} of shape {values.shape}"
            )
    figure = Figure(figsize=(2.6 * (1 + len(columns)), 2.3 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), 1 + len(columns), squeeze=False)
    for row, image in enumerate(images):
        axes[row, 0].imshow(image)
        title = titles[row] if titles else "image"
        axes[row, 0].set_title(title, fontsize=9, parse_math=False)
    for column, (name, values, over_image) in enumerate(columns, start=1):
        for row, image in enumerate(images):
            mappable = _heat_map(
                axes[row, column],
                name,
                values[row],
                _limits(values if share_scale else values[row]),
                image if over_image else None,
            )
            if not share_scale:
                _colorbar(figure, mappable, axes[row, column])
        if share_scale:
            _colorbar(figure, mappable, axes[:, column])
    _hide_ticks(axes)
    return figure


def group_maps(maps, image=None, columns=8) -> Figure:
    """Heat maps of each group's kernels for one image, by involution.

    All maps of an involution share a color scale.

    Args:
        maps: By title, (height, width, groups), as ``kernel_maps`` returns for each image.
        image: An image to draw each map over; None: maps only.
        columns: Maximum number of maps in a row.
    """
    rows = {name: -(-values.shape[-1] // columns) for name, values in maps.items()}
    width = min(columns, max(values.shape[-1] for values in maps.values()))
    height = sum(rows.values())
    figure = Figure(
        figsize=(max(1.5 * width + 1, 3), 1.6 * height + 0.5 * len(rows)), layout="constrained"
    )
    subfigures = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=list(rows.values()))
    for subfigure, (name, values) in zip(subfigures[:, 0], maps.items(), strict=True):
        axes = subfigure.subplots(rows[name], width, squeeze=False)
        for group, ax in enumerate(axes.ravel()):
            if group >= values.shape[-1]:
                ax.axis("off")
                continue
            title = f"group {group}"
            mappable = _heat_map(ax, title, values[..., group], _limits(values), image, size=False)
        _colorbar(subfigure, mappable, axes)
        subfigure.suptitle(f"{name} ({values.shape[1]}x{values.shape[0]})", fontsize=10)
        _hide_ticks(axes)
    return figure


@renamed.arguments(place="point")
def kernels_at(image, point, kernels, windows) -> Figure:
    """Each involution's window and kernel at a point of an image.

    Args:
        image: (height, width, 3), uint8, or float from 0 to 1.
        point: (row, column) in relative coordinates, from 0 to 1.
        kernels: By title, as "before training" and "after training", one row each: by layer name,
            (rows, columns, groups) from ``InvolutionRecord.kernel_at``. The mean over groups is
            drawn, with one color scale per layer.
        windows: By layer name, from ``InvolutionRecord.window_at``.
    """
    height, width = image.shape[:2]
    figure = Figure(
        figsize=(max(2.2 * len(windows), 4), 1.9 * (1 + len(kernels))), layout="constrained"
    )
    axes = figure.subplots(1 + len(kernels), len(windows), squeeze=False)
    for column, (name, ((top, bottom), (left, right))) in enumerate(windows.items()):
        ax = axes[0, column]
        ax.imshow(image, extent=(0, width, height, 0))
        # White inside black, for contrast on any image.
        for color, line_width in (("black", 3.5), ("white", 1.5)):
            corner = (left * width, top * height)
            sizes = ((right - left) * width, (bottom - top) * height)
            ax.add_patch(Rectangle(corner, *sizes, fill=False, edgecolor=color, lw=line_width))
        ax.plot(point[1] * width, point[0] * height, "o", color="white", mec="black", ms=4)
        ax.set_title(name, fontsize=9, parse_math=False)
        means = [of_layer[name].mean(axis=-1) for of_layer in kernels.values()]
        extreme = float(np.nanmax(np.abs(means), initial=0)) or 1.0
        for ax, title, mean in zip(axes[1:, column], kernels, means, strict=True):
            mappable = ax.imshow(mean, cmap=DIVERGING_CMAP, vmin=-extreme, vmax=extreme)
            ax.set_title(title, fontsize=9, parse_math=False)
        _colorbar(figure, mappable, axes[1:, column])
    _hide_ticks(axes)
    return figure


def _limits(values) -> tuple[float, float]:
    """Minimum and maximum of the finite values; zeros if there are none, as after divergence."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def _is_flat(low, high) -> bool:
    # Smaller differences are rounding errors of the sum.
    return high - low <= 1e-6 * max(abs(low), abs(high))


def _heat_map(ax, name, values, limits, image=None, size=True):
    low, high = _limits(values)
    flat = _is_flat(low, high)
    notes = [f"{values.shape[1]}x{values.shape[0]}"] if size else []
    if not np.isfinite(values).all():
        notes.append("not finite")
    elif flat:
        notes.append("constant")
    if _is_flat(*limits):
        limits = (limits[0] - 0.5, limits[0] + 0.5)
    extent = (0, values.shape[1], values.shape[0], 0)
    if image is not None:
        ax.imshow(image, extent=extent)
    title = f"{name} ({', '.join(notes)})" if notes else name
    # Long titles would overlap the next column's.
    ax.set_title(title, fontsize=min(9, max(5, 9 * 24 / len(title))), parse_math=False)
    return ax.imshow(
        np.where(np.isfinite(values), low, np.nan) if flat else values,
        cmap=SEQUENTIAL_CMAP,
        extent=extent,
        alpha=None if image is None else 0.6,
        interpolation="nearest",
        vmin=limits[0],
        vmax=limits[1],
    )


def _colorbar(figure, mappable, axes):
    colorbar = figure.colorbar(mappable, ax=axes, shrink=0.85)
    colorbar.ax.tick_params(labelsize=7)


def _hide_ticks(axes):
    for ax in axes.ravel():
        ax.set_xticks([])
        ax.set_yticks([])


@renamed.arguments(places="positions")
def compare_kernels(kernel, filters, positions) -> Figure:
    """Illustrates "location-specific and channel-agnostic": kernels by position and channel.

    Args:
        kernel: An involution's kernels for one image and group, (height, width, K, K).
        filters: A convolution's kernel for one input channel, (K, K, channels).
        positions: Up to four output positions (row, column) to compare.
    """
    channels = filters.shape[-1]
    width = 1.3 * (2 * len(positions) + 2)
    figure = Figure(figsize=(width, 1.4 * channels + 0.9), layout="constrained")
    left, right = np.asarray(figure.subfigures(1, 2))
    panels = [
        (
            left,
            "involution: varies with the position,\nshared by the channels of a group",
            lambda position, channel: kernel[position],
        ),
        (
            right,
            "convolution: shared by all positions,\nvaries with the channel",
            lambda position, channel: filters[..., channel],
        ),
    ]
    for subfigure, title, kernel_of in panels:
        subfigure.suptitle(title, fontsize=10)
        axes = subfigure.subplots(channels, len(positions), squeeze=False)
        weights = [[kernel_of(position, c) for position in positions] for c in range(channels)]
        extreme = float(np.abs(weights).max()) or 1.0
        for c in range(channels):
            for column, position in enumerate(positions):
                ax = axes[c, column]
                ax.imshow(weights[c][column], cmap=DIVERGING_CMAP, vmin=-extreme, vmax=extreme)
                ax.set_xticks([])
                ax.set_yticks([])
                if c == 0:
                    ax.set_title(f"position {position}", fontsize=8)
                if column == 0:
                    ax.set_ylabel(f"channel {c}", fontsize=8)
        subfigure.colorbar(axes[0, 0].images[0], ax=axes, label="weight", shrink=0.8)
    return figure


def use_chart(use) -> Figure:
    """Scores with replaced kernels by layer, and how much the kernels differ between places.

    Args:
        use: A ``KernelUse``, as ``visualize.kernel_use`` returns.
    """
    rows = {name: layer.scores for name, layer in use.layers.items()}
    rows["all layers"] = use.together
    figure = Figure(figsize=(9, 2.2 + 0.4 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    left.axvline(use.score, color="0.5", linestyle="--", label="own kernels")
    offsets = np.linspace(-0.24, 0.24, len(REPLACEMENTS))
    styles = zip(REPLACEMENTS.items(), "os^D", PALETTE, offsets, strict=False)
    for (kind, text), marker, color, offset in styles:
        left.plot(
            [scores[kind] for scores in rows.values()],
            np.arange(len(rows)) + offset,
            marker,
            color=color,
            markerfacecolor="none",
            markeredgewidth=1.8,
            label=f"{kind}: {text}",
        )
    left.set_yticks(range(len(rows)), rows, parse_math=False)
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.set_xlabel("score with replaced kernels")
    left.grid(alpha=0.3)
    names = range(len(use.layers))
    right.barh(names, [layer.place_ratio for layer in use.layers.values()], 0.5, color=PALETTE[0])
    right.axvline(1, color="0.5", linestyle=":")
    right.set_xlabel("variance over places /\nvariance over taps")
    right.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", fontsize=9)
    return figure
