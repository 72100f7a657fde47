"""Fusion of exported graphs: normalization and activation into the operator before them.

Batch normalization after an involution scales and offsets each channel. ``models.fold`` cannot
merge it, because the channels of a group share kernels; the operator ``FusedInvolution`` of
onnxruntime does it where the result is still in the cache.
"""

import collections

import numpy as np

from involution.ops.onnxruntime.domain import DOMAIN


def all_nodes(graph):
    """The nodes of a graph and of its subgraphs."""
    for node in graph.node:
        yield node
        for subgraph in subgraphs(node):
            yield from all_nodes(subgraph)


def subgraphs(node):
    """The graphs in a node's attributes: branches of conditions and bodies of loops."""
    for attribute in node.attribute:
        yield from ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs)


def used_names(graph):
    """The names that a graph's nodes, their subgraphs and its outputs refer to."""
    for node in graph.node:
        yield from node.input
        for subgraph in subgraphs(node):
            yield from used_names(subgraph)
    yield from (value.name for value in graph.output)


def fuse_scaling(graph):
    """Merges the elementwise operations of channels after each ``FusedInvolution`` into it."""
    from onnx import helper, numpy_helper

    operators = [
        node for node in graph.node if (node.domain, node.op_type) == (DOMAIN, "FusedInvolution")
    ]
    if not operators:
        return
    constants = {tensor.name: tensor for tensor in graph.initializer}
    users = collections.defaultdict(list)
    for node in graph.node:
        for name in set(node.input):
            users[name].append(node)
        # None: a use other than as an input of a node of this graph.
        for subgraph in subgraphs(node):
            for name in set(used_names(subgraph)):
                users[name].append(None)
    for value in graph.output:
        users[value.name].append(None)
    fused = []
    for node in operators:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        channels = attributes.pop("channels")
        node.attribute.remove(channels)
        rank = len(attributes["kernel_shape"].ints) + 2
        chain = _Chain(rank, channels.i, constants, users)
        chain.follow(node.output[0])
        if not chain.nodes:
            continue
        for part, vector in (("scale", chain.scale), ("offset", chain.offset)):
            name = f"{node.output[0]}/{part}"
            graph.initializer.append(numpy_helper.from_array(vector.astype("float32"), name))
            node.input.append(name)
        node.attribute.append(helper.make_attribute("relu", int(chain.relu)))
        fused += chain.nodes
    _bypass(graph, fused)


class _Chain:
    """The operations that follow a node as the only ones, as ``value * scale + offset``."""

    def __init__(self, rank, channels, constants, users):
        self._rank, self._channels = rank, channels
        self._constants, self._users = constants, users
        self._axis = 1  # of the channels
        self.scale, self.offset, self.relu = np.ones(channels), np.zeros(channels), False
        self.nodes = []

    def follow(self, value):
        while len(self._users[value]) == 1 and (user := self._users[value][0]) is not None:
            if None in self._users[user.output[0]]:  # an output of the model keeps its node
                return
            if user.op_type == "Transpose":
                axes = next((list(a.ints) for a in user.attribute if a.name == "perm"), None)
                axes = list(range(self._rank))[::-1] if axes is None else axes
                self._axis = axes.index(self._axis)
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
        from onnx import numpy_helper

        if node.op_type not in ("Mul", "Div", "Add", "Sub"):
            return False
        others = [name for name in node.input if name != value]
        if len(others) != 1 or others[0] not in self._constants:
            return False
        if node.op_type in ("Div", "Sub") and node.input[0] != value:
            return False
        vector = self._vector(numpy_helper.to_array(self._constants[others[0]]))
        if vector is None:
            return False
        if node.op_type in ("Mul", "Div"):
            factor = vector if node.op_type == "Mul" else 1 / vector
            self.scale, self.offset = self.scale * factor, self.offset * factor
        else:
            self.offset = self.offset + (vector if node.op_type == "Add" else -vector)
        return True

    def _vector(self, constant):
        """A constant as a vector of the channels, or a scalar; None if it depends on others."""
        if constant.ndim > self._rank:
            return None
        shape = (1,) * (self._rank - constant.ndim) + constant.shape
        if any(n != 1 for axis, n in enumerate(shape) if axis != self._axis):
            return None
        vector = constant.astype("float64").reshape(-1)
        if vector.size not in (1, self._channels):
            return None  # it broadcasts one channel to several
        return vector


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
    read = {name for node, _ in nodes for name in node.input}
    del graph.node[:]
    graph.node.extend(kept)
    unused = read - set(used_names(graph))
    tensors = [tensor for tensor in graph.initializer if tensor.name not in unused]
    del graph.initializer[:]
    graph.initializer.extend(tensors)
