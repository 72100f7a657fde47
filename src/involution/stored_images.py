"""Images that stay in their files: for folders that are larger than memory."""

import concurrent.futures
import os
from collections.abc import Callable

import numpy as np

from involution.errors import InputError


class StoredImages:
    """An array of images (N, height, width, 3), uint8, to read from: what is asked for is decoded
    then, and not kept.

    Args:
        files: One for each image.
        image_shape: (height, width, 3).
        read: From a file to an array of that shape.
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
        images = np.empty((len(files), *self.shape[1:]), self.dtype)
        for image, read in zip(images, self._pool.map(self._read, files), strict=True):
            image[:] = read
        return images

    def part(self, index) -> "StoredImages":
        """These of the images, still in their files."""
        return StoredImages(self.files[index], self.shape[1:], self.read)

    def _read(self, file):
        try:
            image = self.read(file)
            if image.shape != self.shape[1:]:
                raise InputError(f"An image must keep its size {self.shape[1:]}: {image.shape}")
        except InputError as error:
            raise InputError(f"{error}. Received: {file}, which was another before") from error
        return image
