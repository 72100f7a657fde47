"""How much a network computes for one input."""

import math

import keras

from involution.layers import Involution, InvolutionND
from involution.ops.geometry import CHANNELS_FIRST

# Of these every entry of the kernel is used once at every position of the output.
WEIGHTED = (
    keras.layers.Dense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)
# A few operations for each number that passes: not counted.
LIGHT = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.Normalization,
    keras.layers.PReLU,
)
TRANSPOSED = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)


def count_multiply_adds(model, input_shape=None, involutions=True) -> int:
    """Multiply-adds of one forward pass over one input: what papers on image models call FLOPs.

    Counted are those of convolutions, dense layers and involutions, and of the kernel generators'
    own convolutions. Biases, normalization, activations, pooling and sums are not, as is usual.
    An operation count is twice as large.

    Args:
        model: A functional ``keras.Model`` or ``keras.Sequential`` with one input.
        input_shape: (height, width, channels) of the input, needed where the model leaves a size
            open.
        involutions: Whether the products of generated kernels with their windows count. Counters
            that go through modules do not see them in code that is built of unfold and sum.

    Returns:
        An integer.

    Raises:
        ValueError: A size is open, or a layer has weights of which the use is not known here.

    Example:

    >>> import involution
    >>> involution.models.count_multiply_adds(involution.models.RedNet50(), (224, 224, 3))
    2648505856
    """
    (tensor,) = model.inputs
    shape = tuple(tensor.shape[1:] if input_shape is None else input_shape)
    if None in shape:
        raise ValueError(
            "`input_shape` must be given where the model leaves a size open. "
            f"Received: input_shape={input_shape}, and the model's {tuple(tensor.shape[1:])}"
        )
    calls: list[tuple] = []

    def call(layer, *arguments, **more):
        output = layer(*arguments, **more)
        calls.append((layer, arguments[0], output))
        return output

    # The same layers, with every size known. Of a Sequential model each is called once.
    once = isinstance(model, keras.Sequential)
    given = {} if once else {"call_function": call}
    sized = keras.models.clone_model(model, input_tensors=keras.Input(shape), **given)
    if once:
        calls = [(layer, layer.input, layer.output) for layer in sized.layers]
    return sum(
        _of_call(layer, inputs, output, involutions)
        for layer, inputs, output in calls
        if getattr(layer, "weights", None)
    )


def _of_call(layer, inputs, output, involutions) -> int:
    if isinstance(layer, LIGHT):
        return 0
    if isinstance(layer, (Involution, InvolutionND)):
        return _of_involution(layer, inputs, output, involutions)
    if not isinstance(layer, WEIGHTED) or isinstance(layer, TRANSPOSED):
        raise ValueError(
            "Every layer with weights must be a convolution, a dense layer, an involution or a "
            f"normalization. Received: {layer.name}, a {type(layer).__name__}"
        )
    return _matrices(layer) * _positions(output.shape, layer)


def _of_involution(layer, inputs, output, involutions) -> int:
    y = output[0] if isinstance(output, (tuple, list)) else output
    generator = layer.kernel_gen if isinstance(layer, Involution) else layer.kernel_generator
    own = getattr(generator, "count_multiply_adds", lambda: _matrices(generator))
    positions = _positions(y.shape, layer)
    total = own() * positions
    if involutions:
        side = layer.kernel_size
        taps = side**2 if isinstance(layer, Involution) else math.prod(side)
        total += taps * _channels(inputs.shape, layer) * positions
    if getattr(layer, "filters", None) is not None:
        total += _matrices(layer.projection) * positions
    return total


def _matrices(layer) -> int:
    """Entries of all weights that are more than a number for each channel."""
    return sum(math.prod(w.shape) for w in layer.weights if len(w.shape) > 1)


def _channels(shape, layer) -> int:
    return shape[1] if getattr(layer, "data_format", None) == CHANNELS_FIRST else shape[-1]


def _positions(shape, layer) -> int:
    first = getattr(layer, "data_format", None) == CHANNELS_FIRST
    return math.prod(shape[2:] if first else shape[1:-1])
