"""Image transforms: crop boxes, flips and scaling. Random transforms depend only on their seed."""

import math

import numpy as np

from involution.utils.errors import InputError

# (left, top, right, bottom) in pixels.
Box = tuple[float, float, float, float]

# Side of the center crop in evaluation, relative to the largest crop of the same aspect ratio.
CENTER_FRACTION = 0.875
# Area of a training crop relative to the image's, and its largest change of aspect ratio.
MIN_AREA, MAX_ASPECT_CHANGE = 0.08, 4 / 3


def center_crop(width, height, aspect_ratio, fraction=CENTER_FRACTION) -> Box:
    """The box of a center crop.

    Args:
        width, height: Size of the image in pixels.
        aspect_ratio: Width / height of the crop.
        fraction: Side of the crop, relative to the largest crop of this aspect ratio.
    """
    crop_width = fraction * min(width, height * aspect_ratio)
    return _box(width, height, crop_width, crop_width / aspect_ratio, 0.5, 0.5)


def random_resized_crop(width, height, aspect_ratio, rng: np.random.Generator) -> Box:
    """The box of a crop of random area, aspect ratio and position (Szegedy et al., CVPR 2015,
    section 6); the center crop of fraction 1 if ten draws do not fit."""
    for _ in range(10):
        area = width * height * rng.uniform(MIN_AREA, 1)
        aspect_change = MAX_ASPECT_CHANGE ** rng.uniform(-1, 1)
        crop_width = math.sqrt(area * aspect_ratio * aspect_change)
        crop_height = area / crop_width
        if crop_width <= width and crop_height <= height:
            return _box(width, height, crop_width, crop_height, *rng.random(2))
    return center_crop(width, height, aspect_ratio, fraction=1)


def _box(width, height, crop_width, crop_height, x, y) -> Box:
    """The box at relative position (x, y), both from 0 to 1."""
    left, top = x * (width - crop_width), y * (height - crop_height)
    # Rounding may exceed the bounds of the image.
    left, top = max(left, 0), max(top, 0)
    return left, top, min(left + crop_width, width), min(top + crop_height, height)


def flip_mask(count, seed, epoch) -> np.ndarray:
    """For each of ``count`` training images, whether the epoch flips it horizontally: booleans, a
    function of the arguments only."""
    return np.random.default_rng([seed, epoch, 1]).random(count) < 0.5


def to_unit_float(images) -> np.ndarray:
    """Converts uint8 images to model inputs: float32 in [0, 1]."""
    scaled = images.astype("float32")
    scaled /= np.float32(255)
    return scaled


def check_floatx() -> None:
    """Checks that Keras's floatx is float32, the dtype of ``to_unit_float``: Keras casts inputs and
    computes metrics in floatx, whatever the dtype policy of the layers.

    Raises:
        InputError: The floatx is another dtype.
    """
    import keras

    floatx = keras.config.floatx()
    if floatx != "float32":
        raise InputError(
            "Keras's floatx (keras.json or keras.config.set_floatx) must be float32; --precision "
            f"sets the compute dtype of the layers. Received: floatx={floatx}"
        )
