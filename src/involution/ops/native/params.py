"""What the core is told of a call: a list of integers, as ``csrc/involution.h`` has it."""

import keras

from involution.ops.autodiff import INPUT, KERNEL, OUTPUT
from involution.ops.tensor_utils import pads
from involution.ops.validation import CHANNELS_FIRST, INTERLEAVED
from involution.ops.window import Window

MEMBERS = {OUTPUT: 0, INPUT: 1, KERNEL: 2}
DTYPES = {"float64": 0, "float32": 1, "bfloat16": 2, "float16": 3}


# Which arguments of a fused member have a batch.
BATCHED = {
    OUTPUT: (True, True, False, False),
    INPUT: (True, False, False, True),
    KERNEL: (True, True, False, True),
}
# Where the operator's input, or for its gradient the output's, stands in a fused member's
# arguments, and where the hidden channels do.
FEATURES = {OUTPUT: 0, INPUT: 3, KERNEL: 0}
HIDDEN = {OUTPUT: 1, INPUT: 0, KERNEL: 1}


def numbers(member, g: Window, x_sizes, a, b) -> list:
    """What the core is told; integers, or tensors where TensorFlow does not know sizes yet."""
    # The tensor with the channels: x for the output and the kernel gradient, dy for the input's.
    return _numbers(member, g, x_sizes, b if member == INPUT else a)


def fused_numbers(member, g: Window, x_sizes, arguments) -> list:
    """The same for a member of the fused family, given all its arguments."""
    told = _numbers(member, g, x_sizes, arguments[FEATURES[member]])
    return [*told, arguments[HIDDEN[member]].shape[-1]]


def _numbers(member, g, x_sizes, features) -> list:
    dtype = keras.backend.standardize_dtype(features.dtype)

    def three(values, fill):
        return [fill] * (3 - g.rank) + list(values)

    return [
        MEMBERS[member],
        DTYPES[dtype],
        int(g.data_format == CHANNELS_FIRST),
        int(g.group_layout == INTERLEAVED),
        features.shape[g.channel_axis],
        g.groups,
        *three(x_sizes, 1),
        *three(g.output_sizes(x_sizes), 1),
        *three(g.kernel_size, 1),
        *three(g.strides, 1),
        # Of a single tap there is no telling how far the next one is.
        *three((d if k > 1 else 1 for k, d in zip(g.kernel_size, g.dilation_rate, strict=True)), 1),
        *three((before for before, _ in pads(x_sizes, g)), 0),
    ]


def result_shape(member, g: Window, x_sizes, a, b) -> tuple:
    channels = (b if member == INPUT else a).shape[g.channel_axis]
    if member == KERNEL:
        return g.shape(a.shape[0], g.output_sizes(x_sizes), g.taps, g.groups)
    return g.shape(a.shape[0], x_sizes if member == INPUT else g.output_sizes(x_sizes), channels)


def wide_type(dtype) -> str:
    """The type that sums are made in."""
    return "float64" if keras.backend.standardize_dtype(dtype) == "float64" else "float32"


def fused_shapes(member, g: Window, x_sizes, arguments) -> tuple[tuple, tuple]:
    """Shapes of a fused member's two results; the second is empty but for the kernel's gradient:
    that of the generator's weight and below it the bias, for each sample."""
    features, hidden = arguments[FEATURES[member]], arguments[HIDDEN[member]]
    batch, channels = features.shape[0], features.shape[g.channel_axis]
    if member == KERNEL:
        weights = (batch, hidden.shape[-1] + 1, g.taps * g.groups)
        return (batch, *g.output_sizes(x_sizes), hidden.shape[-1]), weights
    sizes = x_sizes if member == INPUT else g.output_sizes(x_sizes)
    return g.shape(batch, sizes, channels), (0,)
