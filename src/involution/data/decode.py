"""Decodes image files to uint8 arrays, for training and for inference."""

import math
import os

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from involution.data import image_formats, transforms
from involution.data.image_folder import check_regular
from involution.utils.errors import InputError

PATH_TYPES = (str, bytes, os.PathLike)
# By EXIF orientation, the transpose that undoes it; 1 is upright.
ORIENTATION_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(file, size=None, crop_fraction=None, rng=None) -> np.ndarray:
    """Decodes an image file to uint8 (height, width, 3) in its EXIF orientation.

    The orientation comes from the EXIF or XMP data; other metadata is ignored. Without a readable
    orientation from 2 to 8 the image is not transposed, as in image viewers. Of files with several
    images the first is decoded, of 16 bits the higher 8; transparency is ignored.

    Args:
        file: A path, which error messages contain, or an open file.
        size: (height, width) to resize to; None keeps the size of the file.
        crop_fraction: Side of the center crop that is resized, relative to the largest crop of
            this aspect ratio. None: the whole image is resized, whatever its aspect ratio.
        rng: A ``numpy.random.Generator``: a random crop is resized instead, see
            ``transforms.random_resized_crop``.

    Raises:
        InputError: The file is missing, truncated, too large or not an image.
    """
    try:
        if isinstance(file, PATH_TYPES):
            check_regular(file)
        with Image.open(file, formats=tuple(image_formats.formats())) as opened:
            # Up to twice this limit Pillow only warns of a decompression bomb.
            if opened.width * opened.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise ValueError(f"its {opened.width}x{opened.height} pixels exceed the limit")
            opened.load()
            transpose = _orientation_transpose(opened)
            upright = opened if transpose is None else opened.transpose(transpose)
            if upright.mode in ("I", "F"):
                raise ValueError("its 32 bits per pixel have no known range; convert it to 8 or 16")
            if upright.mode.startswith("I"):  # 16 bits per pixel, which convert() would clip
                upright = Image.fromarray((np.asarray(upright) >> 8).astype("uint8"))
            image = upright.convert("RGB")
    except MemoryError:  # not the file's fault: its pixels are within the limit
        raise
    except Exception as error:  # Pillow raises many exception types for damaged files
        name = os.fsdecode(file) if isinstance(file, PATH_TYPES) else ""
        reason = image_formats.hint(name) or _reason(error)
        where = f". Received: {name}" if name else ""
        raise InputError(
            f"An image must be a valid {image_formats.NAMES} file: {reason}{where}"
        ) from error
    if size is None:
        return np.asarray(image)
    aspect_ratio = size[1] / size[0]
    box = None
    if rng is not None:
        box = transforms.random_resized_crop(*image.size, aspect_ratio, rng)
    elif crop_fraction is not None:
        box = transforms.center_crop(*image.size, aspect_ratio, crop_fraction)
    return resize(image, size, box)


def resize(image, size, box=None) -> np.ndarray:
    """Resizes a Pillow image, or a box of it, bilinearly to (height, width)."""
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box))


def _orientation_transpose(image) -> Image.Transpose | None:
    """The transpose that makes an image upright; None if it is upright or its orientation cannot be
    read.

    Not ``ImageOps.exif_transpose``, which rewrites all EXIF tags and fails on damaged ones.
    """
    try:
        return ORIENTATION_TRANSPOSES.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # noqa: BLE001 - Pillow raises many exception types for damaged EXIF data
        return None


def _reason(error) -> str:
    """The message of an error, without Pillow's representation of the file object."""
    if isinstance(error, UnidentifiedImageError):
        return "its format is not recognized"
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(message.split()) or type(error).__name__
