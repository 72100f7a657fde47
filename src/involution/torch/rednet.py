"""RedNet for PyTorch: ResNet with involutions instead of the 3x3 convolutions of its bottlenecks.

State dicts have the names and shapes of the official checkpoints of the classifiers.
"""

import dataclasses
from collections.abc import Callable

from torch import nn

from involution.ops.validation import standardize_tuple
from involution.rednet_variants import TINY, VARIANTS, Variant, tiny_variant
from involution.torch.generators import convolution, named, near_depthwise_
from involution.torch.modules import Involution2d


class RedNet(nn.Module):
    """A classifier: images (B, in_channels, H, W) to logits (B, num_classes).

    Attributes:
        backbone: From images to the feature maps of all stages, a tuple.
        head: The classifier: ``head.fc`` is a ``torch.nn.Linear``.
    """

    def __init__(self, variant: Variant, num_classes, in_channels, **factory):
        super().__init__()
        (num_classes,) = standardize_tuple("num_classes", num_classes, 1)
        (in_channels,) = standardize_tuple("in_channels", in_channels, 1)
        self.backbone = Backbone(variant, in_channels, **factory)
        fc = nn.Linear(variant.expansion * variant.widths[-1], num_classes, **factory)
        nn.init.normal_(fc.weight, std=0.01)
        nn.init.zeros_(fc.bias)
        self.head = named(fc=fc)

    def forward(self, x):
        return self.head(self.backbone(x)[-1].mean((2, 3)))


class Backbone(nn.Module):
    """The stem, and stages ``layer1``, ``layer2`` and so on."""

    def __init__(self, variant: Variant, in_channels, **factory):
        super().__init__()
        self.stem, self.maxpool = _stem(variant, in_channels, **factory)
        channels = variant.stem_width
        self.stages = len(variant.blocks)
        for stage, (count, width) in enumerate(zip(variant.blocks, variant.widths, strict=True)):
            blocks = []
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(Block(variant, channels, width, stride, block == 0, **factory))
                channels = variant.expansion * width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))

    def forward(self, x):
        x = self.maxpool(self.stem(x))
        maps = []
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
            maps.append(x)
        return tuple(maps)


class Block(nn.Module):
    """A bottleneck: 1x1 convolution, involution, 1x1 convolution, and a shortcut."""

    def __init__(self, variant: Variant, channels, width, stride, first, **factory):
        super().__init__()
        outputs = variant.expansion * width
        self.conv1 = convolution(2, channels, width, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(width, **factory)
        self.conv2 = _involution(variant, width, variant.kernel_size, stride, **factory)
        self.bn2 = nn.BatchNorm2d(width, **factory)
        self.conv3 = convolution(2, width, outputs, bias=False, **factory)
        self.bn3 = nn.BatchNorm2d(outputs, **factory)
        # Every block is initially its shortcut.
        nn.init.zeros_(self.bn3.weight)
        self.relu = nn.ReLU()
        self.downsample = None
        if first:
            self.downsample = nn.Sequential(
                convolution(2, channels, outputs, stride=stride, bias=False, **factory),
                nn.BatchNorm2d(outputs, **factory),
            )

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + shortcut)


def _stem(variant, in_channels, **factory):
    width = variant.stem_width
    if variant.stem_kernel_size is None:
        stem = nn.Sequential(_conv_bn_relu(in_channels, width, 1, **factory))
        # Rounded up, as all sizes of the network.
        return stem, nn.MaxPool2d(2, ceil_mode=True) if variant.stem_pool else nn.Identity()
    half = width // 2
    stem = nn.Sequential(
        _conv_bn_relu(in_channels, half, 2, **factory),
        _involution(variant, half, variant.stem_kernel_size, 1, **factory),
        nn.BatchNorm2d(half, **factory),
        nn.ReLU(),
        _conv_bn_relu(half, width, 1, **factory),
    )
    return stem, nn.MaxPool2d(3, 2, padding=1)


def _conv_bn_relu(inputs, outputs, stride, **factory):
    conv = convolution(2, inputs, outputs, 3, stride=stride, bias=False, **factory)
    return named(conv=conv, bn=nn.BatchNorm2d(outputs, **factory), relu=nn.ReLU())


def _involution(variant, channels, kernel_size, stride, **factory):
    module = Involution2d(
        channels,
        kernel_size,
        stride=stride,
        group_channels=variant.group_channels,
        reduction_ratio=variant.reduction_ratio,
        kernel_generator=variant.kernel_generator,
        **factory,
    )
    if variant.stem_kernel_size is None:
        near_depthwise_(module)
    return module


# The networks differ only in their entry of ``VARIANTS``.
_SHARED_DOC = """

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        stem_kernel_size: Kernel size of the stem's involution: 3 in the paper's classifiers, 7 in
            its backbones for detection and segmentation.
        device, dtype: Of the parameters.

    Returns:
        A ``RedNet``: images (B, in_channels, H, W) of any size to logits (B, num_classes). Its
        ``backbone`` returns the feature maps of the four stages, of sizes H / 4, H / 8, H / 16 and
        H / 32, rounded up, with 256, 512, 1024 and 2048 channels. The official checkpoints of the
        classifiers load with ``load_state_dict``.

    Raises:
        ValueError: An argument is out of its range.

    Source: Li et al., arXiv:2103.06255, section 4.
    """


def _network(name: str, text: str) -> Callable[..., RedNet]:
    def network(
        num_classes=1000, *, in_channels=3, stem_kernel_size=3, device=None, dtype=None
    ) -> RedNet:
        (size,) = standardize_tuple("stem_kernel_size", stem_kernel_size, 1)
        variant = dataclasses.replace(VARIANTS[name], stem_kernel_size=size)
        return RedNet(variant, num_classes, in_channels, device=device, dtype=dtype)

    network.__name__ = network.__qualname__ = name
    network.__doc__ = text + _SHARED_DOC
    return network


rednet26 = _network(
    "rednet26",
    """RedNet-26, the paper's smallest network: 9.2 million parameters.

    >>> from involution.torch import rednet26
    >>> sum(p.numel() for p in rednet26().parameters()) // 10**5 / 10
    9.2
    """,
)
rednet38 = _network("rednet38", "RedNet-38: 12.4 million parameters; see rednet26.")
rednet50 = _network("rednet50", "RedNet-50: 15.5 million parameters; see rednet26.")
rednet101 = _network("rednet101", "RedNet-101: 25.7 million parameters; see rednet26.")
rednet152 = _network("rednet152", "RedNet-152: 34.0 million parameters; see rednet26.")


def rednet_tiny(
    num_classes=10,
    *,
    in_channels=3,
    blocks=TINY.blocks,
    widths=TINY.widths,
    expansion=TINY.expansion,
    stem_width=TINY.stem_width,
    stem_pool=TINY.stem_pool,
    kernel_size=TINY.kernel_size,
    group_channels=TINY.group_channels,
    reduction_ratio=TINY.reduction_ratio,
    kernel_generator=None,
    device=None,
    dtype=None,
) -> RedNet:
    """A RedNet for images of about 32x32 pixels: its stem is one 3x3 convolution.

    Args:
        num_classes, in_channels, device, dtype: As for ``rednet26``.
        blocks: Bottlenecks of each stage; every stage except the first halves the resolution.
        widths: Channels of each stage's involutions.
        expansion: Output channels of a bottleneck per channel of its involution.
        stem_width: Channels of the stem.
        stem_pool: Whether the stem ends with 2x2 max pooling.
        kernel_size: Kernel size of the involutions.
        group_channels: Channels per group.
        reduction_ratio: Input channels per hidden channel of the kernel generators.
        kernel_generator: As for ``Involution2d``, except that a module cannot be shared by the
            involutions; generators with a last convolution are initialized close to a depthwise
            convolution.

    Returns:
        As for ``rednet26``.

    Raises:
        ValueError: An argument is out of its range.

    Example:

    >>> import torch
    >>> from involution.torch import rednet_tiny
    >>> rednet_tiny()(torch.ones(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    if isinstance(kernel_generator, nn.Module):
        raise ValueError(
            "`kernel_generator` must be a name or a function of (channels, window): each "
            f"involution has its own. Received: kernel_generator={type(kernel_generator).__name__}"
        )
    variant = tiny_variant(
        blocks=blocks,
        widths=widths,
        expansion=expansion,
        stem_width=stem_width,
        stem_pool=stem_pool,
        kernel_size=kernel_size,
        group_channels=group_channels,
        reduction_ratio=reduction_ratio,
        kernel_generator=kernel_generator,
    )
    return RedNet(variant, num_classes, in_channels, device=device, dtype=dtype)
