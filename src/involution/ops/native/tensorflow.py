"""The core in TensorFlow: a custom operation, eager and in graphs."""

import functools

import tensorflow as tf

from involution.ops import fused_autodiff
from involution.ops.autodiff import INPUT, KERNEL, OUTPUT, VJP_RULES
from involution.ops.native import library
from involution.ops.native.params import (
    FEATURES,
    HIDDEN,
    MEMBERS,
    fused_numbers,
    fused_shapes,
    numbers,
    result_shape,
    wide_type,
)

NAMES = tuple(MEMBERS)


def unsupported_reason(problem) -> str | None:
    if tf.config.list_physical_devices("GPU"):
        return "it runs on CPUs, and TensorFlow sees a GPU"
    if _in_xla():
        return "code compiled by jit_compile=True can call no custom operation"
    return _operations()[1]


@functools.cache
def _operations():
    """The library of operations, or None and the reason."""
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
        # Not public. Without it TensorFlow's own error names the operation that cannot run.
        return False


def _member(member, told, _, a, b):
    """A member, told the numbers of any: theirs differ in the first alone."""
    number = MEMBERS[member]
    result = _operations()[0].involution_native(
        a, b, _of(number, told), threads=_threads(), member=number
    )
    # The numbers hold the sizes, which are known when it runs. Forward mode traces gradients for
    # tensors of any rank.
    if a.shape.rank is None:
        return result
    rank = a.shape.rank + {OUTPUT: 0, INPUT: -1, KERNEL: 1}[member]
    return _shaped(result, [a.shape[0], *[None] * (rank - 1)])


def _fused_member(member, told, _, *arguments):
    number, wide = MEMBERS[member], tf.as_dtype(wide_type(arguments[0].dtype))
    first, second = _operations()[0].involution_native_fused(
        *arguments, _of(number, told), W=wide, threads=_threads(), member=number
    )
    features, hidden = arguments[FEATURES[member]], arguments[HIDDEN[member]]
    like = hidden if member == KERNEL else features
    if like.shape.rank is not None:
        unknown = [None] * (like.shape.rank - 2)
        first = _shaped(first, [like.shape[0], *unknown, like.shape[-1]])
    return first, _shaped(second, [None] * 3 if member == KERNEL else [0])


def _of(number, told):
    return tf.concat([tf.constant([number], "int64"), told[1:]], axis=0)


# The gradients of the operations themselves, not of functions around them: so those of mapped and
# of forward mode are found too, which TensorFlow derives from gradients of gradients.
@tf.RegisterGradient("Involution>Native")
def _gradient(operation, c):
    a, b, told = operation.inputs
    abc = (a, b, c)
    rules = VJP_RULES[NAMES[operation.get_attr("member")]]
    gradients = [_member(rule, told, None, *(abc[i] for i in where)) for rule, where in rules]
    return *_like(gradients, (a, b)), None


@tf.RegisterGradient("Involution>NativeFused")
def _fused_gradient(operation, *cotangents):
    *arguments, told = operation.inputs
    member = NAMES[operation.get_attr("member")]
    if member == OUTPUT:
        gradients = fused_autodiff.output_gradients(
            _fused_member, told, None, arguments, cotangents[0]
        )
    elif member == INPUT:
        gradients = fused_autodiff.input_gradients(
            _fused_member, told, None, arguments, cotangents[0]
        )
    else:
        x, hidden, _, dy = arguments
        for tensor in (x, dy):
            # Forward mode may trace it for tensors of any rank.
            tensor.set_shape([None] * hidden.shape.rank)
        gradients = fused_autodiff.kernel_gradients(_member, told[:-1], None, arguments, cotangents)
    return *_like(gradients, arguments), None


def _like(gradients, arguments):
    for gradient, argument in zip(gradients, arguments, strict=True):
        gradient.set_shape(argument.shape)
    return gradients


def _tensor(integers):
    return tf.stack([tf.cast(n, "int64") for n in integers])


def _threads():
    return tf.config.threading.get_intra_op_parallelism_threads() or library.processors()


def _shaped(result, shape):
    result.set_shape([n if isinstance(n, int) else None for n in shape])
    return result


def call(member, g, x_sizes, a, b):
    _forbid_saving()
    # A variable is read here: in the gradient it may have changed.
    a, b = tf.convert_to_tensor(a), tf.convert_to_tensor(b)
    result = _member(member, _tensor(numbers(member, g, x_sizes, a, b)), None, a, b)
    return _shaped(result, result_shape(member, g, x_sizes, a, b))


def call_fused(member, g, x_sizes, *arguments):
    _forbid_saving()
    arguments = tuple(tf.convert_to_tensor(a) for a in arguments)
    told = _tensor(fused_numbers(member, g, x_sizes, arguments))
    shapes = fused_shapes(member, g, x_sizes, arguments)
    results = _fused_member(member, told, None, *arguments)
    return tuple(_shaped(r, shape) for r, shape in zip(results, shapes, strict=True))


def _forbid_saving():
    if not tf.executing_eagerly():
        # Nobody reads the result. It binds the graph to a tensor that no saved model can hold:
        # what is saved with a custom operation could be loaded nowhere else.
        tf.raw_ops.OptionalHasValue(optional=_notice(), name="involution_native")


@functools.cache
def _notice():
    """A tensor that TensorFlow cannot save, and prints when it says so."""
    text = (
        "the implementation `native` runs only where involution is installed: "
        "a model to be saved needs `reference`, see involution.ops.use"
    )
    with tf.init_scope(), tf.device("CPU"):
        notice = tf.raw_ops.OptionalFromValue(components=[tf.constant(text)])

    def refuse():
        raise NotImplementedError(
            "A graph to be frozen, as for ONNX, must hold no native operation: export within "
            '`with involution.ops.use("reference"):`, or by `involution export`. '
            "Received: a graph with the implementation `native`"
        )

    # What freezes a graph reads the values that it captured; of this one there is no array.
    notice.numpy = refuse
    return notice
