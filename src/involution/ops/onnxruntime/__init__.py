"""Implementation by a custom operator of onnxruntime: a node of an exported graph.

``csrc/bindings/onnxruntime.cpp`` defines the operators, which compute with the core's kernels. A
call adds a node to the graph that an exporter of ONNX traces, and computes nothing; it is selected
only by name. A module of this package has ``node(name, tensors, attributes, shape)`` for one
framework: the result, of that shape with None for each unknown size, of the node
``involution::name``.
"""

from involution.ops.frameworks import FRAMEWORKS, is_exporting, namespace
from involution.ops.reference import input_grad, kernel_grad
from involution.ops.validation import CHANNELS_LAST, INTERLEAVED, SAME

__all__ = ["apply", "apply_generated", "input_grad", "kernel_grad", "unsupported_reason"]

CHECKS_SHAPES = True


def unsupported_reason(problem) -> str | None:
    if problem.framework not in FRAMEWORKS:
        return f"it has no binding for the backend {problem.framework}"
    if problem.dtype != "float32":
        return "it supports float32"
    if problem.framework == "torch" and not is_exporting():
        return "it is for models that are being exported to ONNX"
    return None


def apply(x, kernel, problem):
    window = problem.window
    if window.data_format == CHANNELS_LAST:
        rank = window.rank
        axes = (0, rank + 1, rank + 2, *range(1, rank + 1))
        kernel = namespace(kernel).transpose(kernel, axes)
    return _node("Involution", x, (kernel,), problem)


def apply_generated(x, hidden, weight, bias, problem):
    return _node("FusedInvolution", x, (_channels_first(hidden), weight, bias), problem)


def _node(name, x, others, problem):
    window = problem.window
    last = window.data_format == CHANNELS_LAST
    channels = problem.x_shape[window.channel_axis]
    shape = (problem.x_shape[0], channels, *window.spatial(problem.output_shape))
    x = _channels_first(x) if last else x
    module = _module(problem.framework)
    attributes = _attributes(window)
    if name == "FusedInvolution":
        # For `export/fusion.py`; the operator ignores it.
        attributes["channels"] = channels
    y = module.node(name, (x, *others), attributes, shape)
    return namespace(y).moveaxis(y, 1, -1) if last else y


def _channels_first(x):
    return namespace(x).moveaxis(x, -1, 1)


def _attributes(window) -> dict:
    """The node's attributes; those of ONNX's Conv have its names."""
    attributes = {
        "kernel_shape": list(window.kernel_size),
        "strides": list(window.strides),
        "dilations": list(window.dilation_rate),
        "upsampling": list(window.upsampling),
        "group": window.groups,
        "interleaved": int(window.group_layout == INTERLEAVED),
    }
    if window.padding == SAME:
        return {**attributes, "same": 1}
    # Except for "same", padding does not depend on the input's size.
    pairs = window.pads((1,) * window.rank)
    return {**attributes, "pads": [pair[end] for end in (0, 1) for pair in pairs]}


def _module(framework):
    if framework == "tensorflow":
        from involution.ops.onnxruntime import tensorflow

        return tensorflow
    if framework == "jax":
        from involution.ops.onnxruntime import jax

        return jax
    from involution.ops.onnxruntime import torch

    return torch
