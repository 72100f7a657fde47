"""RedNet: ResNet with involutions instead of the 3x3 convolutions of its bottlenecks.

As in the paper's code: symmetric padding, contiguous groups of 16 channels, stride 2 in the
involution and the shortcut of a stage's first block, batch normalization with epsilon 1e-5 and
momentum 0.9 (0.1 in PyTorch's convention). Sizes not divisible by the stride, which the paper's
code rejects, give ceil(n / 2) positions.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import layers

from involution.kernel_generators import registry
from involution.kernel_generators.attachment import clone
from involution.kernel_generators.convolutional import KAIMING, near_depthwise_init
from involution.kernel_generators.pointwise import conv_class
from involution.layers.involution_nd import Involution2D
from involution.models.backbone import (
    batch_normalization,
    check_classes,
    check_flags,
    feature_outputs,
    image_input,
)
from involution.ops.validation import CHANNELS_LAST, standardize_tuple
from involution.rednet_variants import TINY, VARIANTS, tiny_variant


def _build(name, variant, input_shape, classes, include_top, feature_maps, data_format):
    check_classes(classes)
    check_flags(include_top=include_top, feature_maps=feature_maps)
    inputs, x = image_input(input_shape, data_format)
    x = _stem(x, variant)
    maps = {}
    for i, (blocks, width) in enumerate(zip(variant.blocks, variant.widths, strict=True)):
        for block in range(blocks):
            stride = 2 if i > 0 and block == 0 else 1
            x = _block(x, variant, width, stride, block == 0, f"stage{i + 1}_block{block + 1}")
        maps[f"stage{i + 1}"] = x
    if include_top and not feature_maps:
        x = layers.GlobalAveragePooling2D(data_format=CHANNELS_LAST, name="pool")(x)
        initializer = keras.initializers.RandomNormal(stddev=0.01)
        x = layers.Dense(classes, kernel_initializer=initializer, name="logits")(x)
        return keras.Model(inputs, x, name=name)
    maps = feature_outputs(maps, data_format)
    return keras.Model(inputs, maps if feature_maps else maps[f"stage{len(maps)}"], name=name)


def _stem(x, variant):
    if variant.stem_kernel_size is None:
        x = _convolution(variant.stem_width, 3, 1, "stem_conv", padding="same")(x)
        x = _bn_relu(x, "stem")
        if not variant.stem_pool:
            return x
        return layers.MaxPooling2D(2, padding="same", data_format=CHANNELS_LAST, name="stem_pool")(
            x
        )
    # Keras's "same" would shift the windows of stride 2 by one position.
    x = layers.ZeroPadding2D(1, data_format=CHANNELS_LAST, name="stem_1_pad")(x)
    x = _convolution(variant.stem_width // 2, 3, 2, "stem_1_conv")(x)
    x = _bn_relu(x, "stem_1")
    x = _involution(variant, variant.stem_kernel_size, 1, "stem_2_involution")(x)
    x = _bn_relu(x, "stem_2")
    x = _convolution(variant.stem_width, 3, 1, "stem_3_conv", padding="same")(x)
    x = _bn_relu(x, "stem_3")
    # After a ReLU, zero padding does not change the maximum.
    x = layers.ZeroPadding2D(1, data_format=CHANNELS_LAST, name="stem_pool_pad")(x)
    return layers.MaxPooling2D(3, 2, data_format=CHANNELS_LAST, name="stem_pool")(x)


def _block(x, variant, width, stride, first, name):
    shortcut = x
    if first:
        shortcut = _convolution(variant.expansion * width, 1, stride, f"{name}_shortcut_conv")(x)
        shortcut = batch_normalization(f"{name}_shortcut_bn")(shortcut)
    x = _convolution(width, 1, 1, f"{name}_1_conv")(x)
    x = _bn_relu(x, f"{name}_1")
    x = _involution(variant, variant.kernel_size, stride, f"{name}_2_involution")(x)
    x = _bn_relu(x, f"{name}_2")
    x = _convolution(variant.expansion * width, 1, 1, f"{name}_3_conv")(x)
    # With a gamma of zero, every block is initially its shortcut.
    x = batch_normalization(f"{name}_3_bn", gamma_initializer="zeros")(x)
    x = layers.Add(name=f"{name}_add")([x, shortcut])
    return layers.ReLU(name=f"{name}_relu")(x)


def _convolution(filters, kernel_size, strides, name, padding="valid"):
    return conv_class(2, kernel_size)(
        filters,
        kernel_size,
        strides,
        padding,
        use_bias=False,
        kernel_initializer=keras.initializers.get(KAIMING),
        data_format=CHANNELS_LAST,
        name=name,
    )


def _involution(variant, kernel_size, strides, name):
    return Involution2D(
        kernel_size,
        strides=strides,
        padding="symmetric",
        group_channels=variant.group_channels,
        reduction_ratio=variant.reduction_ratio,
        kernel_generator=clone(variant.kernel_generator),
        data_format=CHANNELS_LAST,
        name=name,
    )


def _bn_relu(x, name):
    return layers.ReLU(name=f"{name}_relu")(batch_normalization(f"{name}_bn")(x))


# The networks differ only in their entry of ``VARIANTS``.
_SHARED_DOC = """

    Args:
        input_shape: (height, width, channels) of the images, or (channels, height, width) for
            ``"channels_first"``, with None for variable sizes. Any size works, including odd ones.
            Default: three channels of any size.
        classes: Number of classes.
        include_top: Whether the model has the classifier, or ends with the last feature map.
        feature_maps: Whether the outputs are the feature maps of all stages, without the
            classifier.
        stem_kernel_size: Kernel size of the stem's involution: 3 in the paper's classifiers, 7 in
            its backbones for detection and segmentation.
        data_format: ``"channels_last"``, regardless of Keras's setting, as this package reads
            images; ``"channels_first"``; or None for Keras's setting. The weights do not depend on
            it.

    Returns:
        A functional ``keras.Model`` from images (B, H, W, channels) to logits (B, classes); or to
        the last feature map; or to a dictionary of the feature maps of all stages, ``"stage1"`` and
        so on, which in the paper's networks have sizes H / 4, H / 8, H / 16 and H / 32, rounded up,
        and 256, 512, 1024 and 2048 channels. Dtypes follow Keras's dtype policy.

    Raises:
        ValueError: An argument is out of its range.

    Source: Li et al., arXiv:2103.06255, section 4.
    """


def _network(name: str, function_name: str, text: str) -> Callable[..., keras.Model]:
    def network(
        input_shape=None,
        classes=1000,
        include_top=True,
        feature_maps=False,
        stem_kernel_size=3,
        data_format="channels_last",
    ) -> keras.Model:
        (stem_kernel_size,) = standardize_tuple("stem_kernel_size", stem_kernel_size, 1)
        variant = dataclasses.replace(VARIANTS[name], stem_kernel_size=stem_kernel_size)
        return _build(name, variant, input_shape, classes, include_top, feature_maps, data_format)

    network.__name__ = network.__qualname__ = function_name
    network.__doc__ = text + _SHARED_DOC
    return network


RedNet26 = _network(
    "rednet26",
    "RedNet26",
    """RedNet-26, the paper's smallest network: 9.2 million parameters.

    >>> import involution
    >>> involution.models.RedNet26().count_params() // 10**5 / 10
    9.2
    """,
)
RedNet38 = _network("rednet38", "RedNet38", "RedNet-38: 12.4 million parameters; see RedNet26.")
RedNet50 = _network("rednet50", "RedNet50", "RedNet-50: 15.5 million parameters; see RedNet26.")
RedNet101 = _network("rednet101", "RedNet101", "RedNet-101: 25.7 million parameters; see RedNet26.")
RedNet152 = _network("rednet152", "RedNet152", "RedNet-152: 34.0 million parameters; see RedNet26.")


def rednet_tiny(
    input_shape: Sequence[int | None] | None = None,
    classes: int = 10,
    include_top: bool = True,
    feature_maps: bool = False,
    data_format: str = "channels_last",
    blocks: Sequence[int] = TINY.blocks,
    widths: Sequence[int] = TINY.widths,
    expansion: int = TINY.expansion,
    stem_width: int = TINY.stem_width,
    stem_pool: bool = TINY.stem_pool,
    kernel_size: int | Sequence[int] = TINY.kernel_size,
    group_channels: int = TINY.group_channels,
    reduction_ratio: int = TINY.reduction_ratio,
    kernel_generator: Any = None,
) -> keras.Model:
    """A RedNet for images of about 32x32 pixels: its stem is one 3x3 convolution.

    The defaults, the best of 40 trials of a hyperparameter search on CIFAR-10, give 29,894
    trainable parameters at ten classes, less than a tenth of ``cnn``'s.

    Args:
        input_shape, classes, include_top, feature_maps, data_format: As for ``RedNet26``.
        blocks: Bottlenecks of each stage; every stage except the first halves the resolution.
        widths: Channels of each stage's involutions.
        expansion: Output channels of a bottleneck per channel of its involution.
        stem_width: Channels of the stem.
        stem_pool: Whether the stem ends with 2x2 max pooling, which halves the resolution of the
            first stage (rounded up).
        kernel_size: Kernel size of the involutions.
        group_channels: Channels per group.
        reduction_ratio: Input channels per hidden channel of the kernel generators.
        kernel_generator: None for ``Bottleneck``, or the name of a generator, initialized close to
            a depthwise convolution (``kernel_generators.near_depthwise_init``); or a Keras layer,
            which is copied for each involution.

    Returns:
        As for ``RedNet26``.

    Raises:
        ValueError: An argument is out of its range.

    Example:

    >>> import involution
    >>> tuple(involution.models.rednet_tiny((32, 32, 3)).output.shape)
    (None, 10)
    """
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
    generator = registry.get(
        kernel_generator, reduction_ratio, initial=near_depthwise_init(variant.kernel_size**2)
    )
    variant = dataclasses.replace(variant, kernel_generator=generator)
    return _build(
        "rednet_tiny", variant, input_shape, classes, include_top, feature_maps, data_format
    )
