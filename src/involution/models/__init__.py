"""Involutional networks, and convolutional networks to compare them with."""

from involution import renamed
from involution.models.classifiers import cnn, inn
from involution.models.conv_counterpart import conv_counterpart
from involution.models.flops import count_multiply_adds
from involution.models.folding import fold
from involution.models.lsnet import LSNetB, LSNetS, LSNetT
from involution.models.pretrained import load
from involution.models.rednet import RedNet26, RedNet38, RedNet50, RedNet101, RedNet152, rednet_tiny
from involution.models.registry import MODELS

__all__ = [
    "MODELS",
    "LSNetB",
    "LSNetS",
    "LSNetT",
    "RedNet26",
    "RedNet38",
    "RedNet50",
    "RedNet101",
    "RedNet152",
    "cnn",
    "conv_counterpart",
    "count_multiply_adds",
    "fold",
    "inn",
    "load",
    "rednet_tiny",
]

__getattr__ = renamed.attributes(__name__, {"twin": "conv_counterpart"})
