"""Kernel generators: modules from features to kernel maps.

A generator is any module from features (B, channels, *spatial) to a kernel map (B, groups * taps,
*out_spatial), whose channels are group-major, ``group * taps + tap``, as in the paper's code.
Features begin at the first window's center; if the attribute ``uses_full_input`` is true, they are
the module's full input. For ``padding="causal"`` they are those at the windows' ends, one for each
output, whatever the strides; ``context`` (default 0) is the number of positions before it that a
kernel is generated from. For an upsampling, features are on the coarse grid, maps on the fine one.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import nn

from involution.ops import calls
from involution.ops.attention import attention_kernel
from involution.ops.centers import every_center
from involution.ops.tensor_utils import to_accumulation_dtype
from involution.ops.validation import CAUSAL, CONTIGUOUS, VALID, reduced_channels, standardize_tuple
from involution.ops.window import ceil_div
from involution.torch.functional import to_last
from involution.torch.positionwise import evaluate
from involution.torch.softmax import softmax, taps_inside

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
AVERAGE_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def named(**modules) -> nn.Sequential:
    """A Sequential of modules with names."""
    sequential = nn.Sequential()
    for name, module in modules.items():
        sequential.add_module(name, module)
    return sequential


def convolution(rank, inputs, outputs, kernel_size=1, *, stride=1, bias=True, **factory):
    """A convolution with the initial values of the paper's code: Kaiming normal, fan-out mode."""
    padding = "same" if kernel_size % 2 == 0 else kernel_size // 2
    conv = CONVOLUTIONS[rank](inputs, outputs, kernel_size, stride, padding, bias=bias, **factory)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def feature_strides(window) -> tuple[int, ...]:
    """Distances of the features of adjacent outputs."""
    return (1,) * window.rank if window.padding == CAUSAL else window.strides


def average_pool(window) -> nn.Module:
    """Means over windows that tile the features; a partial window's is that of its positions inside
    the features."""
    strides = feature_strides(window)
    if all(stride == 1 for stride in strides):
        return nn.Identity()
    return AVERAGE_POOLS[window.rank](strides, strides, ceil_mode=True)


class Convolutional(nn.Module):
    """A generator whose kernels are the output of a 1x1 convolution, ``conv2``, plus a constant."""

    uses_full_input = False
    context = 0

    def constant(self, like) -> torch.Tensor | None:
        """Tensor (groups * taps,) of the dtype and on the device of ``like``; None: 0."""
        return None

    def _make_last(self, hidden, window, **factory):
        self.is_causal = window.padding == CAUSAL
        outputs = window.groups * window.taps
        self.conv2 = named(conv=convolution(window.rank, hidden, outputs, **factory))

    def hidden(self, features):
        """Input of the last convolution: (B, hidden channels, *out_spatial)."""
        raise NotImplementedError  # each generator has its own

    def forward(self, features):
        kernel_map = self._call(self.conv2, self.hidden(features))
        constant = self.constant(kernel_map)
        if constant is None:
            return kernel_map
        return kernel_map + constant.reshape(-1, *[1] * (kernel_map.dim() - 2))

    def _call(self, module, x):
        return evaluate(module, x) if self.is_causal else module(x)


class Linear(Convolutional):
    """The simplest generator: average pooling by the strides, then one 1x1 convolution.

    Args:
        channels: Channels of the features.
        window: The involution's ``involution.ops.window.Window``, with its number of groups.
        device, dtype: Of the parameters.

    Example:

    >>> import torch
    >>> from involution.torch import Involution2d
    >>> layer = Involution2d(32, 3, kernel_generator="linear")
    >>> layer(torch.ones(1, 32, 8, 8)).shape
    torch.Size([1, 32, 8, 8])
    """

    def __init__(self, channels, window, *, device=None, dtype=None) -> None:
        super().__init__()
        self.pool = average_pool(window)
        self._make_last(channels, window, device=device, dtype=dtype)

    def hidden(self, features):
        return self.pool(features)


class Bottleneck(Convolutional):
    """The paper's generator: average pooling by the strides, a 1x1 convolution to channels //
    reduction_ratio, batch normalization, ReLU, a 1x1 convolution to groups * taps.

    Args:
        channels, window, device, dtype: As for ``Linear``.
        reduction_ratio: Channels of the features for each hidden channel.
        context_size: Kernel size of the first convolution.

    Raises:
        ValueError: ``reduction_ratio`` leaves no hidden channel.

    Source: Li et al., arXiv:2103.06255, section 3 and algorithm 1.

    Example:

    >>> import functools, torch
    >>> from involution.torch import Involution2d, generators
    >>> bottleneck = functools.partial(generators.Bottleneck, reduction_ratio=8)
    >>> Involution2d(32, 3, kernel_generator=bottleneck)(torch.ones(1, 32, 8, 8)).shape
    torch.Size([1, 32, 8, 8])
    """

    def __init__(
        self, channels, window, *, reduction_ratio=4, context_size=1, device=None, dtype=None
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        (ratio,) = standardize_tuple("reduction_ratio", reduction_ratio, 1)
        (context_size,) = standardize_tuple("context_size", context_size, 1)
        hidden = reduced_channels(channels, ratio)
        rank = window.rank
        self.pool = average_pool(window)
        conv = convolution(rank, channels, hidden, context_size, bias=False, **factory)
        if window.padding == CAUSAL:
            self.context = context_size - 1
            conv.padding = (0,)  # ``hidden`` pads on one side
        self.conv1 = named(
            conv=conv,
            bn=BATCH_NORMS[rank](hidden, **factory),
            relu=nn.ReLU(),
        )
        self._make_last(hidden, window, **factory)

    def hidden(self, features):
        if self.context:
            features = nn.functional.pad(features, (self.context, 0))
        return self._call(self.conv1, self.pool(features))


class Contextual(Bottleneck):
    """A bottleneck that uses a neighborhood: its first convolution has a larger kernel.

    Args:
        channels, window: As for ``Linear``.
        context_size: Side of the window that a kernel is generated from, in output positions; for
            causal windows it ends at the output's.
        **options: As for ``Bottleneck``.

    Example:

    >>> import torch
    >>> from involution.torch import Involution2d
    >>> layer = Involution2d(32, 3, stride=2, kernel_generator="contextual")
    >>> layer(torch.ones(1, 32, 9, 8)).shape
    torch.Size([1, 32, 5, 4])
    """

    def __init__(self, channels, window, *, context_size=3, **options) -> None:
        super().__init__(channels, window, context_size=context_size, **options)


class ConvBN(nn.Module):
    """A convolution without bias, and batch normalization; names as in LSNet's checkpoints."""

    def __init__(
        self, rank, inputs, outputs, kernel_size=1, *, stride=1, depthwise=False, **factory
    ):
        super().__init__()
        self.c = CONVOLUTIONS[rank](
            inputs,
            outputs,
            kernel_size,
            stride,
            kernel_size // 2 if kernel_size % 2 else "same",
            groups=inputs if depthwise else 1,
            bias=False,
            **factory,
        )
        nn.init.kaiming_normal_(self.c.weight, nonlinearity="relu")
        self.bn = BATCH_NORMS[rank](outputs, **factory)

    def forward(self, x):
        return self.bn(self.c(x))


class LargeContext(nn.Module):
    """Kernels from a large neighborhood: a depthwise convolution between 1x1 convolutions.

    Average pooling by the strides; a 1x1 convolution to channels // reduction_ratio, batch
    normalization, ReLU; a depthwise convolution with windows of ``context_size``, batch
    normalization; a 1x1 convolution, batch normalization, ReLU; a 1x1 convolution to groups * taps,
    and group normalization of the kernels of each group, over the taps and all positions.

    Args:
        channels, window, device, dtype: As for ``Linear``.
        reduction_ratio: Channels of the features for each hidden channel.
        context_size: Side of the window of the depthwise convolution, in output positions.
        kernel_normalization: Whether kernels are normalized.

    Raises:
        ValueError: ``reduction_ratio`` leaves no hidden channel, or the window is causal.

    Source: Wang et al., "LSNet: See Large, Focus Small", CVPR 2025, arXiv:2503.23135. The names of
    the parameters are those of its checkpoints.

    Example:

    >>> import torch
    >>> from involution.torch import Involution2d
    >>> layer = Involution2d(32, 3, groups=4, kernel_generator="large_context")
    >>> layer(torch.ones(2, 32, 9, 8)).shape
    torch.Size([2, 32, 9, 8])
    """

    uses_full_input = False
    context = 0

    def __init__(
        self,
        channels,
        window,
        *,
        reduction_ratio=2,
        context_size=7,
        kernel_normalization=True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        (ratio,) = standardize_tuple("reduction_ratio", reduction_ratio, 1)
        (context_size,) = standardize_tuple("context_size", context_size, 1)
        hidden, rank = reduced_channels(channels, ratio), window.rank
        if window.padding == CAUSAL:
            raise ValueError(
                "LargeContext requires windows that see both sides: padding other than 'causal'. "
                f"Received: padding={window.padding!r}"
            )
        self.pool = average_pool(window)
        self.cv1 = ConvBN(rank, channels, hidden, **factory)
        self.cv2 = ConvBN(rank, hidden, hidden, context_size, depthwise=True, **factory)
        self.cv3 = ConvBN(rank, hidden, hidden, **factory)
        self.cv4 = convolution(rank, hidden, window.groups * window.taps, **factory)
        self.norm = (
            nn.GroupNorm(window.groups, window.groups * window.taps, **factory)
            if kernel_normalization
            else nn.Identity()
        )

    def forward(self, features):
        x = self.cv2(self.cv1(self.pool(features)).relu())
        return self.norm(self.cv4(self.cv3(x).relu()))


class LowRank(Convolutional):
    """Dynamic short convolution: a static kernel, and a product of low rank that the features give.

    kernels = weight of conv2 @ (weight of conv1 @ features) + bias, plus 1 at the residual tap: the
    last one for causal windows, else the center. The weight of conv2 is initially 0, so that the
    layer starts as a depthwise convolution with a shortcut.

    Args:
        channels, window, device, dtype: As for ``Linear``. One group for each channel, as in the
            published form, is ``groups=channels``.
        rank: Rank of the product.
        residual: Whether to add 1 at the residual tap.

    Raises:
        ValueError: ``rank`` is not an integer of at least 1.

    Source: arXiv:2606.03825.

    Example:

    >>> import torch
    >>> from involution.torch import Involution1d, generators
    >>> layer = Involution1d(
    ...     32, 4, padding="causal", groups=32, kernel_generator=generators.LowRank
    ... )
    >>> layer(torch.ones(1, 32, 10)).shape
    torch.Size([1, 32, 10])
    """

    def __init__(
        self, channels, window, rank=16, *, residual=True, device=None, dtype=None
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        (rank,) = standardize_tuple("rank", rank, 1)
        self.pool = average_pool(window)
        conv = convolution(window.rank, channels, rank, bias=False, **factory)
        # Keeps the variance of the features.
        nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
        self.conv1 = named(conv=conv)
        self.window = window
        self.residual_tap = _residual_tap(window) if residual else None
        self._make_last(rank, window, **factory)
        weight, bias = self.conv2.parameters()
        nn.init.zeros_(weight)
        bound = 1 / math.sqrt(window.taps)
        nn.init.uniform_(bias, -bound, bound)

    # Not a part of the bias, which weight decay moves towards 0. Computed: a buffer that is not in
    # the state dict would have no value after ``to_empty``.
    def constant(self, like):
        if self.residual_tap is None:
            return None
        taps = torch.arange(self.window.taps, device=like.device)
        return (taps == self.residual_tap).to(like.dtype).repeat(self.window.groups)

    def hidden(self, features):
        return self._call(self.conv1, self.pool(features))


def _residual_tap(window) -> int:
    """The tap of the kernels of an involution that returns its input."""
    is_causal = window.padding == CAUSAL
    tap = (k - 1 if is_causal else (k - 1) // 2 for k in window.kernel_size)
    return sum(i * math.prod(window.kernel_size[axis + 1 :]) for axis, i in enumerate(tap))


class Carafe(nn.Module):
    """Kernels on a fine grid from features on a coarse one, as in CARAFE.

    A 1x1 convolution to ``hidden_channels``, a convolution to the kernels of all phases of the fine
    grid, and a pixel shuffle. With a guide, features on the fine grid, a second path of the same
    form without the shuffle is added.

    Args:
        channels: Channels of the features.
        window: The upsampling's ``involution.ops.window.Window``, with its number of groups.
        hidden_channels: Channels between the two convolutions.
        encoder_size: Kernel size of the second convolution.
        guide_channels: Channels of the guide; None: there is none.
        device, dtype: Of the parameters.

    Raises:
        ValueError: A number is not an integer of at least 1.

    Source: Wang et al., "CARAFE: Content-Aware ReAssembly of FEatures", ICCV 2019,
    arXiv:1905.02188. The names of the parameters are those of mmcv's ``CARAFEPack``.

    Example:

    >>> import functools, torch
    >>> from involution.torch import InvolutionUpsample2d, generators
    >>> small = functools.partial(generators.Carafe, hidden_channels=16)
    >>> InvolutionUpsample2d(32, kernel_generator=small)(torch.ones(1, 32, 5, 4)).shape
    torch.Size([1, 32, 10, 8])
    """

    uses_full_input = False

    def __init__(
        self,
        channels,
        window,
        *,
        hidden_channels=64,
        encoder_size=3,
        guide_channels=None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        (hidden,) = standardize_tuple("hidden_channels", hidden_channels, 1)
        (size,) = standardize_tuple("encoder_size", encoder_size, 1)
        self.upsampling = window.upsampling
        rank, kernels = window.rank, window.groups * window.taps
        factory = {"device": device, "dtype": dtype}
        self.channel_compressor = convolution(rank, channels, hidden, **factory)
        self.content_encoder = convolution(rank, hidden, kernels * window.phases, size, **factory)
        self.guide_compressor: nn.Module | None = None
        self.guide_encoder: nn.Module | None = None
        if guide_channels is not None:
            (guide_channels,) = standardize_tuple("guide_channels", guide_channels, 1)
            self.guide_compressor = convolution(rank, guide_channels, hidden, **factory)
            self.guide_encoder = convolution(rank, hidden, kernels, size, **factory)
        for name, parameter in self.named_parameters():
            if name.endswith("encoder.weight"):
                nn.init.normal_(parameter, std=0.001)
            elif name.endswith("compressor.weight"):
                nn.init.xavier_uniform_(parameter)

    def forward(self, features, guide=None):
        return carafe_map(self, features, guide, self.upsampling)


def carafe_map(module, features, guide, upsampling):
    """The kernel map of a module with the children of ``Carafe``."""
    kernel_map = pixel_shuffle(
        module.content_encoder(module.channel_compressor(features)), upsampling
    )
    if guide is None:
        return kernel_map
    return kernel_map + module.guide_encoder(module.guide_compressor(guide))


class Static(nn.Module):
    """One kernel for all positions: depthwise convolution, expressed as involution.

    Args:
        channels, window, device, dtype: As for ``Linear``.

    Example:

    >>> import torch
    >>> from involution.torch import Involution2d
    >>> layer = Involution2d(4, 3, groups=4, kernel_generator="static")
    >>> layer.kernel_generator.weight.shape
    torch.Size([4, 9])
    """

    uses_full_input = False

    def __init__(self, channels, window, *, device=None, dtype=None) -> None:
        super().__init__()
        self.strides = feature_strides(window)
        self.weight = nn.Parameter(
            torch.empty(window.groups, window.taps, device=device, dtype=dtype)
        )
        # As of a depthwise convolution.
        nn.init.kaiming_normal_(self.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, features):
        return _at_all_positions(self.weight, features, self.strides)


class PairwiseAttention(nn.Module):
    """Local self-attention: dot products of each center with its window, softmax over the window.

    With causal windows, the query is at the window's end. The groups are the heads; the values are
    the input itself. See ``involution.kernel_generators.PairwiseAttention``.

    Args:
        channels, window, device, dtype: As for ``Linear``.
        key_channels: Channels of a head's queries and keys; None: the channels of a group.

    Source: Li et al., arXiv:2103.06255, section 3.3.

    Example:

    >>> import torch
    >>> from involution.torch import Involution2d
    >>> layer = Involution2d(32, 5, kernel_generator="pairwise_attention", return_kernel=True)
    >>> y, kernel = layer(torch.ones(1, 32, 8, 8))
    >>> kernel.shape, bool((kernel.sum(2) - 1).abs().max() < 1e-6)
    (torch.Size([1, 2, 25, 8, 8]), True)
    """

    uses_full_input = True

    def __init__(self, channels, window, *, key_channels=None, device=None, dtype=None) -> None:
        super().__init__()
        # Heads are contiguous in queries and keys, whichever channels of the values they weigh.
        self.window = dataclasses.replace(window, group_layout=CONTIGUOUS)
        if key_channels is None:
            key_channels = max(channels // window.groups, 1)
        (key_channels,) = standardize_tuple("key_channels", key_channels, 1)
        factory = {"device": device, "dtype": dtype}
        self.query = convolution(window.rank, channels, window.groups * key_channels, **factory)
        self.key = convolution(window.rank, channels, window.groups * key_channels, **factory)

    def forward(self, features):
        if self.window.padding == CAUSAL:
            return self._causal_map(features[..., :: self.window.strides[0]], features, self.window)
        centers = features[(slice(None), slice(None), *every_center(self.window))]
        query = self.query(centers)
        return _attention_map(query, self.key(features), self.window)

    def step(self, features, present):
        """The kernel map of the last positions, without the first ones, which are from a cache.

        Args:
            features: Tensor (B, channels, n).
            present: Tensor (B, 1, n), as for ``taps_inside``.
        """
        window = dataclasses.replace(self.window, padding=VALID)
        return self._causal_map(features[..., window.last_offset[0] :], features, window, present)

    def _causal_map(self, ends, features, window, present=None):
        query, key = evaluate(self.query, ends), evaluate(self.key, features)
        return _causal_attention_map(query, key, window, present)


# Functions that inspect shapes are nodes of the graphs of torch.fx.
@torch.fx.wrap
def _at_all_positions(weight, features, strides):
    sizes = [ceil_div(n, s) for n, s in zip(features.shape[2:], strides, strict=True)]
    kernel = weight.reshape(1, -1, *[1] * len(sizes))
    return kernel.expand(features.shape[0], -1, *sizes)


@torch.fx.wrap
def _attention_map(query, key, window):
    kernel = attention_kernel(to_last(query), to_last(key), window).to(query.dtype)
    # From (B, *out_spatial, taps, groups).
    return kernel.movedim((-1, -2), (1, 2)).flatten(1, 2)


@torch.fx.wrap
def _causal_attention_map(query, key, window, present):
    # The masked softmax of ``attention_kernel``, whose last bit depends on the number of positions.
    query = query / math.sqrt(query.shape[1] // window.groups)
    scores = calls.window_products(window, None, to_last(key), to_last(query))
    scores = to_accumulation_dtype(scores).movedim((-1, -2), (1, 2))
    if present is None:
        present = torch.ones_like(to_accumulation_dtype(key[:1, :1]))
    window = dataclasses.replace(window, groups=1)
    kernel = softmax(scores, taps_inside(window, present), is_causal=True)
    return kernel.to(query.dtype).flatten(1, 2)


@torch.fx.wrap
def pixel_shuffle(x, factors):
    """From (B, channels * phases, *spatial) to (B, channels, *fine_spatial), for any rank: a phase
    is the row-major index in the block of ``factors`` of its position.

    >>> import torch
    >>> x = torch.arange(6.0).reshape(1, 6, 1)
    >>> pixel_shuffle(x, (3,))
    tensor([[[0., 1., 2.],
             [3., 4., 5.]]])
    """
    rank, (batch, _, *sizes) = len(factors), x.shape
    x = x.reshape(batch, x.shape[1] // math.prod(factors), *factors, *sizes)
    axes = [axis for i in range(rank) for axis in (2 + rank + i, 2 + i)]
    fine = [n * u for n, u in zip(sizes, factors, strict=True)]
    return x.permute(0, 1, *axes).reshape(batch, x.shape[1], *fine)


def near_depthwise_(module: Any) -> Any:
    """Initializes a generator close to a depthwise convolution, in place.

    The kernels are dominated by the biases of the last convolution, which have the distribution of
    He's initializer for depthwise kernels: ``involution.kernel_generators.near_depthwise_init``.

    Args:
        module: An involution. Generators without a last convolution, such as ``"static"``, and
            those with initial values of their own, ``"low_rank"`` and ``"carafe"``, are unchanged.

    Returns:
        The involution.

    Example:

    >>> from involution.torch import Involution2d, generators
    >>> layer = generators.near_depthwise_(Involution2d(64))
    >>> bool(layer.conv2.conv.bias.std() > 0.1)
    True
    """
    generator = module if module.kernel_generator is None else module.kernel_generator
    last = None
    if isinstance(generator, LargeContext):
        last = generator.cv4
    elif (generator is module and hasattr(module, "conv2")) or (
        isinstance(generator, Convolutional) and not isinstance(generator, LowRank)
    ):
        last = generator.conv2
    if last is not None:
        weight, bias = last.parameters()
        nn.init.normal_(weight, std=math.sqrt(0.02 / len(weight)))
        nn.init.normal_(bias, std=math.sqrt(2 / module.window.taps))
    return module


# Of ``Involution1d`` to ``3d`` and ``InvolutionTranspose1d`` to ``3d``.
GENERATORS = {
    "bottleneck": Bottleneck,
    "contextual": Contextual,
    "large_context": LargeContext,
    "linear": Linear,
    "low_rank": LowRank,
    "pairwise_attention": PairwiseAttention,
    "static": Static,
}
# Those with hidden channels, in proportion to the features'.
REDUCING = (Bottleneck, Contextual, LargeContext)
