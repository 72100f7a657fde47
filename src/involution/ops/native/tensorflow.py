"""The core in TensorFlow: custom ops, eager and in graphs."""

import functools

import tensorflow as tf

from involution.ops.autodiff import FORWARD, INPUT_GRAD, KERNEL_GRAD, VJP_RULES, fused
from involution.ops.native import library
from involution.ops.native.params import (
    FEATURES_ARG,
    HIDDEN_ARG,
    PASSES,
    accumulation_dtype,
    encode,
    encode_fused,
    fused_result_shapes,
    result_shape,
)


def unsupported_reason(problem) -> str | None:
    if tf.config.list_physical_devices("GPU"):
        return "it runs on CPUs, and TensorFlow sees a GPU"
    if _in_xla():
        return "code compiled with jit_compile=True cannot call custom ops"
    return _op_library()[1]


@functools.cache
def _op_library():
    """The library of ops, or None and the reason."""
    file, reason = library.binding("tensorflow")
    if file is None:
        return None, reason
    try:
        return tf.load_op_library(str(file)), None
    except tf.errors.NotFoundError as error:
        return None, f"TensorFlow cannot load it: {error}"


def _in_xla() -> bool:
    """Whether this code is being traced for ``jit_compile=True``."""
    if tf.executing_eagerly():
        return False
    try:
        from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

        return bool(GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))
    except (ImportError, AttributeError):
        # Private API. Without it, TensorFlow's own error names the op that XLA cannot compile.
        return False


def _run_pass(pass_, params, _, a, b):
    """A pass, given the encoded parameters of any pass of the same call."""
    index = PASSES.index(pass_)
    result = _op_library()[0].involution_native(
        a, b, _with_pass(index, params), threads=_threads(), pass_index=index
    )
    # The sizes in ``params`` are known only at run time. Forward mode traces gradients for tensors
    # of unknown rank.
    if a.shape.rank is None:
        return result
    rank = a.shape.rank + {FORWARD: 0, INPUT_GRAD: -1, KERNEL_GRAD: 1}[pass_]
    return _with_static_shape(result, [a.shape[0], *[None] * (rank - 1)])


def _run_fused_pass(pass_, params, _, *arguments):
    index, dtype = PASSES.index(pass_), tf.as_dtype(accumulation_dtype(arguments[0].dtype))
    result, dweights = _op_library()[0].involution_native_fused(
        *arguments, _with_pass(index, params), W=dtype, threads=_threads(), pass_index=index
    )
    features, hidden = arguments[FEATURES_ARG[pass_]], arguments[HIDDEN_ARG[pass_]]
    like = hidden if pass_ == KERNEL_GRAD else features
    if like.shape.rank is not None:
        unknown = [None] * (like.shape.rank - 2)
        result = _with_static_shape(result, [like.shape[0], *unknown, like.shape[-1]])
    return result, _with_static_shape(dweights, [None] * 3 if pass_ == KERNEL_GRAD else [0])


def _with_pass(index, params):
    # ``pass_`` is the first field.
    return tf.concat([tf.constant([index], "int64"), params[1:]], axis=0)


# Gradients of the ops, not custom gradients of functions: vectorized_map and forward mode, which
# TensorFlow derives from gradients of gradients, need them.
@tf.RegisterGradient("Involution>Native")
def _gradient(operation, c):
    a, b, params = operation.inputs
    operands = (a, b, c)
    rules = VJP_RULES[PASSES[operation.get_attr("pass_index")]]
    gradients = [
        _run_pass(rule, params, None, *(operands[i] for i in indices)) for rule, indices in rules
    ]
    return *_set_shapes(gradients, (a, b)), None


@tf.RegisterGradient("Involution>NativeFused")
def _fused_gradient(operation, *cotangents):
    *arguments, params = operation.inputs
    pass_ = PASSES[operation.get_attr("pass_index")]
    if pass_ == FORWARD:
        gradients = fused.output_gradients(_run_fused_pass, params, None, arguments, cotangents[0])
    elif pass_ == INPUT_GRAD:
        gradients = fused.input_gradients(_run_fused_pass, params, None, arguments, cotangents[0])
    else:
        x, hidden, _, dy = arguments
        # Forward mode may trace tensors of unknown rank.
        rank = hidden.shape.rank
        for tensor, known in ((x, rank), (dy, rank), (cotangents[0], rank), (cotangents[1], 3)):
            tensor.set_shape([None] * known)
        gradients = fused.kernel_gradients(_run_pass, params, None, arguments, cotangents)
    return *_set_shapes(gradients, arguments), None


def _set_shapes(gradients, arguments):
    for gradient, argument in zip(gradients, arguments, strict=True):
        gradient.set_shape(argument.shape)
    return gradients


def _as_tensor(params):
    return tf.stack([tf.cast(n, "int64") for n in params])


def _threads():
    return tf.config.threading.get_intra_op_parallelism_threads() or library.available_cpus()


def _with_static_shape(result, shape):
    result.set_shape([n if isinstance(n, int) else None for n in shape])
    return result


def call(pass_, window, x_sizes, a, b):
    _block_saved_model()
    # Variables are read here: they may change before the gradient is computed.
    a, b = tf.convert_to_tensor(a), tf.convert_to_tensor(b)
    params = _as_tensor(encode(pass_, window, x_sizes, a, b))
    result = _run_pass(pass_, params, None, a, b)
    return _with_static_shape(result, result_shape(pass_, window, x_sizes, a, b))


def call_fused(pass_, window, x_sizes, *arguments):
    _block_saved_model()
    arguments = tuple(tf.convert_to_tensor(a) for a in arguments)
    params = _as_tensor(encode_fused(pass_, window, x_sizes, arguments))
    shapes = fused_result_shapes(pass_, window, x_sizes, arguments)
    results = _run_fused_pass(pass_, params, None, *arguments)
    return tuple(_with_static_shape(r, shape) for r, shape in zip(results, shapes, strict=True))


def _block_saved_model():
    """Makes saving a graph fail: a model saved with a custom op could be loaded only where
    involution is installed."""
    if not tf.executing_eagerly():
        # Captures a tensor that cannot be saved; the result is unused.
        tf.raw_ops.OptionalHasValue(optional=_unsavable_tensor(), name="involution_native")


@functools.cache
def _unsavable_tensor():
    """A tensor that TensorFlow cannot save; its error message prints the text."""
    text = (
        "the implementation `native` runs only where involution is installed. Save the model "
        'within involution.ops.force_implementation("portable")'
    )
    with tf.init_scope(), tf.device("CPU"):
        tensor = tf.raw_ops.OptionalFromValue(components=[tf.constant(text)])

    def raise_error():
        raise NotImplementedError(
            "A graph that is frozen, as for ONNX, must not contain native ops: export within "
            '`with involution.ops.force_implementation("portable"):`, or with '
            "`involution export`. "
            "Received: a graph with the implementation `native`"
        )

    # Freezing a graph reads the values of captured tensors.
    tensor.numpy = raise_error
    return tensor
