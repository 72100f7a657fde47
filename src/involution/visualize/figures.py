"""Figures: learning curves, sample images, and heat maps of involution kernels.

Every function returns a new ``matplotlib.figure.Figure``; nothing is shown, and Matplotlib's global
state is not modified. The colors are those of ``colors.py``.
"""

import itertools
import textwrap
import unicodedata

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter

from involution import renamed
from involution.visualize.ablation import REPLACEMENTS
from involution.visualize.colors import DIVERGING_CMAP, PALETTE, SEQUENTIAL_CMAP, TEST, TRAIN

# Maximum width in inches: at 110 dots per inch, that of a page, which would shrink a wider figure.
WIDTH = 10.0
TITLE_SIZE, MIN_TITLE_SIZE = 8, 6
# Percentiles of a map's values at the ends of its color scale.
ROBUST_PERCENTILES = (1, 99)
NOTES = {
    DIVERGING_CMAP: "Purple: above 0; orange: below 0; the paler, the nearer to 0.",
    SEQUENTIAL_CMAP: "Bright yellow: the largest values of a map; dark blue: the smallest.",
}


def short_names(names) -> dict[str, str]:
    """Layer names without the words at their end that all of them share.

    ``stage1_block1_2_involution`` and ``stage2_block1_2_involution`` become ``stage1_block1`` and
    ``stage2_block1``.
    """
    words = {name: name.split("_") for name in names}
    shared = 0
    if len(words) > 1:
        reversed_words = (parts[:0:-1] for parts in words.values())  # not the first word
        for column in zip(*reversed_words, strict=False):
            if len(set(column)) > 1:
                break
            shared += 1
    return {name: "_".join(parts[: len(parts) - shared]) for name, parts in words.items()}


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
        costs = [model[cost] for model in models.values() if model[cost] is not None]
        if costs and max(costs) >= 2 * min(costs):
            ax.set_xscale("log")
        else:  # within an octave the labels of a logarithmic axis overlap
            ax.xaxis.set_major_formatter(EngFormatter())
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
    height = 1.7 * images.shape[1] / images.shape[2] + 0.3
    figure = Figure(figsize=(1.8 * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.axis("off")
    sample = stratified_sample(labels, rows * columns, seed)
    for ax, i in zip(axes, sample, strict=False):
        ax.imshow(images[i])
        _title(ax, class_names[labels[i]])
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
    images, maps, titles=None, overlay=False, activations=None, share_scale=False
) -> Figure:
    """One block per image: the image, then a heat map of each involution's kernels.

    With the maps of three involutions it is the grid of the keras.io example. A value is the sum of
    the kernel's weights at that position, over all groups. Maps with values of both signs have a
    diverging color scale, centered at zero; all others have a sequential one. Scales end at the 1st
    and the 99th percentile, so that single values do not determine the colors. Constant maps are
    drawn in one color and titled "constant". Titles omit the words at the end of the layers' names
    that all of them share.

    Args:
        images: (N, height, width, 3), uint8, or float from 0 to 1.
        maps: By layer name, (N, height, width, groups) as returned by ``kernel_maps`` for these
            images, or (N, height, width).
        titles: A title for each image.
        overlay: Whether to draw each map also over its image.
        activations: By the same names, maps to draw next to the kernels': (N, height, width), as
            ``InvolutionRecord.activations``.
        share_scale: Whether the maps of a layer share a color scale, to compare images; otherwise
            each map has its own, as in the keras.io example.

    Raises:
        ValueError: A map is not two-dimensional, as those of sequences and volumes.
    """
    layers = []
    for name, short in short_names(maps).items():
        values = maps[name].sum(axis=-1) if maps[name].ndim == 4 else maps[name]
        panels = [(short, "", values)]
        if overlay:
            panels.append((short, OVERLAY, values))
        if activations is not None:
            panels.append((short, "output RMS", activations[name]))
        for *_, drawn in panels:
            if drawn.ndim != 3:
                raise ValueError(
                    "`maps` must have shape (N, height, width, groups) or (N, height, width). "
                    f"Received: {name} of shape {drawn.shape}"
                )
        layers.append(panels)
    per_layer = len(layers[0])
    rows = -(-len(layers) // (6 // per_layer))
    columns = 1 + -(-len(layers) // rows) * per_layer
    width = min(2.6, WIDTH / columns)
    height = 0.75 * width * images[0].shape[0] / images[0].shape[1] + 0.5
    figure = Figure(figsize=(width * columns, height * rows * len(images)), layout="constrained")
    axes = figure.subplots(rows * len(images), columns, squeeze=False)
    used = set()
    for number, image in enumerate(images):
        block = axes[number * rows : (number + 1) * rows]
        block[0, 0].imshow(image)
        _title(block[0, 0], *(titles[number] if titles else "image").split("\n"), inches=width)
        free = block[:, 1:].ravel()
        panels = [panel for of_layer in layers for panel in of_layer]
        for ax, (name, kind, values) in zip(free, panels, strict=False):
            # One color map for the maps of a layer, whatever the signs in one of them.
            scale = _color_scale(values if share_scale else values[number], _is_signed(values))
            over = image if kind == OVERLAY else None
            mappable = _heat_map(ax, values[number], scale, over)
            _title(ax, name, _describe(values[number], kind), inches=width)
            _inset_colorbar(figure, mappable, ax, values[number])
            used.add(scale[2])
        for ax in (*block[1:, 0], *free[len(panels) :]):
            ax.axis("off")
    _hide_ticks(axes)
    _note(figure, used)
    return figure


OVERLAY = "overlay"


def group_maps(maps, image=None, columns=6) -> Figure:
    """Heat maps of each group's kernels for one image, by involution.

    All maps of an involution share a color scale, as in ``heat_maps``.

    Args:
        maps: By layer name, (height, width, groups), as ``kernel_maps`` returns for each image.
        image: An image to draw each map over; None: maps only.
        columns: Maximum number of maps in a row.
    """
    names = short_names(maps)
    rows = {name: -(-values.shape[-1] // columns) for name, values in maps.items()}
    width = min(columns, max(values.shape[-1] for values in maps.values()))
    height = sum(rows.values())
    figure = Figure(
        figsize=(min(max(1.5 * width + 1, 4), WIDTH), 1.6 * height + 0.5 * len(rows)),
        layout="constrained",
    )
    subfigures = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=list(rows.values()))
    used = set()
    for subfigure, (name, values) in zip(subfigures[:, 0], maps.items(), strict=True):
        axes = subfigure.subplots(rows[name], width, squeeze=False)
        scale = _color_scale(values, _is_signed(values))
        used.add(scale[2])
        for group, ax in enumerate(axes.ravel()):
            if group >= values.shape[-1]:
                ax.axis("off")
                continue
            mappable = _heat_map(ax, values[..., group], scale, image)
            _title(ax, f"group {group}", _describe(values[..., group], size=False))
        _colorbar(subfigure, mappable, axes)
        title = f"{names[name]} ({_size(values)})"
        subfigure.suptitle(title, fontsize=10).set_parse_math(False)
        _hide_ticks(axes)
    _note(figure, used)
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
    columns = min(len(windows), 5)
    blocks, rows = -(-len(windows) // columns), 1 + len(kernels)
    figure = Figure(
        figsize=(max(WIDTH / 5 * columns, 4), 1.9 * rows * blocks), layout="constrained"
    )
    axes = figure.subplots(rows * blocks, columns, squeeze=False)
    # The axes of a layer, from top to bottom.
    by_layer = axes.reshape(blocks, rows, columns).swapaxes(1, 2).reshape(-1, rows)
    names = short_names(windows)
    for of_layer, (name, ((top, bottom), (left, right))) in zip(
        by_layer, windows.items(), strict=False
    ):
        ax = of_layer[0]
        ax.imshow(image, extent=(0, width, height, 0))
        # White inside black, for contrast on any image.
        for color, line_width in (("black", 3.5), ("white", 1.5)):
            corner = (left * width, top * height)
            sizes = ((right - left) * width, (bottom - top) * height)
            ax.add_patch(Rectangle(corner, *sizes, fill=False, edgecolor=color, lw=line_width))
        ax.plot(point[1] * width, point[0] * height, "o", color="white", mec="black", ms=4)
        _title(ax, names[name], inches=WIDTH / 5)
        means = [layers[name].mean(axis=-1) for layers in kernels.values()]
        extreme = float(np.nanmax(np.abs(means), initial=0)) or 1.0
        for ax, title, mean in zip(of_layer[1:], kernels, means, strict=True):
            mappable = ax.imshow(mean, cmap=DIVERGING_CMAP, vmin=-extreme, vmax=extreme)
            ax.set_title(title, fontsize=9, parse_math=False)
        _colorbar(figure, mappable, of_layer[1:])
    for ax in by_layer[len(windows) :].ravel():
        ax.axis("off")
    _hide_ticks(axes)
    _note(figure, {DIVERGING_CMAP})
    return figure


def _robust_limits(values) -> tuple[float, float]:
    """Percentiles of the finite values, or their extremes if those are equal; zeros if there are
    none, as after divergence."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 0.0
    low, high = np.percentile(finite, ROBUST_PERCENTILES)
    if _is_flat(low, high):
        low, high = finite.min(), finite.max()
    return float(low), float(high)


def _is_signed(values) -> bool:
    low, high = _robust_limits(values)
    return low < 0 < high and not _is_flat(low, high)


def _color_scale(values, signed) -> tuple[float, float, str]:
    """Ends and color map of a scale: for values of both signs diverging, centered at zero."""
    low, high = _robust_limits(values)
    if signed:
        extreme = max(abs(low), abs(high)) or 1.0
        return -extreme, extreme, DIVERGING_CMAP
    if _is_flat(low, high):
        low, high = low - 0.5, low + 0.5
    return low, high, SEQUENTIAL_CMAP


def _is_flat(low, high) -> bool:
    # Smaller differences are rounding errors of the sum.
    return high - low <= 1e-6 * max(abs(low), abs(high))


def _is_constant(values) -> bool:
    return bool(np.isfinite(values).all()) and _is_flat(values.min(), values.max())


def _describe(values, kind="", size=True) -> str:
    """The second line of a map's title."""
    parts = [kind] if kind else []
    if size:
        parts.append(_size(values))
    if not np.isfinite(values).all():
        parts.append("not finite")
    elif _is_constant(values):
        parts.append("constant")
    return ", ".join(parts)


def _size(values) -> str:
    return f"{values.shape[1]}x{values.shape[0]}"


def _heat_map(ax, values, scale, image=None):
    low, high, cmap = scale
    extent = (0, values.shape[1], values.shape[0], 0)
    if image is not None:
        ax.imshow(image, extent=extent)
    return ax.imshow(
        np.full_like(values, values.min()) if _is_constant(values) else values,
        cmap=cmap,
        extent=extent,
        alpha=None if image is None else 0.6,
        interpolation="nearest",
        vmin=low,
        vmax=high,
    )


def _title(ax, *lines, inches=2.0):
    """Sets a title that fits into a panel of this width: its font is reduced, then its lines are
    shortened, because layouts ignore the widths of titles."""
    # Three quarters of a panel are its image; an average character is 0.62 em wide.
    available = 0.75 * inches * 72 / 0.62
    longest = max(1, *map(_columns, lines))
    size = min(TITLE_SIZE, max(MIN_TITLE_SIZE, available / longest))
    text = "\n".join(shorten(line, int(available / size)) for line in lines if line)
    ax.set_title(text, fontsize=size, parse_math=False)


def _columns(text) -> int:
    """The width of a text in columns of a terminal: East Asian characters have two."""
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def shorten(text, width) -> str:
    """A text without its middle, if it is wider than this number of columns of a terminal."""
    if _columns(text) <= width:
        return text
    kept = len(text)
    while kept > 2 and _columns(text[: kept - kept // 2] + text[-(kept // 2) :]) >= width:
        kept -= 1
    return f"{text[: kept - kept // 2]}…{text[-(kept // 2) :]}"


def _note(figure, colormaps):
    """A sentence below the figure about what its colors mean. It takes the left half, which a phone
    shows without scrolling."""
    text = " ".join(note for colormap, note in NOTES.items() if colormap in colormaps)
    characters = max(40, int(figure.get_figwidth() / 2 * 72 / (0.55 * 9)))
    figure.supxlabel(textwrap.fill(text, characters), x=0.01, ha="left", fontsize=9)


def _inset_colorbar(figure, mappable, ax, values):
    inset = ax.inset_axes((1.04, 0, 0.06, 1), label="<colorbar>")
    low, high = mappable.get_clim()
    ticks = [low, 0, high] if mappable.get_cmap().name == DIVERGING_CMAP else [low, high]
    if _is_constant(values):
        ticks = [values.min()]
    colorbar = figure.colorbar(mappable, cax=inset, ticks=ticks, format="%.3g")
    colorbar.ax.tick_params(labelsize=6, length=2, pad=1)


def _colorbar(figure, mappable, axes):
    colorbar = figure.colorbar(mappable, ax=axes, shrink=0.85)
    colorbar.ax.tick_params(labelsize=7)


def _hide_ticks(axes):
    for ax in axes.ravel():
        ax.set_xticks([])
        ax.set_yticks([])


def most_different(kernels, count) -> list[tuple[int, int]]:
    """Positions with kernels as different from each other as possible, for ``compare_kernels``.

    The first is the one farthest from the mean kernel; each further one has the largest distance
    to the nearest of those before. Distances are Euclidean.

    Args:
        kernels: An involution's kernels for one image and group, (height, width, K, K).
        count: Number of positions.
    """
    height, width = kernels.shape[:2]
    flat = np.nan_to_num(kernels.reshape(height * width, -1).astype("float64"))
    distance = np.linalg.norm(flat - flat.mean(axis=0), axis=-1)
    chosen: list[int] = []
    while len(chosen) < min(count, len(flat)):
        distance[chosen] = -1  # also where all kernels are equal
        chosen.append(int(distance.argmax()))
        new = np.linalg.norm(flat - flat[chosen[-1]], axis=-1)
        distance = new if len(chosen) == 1 else np.minimum(distance, new)
    return [divmod(index, width) for index in chosen]


@renamed.arguments(places="positions")
def compare_kernels(kernel, filters, positions) -> Figure:
    """Illustrates "location-specific and channel-agnostic": kernels by position and channel.

    Args:
        kernel: An involution's kernels for one image and group, (height, width, K, K).
        filters: A convolution's kernel for one input channel, (K, K, channels).
        positions: Up to four output positions (row, column) to compare, as from
            ``most_different``.
    """
    channels = filters.shape[-1]
    figure = Figure(figsize=(WIDTH, channels + 1.1), layout="constrained")
    left, right = np.asarray(figure.subfigures(1, 2))
    panels = [
        (
            left,
            "involution: varies with the position (row, column),\n"
            "shared by the channels of a group",
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
                    ax.set_title(f"({position[0]}, {position[1]})", fontsize=TITLE_SIZE)
                if column == 0:
                    ax.set_ylabel(f"channel {c}", fontsize=TITLE_SIZE)
        colorbar = subfigure.colorbar(axes[0, 0].images[0], ax=axes, label="weight", shrink=0.8)
        colorbar.ax.tick_params(labelsize=7)
    _note(figure, {DIVERGING_CMAP})
    return figure


def use_chart(use) -> Figure:
    """Scores with replaced kernels by layer, and how much the kernels differ between places.

    Args:
        use: A ``KernelUse``, as ``visualize.kernel_use`` returns.
    """
    names = short_names(use.layers)
    rows = {names[name]: layer.scores for name, layer in use.layers.items()}
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
    right.barh(
        range(len(names)),
        [layer.place_ratio for layer in use.layers.values()],
        0.5,
        color=PALETTE[0],
    )
    right.axvline(1, color="0.5", linestyle=":")
    right.set_xlabel("variance over places /\nvariance over taps")
    right.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", fontsize=9)
    return figure
