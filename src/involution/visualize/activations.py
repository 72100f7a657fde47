"""What the involutions of a model make of images, as arrays: their kernels and their outputs."""

import dataclasses
import functools

import keras
import numpy as np

from involution.layers import involutions, record_involutions
from involution.ops.validation import CHANNELS_LAST
from involution.ops.window import Window

# Images at a time: kernels are many times the size of what they are generated from.
BATCH = 8


@dataclasses.dataclass(frozen=True)
class Look:
    """One involution at work on N images (or series, or volumes). The channels are last whatever
    the layer's data format, and all numbers are float32.

    Attributes:
        name: The layer's; with #2, #3... where several calls would share it.
        window: The layer's window.
        sizes: Spatial sizes of its input.
        kernels: (N, *out_spatial, taps, groups).
        outputs: (N, *out_spatial, channels).
        shares: Whether the weights of every window are positive and sum to 1, as by a softmax.
        implementation: What runs in the layer where nobody looks, as ``fused``, which stores no
            kernels: they were stored to be seen here.
    """

    name: str
    window: Window
    sizes: tuple[int, ...]
    kernels: np.ndarray
    outputs: np.ndarray
    shares: bool
    implementation: str

    @functools.cached_property
    def maps(self) -> np.ndarray:
        """What a heat map shows, for each group: (N, *spatial, groups).

        The sum of every kernel over its window, at the kernel's place. Where kernels are shares of
        one, so that this is 1 everywhere, the attention map instead: how much of the attention of
        all windows each position of the input receives.
        """
        return self.received if self.shares else self.kernels.sum(axis=-2)

    @property
    def activations(self) -> np.ndarray:
        """How strong the output is: its root mean square over channels, (N, *out_spatial)."""
        return np.sqrt(np.square(self.outputs).mean(axis=-1))

    @property
    def received(self) -> np.ndarray:
        """The sum of the weights that all windows give to a position: (N, *sizes, groups)."""
        g = self.window
        count, *out, _, groups = self.kernels.shape
        before = [pair[0] for pair in self._pads]
        reach = [
            (n - 1) * s + last + 1 for n, s, last in zip(out, g.strides, g.last_offset, strict=True)
        ]
        ends = [b + n for b, n in zip(before, self.sizes, strict=True)]
        sums = np.zeros((count, *map(max, reach, ends), groups), "float32")
        for tap, offsets in enumerate(g.tap_offsets):
            read = tuple(
                slice(o, o + (n - 1) * s + 1, s)
                for o, n, s in zip(offsets, out, g.strides, strict=True)
            )
            sums[(slice(None), *read)] += self.kernels[..., tap, :]
        inside = tuple(slice(b, end) for b, end in zip(before, ends, strict=True))
        return sums[(slice(None), *inside)]

    def position(self, place) -> tuple[int, ...]:
        """The output position whose window's centre is nearest to a place of the image.

        Args:
            place: In shares of the image's sizes: (0, 0) is its top left corner, (1, 1) the other.
        """
        g = self.window
        centres = (
            round((share * n - 0.5 - (last / 2 - pair[0])) / s)
            for share, n, s, last, pair in zip(
                place, self.sizes, g.strides, g.last_offset, self._pads, strict=True
            )
        )
        return tuple(
            min(max(p, 0), n - 1) for p, n in zip(centres, self.kernels.shape[1:-2], strict=True)
        )

    def kernel_at(self, image, place) -> np.ndarray:
        """The kernel at a place, as for ``position``, of one of the images: (*kernel_size,
        groups)."""
        kernel = self.kernels[(image, *self.position(place))]
        return kernel.reshape(*self.window.kernel_size, -1)

    def window_at(self, place) -> tuple[tuple[float, float], ...]:
        """Where in the image the window at a place begins and ends, in shares, by dimension. It is
        what the kernel there is applied to; what its features saw of the image may be more."""
        g = self.window
        begins = (
            p * s - pair[0]
            for p, s, pair in zip(self.position(place), g.strides, self._pads, strict=True)
        )
        return tuple(
            (begin / n, (begin + last + 1) / n)
            for begin, last, n in zip(begins, g.last_offset, self.sizes, strict=True)
        )

    @property
    def _pads(self):
        return self.window.pads(self.sizes)


def looks(model, images) -> dict[str, Look]:
    """What every involution of a model makes of images.

    Args:
        model: Any Keras model or layer; its involutions may be within other models and layers.
        images: What the model takes, float, (N, ...).

    Returns:
        By name of the layer, in the order in which they ran; empty where there are none.

    Raises:
        ValueError: An involution runs in a compiled part of the model, where there are no values.

    Example:

    >>> import numpy as np, involution
    >>> from involution.visualize import looks
    >>> found = looks(involution.models.inn(), np.ones((2, 32, 32, 3), "float32"))
    >>> {name: look.kernels.shape for name, look in found.items()}["inv_2"]
    (2, 16, 16, 9, 1)
    """
    parts = [_look(model, images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    return {
        name: dataclasses.replace(
            look,
            kernels=np.concatenate([part[name].kernels for part in parts]),
            outputs=np.concatenate([part[name].outputs for part in parts]),
        )
        for name, look in (parts[0] if parts else {}).items()
    }


def kernel_maps(model, images) -> dict[str, np.ndarray]:
    """Heat maps of the kernels that a model generates for images, by layer and group.

    Args:
        model: Any Keras model or layer; its involutions may be within other models and layers.
        images: What the model takes, float, (N, ...).

    Returns:
        By name of the layer, in the order in which they ran: (N, *spatial, groups), float32. A
        value is the sum of the kernel at that place over its window; for ``PairwiseAttention`` and
        kernels with a softmax, where this is 1, the attention that the place receives.

    Example:

    >>> import numpy as np, involution
    >>> from involution import visualize
    >>> maps = visualize.kernel_maps(involution.models.inn(), np.ones((2, 32, 32, 3), "float32"))
    >>> {name: m.shape for name, m in maps.items()}
    {'inv_1': (2, 32, 32, 1), 'inv_2': (2, 16, 16, 1), 'inv_3': (2, 8, 8, 1)}
    """
    parts: dict[str, list[np.ndarray]] = {}
    shares: dict[str, bool] = {}
    for i in range(0, len(images), BATCH):
        for name, look in _look(model, images[i : i + BATCH]).items():
            # All images of a layer get the same kind of map.
            look = dataclasses.replace(look, shares=shares.setdefault(name, look.shares))
            parts.setdefault(name, []).append(look.maps)
    return {name: np.concatenate(maps) for name, maps in parts.items()}


def has_involutions(model) -> bool:
    """Whether a model or layer is an involution or holds one, at any depth: in a layer or model
    that it holds as an attribute, or within a list, tuple, set or dictionary that it holds."""
    return bool(involutions(model))


def _look(model, images) -> dict[str, Look]:
    if not model.built:
        model(images[:1], training=False)  # it is traced in the course of that
    with record_involutions() as calls:
        model(images, training=False)
    found: dict[str, Look] = {}
    for call in calls:
        name, number = call.layer.name, 1
        while name in found:
            number += 1
            name = f"{call.layer.name}#{number}"
        g = call.window
        try:
            kernels, outputs = _channels_last(call.kernel, g, 2), _channels_last(call.outputs, g, 1)
        except Exception as error:  # of a framework's own kind
            raise ValueError(
                "A model must run its involutions where it is called: in a function that is "
                f"compiled there are no values to look at. Received: {call.layer.name} in such"
            ) from error
        found[name] = Look(
            name,
            dataclasses.replace(g, data_format=CHANNELS_LAST),
            g.spatial(call.inputs.shape),
            kernels,
            outputs,
            _are_shares(kernels),
            call.layer.chosen_implementation(call.inputs),
        )
    return found


def _are_shares(kernels) -> bool:
    """Whether the weights of every window are positive and sum to 1, to what bfloat16 rounds: seen
    from the numbers, since a subclass may change what a layer's settings say."""
    sums = kernels.sum(axis=-2)
    return bool(kernels.size and kernels.min() >= 0 and np.abs(sums - 1).max() < 0.02)


def _channels_last(tensor, g, axes) -> np.ndarray:
    """A tensor with so many axes of channels as float32."""
    array = keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32"))
    if g.data_format == CHANNELS_LAST:
        return array
    return np.moveaxis(array, range(1, 1 + axes), range(-axes, 0))
