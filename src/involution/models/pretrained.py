"""Trained models that come with the package: a folder each beside this file, as ``weights`` reads
it, with a card that says what it was trained on, how, and what it reaches."""

import pathlib

import keras

FOLDERS = pathlib.Path(__file__).with_name("trained")


def names() -> list[str]:
    """Names of the models that there are."""
    return sorted(folder.name for folder in FOLDERS.iterdir() if folder.is_dir())


def folder(name) -> pathlib.Path:
    """Where the files of a model are, or ValueError."""
    if name not in names():
        raise ValueError(f"A shipped model must be one of {', '.join(names())}. Received: {name!r}")
    return FOLDERS / name


def load(name) -> keras.Model:
    """A trained model that comes with the package.

    The folder ``involution/models/trained`` has a card for each: data, recipe, command, figures.

    Args:
        name: ``"cnn-cifar10"`` or ``"inn-cifar10"``, the keras.io example's pair, or
            ``"rednet_tiny-cifar10"``: models for images (B, 32, 32, 3) of pixels / 255, trained on
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
    from involution.models import weights  # whose readers not every import shall wait for

    return weights.load(folder(name))
