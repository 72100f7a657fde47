"""The paper's layer as a plain PyTorch module, in one to three dimensions."""

import dataclasses
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
from involution.ops.frameworks.torch import is_autocast
from involution.ops.tensor_utils import to_accumulation_dtype
from involution.ops.validation import (
    CAUSAL,
    CONTIGUOUS,
    IN_BOUNDS,
    SYMMETRIC,
    VALID,
    check_rate,
    standardize_softmax,
    standardize_tuple,
)
from involution.torch.functional import apply_generated, apply_kernel, make_window
from involution.torch.generators import (
    CONVOLUTIONS,
    GENERATORS,
    REDUCING,
    Bottleneck,
    Convolutional,
    PairwiseAttention,
    convolution,
)
from involution.torch.positionwise import (
    apply_generated_exactly,
    evaluate,
    has_plain_call,
    is_exact,
)
from involution.torch.softmax import softmax, taps_inside
from involution.utils.arguments import names_required

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
        reduction_ratio=None,
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
        self.kernel_softmax = standardize_softmax(kernel_softmax)
        self.return_kernel = bool(return_kernel)
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
            if make in REDUCING and reduction_ratio is not None:
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
        check_input(x, self.channels, self.rank, type(self).__name__, self.parameter_dtype())
        features = x
        if not getattr(self.kernel_generator, "uses_full_input", False):
            features = _features(x, self.window)
        return self._output(x, features, self.window)

    def _output(self, x, features, window, present=None):
        """The module's output.

        Args:
            x: The input; of a step, after the inputs in its cache.
            features: The generator's input.
            window: The windows in ``x``.
            present: For a step, as for ``taps_inside``: the outputs are those of the last windows.
        """
        last = self._fusable_convolution()
        if last is not None:
            hidden = self._hidden(features)
            if present is not None:
                hidden = _last_windows(hidden, x, window)
            bias = cast(torch.Tensor, last.bias)
            if isinstance(self.kernel_generator, Convolutional):
                constant = self.kernel_generator.constant(bias)
                bias = bias if constant is None else bias + constant
            apply = apply_generated_exactly if self._is_exact() else apply_generated
            y = apply(x, hidden, last.weight, bias, window, self.implementation)
            return y if self.projection is None else self._call(self.projection, y)
        if present is None:
            kernel_map = self.make_kernel_map(features)
        elif isinstance(self.kernel_generator, PairwiseAttention):
            kernel_map = self.kernel_generator.step(features, present)
        else:
            kernel_map = _last_windows(self.make_kernel_map(features), x, window)
        kernel = kernels_of(kernel_map, window, self.kernel_softmax, x, present, self._is_causal)
        if self.kernel_dropout is not None:
            kernel = self.kernel_dropout(kernel)
        y = apply_kernel(x, kernel, window, self.implementation)
        if self.projection is not None:
            y = self._call(self.projection, y)
        return (y, kernel) if self.return_kernel else y

    @property
    def _is_causal(self) -> bool:
        return self.window.padding == CAUSAL

    def _is_exact(self) -> bool:
        return self._is_causal and is_exact(self)

    def _call(self, module, x):
        return evaluate(module, x) if self._is_causal else module(x)

    def parameter_dtype(self) -> torch.dtype | None:
        """The dtype of the parameters; None if the generator is not one of this package's."""
        generator = self.kernel_generator
        if generator is not None and type(generator) not in GENERATORS.values():
            return None
        return next((parameter.dtype for parameter in self.parameters()), None)

    def _hidden(self, features):
        if self.kernel_generator is None:
            return self._call(self.conv1, self.pool(features))
        return cast(Convolutional, self.kernel_generator).hidden(features)

    def make_kernel_map(self, features):
        if self.kernel_generator is None:
            return self._call(self.conv2, self._hidden(features))
        return self._call(self.kernel_generator, features)

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
            map(has_plain_call, (*modules, conv))
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


def check_axes(x, rank, name):
    """ValueError unless ``x`` has the axes of batch and channels, and ``rank`` spatial ones."""
    if x.dim() != rank + 2:
        raise ValueError(
            f"The input of {name} must have the axes (batch, channels, {rank} spatial). "
            f"Received: x.shape={tuple(x.shape)}"
        )


# Functions that inspect tensors are nodes of the graphs of torch.fx.
@torch.fx.wrap
def check_input(x, channels, rank, name, dtype):
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
    check_dtype(x, "x", f"The input of {name} must be of the dtype of its parameters", dtype)


def check_dtype(tensor, argument, rule, dtype):
    """ValueError unless a tensor has the dtype of the parameters, or is cast to it; None: any."""
    if dtype not in (None, tensor.dtype) and not is_autocast(tensor.device.type):
        raise ValueError(
            f"{rule}, {dtype}: use {argument}.to({dtype}), or the module's `to`, or "
            "torch.autocast. "
            f"Received: {argument}.dtype={tensor.dtype}"
        )


@torch.fx.wrap
def _features(x, window):
    """The generator's input: starts at the first window's center; of causal windows the ends."""
    if window.padding == CAUSAL:
        return x[..., :: window.strides[0]]
    shape = (x.shape[0], *x.shape[2:], x.shape[1])
    center_output_sizes(window, shape)
    parts = center_slices(window, shape[1:-1])
    # Not the truth of ``parts``: torch.compile would specialize on the sizes in it.
    return x[(slice(None), slice(None), *parts)] if len(parts) else x


@torch.fx.wrap
def kernels_of(kernel_map, window, kernel_softmax, x, present=None, is_causal=False):
    """The kernels (B, groups, taps, *out_spatial) of a map (B, groups * taps, *out_spatial)."""
    expected = window.groups * window.taps
    if kernel_map.dim() != window.rank + 2 or kernel_map.shape[1] != expected:
        raise ValueError(
            "`kernel_generator` must return a kernel map with groups * taps = "
            f"{window.groups} * {window.taps} channels at every output position. "
            f"Received: a map of shape {tuple(kernel_map.shape)}"
        )
    kernel = kernel_map.unflatten(1, (window.groups, window.taps))
    if not kernel_softmax:
        return kernel
    inside = None
    if kernel_softmax == IN_BOUNDS:
        if present is None:
            present = torch.ones_like(to_accumulation_dtype(x[:1, :1]))
        inside = taps_inside(window, present)
    return softmax(kernel, inside, is_causal).to(kernel.dtype)


def _last_windows(tensor, x, window):
    """The part of a tensor (B, channels, n) at the last windows of ``x``."""
    return tensor[..., tensor.shape[-1] - (x.shape[-1] - window.last_offset[0]) :]


torch.fx.wrap("apply_generated")
torch.fx.wrap("apply_generated_exactly")
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
            paper's code), ``"valid"``, ``"same"`` (as in Keras), ``"causal"`` (``Involution1d``),
            an integer, an integer for each spatial dimension, or a pair (before, after) for each.
        dilation: Integer, or one for each spatial dimension.
        groups: Number of groups; divides the channels. None: channels // group_channels, or one
            group if there are fewer channels than that.
        group_channels: Channels per group, if ``groups`` is None.
        reduction_ratio: Input channels per hidden channel of a generator given by name, if it has
            hidden channels. None: its default, 4 for ``"bottleneck"`` and ``"contextual"``, 2 for
            ``"large_context"``.
        kernel_generator: None or ``"bottleneck"`` for the paper's, ``"contextual"``,
            ``"large_context"``, ``"linear"``, ``"low_rank"``, ``"pairwise_attention"`` or
            ``"static"``; a module from features (B, channels, *spatial) to a kernel map (B, groups
            * taps, *out_spatial), channels group-major; or a function of (channels, window) that
            returns one, such as a class of ``involution.torch.generators``, also with ``device``
            and ``dtype`` if they are given.
        out_channels: Channels of the output, by a 1x1 convolution after the involution. None: the
            input's channels, without it.
        kernel_softmax: Whether to apply softmax to the weights of each window; ``"in_bounds"``: to
            those of the taps inside the input, the others are 0.
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

    With ``padding="causal"``, windows end at the position of their output, and its kernel is
    generated from the input there (``"contextual"``: and before). In eval mode, a sequence that is
    computed in parts by ``step`` equals the whole to the last bit on CPUs, except after modules of
    other classes than convolutions, batch normalization and ReLU.

    >>> import torch
    >>> from involution.torch import Involution1d
    >>> Involution1d(32, kernel_size=9)(torch.ones(2, 32, 100)).shape
    torch.Size([2, 32, 100])
    """
        + _SHARED_DOC
    )
    rank = 1

    def initial_cache(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The cache of ``step`` before the first input of a sequence.

        Args:
            batch_size: Number of sequences.

        Returns:
            (inputs, valid): the inputs before the next one, (B, channels, (kernel_size - 1) *
            dilation), and which of them are of the sequence, (B, (kernel_size - 1) * dilation).

        Raises:
            ValueError: The module is not causal, has a stride, or its kernels are generated from
                more inputs than those of a window.
        """
        self._check_steps()
        (batch_size,) = standardize_tuple("batch_size", batch_size, 1)
        parameter = next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))
        shape = batch_size, self.channels, self.window.last_offset[0]
        return (
            parameter.new_zeros(shape),
            parameter.new_zeros((batch_size, shape[2]), dtype=torch.bool),
        )

    def step(self, x, cache):
        """The outputs of the next inputs of a sequence.

        Args:
            x: Tensor (B, channels, n), the next n inputs.
            cache: From ``initial_cache`` or the previous step.

        Returns:
            (output, cache): the module's output for these n positions, and the next cache.

        Raises:
            ValueError: As for ``initial_cache``, or a shape is another.

        Example:

        >>> import torch
        >>> from involution.torch import Involution1d
        >>> layer = Involution1d(32, 4, padding="causal").eval()
        >>> x = torch.randn(1, 32, 10)
        >>> cache, outputs = layer.initial_cache(1), []
        >>> for part in x.split(3, dim=2):
        ...     y, cache = layer.step(part, cache)
        ...     outputs.append(y)
        >>> torch.equal(torch.cat(outputs, 2), layer(x))
        True
        """
        self._check_steps()
        check_input(x, self.channels, self.rank, type(self).__name__, self.parameter_dtype())
        inputs, valid = cache
        size = self.window.last_offset[0]
        if inputs.shape != (len(x), self.channels, size) or valid.shape != (len(x), size):
            raise ValueError(
                f"`cache` must have the shapes {(len(x), self.channels, size)} and "
                f"{(len(x), size)}. Received: {tuple(inputs.shape)} and {tuple(valid.shape)}"
            )
        count = x.shape[2]
        if count == 0:
            raise ValueError(f"A step must have at least one position. Received: {tuple(x.shape)}")
        inputs = torch.cat((inputs.to(x), x), 2)
        valid = torch.cat((valid, valid.new_ones((len(x), count))), 1)
        features = inputs
        if not getattr(self.kernel_generator, "uses_full_input", False):
            features = inputs[:, :, size - self._context() :]
        window = dataclasses.replace(self.window, padding=VALID)
        y = self._output(inputs, features, window, to_accumulation_dtype(valid.unsqueeze(1)))
        # Copies: neither the parts of a sequence nor their graphs are kept alive by its cache.
        return y, (inputs[:, :, count:].detach().clone(), valid[:, count:].clone())

    def _context(self) -> int:
        return getattr(self.kernel_generator, "context", 0)

    def _check_steps(self):
        window, generator = self.window, self.kernel_generator
        if not self._is_causal or window.strides != (1,):
            raise ValueError(
                "Steps require padding='causal' and stride=1. "
                f"Received: padding={window.padding!r}, stride={window.strides[0]}"
            )
        if getattr(generator, "uses_full_input", False) and not isinstance(
            generator, PairwiseAttention
        ):
            raise ValueError(
                "Steps require a generator that uses the features at the windows' ends. "
                f"Received: kernel_generator={type(generator).__name__}, of the full input"
            )
        if self._context() > window.last_offset[0]:
            raise ValueError(
                "Steps require kernels that are generated from at most (kernel_size - 1) * "
                f"dilation = {window.last_offset[0]} earlier inputs. Received: {self._context()}"
            )


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
