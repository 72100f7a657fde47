"""The core in TensorFlow: a custom operation, eager and in graphs."""

import functools

import tensorflow as tf

from involution.ops import native_library
from involution.ops.gradients import differentiable
from involution.ops.native_call import numbers, result_shape


def refusal(problem) -> str | None:
    if tf.config.list_physical_devices("GPU"):
        return "it runs on CPUs, and TensorFlow sees a GPU"
    if _in_xla():
        return "code compiled by jit_compile=True can call no custom operation"
    return _operation()[1]


@functools.cache
def _operation():
    """The operation, or None and the reason."""
    file = native_library.find("libinvolution_tensorflow.so")
    if file is None:
        return None, "it was built without its binding for TensorFlow"
    try:
        return tf.load_op_library(str(file)).involution_native, None
    except (tf.errors.NotFoundError, AttributeError) as error:
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
    operation, _ = _operation()
    told = tf.stack([tf.cast(n, "int64") for n in numbers(member, g, x_sizes, a, b)])
    threads = tf.config.threading.get_intra_op_parallelism_threads()
    result = operation(a, b, told, threads=threads or native_library.processors())
    shape = result_shape(member, g, x_sizes, a, b)
    result.set_shape([n if isinstance(n, int) else None for n in shape])
    return result


_differentiable = differentiable(_compute)


def call(member, g, x_sizes, a, b):
    if not tf.executing_eagerly():
        # Nobody reads the result. It binds the graph to a tensor that no saved model can hold:
        # what is saved with a custom operation could be loaded nowhere else.
        tf.raw_ops.OptionalHasValue(optional=_notice(), name="involution_native")
    return _differentiable(member, g, x_sizes, a, b)


@functools.cache
def _notice():
    """A tensor that TensorFlow cannot save, and prints when it says so."""
    text = (
        "the implementation `native` runs only where involution is installed: "
        "a model to be saved needs `reference`, see involution.ops.use"
    )
    with tf.init_scope(), tf.device("CPU"):
        return tf.raw_ops.OptionalFromValue(components=[tf.constant(text)])
