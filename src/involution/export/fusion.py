"""Fusion of exported graphs: normalization and activation into the operator before them.

Batch normalization after an involution scales and offsets each channel. ``models.fold`` cannot
merge it, because the channels of a group share kernels; the operator ``FusedInvolution`` of
onnxruntime does it where the result is still in the cache.
"""

import collections

import numpy as np

from involution.ops.onnxruntime.domain import DOMAIN


def fuse_scaling(graph):
    """Merges the elementwise operations of channels after each ``FusedInvolution`` into it."""
    from onnx import helper, numpy_helper

    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    users = collections.defaultdict(list)
    for node in graph.node:
        for name in set(node.input):
            users[name].append(node)
    for value in graph.output:
        users[value.name].append(None)
    fused = []
    for node in graph.node:
        if (node.domain, node.op_type) != (DOMAIN, "FusedInvolution"):
            continue
        rank = next(len(a.ints) for a in node.attribute if a.name == "kernel_shape")
        chain = _Chain(rank + 2, constants, users)
        chain.follow(node.output[0])
        if chain.scale.ndim == 0:
            continue
        for part, vector in (("scale", chain.scale), ("offset", chain.offset)):
            name = f"{node.output[0]}/{part}"
            vector = np.broadcast_to(vector, chain.scale.shape).astype("float32")
            graph.initializer.append(numpy_helper.from_array(vector, name))
            node.input.append(name)
        node.attribute.append(helper.make_attribute("relu", int(chain.relu)))
        fused += chain.nodes
    _bypass(graph, fused)


class _Chain:
    """The operations that follow a node as the only ones, as ``value * scale + offset``."""

    def __init__(self, rank, constants, users):
        self._rank, self._constants, self._users = rank, constants, users
        self._axis = 1  # of the channels
        self.scale, self.offset, self.relu = np.ones(()), np.zeros(()), False
        self.nodes = []

    def follow(self, value):
        while len(self._users[value]) == 1 and (user := self._users[value][0]) is not None:
            if None in self._users[user.output[0]]:  # an output of the model keeps its node
                return
            if user.op_type == "Transpose":
                (permutation,) = (a.ints for a in user.attribute if a.name == "perm")
                self._axis = list(permutation).index(self._axis)
            elif user.op_type == "Relu":
                self.relu = True
                self.nodes.append((user, value))
                return
            elif self._apply(user, value):
                self.nodes.append((user, value))
            else:
                return
            value = user.output[0]

    def _apply(self, node, value) -> bool:
        """Whether a node scales or offsets the channels; if so, it is part of the chain."""
        if node.op_type not in ("Mul", "Div", "Add", "Sub"):
            return False
        others = [name for name in node.input if name != value]
        if len(others) != 1 or others[0] not in self._constants:
            return False
        if node.op_type in ("Div", "Sub") and node.input[0] != value:
            return False
        vector = self._channels(self._constants[others[0]])
        if vector is None:
            return False
        if node.op_type in ("Mul", "Div"):
            factor = vector if node.op_type == "Mul" else 1 / vector
            self.scale, self.offset = self.scale * factor, self.offset * factor
        else:
            self.scale, self.offset = np.broadcast_arrays(
                self.scale, self.offset + (vector if node.op_type == "Add" else -vector)
            )
        return True

    def _channels(self, constant):
        """A constant as a vector of the channels, or a scalar; None if it depends on others."""
        if constant.ndim > self._rank:
            return None
        shape = (1,) * (self._rank - constant.ndim) + constant.shape
        if any(n != 1 for axis, n in enumerate(shape) if axis != self._axis):
            return None
        vector = constant.astype("float64").reshape(-1)
        return vector if vector.size > 1 else vector[0]


def _bypass(graph, nodes):
    """Removes nodes, each given with the input that its users get instead of its output."""
    sources = {node.output[0]: value for node, value in nodes}
    removed = {id(node) for node, _ in nodes}

    def source(name):
        while name in sources:
            name = sources[name]
        return name

    kept = [node for node in graph.node if id(node) not in removed]
    for node in kept:
        node.input[:] = [source(name) for name in node.input]
    del graph.node[:]
    graph.node.extend(kept)
    used = {name for node in kept for name in node.input}
    tensors = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(tensors)
