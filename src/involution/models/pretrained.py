"""Pretrained models in the package: one folder for each, in the format of ``weights``, with a model
card."""

import pathlib

import keras

ROOT = pathlib.Path(__file__).with_name("trained")


def available() -> list[str]:
    """Names of the pretrained models."""
    return sorted(folder.name for folder in ROOT.iterdir() if folder.is_dir())


def path(name) -> pathlib.Path:
    """The folder of a pretrained model.

    Raises:
        ValueError: There is no model of this name.
    """
    if name not in available():
        raise ValueError(
            f"A pretrained model must be one of {', '.join(available())}. Received: {name!r}"
        )
    return ROOT / name


def load(name) -> keras.Model:
    """Loads a pretrained model of the package.

    Its model card, in the folder ``involution/models/trained``, documents data, recipe, command and
    metrics.

    Args:
        name: ``"cnn-cifar10"`` or ``"inn-cifar10"``, the pair of the keras.io example, or
            ``"rednet_tiny-cifar10"``: models for images (B, 32, 32, 3), pixels / 255, trained on
            CIFAR-10 (as JPEG).

    Returns:
        A ``keras.Model`` from images to logits (B, 10), not compiled.

    Raises:
        ValueError: There is no model of this name.

    Example:

    >>> import involution
    >>> involution.models.load("inn-cifar10").count_params()
    13080
    """
    from involution.models import weights  # deferred: its readers would slow down every import

    return weights.load(path(name))
