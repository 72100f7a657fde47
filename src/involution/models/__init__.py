"""Models made of involutions, and the convolutional ones they are compared with."""

from involution.models.classifiers import cnn, inn

__all__ = ["cnn", "inn"]
