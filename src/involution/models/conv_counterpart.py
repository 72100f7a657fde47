"""The convolutional twin of a network with involutions: what it is fairly compared with."""

import keras

from involution.layers import involutions
from involution.layers.involution_nd import Involution1D, Involution2D, Involution3D, InvolutionND
from involution.ops.validation import SAME, SYMMETRIC, VALID

KINDS = ("convolution", "depthwise")
PADDINGS = {SAME: "same", SYMMETRIC: "same", VALID: "valid"}


def twin(model, kind="convolution"):
    """The same network with convolutions in the place of ``Involution1D``, ``2D`` and ``3D``.

    Each has the window, strides, dilation, channels, ``trainable`` and output regularizer of the
    involution that it replaces, and no bias. Weights are new. A convolution has more parameters
    than an involution: for a twin of equal size, give it a narrower model.

    Args:
        model: A functional or Sequential ``keras.Model``; such models within it get twins, too.
        kind: ``"convolution"``; or ``"depthwise"``, in one or two dimensions.

    Returns:
        A ``keras.Model``.

    Raises:
        ValueError: An involution returns its kernel, pads as no Keras convolution does, has a
            ``call`` of a subclass, or is within another layer; or has no depthwise twin.

    Example:

    >>> import involution
    >>> network = involution.models.rednet_tiny((32, 32, 3))
    >>> type(involution.models.twin(network).get_layer("stage1_block1_2_involution")).__name__
    'Conv2D'
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)}. Received: kind={kind!r}")

    def clone(layer):
        if isinstance(layer, (Involution1D, Involution2D, Involution3D)):
            return _convolution(layer, kind)
        return type(layer).from_config(layer.get_config())

    made = keras.models.clone_model(model, clone_function=clone, recursive=True)
    kept = involutions(made)
    if kept:
        raise ValueError(
            "A model with a twin must have its involutions as layers, or as layers of models "
            f"within it. Received: {kept[0].name}, within another layer"
        )
    return made


def _convolution(layer, kind):
    if type(layer).call is not InvolutionND.call:
        raise ValueError(
            "An involution with a twin must have the `call` of this package's layers. "
            f"Received: {layer.name}, a {type(layer).__name__} with its own"
        )
    even = any(k % 2 == 0 for k in layer.kernel_size)
    if layer.return_kernel or layer.padding not in PADDINGS or (even and layer.padding != VALID):
        raise ValueError(
            "An involution with a twin must return no kernel, and pad by 'same', 'valid' or "
            "'symmetric', with odd windows unless 'valid'. Received: "
            f"{layer.name}, return_kernel={layer.return_kernel}, padding={layer.padding!r}, "
            f"kernel_size={layer.kernel_size}"
        )
    rank = len(layer.kernel_size)
    arguments = {
        "kernel_size": layer.kernel_size,
        "strides": layer.strides,
        "padding": PADDINGS[layer.padding],
        "dilation_rate": layer.dilation_rate,
        "data_format": layer.data_format,
        "use_bias": False,
        "activity_regularizer": layer.activity_regularizer,
        "trainable": layer.trainable,
        "dtype": layer.dtype_policy,
        "name": layer.name,
    }
    if kind == "depthwise":
        if rank == 3 or layer.filters is not None:
            raise ValueError(
                "Keras has depthwise convolutions in one and two dimensions alone, and to no other "
                f"channels. Received: {layer.name}, filters={layer.filters}"
            )
        make = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)[rank - 1]
        return make(**arguments)
    make = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)[rank - 1]
    axis = -1 if layer.data_format == "channels_last" else 1
    filters = layer.filters or layer.input.shape[axis]
    return make(filters, kernel_initializer="he_normal", **arguments)
