"""Transposed windows: kernels belong to the positions that are read, and outputs are summed.

A transposed involution is the gradient of an involution for its input. Its own input has a position
for each window of that involution, and its output the sizes of that involution's input.
"""

import dataclasses

from involution.ops.problem import Problem, description_of, make_problem
from involution.ops.validation import (
    CAUSAL,
    SAME,
    SYMMETRIC,
    VALID,
    standardize_tuple,
    static_shape,
)
from involution.ops.window import Window


@dataclasses.dataclass(frozen=True)
class TransposedWindow:
    """The windows of a transposed involution.

    Args:
        window: The operator's arguments.
        output_padding: None, or one integer for each spatial dimension.

    Attributes:
        window: The window of the involution of which it is the gradient, with explicit padding.
        remainder: For each dimension, the positions at the end of the output beyond the windows.

    Raises:
        ValueError: An argument is out of its range.
    """

    window: Window
    remainder: tuple[int, ...]

    @classmethod
    def of(cls, window: Window, output_padding=None) -> "TransposedWindow":
        if window.padding == CAUSAL or window.phases > 1:
            raise ValueError(
                "A transposed involution supports neither `padding` 'causal' nor `upsampling`: "
                "`strides` above 1 upsample. "
                f"Received: padding={window.padding!r}, upsampling={window.upsampling}"
            )
        given = output_padding
        if output_padding is not None:
            given = standardize_tuple("output_padding", output_padding, window.rank, minimum=0)
        dimensions = [
            _dimension(window, i, None if given is None else given[i]) for i in range(window.rank)
        ]
        for (_, _, rest), stride in zip(dimensions, window.strides, strict=True):
            if rest >= stride:
                raise ValueError(
                    "`output_padding` must give fewer additional positions than `strides`. "
                    f"Received: output_padding={output_padding}, strides={window.strides}, "
                    f"padding={window.padding!r}"
                )
        padding = tuple((before, after) for before, after, _ in dimensions)
        return cls(
            dataclasses.replace(window, padding=padding), tuple(rest for *_, rest in dimensions)
        )

    def output_sizes(self, sizes) -> tuple:
        """Spatial sizes of the output; None where the input's size is None."""
        window = self.window
        return tuple(
            None if n is None else (n - 1) * s + last + 1 - sum(pair) + rest
            for n, s, last, pair, rest in zip(
                sizes,
                window.strides,
                window.last_offset,
                window.padding,
                self.remainder,
                strict=True,
            )
        )

    def problem_of(self, x) -> Problem:
        """The problem of the involution of which it is the gradient."""
        window, shape = self.window, static_shape("x", x)
        if len(shape) != window.rank + 2:
            raise ValueError(
                f"`x` must have a batch axis, a channel axis and {window.rank} spatial axes. "
                f"Received: x.shape={shape}"
            )
        sizes = self.checked_output_sizes(shape)
        shape = window.shape(shape[0], sizes, shape[window.channel_axis])
        return make_problem(window, shape, *description_of(x))

    def checked_output_sizes(self, x_shape) -> tuple:
        """``output_sizes`` for an input of this shape; ValueError unless each is at least 1."""
        window = self.window
        sizes = self.output_sizes(window.spatial(x_shape))
        if any(n is not None and n <= 0 for n in sizes):
            raise ValueError(
                "Every output size must be at least 1. "
                f"Received: output sizes {sizes}, input sizes {window.spatial(x_shape)}, "
                f"kernel_size={window.kernel_size}, strides={window.strides}, "
                f"padding={window.padding}, dilation_rate={window.dilation_rate}"
            )
        return sizes


def _dimension(window, i, output_padding):
    """(before, after, remainder) of one dimension, as in ``keras.layers.Conv2DTranspose``."""
    stride, extent = window.strides[i], window.last_offset[i] + 1
    if window.padding == SAME and output_padding is None:
        total = max(extent - stride, 0)
        return total // 2, total - total // 2, max(stride - extent, 0)
    if window.padding == SAME:
        odd = extent % 2
        # Keras pads the zero-filled input by at most extent - 1 on the left.
        before = max(extent - 1 - (extent + odd - 1 + output_padding) // 2, 0)
        after = extent - before - odd - output_padding
        return before, max(after, 0), max(-after, 0)
    if window.padding == VALID:
        rest = max(stride - extent, 0) if output_padding is None else output_padding
        return 0, 0, rest
    if window.padding == SYMMETRIC:
        return (extent - 1) // 2, (extent - 1) // 2, output_padding or 0
    return *window.padding[i], output_padding or 0
