"""Data sets for image classification: scikit-learn's digits, CIFAR-10, or a folder of images.

Images are uint8 (N, height, width, 3); ``transforms.to_unit_float`` converts them to model inputs.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import os
import pathlib
import pickle
import tarfile
from typing import ClassVar

import numpy as np
from PIL import Image

from involution.data import image_folder
from involution.data.decode import read_image, resize
from involution.data.image_formats import NAMES
from involution.data.lazy_images import LazyImages
from involution.utils import memory
from involution.utils.atomic_files import sha256
from involution.utils.errors import InputError, one_line

CIFAR10_CLASSES = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]  # in the order of the archive's labels
# File name of the archive in Keras's cache.
CIFAR10_KERAS = "cifar-10-batches-py-target_archive"
CIFAR10_KERAS_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
CIFAR10_BINARY_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_ORIGIN = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
SKIPPED = f"Skipped images (only {NAMES} files directly in a class folder are used):"
CHUNK_SIZE = 1024  # images decoded at a time


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Labeled images, split into training and test data.

    Attributes:
        name: The name shown in reports.
        description: What a reader must know about the images; empty if nothing.
        x_train, x_test: uint8 (N, height, width, 3), in memory or decoded on access.
        y_train, y_test: int64 (N,), indices into ``class_names``.
        class_names: One name for each class.
        batch_size: Default batch size for training.
        files_digest: SHA-256 of the files of an image folder, see ``image_folder.digest``; None for
            other data sets.
        crop_fraction: The center crop of evaluation, see ``decode.read_image``.
        split_files: The files of the training and of the test images, if a folder was split.
        final_test: Images and labels of the test images, if held-out training images replace them.
        held_out_from: Name of the data set whose training images were held out; None: none were.
    """

    name: str
    description: str
    x_train: np.ndarray | LazyImages
    y_train: np.ndarray
    x_test: np.ndarray | LazyImages
    y_test: np.ndarray
    class_names: tuple[str, ...]
    batch_size: int = 256
    files_digest: str | None = None
    crop_fraction: float | None = None
    split_files: dict[str, list[str]] | None = None
    final_test: tuple[np.ndarray | LazyImages, np.ndarray] | None = None
    held_out_from: str | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.x_train.shape[1:]

    def class_counts(self) -> dict[str, dict[str, int]]:
        """Numbers of training and of test images by class."""
        count = functools.partial(np.bincount, minlength=len(self.class_names))
        train, test = count(self.y_train).tolist(), count(self.y_test).tolist()
        return {
            name: {"train": train[number], "test": test[number]}
            for number, name in enumerate(self.class_names)
        }

    def fingerprint(self) -> str:
        """SHA-256 of class names, labels and images (or their files), in hexadecimal."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        if self.files_digest is not None:
            shapes = self.x_train.shape, self.x_test.shape
            digest.update(f"{self.files_digest} {shapes} {self.crop_fraction}".encode())
            for labels in (self.y_train, self.y_test):
                digest.update(labels.tobytes())
            return digest.hexdigest()
        for array in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(f"{array.shape} {array.dtype}".encode())
            for begin in range(0, len(array), CHUNK_SIZE):
                digest.update(np.ascontiguousarray(array[begin : begin + CHUNK_SIZE]).data)
        return digest.hexdigest()

    def validation_split(self, count) -> "Dataset":
        """Holds out ``count`` training images, which replace the test images.

        The split does not depend on a seed.

        Raises:
            InputError: ``count`` is not from 1 to the number of training images - 1.
        """
        total = len(self.x_train)
        if not 0 < count < total:
            raise InputError(
                f"`validation_images` must be from 1 to {total - 1}. Received: {count}"
            )
        permutation = epoch_permutation(total, 0, 0)
        test, train = permutation[:count], permutation[count:]
        return dataclasses.replace(
            self,
            name=f"{self.name}, {count} of its training images held out",
            x_train=_subset(self.x_train, train),
            y_train=self.y_train[train],
            x_test=_subset(self.x_train, test),
            y_test=self.y_train[test],
            final_test=(self.x_test, self.y_test),
            held_out_from=self.name,
        )

    @property
    def evaluated_images(self) -> str:
        """What ``x_test`` is, in words."""
        return "test images" if self.held_out_from is None else "held-out training images"


def _subset(images, index):
    return images.subset(index) if isinstance(images, LazyImages) else images[index]


def load(
    dataset,
    image_size=None,
    download=False,
    progress=lambda done, total: None,
    crop_fraction=None,
    split=None,
    seed=0,
) -> Dataset:
    """Loads a data set.

    Args:
        dataset: ``"digits"``; ``"cifar10"``, from Keras's cache; the path of a CIFAR-10 archive
            (Python or binary version); or a folder of images, see
            ``image_folder.scan``.
        image_size: (height, width) to which the images of a folder are resized; None if they all
            have one size.
        download: Whether to download CIFAR-10 (163 MB) if it is not in Keras's cache.
        progress: Called with the numbers of decoded images and of all images.
        crop_fraction: The center crop of a folder's images that is resized, see
            ``decode.read_image``. The images are decoded on access then, and
            ``x_train.random_crops`` returns random crops. None: images are not cropped.
        split, seed: The test images of a folder that has none, see ``image_folder.scan``.

    Raises:
        InputError: The data set is unknown, incomplete or damaged, or an argument does not apply
            to it.
    """
    path = pathlib.Path(dataset).expanduser()
    if dataset == "digits":
        loaded = _digits()
    elif dataset == "cifar10":
        loaded = _cifar10(_keras_archive(download))
    elif path.is_dir():
        return _folder(path, image_size, crop_fraction, progress, split, seed)
    elif path.is_file():
        loaded = _cifar10(path)
    else:
        raise InputError(
            "A data set must be digits, cifar10, a CIFAR-10 archive or a folder of images. "
            f"Received: {dataset}"
        )
    if split is not None:
        raise InputError(f"`split` applies to image folders only. Received: {split} for {dataset}")
    if crop_fraction is not None:
        raise InputError(f"A recipe with random crops needs an image folder. Received: {dataset}")
    if image_size is not None and tuple(image_size) != loaded.image_shape[:2]:
        raise InputError(
            "`image_size` (--image-size) applies to image folders only. "
            f"Received: {image_size[0]}x{image_size[1]} for {dataset}"
        )
    return loaded


def epoch_permutation(count, seed, epoch) -> np.ndarray:
    """The order in which an epoch visits ``count`` training images: a function of the arguments
    only."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "The data set digits requires scikit-learn: pip install 'involution[compare]'. "
            f"Received: no module {error.name}"
        ) from error
    bundle = load_digits()
    # The inn, three involutions with pooling, does not learn from 8x8 images.
    small = np.round(bundle.images * (255 / 16)).astype("uint8")
    enlarged = [resize(Image.fromarray(i), (32, 32)) for i in small]
    images = np.repeat(np.stack(enlarged)[..., None], 3, axis=-1)
    labels = bundle.target.astype("int64")
    permutation = epoch_permutation(len(images), 0, 0)
    test, train = permutation[:360], permutation[360:]
    return Dataset(
        name="digits",
        description="scikit-learn's handwritten digits, upsampled from 8x8 to 32x32; not CIFAR-10.",
        x_train=images[train],
        y_train=labels[train],
        x_test=images[test],
        y_test=labels[test],
        class_names=tuple("0123456789"),
        # With 256 the involutional network does not converge in 20 epochs.
        batch_size=32,
    )


def _keras_archive(download) -> pathlib.Path:
    home = pathlib.Path(os.environ.get("KERAS_HOME") or os.path.expanduser("~/.keras"))
    path = home / "datasets" / CIFAR10_KERAS
    if path.is_file():
        return path
    if not download:
        raise InputError(
            "CIFAR-10 must be in Keras's cache, downloaded with --download (163 MB), or given as "
            f"the path of its archive. Received: cifar10, and no file {path}"
        )
    import keras

    try:
        downloaded = keras.utils.get_file(
            fname=CIFAR10_KERAS, origin=CIFAR10_ORIGIN, file_hash=CIFAR10_KERAS_SHA256
        )
    except Exception as error:  # without a network Keras raises Exception itself
        raise InputError(
            "CIFAR-10 must be downloadable, or given as the path of its archive. "
            f"Received: {CIFAR10_ORIGIN}: {one_line(error)}"
        ) from error
    return pathlib.Path(downloaded)


def _cifar10(path) -> Dataset:
    if sha256(path) == CIFAR10_KERAS_SHA256:
        read, names = _pickled_batch, [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    elif _md5(path) == CIFAR10_BINARY_MD5:
        read = _binary_batch
        names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    else:
        raise InputError(
            "The file of a data set must be an unmodified CIFAR-10 archive. "
            f"Received: {path}, with a different hash"
        )
    return _cifar10_from(path, read, names)


def _md5(path) -> str:
    with open(path, "rb") as file:
        new = functools.partial(hashlib.md5, usedforsecurity=False)
        return hashlib.file_digest(file, new).hexdigest()


def _cifar10_from(path, read, names) -> Dataset:
    batches = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name = pathlib.PurePosixPath(member.name).name
            content = archive.extractfile(member) if name in names else None
            if content is not None:
                batches[name] = read(content.read())
    images = [batches[name][0] for name in names]
    labels = [batches[name][1] for name in names]
    return Dataset(
        name="CIFAR-10",
        description="",
        x_train=np.concatenate(images[:-1]),
        y_train=np.concatenate(labels[:-1]),
        x_test=images[-1],
        y_test=labels[-1],
        class_names=tuple(CIFAR10_CLASSES),
    )


def _channels_last(rows) -> np.ndarray:
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _binary_batch(content):
    records = np.frombuffer(content, "uint8").reshape(-1, 1 + 3072)
    return _channels_last(records[:, 1:]), records[:, 0].astype("int64")


class _RestrictedUnpickler(pickle.Unpickler):
    """Unpickles the NumPy arrays of CIFAR-10's batches; every other global is rejected."""

    ALLOWED: ClassVar = {
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        # Its module depends on NumPy's version.
        "_reconstruct": np.empty(0).__reduce__()[0],
    }

    def find_class(self, module, name):
        if module.split(".")[0] == "numpy" and name in self.ALLOWED:
            return self.ALLOWED[name]
        raise InputError(f"A CIFAR-10 batch must contain only arrays. Received: {module}.{name}")


def _pickled_batch(content):
    batch = _RestrictedUnpickler(io.BytesIO(content), encoding="bytes").load()
    return _channels_last(batch[b"data"]), np.array(batch[b"labels"], "int64")


def _folder(root, image_size, crop_fraction, progress, split, seed) -> Dataset:
    if crop_fraction is not None and image_size is None:
        raise InputError("A recipe with random crops requires `image_size`. Received: None")
    found = image_folder.scan(root, split, seed)
    class_names = tuple(found.train)
    unknown = [name for name in found.test if name not in found.train]
    if unknown:
        raise InputError(
            f"Every test class must have training images. Received: {unknown[0]} in {root}, "
            "without any"
        )
    if len(class_names) < 2:
        raise InputError(
            "A data set must have at least two classes. "
            f"Received: only {', '.join(class_names)} in {root}"
        )
    numbers = {name: number for number, name in enumerate(class_names)}
    sources, labels = [], []
    for name, members in (*found.train.items(), *found.test.items()):
        sources += members
        labels += [numbers[name]] * len(members)
    y = np.array(labels, "int64")
    train = sum(map(len, found.train.values()))
    exceeds_decode_limit = image_folder.exceeds_decode_limit(sources)
    images = _decode_all(sources, exceeds_decode_limit, image_size, crop_fraction, progress)
    return Dataset(
        name=root.resolve().name,
        description=f"{SKIPPED} {found.skipped}." if found.skipped else "",
        x_train=_subset(images, slice(train)),
        y_train=y[:train],
        x_test=_subset(images, slice(train, None)),
        y_test=y[train:],
        class_names=class_names,
        files_digest=image_folder.digest(sources, exceeds_decode_limit),
        crop_fraction=crop_fraction,
        split_files=None
        if split is None
        else {
            "train": [str(source) for source in sources[:train]],
            "test": [str(source) for source in sources[train:]],
        },
    )


def _decode_all(
    sources, exceeds_decode_limit, image_size, crop_fraction, progress
) -> np.ndarray | LazyImages:
    """The images of a folder.

    Unless ``exceeds_decode_limit``, each is decoded once to detect damaged files. The images are
    kept in memory if they take at most a quarter of it and are not randomly cropped.
    """

    def lazy(shape):
        return LazyImages(sources, shape, image_size, crop_fraction)

    def decode(source):
        try:
            with source.open() as file:
                return read_image(file, image_size, crop_fraction)
        except (InputError, OSError) as error:
            return InputError(one_line(error))

    if exceeds_decode_limit:
        first = decode(sources[0]) if image_size is None else np.empty((*image_size, 3), "uint8")
        if isinstance(first, InputError):
            raise InputError(f"{first}. Received: {sources[0]}")
        return lazy(first.shape)
    images: np.ndarray | None = None
    shape: tuple[int, ...] = ()
    unreadable, wrong_size = [], []
    # Pillow decodes outside of the global interpreter lock. Chunks bound the queue of results.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = (
            image
            for begin in range(0, len(sources), CHUNK_SIZE)
            for image in pool.map(decode, sources[begin : begin + CHUNK_SIZE])
        )
        for number, (source, image) in enumerate(zip(sources, decoded, strict=True)):
            progress(number + 1, len(sources))
            if isinstance(image, InputError):
                unreadable.append((source, image))
                continue
            if not shape:
                shape = image.shape
                if (
                    crop_fraction is None
                    and len(sources) * image.nbytes <= memory.memory_limit() / 4
                ):
                    images = np.empty((len(sources), *shape), "uint8")
            if image.shape != shape:
                wrong_size.append((source, image.shape))
            elif images is not None:
                images[number] = image
    if unreadable:
        source, error = unreadable[0]
        raise InputError(
            f"{error}. Received: {source} ({len(unreadable)} of {len(sources)} files cannot be "
            "read)"
        )
    if wrong_size:
        sizes = [f"{width}x{height}" for height, width, *_ in (shape, wrong_size[0][1])]
        raise InputError(
            "Images must have one size unless `image_size` (--image-size) is given. "
            f"Received: {sizes[0]} in {sources[0]}, {sizes[1]} in {wrong_size[0][0]}"
        )
    return lazy(shape) if images is None else images
