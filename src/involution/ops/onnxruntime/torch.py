"""Nodes in a graph that ``torch.onnx.export(dynamo=True)`` traces."""

import torch

from involution.ops.onnxruntime.domain import DOMAIN, VERSION


def node(name, tensors, attributes, shape):
    # PyTorch's sizes are known, also symbolic ones.
    assert None not in shape
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}",
        tensors,
        attributes,
        dtype=tensors[0].dtype,
        shape=shape,
        version=VERSION,
    )
