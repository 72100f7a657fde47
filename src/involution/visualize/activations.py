"""Kernels and outputs of a model's involutions, recorded in a forward pass."""

import dataclasses
import functools

import keras
import numpy as np

from involution import renamed
from involution.layers import involutions, record_involutions
from involution.layers.transposed import InvolutionTransposeND
from involution.ops.window import CHANNELS_LAST, Window

# Images per forward pass: kernels take many times the memory of their input.
BATCH = 8

# Added to captions of heat maps where ``is_attention``.
ATTENTION_CAPTION = (
    "Of attention, whose weights sum to 1, the maps show how much of it each position receives."
)


@dataclasses.dataclass(frozen=True)
class InvolutionRecord:
    """One involution layer's kernels and outputs for N inputs (images, sequences or volumes).

    All arrays are float32 and channels last, independent of the layer's data format.

    Attributes:
        name: The layer's name; further calls of a layer have the suffix #2, #3 and so on.
        window: The layer's window.
        sizes: Spatial sizes of the array on which the windows lie: the layer's input, or the output
            of a transposed involution.
        kernels: (N, *positions, taps, groups): a kernel for each position of the output, or of the
            input of a transposed involution.
        outputs: (N, *out_spatial, channels).
        is_attention: Whether the weights of every window are nonnegative and sum to 1, as after a
            softmax.
        implementation: The implementation selected in inference; ``fused`` does not store kernels,
            which are materialized for this record.
    """

    name: str
    window: Window
    sizes: tuple[int, ...]
    kernels: np.ndarray
    outputs: np.ndarray
    is_attention: bool
    implementation: str

    __getattr__ = renamed.members(
        {
            "shares": "is_attention",
            "maps": "heat_map",
            "received": "attention_received",
            "position": "nearest_position",
        }
    )

    @functools.cached_property
    def heat_map(self) -> np.ndarray:
        """A scalar per position and group, (N, *spatial, groups).

        The sum of each kernel's weights at its position. For attention, whose weights sum to 1,
        ``attention_received`` at each position in ``sizes`` instead.
        """
        return self.attention_received if self.is_attention else self.kernels.sum(axis=-2)

    @property
    def activations(self) -> np.ndarray:
        """Root mean square of the output over its channels, (N, *out_spatial)."""
        return np.sqrt(np.square(self.outputs).mean(axis=-1))

    @property
    def attention_received(self) -> np.ndarray:
        """Sum of the weights of all windows on each position, (N, *sizes, groups)."""
        window, kernels = self.window, self.kernels
        for axis, factor in enumerate(window.upsampling, 1):
            # The sum over the outputs that share a window.
            split = (*kernels.shape[:axis], -1, factor, *kernels.shape[axis + 1 :])
            kernels = kernels.reshape(split).sum(axis=axis + 1)
        count, *out, _, groups = kernels.shape
        before = [pair[0] for pair in self._pads]
        extent = [
            (n - 1) * s + last + 1
            for n, s, last in zip(out, window.strides, window.last_offset, strict=True)
        ]
        ends = [b + n for b, n in zip(before, self.sizes, strict=True)]
        padded = np.zeros((count, *map(max, extent, ends), groups), "float32")
        for tap, offsets in enumerate(window.tap_offsets):
            source = tuple(
                slice(o, o + (n - 1) * s + 1, s)
                for o, n, s in zip(offsets, out, window.strides, strict=True)
            )
            padded[(slice(None), *source)] += kernels[..., tap, :]
        unpadded = tuple(slice(b, end) for b, end in zip(before, ends, strict=True))
        return padded[(slice(None), *unpadded)]

    @renamed.arguments(place="point")
    def nearest_position(self, point) -> tuple[int, ...]:
        """The kernel's position whose window center is nearest to a point of the image; with
        upsampling, of those that share the window, the one at the point.

        Args:
            point: Relative coordinates: (0, 0) is the top left corner of an image, (1, 1) the
                bottom right one.
        """
        window = self.window
        centers = (
            round((coordinate * n - 0.5 / u - (last / 2 - pair[0])) * u / s)
            for coordinate, n, s, u, last, pair in zip(
                point,
                self.sizes,
                window.strides,
                window.upsampling,
                window.last_offset,
                self._pads,
                strict=True,
            )
        )
        return tuple(
            min(max(p, 0), n - 1) for p, n in zip(centers, self.kernels.shape[1:-2], strict=True)
        )

    @renamed.arguments(place="point")
    def kernel_at(self, image, point) -> np.ndarray:
        """Kernel of the image with this index at a point, see ``nearest_position``: (*kernel_size,
        groups)."""
        kernel = self.kernels[(image, *self.nearest_position(point))]
        return kernel.reshape(*self.window.kernel_size, -1)

    @renamed.arguments(place="point")
    def window_at(self, point) -> tuple[tuple[float, float], ...]:
        """(begin, end) of the window at a point by dimension, in relative coordinates.

        The kernel applies to this window; its generator's receptive field may be larger.
        """
        window = self.window
        position = self.nearest_position(point)
        begins = (
            p // u * s - pair[0]
            for p, u, s, pair in zip(
                position, window.upsampling, window.strides, self._pads, strict=True
            )
        )
        return tuple(
            (begin / n, (begin + last + 1) / n)
            for begin, last, n in zip(begins, window.last_offset, self.sizes, strict=True)
        )

    @property
    def _pads(self):
        return self.window.pads(self.sizes)


def capture(model, images) -> dict[str, InvolutionRecord]:
    """Records the kernels and outputs of a model's involutions.

    Args:
        model: Any Keras model or layer; involutions in nested models and layers are included.
        images: Float inputs of the model, (N, ...).

    Returns:
        Records by layer name, in order of execution; empty for a model without involutions.

    Raises:
        ValueError: An involution runs inside a compiled function, whose values are not accessible.

    Example:

    >>> import numpy as np, involution
    >>> from involution.visualize import capture
    >>> records = capture(involution.models.inn(), np.ones((2, 32, 32, 3), "float32"))
    >>> {name: record.kernels.shape for name, record in records.items()}["inv_2"]
    (2, 16, 16, 9, 1)
    """
    batches = [
        capture_with_outputs(model, images[i : i + BATCH])[1] for i in range(0, len(images), BATCH)
    ]
    return {
        name: dataclasses.replace(
            record,
            kernels=np.concatenate([batch[name].kernels for batch in batches]),
            outputs=np.concatenate([batch[name].outputs for batch in batches]),
        )
        for name, record in (batches[0] if batches else {}).items()
    }


def two_dimensional(records) -> dict[str, InvolutionRecord]:
    """Those with two spatial dimensions, which heat maps show."""
    return {name: record for name, record in records.items() if len(record.sizes) == 2}


def capture_with_outputs(model, images):
    """``(outputs, records)`` of a single forward pass; ``outputs`` are the model's own tensors.

    Raises:
        ValueError: As for ``capture``.
    """
    if not model.built:
        model(images[:1], training=False)  # traces the model
    with record_involutions() as calls:
        outputs = model(images, training=False)
    records: dict[str, InvolutionRecord] = {}
    for call in calls:
        name, number = call.layer.name, 1
        while name in records:
            number += 1
            name = f"{call.layer.name}#{number}"
        window = call.window
        # On which the windows lie.
        grid = call.outputs if isinstance(call.layer, InvolutionTransposeND) else call.inputs
        try:
            kernels = _channels_last(call.kernel, window, 2)
            layer_outputs = _channels_last(call.outputs, window, 1)
        except Exception as error:  # frameworks raise their own exception types
            raise ValueError(
                "Involutions must run eagerly to be recorded: values inside compiled functions are "
                f"not accessible. Received: {call.layer.name} in a compiled function"
            ) from error
        records[name] = InvolutionRecord(
            name,
            dataclasses.replace(window, data_format=CHANNELS_LAST),
            window.spatial(grid.shape),
            kernels,
            layer_outputs,
            _is_attention(kernels),
            call.layer.chosen_implementation(call.inputs),
        )
    return outputs, records


def kernel_maps(model, images) -> dict[str, np.ndarray]:
    """Heat maps of the kernels that a model generates, by layer and group.

    Args:
        model: Any Keras model or layer; involutions in nested models and layers are included.
        images: Float inputs of the model, (N, ...).

    Returns:
        By layer name, in order of execution: (N, *spatial, groups), float32. A value is the sum of
        the kernel's weights at that position. Weights of ``PairwiseAttention`` and of kernels with
        a softmax sum to 1: for these, a value is the attention that the position receives.

    Example:

    >>> import numpy as np, involution
    >>> from involution import visualize
    >>> maps = visualize.kernel_maps(involution.models.inn(), np.ones((2, 32, 32, 3), "float32"))
    >>> {name: m.shape for name, m in maps.items()}
    {'inv_1': (2, 32, 32, 1), 'inv_2': (2, 16, 16, 1), 'inv_3': (2, 8, 8, 1)}
    """
    batches: dict[str, list[np.ndarray]] = {}
    is_attention: dict[str, bool] = {}
    for i in range(0, len(images), BATCH):
        _, records = capture_with_outputs(model, images[i : i + BATCH])
        for name, record in records.items():
            # As in the first batch, so that all maps of a layer are of the same kind.
            of_layer = is_attention.setdefault(name, record.is_attention)
            record = dataclasses.replace(record, is_attention=of_layer)
            batches.setdefault(name, []).append(record.heat_map)
    return {name: np.concatenate(maps) for name, maps in batches.items()}


def has_involutions(model) -> bool:
    """Whether a model or layer is an involution or contains one at any depth, as an attribute or in
    a list, tuple, set or dictionary that is an attribute."""
    return bool(involutions(model))


def _is_attention(kernels) -> bool:
    """Determined from the values, to bfloat16's precision, because a subclass may ignore the
    layer's settings."""
    sums = kernels.sum(axis=-2)
    return bool(kernels.size and kernels.min() >= 0 and np.abs(sums - 1).max() < 0.02)


def _channels_last(tensor, window, axes) -> np.ndarray:
    """A tensor with ``axes`` channel axes as float32."""
    array = keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32"))
    if window.data_format == CHANNELS_LAST:
        return array
    return np.moveaxis(array, range(1, 1 + axes), range(-axes, 0))


__getattr__ = renamed.attributes(__name__, {"looks": "capture", "Look": "InvolutionRecord"})
