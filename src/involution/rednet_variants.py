"""Hyperparameters of the RedNet family, for its Keras models and its PyTorch modules."""

import dataclasses


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
