"""A trained classifier in one file: a ``.keras`` archive that also carries what its images need.

The archive holds one more entry, ``involution.json``, with the names of the classes and the size of
the images, so that ``predict`` and ``explain`` feed a model exactly what it was trained on.
"""

import contextlib
import dataclasses
import json
import pathlib
import re
import zipfile

import keras
import numpy as np

from involution.data import datasets
from involution.models import pretrained, weights
from involution.saving import keras_archive
from involution.saving.keras_archive import ENTRY
from involution.utils.abstract_build import outline
from involution.utils.atomic_files import replacing
from involution.utils.errors import InputError

SCALING = "pixels / 255"
# An image that a model takes: some 50 MB as the model gets it.
MOST_PIXELS = 2**22
# What classifies where no model is named.
DEFAULT = "rednet_tiny-cifar10"


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A model with the names of its classes and the (height, width, channels) of its images; and
    the share of an image's middle that it sees, see ``data.read_image``."""

    model: keras.Model
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    crop: float | None = None

    @property
    def about(self) -> dict:
        """What stands beside the weights."""
        return {
            "class_names": self.class_names,
            "image_shape": self.image_shape,
            "scaling": SCALING,
            **({} if self.crop is None else {"crop": self.crop}),
        }

    def read(self, file) -> np.ndarray:
        """An image file as the model takes it: float32 (1, height, width, channels)."""
        return datasets.scale(datasets.read_image(file, self.image_shape[:2], self.crop)[None])

    def scores(self, images) -> np.ndarray:
        """Probabilities (N, classes) for images as ``read`` gives them.

        Raises:
            InputError: Keras's floatx is not float32, see ``data.check_floatx``.
        """
        datasets.check_floatx()
        return probabilities(self.model.predict(images, verbose=0))

    def save(self, path):
        """Writes the file, without the optimizer's state: it loads on every backend."""
        with replacing(path) as temporary:
            self.model.save(temporary)
            with zipfile.ZipFile(temporary, "a") as archive:
                archive.writestr(ENTRY, json.dumps(self.about))


def probabilities(logits) -> np.ndarray:
    """Softmax of logits (N, classes), in float64."""
    logits = logits.astype("float64")
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def load(path) -> Classifier:
    """A classifier: from a file that ``Classifier.save`` wrote, from a folder that
    ``models.weights.save`` wrote with the same entries, or one of ``models.shipped.names()``.
    No code from a file runs.

    Raises:
        InputError: It is none of these.
    """
    path = pathlib.Path(path)
    if not path.exists() and str(path) in pretrained.names():
        path = pretrained.folder(str(path))
    if not path.exists():
        raise InputError(
            f"A model must be a .keras file, a folder, or one of {', '.join(pretrained.names())}. "
            f"Received: {path}, which does not exist"
        )
    try:
        about = _about(path)
        class_names = tuple(str(name) for name in about["class_names"])
        height, width, channels = (int(n) for n in about["image_shape"])
        if min(height, width) < 1 or height * width > MOST_PIXELS or channels != 3:
            raise ValueError(about["image_shape"])
        if about["scaling"] != SCALING:
            raise ValueError(about["scaling"])
        crop = None if about.get("crop") is None else float(about["crop"])
        if crop is not None and not 0 < crop <= 1:
            raise ValueError(crop)
    except Exception as error:  # a damaged archive breaks its reader in many ways
        raise InputError(
            "A model must be a .keras file or a folder with its classes and image size, written "
            "by `involution compare` or `train`, or one of "
            f"{', '.join(pretrained.names())}. Received: {path}"
        ) from error
    model = load_model(path)
    _check_suits(model, path, (height, width, channels), len(class_names))
    return Classifier(model, class_names, (height, width, channels), crop)


def _check_suits(model, path, image_shape, classes):
    # A model of a user's own class may know no shapes.
    takes = getattr(model, "input_shape", (None,) * 4)
    gives = getattr(model, "output_shape", (None, classes))
    suits = isinstance(takes, tuple) and len(takes) == 4
    if not suits or any(n not in (None, m) for n, m in zip(takes[1:], image_shape, strict=True)):
        raise InputError(
            f"A model must take the images that are said to be its own, {image_shape}. "
            f"Received: {path}, which takes {str(takes)[:200]}"
        )
    if gives != (None, classes):
        raise InputError(
            f"A model must give one number for each of its {classes} classes. "
            f"Received: {path}, which gives {str(gives)[:200]}"
        )


def _about(path) -> dict:
    if path.is_dir():
        return weights.read_config(path)["extra"]
    with zipfile.ZipFile(path) as archive:
        return json.loads(keras_archive.member(archive, ENTRY))


def is_model(path) -> bool:
    """Whether a name on a command line is a model's, and not an image's."""
    path = pathlib.Path(path)
    return path.suffix == ".keras" or path.is_dir() or str(path) in pretrained.names()


def load_model(path) -> keras.Model:
    """Reads any model: a ``.keras`` file, or a folder that ``models.weights.save`` wrote.

    Raises:
        InputError: It is neither.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return weights.load(path)
    if not path.is_file():
        raise InputError(
            "A model must be a .keras file, or a folder written by `involution convert`. "
            f"Received: {path}, which does not exist"
        )
    return _load_keras(path)


def load_weights(model, path):
    """Sets a model's weights from a ``.keras`` file of the same model.

    Raises:
        InputError: It is none.
    """
    with _told(path):
        keras_archive.check(path)
        model.load_weights(path)


def _load_keras(path) -> keras.Model:
    with _told(path):
        registered, stored = keras_archive.check(path)

        def read():
            return keras.saving.load_model(path, custom_objects=registered, compile=False)

        # Keras compares the shapes of all variables with the weights, before there is memory for
        # them.
        outline(read, stored)
        return read()


def _plain(error) -> str:
    """Without the escape sequences by which Keras sets parts of its messages in bold."""
    return re.sub("\x1b\\[\\d*m", "", str(error))


@contextlib.contextmanager
def _told(path):
    try:
        yield
    except Exception as error:  # Keras raises many kinds for a file that it cannot load
        raise InputError(
            "A model must be a .keras file, and load without code of its own: one with a user's "
            "own layers is for keras.saving.load_model(file, custom_objects=...). "
            f"Received: {path}: {' '.join(_plain(error).split())[:1000]}"
        ) from error
