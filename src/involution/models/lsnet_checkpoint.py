"""The published checkpoints of LSNet: names of their tensors, and the model's weights for them."""

from involution.lsnet_variants import VARIANTS, Variant
from involution.models.weight_map import (
    DEPTHWISE,
    IDENTITY,
    KERNEL,
    TRANSPOSE,
    WeightMap,
    tap_major,
)

# Tensors without weights: counters, and a table that the attention computes from the image size.
UNUSED = (".num_batches_tracked", ".attention_bias_idxs")
# The first layer, by whose width a variant is recognized.
FIRST = "patch_embed.4.c.weight"


def is_lsnet(names) -> bool:
    return any(name.startswith("patch_embed.") for name in names)


def variant_of(width) -> str | None:
    """Name of the network whose first stage has this width."""
    return next((name for name, v in VARIANTS.items() if v.widths[0] == width), None)


def weight_maps(variant: Variant, heads) -> dict[str, tuple[str, WeightMap]]:
    """A dictionary from a checkpoint's names to pairs (name of the weight in ``named_weights``,
    map).

    Args:
        variant: The network.
        heads: Names of the checkpoint's classifiers: ``head``, and if distilled, ``head_dist``.
    """
    table: dict[str, tuple[str, WeightMap]] = {}

    def convolution(source, target, layout=KERNEL, bias=False):
        table[f"{source}.weight"] = (f"{target}/kernel", layout)
        if bias:
            table[f"{source}.bias"] = (f"{target}/bias", IDENTITY)

    def normalization(source, target):
        for suffix, weight in (
            ("weight", "gamma"),
            ("bias", "beta"),
            ("running_mean", "moving_mean"),
            ("running_var", "moving_variance"),
        ):
            table[f"{source}.{suffix}"] = (f"{target}/{weight}", IDENTITY)

    def conv_bn(source, target, layout=KERNEL):
        convolution(f"{source}.c", f"{target}_conv", layout)
        normalization(f"{source}.bn", f"{target}_bn")

    def involution(source, target):
        generator = f"{target}/large_context"
        for i, (name, layout) in enumerate(
            (("reduce", KERNEL), ("context", DEPTHWISE), ("mix", KERNEL)), start=1
        ):
            convolution(f"{source}.lkp.cv{i}.c", f"{generator}/{name}", layout)
            normalization(f"{source}.lkp.cv{i}.bn", f"{generator}/{name}_normalization")
        reorder = tap_major(variant.kernel_size**2)
        expand = WeightMap(lambda a: KERNEL.convert(reorder(a)), KERNEL.source_shape)
        vector = WeightMap(reorder, IDENTITY.source_shape)
        table[f"{source}.lkp.cv4.weight"] = (f"{generator}/expand/kernel", expand)
        table[f"{source}.lkp.cv4.bias"] = (f"{generator}/expand/bias", vector)
        table[f"{source}.lkp.norm.weight"] = (f"{generator}/gamma", vector)
        table[f"{source}.lkp.norm.bias"] = (f"{generator}/beta", vector)
        normalization(f"{source}.bn", f"{target}_bn")

    def attention(source, target):
        conv_bn(f"{source}.qkv", f"{target}_qkv")
        conv_bn(f"{source}.dw", f"{target}_queries", DEPTHWISE)
        conv_bn(f"{source}.proj.1", f"{target}_projection")
        table[f"{source}.attention_biases"] = (f"{target}/attention_biases", IDENTITY)

    for i in (1, 2, 3):
        conv_bn(f"patch_embed.{2 * i - 2}", f"patch_{i}")
    last = len(variant.blocks)
    for stage, count in enumerate(variant.blocks, start=1):
        first = 0
        if stage > 1:
            first = 2
            conv_bn(f"blocks{stage}.0", f"stage{stage}_downsample_depthwise", DEPTHWISE)
            conv_bn(f"blocks{stage}.1", f"stage{stage}_downsample")
        for block in range(count):
            source, target = f"blocks{stage}.{first + block}", f"stage{stage}_block{block + 1}"
            if block % 2 == 0:
                conv_bn(f"{source}.mixer.conv", f"{target}_depthwise_3", DEPTHWISE)
                conv_bn(f"{source}.mixer.conv1", f"{target}_depthwise_1", DEPTHWISE)
                convolution(f"{source}.se.conv_reduce", f"{target}_se_reduce", bias=True)
                convolution(f"{source}.se.conv_expand", f"{target}_se_expand", bias=True)
            elif stage == last:
                attention(f"{source}.mixer.m", f"{target}_attention")
            else:
                involution(f"{source}.mixer", f"{target}_involution")
            conv_bn(f"{source}.ffn.m.pw1", f"{target}_ffn_1")
            conv_bn(f"{source}.ffn.m.pw2", f"{target}_ffn_2")
    for head in heads:
        prefix = "" if head == "head" else "distilled_"
        normalization(f"{head}.bn", f"{prefix}head_bn")
        table[f"{head}.l.weight"] = (f"{prefix}logits/kernel", TRANSPOSE)
        table[f"{head}.l.bias"] = (f"{prefix}logits/bias", IDENTITY)
    return table
