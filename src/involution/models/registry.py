"""The models that commands and files refer to by name."""

from collections.abc import Callable

from involution.models import classifiers, lsnet, rednet

# Functions of (input_shape, classes, ...).
MODELS: dict[str, Callable] = {
    "cnn": classifiers.cnn,
    "inn": classifiers.inn,
    "rednet_tiny": rednet.rednet_tiny,
    "rednet26": rednet.RedNet26,
    "rednet38": rednet.RedNet38,
    "rednet50": rednet.RedNet50,
    "rednet101": rednet.RedNet101,
    "rednet152": rednet.RedNet152,
    "lsnet_t": lsnet.LSNetT,
    "lsnet_s": lsnet.LSNetS,
    "lsnet_b": lsnet.LSNetB,
}
