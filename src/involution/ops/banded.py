"""Implementation by banded matrices, for exporters: one batched matrix product.

ONNX has no operator for a sum over a window whose weights differ between positions. Composed of
elementwise operators, it takes several passes over memory for each tap. Here, the kernels of
neighboring outputs in a row are the rows of a banded matrix, which multiplies the values that their
windows cover:

    y[b, group, tile] = band[b, group, tile] @ values[b, group, tile]
    (tile, channels)    (tile, rows * span)     (rows * span, channels)

where a tile has that many outputs, ``rows`` are those of the window, and ``span`` the columns that
all windows of the tile cover. Without dilation, the products with the zeros of a band cost less
than the passes saved: in onnxruntime it takes a fifth of the time of ``rows``
(benchmarks/onnx_operator.py).

A band is built without a scatter. Its rows are stored at a distance that exceeds the matrix's row
length by the window's stride; read as a matrix, each row is shifted by one stride more than the
previous one.

A value that is not finite makes all outputs of its tile NaN, since 0 * inf is NaN. It is therefore
selected only by name and by exporters. Within PyTorch's autocast, the products have its dtype.
"""

import numpy as np

from involution.ops import tensor_utils
from involution.ops.frameworks import namespace
from involution.ops.reference import input_grad
from involution.ops.rows import kernel_grad
from involution.ops.tensor_utils import split_groups, to_accumulation_dtype
from involution.ops.validation import CHANNELS_LAST
from involution.ops.window import ceil_div

# Columns of a band for each tap of a row. In onnxruntime, ``rows`` is faster from a dilation rate
# between 1 and 8 on in one dimension, from a larger one on in two.
MAX_SPAN = 6

__all__ = ["apply", "apply_generated", "input_grad", "kernel_grad", "unsupported_reason"]


def unsupported_reason(problem) -> str | None:
    window = problem.window
    if window.rank == 3:
        return "it supports one and two spatial dimensions"
    if window.phases > 1:
        return "it does not support upsampling"
    if not all(isinstance(n, int) for n in window.spatial(problem.x_shape)):
        return "it requires sizes that are known when the program is traced"
    tiles = _Tiles(problem)
    if tiles.span > MAX_SPAN * tiles.taps:
        return (
            f"a tile covers {tiles.span} columns for {tiles.taps} taps, more than {MAX_SPAN} times"
        )
    return tensor_utils.unsupported_reason(problem)


class _Tiles:
    """The tiles of a call. A dimension of size 1 precedes that of one-dimensional sizes."""

    def __init__(self, problem):
        window = problem.window
        sizes = window.spatial(problem.x_shape)

        def two(values, fill):
            return (*[fill] * (2 - window.rank), *values)

        self.window = window
        self.sizes = two(sizes, 1)
        self.out = two(window.window_counts(sizes), 1)
        self.pads = two(window.pads(sizes), (0, 0))
        self.strides = two(window.strides, 1)
        self.rates = two(window.dilation_rate, 1)
        self.rows, self.taps = two(window.kernel_size, 1)
        self.group_channels = problem.x_shape[window.channel_axis] // window.groups
        self.tile = min(range(1, min(self.out[1], 16) + 1), key=self._cost)
        self.count = ceil_div(self.out[1], self.tile)
        self.span = self._span(self.tile)

    def _span(self, tile):
        return (tile - 1) * self.strides[1] + (self.taps - 1) * self.rates[1] + 1

    def _cost(self, tile):
        """Elements of the matrices of a row of outputs."""
        return ceil_div(self.out[1], tile) * self._span(tile) * (tile + self.group_channels)

    @property
    def width(self):
        """Outputs of a row, with those added to fill the last tile."""
        return self.count * self.tile

    @property
    def band_row(self):
        return self.rows * self.span

    def fill(self, ops, tensor):
        """Pads the last but one axis, the outputs of a row, to ``width``."""
        return _pad_end(ops, tensor, self.width - self.out[1], axis=-2)

    def spread(self, ops, weights):
        """(..., taps of the window) to (..., band_row + stride): one row of a band, unshifted."""
        *batch, _ = weights.shape
        batch[0] = -1
        rate, taps = self.rates[1], self.taps
        # Without the batch axes: runtimes pad at most five axes (LiteRT).
        weights = ops.reshape(weights, (-1, self.rows, taps, 1))
        weights = _pad_end(ops, weights, rate - 1)
        weights = ops.reshape(weights, (-1, self.rows, taps * rate))
        last = (taps - 1) * rate + 1
        weights = _pad_end(ops, weights[..., :last], self.span - last)
        weights = ops.reshape(weights, (*batch, self.band_row))
        return _pad_end(ops, weights, self.strides[1])

    def bands(self, ops, weights):
        """Rows of ``spread`` at (B, groups, positions), to matrices."""
        row = self.band_row
        weights = ops.reshape(weights, (-1, self.tile * (row + self.strides[1])))
        # Runtimes multiply matrices of at most three batch axes (LiteRT).
        shape = (-1, self.window.groups, self.out[0] * self.count, self.tile, row)
        return ops.reshape(weights[:, : self.tile * row], shape)

    def values(self, ops, x):
        """The values of every tile: (B, groups, rows of outputs * tiles, rows * span, channels)."""
        groups, channels = self.window.groups, self.group_channels
        x = ops.reshape(
            ops.transpose(x, self._positions_first()), (-1, groups, *self.sizes, channels)
        )
        steps = (self.out[0] - 1) * self.strides[0], (self.width - 1) * self.strides[1]
        taps = (self.rows - 1) * self.rates[0], (self.taps - 1) * self.rates[1]
        pads = [(0, 0), (0, 0)]
        for size, (before, _), step, tap in zip(self.sizes, self.pads, steps, taps, strict=True):
            pads.append((before, max(step + tap + 1 - size - before, 0)))
        if any(pad != (0, 0) for pad in pads):
            x = ops.pad(x, [*pads, (0, 0)])
        height = self.sizes[0] + sum(pads[2])
        starts = np.arange(self.count) * self.tile * self.strides[1]
        columns = starts[:, None] + np.arange(self.span)
        x = ops.take(x, columns.reshape(-1), axis=3)
        x = ops.reshape(x, (-1, groups, height * self.count, self.span, channels))
        row = np.arange(self.out[0])[:, None] * self.strides[0]
        row = row + np.arange(self.rows) * self.rates[0]
        lines = row[:, None, :] * self.count + np.arange(self.count)[:, None]
        x = ops.take(x, lines.reshape(-1), axis=2)
        return ops.reshape(x, (-1, groups, self.out[0] * self.count, self.band_row, channels))

    def output(self, ops, y):
        """The operator's output of the products."""
        window, channels = self.window, self.group_channels
        y = ops.reshape(y, (-1, window.groups, self.out[0], self.width, channels))
        if self.width > self.out[1]:
            y = y[:, :, :, : self.out[1]]
        out = self.out[2 - window.rank :]
        y = ops.reshape(y, (-1, window.groups, *out, channels))
        order = self._positions_first()
        y = ops.transpose(y, [order.index(axis) for axis in range(len(order))])
        return ops.reshape(y, window.shape(-1, out, window.groups * channels))

    def _positions_first(self):
        """The order of axes from a grouped tensor to (B, groups, *spatial, channels)."""
        window = self.window
        channel = window.group_channel_axis
        group = 2 * window.channel_axis + 1 - channel
        axes = range(window.rank + 3)
        return [0, group, *(axis for axis in axes if axis not in (0, group, channel)), channel]


def apply(x, kernel, problem):
    """Y[b, p, c] = sum over taps of kernel[b, p, tap, group of c] * X[b, window of p at tap, c]."""
    ops, window, tiles = namespace(x), problem.window, _Tiles(problem)
    # (B, groups, *positions, taps)
    kernel = to_accumulation_dtype(kernel)
    if window.data_format == CHANNELS_LAST:
        kernel = ops.moveaxis(kernel, -1, 1)
    else:
        kernel = ops.moveaxis(ops.moveaxis(kernel, 2, 1), 2, -1)
    kernel = ops.reshape(kernel, (-1, window.groups, *tiles.out, window.taps))
    return _product(ops, x, tiles.spread(ops, tiles.fill(ops, kernel)), tiles)


def apply_generated(x, hidden, weight, bias, problem):
    """The same, channels last, with the kernels ``hidden @ weight + bias``.

    A weight with columns of zeros generates the bands as they are multiplied.
    """
    ops, window, tiles = namespace(x), problem.window, _Tiles(problem)

    def spread(weight):
        weight = ops.reshape(to_accumulation_dtype(weight), (-1, window.taps, window.groups))
        return tiles.spread(ops, ops.transpose(weight, (2, 0, 1)))

    hidden, channels = to_accumulation_dtype(hidden), hidden.shape[-1]
    hidden = tiles.fill(ops, ops.reshape(hidden, (-1, *tiles.out, channels)))
    hidden = ops.reshape(hidden, (-1, 1, tiles.out[0] * tiles.width, channels))
    weights = ops.matmul(hidden, spread(weight)) + spread(ops.expand_dims(bias, 0))
    return _product(ops, x, weights, tiles)


def _product(ops, x, weights, tiles):
    values = tiles.values(ops, split_groups(to_accumulation_dtype(x), tiles.window))
    y = tiles.output(ops, ops.matmul(tiles.bands(ops, weights), values))
    return ops.cast(y, x.dtype)


def _pad_end(ops, tensor, count, axis=-1):
    if count == 0:
        return tensor
    pads = [(0, 0)] * len(tensor.shape)
    pads[axis] = (0, count)
    return ops.pad(tensor, pads)
