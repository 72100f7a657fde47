"""Images to train on: the bundled digits, CIFAR-10, a folder of one's own.

Images are uint8 arrays (N, height, width, 3) until they reach a model, which gets float32 from 0
to 1. ``read_image`` and ``scale`` are the only way from a file to a model, in training and after.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import math
import os
import pathlib
import pickle
import tarfile
from typing import ClassVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from involution.data import image_folder, transforms
from involution.data.lazy_images import StoredImages
from involution.utils import memory
from involution.utils.atomic_files import sha256
from involution.utils.errors import InputError

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
]  # the archive's order
# The archive that Keras keeps, under the name that Keras gives it.
CIFAR10_KERAS = "cifar-10-batches-py-target_archive"
CIFAR10_KERAS_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
CIFAR10_BINARY_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_ORIGIN = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
UNUSED = "Images that are not used (PNG, JPEG and WebP directly in the folder of a class are):"
# What a file may be named by.
PATHS = (str, bytes, os.PathLike)
BLOCK = 1024  # images that are read at a time
# What sets an image upright, by its EXIF orientation; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images with labels, for training and for testing.

    Attributes:
        name: What to call it in a report.
        note: What a reader must know about its images; empty where there is nothing.
        x_train, x_test: uint8 (N, height, width, 3); in memory, or in their files.
        y_train, y_test: int64 (N,), indices into ``class_names``.
        class_names: One name for each class.
        batch_size: The batch size that suits it.
        files: SHA-256 of the files that it was read from, see ``image_files.digest``; None where
            it is not a folder.
        crop: The share of an image that a model is tested on, see ``read_image``.
    """

    name: str
    note: str
    x_train: np.ndarray | StoredImages
    y_train: np.ndarray
    x_test: np.ndarray | StoredImages
    y_test: np.ndarray
    class_names: tuple[str, ...]
    batch_size: int = 256
    files: str | None = None
    crop: float | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.x_train.shape[1:]

    def fingerprint(self) -> str:
        """SHA-256 of images, or of their files, of labels and classes, in hexadecimal."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        if self.files is not None:
            shapes = self.x_train.shape, self.x_test.shape
            digest.update(f"{self.files} {shapes} {self.crop}".encode())
            for labels in (self.y_train, self.y_test):
                digest.update(labels.tobytes())
            return digest.hexdigest()
        for array in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(f"{array.shape} {array.dtype}".encode())
            for begin in range(0, len(array), BLOCK):
                digest.update(np.ascontiguousarray(array[begin : begin + BLOCK]).data)
        return digest.hexdigest()

    def validation(self, count) -> "Dataset":
        """Without its test images: ``count`` training images, always the same, in their place.

        Raises:
            InputError: There are not so many.
        """
        total = len(self.x_train)
        if not 0 < count < total:
            raise InputError(
                f"Training images to be held out must be from 1 to {total - 1}. Received: {count}"
            )
        mixed = order(total, 0, 0)
        test, train = mixed[:count], mixed[count:]
        return dataclasses.replace(
            self,
            name=f"{self.name}, {count} of its training images held out",
            x_train=_part(self.x_train, train),
            y_train=self.y_train[train],
            x_test=_part(self.x_train, test),
            y_test=self.y_train[test],
        )


def _part(images, index):
    return images.part(index) if isinstance(images, StoredImages) else images[index]


def load(
    dataset, image_size=None, download=False, progress=lambda done, total: None, crop=None
) -> Dataset:
    """Loads a data set.

    Args:
        dataset: ``"digits"``; ``"cifar10"``, from the archive that Keras keeps; the path of one of
            CIFAR-10's archives (Python or binary); or a folder of PNG, JPEG or WebP images, see
            ``image_files.find``.
        image_size: (height, width) that a folder's images are resized to; None where they already
            have one size.
        download: Whether CIFAR-10 may be fetched where Keras has no archive (163 MB).
        progress: Called with the numbers of images read and to be read.
        crop: The share of a folder's images that is seen, see ``read_image``. They stay in their
            files then, and ``x_train.crops`` gives random parts of them. None: all of an image.

    Raises:
        InputError: The data cannot be used.
    """
    path = pathlib.Path(dataset).expanduser()
    if dataset == "digits":
        loaded = _digits()
    elif dataset == "cifar10":
        loaded = _cifar10(_keras_archive(download))
    elif path.is_dir():
        return _folder(path, image_size, crop, progress)
    elif path.is_file():
        loaded = _cifar10(path)
    else:
        raise InputError(
            "The data set must be digits, cifar10, a CIFAR-10 archive or a folder with train/ and "
            f"test/. Received: {dataset}"
        )
    if crop is not None:
        raise InputError(f"A recipe that crops needs a folder of images. Received: {dataset}")
    if image_size is not None and tuple(image_size) != loaded.image_shape[:2]:
        raise InputError(
            "An image size can be given for a folder of images only. "
            f"Received: {image_size[0]}x{image_size[1]} for {dataset}"
        )
    return loaded


def order(count, seed, epoch) -> np.ndarray:
    """The order of training images in an epoch: a function of its arguments alone."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def mirrored(count, seed, epoch) -> np.ndarray:
    """Which training images an epoch sees in a mirror: a function of its arguments alone."""
    return np.random.default_rng([seed, epoch, 1]).random(count) < 0.5


def scale(images) -> np.ndarray:
    """What a model gets: float32 from 0 to 1."""
    scaled = images.astype("float32")
    scaled /= np.float32(255)
    return scaled


def check_floatx():
    """That Keras's floatx is the type of what ``scale`` gives: it is what Keras converts inputs to
    and computes metrics in, whatever the layers' precision is.

    Raises:
        InputError: It is another.
    """
    import keras

    floatx = keras.config.floatx()
    if floatx != "float32":
        raise InputError(
            "Keras's floatx, in its keras.json or set by keras.config.set_floatx, must be float32; "
            f"--precision sets what layers compute in. Received: floatx={floatx}"
        )


def read_image(file, size=None, crop=None, random=None) -> np.ndarray:
    """An image file as uint8 (height, width, 3), upright.

    The orientation is the one in its EXIF or XMP data, a number from 2 to 8. Whatever else stands
    in these is not read; where there is no such number, or it cannot be read, the image is taken
    as it is stored, as viewers do.

    Args:
        file: A path, which an error names, or an open file.
        size: (height, width) that it is resized to; None: it keeps its own.
        crop: The share of the largest rectangle of these proportions, in the middle of the image,
            that is taken; None: the whole image is, whatever its proportions.
        random: A generator of random numbers: some part of the image is taken, see
            ``crops.at_random``.

    Raises:
        InputError: The file is missing, truncated, too large or not an image.
    """
    try:
        with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as opened:
            # Pillow itself only warns up to twice this size, which may be an attack on memory.
            if opened.width * opened.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise ValueError(f"its {opened.width}x{opened.height} pixels exceed the limit")
            opened.load()
            turn = _turn(opened)
            upright = opened if turn is None else opened.transpose(turn)
            if upright.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip
                upright = Image.fromarray((np.asarray(upright) >> 8).astype("uint8"))
            image = upright.convert("RGB")
    except MemoryError:  # no fault of the file: its pixels are within the limit
        raise
    except Exception as error:  # a damaged file breaks Pillow's readers in many ways
        where = f". Received: {os.fsdecode(file)}" if isinstance(file, PATHS) else ""
        raise InputError(
            f"An image must be a whole PNG, JPEG or WebP file: {_reason(error)}{where}"
        ) from error
    if size is None:
        return np.asarray(image)
    proportions = size[1] / size[0]
    box = None
    if random is not None:
        box = transforms.at_random(*image.size, proportions, random)
    elif crop is not None:
        box = transforms.middle(*image.size, proportions, crop)
    return _resize(image, size, box)


def _turn(image) -> Image.Transpose | None:
    """What sets an image upright; None: it is, or nothing that can be read says otherwise.

    ``ImageOps.exif_transpose`` writes the EXIF data anew without the orientation, and so fails on
    any tag that is damaged.
    """
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # noqa: BLE001 - Pillow raises many kinds for EXIF data that is damaged
        return None


def _reason(error) -> str:
    """Of an error of Pillow's or the system's, without the file: Pillow names one that is open by
    its address in memory."""
    if isinstance(error, UnidentifiedImageError):
        return "cannot identify it"
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split()) or type(error).__name__


def _resize(image, size, box=None) -> np.ndarray:
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box))


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "The digits come with scikit-learn: pip install 'involution[compare]'"
        ) from error
    bundle = load_digits()
    # At 8 x 8 pixels three involutions with pooling learn nothing: 32 x 32 x 3 they do.
    small = np.round(bundle.images * (255 / 16)).astype("uint8")
    enlarged = [_resize(Image.fromarray(i), (32, 32)) for i in small]
    images = np.repeat(np.stack(enlarged)[..., None], 3, axis=-1)
    labels = bundle.target.astype("int64")
    mixed = order(len(images), 0, 0)
    test, train = mixed[:360], mixed[360:]
    return Dataset(
        name="digits",
        note="Handwritten digits of scikit-learn, enlarged from 8x8 to 32x32; not CIFAR-10.",
        x_train=images[train],
        y_train=labels[train],
        x_test=images[test],
        y_test=labels[test],
        class_names=tuple("0123456789"),
        # With 256 the involutional network does not learn them in 20 epochs.
        batch_size=32,
    )


def _keras_archive(download) -> pathlib.Path:
    home = pathlib.Path(os.environ.get("KERAS_HOME") or os.path.expanduser("~/.keras"))
    path = home / "datasets" / CIFAR10_KERAS
    if path.is_file():
        return path
    if not download:
        raise InputError(
            "CIFAR-10 must be in Keras's cache, be fetched with --download (163 MB), or be given "
            f"by the path of its archive. Received: cifar10, and no file {path}"
        )
    import keras

    try:
        fetched = keras.utils.get_file(
            fname=CIFAR10_KERAS, origin=CIFAR10_ORIGIN, file_hash=CIFAR10_KERAS_SHA256
        )
    except Exception as error:  # bare ones are what Keras raises without a network
        raise InputError(
            f"CIFAR-10 must be fetched from a server that answers. Received: {error}"
        ) from error
    return pathlib.Path(fetched)


def _cifar10(path) -> Dataset:
    if sha256(path) == CIFAR10_KERAS_SHA256:
        read, names = _pickled_batch, [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    elif _md5(path) == CIFAR10_BINARY_MD5:
        read = _binary_batch
        names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    else:
        raise InputError(
            "A file given as a data set must be one of CIFAR-10's archives, whole and unchanged. "
            f"Received: {path}, whose hash is another"
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
        note="",
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


class _ArraysOnly(pickle.Unpickler):
    """Reads what CIFAR-10's batches hold, and refuses to make anything else."""

    ALLOWED: ClassVar = {
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        # The function that NumPy's own arrays name as theirs, wherever it lives.
        "_reconstruct": np.empty(0).__reduce__()[0],
    }

    def find_class(self, module, name):
        if module.split(".")[0] == "numpy" and name in self.ALLOWED:
            return self.ALLOWED[name]
        raise InputError(f"A batch must hold arrays only. Received: {module}.{name}")


def _pickled_batch(content):
    batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    return _channels_last(batch[b"data"]), np.array(batch[b"labels"], "int64")


def _folder(root, image_size, crop, progress) -> Dataset:
    if crop is not None and image_size is None:
        raise InputError("A recipe that crops needs --image-size. Received: none")
    found = image_folder.find(root)
    class_names = tuple(found.train)
    unknown = [name for name in found.test if name not in found.train]
    if unknown:
        raise InputError(
            "Every class to test must be one to train too. "
            f"Received: {unknown[0]}, of which {root} has test images alone"
        )
    if len(class_names) < 2:
        raise InputError(
            "A data set must have at least two classes. "
            f"Received: {', '.join(class_names)} alone in {root}"
        )
    numbers = {name: number for number, name in enumerate(class_names)}
    files, labels = [], []
    for name, members in (*found.train.items(), *found.test.items()):
        files += members
        labels += [numbers[name]] * len(members)
    y = np.array(labels, "int64")
    train = sum(map(len, found.train.values()))
    large = image_folder.are_large(files)
    images = _read_all(files, large, image_size, crop, progress)
    return Dataset(
        name=root.resolve().name,
        note=f"{UNUSED} {found.skipped}." if found.skipped else "",
        x_train=_part(images, slice(train)),
        y_train=y[:train],
        x_test=_part(images, slice(train, None)),
        y_test=y[train:],
        class_names=class_names,
        files=image_folder.digest(files, large),
        crop=crop,
    )


def _read_all(files, large, image_size, crop, progress) -> np.ndarray | StoredImages:
    """All are read once, unless that takes too long; those that would take more than a quarter of
    the memory, or are seen in parts, are not kept."""

    def stored(shape):
        read = functools.partial(_read_part, size=image_size, crop=crop)
        return StoredImages(files, shape, read)

    def read(file):
        try:
            with file.open() as opened:
                return read_image(opened, image_size, crop)
        except (InputError, OSError) as error:
            return InputError(" ".join(str(error).split()))

    if large:
        first = read(files[0]) if image_size is None else np.empty((*image_size, 3), "uint8")
        if isinstance(first, InputError):
            raise InputError(f"{first}. Received: {files[0]}")
        return stored(first.shape)
    images: np.ndarray | None = None
    shape: tuple[int, ...] = ()
    broken, others = [], []
    # Decoding runs outside of Python's lock. What is decoded waits: not all at once.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = (
            image
            for begin in range(0, len(files), BLOCK)
            for image in pool.map(read, files[begin : begin + BLOCK])
        )
        for number, (file, image) in enumerate(zip(files, decoded, strict=True)):
            progress(number + 1, len(files))
            if isinstance(image, InputError):
                broken.append((file, image))
                continue
            if not shape:
                shape = image.shape
                if crop is None and len(files) * image.nbytes <= memory.allowed() / 4:
                    images = np.empty((len(files), *shape), "uint8")
            if image.shape != shape:
                others.append((file, image.shape))
            elif images is not None:
                images[number] = image
    if broken:
        file, error = broken[0]
        raise InputError(
            f"{error}. Received: {file} ({len(broken)} of {len(files)} files cannot be read)"
        )
    if others:
        sizes = [f"{width}x{height}" for height, width, *_ in (shape, others[0][1])]
        raise InputError(
            "Images must have one size, or --image-size must be given. "
            f"Received: {sizes[0]} in {files[0]}, {sizes[1]} in {others[0][0]}"
        )
    return stored(shape) if images is None else images


def _read_part(file, random, size, crop):
    return read_image(file, size, crop, random)
