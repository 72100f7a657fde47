"""How much a network computes for one input."""

import math

import keras

from involution.layers.involution_nd import InvolutionND
from involution.layers.keras_io import Involution
from involution.ops.validation import CHANNELS_FIRST

# Layers that use every entry of these weights once at every position of the output.
WEIGHTED: dict[type[keras.layers.Layer], tuple[str, ...]] = {
    keras.layers.Dense: ("kernel",),
    keras.layers.Conv1D: ("kernel",),
    keras.layers.Conv2D: ("kernel",),
    keras.layers.Conv3D: ("kernel",),
    keras.layers.DepthwiseConv1D: ("kernel",),
    keras.layers.DepthwiseConv2D: ("kernel",),
    keras.layers.SeparableConv1D: ("depthwise_kernel", "pointwise_kernel"),
    keras.layers.SeparableConv2D: ("depthwise_kernel", "pointwise_kernel"),
}
# A few operations for each number that passes: not counted.
LIGHT = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.Normalization,
    keras.layers.PReLU,
)
# What decides which multiply-adds a generator makes: a class that overrides one of these, and not
# ``count_multiply_adds``, is not the class that is counted.
COMPUTING = ("call", "hidden", "_generate", "_build_generator")


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
    kind = _inherited_call(layer, WEIGHTED)
    if kind is None:
        raise ValueError(
            "Every layer with weights must be a convolution, a dense layer, an involution or a "
            "normalization, with the `call` that Keras or this package gives it. "
            f"Received: {layer.name}, a {type(layer).__name__}"
        )
    weights = (getattr(layer, name) for name in WEIGHTED[kind])
    return sum(math.prod(w.shape) for w in weights) * _positions(output.shape, layer)


def _inherited_call(layer, kinds):
    """The one of these classes whose ``call`` a layer has; None if it has another."""
    return next(
        (k for k in kinds if isinstance(layer, k) and type(layer).call is k.call),
        None,
    )


def _of_involution(layer, inputs, output, involutions) -> int:
    base = _inherited_call(layer, (Involution, InvolutionND))
    if base is None or type(layer).generate_kernel is not base.generate_kernel:
        raise ValueError(
            "An involution must make its kernels and apply them as this package's layers do. "
            f"Received: {layer.name}, a {type(layer).__name__} with its own"
        )
    y = output[0] if isinstance(output, (tuple, list)) else output
    positions = _positions(y.shape, layer)
    total = _of_generator(layer, inputs, positions, involutions)
    if involutions:
        side = layer.kernel_size
        taps = side**2 if isinstance(layer, Involution) else math.prod(side)
        total += taps * _channels(inputs.shape, layer) * positions
    if getattr(layer, "filters", None) is not None:
        total += math.prod(layer.projection.kernel.shape) * positions
    return total


def _of_generator(layer, inputs, positions, involutions) -> int:
    generator = layer.kernel_gen if isinstance(layer, Involution) else layer.kernel_generator
    kind = type(generator)
    if hasattr(kind, "count_multiply_adds"):
        counted = _definer(kind, "count_multiply_adds")
        if all(
            issubclass(counted, _definer(kind, name)) for name in COMPUTING if hasattr(kind, name)
        ):
            return generator.count_multiply_adds() * positions
        raise ValueError(
            "A generator that computes in its own way must have its own `count_multiply_adds()`, "
            "the number at each position of the output. "
            f"Received: {generator.name}, a {kind.__name__}"
        )
    shape = layer.generator_input_shape(inputs.shape)
    if isinstance(generator, keras.Model) and getattr(generator, "inputs", None):
        return count_multiply_adds(generator, shape[1:], involutions)
    if not generator.weights:
        return 0
    spec = keras.KerasTensor(generator.compute_output_shape(shape))
    return _of_call(generator, keras.KerasTensor(shape), spec, involutions)


def _definer(kind, name) -> type:
    return next(c for c in kind.__mro__ if name in vars(c))


def _channels(shape, layer) -> int:
    return shape[1] if getattr(layer, "data_format", None) == CHANNELS_FIRST else shape[-1]


def _positions(shape, layer) -> int:
    first = getattr(layer, "data_format", None) == CHANNELS_FIRST
    return math.prod(shape[2:] if first else shape[1:-1])
