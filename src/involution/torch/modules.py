"""The paper's layer as a plain PyTorch module, in one to three dimensions."""

from typing import cast

import torch
from torch import nn

from involution.ops.centers import (
    center_output_sizes,
    center_slices,
    check_padding,
    number_of_groups,
)
from involution.ops.dispatch import standardize_implementation
from involution.ops.validation import CONTIGUOUS, SYMMETRIC, check_rate, standardize_tuple
from involution.torch.functional import apply_generated, apply_kernel, make_window
from involution.torch.generators import (
    CONVOLUTIONS,
    GENERATORS,
    Bottleneck,
    Convolutional,
    convolution,
)
from involution.utils.arguments import names_required
from involution.utils.torch_hooks import is_hooked

_CHANNELS = "the input and the output have `channels`; `out_channels` adds a 1x1 convolution"
_NO_BIAS = "an involution has none; normalization after it, or `out_channels`, adds a bias"

# Arguments of other libraries, and what to write.
MISNAMED = {
    "in_channels": _CHANNELS,
    "filters": _CHANNELS,
    "strides": "use `stride`",
    "dilation_rate": "use `dilation`",
    "group_number": "use `groups`",
    "bias": _NO_BIAS,
    "use_bias": _NO_BIAS,
    "padding_mode": "outside the input are zeros; pad it before, with padding='valid'",
    "data_format": "the channels are on axis 1; memory formats are those of PyTorch",
}
check_names = names_required(
    "The output has the input's channels: for Conv{rank}d(64, 128, 3) write "
    "{name}(64, 3, out_channels=128), with a 1x1 convolution; for stride 2, stride=2.",
    MISNAMED,
)


class InvolutionNd(nn.Module):
    """The paper's layer in ``rank`` dimensions: the base of Involution1d, 2d and 3d."""

    rank: int
    kernel_generator: nn.Module | None
    # Of the paper's generator, the default.
    pool: nn.Module
    conv1: nn.Module
    conv2: nn.Module

    @check_names
    def __init__(
        self,
        channels,
        kernel_size=7,
        *,
        stride=1,
        padding=SYMMETRIC,
        dilation=1,
        groups=None,
        group_channels=16,
        reduction_ratio=4,
        kernel_generator=None,
        out_channels=None,
        kernel_softmax=False,
        kernel_dropout=0.0,
        group_layout=CONTIGUOUS,
        return_kernel=False,
        implementation=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        (self.channels,) = standardize_tuple("channels", channels, 1)
        (group_channels,) = standardize_tuple("group_channels", group_channels, 1)
        if groups is not None:
            (groups,) = standardize_tuple("groups", groups, 1)
        groups = number_of_groups(self.channels, groups, group_channels)
        self.window = make_window(
            kernel_size, stride, padding, dilation, groups, group_layout, self.rank
        )
        check_padding(self.window)
        if implementation is not None:
            standardize_implementation(implementation)
        self.implementation = implementation
        self.kernel_softmax, self.return_kernel = bool(kernel_softmax), bool(return_kernel)
        self._make_generator(kernel_generator, reduction_ratio, factory)
        check_rate("kernel_dropout", kernel_dropout)
        self.kernel_dropout = nn.Dropout(kernel_dropout) if kernel_dropout else None
        self.projection: nn.Module | None = None
        if out_channels is not None:
            (outputs,) = standardize_tuple("out_channels", out_channels, 1)
            self.projection = convolution(self.rank, self.channels, outputs, **factory)

    def _make_generator(self, identifier, reduction_ratio, factory):
        if isinstance(identifier, nn.Module):
            self.kernel_generator = identifier
            return
        # Functions of (channels, window) need no other arguments.
        options = {name: value for name, value in factory.items() if value is not None}
        make = identifier
        if identifier is None or isinstance(identifier, str):
            make = GENERATORS.get(("bottleneck" if identifier is None else identifier).lower())
            if make is not None and issubclass(make, Bottleneck):
                options["reduction_ratio"] = reduction_ratio
        generator = make(self.channels, self.window, **options) if callable(make) else None
        if not isinstance(generator, nn.Module):
            raise ValueError(
                "`kernel_generator` must be a module, a function (channels, window) that returns "
                f"one, or one of {', '.join(GENERATORS)}. Received: kernel_generator={identifier!r}"
            )
        if make is not Bottleneck:
            self.kernel_generator = generator
            return
        self.kernel_generator = None
        # Children of the module itself, as in the paper's code.
        for name in ("pool", "conv1", "conv2"):
            setattr(self, name, getattr(generator, name))

    def forward(self, x):
        _check_input(x, self.channels, self.rank, type(self).__name__, self._dtype())
        features = x
        if not getattr(self.kernel_generator, "uses_full_input", False):
            features = _features(x, self.window)
        last = self._fusable_convolution()
        if last is not None:
            hidden = self._hidden(features)
            y = apply_generated(x, hidden, last.weight, last.bias, self.window, self.implementation)
            return y if self.projection is None else self.projection(y)
        kernel_map = self._kernel_map(features)
        kernel = _kernel_of(kernel_map, self.window, self.kernel_softmax)
        if self.kernel_dropout is not None:
            kernel = self.kernel_dropout(kernel)
        y = apply_kernel(x, kernel, self.window, self.implementation)
        if self.projection is not None:
            y = self.projection(y)
        return (y, kernel) if self.return_kernel else y

    def _dtype(self) -> torch.dtype | None:
        """The dtype of the parameters; None if the generator is not one of this package's."""
        generator = self.kernel_generator
        if generator is not None and type(generator) not in GENERATORS.values():
            return None
        return next((parameter.dtype for parameter in self.parameters()), None)

    def _hidden(self, features):
        if self.kernel_generator is None:
            return self.conv1(self.pool(features))
        return cast(Convolutional, self.kernel_generator).hidden(features)

    def _kernel_map(self, features):
        if self.kernel_generator is None:
            return self.conv2(self._hidden(features))
        return self.kernel_generator(features)

    def _fusable_convolution(self) -> nn.Module | None:
        """The generator's last convolution, if its output may be computed where it is applied; None
        if the kernels must be stored: they are used elsewhere, or the call has other effects."""
        generator = self.kernel_generator
        if self.kernel_softmax or self.kernel_dropout is not None or self.return_kernel:
            return None
        if generator is None:
            modules: tuple[nn.Module, ...] = (self.conv2,)
        elif isinstance(generator, Convolutional) and (
            type(generator).forward is Convolutional.forward
        ):
            modules = (generator, generator.conv2)
        else:
            return None
        sequential = modules[-1]
        if type(sequential) is not nn.Sequential or len(sequential) != 1:
            return None
        conv = sequential[0]
        if type(conv) is not CONVOLUTIONS[self.rank] or not all(
            map(_has_plain_call, (*modules, conv))
        ):
            return None
        one = (1,) * self.rank
        channels = self.window.groups * self.window.taps
        plain = (
            conv.kernel_size == one
            and conv.stride == one
            and conv.padding == (0,) * self.rank
            and conv.groups == 1
            and conv.bias is not None
            and conv.out_channels == channels
        )
        return conv if plain else None

    def __prepare_scriptable__(self):
        # Called by torch.jit.script.
        raise NotImplementedError(
            "torch.jit.script does not support involution: use torch.compile, torch.export or "
            f"torch.jit.trace. Received: {type(self).__name__}"
        )

    def extra_repr(self):
        window = self.window
        text = f"{self.channels}, kernel_size={window.kernel_size}, stride={window.strides}"
        if window.padding != SYMMETRIC:
            text += f", padding={window.padding!r}"
        if any(d > 1 for d in window.dilation_rate):
            text += f", dilation={window.dilation_rate}"
        text += f", groups={window.groups}"
        if window.group_layout != CONTIGUOUS:
            text += f", group_layout={window.group_layout!r}"
        for name in ("kernel_softmax", "return_kernel", "implementation"):
            value = getattr(self, name)
            text += f", {name}={value!r}" if value else ""
        return text


def _has_plain_call(module) -> bool:
    """Whether calling a module runs its class's ``forward`` and has no other effect."""
    return "forward" not in vars(module) and not is_hooked(module)


def check_axes(x, rank, name):
    """ValueError unless ``x`` has the axes of batch and channels, and ``rank`` spatial ones."""
    if x.dim() != rank + 2:
        raise ValueError(
            f"The input of {name} must have the axes (batch, channels, {rank} spatial). "
            f"Received: x.shape={tuple(x.shape)}"
        )


# Functions that inspect tensors are nodes of the graphs of torch.fx.
@torch.fx.wrap
def _check_input(x, channels, rank, name, dtype):
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"The input of {name} must be a tensor. Received: {type(x).__name__}")
    check_axes(x, rank, name)
    shape = tuple(x.shape)
    if shape[1] != channels:
        hint = ""
        if shape[-1] == channels:
            last = rank + 1
            order = ", ".join(map(str, (0, last, *range(1, last))))
            hint = f"; for channels on the last axis, x.permute({order})"
        raise ValueError(
            f"The input of {name} must have {channels} channels on axis 1{hint}. "
            f"Received: x.shape={shape}"
        )
    if x.is_quantized or not x.is_floating_point():
        hint = ": dequantize it before, as by torch.ao.quantization.DeQuantStub"
        raise ValueError(
            f"The input of {name} must be of a floating-point dtype{hint if x.is_quantized else ''}"
            f". Received: x.dtype={x.dtype}"
        )
    if dtype not in (None, x.dtype) and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"The input of {name} must be of the dtype of its parameters, {dtype}: use "
            f"x.to({dtype}), or the module's `to`, or torch.autocast. Received: x.dtype={x.dtype}"
        )


@torch.fx.wrap
def _features(x, window):
    """The generator's input: starts at the first window's center."""
    shape = (x.shape[0], *x.shape[2:], x.shape[1])
    center_output_sizes(window, shape)
    parts = center_slices(window, shape[1:-1])
    # Not the truth of ``parts``: torch.compile would specialize on the sizes in it.
    return x[(slice(None), slice(None), *parts)] if len(parts) else x


@torch.fx.wrap
def _kernel_of(kernel_map, window, softmax):
    """The kernels (B, groups, taps, *out_spatial) of a map (B, groups * taps, *out_spatial)."""
    expected = window.groups * window.taps
    if kernel_map.dim() != window.rank + 2 or kernel_map.shape[1] != expected:
        raise ValueError(
            "`kernel_generator` must return a kernel map with groups * taps = "
            f"{window.groups} * {window.taps} channels at every output position. "
            f"Received: a map of shape {tuple(kernel_map.shape)}"
        )
    kernel = kernel_map.unflatten(1, (window.groups, window.taps))
    if softmax:
        dtype = torch.promote_types(kernel.dtype, torch.float32)
        kernel = torch.softmax(kernel, 2, dtype=dtype).to(kernel.dtype)
    return kernel


torch.fx.wrap("apply_generated")
torch.fx.wrap("apply_kernel")


# The three classes differ in their rank only and share one signature.
_SHARED_DOC = """

    Parameters exist from construction on. The state dict of the default generator has the names and
    the order of the paper's code, whose checkpoints load with ``strict=True``.

    Args:
        channels: Channels of the input, and of the output without ``out_channels``.
        kernel_size: Integer, or one for each spatial dimension: the window. All other arguments
            must be passed by name.
        stride: Integer, or one for each spatial dimension.
        padding: ``"symmetric"`` (floor((kernel_size - 1) * dilation / 2) on both sides, as in the
            paper's code), ``"valid"``, ``"same"`` (as in Keras), an integer, an integer for each
            spatial dimension, or a pair (before, after) for each.
        dilation: Integer, or one for each spatial dimension.
        groups: Number of groups; divides the channels. None: channels // group_channels, or one
            group if there are fewer channels than that.
        group_channels: Channels per group, if ``groups`` is None.
        reduction_ratio: Input channels per hidden channel of a generator given by name.
        kernel_generator: None or ``"bottleneck"`` for the paper's, ``"contextual"``, ``"linear"``,
            ``"pairwise_attention"`` or ``"static"``; a module from features (B, channels, *spatial)
            to a kernel map (B, groups * taps, *out_spatial), channels group-major; or a function
            of (channels, window) that returns one, such as a class of
            ``involution.torch.generators``, also with ``device`` and ``dtype`` if they are given.
        out_channels: Channels of the output, by a 1x1 convolution after the involution. None: the
            input's channels, without it.
        kernel_softmax: Whether to apply softmax to the weights of each window.
        kernel_dropout: Dropout rate on kernel weights.
        group_layout: ``"contiguous"`` (the paper) or ``"interleaved"`` (the keras.io example).
        return_kernel: Whether to return (output, kernel) or only the output.
        implementation: See ``involution.ops.involution``.
        device, dtype: Of the parameters.

    Call arguments:
        x: Tensor (B, channels, *spatial), in any memory format; ``torch.channels_last`` is the
            fastest.

    Returns:
        A tensor with the sizes that a convolution would give, in the memory format of ``x``; with
        ``return_kernel`` also the kernels, (B, groups, taps, *out_spatial).

    Raises:
        TypeError: An argument after ``kernel_size`` is not passed by name, or is of another
            library, such as ``in_channels``; the message says what to write.
        ValueError: An argument is out of its range, the groups do not divide the channels, or the
            input or the generator's map has another shape.

    Source: Li et al., arXiv:2103.06255.
    """


class Involution1d(InvolutionNd):
    __doc__ = (
        """The paper's involution layer for sequences: inputs (B, channels, length).

    >>> import torch
    >>> from involution.torch import Involution1d
    >>> Involution1d(32, kernel_size=9)(torch.ones(2, 32, 100)).shape
    torch.Size([2, 32, 100])
    """
        + _SHARED_DOC
    )
    rank = 1


class Involution2d(InvolutionNd):
    __doc__ = (
        """The paper's involution layer for images: inputs (B, channels, height, width).

    >>> import torch
    >>> from involution.torch import Involution2d
    >>> Involution2d(64, stride=2)(torch.ones(2, 64, 33, 20)).shape
    torch.Size([2, 64, 17, 10])
    """
        + _SHARED_DOC
    )
    rank = 2


class Involution3d(InvolutionNd):
    __doc__ = (
        """The paper's involution layer for volumes: inputs (B, channels, depth, height, width).

    >>> import torch
    >>> from involution.torch import Involution3d
    >>> Involution3d(16, kernel_size=3)(torch.ones(1, 16, 5, 6, 7)).shape
    torch.Size([1, 16, 5, 6, 7])
    """
        + _SHARED_DOC
    )
    rank = 3
