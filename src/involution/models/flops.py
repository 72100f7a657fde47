"""Multiply-accumulate operations (MACs) of a network."""

import math

import keras

from involution.layers.base import BaseInvolution
from involution.layers.involution_nd import InvolutionND
from involution.layers.keras_io import Involution
from involution.layers.offset_attention import OffsetAttention
from involution.layers.transposed import InvolutionTransposeND
from involution.layers.upsampling import InvolutionUpSamplingND
from involution.ops.validation import CHANNELS_FIRST

# Layers that use every entry of these weights once per output position.
COUNTED: dict[type[keras.layers.Layer], tuple[str, ...]] = {
    keras.layers.Dense: ("kernel",),
    keras.layers.Conv1D: ("kernel",),
    keras.layers.Conv2D: ("kernel",),
    keras.layers.Conv3D: ("kernel",),
    keras.layers.DepthwiseConv1D: ("kernel",),
    keras.layers.DepthwiseConv2D: ("kernel",),
    keras.layers.SeparableConv1D: ("depthwise_kernel", "pointwise_kernel"),
    keras.layers.SeparableConv2D: ("depthwise_kernel", "pointwise_kernel"),
}
# A few elementwise operations each: not counted, as is usual.
UNCOUNTED = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.Normalization,
    keras.layers.PReLU,
)
# Classes that define how their layers are called.
INVOLUTIONS = (Involution, InvolutionND, InvolutionUpSamplingND, InvolutionTransposeND)
# The methods that determine a generator's multiply-adds: overriding one of them invalidates an
# inherited ``count_multiply_adds``.
MAC_METHODS = ("call", "hidden", "_generate", "_build_generator")


def count_multiply_adds(model, input_shape=None, involutions=True) -> int:
    """Multiply-adds (MACs) of one forward pass for one input, which papers on image models call
    FLOPs. The number of arithmetic operations is twice as large.

    Convolutions, dense layers, involutions and the convolutions of kernel generators are counted.
    As usual, biases, normalization, activations, pooling and additions are not.

    Args:
        model: A functional ``keras.Model`` or ``keras.Sequential`` with one input tensor.
        input_shape: Shape of one input, as (height, width, channels); required if the model's
            contains None.
        involutions: Whether to count the products of generated kernels and their windows. Counters
            based on module hooks miss them in implementations with unfold and sum.

    Returns:
        An integer.

    Raises:
        ValueError: A size is unknown, or the multiply-adds of a layer with weights are.

    Example:

    >>> import involution
    >>> involution.models.count_multiply_adds(involution.models.RedNet50(), (224, 224, 3))
    2648505856
    """
    (tensor,) = model.inputs
    shape = tuple(tensor.shape[1:] if input_shape is None else input_shape)
    if None in shape:
        raise ValueError(
            "`input_shape` must be given without None for a model whose input shape has None. "
            f"Received: input_shape={input_shape}, and the model's {tuple(tensor.shape[1:])}"
        )
    calls: list[tuple] = []

    def call(layer, *args, **kwargs):
        output = layer(*args, **kwargs)
        calls.append((layer, args[0] if args else next(iter(kwargs.values())), output))
        return output

    # The same layers, with all sizes known. clone_model supports no call_function for a Sequential
    # model, which calls each layer once.
    sequential = isinstance(model, keras.Sequential)
    options = {} if sequential else {"call_function": call}
    # Keras compares the structures of inputs, and keys of a dictionary with names.
    inputs = keras.tree.map_structure(
        lambda tensor: keras.Input(shape, name=tensor.name), tensor if sequential else model.input
    )
    sized = keras.models.clone_model(model, input_tensors=inputs, **options)
    if sequential:
        calls = [(layer, layer.input, layer.output) for layer in sized.layers]
    return sum(
        _layer_macs(layer, inputs, output, involutions)
        for layer, inputs, output in calls
        if getattr(layer, "weights", None)
    )


def _layer_macs(layer, inputs, output, involutions) -> int:
    if isinstance(layer, UNCOUNTED):
        return 0
    if isinstance(layer, OffsetAttention):
        return layer.count_multiply_adds([tensor.shape for tensor in inputs])
    if isinstance(layer, BaseInvolution):
        return _involution_macs(layer, inputs, output, involutions)
    kind = _inherited_call(layer, COUNTED)
    if kind is None:
        raise ValueError(
            "Every layer with weights must be a convolution, a dense layer, an involution or a "
            "normalization that does not override `call`. "
            f"Received: {layer.name}, a {type(layer).__name__}"
        )
    return _weight_macs(layer, COUNTED[kind]) * _positions(output.shape, layer)


def _weight_macs(layer, names) -> int:
    """Multiply-adds per output position of these weights."""
    return sum(math.prod(getattr(layer, name).shape) for name in names)


def _inherited_call(layer, kinds):
    """The class in ``kinds`` whose ``call`` the layer inherits; None if it overrides ``call``."""
    return next(
        (k for k in kinds if isinstance(layer, k) and type(layer).call is k.call),
        None,
    )


def _involution_macs(layer, inputs, output, involutions) -> int:
    base = _inherited_call(layer, INVOLUTIONS)
    if base is None or type(layer).generate_kernel is not base.generate_kernel:
        raise ValueError(
            "An involution must not override `call` or `generate_kernel`. "
            f"Received: {layer.name}, a {type(layer).__name__} that does"
        )
    y = output[0] if isinstance(output, (tuple, list)) else output
    # Transposed involutions have a kernel for each position of the input.
    transposed = isinstance(layer, InvolutionTransposeND)
    positions = _positions((inputs if transposed else y).shape, layer)
    total = _generator_macs(layer, inputs, positions, involutions)
    if involutions:
        size = layer.kernel_size
        taps = size**2 if isinstance(layer, Involution) else math.prod(size)
        total += taps * _channels(inputs.shape, layer) * positions
    if getattr(layer, "filters", None) is not None:
        total += _weight_macs(layer.projection, ("kernel",)) * positions
    return total


def _generator_macs(layer, inputs, positions, involutions) -> int:
    generator = layer.kernel_gen if isinstance(layer, Involution) else layer.kernel_generator
    kind = type(generator)
    if hasattr(kind, "count_multiply_adds"):
        counted = _definer(kind, "count_multiply_adds")
        if all(
            issubclass(counted, _definer(kind, name)) for name in MAC_METHODS if hasattr(kind, name)
        ):
            total = generator.count_multiply_adds() * positions
            # A subclass that overrides only the former counts everything there.
            counts_inputs = "count_input_multiply_adds"
            if hasattr(kind, counts_inputs) and issubclass(_definer(kind, counts_inputs), counted):
                total += generator.count_input_multiply_adds() * _positions(inputs.shape, layer)
            return total
        raise ValueError(
            "A generator that overrides its computation must override `count_multiply_adds()`, "
            "the multiply-adds per output position (those per input position: "
            "`count_input_multiply_adds()`). "
            f"Received: {generator.name}, a {kind.__name__}"
        )
    shape = layer.generator_input_shape(inputs.shape)
    if isinstance(generator, keras.Model) and getattr(generator, "inputs", None):
        return count_multiply_adds(generator, shape[1:], involutions)
    if not generator.weights:
        return 0
    spec = keras.KerasTensor(generator.compute_output_shape(shape))
    return _layer_macs(generator, keras.KerasTensor(shape), spec, involutions)


def _definer(kind, name) -> type:
    return next(c for c in kind.__mro__ if name in vars(c))


def _channels(shape, layer) -> int:
    return shape[1] if getattr(layer, "data_format", None) == CHANNELS_FIRST else shape[-1]


def _positions(shape, layer) -> int:
    channels_first = getattr(layer, "data_format", None) == CHANNELS_FIRST
    return math.prod(shape[2:] if channels_first else shape[1:-1])
