"""Models made of involutions, and the convolutional ones they are compared with."""

from collections.abc import Callable

from involution.models.classifiers import cnn, inn

# The classifiers that commands know by name: functions of (input_shape, classes, ...).
CLASSIFIERS: dict[str, Callable] = {"cnn": cnn, "inn": inn}

__all__ = ["CLASSIFIERS", "cnn", "inn"]
