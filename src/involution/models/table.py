"""The models that commands and files know by name."""

from collections.abc import Callable

from involution.models.classifiers import cnn, inn
from involution.models.rednet import (
    RedNet26,
    RedNet38,
    RedNet50,
    RedNet101,
    RedNet152,
    rednet_tiny,
)

# Functions of (input_shape, classes, ...).
MODELS: dict[str, Callable] = {
    "cnn": cnn,
    "inn": inn,
    "rednet_tiny": rednet_tiny,
    "rednet26": RedNet26,
    "rednet38": RedNet38,
    "rednet50": RedNet50,
    "rednet101": RedNet101,
    "rednet152": RedNet152,
}
