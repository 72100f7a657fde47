"""Models exported with the custom operators of onnxruntime."""

import collections

import keras
import numpy as np
import pytest

import involution
from involution.export import BATCHES, ExportError, export, fusion
from involution.ops.native import library
from involution.utils.errors import InputError
from tests.export.test_export import (
    LAYERS,
    decoder,
    language_model,
    model_of,
    random_array,
    randomized,
    run_onnx,
)
from tests.support.backends import BACKEND, numpy
from tests.support.keras_io_formula import relative_error

pytestmark = pytest.mark.skipif(
    library.binding("onnxruntime")[0] is None, reason=str(library.binding("onnxruntime")[1])
)

# Operators of the domain in each file; the others have standard operations.
NODES = {
    "the example's layer": ["Involution"],
    "channels first": ["Involution"],
    "static": ["Involution"],
    "custom generator": ["Involution"],
    "all options": ["Involution"],
    "upsampling": ["Involution"],
    "causal": ["Involution"],
    "local attention": ["Involution"],
    "transposed": [],
}
REGULAR = ("odd sizes with strides", "local attention", "upsampling")
EACH = [pytest.param(name, marks=() if name in REGULAR else pytest.mark.slow) for name in LAYERS]


def nodes_of(path):
    import onnx

    graph = onnx.load(path).graph
    return [node for node in graph.node if node.domain == "involution"], graph


@pytest.mark.long
@pytest.mark.parametrize("name", EACH)
def test_a_layer_matches(tmp_path, name):
    shape, make = LAYERS[name]
    model = model_of(make(), *shape)
    result = export(model, tmp_path / "model.onnx", operator="native")
    nodes, _ = nodes_of(result.path)
    assert [n.op_type for n in nodes] == NODES.get(name, ["FusedInvolution"])
    for batch in BATCHES:
        x = random_array(batch, *shape)
        want = model(x, training=False)
        want = want if isinstance(want, (list, tuple)) else [want]
        for got, expected in zip(run_onnx(result.path, x).values(), want, strict=True):
            # A softmax of large logits amplifies rounding errors.
            assert relative_error(got, numpy(expected)) < 3e-5


@pytest.mark.long
@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        pytest.param(decoder, ((4, 5, 3), (6, 3, 3)), marks=pytest.mark.slow),
        (language_model, ((11, 16), (6, 16))),
    ],
)
def test_open_sizes(tmp_path, make, sizes):
    model, result = make(), None
    for shape in sizes:
        if BACKEND == "jax":  # its exporter requires all sizes but the batch's
            result = export(model, tmp_path / "m.onnx", input_shape=shape, operator="native")
        elif result is None:
            result = export(model, tmp_path / "m.onnx", operator="native")
        for batch in BATCHES:
            x = random_array(batch, *shape)
            (got,) = run_onnx(result.path, x).values()
            assert relative_error(got, numpy(model(x, training=False))) < 1e-5


@pytest.mark.slow
def test_volumes(tmp_path):
    model = model_of(involution.Involution3D(3, strides=2), 5, 4, 5, 16)
    for operator in ("portable", "native"):
        result = export(model, tmp_path / "model.onnx", operator=operator)
        x = random_array(2, 5, 4, 5, 16)
        assert relative_error(run_onnx(result.path, x)["output"], numpy(model(x))) < 1e-5


def block(data_format="channels_last", output="convolution"):
    """Convolution, involution, normalization and ReLU, as in RedNet."""
    shape = (13, 11, 8) if data_format == "channels_last" else (8, 13, 11)
    inputs = keras.Input(shape)
    axis = -1 if data_format == "channels_last" else 1
    x = involution.Involution2D(3, groups=2, data_format=data_format)(inputs)
    y = keras.layers.BatchNormalization(axis)(x)
    if output == "both":
        return randomized(keras.Model(inputs, [x, y]))
    if output == "normalization":
        return randomized(keras.Model(inputs, y))
    y = keras.layers.ReLU()(y)
    y = keras.layers.Conv2D(5, 1, data_format=data_format)(y)
    return randomized(keras.Model(inputs, y))


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "fused"),
    [
        (block, True),
        pytest.param(lambda: block("channels_first"), False, marks=pytest.mark.slow),
        pytest.param(lambda: block(output="both"), False, marks=pytest.mark.slow),
        pytest.param(lambda: block(output="normalization"), None, marks=pytest.mark.slow),
    ],
)
def test_normalization_is_part_of_the_operator(tmp_path, model, fused):
    model = model()
    result = export(model, tmp_path / "model.onnx", operator="native")
    (node,), graph = nodes_of(result.path)
    if fused is not None:
        assert (len(node.input) == 6) == fused
    if fused:
        counts = collections.Counter(node.op_type for node in graph.node)
        assert {a.name: a.i for a in node.attribute}["relu"] == 1
        assert not {"Mul", "Sub", "Div", "BatchNormalization"} & counts.keys()
        assert counts["Relu"] == 1  # of the generator
    x = random_array(3, *model.input_shape[1:])
    for got, want in zip(
        run_onnx(result.path, x).values(), keras.tree.flatten(model(x)), strict=True
    ):
        assert relative_error(got, numpy(want)) < 1e-5


class Scaled(keras.layers.Layer):
    """Constants that broadcast one channel to three."""

    def call(self, x):
        scale, offset = (
            keras.ops.convert_to_tensor(np.array(values, "float32"))
            for values in ([1, 2, 3], [1, 0, 2])
        )
        return x * scale + offset


@pytest.mark.slow
def test_a_constant_with_more_channels_stays_an_operation(tmp_path):
    inputs = keras.Input((9, 8, 1))
    y = involution.Involution2D(3, groups=1, reduction_ratio=1)(inputs)
    model = randomized(keras.Model(inputs, Scaled()(y)))
    result = export(model, tmp_path / "model.onnx", operator="native")
    x = random_array(2, 9, 8, 1)
    assert relative_error(run_onnx(result.path, x)["output"], numpy(model(x))) < 1e-5


def conditional(*names):
    """A graph: the operator, a scale, and an If whose branch reads one of these names."""
    from onnx import TensorProto, helper

    def value(name, shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    operator = helper.make_node(
        *("FusedInvolution", ["x", "h", "w", "b"], ["y"]),
        domain="involution",
        kernel_shape=[3],
        channels=2,
    )
    branches = {
        f"{which}_branch": helper.make_graph(
            [helper.make_node("Identity", [name], [which])], which, [], [value(which, None)]
        )
        for which, name in zip(("then", "else"), names, strict=True)
    }
    nodes = [
        operator,
        helper.make_node("Mul", ["y", "scale"], ["scaled"]),
        helper.make_node("Relu", ["scaled"], ["activated"]),
        helper.make_node("If", ["condition"], ["chosen"], **branches),
    ]
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [2, 1], [2.0, -3.0])
    outputs = [value("activated", None), value("chosen", None)]
    return helper.make_graph(nodes, "graph", [], outputs, [scale])


@pytest.mark.any_backend
@pytest.mark.parametrize("names", [("y", "x"), ("x", "scaled"), ("scale", "x")])
def test_values_and_constants_of_subgraphs_are_kept(names):
    graph = conditional(*names)
    fusion.fuse_scaling(graph)
    fused = names == ("scale", "x")
    kinds = [node.op_type for node in graph.node]
    assert kinds == ["FusedInvolution", *([] if fused else ["Mul"]), "Relu", "If"]
    assert "scale" in {tensor.name for tensor in graph.initializer}
    # The attribute is for the fusion only.
    assert "channels" not in {attribute.name for attribute in graph.node[0].attribute}


@pytest.mark.long
def test_constant_outputs_are_kept(tmp_path):
    class Anchors(keras.layers.Layer):
        def call(self, x):
            return keras.ops.convert_to_tensor(np.arange(12, dtype="float32").reshape(1, 3, 4))

        def compute_output_spec(self, x):
            return keras.KerasTensor((1, 3, 4))

    inputs = keras.Input((9, 4))
    y = involution.Involution1D(3)(inputs)
    model = keras.Model(inputs, {"boxes": y, "anchors": Anchors()(y)})
    for operator in ("portable", "native"):
        path = export(model, tmp_path / "model.onnx", operator=operator).path
        anchors = run_onnx(path, random_array(1, 9, 4))["anchors"]
        assert anchors.ravel().tolist() == list(range(12))


@pytest.mark.slow
def test_recurrent_layers(tmp_path):
    inputs = keras.Input((8, 4))
    y = keras.layers.LSTM(5, return_sequences=True)(involution.Involution1D(3)(inputs))
    model = randomized(keras.Model(inputs, y))
    for operator in ("portable", "native"):
        assert export(model, tmp_path / "model.onnx", operator=operator).error < 1e-5


@keras.saving.register_keras_serializable("tests")
class Clip(keras.layers.Layer):
    """Its configuration does not contain the limit."""

    def __init__(self, limit=1000.0, **options):
        super().__init__(**options)
        self.limit = limit

    def call(self, x):
        return keras.ops.clip(x, -self.limit, self.limit)


@pytest.mark.long
def test_layers_of_others_are_not_made_again(tmp_path):
    inputs = keras.Input((8, 4))
    model = keras.Model(inputs, involution.Involution1D(3)(Clip(6.0)(inputs)))
    path = export(model, tmp_path / "model.onnx").path
    x = 100 * random_array(2, 8, 4)
    assert relative_error(run_onnx(path, x)["output"], numpy(model(x))) < 1e-5


@pytest.mark.long
def test_the_file_requires_the_operators(tmp_path):
    import onnxruntime

    model = model_of(involution.Involution1D(3), 9, 4)
    path = export(model, tmp_path / "model.onnx", operator="native").path
    with pytest.raises(Exception, match="involution"):
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_wrong_arguments_raise(tmp_path, monkeypatch):
    model = model_of(involution.Involution1D(3), 9, 4)
    path = tmp_path / "model.onnx"
    with pytest.raises(
        InputError, match=r"`operator` must be one of portable, native\. Received: "
    ):
        export(model, path, operator="fast")
    format = {"tensorflow": "saved_model", "torch": "pt2"}.get(BACKEND)
    if format is not None:
        with pytest.raises(InputError, match=r"native operator is for the format onnx\. Received"):
            export(model, tmp_path / "model", format, operator="native")
    monkeypatch.setattr(library, "core", lambda: (None, "no compiler"))
    with pytest.raises(InputError, match=r"require the compiled kernels. Received: no compiler"):
        export(model, path, operator="native")
    assert not list(tmp_path.iterdir())


def test_the_implementation_runs_in_exported_graphs_only():
    x = np.ones((1, 4, 6), "float32")
    kernel = np.ones((1, 4, 3, 1), "float32")
    with pytest.raises(Exception, match=r"export|not implemented|Evaluation rule"):
        involution.ops.involution(x, kernel, 3, implementation="onnxruntime")
    with pytest.raises(ValueError, match="onnxruntime: it supports float32"):
        involution.ops.involution(
            x.astype("float64"), kernel.astype("float64"), 3, implementation="onnxruntime"
        )


def test_a_function_of_python_is_refused(tmp_path):
    if BACKEND != "tensorflow":
        pytest.skip("TensorFlow's graphs have such functions")
    import tensorflow as tf

    class Layer(keras.layers.Layer):
        def call(self, x):
            return tf.ensure_shape(tf.numpy_function(lambda v: v, [x], x.dtype), x.shape)

    model = model_of(Layer(), 9, 4)
    with pytest.raises(ExportError, match="PyFunc"):
        export(model, tmp_path / "model.onnx")
