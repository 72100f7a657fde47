"""What the networks for images share: their input, their feature maps, their normalization."""

import keras
from keras import layers

from involution.kernel_generators.convolutional import EPSILON
from involution.ops.validation import CHANNELS_FIRST, CHANNELS_LAST, standardize_data_format


def image_input(input_shape, data_format):
    """The input of a network, and the same with the channels last.

    Args:
        input_shape: With None for variable sizes; None: three channels of any size.
        data_format: Of the input.

    Raises:
        ValueError: An argument is out of its range.
    """
    data_format = standardize_data_format("data_format", data_format)
    if input_shape is None:
        input_shape = (None, None, 3) if data_format == CHANNELS_LAST else (3, None, None)
    sizes = tuple(input_shape)
    channels = 2 if data_format == CHANNELS_LAST else 0
    if len(sizes) != 3 or not all(
        (n is None and i != channels) or (isinstance(n, int) and n >= 1)
        for i, n in enumerate(sizes)
    ):
        raise ValueError(
            "`input_shape` must be (height, width, channels), or (channels, height, width) for "
            "channels_first, with None for variable sizes. "
            f"Received: input_shape={input_shape!r}"
        )
    inputs = keras.Input(shape=input_shape)
    # Channels last internally: TensorFlow has no other convolution on CPUs.
    if data_format == CHANNELS_FIRST:
        return inputs, layers.Permute((2, 3, 1), name="channels_last")(inputs)
    return inputs, inputs


def feature_outputs(maps, data_format) -> dict:
    """Feature maps, by stage, in the format of the input."""
    if standardize_data_format("data_format", data_format) == CHANNELS_LAST:
        return maps
    return {
        stage: layers.Permute((3, 1, 2), name=f"{stage}_channels_first")(map_)
        for stage, map_ in maps.items()
    }


def batch_normalization(name, **arguments):
    """Batch normalization with the momentum and epsilon of the paper's code, and of LSNet's."""
    return layers.BatchNormalization(momentum=0.9, epsilon=EPSILON, name=name, **arguments)


def check_classes(classes):
    """ValueError unless this is a positive integer."""
    if not isinstance(classes, int) or classes < 1:
        raise ValueError(f"`classes` must be a positive integer. Received: classes={classes!r}")


def check_flags(**flags):
    """ValueError unless all are booleans."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"`{name}` must be True or False. Received: {name}={value!r}")
