"""LSNet: involutions with small windows, whose kernels are generated from large neighborhoods.

Every convolution is followed by batch normalization. Blocks alternate between two depthwise
convolutions with squeeze-and-excitation and an involution, in the last stage attention; each ends
with two 1x1 convolutions.
"""

from collections.abc import Callable

import keras
from keras import layers

from involution.kernel_generators.large_context import LargeContext
from involution.kernel_generators.pointwise import conv_class
from involution.layers.involution_nd import Involution2D
from involution.layers.offset_attention import OffsetAttention
from involution.lsnet_variants import ATTENTION_SIZE, VARIANTS, se_channels
from involution.models.backbone import (
    batch_normalization,
    check_classes,
    check_flags,
    feature_outputs,
    image_input,
)
from involution.ops.validation import CHANNELS_LAST


def _build(name, variant, input_shape, classes, include_top, feature_maps, distilled, data_format):
    check_classes(classes)
    check_flags(include_top=include_top, feature_maps=feature_maps, distilled=distilled)
    inputs, x = image_input(input_shape, data_format)
    first = variant.widths[0]
    for i, width in enumerate((first // 4, first // 2, first), start=1):
        x = _conv_bn(x, width, 3, f"patch_{i}", strides=2)
        if i < 3:
            x = layers.ReLU(name=f"patch_{i}_relu")(x)
    maps = {}
    for i, (width, blocks) in enumerate(zip(variant.widths, variant.blocks, strict=True), start=1):
        if i > 1:
            x = _depthwise_bn(x, 3, f"stage{i}_downsample_depthwise", strides=2)
            x = _conv_bn(x, width, 1, f"stage{i}_downsample")
        for block in range(blocks):
            last = i == len(variant.widths)
            x = _block(x, variant, width, last, block, f"stage{i}_block{block + 1}")
        maps[f"stage{i}"] = x
    if include_top and not feature_maps:
        x = layers.GlobalAveragePooling2D(data_format=CHANNELS_LAST, name="pool")(x)
        logits = _head(x, classes, "")
        if distilled:
            logits = layers.Average(name="mean_logits")([logits, _head(x, classes, "distilled_")])
        return keras.Model(inputs, logits, name=name)
    maps = feature_outputs(maps, data_format)
    return keras.Model(inputs, maps if feature_maps else maps[f"stage{len(maps)}"], name=name)


def _block(x, variant, width, last_stage, index, name):
    if index % 2 == 0:
        x = _local(x, variant, width, name)
    elif last_stage:
        x = _attention(x, variant, width, name)
    else:
        x = _involution(x, variant, width, name)
    y = _conv_bn(x, width * variant.ffn_ratio, 1, f"{name}_ffn_1")
    y = layers.ReLU(name=f"{name}_ffn_relu")(y)
    y = _conv_bn(y, width, 1, f"{name}_ffn_2", zero=True)
    return layers.Add(name=f"{name}_ffn_add")([x, y])


def _local(x, variant, width, name):
    large = _depthwise_bn(x, 3, f"{name}_depthwise_3")
    small = _depthwise_bn(x, 1, f"{name}_depthwise_1")
    x = layers.Add(name=f"{name}_depthwise_add")([large, small, x])
    gate = layers.GlobalAveragePooling2D(
        data_format=CHANNELS_LAST, keepdims=True, name=f"{name}_se_pool"
    )(x)
    hidden = se_channels(width, variant.se_ratio)
    gate = conv_class(2, 1)(hidden, 1, activation="relu", name=f"{name}_se_reduce")(gate)
    gate = conv_class(2, 1)(width, 1, activation="sigmoid", name=f"{name}_se_expand")(gate)
    return layers.Multiply(name=f"{name}_se")([x, gate])


def _involution(x, variant, width, name):
    y = Involution2D(
        variant.kernel_size,
        groups=width // variant.group_channels,
        group_layout="interleaved",
        padding="symmetric",
        kernel_generator=LargeContext(2, context_size=variant.context_size, name="large_context"),
        data_format=CHANNELS_LAST,
        name=f"{name}_involution",
    )(x)
    y = batch_normalization(f"{name}_involution_bn")(y)
    return layers.Add(name=f"{name}_involution_add")([y, x])


def _attention(x, variant, width, name):
    channels = variant.heads * variant.key_channels
    y = _conv_bn(x, 2 * channels + width, 1, f"{name}_attention_qkv")
    # Not `keras.ops.split`, whose sizes PyTorch's exporter does not know.
    queries, keys, values = (
        y[..., part]
        for part in (
            slice(0, channels),
            slice(channels, 2 * channels),
            slice(2 * channels, None),
        )
    )
    queries = _depthwise_bn(queries, 3, f"{name}_attention_queries")
    y = OffsetAttention(variant.heads, ATTENTION_SIZE, name=f"{name}_attention")(
        [queries, keys, values]
    )
    y = layers.ReLU(name=f"{name}_attention_relu")(y)
    y = _conv_bn(y, width, 1, f"{name}_attention_projection", zero=True)
    return layers.Add(name=f"{name}_attention_add")([x, y])


def _conv_bn(x, filters, kernel_size, name, strides=1, zero=False):
    if kernel_size > 1:
        # Keras's "same" would shift the windows of stride 2 by one position.
        x = layers.ZeroPadding2D(kernel_size // 2, data_format=CHANNELS_LAST, name=f"{name}_pad")(x)
    x = conv_class(2, kernel_size)(
        filters,
        kernel_size,
        strides,
        use_bias=False,
        kernel_initializer="he_normal",
        data_format=CHANNELS_LAST,
        name=f"{name}_conv",
    )(x)
    # With a gamma of zero, the branch is initially zero.
    return batch_normalization(f"{name}_bn", gamma_initializer="zeros" if zero else "ones")(x)


def _depthwise_bn(x, kernel_size, name, strides=1):
    if strides > 1:
        x = layers.ZeroPadding2D(kernel_size // 2, data_format=CHANNELS_LAST, name=f"{name}_pad")(x)
    x = layers.DepthwiseConv2D(
        kernel_size,
        strides,
        "valid" if strides > 1 else "same",
        use_bias=False,
        depthwise_initializer="he_normal",
        data_format=CHANNELS_LAST,
        name=f"{name}_conv",
    )(x)
    return batch_normalization(f"{name}_bn")(x)


def _head(x, classes, prefix):
    x = batch_normalization(f"{prefix}head_bn")(x)
    initializer = keras.initializers.TruncatedNormal(stddev=0.02)
    return layers.Dense(classes, kernel_initializer=initializer, name=f"{prefix}logits")(x)


_SHARED_DOC = """

    Args:
        input_shape: (height, width, channels) of the images, or (channels, height, width) for
            ``"channels_first"``, with None for variable sizes. Any size works; the attention's
            biases belong to 224x224, and are interpolated for others. Default: three channels of
            any size.
        classes: Number of classes.
        include_top: Whether the model has the classifier, or ends with the last feature map.
        feature_maps: Whether the outputs are the feature maps of all stages, without the
            classifier.
        distilled: Whether the classifier is the mean of two, as in networks trained by
            distillation.
        data_format: ``"channels_last"``, regardless of Keras's setting, as this package reads
            images; ``"channels_first"``; or None for Keras's setting. The weights do not depend on
            it.

    Returns:
        A functional ``keras.Model`` from images (B, H, W, channels) to logits (B, classes); or to
        the last feature map; or to a dictionary of the feature maps, ``"stage1"`` and so on, of
        sizes H / 8, H / 16, H / 32 and H / 64, rounded up. Dtypes follow Keras's dtype policy.

    Raises:
        ValueError: An argument is out of its range.

    Source: Wang et al., "LSNet: See Large, Focus Small", CVPR 2025, arXiv:2503.23135.
    """


def _network(name: str, function_name: str, text: str) -> Callable[..., keras.Model]:
    def network(
        input_shape=None,
        classes=1000,
        include_top=True,
        feature_maps=False,
        distilled=False,
        data_format="channels_last",
    ) -> keras.Model:
        return _build(
            name,
            VARIANTS[name],
            input_shape,
            classes,
            include_top,
            feature_maps,
            distilled,
            data_format,
        )

    network.__name__ = network.__qualname__ = function_name
    network.__doc__ = text + _SHARED_DOC
    return network


LSNetT = _network(
    "lsnet_t",
    "LSNetT",
    """LSNet-T: 11.4 million parameters, 0.3 billion multiply-adds at 224x224.

    >>> import involution
    >>> involution.models.LSNetT().count_params() // 10**5 / 10
    11.4
    """,
)
LSNetS = _network("lsnet_s", "LSNetS", "LSNet-S: 16.1 million parameters; see LSNetT.")
LSNetB = _network("lsnet_b", "LSNetB", "LSNet-B: 23.3 million parameters; see LSNetT.")
