"""What the core is told of a call: a list of integers, as ``native/involution.h`` has it."""

import keras

from involution.ops.geometry import CHANNELS_FIRST, INTERLEAVED, Geometry
from involution.ops.gradients import INPUT, KERNEL, OUTPUT
from involution.ops.views import pads

MEMBERS = {OUTPUT: 0, INPUT: 1, KERNEL: 2}
DTYPES = {"float64": 0, "float32": 1, "bfloat16": 2, "float16": 3}


def numbers(member, g: Geometry, x_sizes, a, b) -> list:
    """What the core is told; integers, or tensors where TensorFlow does not know sizes yet."""
    dtype = keras.backend.standardize_dtype(a.dtype)
    # The tensor with the channels: x for the output and the kernel gradient, dy for the input's.
    channels = (b if member == INPUT else a).shape[g.channel_axis]

    def three(values, fill):
        return [fill] * (3 - g.rank) + list(values)

    return [
        MEMBERS[member],
        DTYPES[dtype],
        int(g.data_format == CHANNELS_FIRST),
        int(g.group_layout == INTERLEAVED),
        channels,
        g.groups,
        *three(x_sizes, 1),
        *three(g.output_sizes(x_sizes), 1),
        *three(g.kernel_size, 1),
        *three(g.strides, 1),
        # Of a single tap there is no telling how far the next one is.
        *three((d if k > 1 else 1 for k, d in zip(g.kernel_size, g.dilation_rate, strict=True)), 1),
        *three((before for before, _ in pads(x_sizes, g)), 0),
    ]


def result_shape(member, g: Geometry, x_sizes, a, b) -> tuple:
    channels = (b if member == INPUT else a).shape[g.channel_axis]
    if member == KERNEL:
        return g.shape(a.shape[0], g.output_sizes(x_sizes), g.taps, g.groups)
    return g.shape(a.shape[0], x_sizes if member == INPUT else g.output_sizes(x_sizes), channels)
