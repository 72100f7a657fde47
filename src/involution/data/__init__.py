"""Images for training: data sets, decoding, crops and prefetching."""

from involution.data.datasets import (
    Dataset,
    check_floatx,
    load,
    mirrored,
    order,
    read_image,
    scale,
)

__all__ = ["Dataset", "check_floatx", "load", "mirrored", "order", "read_image", "scale"]
