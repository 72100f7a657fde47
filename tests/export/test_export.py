"""Files for other runtimes, run here by those runtimes and not by the exporter's own check."""

import functools
import pathlib
import sys

import keras
import numpy as np
import pytest

import involution
from involution.export import api as exporting
from involution.export.api import BATCHES, FORMATS, LIMIT, ExportError, export
from involution.utils.errors import InputError
from tests.support.backends import BACKEND, fresh_process, missing, numpy
from tests.support.keras_io_formula import randomize, relative_error

WRITTEN = {
    "tensorflow": ("onnx", "saved_model"),
    "jax": ("onnx",),
    "torch": ("onnx", "pt2"),
}[BACKEND]
OWN = [format for format in WRITTEN if format != "onnx"]


def model_of(layer, *shape, name=None):
    inputs = keras.Input(shape, name=name)
    return random_weights(keras.Model(inputs, layer(inputs)))


def random_weights(model):
    randomize(model)
    return model


def some(*shape, seed=7):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def run_onnx(path, *arrays):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    results = session.run(None, dict(zip(names, arrays, strict=True)))
    return dict(zip((value.name for value in session.get_outputs()), results, strict=True))


LOADED = {
    "saved_model": """
import tensorflow as tf
loaded = tf.saved_model.load({path!r})
run = lambda x: loaded.serve(tf.constant(x))["output"].numpy()
""",
    "pt2": """
import torch
loaded = torch.export.load({path!r}).module()
run = lambda x: loaded(torch.from_numpy(x))["output"].detach().numpy()
""",
}
FRESH = """
import sys, numpy as np
with np.load({stored!r}) as arrays:
    np.savez({computed!r}, *map(run, arrays.values()))
assert not [m for m in sys.modules if m.startswith("involution")]
"""


def run_fresh(path, format, xs, tmp_path):
    """The outputs that a process computes which has not imported the package."""
    files = {name: str(tmp_path / f"{name}.npz") for name in ("stored", "computed")}
    np.savez(files["stored"], *xs)
    fresh_process((LOADED[format] + FRESH).format(path=str(path), **files))
    with np.load(files["computed"]) as results:
        return [*results.values()]


@functools.cache
def sequence():
    """A model that every exporter takes in a second or two."""
    return model_of(involution.Involution1D(3, 2, group_channels=2), 9, 4)


# --- ONNX ----------------------------------------------------------------------------------------


def test_onnx_of_the_inn_gives_its_numbers(tmp_path):
    model = random_weights(involution.models.inn())
    done = export(model, tmp_path / "inn.onnx")
    assert (done.inputs, done.outputs, done.batches) == (("input",), ("output",), (1, 5))
    assert done.error <= LIMIT
    assert done.runtime.startswith("onnxruntime ")
    assert done.bytes == done.path.stat().st_size
    assert [file.name for file in tmp_path.iterdir()] == ["inn.onnx"]
    for batch in *BATCHES, 3:
        x = some(batch, 32, 32, 3)
        got = run_onnx(done.path, x)["output"]
        assert relative_error(got, numpy(model(x, training=False))) < 1e-5


def generator_of_ones_own():
    class Mine(keras.layers.Layer):
        kernel_size = groups = strides = None

        def build(self, shape):
            self.convolution = keras.layers.Conv2D(9 * self.groups, 3, self.strides, "same")
            self.convolution.build(shape)

        def call(self, features):
            return self.convolution(features)

    return Mine()


LAYERS = {
    "odd sizes with strides": ((33, 20, 32), lambda: involution.Involution2D(7, strides=2)),
    "the example's layer": ((9, 8, 6), lambda: involution.Involution(6, 2, 3, 2, 2)),
    "channels first": (
        (16, 9, 8),
        lambda: involution.Involution2D(3, 2, "symmetric", data_format="channels_first"),
    ),
    "dilated and valid": ((13, 11, 8), lambda: involution.Involution2D(3, 1, "valid", 2)),
    "sequences": ((31, 16), lambda: involution.Involution1D(5, strides=2)),
    "a generator of one's own": (
        (9, 8, 16),
        lambda: involution.Involution2D(3, 2, kernel_generator=generator_of_ones_own()),
    ),
    "local attention": (
        (7, 6, 8),
        lambda: involution.Involution2D(3, kernel_generator="pairwise_attention"),
    ),
    "contextual": (
        (9, 6, 16),
        lambda: involution.Involution2D(3, 2, kernel_generator="contextual"),
    ),
    "static": ((9, 6, 16), lambda: involution.Involution2D(3, 2, kernel_generator="static")),
    "all options": (
        (7, 6, 8),
        lambda: involution.Involution2D(
            3, filters=5, kernel_softmax=True, kernel_dropout=0.3, return_kernel=True
        ),
    ),
    "pooling": (
        (13, 12, 4),
        lambda: keras.Sequential(
            [
                keras.layers.MaxPooling2D(3, 2, "same"),
                involution.Involution2D(3),
                keras.layers.MaxPooling2D((1, 2)),
            ]
        ),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_onnx_of_a_layer_gives_its_numbers(tmp_path, name):
    import onnx

    shape, make = LAYERS[name]
    model = model_of(make(), *shape)
    done = export(model, tmp_path / "model.onnx")
    proto = onnx.load(done.path)
    onnx.checker.check_model(proto, full_check=True)
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 18)]
    assert not proto.functions
    assert not [node.op_type for node in proto.graph.node if node.domain or node.metadata_props]
    sizes = proto.graph.input[0].type.tensor_type.shape.dim
    assert [size.dim_param or size.dim_value for size in sizes] == ["batch", *shape]
    for batch in BATCHES:
        x = some(batch, *shape)
        want = model(x, training=False)
        want = want if isinstance(want, (list, tuple)) else [want]
        for got, true in zip(run_onnx(done.path, x).values(), want, strict=True):
            assert relative_error(got, numpy(true)) < 1e-5


@pytest.mark.parametrize("generator", ["bottleneck", "contextual"])
def test_onnx_of_volumes(tmp_path, generator):
    layer = involution.Involution3D(3, strides=2, kernel_generator=generator)
    model = model_of(layer, 5, 4, 5, 16)
    if BACKEND == "jax" and generator == "contextual":
        with pytest.raises(ExportError, match=r"jax cannot write .* NotImplementedError: .*conv"):
            export(model, tmp_path / "model.onnx")
        assert not list(tmp_path.iterdir())
        return
    done = export(model, tmp_path / "model.onnx")
    x = some(2, 5, 4, 5, 16)
    assert relative_error(run_onnx(done.path, x)["output"], numpy(model(x))) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("format", WRITTEN)
def test_rednet26_gives_its_numbers(tmp_path, format):
    sizes = (65, 47, 3) if BACKEND == "jax" else (None, None, 3)
    model = involution.models.RedNet26(sizes, classes=7)
    rng = np.random.default_rng(0)
    for weight in model.weights:  # normalizations that start as 0 would hide their blocks
        if weight.path.endswith("gamma"):
            weight.assign(rng.uniform(0.3, 0.7, tuple(weight.shape)))
    done = export(model, tmp_path / "rednet26", format)
    print(f"{BACKEND}, {format}: {done.error:.1e} by {done.runtime}, {done.bytes:,} bytes")
    xs = [some(batch, 65, 47, 3) for batch in BATCHES]
    if format == "onnx":
        outputs = [run_onnx(done.path, x)["output"] for x in xs]
    else:
        outputs = run_fresh(done.path, format, xs, tmp_path)
    for x, got in zip(xs, outputs, strict=True):
        assert relative_error(got, numpy(model(x, training=False))) < LIMIT


def test_names_of_inputs_and_outputs_are_kept(tmp_path):
    left, right = keras.Input((6, 5, 4), name="left"), keras.Input((6, 5, 4), name="right")
    both = keras.layers.Add()([left, right])
    y, kernel = involution.Involution2D(3, return_kernel=True)(both)
    half = involution.Involution2D(3, 2)(y)
    outputs = {"stage4": half, "stage1": y, "kernels": [kernel]}
    model = random_weights(keras.Model({"left": left, "right": right}, outputs))
    x = {"left": some(3, 6, 5, 4), "right": some(3, 6, 5, 4, seed=8)}
    want = model(x)
    want = {"stage1": want["stage1"], "stage4": want["stage4"], "kernels_0": want["kernels"][0]}
    for format in WRITTEN:
        done = export(model, tmp_path / format, format)
        assert done.inputs == ("left", "right")
        assert sorted(done.outputs) == sorted(want)
    got = run_onnx(tmp_path / "onnx", *x.values())
    assert sorted(got) == sorted(want)
    for name, true in want.items():
        assert relative_error(got[name], numpy(true)) < 1e-5


def test_outputs_without_keys_are_counted(tmp_path):
    model = model_of(involution.Involution1D(3, return_kernel=True), 6, 4, name="left")
    done = export(model, tmp_path / "model.onnx")
    assert (done.inputs, done.outputs) == (("left",), ("output_0", "output_1"))
    got = run_onnx(done.path, some(2, 6, 4))
    assert {k: v.shape for k, v in got.items()} == {"output_0": (2, 6, 4), "output_1": (2, 6, 3, 1)}


# --- Open sizes ----------------------------------------------------------------------------------


def test_sizes_that_the_model_leaves_open_stay_open(tmp_path):
    model = random_weights(involution.models.inn((None, None, 3), head="convolutional"))
    if BACKEND == "jax":
        with pytest.raises(InputError, match=r"`input_shape`.*Received: .*\(None, None, None, 3\)"):
            export(model, tmp_path / "inn.onnx")
        return
    done = export(model, tmp_path / "inn.onnx")
    for size in (32, 32), (21, 46):
        x = some(2, *size, 3)
        got = run_onnx(done.path, x)["output"]
        assert relative_error(got, numpy(model(x, training=False))) < 1e-5


@pytest.mark.parametrize("format", WRITTEN)
def test_strides_over_open_sizes(tmp_path, format):
    model = model_of(involution.Involution2D(3, 2, kernel_generator="linear"), None, None, 4)
    given = (19, 16, 4) if BACKEND == "jax" else None
    done = export(model, tmp_path / "model", format, given)
    x = some(2, 19, 16, 4)
    if format == "onnx":
        got = run_onnx(done.path, x)["output"]
    else:
        (got,) = run_fresh(done.path, format, [x], tmp_path)
    assert relative_error(got, numpy(model(x))) < 1e-5


def test_input_shape_closes_open_sizes(tmp_path):
    import onnx

    model = model_of(involution.Involution2D(3, kernel_generator="linear"), None, None, 4)
    done = export(model, tmp_path / "model.onnx", input_shape=(12, 7, 4))
    sizes = onnx.load(done.path).graph.input[0].type.tensor_type.shape.dim
    assert [size.dim_param or size.dim_value for size in sizes] == ["batch", 12, 7, 4]


@pytest.mark.parametrize(
    "given", [(12, 7), (12, 7, 5), (12, 0, 4), (12, 7.5, 4), (-1, 7, 4), ("12", 7, 4)]
)
def test_an_input_shape_that_does_not_fit_is_refused(tmp_path, given):
    model = model_of(involution.Involution2D(3), None, None, 4)
    with pytest.raises(InputError, match=r"None, None, 4\)\. Received: input_shape=\("):
        export(model, tmp_path / "model.onnx", input_shape=given)


def test_a_model_without_inputs_of_its_own_needs_them(tmp_path):
    class Subclass(keras.Model):
        def __init__(self):
            super().__init__(name="mine")
            self.involution = involution.Involution1D(3)

        def call(self, x):
            return self.involution(x)

    model = Subclass()
    with pytest.raises(InputError, match="must be built"):
        export(model, tmp_path / "model.onnx", input_shape=(8, 4))
    model(some(1, 8, 4))
    with pytest.raises(InputError, match=r"Received: mine, input_shape=None"):
        export(model, tmp_path / "model.onnx")
    done = export(model, tmp_path / "model.onnx", input_shape=(8, 4))
    x = some(2, 8, 4)
    assert relative_error(run_onnx(done.path, x)["output"], numpy(model(x))) < 1e-5


# --- Formats of one backend ----------------------------------------------------------------------


@pytest.mark.parametrize("format", OWN)
def test_it_runs_where_only_its_framework_is(tmp_path, format):
    model = random_weights(involution.models.inn((16, 12, 3)))
    model.predict(some(2, 16, 12, 3), verbose=0)  # traces a function that runs ``native``
    done = export(model, tmp_path / "inn", format)
    assert done.runtime.startswith("torch " if format == "pt2" else "tensorflow ")
    assert [file.name for file in tmp_path.iterdir()] == ["inn"]
    xs = [some(batch, 16, 12, 3) for batch in BATCHES]
    for x, got in zip(xs, run_fresh(done.path, format, xs, tmp_path), strict=True):
        assert relative_error(got, numpy(model(x, training=False))) < 1e-5


@pytest.mark.parametrize("format", [f for f in FORMATS if f not in WRITTEN])
def test_a_format_of_another_backend_is_refused(tmp_path, format):
    other = "torch" if format == "pt2" else "tensorflow"
    message = rf"{format} is written on {other} .*--backend {other}.* Received: .*backend={BACKEND}"
    with pytest.raises(InputError, match=message) as caught:
        export(sequence(), tmp_path / "model", format)
    assert "\n" not in str(caught.value)


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"onnx, saved_model, pt2\. Received: format='tflite'"):
        export(sequence(), tmp_path / "model", "tflite")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        InputError, match=r"pip install 'involution\[export(-jax)?\]'.*: no module onnxr"
    ):
        export(sequence(), tmp_path / "model.onnx")


# --- No operation of the package's own -----------------------------------------------------------


@pytest.mark.skipif(missing() is not None, reason="installed without native")
def test_what_was_traced_with_native_before_is_no_part_of_a_file(tmp_path):
    if BACKEND == "tensorflow":
        import tensorflow as tf

        compiled = tf.function
    elif BACKEND == "jax":
        import jax

        compiled = jax.jit
    else:
        compiled = lambda function: function  # noqa: E731 - PyTorch keeps nothing

    class Cached(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.function = compiled(
                lambda x, kernel: involution.ops.involution(x, kernel, 3, implementation="native")
            )

        def call(self, x):
            return self.function(x, keras.ops.ones((*keras.ops.shape(x)[:-1], 3, 1)))

    inputs = keras.Input((8, 4), batch_size=2)
    with involution.ops.use("reference"):
        model = keras.Model(inputs, Cached()(inputs))
    for batch in BATCHES:
        model.layers[-1](some(batch, 8, 4))
    for format in WRITTEN:
        try:
            done = export(model, tmp_path / format, format)
        except ExportError:
            assert not (tmp_path / format).exists()
        else:
            assert done.error < 1e-5
            if format == "onnx":
                x = some(2, 8, 4)
                assert relative_error(run_onnx(done.path, x)["output"], numpy(model(x))) < 1e-5


# --- A check that fails --------------------------------------------------------------------------


def spoilt(how):
    def run(made, format, entry, samples):
        results = [
            {k: numpy(v).copy() for k, v in entry.call(*sample).items()} for sample in samples
        ]
        last = results[-1]
        if how == "missing":
            del last["output"]
        elif how == "shape":
            last["output"] = last["output"][:1]
        elif how == "wrong":
            last["output"] += np.abs(last["output"]).max() * 2 * LIMIT
        else:
            last["output"].flat[3] = how
        return "a runtime", results

    return run


@pytest.fixture
def quick(monkeypatch):
    """An exporter that takes no time."""

    def convert(entry, made, format, backend):
        if format == "saved_model":
            made.mkdir()
            made /= "saved_model.pb"
        made.write_bytes(b"model")

    monkeypatch.setattr(exporting, "_convert", convert)


@pytest.mark.parametrize("how", [np.nan, np.inf, "wrong", "shape", "missing"])
@pytest.mark.parametrize("format", WRITTEN)
def test_a_file_that_fails_its_check_is_not_there(tmp_path, monkeypatch, quick, format, how):
    monkeypatch.setattr(exporting, "_run", spoilt(how))
    with pytest.raises(ExportError, match=r"Received: .* in output, for a batch of 5$"):
        export(sequence(), tmp_path / "model", format)
    assert not list(tmp_path.iterdir())


def test_a_model_that_gives_no_numbers_is_not_exported(tmp_path, quick, monkeypatch):
    model = model_of(involution.Involution1D(3), 9, 4)
    model.weights[0].assign(np.full(model.weights[0].shape, np.nan))

    def run(made, format, entry, samples):
        return "a runtime", [{"output": numpy(entry.call(*s)["output"])} for s in samples]

    monkeypatch.setattr(exporting, "_run", run)
    with pytest.raises(ExportError, match="in output, for a batch of 1"):
        export(model, tmp_path / "model.onnx")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_export_leaves_the_old_file(tmp_path, monkeypatch, error):
    def run(made, format, entry, samples):
        assert made.exists()
        raise error

    def convert(entry, made, format, backend):
        made.write_bytes(b"half")

    monkeypatch.setattr(exporting, "_convert", convert)
    monkeypatch.setattr(exporting, "_run", run)
    (tmp_path / "model.onnx").write_bytes(b"old")
    with pytest.raises(error):
        export(sequence(), tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == b"old"


def test_what_a_runtime_cannot_read_is_not_there(tmp_path, quick):
    for format in WRITTEN:
        with pytest.raises(ExportError, match=rf"runtime of the format {format} .* Received: \w"):
            export(sequence(), tmp_path / format, format)
    assert not list(tmp_path.iterdir())


# --- Where it goes -------------------------------------------------------------------------------


@pytest.mark.parametrize("format", WRITTEN)
def test_hostile_targets_are_refused(tmp_path, format):
    with pytest.raises(InputError, match=r"folder .* must exist\. Received: .*nowhere"):
        export(sequence(), tmp_path / "nowhere" / "model", format)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "kept").touch()
    with pytest.raises(InputError, match=r"Received: .*folder, which"):
        export(sequence(), folder, format)
    assert [file.name for file in folder.iterdir()] == ["kept"]
    if format == "saved_model":
        with pytest.raises(InputError, match=r"Received: .*kept, which exists"):
            export(sequence(), folder / "kept", format)


def test_a_file_is_replaced_and_readable_by_others(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    export(sequence(), str(path))
    assert path.read_bytes() != b"old"
    pathlib.Path(tmp_path, "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


# --- The model -----------------------------------------------------------------------------------


def test_the_model_stays_as_it_is(tmp_path):
    model = sequence()
    if BACKEND == "torch":
        model.train()
        list(model.modules())[-1].eval()
    before = [numpy(weight).copy() for weight in model.weights]
    flags = [m.training for m in model.modules()] if BACKEND == "torch" else []
    assert len(set(flags)) in (0, 2)
    first, second = (export(model, tmp_path / f"{i}.onnx") for i in range(2))
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(numpy(weight), value)
    if BACKEND == "torch":
        assert [m.training for m in model.modules()] == flags
        model.train()
    x = some(3, 9, 4)
    one, two = (run_onnx(done.path, x)["output"] for done in (first, second))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float64"])
def test_other_precisions_are_refused(tmp_path, policy):
    inputs = keras.Input((8, 4))
    model = keras.Model(inputs, involution.Involution1D(3, dtype=policy, name="inv")(inputs))
    computes = policy.removeprefix("mixed_")
    with pytest.raises(InputError, match=f"set_weights.*Received: inv, .* in {computes}"):
        export(model, tmp_path / "model.onnx")
