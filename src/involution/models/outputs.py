"""What a classifier returns: logits, or class probabilities if it ends in a softmax."""

import functools

import keras
from keras import tree

LOGITS, PROBABILITIES = OUTPUTS = "logits", "probabilities"


def outputs_of(model: keras.Model) -> str:
    """What a functional or sequential classifier returns, by the last operation of its graph.

    That is a softmax if it is the layer ``Softmax``, ``keras.ops.softmax``, or a layer with the
    activation ``softmax``; a model in the place of the last layer is looked into. Probabilities
    remain such in ``Identity``, in the activation ``linear`` (a conversion to another dtype) and in
    ``Average`` of several. A softmax computed in another way, as in the ``call`` of your own layer,
    is not found.

    Args:
        model: A model with one output (batch, classes).

    Returns:
        ``"probabilities"`` or ``"logits"``.

    Example:

    >>> import keras
    >>> from involution.models.outputs import outputs_of
    >>> layers = [keras.Input((4,)), keras.layers.Dense(2)]
    >>> outputs_of(keras.Sequential(layers))
    'logits'
    >>> outputs_of(keras.Sequential([*layers, keras.layers.Softmax()]))
    'probabilities'
    """
    return PROBABILITIES if _ends_in_softmax(model.inputs, model.outputs) else LOGITS


def _ends_in_softmax(inputs, outputs) -> bool:
    (output,) = tree.flatten(outputs)
    # A model of these tensors names the operation that computes the output.
    graph = keras.Model(inputs, output, name="graph")
    (name,) = graph.output_names
    (operation,) = (each for each in graph.operations if each.name == name)
    if _is_softmax(operation):
        return True
    if isinstance(operation, keras.Model):
        known = getattr(operation, "inputs", None) and len(operation.outputs) == 1
        return bool(known) and _ends_in_softmax(operation.inputs, operation.outputs)
    if _keeps_sums(operation):
        return all(_ends_in_softmax(inputs, tensor) for tensor in tree.flatten(operation.input))
    return False


def _is_softmax(operation) -> bool:
    if isinstance(operation, keras.layers.Softmax) or type(operation) is _softmax_operation():
        return getattr(operation, "axis", None) in (-1, 1)  # of (batch, classes)
    return isinstance(
        operation, (keras.layers.Activation, keras.layers.Dense, keras.layers.EinsumDense)
    ) and (
        operation.activation in (keras.activations.softmax, keras.ops.softmax)
        or isinstance(operation.activation, keras.layers.Softmax)
    )


def _keeps_sums(operation) -> bool:
    """Whether the outputs sum to one if the inputs do."""
    if isinstance(operation, keras.layers.Activation):
        return operation.activation is keras.activations.linear
    return isinstance(operation, (keras.layers.Identity, keras.layers.Average))


@functools.cache
def _softmax_operation() -> type:
    """The class of ``keras.ops.softmax`` in a graph, which has no public name."""
    inputs = keras.Input((2,), name="input")
    graph = keras.Model(inputs, keras.ops.softmax(inputs), name="graph")
    return type(graph.operations[-1])
