"""Export to ONNX by tf2onnx, jax2onnx or PyTorch's exporter.

``api.py`` selects the implementation of the involutions.
"""

import logging

import numpy as np

from involution.export import preprocessing, saved_model, torch_export
from involution.export.fusion import all_nodes, fuse_scaling
from involution.ops.onnxruntime.domain import DOMAIN, VERSION

# The newest operator set that all three exporters support.
OPSET = 18


def write(spec, path, backend):
    # Not ``keras.Model.export``, which calls the same exporters: it does not name outputs, rejects
    # nested outputs on TensorFlow, writes weights to a second file on JAX, and on PyTorch uses the
    # deprecated exporter, whose files do not load.
    import onnx

    convert = {"tensorflow": _from_tensorflow, "jax": _from_jax, "torch": _from_torch}
    proto = convert[backend](spec)
    _name_dimensions(proto.graph, spec)
    fuse_scaling(proto.graph)
    for node in all_nodes(proto.graph):
        del node.metadata_props[:]  # contains paths of this machine
    used = {node.domain or "" for node in all_nodes(proto.graph)}
    for opset in list(proto.opset_import):
        if opset.domain not in used:
            proto.opset_import.remove(opset)
    if used - {opset.domain for opset in proto.opset_import} == {DOMAIN}:
        proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, VERSION))
    onnx.save(proto, path)


def finish(path, metadata, front=None):
    """Adds ``metadata_props``, and a graph from ``preprocessing.make`` before the model's."""
    import onnx

    proto = onnx.load(path)
    if front is not None:
        preprocessing.prepend(proto.graph, front)
    onnx.helper.set_model_props(proto, metadata)
    onnx.save(proto, path)


def _from_tensorflow(spec):
    import tensorflow as tf
    import tf2onnx

    function, signature = saved_model.function_and_signature(spec)
    traced = tf.function(function, signature, autograph=False)
    from involution.ops.onnxruntime.tensorflow import HANDLERS

    # It warns of each operator whose shape it cannot infer.
    logger = logging.getLogger("tf2onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return tf2onnx.convert.from_function(
            traced, signature, opset=OPSET, custom_op_handlers=dict(HANDLERS)
        )[0]
    finally:
        logger.setLevel(level)


def _from_jax(spec):
    import jax
    import jax2onnx
    import onnxscript.optimizer

    from involution.ops.onnxruntime.jax import register_conversion

    register_conversion()
    proto = jax2onnx.to_onnx(
        lambda *tensors: list(spec.call(*tensors).values()),
        [jax.ShapeDtypeStruct(("batch", *s.shape[1:]), np.dtype(s.dtype)) for s in spec.specs],
        input_names=spec.inputs,
        output_names=spec.outputs,
        opset=OPSET,
    )
    _reduce_pooling_rank(proto.graph)
    # Constant folding removes about 80 % of the nodes.
    return onnxscript.optimizer.optimize(proto)


def _from_torch(spec):
    import torch

    exported = torch.onnx.export(
        torch_export.exported_program(spec),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=spec.inputs,
        output_names=spec.outputs,
    )
    assert exported is not None
    return exported.model_proto


def _reduce_pooling_rank(graph):
    """Rewrites MaxPool nodes of jax2onnx to inputs (B, C, *spatial).

    jax2onnx pools (1, 1, B, *spatial, C) with windows of size 1 over the batch and the channels;
    runtimes support at most three window dimensions.
    """
    from onnx import helper, numpy_helper

    axes = "pool_axes"
    nodes = []
    for node in graph.node:
        attributes = {a.name: list(a.ints) for a in node.attribute if a.ints}
        window = attributes.get("kernel_shape", [])
        if node.op_type != "MaxPool" or len(window) <= 3:
            nodes.append(node)
            continue
        rank = len(window)
        pads = attributes.get("pads", [0] * 2 * rank)
        strides, dilations = (attributes.get(k, [1] * rank) for k in ("strides", "dilations"))
        permutation = sorted(
            range(rank),
            key=lambda i: (window[i], strides[i], pads[i], pads[rank + i]) != (1, 1, 0, 0),
        )
        spatial = permutation[2:]
        inverse = [permutation.index(i) for i in range(rank)]
        x, y = node.input[0], node.output[0]
        squeezed, transposed, pooled, restored = (
            f"{y}/{step}" for step in ("squeezed", "transposed", "pooled", "restored")
        )
        nodes += [
            helper.make_node("Squeeze", [x, axes], [squeezed]),
            helper.make_node("Transpose", [squeezed], [transposed], perm=permutation),
            helper.make_node(
                "MaxPool",
                [transposed],
                [pooled],
                kernel_shape=[window[i] for i in spatial],
                strides=[strides[i] for i in spatial],
                dilations=[dilations[i] for i in spatial],
                pads=[pads[i + end] for end in (0, rank) for i in spatial],
            ),
            helper.make_node("Transpose", [pooled], [restored], perm=inverse),
            helper.make_node("Unsqueeze", [restored, axes], [y]),
        ]
    if len(nodes) > len(graph.node):
        graph.initializer.append(numpy_helper.from_array(np.array([0, 1]), axes))
        del graph.node[:]
        graph.node.extend(nodes)


def _name_dimensions(graph, spec):
    """Names the batch dimension ``batch``, an unknown one by its tensor and axis."""
    for value, input_spec, name in zip(graph.input, spec.specs, spec.inputs, strict=True):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if input_spec.shape[axis] is None:
                dim.dim_param = "batch" if axis == 0 else f"{name}_{axis}"
    for value in graph.output:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.dim_value:
                dim.dim_param = "batch" if axis == 0 else f"{value.name}_{axis}"
    # Intermediate shapes still have the exporter's names; runtimes infer them.
    del graph.value_info[:]
