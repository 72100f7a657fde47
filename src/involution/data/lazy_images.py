"""Images that are decoded on access, for data sets larger than memory."""

import concurrent.futures
import os

import numpy as np

from involution.data.decode import read_image
from involution.utils.errors import InputError, one_line


class LazyImages:
    """A read-only array of images, uint8 (N, height, width, 3), decoded on access and not cached.

    Args:
        sources: One ``FileSource`` or ``TarMember`` of ``image_folder`` for each image.
        image_shape: (height, width, 3).
        image_size: (height, width) to resize to; None if all images have that shape already.
        crop_fraction: The center crop that is resized, see ``decode.read_image``.
    """

    dtype = np.dtype("uint8")

    def __init__(self, sources, image_shape, image_size=None, crop_fraction=None):
        self.sources = np.asarray(sources, object)
        self.image_size, self.crop_fraction = image_size, crop_fraction
        self.shape = (len(self.sources), *image_shape)
        self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, index) -> np.ndarray:
        """One image for an integer; a batch for a slice or an array of indices."""
        sources = self.sources[index]
        if not isinstance(sources, np.ndarray):
            return self._decode(sources)
        return self._decode_batch(sources, [None] * len(sources))

    def random_crops(self, index, seed, epoch) -> np.ndarray:
        """A random crop of each of these images: a function of seed, epoch and image."""
        return self._decode_batch(self.sources[index], [(seed, epoch, 2, i) for i in index])

    def subset(self, index) -> "LazyImages":
        """The images of a slice or an array of indices, not decoded."""
        return LazyImages(self.sources[index], self.shape[1:], self.image_size, self.crop_fraction)

    def _decode_batch(self, sources, seeds):
        images = np.empty((len(sources), *self.shape[1:]), self.dtype)
        for image, decoded in zip(
            images, self._pool.map(self._decode, sources, seeds), strict=True
        ):
            image[:] = decoded
        return images

    def _decode(self, source, seed=None):
        rng = None if seed is None else np.random.default_rng(seed)
        try:
            with source.open() as file:
                image = read_image(file, self.image_size, self.crop_fraction, rng)
            if image.shape != self.shape[1:]:
                height, width, _ = self.shape[1:]
                raise InputError(
                    f"Images must have one size, here {width}x{height}, unless `image_size` "
                    "(--image-size) is given"
                )
        except (InputError, OSError) as error:
            raise InputError(f"{one_line(error)}. Received: {source}") from error
        return image
