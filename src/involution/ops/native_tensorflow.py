"""The core in TensorFlow: a custom operation, eager and in graphs."""

import functools

import tensorflow as tf

from involution.ops import fused_gradients, native_library
from involution.ops.gradients import differentiable
from involution.ops.native_call import fused_numbers, fused_shapes, numbers, result_shape, wide_type


def refusal(problem) -> str | None:
    if tf.config.list_physical_devices("GPU"):
        return "it runs on CPUs, and TensorFlow sees a GPU"
    if _in_xla():
        return "code compiled by jit_compile=True can call no custom operation"
    return _operations()[1]


@functools.cache
def _operations():
    """The library of operations, or None and the reason."""
    file, reason = native_library.binding("tensorflow")
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


def _compute(member, g, x_sizes, a, b):
    operations, _ = _operations()
    told = _tensor(numbers(member, g, x_sizes, a, b))
    result = operations.involution_native(a, b, told, threads=_threads())
    return _shaped(result, result_shape(member, g, x_sizes, a, b))


def _compute_fused(member, g, x_sizes, *arguments):
    operations, _ = _operations()
    told = _tensor(fused_numbers(member, g, x_sizes, arguments))
    wide = tf.as_dtype(wide_type(arguments[0].dtype))
    results = operations.involution_native_fused(*arguments, told, W=wide, threads=_threads())
    shapes = fused_shapes(member, g, x_sizes, arguments)
    return tuple(_shaped(r, shape) for r, shape in zip(results, shapes, strict=True))


def _tensor(integers):
    return tf.stack([tf.cast(n, "int64") for n in integers])


def _threads():
    return tf.config.threading.get_intra_op_parallelism_threads() or native_library.processors()


def _shaped(result, shape):
    result.set_shape([n if isinstance(n, int) else None for n in shape])
    return result


_differentiable = differentiable(_compute)
_differentiable_fused = fused_gradients.differentiable(_compute_fused, _differentiable)


def call(member, g, x_sizes, a, b):
    _forbid_saving()
    return _differentiable(member, g, x_sizes, a, b)


def call_fused(member, g, x_sizes, *arguments):
    _forbid_saving()
    return _differentiable_fused(member, g, x_sizes, *arguments)


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
        return tf.raw_ops.OptionalFromValue(components=[tf.constant(text)])
