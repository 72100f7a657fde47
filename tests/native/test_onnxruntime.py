"""The core in onnxruntime: custom operators in graphs made by hand, without an exporter."""

import concurrent.futures
import dataclasses
import itertools

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import involution.onnx
from involution.ops.native import library
from involution.utils.errors import InputError
from tests.support.memory import on_linux, resident_memory
from tests.support.oracle import random_calls, relative

pytestmark = [
    pytest.mark.any_backend,
    pytest.mark.skipif(
        library.binding("onnxruntime")[0] is None, reason=str(library.binding("onnxruntime")[1])
    ),
]

CALLS = [
    dataclasses.replace(call, data_format="channels_first") for call in random_calls(80, seed=11)
]


def model(operator, shapes, rank, **attributes):
    """A graph of one node, serialized; ``shapes`` by the names of its inputs."""
    node = helper.make_node(operator, list(shapes), ["y"], domain="involution", **attributes)
    inputs = [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in shapes.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)
    proto = helper.make_model(
        helper.make_graph([node], "graph", inputs, [output]),
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("involution", 1)],
        ir_version=9,
    )
    return proto.SerializeToString()


def session(proto, threads=2):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    involution.onnx.register(options)
    return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


def run(proto, arrays, threads=2):
    (y,) = session(proto, threads).run(None, arrays)
    return y


def attributes_of(call):
    attributes = {
        "kernel_shape": call.kernel_size,
        "strides": call.strides,
        "dilations": call.dilation_rate,
        "group": call.groups,
        "interleaved": int(call.group_layout == "interleaved"),
    }
    if call.upsampling is not None:
        attributes["upsampling"] = call.upsampling
    if call.padding == "same":
        return {**attributes, "same": 1}
    spans = [(k - 1) * d for k, d in zip(call.kernel_size, call.dilation_rate, strict=True)]
    pairs = {
        "valid": [(0, 0) for _ in spans],
        "symmetric": [(span // 2, span // 2) for span in spans],
        "causal": [(span, 0) for span in spans],
    }.get(call.padding, call.padding)
    return {**attributes, "pads": [pair[end] for end in (0, 1) for pair in pairs]}


def generator_arrays(call, hidden_channels=5, seed=3):
    """The operands of a generator, and the kernels that it generates."""
    rng = np.random.default_rng(seed)
    columns = call.taps * call.groups
    hidden = rng.standard_normal((call.batch, hidden_channels, *call.output_sizes), "float32")
    weight = rng.standard_normal((hidden_channels, columns), "float32")
    bias = rng.standard_normal(columns, "float32")
    kernel = np.tensordot(hidden.astype("float64"), weight, ([1], [0])) + bias
    kernel = np.moveaxis(kernel, -1, 1).reshape(call.kernel_shape)
    return {"hidden": hidden, "weight": weight, "bias": bias}, kernel


def shapes_of(arrays, *unknown):
    """Shapes with a name for the batch and None for other unknown axes."""
    return {
        name: ["batch", *(None if axis in unknown else n for axis, n in enumerate(a.shape[1:], 1))]
        if name in ("x", "kernel", "hidden")
        else a.shape
        for name, a in arrays.items()
    }


@pytest.mark.parametrize("call", CALLS, ids=range(len(CALLS)))
def test_operators_equal_the_oracle(call):
    rank = len(call.sizes) + 2
    x, kernel = (a.astype("float32") for a in call.arrays()[:2])
    arrays = {"x": x, "kernel": kernel}
    proto = model("Involution", shapes_of(arrays), rank, **attributes_of(call))
    assert relative(run(proto, arrays), call.involution(x, kernel)[0]) < 1e-6
    operands, kernel = generator_arrays(call)
    arrays = {"x": x, **operands}
    spatial = range(2, rank)
    proto = model("FusedInvolution", shapes_of(arrays, *spatial), rank, **attributes_of(call))
    expected = call.involution(x, kernel)[0]
    assert relative(run(proto, arrays), expected) < 2e-6
    rng = np.random.default_rng(5)
    scale, offset = rng.standard_normal((2, call.channels), "float32")
    arrays.update(scale=scale, offset=offset)
    channel = (slice(None), *[None] * (rank - 2))
    expected = expected * scale[channel] + offset[channel]
    for relu in (0, 1):
        proto = model("FusedInvolution", shapes_of(arrays), rank, relu=relu, **attributes_of(call))
        want = np.maximum(expected, 0) if relu else expected
        assert relative(run(proto, arrays), want) < 2e-6


def test_calls_cover_every_kind():
    kinds = {(len(c.sizes), c.group_layout) for c in CALLS}
    assert kinds == set(itertools.product((1, 2, 3), ("contiguous", "interleaved")))
    assert {c.padding for c in CALLS if isinstance(c.padding, str)} >= {"same", "symmetric"}
    assert any(c.upsampling is not None for c in CALLS)
    assert any(max(c.strides) > 1 and c.padding == "same" for c in CALLS)


def photograph(batch=2):
    """A call large enough for several tasks, and its serialized graph."""
    call = dataclasses.replace(
        CALLS[0],
        batch=batch,
        sizes=(37, 29),
        channels=24,
        kernel_size=(7, 7),
        strides=(1, 1),
        padding="same",
        dilation_rate=(1, 1),
        groups=3,
        group_layout="contiguous",
        upsampling=None,
    )
    arrays = {"x": call.arrays()[0].astype("float32"), **generator_arrays(call)[0]}
    return arrays, model("FusedInvolution", shapes_of(arrays), 4, **attributes_of(call))


def test_results_do_not_depend_on_the_number_of_threads():
    arrays, proto = photograph()
    assert np.array_equal(run(proto, arrays, 1), run(proto, arrays, 4))


def test_nodes_after_it_get_the_size_of_its_output():
    arrays, proto = photograph()
    proto = onnx.load_from_string(proto)
    proto.graph.node.append(helper.make_node("Shape", ["y"], ["shape"]))
    proto.graph.output.append(helper.make_tensor_value_info("shape", TensorProto.INT64, [4]))
    loaded = session(proto.SerializeToString())
    y, shape = loaded.run(None, arrays)
    assert tuple(shape) == y.shape
    assert loaded.get_outputs()[0].shape == ["batch", 24, 37, 29]


FUSED_SHAPES = {
    "x": ["batch", 6, 9, 8],
    "hidden": ["batch", 4, 9, 8],
    "weight": [4, 18],
    "bias": [18],
}


@pytest.mark.parametrize(
    ("changed", "attributes", "rule"),
    [
        ({}, {"kernel_shape": None}, r"`kernel_shape` must have one, two or three integers"),
        ({}, {"kernel_shape": [3] * 4}, r"`kernel_shape` must have one, two or three integers"),
        ({}, {"kernel_shape": [0, 3]}, r"`kernel_shape` must be from 1 to .* \(0, 3\)"),
        ({}, {"strides": [0, 1]}, r"`strides` must be from 1 to .* Received: \(0, 1\)"),
        ({}, {"strides": [1]}, r"`strides` must have 2 integers. Received: \(1\)"),
        ({}, {"dilations": [1, -1]}, r"`dilations` must be from 1 "),
        ({}, {"dilations": [1, 2**62]}, r"`dilations` must be from 1 to 1099511627776"),
        ({}, {"same": 0, "pads": [1, 1]}, r"`pads` must have 4 integers. Received: \(1, 1\)"),
        ({}, {"same": 0, "pads": [1, 1, -1, 1]}, r"`pads` must be from 0 "),
        ({}, {"strides": [2.0]}, r"`strides` must consist of integers"),
        ({}, {"strides": 2.0}, r"`strides` must consist of integers"),
        ({}, {"strides": "2"}, r"`strides` must consist of integers"),
        ({}, {"pads": [1, 1, 1, 1]}, r"`pads` must be absent where `same` is 1"),
        ({}, {"upsampling": [2**39, 1]}, r"taps, groups and outputs must be smaller"),
        ({}, {"group": 4}, r"`group` must divide the number of channels. .* \(\?, 6, 9, 8\)"),
        ({}, {"group": 0}, r"`group` must be from 1 "),
        ({}, {"same": 2}, r"`same` must be from 0 to 1. Received: \(2\)"),
        ({}, {"upsampling": [2, 1], "strides": [1, 2]}, r"`strides` must be 1 where `upsampling`"),
        ({}, {"relu": 1}, r"`scale` and `offset` are required together, and where `relu` is 1"),
        ({"hidden": ["batch", 4, 9, 7]}, {}, r"`hidden` must have the shape \(\?, 4, 9, 8\)"),
        ({"hidden": ["batch", 5, 9, 8]}, {}, r"`hidden` must have the shape \(\?, 4, 9, 8\)"),
        ({"weight": [4, 9]}, {}, r"`weight` must have the shape \(4, 18\) .* \(4, 9\)"),
        ({"weight": [0, 18]}, {}, r"`weight` must have a row for each hidden channel"),
        ({"bias": [17]}, {}, r"`bias` must have the shape \(18\)"),
        ({"x": ["batch", 6, 9]}, {}, r"`x` must have a batch axis, a channel axis and"),
        ({"scale": [6]}, {}, r"`scale` and `offset` are required together"),
        ({"scale": [6], "offset": [5]}, {}, r"`offset` must have the shape \(6\)"),
        ({}, {"same": 0, "kernel_shape": [10, 3]}, r"The window must fit into the padded input"),
    ],
)
def test_a_session_refuses_wrong_nodes(changed, attributes, rule):
    shapes = {**FUSED_SHAPES, **changed}
    attributes = {"kernel_shape": [3, 3], "group": 2, "same": 1, **attributes}
    attributes = {name: value for name, value in attributes.items() if value is not None}
    with pytest.raises(Exception, match=rule):
        session(model("FusedInvolution", shapes, 4, **attributes))


def test_a_run_refuses_wrong_shapes():
    arrays, _ = photograph()
    # The session knows no sizes.
    shapes = {name: [None] * array.ndim for name, array in arrays.items()}
    attributes = {"kernel_shape": [7, 7], "group": 3, "same": 1}
    loaded = session(model("FusedInvolution", shapes, 4, **attributes))
    loaded.run(None, arrays)
    for name, axis in (("hidden", 0), ("hidden", 3), ("weight", 0), ("bias", 0), ("x", 1)):
        wrong = {**arrays, name: np.delete(arrays[name], 0, axis)}
        with pytest.raises(Exception, match=r"involution: .* Received"):
            loaded.run(None, wrong)
    for batch in (0, 1):
        part = {k: v[:batch] if k in ("x", "hidden") else v for k, v in arrays.items()}
        assert loaded.run(None, part)[0].shape == (batch, 24, 37, 29)


def test_products_of_sizes_do_not_overflow():
    """2^60 taps of 16 groups are 0 of 2^64, as many as an empty weight has."""
    huge = 2**20
    shapes = {"x": [None] * 5, "hidden": [None] * 5, "weight": [None] * 2, "bias": [None]}
    pads = [huge - 1] * 3 + [0] * 3
    with pytest.raises(Exception, match="taps, groups and outputs must be smaller"):
        session(
            model(
                *("FusedInvolution", shapes, 5),
                **{"kernel_shape": [huge] * 3, "pads": pads, "group": 16},
            )
        )
    # 16777232 * upsampling is 2^64 + 16.
    shapes = {"x": [None] * 3, "kernel": [None] * 4}
    loaded = session(model("Involution", shapes, 3, kernel_shape=[1], upsampling=[1099510579201]))
    x, kernel = np.ones((1, 1, 16777232), "float32"), np.ones((1, 1, 1, 16), "float32")
    with pytest.raises(Exception, match="taps, groups and outputs must be smaller"):
        loaded.run(None, {"x": x, "kernel": kernel})


def test_inputs_without_a_name_are_absent():
    arrays, proto = photograph()
    expected = run(proto, arrays)
    proto = onnx.load_from_string(proto)
    proto.graph.node[0].input.extend(["", ""])
    assert np.array_equal(run(proto.SerializeToString(), arrays), expected)


@pytest.mark.long
def test_ten_sessions_at_once():
    arrays, proto = photograph()
    expected = run(proto, arrays, 1)

    def work(_):
        loaded = session(proto)
        return all(np.array_equal(loaded.run(None, arrays)[0], expected) for _ in range(20))

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        assert all(pool.map(work, range(10)))


@on_linux
@pytest.mark.long
def test_a_thousand_runs_do_not_grow():
    arrays, proto = photograph()
    loaded = session(proto)
    for _ in range(100):
        loaded.run(None, arrays)
    before = resident_memory()
    for _ in range(1000):
        loaded.run(None, arrays)
    assert resident_memory() - before < 1e6  # the output of each run has 206 kB


@pytest.mark.long
def test_the_process_needs_no_framework(tmp_path):
    from tests.support.backends import fresh_process

    arrays, proto = photograph()
    (tmp_path / "model.onnx").write_bytes(proto)
    np.savez(tmp_path / "arrays.npz", **arrays)
    fresh_process(f"""
import sys, numpy as np, onnxruntime, involution.onnx
options = onnxruntime.SessionOptions()
involution.onnx.register(options)
session = onnxruntime.InferenceSession({str(tmp_path / "model.onnx")!r}, options)
with np.load({str(tmp_path / "arrays.npz")!r}) as arrays:
    np.save({str(tmp_path / "y.npy")!r}, session.run(None, dict(arrays))[0])
assert not {{"keras", "tensorflow", "jax", "torch"}} & sys.modules.keys()
""")
    assert np.array_equal(np.load(tmp_path / "y.npy"), run(proto, arrays))


def test_the_path_is_that_of_the_library():
    path = involution.onnx.library_path()
    assert path.is_file()
    assert (path.parent / path.name.replace("_onnxruntime", "")).is_file()


def test_an_installation_without_the_library_has_a_reason(monkeypatch):
    monkeypatch.setattr(library, "find", lambda name: None)
    with pytest.raises(
        InputError, match=r"require the compiled kernels. Received: .* was not built"
    ):
        involution.onnx.library_path()
    monkeypatch.setattr(library, "core", lambda: (None, "no compiler"))
    with pytest.raises(InputError, match=r"require the compiled kernels. Received: no compiler"):
        involution.onnx.register(onnxruntime.SessionOptions())
