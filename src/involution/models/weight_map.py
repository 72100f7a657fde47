"""Maps from the arrays of a checkpoint to Keras weights."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class WeightMap:
    """A map from an array of a checkpoint to a Keras weight.

    Attributes:
        convert: From the checkpoint's array to the weight's.
        source_shape: From the weight's shape to that of the checkpoint's array.
    """

    convert: Callable
    source_shape: Callable


KERNEL = WeightMap(lambda a: a.transpose(2, 3, 1, 0), lambda s: (s[3], s[2], s[0], s[1]))
# Of a depthwise convolution: (C, 1, height, width) to (height, width, C, 1).
DEPTHWISE = WeightMap(lambda a: a.transpose(2, 3, 0, 1), lambda s: (s[2], s[3], s[0], s[1]))
IDENTITY = WeightMap(lambda a: a, lambda s: s)
TRANSPOSE = WeightMap(lambda a: a.T, lambda s: s[::-1])


def tap_major(taps) -> Callable:
    """Reorders the first axis from group * taps + tap to tap * groups + group."""
    return lambda a: a.reshape(-1, taps, *a.shape[1:]).swapaxes(0, 1).reshape(a.shape)
