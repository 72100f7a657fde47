"""The two classifiers of the keras.io example: a small convolutional network and its involutional
counterpart.

Layers without a name in the example have the names that Keras gives them in a new process, so that
the summaries match, and equal models have equal weight paths. A stage is the layer, a ReLU and,
except in the last stage, 2x2 max pooling.
"""

from collections.abc import Sequence
from typing import Any, cast

import keras
from keras import layers

from involution.kernel_generators.attachment import clone
from involution.layers.involution_nd import Involution2D
from involution.layers.keras_io import Involution
from involution.ops.validation import CHANNELS_LAST, standardize_tuple

HEADS = ("dense", "convolutional")
# The head of the example's visualization model: no logits, the kernels of the involutions.
KERNELS = "kernels"


def cnn(
    input_shape: Sequence[int | None] = (32, 32, 3),
    classes: int = 10,
    head: str = "dense",
    filters: Sequence[int] = (32, 64, 64),
    hidden: int = 64,
) -> keras.Model:
    """The convolutional network: three 3x3 convolutions with pooling between them.

    Args:
        input_shape: (height, width, channels); sizes may be None with the convolutional head.
        classes: Number of classes.
        head: ``"dense"``: flatten, a hidden layer, the logits, as in the example;
            ``"convolutional"``: the hidden layer as a 1x1 convolution, global average pooling, the
            logits, for any image size.
        filters: Filters of the three convolutions.
        hidden: Units of the hidden layer.

    Returns:
        A functional ``keras.Model`` named ``conv_model``, from images to logits (B, classes). It
        has 319,178 parameters at 32x32x3.

    Raises:
        ValueError: An argument is out of its range.

    Example:

    >>> import involution
    >>> involution.models.cnn().count_params()
    319178
    """
    _check(input_shape, classes, head, HEADS)
    standardize_tuple("hidden", hidden, 1)
    inputs = keras.Input(shape=input_shape)
    x = inputs
    for stage, width in enumerate(standardize_tuple("filters", filters, 3), start=1):
        x = layers.Conv2D(
            width,
            (3, 3),
            padding="same",
            data_format=CHANNELS_LAST,
            name=_automatic_name("conv2d", stage),
        )(x)
        x = layers.ReLU(name=f"relu{stage}")(x)
        x = _max_pool(x, stage)
    outputs = _head(x, classes, head, hidden, _automatic_name("conv2d", 4))
    return keras.Model(inputs, outputs, name="conv_model")


def inn(
    input_shape: Sequence[int | None] = (32, 32, 3),
    classes: int = 10,
    kernel_size: int | Sequence[int] = 3,
    group_number: int = 1,
    reduction_ratio: int = 2,
    kernel_generator: Any = None,
    head: str = "dense",
) -> keras.Model:
    """The involutional network: three involutions, with as many channels as the image.

    Args:
        input_shape: (height, width, channels); sizes may be None unless the head is dense.
        classes: Number of classes.
        kernel_size: Kernel size; with ``kernel_generator`` None, an integer.
        group_number: Number of groups; divides the channels.
        reduction_ratio: Input channels per hidden channel of the kernel generators.
        kernel_generator: None for the example's layer, ``Involution``. For ``Involution2D``: the
            name of a generator, or a Keras layer, which is copied for each stage.
        head: As for ``cnn``; or ``"kernels"``: the outputs are the kernels of the three
            involutions, as a list, like the example's visualization model.

    Returns:
        A functional ``keras.Model`` named ``inv_model``, from images to logits (B, classes), with
        the involutions ``inv_1`` to ``inv_3``. It has 13,074 trainable and 6 other parameters at
        32x32x3.

    Raises:
        ValueError: An argument is out of its range.

    Example:

    >>> import involution
    >>> involution.models.inn().count_params()
    13080
    """
    _check(input_shape, classes, head, (*HEADS, KERNELS))

    def involution(name):
        if kernel_generator is None:
            side = cast(int, kernel_size)
            return Involution(input_shape[-1], group_number, side, 1, reduction_ratio, name=name)
        return Involution2D(
            kernel_size,
            groups=group_number,
            reduction_ratio=reduction_ratio,
            kernel_generator=clone(kernel_generator),
            return_kernel=True,
            group_layout="interleaved",
            data_format=CHANNELS_LAST,
            name=name,
        )

    inputs = keras.Input(shape=input_shape)
    x = inputs
    kernels = []
    for stage in (1, 2, 3):
        x, kernel = involution(f"inv_{stage}")(x)
        kernels.append(kernel)
        x = layers.ReLU(name=_automatic_name("re_lu", stage))(x)
        x = _max_pool(x, stage)
    outputs = kernels if head == KERNELS else _head(x, classes, head)
    return keras.Model(inputs=inputs, outputs=outputs, name="inv_model")


def _check(input_shape, classes, head, heads):
    if head not in heads:
        raise ValueError(f"`head` must be one of {', '.join(heads)}. Received: head={head!r}")
    sizes, any_size = tuple(input_shape), head != "dense"
    if len(sizes) != 3 or not all(
        (n is None and any_size and i < 2) or (isinstance(n, int) and n >= (1 if i == 2 else 4))
        for i, n in enumerate(sizes)
    ):
        raise ValueError(
            "`input_shape` must be (height, width, channels) with sizes of at least 4, or None "
            f"unless the head is dense. Received: input_shape={input_shape!r}, head={head!r}"
        )
    if not isinstance(classes, int) or classes < 2:
        raise ValueError(
            f"`classes` must be an integer of at least 2. Received: classes={classes!r}"
        )


def _automatic_name(name, number) -> str:
    """The name that Keras gives to the first, second, ... layer of a class in a process."""
    return name if number == 1 else f"{name}_{number - 1}"


def _max_pool(x, stage):
    if stage == 3:
        return x
    name = _automatic_name("max_pooling2d", stage)
    return layers.MaxPooling2D((2, 2), data_format=CHANNELS_LAST, name=name)(x)


def _head(x, classes, head, hidden=64, convolution="conv2d"):
    if head == "dense":
        x = layers.Flatten(data_format=CHANNELS_LAST, name="flatten")(x)
        x = layers.Dense(hidden, activation="relu", name="dense")(x)
        return layers.Dense(classes, name="dense_1")(x)
    x = layers.Conv2D(hidden, 1, activation="relu", data_format=CHANNELS_LAST, name=convolution)(x)
    name = "global_average_pooling2d"
    x = layers.GlobalAveragePooling2D(data_format=CHANNELS_LAST, name=name)(x)
    return layers.Dense(classes, name="dense")(x)
