"""Models made of involutions, and the convolutional ones they are compared with."""

from involution.models.classifiers import cnn, inn

# The classifiers that commands know by name: functions of (input_shape, classes, ...).
CLASSIFIERS = {"cnn": cnn, "inn": inn}

__all__ = ["CLASSIFIERS", "cnn", "inn"]
