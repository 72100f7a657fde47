"""The parameters of a call of the native core, and the shapes of its results.

``Params`` mirrors ``InvolutionParams`` of ``csrc/params.h``. JAX's FFI, the custom ops of
TensorFlow and PyTorch, and ctypes pass it as a list of 64-bit integers, ``Params.encode``.
"""

import dataclasses
import itertools
import math
from typing import Any

from involution.ops.autodiff import FORWARD, INPUT_GRAD, KERNEL_GRAD
from involution.ops.frameworks import dtype_name
from involution.ops.problem import cached
from involution.ops.tensor_utils import pads
from involution.ops.validation import CHANNELS_FIRST, INTERLEAVED
from involution.ops.window import Window

# Encoded by their index.
PASSES = (FORWARD, INPUT_GRAD, KERNEL_GRAD)
DTYPES = ("float64", "float32", "bfloat16", "float16")

# Which arguments of a fused pass have a batch axis.
HAS_BATCH_AXIS = {
    FORWARD: (True, True, False, False),
    INPUT_GRAD: (True, False, False, True),
    KERNEL_GRAD: (True, True, False, True),
}
# Indices, among the arguments of a fused pass, of the operator's input (in its gradient: of the
# output's gradient) and of the hidden channels.
FEATURES_ARG = {FORWARD: 0, INPUT_GRAD: 3, KERNEL_GRAD: 0}
HIDDEN_ARG = {FORWARD: 1, INPUT_GRAD: 0, KERNEL_GRAD: 1}

# Integers, or tensors for sizes that TensorFlow knows at run time only.
Int = Any
Spatial = tuple[Int, Int, Int]


@dataclasses.dataclass(frozen=True)
class Params:
    """``InvolutionParams`` of ``csrc/params.h``: the same fields in the same order."""

    pass_: Int
    dtype: Int
    channels_first: Int
    interleaved: Int
    channels: Int
    groups: Int
    input_size: Spatial
    output_size: Spatial
    kernel_size: Spatial
    strides: Spatial
    dilation_rate: Spatial
    pad_before: Spatial
    hidden_channels: Int = 0
    upsampling: Spatial = (1, 1, 1)

    def encode(self) -> list:
        return [
            self.pass_,
            self.dtype,
            self.channels_first,
            self.interleaved,
            self.channels,
            self.groups,
            *self.input_size,
            *self.output_size,
            *self.kernel_size,
            *self.strides,
            *self.dilation_rate,
            *self.pad_before,
            self.hidden_channels,
            *self.upsampling,
        ]

    @classmethod
    def decode(cls, encoded) -> "Params":
        values = iter(encoded)
        return cls(
            **{
                field.name: tuple(itertools.islice(values, 3))
                if field.type == Spatial
                else next(values)
                for field in dataclasses.fields(cls)
            }
        )

    @property
    def pass_name(self) -> str:
        return PASSES[self.pass_]

    @property
    def channels_per_group(self) -> int:
        return self.channels // self.groups

    @property
    def taps(self) -> int:
        """Number of positions in one window."""
        return math.prod(self.kernel_size)

    @property
    def result_size(self) -> Spatial:
        """Spatial sizes of the result."""
        return self.input_size if self.pass_name == INPUT_GRAD else self.output_size


def with_pass(encoded, pass_) -> list:
    """The encoded parameters of another pass of the same call."""
    return dataclasses.replace(Params.decode(encoded), pass_=PASSES.index(pass_)).encode()


def encode(pass_, window: Window, x_sizes, a, b) -> list:
    """The encoded parameters of a pass with the arguments ``a`` and ``b``."""
    return _encode(pass_, window, x_sizes, b if pass_ == INPUT_GRAD else a)


def encode_fused(pass_, window: Window, x_sizes, arguments) -> list:
    """The encoded parameters of a fused pass."""
    hidden_channels = arguments[HIDDEN_ARG[pass_]].shape[-1]
    return _encode(pass_, window, x_sizes, arguments[FEATURES_ARG[pass_]], hidden_channels)


def _encode(pass_, window, x_sizes, features, hidden_channels=0) -> list:
    dtype = dtype_name(features.dtype)
    channels = features.shape[window.channel_axis]
    return list(_encode_sizes(window, tuple(x_sizes), pass_, dtype, channels, hidden_channels))


@cached
def _encode_sizes(window, x_sizes, pass_, dtype, channels, hidden_channels) -> list:
    # With one tap the dilation rate has no effect, and may be too large for the core: 1.
    dilation_rate = [
        d if k > 1 else 1 for k, d in zip(window.kernel_size, window.dilation_rate, strict=True)
    ]

    def pad_rank(values, fill):
        return (*[fill] * (3 - window.rank), *values)

    return Params(
        pass_=PASSES.index(pass_),
        dtype=DTYPES.index(dtype),
        channels_first=int(window.data_format == CHANNELS_FIRST),
        interleaved=int(window.group_layout == INTERLEAVED),
        channels=channels,
        groups=window.groups,
        input_size=pad_rank(x_sizes, 1),
        output_size=pad_rank(window.output_sizes(x_sizes), 1),
        kernel_size=pad_rank(window.kernel_size, 1),
        strides=pad_rank(window.strides, 1),
        dilation_rate=pad_rank(dilation_rate, 1),
        pad_before=pad_rank([before for before, _ in pads(x_sizes, window)], 0),
        hidden_channels=hidden_channels,
        upsampling=pad_rank(window.upsampling, 1),
    ).encode()


def result_shape(pass_, window: Window, x_sizes, a, b) -> tuple:
    """Shape of the result of a pass."""
    channels = (b if pass_ == INPUT_GRAD else a).shape[window.channel_axis]
    if pass_ == KERNEL_GRAD:
        output_sizes = window.output_sizes(x_sizes)
        return window.shape(a.shape[0], output_sizes, window.taps, window.groups)
    sizes = x_sizes if pass_ == INPUT_GRAD else window.output_sizes(x_sizes)
    return window.shape(a.shape[0], sizes, channels)


def fused_result_shapes(pass_, window: Window, x_sizes, arguments) -> tuple[tuple, tuple]:
    """Shapes of the two results of a fused pass.

    The second result is empty except in the kernel gradient: there it has, for each sample, the
    gradient of the generator's weight and, as its last row, that of the bias.
    """
    features, hidden = arguments[FEATURES_ARG[pass_]], arguments[HIDDEN_ARG[pass_]]
    batch, channels = features.shape[0], features.shape[window.channel_axis]
    if pass_ == KERNEL_GRAD:
        dweights = (batch, hidden.shape[-1] + 1, window.taps * window.groups)
        return (batch, *window.output_sizes(x_sizes), hidden.shape[-1]), dweights
    sizes = x_sizes if pass_ == INPUT_GRAD else window.output_sizes(x_sizes)
    return window.shape(batch, sizes, channels), (0,)


def accumulation_dtype(dtype) -> str:
    """The dtype of sums."""
    return "float64" if dtype_name(dtype) == "float64" else "float32"
