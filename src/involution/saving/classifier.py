"""A trained classifier in one file: a ``.keras`` archive with metadata for its preprocessing.

The archive's additional member ``involution.json`` has the class names and the image shape, so that
inference preprocesses images as training did.
"""

import dataclasses
import json
import os
import pathlib
import zipfile
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from involution.data import decode, transforms
from involution.models import pretrained, weights
from involution.models.outputs import LOGITS, OUTPUTS
from involution.saving import keras_archive
from involution.saving.keras_archive import METADATA_ENTRY
from involution.utils.abstract_build import build_abstract
from involution.utils.atomic_files import atomic_write
from involution.utils.errors import InputError, convert_exceptions

SCALING = "pixels / 255"
# Maximum size of an input image: 50 MB in float32.
MAX_PIXELS = 2**22
# Default model of `involution predict` and `explain`.
DEFAULT = "rednet_tiny-cifar10"


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A model with its preprocessing.

    Attributes:
        model: From images (B, height, width, channels) to outputs (B, classes).
        class_names: One name for each class.
        image_shape: (height, width, channels).
        crop_fraction: The center crop of its images, see ``decode.read_image``; None: no crop.
        outputs: What the model returns, ``"logits"`` or ``"probabilities"``.
    """

    model: keras.Model
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    crop_fraction: float | None = None
    outputs: str = LOGITS

    @property
    def metadata(self) -> dict:
        """The JSON object saved with the weights."""
        return {
            "class_names": self.class_names,
            "image_shape": self.image_shape,
            "scaling": SCALING,
            "outputs": self.outputs,
            **({} if self.crop_fraction is None else {"crop": self.crop_fraction}),
        }

    def read(self, file) -> np.ndarray:
        """An image file as a batch for the model: float32 (1, height, width, channels)."""
        image = decode.read_image(file, self.image_shape[:2], self.crop_fraction)
        return transforms.to_unit_float(image[None])

    def predict_proba(self, images) -> np.ndarray:
        """Class probabilities (N, classes), float64, of images as returned by ``read``.

        Raises:
            InputError: Keras's floatx is not float32, see ``transforms.check_floatx``.
        """
        transforms.check_floatx()
        return self.probabilities(self.model.predict(images, verbose=0))

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """Class probabilities (N, classes), float64, of outputs of the model: their softmax if they
        are logits, otherwise unchanged."""
        outputs = outputs.astype("float64")
        if self.outputs != LOGITS:
            return outputs
        exp = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
        return exp / exp.sum(axis=-1, keepdims=True)

    def classify(self, files, batch_size=32) -> Iterator[tuple[Any, np.ndarray | InputError]]:
        """Yields each file with its class probabilities (classes,), or the reason why it cannot be
        read."""
        files = list(files)
        for start in range(0, len(files), batch_size):
            batch = files[start : start + batch_size]
            images = [self._try_to_read(file) for file in batch]
            readable = [image for image in images if not isinstance(image, InputError)]
            scores = iter(self.predict_proba(np.concatenate(readable)) if readable else ())
            for file, image in zip(batch, images, strict=True):
                yield file, image if isinstance(image, InputError) else next(scores)

    def _try_to_read(self, file) -> np.ndarray | InputError:
        try:
            return self.read(file)
        except InputError as error:
            return error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file without optimizer state, so that it loads on every backend.

        Raises:
            InputError: The name does not end in ``.keras``.
        """
        if not str(path).endswith(".keras"):
            raise InputError(f"A model's file must have the suffix .keras. Received: {path}")
        with atomic_write(path) as temporary:
            self.model.save(temporary)
            with zipfile.ZipFile(temporary, "a") as archive:
                archive.writestr(METADATA_ENTRY, json.dumps(self.metadata))


def load(path) -> Classifier:
    """Loads a classifier. No code from the file is executed.

    Args:
        path: A file written by ``Classifier.save``; a folder written by ``models.weights.save``
            with the same metadata; or one of ``models.pretrained.available()``.

    Raises:
        InputError: It is none of these.
    """
    path = resolve(path)
    arguments = _arguments(path)
    model = load_model(path)
    _check_shapes(model, path, arguments["image_shape"], len(arguments["class_names"]))
    return Classifier(model, **arguments)


def resolve(name) -> pathlib.Path:
    """The file or folder of a model: that of the pretrained one if there is no such path."""
    path = pathlib.Path(name)
    if not path.exists() and str(path) in pretrained.available():
        return pretrained.path(str(path))
    return path


def image_shape(path) -> tuple[int, int, int]:
    """(height, width, channels) of the images of a classifier, without loading it.

    Raises:
        InputError: As for ``load``.
    """
    return _arguments(resolve(path))["image_shape"]


def _arguments(path) -> dict[str, Any]:
    """The attributes of the ``Classifier``, without the model."""
    reason = None if path.exists() else "which does not exist"
    if path.is_dir() and not (path / weights.WEIGHTS).is_file():
        reason = f"a folder without {weights.WEIGHTS}"  # such as a run's, whose models are files
    if reason is not None:
        raise InputError(
            f"A model must be a .keras file, a folder with {weights.CONFIG} and {weights.WEIGHTS}, "
            f"or one of {', '.join(pretrained.available())}. Received: {path}, {reason}"
        )
    rule = (
        "A model must be a .keras file or a folder with class names and an image shape, written by "
        f"`involution compare` or `train`, or one of {', '.join(pretrained.available())}."
    )
    with convert_exceptions(InputError, rule, path):  # damaged archives raise many types
        metadata = _metadata(path)
        class_names = tuple(str(name) for name in metadata["class_names"])
        height, width, channels = (int(n) for n in metadata["image_shape"])
        if min(height, width) < 1 or height * width > MAX_PIXELS or channels != 3:
            raise ValueError(f"image_shape {metadata['image_shape']}")
        if metadata["scaling"] != SCALING:
            raise ValueError(f"scaling {metadata['scaling']!r}")
        crop_fraction = None if metadata.get("crop") is None else float(metadata["crop"])
        if crop_fraction is not None and not 0 < crop_fraction <= 1:
            raise ValueError(f"crop {crop_fraction}")
        # Without it in files of early releases, which trained every model as one of logits.
        outputs = metadata.get("outputs", LOGITS)
        if outputs not in OUTPUTS:
            raise ValueError(f"outputs {outputs!r}")
    return {
        "class_names": class_names,
        "image_shape": (height, width, channels),
        "crop_fraction": crop_fraction,
        "outputs": outputs,
    }


def load_any(path) -> Classifier | keras.Model:
    """A classifier, as from ``load``, if the file has class names; otherwise the model, as from
    ``load_model``.

    Raises:
        InputError: It is neither.
    """
    path = pathlib.Path(path)
    if not path.exists() or _has_class_names(path):
        return load(path)
    return load_model(path)


def _has_class_names(path) -> bool:
    try:
        return "class_names" in _metadata(path)
    except Exception:  # noqa: BLE001 - without metadata or damaged, which ``load_model`` reports
        return False


def _check_shapes(model, path, image_shape, classes):
    # Subclassed models may have no symbolic shapes.
    input_shape = getattr(model, "input_shape", (None,) * 4)
    output_shape = getattr(model, "output_shape", (None, classes))
    is_image = isinstance(input_shape, tuple) and len(input_shape) == 4
    if not is_image or any(
        n not in (None, m) for n, m in zip(input_shape[1:], image_shape, strict=True)
    ):
        raise InputError(
            f"A model's input shape must match its metadata, {(None, *image_shape)}. "
            f"Received: {path}, with input shape {str(input_shape)[:200]}"
        )
    if output_shape != (None, classes):
        raise InputError(
            f"A model's output shape must match its {classes} classes, {(None, classes)}. "
            f"Received: {path}, with output shape {str(output_shape)[:200]}"
        )


def _metadata(path) -> dict:
    if path.is_dir():
        return weights.read_config(path)["extra"]
    with zipfile.ZipFile(path) as archive:
        return json.loads(keras_archive.member(archive, METADATA_ENTRY))


def is_model(path) -> bool:
    """Whether a command-line argument names a model rather than an image or a folder of images."""
    path = resolve(path)
    return path.suffix == ".keras" or (path / weights.CONFIG).is_file()


def load_model(path) -> keras.Model:
    """Loads any model: a ``.keras`` file, or a folder written by ``models.weights.save``.

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


def load_weights(model: keras.Model, path: str | os.PathLike[str]) -> None:
    """Sets a model's weights from a ``.keras`` file of the same architecture, of any layers.

    Raises:
        InputError: The file is invalid, or its architecture differs.
    """
    with convert_exceptions(InputError, "A file of weights must be the model's.", path, limit=1000):
        keras_archive.check_weights(path)
        model.load_weights(path)


def _load_keras(path) -> keras.Model:
    with _as_input_error(path):
        registered, stored = keras_archive.check(path)

        def read():
            return keras.saving.load_model(path, custom_objects=registered, compile=False)

        # Keras compares all shapes with the weights here, before memory is allocated.
        build_abstract(read, stored)
        return read()


def _as_input_error(path):
    # Keras raises many exception types for invalid files, with long messages.
    rule = (
        "A model must be a valid .keras file of Keras's and registered layers (for custom layers "
        "use keras.saving.load_model(file, custom_objects=...))."
    )
    return convert_exceptions(InputError, rule, path, limit=1000)
