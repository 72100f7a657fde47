"""Names that Keras generates for layers: the class name in snake case, then a number."""

import re


def base_name(name) -> str:
    """A layer's name without the number by which Keras makes it unique.

    >>> from involution.utils.layer_names import base_name
    >>> base_name("conv2d"), base_name("conv2d_12")
    ('conv2d', 'conv2d')
    """
    return re.sub(r"_\d+$", "", name)


def has_automatic_name(layer) -> bool:
    """Whether Keras generated a layer's name, or the user chose such a name.

    >>> import keras
    >>> from involution.utils.layer_names import has_automatic_name
    >>> has_automatic_name(keras.layers.ReLU()), has_automatic_name(keras.layers.ReLU(name="act"))
    (True, False)
    """
    # Snake case adds underscores before capitals; a class name may contain others.
    class_name = type(layer).__name__.replace("_", "").lower()
    return base_name(layer.name).replace("_", "") == class_name
