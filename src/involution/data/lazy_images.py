"""Images that stay in their files: for folders that are larger than memory."""

import concurrent.futures
import os
from collections.abc import Callable

import numpy as np

from involution.utils.errors import InputError


class StoredImages:
    """An array of images (N, height, width, 3), uint8, to read from: what is asked for is decoded
    then, and not kept.

    Args:
        files: One for each image, as ``image_files`` finds them.
        image_shape: (height, width, 3).
        read: From a file to an array of that shape; with ``random``, a generator of random
            numbers, of some part of it.
    """

    dtype = np.dtype("uint8")

    def __init__(self, files, image_shape, read: Callable[..., np.ndarray]):
        self.files, self.read = np.asarray(files, object), read
        self.shape = (len(self.files), *image_shape)
        self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index) -> np.ndarray:
        """Of an integer one image; of a slice or an array of indices so many."""
        files = self.files[index]
        if not isinstance(files, np.ndarray):
            return self._read(files)
        return self._all(files, [None] * len(files))

    def crops(self, index, seed, epoch) -> np.ndarray:
        """Some part of each of these, another one in every epoch: a function of its arguments."""
        return self._all(self.files[index], [(seed, epoch, 2, number) for number in index])

    def part(self, index) -> "StoredImages":
        """These of the images, still in their files."""
        return StoredImages(self.files[index], self.shape[1:], self.read)

    def _all(self, files, keys):
        images = np.empty((len(files), *self.shape[1:]), self.dtype)
        for image, read in zip(images, self._pool.map(self._read, files, keys), strict=True):
            image[:] = read
        return images

    def _read(self, file, key=None):
        random = None if key is None else np.random.default_rng(key)
        try:
            with file.open() as opened:
                image = self.read(opened, random)
            if image.shape != self.shape[1:]:
                raise InputError(
                    f"An image must have the size of the others, {self.shape[1:]}, or --image-size "
                    "be given"
                )
        except (InputError, OSError) as error:
            raise InputError(f"{' '.join(str(error).split())}. Received: {file}") from error
        return image
