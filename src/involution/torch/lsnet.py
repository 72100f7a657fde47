"""LSNet for PyTorch; state dicts have the names and shapes of the published checkpoints."""

import torch
from torch import nn

from involution.lsnet_variants import ATTENTION_SIZE, VARIANTS, Variant, se_channels
from involution.ops.validation import SYMMETRIC, standardize_tuple
from involution.ops.window import Window
from involution.torch.functional import involution
from involution.torch.generators import ConvBN, LargeContext, named


class LSNet(nn.Module):
    """A classifier: images (B, in_channels, H, W) to logits (B, num_classes).

    Attributes:
        head: The classifier: ``head.l`` is a ``torch.nn.Linear``.
        head_dist: The second one of a distilled network, or None.
    """

    def __init__(self, variant: Variant, num_classes, in_channels, distilled, **factory):
        super().__init__()
        (num_classes,) = standardize_tuple("num_classes", num_classes, 1)
        (in_channels,) = standardize_tuple("in_channels", in_channels, 1)
        first, last = variant.widths[0], variant.widths[-1]
        widths = (in_channels, first // 4, first // 2, first)
        self.patch_embed = nn.Sequential()
        for i in range(3):
            if i > 0:
                self.patch_embed.append(nn.ReLU())
            self.patch_embed.append(ConvBN(2, widths[i], widths[i + 1], 3, stride=2, **factory))
        self.stages = len(variant.blocks)
        channels = first
        for stage, (count, width) in enumerate(zip(variant.blocks, variant.widths, strict=True)):
            layers = nn.Sequential()
            if stage > 0:
                layers.append(_depthwise(channels, 3, stride=2, **factory))
                layers.append(ConvBN(2, channels, width, **factory))
                channels = width
            for index in range(count):
                layers.append(Block(variant, width, stage + 1 == self.stages, index, **factory))
            self.add_module(f"blocks{stage + 1}", layers)
        self.head = Head(last, num_classes, **factory)
        self.head_dist = Head(last, num_classes, **factory) if distilled else None

    def feature_maps(self, x) -> tuple[torch.Tensor, ...]:
        """The feature maps of all stages."""
        x = self.patch_embed(x)
        maps = []
        for stage in range(self.stages):
            x = getattr(self, f"blocks{stage + 1}")(x)
            maps.append(x)
        return tuple(maps)

    def forward(self, x):
        x = self.feature_maps(x)[-1].mean((2, 3))
        logits = self.head(x)
        return logits if self.head_dist is None else (logits + self.head_dist(x)) / 2


def _depthwise(channels, kernel_size, **options):
    return ConvBN(2, channels, channels, kernel_size, depthwise=True, **options)


def _with_zero_scale(conv_bn):
    # The branch is initially zero.
    nn.init.zeros_(conv_bn.bn.weight)
    return conv_bn


class Head(nn.Module):
    """Batch normalization and a linear layer."""

    def __init__(self, channels, num_classes, **factory):
        super().__init__()
        self.bn = nn.BatchNorm1d(channels, **factory)
        self.l = nn.Linear(channels, num_classes, **factory)
        nn.init.trunc_normal_(self.l.weight, std=0.02)
        nn.init.zeros_(self.l.bias)

    def forward(self, x):
        return self.l(self.bn(x))


class Residual(nn.Module):
    """A module plus its input."""

    def __init__(self, m):
        super().__init__()
        self.m = m

    def forward(self, x):
        return x + self.m(x)


class Block(nn.Module):
    """Depthwise convolutions, an involution or attention; then two 1x1 convolutions."""

    def __init__(self, variant: Variant, width, last_stage, index, **factory):
        super().__init__()
        self.se: nn.Module = nn.Identity()
        self.mixer: nn.Module
        if index % 2 == 0:
            self.mixer = Local(width, **factory)
            self.se = SqueezeExcite(width, se_channels(width, variant.se_ratio), **factory)
        elif last_stage:
            self.mixer = Residual(Attention(width, variant.heads, variant.key_channels, **factory))
        else:
            self.mixer = LSConv(variant, width, **factory)
        hidden = width * variant.ffn_ratio
        self.ffn = Residual(
            named(
                pw1=ConvBN(2, width, hidden, **factory),
                relu=nn.ReLU(),
                pw2=_with_zero_scale(ConvBN(2, hidden, width, **factory)),
            )
        )

    def forward(self, x):
        return self.ffn(self.se(self.mixer(x)))


class Local(nn.Module):
    """Two depthwise convolutions, 3x3 and 1x1, plus their input."""

    def __init__(self, channels, **factory):
        super().__init__()
        self.conv = _depthwise(channels, 3, **factory)
        self.conv1 = _depthwise(channels, 1, **factory)

    def forward(self, x):
        return self.conv(x) + self.conv1(x) + x


class SqueezeExcite(nn.Module):
    """Channels scaled by a function of their means."""

    def __init__(self, channels, hidden, **factory):
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, hidden, 1, **factory)
        self.conv_expand = nn.Conv2d(hidden, channels, 1, **factory)

    def forward(self, x):
        gate = self.conv_reduce(x.mean((2, 3), keepdim=True)).relu()
        return x * self.conv_expand(gate).sigmoid()


class LSConv(nn.Module):
    """An involution with kernels from a large neighborhood, plus its input."""

    def __init__(self, variant: Variant, channels, **factory):
        super().__init__()
        self.groups, self.kernel_size = channels // variant.group_channels, variant.kernel_size
        window = Window(variant.kernel_size, padding=SYMMETRIC, groups=self.groups, rank=2)
        self.lkp = LargeContext(channels, window, context_size=variant.context_size, **factory)
        self.bn = nn.BatchNorm2d(channels, **factory)

    def forward(self, x):
        kernel = self.lkp(x).unflatten(1, (self.groups, -1))
        y = involution(x, kernel, self.kernel_size, group_layout="interleaved")
        return self.bn(y) + x


class Attention(nn.Module):
    """Attention between all positions, with a learned bias for each pair of absolute offsets; for
    maps of other sizes than the table's, it is interpolated."""

    def __init__(self, channels, heads, key_channels, **factory):
        super().__init__()
        self.heads, self.keys = heads, heads * key_channels
        self.scale = key_channels**-0.5
        self.qkv = ConvBN(2, channels, 2 * self.keys + channels, **factory)
        self.dw = _depthwise(self.keys, 3, **factory)
        self.proj = nn.Sequential(
            nn.ReLU(), _with_zero_scale(ConvBN(2, channels, channels, **factory))
        )
        self.attention_biases = nn.Parameter(torch.zeros(heads, ATTENTION_SIZE**2, **factory))
        self.register_load_state_dict_pre_hook(_without_indices)

    def forward(self, x):
        batch, channels, height, width = x.shape
        parts = self.qkv(x).split((self.keys, self.keys, channels), 1)
        queries, keys, values = (
            part.reshape(batch, self.heads, -1, height * width)
            for part in (self.dw(parts[0]), *parts[1:])
        )
        scores = queries.transpose(-1, -2) @ keys * self.scale + self.bias(height, width)
        y = values @ scores.softmax(-1).transpose(-1, -2)
        return self.proj(y.reshape(batch, channels, height, width))

    def bias(self, height, width):
        """The biases (heads, H * W, H * W) of all pairs of positions."""
        table = self.attention_biases.unflatten(1, (ATTENTION_SIZE, ATTENTION_SIZE))
        rows, columns = (self._offset_weights(n, table) for n in (height, width))
        bias = torch.einsum("ijr,hrc,klc->hikjl", rows, table, columns)
        return bias.reshape(self.heads, height * width, height * width)

    @staticmethod
    def _offset_weights(size, table):
        """For all pairs of positions in a dimension, the weights of the table's entries."""
        positions = torch.arange(size, device=table.device)
        offsets = (positions[:, None] - positions).abs() * (ATTENTION_SIZE - 1) / max(size - 1, 1)
        entries = torch.arange(ATTENTION_SIZE, device=table.device)
        return (1 - (offsets[..., None] - entries).abs()).relu().to(table.dtype)


def _without_indices(module, state_dict, prefix, *_):
    # The published checkpoints contain a table that follows from the size.
    state_dict.pop(f"{prefix}attention_bias_idxs", None)


_SHARED_DOC = """

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        distilled: Whether the logits are the mean of two classifiers', as in networks trained by
            distillation.
        device, dtype: Of the parameters.

    Returns:
        An ``LSNet``: images (B, in_channels, H, W) of any size to logits (B, num_classes). Its
        ``feature_maps`` returns those of the four stages, of sizes H / 8, H / 16, H / 32 and
        H / 64, rounded up. The published checkpoints load with ``load_state_dict``.

    Raises:
        ValueError: An argument is out of its range.

    Source: Wang et al., "LSNet: See Large, Focus Small", CVPR 2025, arXiv:2503.23135.
    """


def _network(name, text):
    def network(
        num_classes=1000, *, in_channels=3, distilled=False, device=None, dtype=None
    ) -> LSNet:
        return LSNet(
            VARIANTS[name], num_classes, in_channels, distilled, device=device, dtype=dtype
        )

    network.__name__ = network.__qualname__ = name
    network.__doc__ = text + _SHARED_DOC
    return network


lsnet_t = _network(
    "lsnet_t",
    """LSNet-T: 11.4 million parameters.

    >>> from involution.torch import lsnet_t
    >>> sum(p.numel() for p in lsnet_t().parameters()) // 10**5 / 10
    11.4
    """,
)
lsnet_s = _network("lsnet_s", "LSNet-S: 16.1 million parameters; see lsnet_t.")
lsnet_b = _network("lsnet_b", "LSNet-B: 23.3 million parameters; see lsnet_t.")
