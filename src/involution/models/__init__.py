"""Models made of involutions, and the convolutional ones they are compared with."""

from involution.models.classifiers import cnn, inn
from involution.models.conv_counterpart import twin
from involution.models.flops import count_multiply_adds
from involution.models.pretrained import load
from involution.models.rednet import RedNet26, RedNet38, RedNet50, RedNet101, RedNet152, rednet_tiny
from involution.models.registry import MODELS

__all__ = [
    "MODELS",
    "RedNet26",
    "RedNet38",
    "RedNet50",
    "RedNet101",
    "RedNet152",
    "cnn",
    "count_multiply_adds",
    "inn",
    "load",
    "rednet_tiny",
    "twin",
]
