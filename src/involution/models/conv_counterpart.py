"""The convolutional counterpart of an involutional network, as its baseline."""

import keras

from involution.layers import involutions
from involution.layers.involution_nd import Involution1D, Involution2D, Involution3D, InvolutionND
from involution.ops.validation import SAME, SYMMETRIC, VALID

CONV_KINDS = ("convolution", "depthwise")
PADDINGS = {SAME: "same", SYMMETRIC: "same", VALID: "valid"}


def conv_counterpart(model: keras.Model, kind: str = "convolution") -> keras.Model:
    """A copy of a network with convolutions instead of ``Involution1D``, ``2D`` and ``3D``.

    A convolution has the kernel size, strides, dilation rate, filters, ``trainable`` and activity
    regularizer of the involution that it replaces, and no bias. All weights are new. A convolution
    has more parameters than an involution: for models of equal size, pass a narrower model.

    Args:
        model: A functional or Sequential ``keras.Model``; nested models are converted too.
        kind: ``"convolution"``; or ``"depthwise"``, in one or two dimensions.

    Returns:
        A ``keras.Model``.

    Raises:
        ValueError: An involution returns its kernel, has a padding that no Keras convolution has,
            overrides ``call``, is inside another layer, or has no depthwise counterpart.

    Example:

    >>> import involution
    >>> network = involution.models.rednet_tiny((32, 32, 3))
    >>> counterpart = involution.models.conv_counterpart(network)
    >>> type(counterpart.get_layer("stage1_block1_2_involution")).__name__
    'Conv2D'
    """
    if kind not in CONV_KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(CONV_KINDS)}. Received: kind={kind!r}")

    def clone(layer):
        if isinstance(layer, (Involution1D, Involution2D, Involution3D)):
            return _convolution(layer, kind)
        return type(layer).from_config(layer.get_config())

    def call(layer, *args, mask=None, **kwargs):
        # Convolutions, unlike involutions, have no argument `mask`.
        return layer(*args, **kwargs) if mask is None else layer(*args, mask=mask, **kwargs)

    # Keras supports no call_function for a Sequential model, which passes no arguments.
    options = {} if isinstance(model, keras.Sequential) else {"call_function": call}
    counterpart = keras.models.clone_model(model, clone_function=clone, recursive=True, **options)
    remaining = involutions(counterpart)
    if remaining:
        raise ValueError(
            "`model` must have its involutions as layers, or as layers of nested models. "
            f"Received: {remaining[0].name}, inside another layer"
        )
    return counterpart


def _convolution(layer, kind):
    if type(layer).call is not InvolutionND.call:
        raise ValueError(
            "An involution to convert must have the `call` of this package's layers. "
            f"Received: {layer.name}, a {type(layer).__name__} that overrides it"
        )
    even = any(k % 2 == 0 for k in layer.kernel_size)
    if layer.return_kernel or layer.padding not in PADDINGS or (even and layer.padding != VALID):
        raise ValueError(
            "An involution to convert must have return_kernel=False, `padding` 'same', 'valid' or "
            "'symmetric', and an odd `kernel_size` unless 'valid'. Received: "
            f"{layer.name}, return_kernel={layer.return_kernel}, padding={layer.padding!r}, "
            f"kernel_size={layer.kernel_size}"
        )
    rank = len(layer.kernel_size)
    arguments = layer.window.arguments()
    del arguments["groups"], arguments["group_layout"], arguments["upsampling"]
    arguments |= {
        "padding": PADDINGS[layer.padding],
        "use_bias": False,
        "activity_regularizer": layer.activity_regularizer,
        "trainable": layer.trainable,
        "dtype": layer.dtype_policy,
        "name": layer.name,
    }
    if kind == "depthwise":
        if rank == 3 or layer.filters is not None:
            raise ValueError(
                "A depthwise counterpart must have one or two dimensions, and no `filters`. "
                f"Received: {layer.name}, filters={layer.filters}"
            )
        conv_class = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)[rank - 1]
        return conv_class(**arguments)
    conv_class = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)[rank - 1]
    axis = -1 if layer.data_format == "channels_last" else 1
    filters = layer.filters or layer.input.shape[axis]
    return conv_class(filters, kernel_initializer="he_normal", **arguments)
