"""How much a model uses its kernels: their variance, and its score without it."""

import dataclasses

import keras
import numpy as np
from keras import ops

from involution.layers.recording import replace_kernels
from involution.ops.window import CHANNELS_LAST
from involution.utils.errors import InputError
from involution.utils.progress import NullProgress
from involution.visualize.activations import capture_with_outputs

# What replaces the kernels of an image, by name.
REPLACEMENTS = {
    "places": "their mean over the places of the image",
    "images": "their mean over all images, place by place",
    "static": "one kernel, their mean over places and images",
    "shuffled": "the kernels of another image",
}


@dataclasses.dataclass(frozen=True)
class LayerUse:
    """Variance of one involution's kernels.

    All variances are means over the groups of the layer, and of the same unit: that of a weight,
    squared.

    Attributes:
        over_places: Variance of a tap over the places of an image, mean over taps and images.
        over_images: Variance of a tap at one place over the images, mean over taps and places.
        over_taps: Variance over the taps of the mean kernel of all places and images.
        scores: The model's score with this layer's kernels replaced, by replacement.
    """

    over_places: float
    over_images: float
    over_taps: float
    scores: dict[str, float]

    @property
    def place_ratio(self) -> float:
        """Variance over places / variance over taps: 0 for a convolution, above 1 where kernels
        differ more between places than a mean kernel between its taps."""
        return self.over_places / self.over_taps if self.over_taps else float("inf")


@dataclasses.dataclass(frozen=True)
class KernelUse:
    """Result of ``kernel_use``.

    Attributes:
        score: The model's score with its own kernels.
        layers: By layer name, in order of execution.
        together: The score with the kernels of all layers replaced, by replacement.
    """

    score: float
    layers: dict[str, LayerUse]
    together: dict[str, float]

    def table(self) -> list[str]:
        """Lines of a table, at most 80 columns wide for layer names of up to 26 characters."""
        width = max(map(len, (*self.layers, "all layers")))
        columns = ("place ratio", *REPLACEMENTS)
        lines = [f"{'':{width}}" + "".join(f"{c:>{len(c) + 2}}" for c in columns)]
        for name, ratio, scores in (
            *((name, f"{use.place_ratio:.3g}", use.scores) for name, use in self.layers.items()),
            ("all layers", "", self.together),
        ):
            cells = (ratio, *(f"{scores[key]:.3f}" for key in REPLACEMENTS))
            row = "".join(f"{x:>{len(c) + 2}}" for c, x in zip(columns, cells, strict=True))
            lines.append(f"{name:{width}}{row}")
        return lines


def kernel_use(
    model, images, labels=None, *, metric=None, batch_size=32, progress=None
) -> KernelUse:
    """Measures how much a model's output depends on its kernels being generated.

    Each involution's kernels are replaced, in one layer and then in all of them, by their mean over
    the places of each image (``"places"``), by their mean over all images at each place
    (``"images"``), by one kernel for all (``"static"``), and by those of another image
    (``"shuffled"``). A score that ``"static"`` does not change says that a convolution would do; a
    lower score under ``"shuffled"`` says that kernels depend on what is specific to an image.

    Args:
        model: Any Keras model or layer with involutions, also in nested models and layers.
        images: Float inputs of the model, (N, ...), at least two.
        labels: Integers (N,) or (N, 1), of sequences (N, positions), or as the metric requires;
            None: the classes that the model predicts with its own kernels, so that the score is the
            fraction that stays the same.
        metric: Function of (outputs, labels), both NumPy arrays of all images, that returns a
            number; None: accuracy, of the largest output in the last dimension.
        batch_size: Images per forward pass, at least two; with a remainder, batches are larger by
            its share. Another image's kernels are those of another image of the batch; the batches
            are random, from a fixed seed.
        progress: Receives progress, by its methods ``begin``, ``advance`` and ``end``; None: none
            is reported.

    Returns:
        The score with the model's own kernels, and by layer the variances and the scores.

    Raises:
        InputError: There are fewer than two images, or no involution; labels do not match the
            images or, without a metric, the outputs; without both, the outputs are no logits.
        ValueError: An involution runs inside a compiled function, whose values are not accessible.

    Example:

    >>> import numpy as np, involution
    >>> from involution.visualize import kernel_use
    >>> images = np.random.default_rng(0).random((4, 32, 32, 3), "float32")
    >>> use = kernel_use(involution.models.load("rednet_tiny-cifar10"), images)
    >>> len(use.layers), use.score, sorted(use.together)
    (5, 1.0, ['images', 'places', 'shuffled', 'static'])
    """
    images = np.asarray(images)
    if len(images) < 2:
        raise InputError(f"At least two images are required. Received: {len(images)}")
    if batch_size < 2:
        raise InputError(f"`batch_size` must be at least 2. Received: {batch_size}")
    if metric is not None and labels is None:
        raise InputError("`metric` requires `labels`. Received: labels=None")
    if labels is not None and len(labels) != len(images):
        raise InputError(
            "`labels` must be as many as the images. "
            f"Received: {len(labels)} labels and {len(images)} images"
        )
    progress = progress or NullProgress()
    # No batch of a single image, which has no other image.
    order = np.random.default_rng(0).permutation(len(images))
    batches = np.array_split(order, max(1, len(images) // batch_size))
    progress.begin("recording kernels", len(batches))
    statistics, outputs = _statistics(model, images, batches, progress)
    if not statistics:
        raise InputError(f"The model must have an involution. Received: {model.name}, without one")
    labels = outputs.argmax(axis=-1) if labels is None else np.asarray(labels)[order]
    if metric is None:
        metric, labels = _accuracy, _checked_labels(labels, outputs)
    names = list(statistics)
    progress.begin("replacing kernels", (len(names) + 1) * len(REPLACEMENTS))

    def scores(replaced):
        by_replacement = {}
        for kind in REPLACEMENTS:
            replace = _Replacement(kind, replaced, names, statistics)
            by_replacement[kind] = float(metric(_outputs(model, images, batches, replace), labels))
            progress.advance()
        return by_replacement

    score = float(metric(outputs, labels))
    layers = {
        name: LayerUse(**statistics[name].variances(), scores=scores({name})) for name in names
    }
    together = layers[names[0]].scores if len(names) == 1 else scores(set(names))
    progress.end()
    return KernelUse(score, layers, together)


def _checked_labels(labels, outputs) -> np.ndarray:
    """Labels of the shape of the predicted classes."""
    shape = outputs.shape[:-1]
    if labels.shape not in (shape, (*shape, 1)) or labels.dtype.kind not in "iu":
        raise InputError(
            f"`labels` must be integers of the shape {shape} for the accuracy. "
            f"Received: {labels.dtype} of the shape {labels.shape}"
        )
    return labels.reshape(shape)


def _accuracy(outputs, labels) -> float:
    return (outputs.argmax(axis=-1) == labels).mean()


class _Statistics:
    """Sums over the images of a layer's kernels, (*out_spatial, taps, groups)."""

    def __init__(self):
        self.count, self.over_places = 0, 0.0
        self.sum = self.squares = np.zeros(())

    def add(self, kernels):
        kernels = kernels.astype("float64")
        places = tuple(range(1, kernels.ndim - 2))
        self.count += len(kernels)
        self.sum = self.sum + kernels.sum(axis=0)
        self.squares = self.squares + np.square(kernels).sum(axis=0)
        self.over_places += kernels.var(axis=places).mean(axis=(1, 2)).sum()

    @property
    def mean(self) -> np.ndarray:
        return self.sum / self.count

    def variances(self) -> dict[str, float]:
        """Arguments of ``LayerUse``."""
        over_images = (self.squares / self.count - np.square(self.mean)).clip(min=0).mean()
        kernel = self.mean.mean(axis=tuple(range(self.mean.ndim - 2)))
        return {
            "over_places": float(self.over_places / self.count),
            "over_images": float(over_images),
            "over_taps": float(kernel.var(axis=0).mean()),
        }


def _statistics(model, images, batches, progress):
    """Statistics by layer, and the outputs in the order of the batches."""
    statistics: dict[str, _Statistics] = {}
    outputs = []
    for indices in batches:
        output, records = capture_with_outputs(model, images[indices])
        for name, record in records.items():
            statistics.setdefault(name, _Statistics()).add(record.kernels)
        outputs.append(_array(output))
        progress.advance()
    progress.end()
    return statistics, np.concatenate(outputs)


def _array(output) -> np.ndarray:
    if not hasattr(output, "shape"):
        raise InputError(f"The model must have one output. Received: {type(output).__name__}")
    return keras.ops.convert_to_numpy(keras.ops.cast(output, "float32"))


def _outputs(model, images, batches, replacement) -> np.ndarray:
    outputs = []
    for indices in batches:
        replacement.reset()
        with replace_kernels(replacement):
            outputs.append(_array(model(images[indices], training=False)))
    return np.concatenate(outputs)


class _Replacement:
    """Replaces the kernels of some layers; calls are identified by their order."""

    def __init__(self, kind, replaced, names, statistics):
        self.kind, self.replaced, self.names, self.statistics = kind, replaced, names, statistics
        self.reset()

    def reset(self):
        """Before each forward pass."""
        self._names = iter(self.names)

    def __call__(self, layer, kernel):
        name = next(self._names)
        if name not in self.replaced:
            return kernel
        if self.kind == "shuffled":
            return ops.roll(kernel, 1, axis=0)
        channels_last = layer.window.data_format == CHANNELS_LAST
        rank = len(kernel.shape) - 3
        if self.kind == "places":
            places = tuple(range(1, 1 + rank) if channels_last else range(3, 3 + rank))
            mean = ops.mean(kernel, axis=places, keepdims=True)
        else:
            mean = self.statistics[name].mean
            if self.kind == "static":
                mean = mean.mean(axis=tuple(range(rank)), keepdims=True)
            if not channels_last:
                mean = np.moveaxis(mean, (-2, -1), (0, 1))
            mean = ops.cast(ops.convert_to_tensor(mean.astype("float32")), kernel.dtype)[None]
        return ops.broadcast_to(mean, ops.shape(kernel))
