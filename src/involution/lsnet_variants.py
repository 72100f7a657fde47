"""Hyperparameters of LSNet, for its Keras models and its PyTorch modules."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Variant:
    """Hyperparameters of one network: widths, blocks and attention heads of the four stages."""

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    heads: int  # of the attention in the last stage
    key_channels: int = 16
    ffn_ratio: int = 2
    se_ratio: float = 0.25
    kernel_size: int = 3
    context_size: int = 7
    group_channels: int = 8


VARIANTS = {
    "lsnet_t": Variant((64, 128, 256, 384), (0, 2, 8, 10), 4),
    "lsnet_s": Variant((96, 192, 320, 448), (1, 2, 8, 10), 4),
    "lsnet_b": Variant((128, 256, 384, 512), (4, 6, 8, 10), 4),
}

# Side of the last stage's map at 224x224, to which the attention's table of offsets belongs.
ATTENTION_SIZE = 4


def se_channels(width, ratio) -> int:
    """Hidden channels of squeeze-and-excitation: rounded to a multiple of 8, at least 8."""
    return max(8, int(width * ratio + 4) // 8 * 8)
