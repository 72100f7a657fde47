"""Hyperparameters of the RedNet family, for its Keras models and its PyTorch modules."""

import dataclasses

from involution.ops.validation import standardize_tuple


@dataclasses.dataclass(frozen=True)
class Variant:
    """Hyperparameters of one network of the family."""

    blocks: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512)
    expansion: int = 4
    stem_width: int = 64
    # Kernel size of the stem's involution; None: the stem is one convolution, for small images.
    stem_kernel_size: int | None = 3
    # Whether max pooling follows that convolution.
    stem_pool: bool = True
    kernel_size: int = 7
    group_channels: int = 16
    reduction_ratio: int = 4
    kernel_generator: object = None


VARIANTS = {
    "rednet26": Variant((1, 2, 4, 1)),
    "rednet38": Variant((2, 3, 5, 2)),
    "rednet50": Variant((3, 4, 6, 3)),
    "rednet101": Variant((3, 4, 23, 3)),
    "rednet152": Variant((3, 8, 36, 3)),
}

# For images of about 32x32 pixels: the best of 40 trials of a hyperparameter search on CIFAR-10.
TINY = Variant(
    blocks=(2, 3),
    widths=(32, 32),
    expansion=2,
    stem_width=16,
    stem_kernel_size=None,
    kernel_size=5,
    group_channels=8,
    reduction_ratio=8,
)


def tiny_variant(
    *,
    blocks,
    widths,
    expansion,
    stem_width,
    stem_pool,
    kernel_size,
    group_channels,
    reduction_ratio,
    kernel_generator,
) -> Variant:
    """The checked variant of ``rednet_tiny``'s arguments, or ValueError."""
    blocks, widths = ((n,) if isinstance(n, int) else tuple(n) for n in (blocks, widths))
    for name, value in (("blocks", blocks), ("widths", widths)):
        standardize_tuple(name, value, len(value))
    if len(blocks) != len(widths) or not blocks:
        raise ValueError(
            "`blocks` and `widths` must have one integer for each stage. "
            f"Received: blocks={blocks!r}, widths={widths!r}"
        )
    (kernel_size,) = standardize_tuple("kernel_size", kernel_size, 1)
    if kernel_size % 2 == 0:
        raise ValueError(f"`kernel_size` must be odd. Received: kernel_size={kernel_size}")
    if not isinstance(stem_pool, bool):
        raise ValueError(f"`stem_pool` must be True or False. Received: stem_pool={stem_pool!r}")
    return Variant(
        blocks=blocks,
        widths=widths,
        expansion=standardize_tuple("expansion", expansion, 1)[0],
        stem_width=standardize_tuple("stem_width", stem_width, 1)[0],
        stem_kernel_size=None,
        stem_pool=stem_pool,
        kernel_size=kernel_size,
        group_channels=group_channels,
        reduction_ratio=reduction_ratio,
        kernel_generator=kernel_generator,
    )
