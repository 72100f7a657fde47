"""Average pooling of features, by the strides of the involution."""

import math

from keras import ops

from involution.kernel_generators.pointwise import traces_convolutions
from involution.ops.frameworks import namespace
from involution.ops.tensor_utils import to_accumulation_dtype
from involution.ops.validation import CHANNELS_LAST
from involution.ops.window import ceil_div


def average_pool(x, strides, centered=False):
    """Means over windows that tile ``x`` (B, *spatial, C): (B, *ceil(n / stride), C).

    The windows start at position 0, so that the last may be partial; with ``centered`` they start
    as for "same" padding, so that the first may be partial too. The mean of a partial window is
    that of its positions inside the input.
    """
    if all(s == 1 for s in strides):
        return x
    shape = ops.shape(x)
    counts = [ceil_div(n, s) for n, s in zip(shape[1:-1], strides, strict=True)]
    missing = [c * s - n for c, s, n in zip(counts, strides, shape[1:-1], strict=True)]
    before = [m // 2 if centered else 0 for m in missing]
    known = all(isinstance(m, int) for m in missing)
    if traces_convolutions() and known and not any(missing):
        return ops.average_pool(x, strides, strides, data_format=CHANNELS_LAST)

    def sums(values):
        if known:
            padding = [(b, m - b) for b, m in zip(before, missing, strict=True)]
            padded = namespace(x).pad(to_accumulation_dtype(values), [(0, 0), *padding, (0, 0)])
        else:
            # PyTorch's exporter specializes on whether padding is zero and whether a slice ends
            # where its tensor does: so it is padded by more than needed, then sliced.
            max_pad = [s - 1 if centered else 0 for s in strides]
            padding = [(a, s) for a, s in zip(max_pad, strides, strict=True)]
            padded = namespace(x).pad(to_accumulation_dtype(values), [(0, 0), *padding, (0, 0)])
            parts = (
                slice(a - b, a - b + c * s)
                for a, b, c, s in zip(max_pad, before, counts, strides, strict=True)
            )
            padded = padded[(slice(None), *parts)]
        # One dimension at a time: TensorFlow takes five times as long for all at once.
        for axis, (count, stride) in enumerate(zip(counts, strides, strict=True), start=1):
            before_axis, after_axis = ops.shape(padded)[:axis], ops.shape(padded)[axis + 1 :]
            windows = ops.reshape(padded, (*before_axis, count, stride, *after_axis))
            padded = ops.sum(windows, axis=axis + 1)
        return padded

    if known and not any(missing):
        return ops.cast(sums(x) / math.prod(strides), x.dtype)
    return ops.cast(sums(x) / sums(ops.ones_like(x[:1, ..., :1])), x.dtype)
