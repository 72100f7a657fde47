"""Kernel generators: modules from features to kernel maps.

A generator is any module from features (B, channels, *spatial) to a kernel map (B, groups * taps,
*out_spatial), whose channels are group-major, ``group * taps + tap``, as in the paper's code.
Features begin at the first window's center; if the attribute ``uses_full_input`` is true, they are
the module's full input.
"""

import dataclasses
import math

import torch
from torch import nn

from involution.ops.attention import attention_kernel
from involution.ops.centers import every_center
from involution.ops.validation import CONTIGUOUS, standardize_tuple
from involution.ops.window import ceil_div
from involution.torch.functional import to_last

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


def average_pool(window) -> nn.Module:
    """Means over windows that tile the features; a partial window's is that of its positions inside
    the features."""
    if all(stride == 1 for stride in window.strides):
        return nn.Identity()
    return AVERAGE_POOLS[window.rank](window.strides, window.strides, ceil_mode=True)


class Convolutional(nn.Module):
    """A generator whose kernels are the output of a 1x1 convolution, ``conv2``."""

    uses_full_input = False

    def _make_last(self, hidden, window, **factory):
        outputs = window.groups * window.taps
        self.conv2 = named(conv=convolution(window.rank, hidden, outputs, **factory))

    def hidden(self, features):
        """Input of the last convolution: (B, hidden channels, *out_spatial)."""
        raise NotImplementedError  # each generator has its own

    def forward(self, features):
        return self.conv2(self.hidden(features))


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

    def __init__(self, channels, window, *, device=None, dtype=None):
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
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        (ratio,) = standardize_tuple("reduction_ratio", reduction_ratio, 1)
        (context_size,) = standardize_tuple("context_size", context_size, 1)
        hidden = channels // ratio
        if hidden == 0:
            raise ValueError(
                "`reduction_ratio` must leave at least one hidden channel. "
                f"Received: reduction_ratio={ratio}, channels={channels}"
            )
        rank = window.rank
        self.pool = average_pool(window)
        self.conv1 = named(
            conv=convolution(rank, channels, hidden, context_size, bias=False, **factory),
            bn=BATCH_NORMS[rank](hidden, **factory),
            relu=nn.ReLU(),
        )
        self._make_last(hidden, window, **factory)

    def hidden(self, features):
        return self.conv1(self.pool(features))


class Contextual(Bottleneck):
    """A bottleneck that uses a neighborhood: its first convolution has a larger kernel.

    Args:
        channels, window: As for ``Linear``.
        context_size: Side of the window that a kernel is generated from, in output positions.
        **options: As for ``Bottleneck``.

    Example:

    >>> import torch
    >>> from involution.torch import Involution2d
    >>> layer = Involution2d(32, 3, stride=2, kernel_generator="contextual")
    >>> layer(torch.ones(1, 32, 9, 8)).shape
    torch.Size([1, 32, 5, 4])
    """

    def __init__(self, channels, window, *, context_size=3, **options):
        super().__init__(channels, window, context_size=context_size, **options)


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

    def __init__(self, channels, window, *, device=None, dtype=None):
        super().__init__()
        self.strides = window.strides
        self.weight = nn.Parameter(
            torch.empty(window.groups, window.taps, device=device, dtype=dtype)
        )
        # As of a depthwise convolution.
        nn.init.kaiming_normal_(self.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, features):
        return _at_all_positions(self.weight, features, self.strides)


class PairwiseAttention(nn.Module):
    """Local self-attention: dot products of each center with its window, softmax over the window.

    The groups are the heads; the values are the input itself. See
    ``involution.kernel_generators.PairwiseAttention``.

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

    def __init__(self, channels, window, *, key_channels=None, device=None, dtype=None):
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
        centers = features[(slice(None), slice(None), *every_center(self.window))]
        query = self.query(centers)
        return _attention_map(query, self.key(features), self.window)


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


def near_depthwise_(module):
    """Initializes a generator close to a depthwise convolution, in place.

    The kernels are dominated by the biases of the last convolution, which have the distribution of
    He's initializer for depthwise kernels: ``involution.kernel_generators.near_depthwise_init``.

    Args:
        module: An involution. Generators without a last convolution, such as ``"static"``, are
            unchanged.

    Returns:
        The involution.

    Example:

    >>> from involution.torch import Involution2d, generators
    >>> layer = generators.near_depthwise_(Involution2d(64))
    >>> bool(layer.conv2.conv.bias.std() > 0.1)
    True
    """
    generator = module if module.kernel_generator is None else module.kernel_generator
    if generator is module or isinstance(generator, Convolutional):
        weight, bias = generator.conv2.parameters()
        nn.init.normal_(weight, std=math.sqrt(0.02 / len(weight)))
        nn.init.normal_(bias, std=math.sqrt(2 / module.window.taps))
    return module


GENERATORS = {
    "bottleneck": Bottleneck,
    "contextual": Contextual,
    "linear": Linear,
    "pairwise_attention": PairwiseAttention,
    "static": Static,
}
