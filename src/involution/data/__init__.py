"""The input pipeline: data sets, decoding, transforms and prefetching."""

from involution import renamed
from involution.data.datasets import Dataset, epoch_permutation, load
from involution.data.decode import read_image
from involution.data.transforms import check_floatx, flip_mask, to_unit_float

__all__ = [
    "Dataset",
    "check_floatx",
    "epoch_permutation",
    "flip_mask",
    "load",
    "read_image",
    "to_unit_float",
]

__getattr__ = renamed.attributes(
    __name__,
    {"order": "epoch_permutation", "mirrored": "flip_mask", "scale": "to_unit_float"},
)
