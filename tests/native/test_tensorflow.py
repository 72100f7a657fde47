"""``native`` on TensorFlow: eager, in graphs, under XLA, and saved."""

import dataclasses
import gc
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import involution
from involution.ops import native
from involution.ops.native import library, tensorflow
from involution.ops.problem import problem_of
from involution.ops.window import Window
from tests.support import native_core
from tests.support.backends import (
    IMPLEMENTATIONS,
    assert_equals_oracle,
    numpy,
    operation,
    requires_native,
    tensors,
)
from tests.support.oracle import Call

pytestmark = requires_native

CALL = Call(2, (5, 7), 12, (3, 2), (2, 1), "same", (1, 2), 3)
FIRST = dataclasses.replace(CALL, data_format="channels_first", group_layout="interleaved")
LINE = Call(2, (7,), 6, (4,), (1,), "symmetric", (1,), 2)
each_call = pytest.mark.parametrize("call", [CALL, FIRST, LINE])


def specs(call, *, unknown):
    """Of x and kernel; unknown are the "batch", or the batch and the spatial "sizes"."""
    spatial = range(1, 1 + len(call.sizes))
    if call.data_format == "channels_first":
        spatial = range(2, 2 + len(call.sizes))
    result = []
    for shape, offset in ((call.x_shape, 0), (call.kernel_shape, 1)):
        shift = offset if call.data_format == "channels_first" else 0
        axes = {0} if unknown == "batch" else {0, *(axis + shift for axis in spatial)}
        sizes = [None if axis in axes else n for axis, n in enumerate(shape)]
        result.append(tf.TensorSpec(sizes, "float64"))
    return result


# --- Graphs ---------------------------------------------------------------------------------------


@each_call
def test_f14_one_trace_for_every_batch_size(call):
    traced = []

    def function(x, kernel):
        traced.append(None)
        return operation(call, "native")(x, kernel)

    program = tf.function(function, specs(call, unknown="batch"))
    for batch in (1, 2, 5):
        sized = dataclasses.replace(call, batch=batch)
        x, kernel = tensors(sized.arrays()[:2], "float64")
        assert_equals_oracle(sized, program(x, kernel), x, kernel)
    assert len(traced) == 1


@each_call
@pytest.mark.parametrize("unknown", ["batch", "sizes"])
def test_static_shapes_are_inferred(unknown, call):
    program = tf.function(operation(call, "native"), specs(call, unknown=unknown))
    shape = program.get_concrete_function().output_shapes
    expected = [None, *call.output_shape[1:]]
    if unknown == "sizes":
        first = 2 if call.data_format == "channels_first" else 1
        expected[first : first + len(call.sizes)] = [None] * len(call.sizes)
    assert shape.as_list() == expected


@each_call
def test_static_shapes_of_gradients_are_inferred(call):
    @tf.function
    def gradients(x, kernel):
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            y = operation(call, "native")(x, kernel)
        dx, dkernel = tape.gradient(y, [x, kernel])
        assert dx.shape.as_list() == [None, *call.x_shape[1:]]
        assert dkernel.shape.as_list() == [None, *call.kernel_shape[1:]]
        return dx, dkernel

    assert len(gradients.get_concrete_function(*specs(call, unknown="batch")).outputs) == 2


@each_call
def test_f17_second_derivatives_of_nested_tapes(call):
    arguments = tensors(call.arrays()[:2], "float64")
    results = {}
    for name in ("native", "reference"):
        with tf.GradientTape() as outer:
            outer.watch(arguments)
            with tf.GradientTape() as inner:
                inner.watch(arguments)
                y = tf.reduce_sum(operation(call, name)(*arguments) ** 3)
            first = inner.gradient(y, arguments)
            total = sum(tf.reduce_sum(tf.sin(g)) for g in first)
        results[name] = [numpy(g) for g in outer.gradient(total, arguments)]
    for value, want in zip(results["native"], results["reference"], strict=True):
        assert np.abs(want).max() > 0.1
        np.testing.assert_allclose(value, want, rtol=1e-9, atol=1e-9 * np.abs(want).max())


@pytest.mark.long
@pytest.mark.parametrize("kind", ["loop", "branch"])
def test_gradients_through_a_loop_and_through_a_branch(kind):
    call = dataclasses.replace(CALL, strides=(1, 1))
    x, kernel = tensors(call.arrays()[:2], "float64")

    def gradients(implementation):
        @tf.function
        def function(x, kernel):
            apply = operation(call, implementation)
            with tf.GradientTape() as tape:
                tape.watch([x, kernel])
                y = x
                if kind == "loop":
                    for _ in tf.range(3):
                        y = apply(y, kernel) / 4
                elif tf.reduce_sum(y) > -1e9:
                    y = apply(y, kernel)
            return tape.gradient(y, [x, kernel])

        return [numpy(g) for g in function(x, kernel)]

    for value, want in zip(gradients("native"), gradients("reference"), strict=True):
        np.testing.assert_allclose(value, want, rtol=1e-10, atol=1e-10)


def test_f23_vectorized_map_uses_a_loop(caplog):
    """TensorFlow cannot vectorize custom ops; it falls back to a loop and logs a warning."""
    x, kernel, _ = CALL.arrays()
    xs = tf.stack([x, 2 * x, 3 * x])
    y = tf.vectorized_map(lambda x: operation(CALL, "native")(x, tf.constant(kernel)), xs)
    for i in range(3):
        want, _ = CALL.involution((i + 1) * x, kernel)
        np.testing.assert_allclose(y[i], want, rtol=0, atol=1e-12)
    assert "Using a while_loop for converting Involution" in caplog.text


def _forward(function, tangents):
    def derivative(*tensors):
        with tf.autodiff.ForwardAccumulator(tensors, tangents) as accumulator:
            y = function(*tensors)
        return accumulator.jvp(y)

    return derivative


def _reverse(function):
    def squares(*tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            y = function(*tensors)
        return sum(tf.reduce_sum(g**3) for g in tape.gradient(y, tensors))

    return squares


# "rf" is reverse mode over forward mode. Other nestings contain one of these.
@pytest.mark.long
@pytest.mark.parametrize("modes", ["fr", "rf", pytest.param("ff", marks=pytest.mark.slow)])
@pytest.mark.parametrize("implementation", ["native", "taps", "fused"])
def test_f23_nested_modes_in_a_graph_equal_the_reference(implementation, modes):
    call = Call(1, (5, 4), 4, (3, 3), (2, 2), "same", (1, 1), 2)
    x, kernel, dy = call.arrays(0)
    random = np.random.default_rng(1)
    weight, bias = random.standard_normal((3, 18)), random.standard_normal(18)

    def loss(name):
        def function(x, kernel):
            if implementation == "fused":
                # The weight also depends on a differentiated variable.
                given = kernel[..., :3, 0], weight * tf.sin(tf.reduce_mean(kernel)), bias
                y = involution.ops.fused_involution(
                    x, *given, **call.arguments, implementation=name
                )
            else:
                y = operation(call, name)(x, kernel)
            return tf.reduce_sum(tf.sin(y) * dy)

        return function

    given = tensors((x, kernel), "float64")
    tangents = tuple(tensors([random.standard_normal(a.shape) for a in (x, kernel)], "float64"))

    def derivative(name):
        function = loss(name)
        for mode in reversed(modes):
            function = _forward(function, tangents) if mode == "f" else _reverse(function)
        return function

    expected = float(derivative("reference")(*given))
    value = float(tf.function(derivative(implementation))(*given))
    assert value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("compiled", [False, True])
def test_f28_gradients_use_the_values_before_an_assignment(compiled, implementation):
    """So does the output."""
    arrays = CALL.arrays()
    variables = [tf.Variable(a) for a in arrays[:2]]

    def function():
        with tf.GradientTape() as tape:
            y = operation(CALL, implementation)(*variables)
        for variable in variables:
            variable.assign_add(tf.ones_like(variable))
        return y, *tape.gradient(y, variables, arrays[2])

    results = (tf.function(function) if compiled else function)()
    for value, want in zip(results, native_core.expected(CALL, *arrays).values(), strict=True):
        np.testing.assert_allclose(numpy(value), want, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(numpy(variables[0]), arrays[0] + 1)


# --- XLA ------------------------------------------------------------------------------------------

IN_XLA = r"code compiled with jit_compile=True cannot call custom ops"


@pytest.mark.long
def test_f29_under_xla_taps_runs_and_native_raises(executed):
    x, kernel = tensors(CALL.arrays()[:2], "float64")
    y = tf.function(operation(CALL, None), jit_compile=True)(x, kernel)
    assert executed == ["taps"]
    assert_equals_oracle(CALL, y, x, kernel)
    executed.clear()
    with pytest.raises(ValueError, match=f"native: {IN_XLA}"):
        tf.function(operation(CALL, "native"), jit_compile=True)(x, kernel)
    assert executed == []


@pytest.mark.long
def test_f29_nested_graph_under_xla_uses_taps(executed):
    x, kernel = tensors(CALL.arrays()[:2], "float64")

    @tf.function(jit_compile=True)
    def outer(x, kernel):
        inner = tf.function(operation(CALL, None))
        return tf.cond(tf.reduce_sum(x) > -1e9, lambda: inner(x, kernel), lambda: inner(-x, kernel))

    assert_equals_oracle(CALL, outer(x, kernel), x, kernel)
    assert set(executed) == {"taps"}
    executed.clear()
    # Traced outside XLA, the same function is another graph.
    assert_equals_oracle(CALL, tf.function(operation(CALL, None))(x, kernel), x, kernel)
    assert executed == ["native"]


@pytest.mark.long
def test_f15_without_the_private_function_tensorflow_names_the_op(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow.python.ops.control_flow_util", None)
    x, kernel = tensors(CALL.arrays()[:2], "float64")
    assert_equals_oracle(CALL, tf.function(operation(CALL, None))(x, kernel), x, kernel)
    with pytest.raises(tf.errors.InvalidArgumentError, match="node involution_native"):
        tf.function(operation(CALL, "native"), jit_compile=True)(x, kernel)


@pytest.mark.long
@pytest.mark.parametrize(("jit_compile", "name"), [(False, "fused"), (True, "taps")])
def test_f29_model_is_trained_with_or_without_xla(jit_compile, name, executed):
    model = keras.Sequential([keras.Input((6, 6, 8)), involution.Involution2D(3, groups=2)])
    executed.clear()
    model.compile("sgd", "mse", jit_compile=jit_compile)
    images = np.ones((4, 6, 6, 8), "float32")
    history = model.fit(images, images, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert set(executed) == {name}


# --- Saving ---------------------------------------------------------------------------------------


def functional_model():
    inputs = [keras.Input(s[1:], dtype="float64") for s in (CALL.x_shape, CALL.kernel_shape)]
    return keras.Model(inputs, operation(CALL, None)(*inputs))


SAVERS = {
    "export": lambda model, path: model.export(path, verbose=False),
    "saved_model": tf.saved_model.save,
}
each_saver = pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)


@pytest.fixture
def frozen_objects():
    """Hides existing objects from the garbage collector. For its error message TensorFlow searches
    all objects for references to the tensor: for a minute, late in a run of all tests. They stay
    hidden, as those that exist after the collection of tests do."""
    gc.freeze()


@pytest.mark.long
@each_saver
def test_saving_a_model_with_custom_ops_raises(frozen_objects, save, tmp_path):
    with pytest.raises(AssertionError, match=r"native.* within involution.ops.force"):
        save(functional_model(), str(tmp_path / "model"))


LOADED = """
import sys, numpy as np, tensorflow as tf
path, arrays, result = sys.argv[1:]
with np.load(arrays) as stored:
    pair = [stored["x"], stored["kernel"]]
serve = tf.saved_model.load(path).signatures["serving_default"]
names = sorted(serve.structured_input_signature[1])
(y,) = serve(**dict(zip(names, map(tf.constant, pair)))).values()
np.save(result, y.numpy())
assert not any(name.split(".")[0] == "involution" for name in sys.modules)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "save",
    [pytest.param(SAVERS["export"], marks=pytest.mark.slow), SAVERS["saved_model"]],
    ids=["export", "saved_model"],
)
def test_model_saved_with_the_reference_runs_without_this_package(save, tmp_path):
    model = functional_model()
    with involution.ops.force_implementation("reference"):
        save(model, str(tmp_path / "model"))
    x, kernel, _ = CALL.arrays()
    np.savez(tmp_path / "arrays.npz", x=x, kernel=kernel)
    files = [tmp_path / name for name in ("model", "arrays.npz", "y.npy")]
    command = [sys.executable, "-c", LOADED, *map(str, files)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    want, _ = CALL.involution(x, kernel)
    np.testing.assert_allclose(np.load(files[-1]), want, rtol=0, atol=1e-12)


# --- ONNX, devices, missing bindings and threads --------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")  # tf2onnx's own
def test_onnx_export_with_custom_ops_raises(tmp_path):
    model = keras.Sequential([keras.Input((4, 4, 4)), involution.Involution2D(3)])
    model(np.ones((1, 4, 4, 4), "float32"))
    message = (
        r'export within `with involution\.ops\.force_implementation\("portable"\):`'
        r".* Received: a graph"
    )
    with pytest.raises(NotImplementedError, match=message):
        model.export(str(tmp_path / "model.onnx"), format="onnx", verbose=False)


def test_f16_visible_gpu_raises(monkeypatch):
    x, kernel = tensors(CALL.arrays()[:2], "float32")
    problem = problem_of(Window(**CALL.arguments), x)
    assert native.unsupported_reason(problem) is None
    gpu = types.SimpleNamespace(name="/physical_device:GPU:0", device_type="GPU")
    listed = tf.config.list_physical_devices
    monkeypatch.setattr(
        tf.config,
        "list_physical_devices",
        lambda kind=None: [gpu] if kind == "GPU" else listed(kind),
    )
    reason = "it runs on CPUs, and TensorFlow sees a GPU"
    assert native.unsupported_reason(problem) == reason
    with pytest.raises(ValueError, match=f"native: {reason}"):
        operation(CALL, "native")(x, kernel)
    assert_equals_oracle(CALL, operation(CALL, None)(x, kernel), x, kernel)


def reason_with(monkeypatch, file):
    """Why ``native`` is unsupported with this file as its binding."""
    monkeypatch.setattr(
        library,
        "find",
        lambda name, find=library.find: (
            file if name == "libinvolution_tensorflow.so" else find(name)
        ),
    )
    tensorflow._op_library.cache_clear()
    x, kernel = (keras.KerasTensor(a.shape) for a in CALL.arrays()[:2])
    try:
        return dict(involution.ops.implementations(x, kernel, **CALL.arguments))["native"]
    finally:
        tensorflow._op_library.cache_clear()


def test_core_without_its_binding_has_a_reason(monkeypatch):
    assert reason_with(monkeypatch, None) == (
        "the package was installed without its binding for tensorflow: it was not built"
    )


def test_binding_that_cannot_be_loaded_has_a_reason(monkeypatch, tmp_path):
    file = tmp_path / "libinvolution_tensorflow.so"
    file.write_text("no library")
    assert reason_with(monkeypatch, file).startswith("TensorFlow cannot load it: ")


@pytest.mark.parametrize(("setting", "threads"), [(3, 3), (0, 5)])
def test_core_uses_the_intra_op_threads_of_tensorflow(setting, threads, monkeypatch):
    """The setting 0 means all available CPUs."""
    get = "get_intra_op_parallelism_threads"
    monkeypatch.setattr(tf.config.threading, get, lambda: setting)
    monkeypatch.setattr(library, "available_cpus", lambda: 5)
    program = tf.function(operation(CALL, "native"), specs(CALL, unknown="batch"))
    operations = program.get_concrete_function().graph.get_operations()
    (custom_op,) = (o for o in operations if o.type.startswith("Involution"))
    assert custom_op.get_attr("threads") == threads
