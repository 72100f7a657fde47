"""Exported files, run by their runtimes independently of ``involution.export.verify``."""

import collections
import functools
import pathlib
import sys

import keras
import numpy as np
import pytest

import involution.onnx
from involution.export import (
    BATCHES,
    FORMATS,
    TOLERANCE,
    ExportError,
    api,
    export,
    verify,
)
from involution.ops.native import library
from involution.utils.errors import InputError
from tests.support.backends import BACKEND, fresh_process, native_missing_reason, numpy, slow_except
from tests.support.keras_io_formula import randomize, relative_error

SUPPORTED = {
    "tensorflow": ("onnx", "saved_model"),
    "jax": ("onnx",),
    "torch": ("onnx", "pt2"),
}[BACKEND]
BACKEND_FORMATS = [format for format in SUPPORTED if format != "onnx"]


def model_of(layer, *shape, name=None):
    inputs = keras.Input(shape, name=name)
    return randomized(keras.Model(inputs, layer(inputs)))


def randomized(model):
    randomize(model)
    return model


def random_array(*shape, seed=7):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def run_onnx(path, *arrays):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if library.binding("onnxruntime")[0] is not None:
        involution.onnx.register(options)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
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
RUN_AND_STORE = """
import sys, numpy as np
with np.load({stored!r}) as arrays:
    np.savez({computed!r}, *map(run, arrays.values()))
assert not [m for m in sys.modules if m.startswith("involution")]
"""


def run_in_subprocess(path, format, xs, tmp_path):
    """Outputs computed by a process that has not imported the package."""
    files = {name: str(tmp_path / f"{name}.npz") for name in ("stored", "computed")}
    np.savez(files["stored"], *xs)
    fresh_process((LOADED[format] + RUN_AND_STORE).format(path=str(path), **files))
    with np.load(files["computed"]) as results:
        return [*results.values()]


@functools.cache
def sequence():
    """A model that every exporter converts within two seconds."""
    return model_of(involution.Involution1D(3, strides=2, group_channels=2), 9, 4)


# --- ONNX ----------------------------------------------------------------------------------------


@pytest.mark.long
@slow_except("tensorflow")
def test_onnx_of_the_inn_matches(tmp_path):
    model = randomized(involution.models.inn())
    result = export(model, tmp_path / "inn.onnx")
    assert (result.inputs, result.outputs, result.batches) == (("input",), ("output",), (1, 5))
    assert result.error <= TOLERANCE
    assert result.runtime.startswith("onnxruntime ")
    assert result.bytes == result.path.stat().st_size
    assert [file.name for file in tmp_path.iterdir()] == ["inn.onnx"]
    for batch in *BATCHES, 3:
        x = random_array(batch, 32, 32, 3)
        got = run_onnx(result.path, x)["output"]
        assert relative_error(got, numpy(model(x, training=False))) < 1e-5


def custom_generator():
    class Custom(keras.layers.Layer):
        kernel_size = groups = strides = None

        def build(self, shape):
            self.convolution = keras.layers.Conv2D(9 * self.groups, 3, self.strides, "same")
            self.convolution.build(shape)

        def call(self, features):
            return self.convolution(features)

    return Custom()


LAYERS = {
    "odd sizes with strides": ((33, 20, 32), lambda: involution.Involution2D(7, strides=2)),
    "the example's layer": ((9, 8, 6), lambda: involution.Involution(6, 2, 3, 2, 2)),
    "channels first": (
        (16, 9, 8),
        lambda: involution.Involution2D(
            3, strides=2, padding="symmetric", data_format="channels_first"
        ),
    ),
    "dilated and valid": (
        (13, 11, 8),
        lambda: involution.Involution2D(3, strides=1, padding="valid", dilation_rate=2),
    ),
    "sequences": ((31, 16), lambda: involution.Involution1D(5, strides=2)),
    "custom generator": (
        (9, 8, 16),
        lambda: involution.Involution2D(3, strides=2, kernel_generator=custom_generator()),
    ),
    "local attention": (
        (7, 6, 8),
        lambda: involution.Involution2D(3, kernel_generator="pairwise_attention"),
    ),
    "contextual": (
        (9, 6, 16),
        lambda: involution.Involution2D(3, strides=2, kernel_generator="contextual"),
    ),
    "static": (
        (9, 6, 16),
        lambda: involution.Involution2D(3, strides=2, kernel_generator="static"),
    ),
    "all options": (
        (7, 6, 8),
        lambda: involution.Involution2D(
            3, filters=5, kernel_softmax=True, kernel_dropout=0.3, return_kernel=True
        ),
    ),
    "upsampling": ((5, 4, 6), lambda: involution.InvolutionUpSampling2D((2, 3), groups=2)),
    "transposed": ((5, 4, 16), lambda: involution.Involution2DTranspose(3, strides=2)),
    "causal": (
        (11, 16),
        lambda: involution.Involution1D(
            4, padding="causal", dilation_rate=2, strides=2, kernel_softmax="in_bounds"
        ),
    ),
    "low rank": (
        (9, 8),
        lambda: involution.Involution1D(4, padding="causal", groups=8, kernel_generator="low_rank"),
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


# Exporters take up to 20 s for each layer: the others run in `make test-long` only.
REGULAR = ("channels first", "the example's layer", "causal", "upsampling", "transposed")
EACH = [pytest.param(name, marks=() if name in REGULAR else pytest.mark.slow) for name in LAYERS]


@pytest.mark.long
def test_onnx_of_an_involution_is_one_product_of_generated_bands(tmp_path):
    import onnx

    inputs = keras.Input((9, 8, 16))
    x = involution.Involution2D(3, groups=2, filters=5)(inputs)
    model = randomized(keras.Model(inputs, x))
    graph = onnx.load(export(model, tmp_path / "model.onnx").path).graph
    counts = collections.Counter(node.op_type for node in graph.node)
    # The generator's second convolution and the bands; its first one, and that of ``filters``.
    assert (counts["MatMul"], counts["Conv"]) == (2, 2)
    assert counts["ReduceSum"] == 0
    # Folded. The offset of the bands; exporters differ in those of convolutions.
    assert counts["Mul"] == 0
    assert counts["Add"] <= 3
    assert not {"Sub", "Div", "Sqrt", "BatchNormalization"} & counts.keys()


@pytest.mark.long
@pytest.mark.parametrize("name", EACH)
def test_onnx_of_a_layer_matches(tmp_path, name):
    import onnx

    shape, make = LAYERS[name]
    model = model_of(make(), *shape)
    result = export(model, tmp_path / "model.onnx")
    proto = onnx.load(result.path)
    onnx.checker.check_model(proto, full_check=True)
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 18)]
    assert not proto.functions
    assert not [node.op_type for node in proto.graph.node if node.domain or node.metadata_props]
    sizes = proto.graph.input[0].type.tensor_type.shape.dim
    assert [size.dim_param or size.dim_value for size in sizes] == ["batch", *shape]
    for batch in BATCHES:
        x = random_array(batch, *shape)
        want = model(x, training=False)
        want = want if isinstance(want, (list, tuple)) else [want]
        for got, expected in zip(run_onnx(result.path, x).values(), want, strict=True):
            # A softmax of large logits amplifies rounding errors.
            bound = 3e-5 if name == "upsampling" else 1e-5
            assert relative_error(got, numpy(expected)) < bound


@pytest.mark.long
@slow_except("tensorflow")
@pytest.mark.parametrize(
    "generator", ["bottleneck", pytest.param("contextual", marks=pytest.mark.slow)]
)
def test_onnx_of_volumes(tmp_path, generator):
    layer = involution.Involution3D(3, strides=2, kernel_generator=generator)
    model = model_of(layer, 5, 4, 5, 16)
    if BACKEND == "jax" and generator == "contextual":
        with pytest.raises(ExportError, match=r"jax cannot write .* NotImplementedError: .*conv"):
            export(model, tmp_path / "model.onnx")
        assert not list(tmp_path.iterdir())
        return
    result = export(model, tmp_path / "model.onnx")
    x = random_array(2, 5, 4, 5, 16)
    assert relative_error(run_onnx(result.path, x)["output"], numpy(model(x))) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("format", SUPPORTED)
def test_rednet26_matches(tmp_path, format):
    sizes = (65, 47, 3) if BACKEND == "jax" else (None, None, 3)
    model = involution.models.RedNet26(sizes, classes=7)
    rng = np.random.default_rng(0)
    for weight in model.weights:  # zero-initialized gammas would mask their blocks
        if weight.path.endswith("gamma"):
            weight.assign(rng.uniform(0.3, 0.7, tuple(weight.shape)))
    result = export(model, tmp_path / "rednet26", format)
    print(f"{BACKEND}, {format}: {result.error:.1e} by {result.runtime}, {result.bytes:,} bytes")
    xs = [random_array(batch, 65, 47, 3) for batch in BATCHES]
    if format == "onnx":
        outputs = [run_onnx(result.path, x)["output"] for x in xs]
    else:
        outputs = run_in_subprocess(result.path, format, xs, tmp_path)
    for x, got in zip(xs, outputs, strict=True):
        assert relative_error(got, numpy(model(x, training=False))) < TOLERANCE


@pytest.mark.long
@slow_except("jax")
def test_input_and_output_names_are_kept(tmp_path):
    left, right = keras.Input((6, 5, 4), name="left"), keras.Input((6, 5, 4), name="right")
    both = keras.layers.Add()([left, right])
    y, kernel = involution.Involution2D(3, return_kernel=True)(both)
    half = involution.Involution2D(3, strides=2)(y)
    outputs = {"stage4": half, "stage1": y, "kernels": [kernel]}
    model = randomized(keras.Model({"left": left, "right": right}, outputs))
    x = {"left": random_array(3, 6, 5, 4), "right": random_array(3, 6, 5, 4, seed=8)}
    want = model(x)
    want = {"stage1": want["stage1"], "stage4": want["stage4"], "kernels_0": want["kernels"][0]}
    for format in SUPPORTED:
        result = export(model, tmp_path / format, format)
        assert result.inputs == ("left", "right")
        assert sorted(result.outputs) == sorted(want)
    got = run_onnx(tmp_path / "onnx", *x.values())
    assert sorted(got) == sorted(want)
    for name, expected in want.items():
        assert relative_error(got[name], numpy(expected)) < 1e-5


@pytest.mark.long
def test_outputs_without_keys_are_numbered(tmp_path):
    model = model_of(involution.Involution1D(3, return_kernel=True), 6, 4, name="left")
    result = export(model, tmp_path / "model.onnx")
    assert (result.inputs, result.outputs) == (("left",), ("output_0", "output_1"))
    got = run_onnx(result.path, random_array(2, 6, 4))
    assert {k: v.shape for k, v in got.items()} == {"output_0": (2, 6, 4), "output_1": (2, 6, 3, 1)}


# --- Unknown sizes -------------------------------------------------------------------------------


@pytest.mark.long
@slow_except("tensorflow")
def test_unknown_sizes_stay_dynamic(tmp_path):
    model = randomized(involution.models.inn((None, None, 3), head="convolutional"))
    if BACKEND == "jax":
        with pytest.raises(InputError, match=r"`input_shape`.*Received: .*\(None, None, None, 3\)"):
            export(model, tmp_path / "inn.onnx")
        return
    result = export(model, tmp_path / "inn.onnx")
    for size in (32, 32), (21, 46):
        x = random_array(2, *size, 3)
        got = run_onnx(result.path, x)["output"]
        assert relative_error(got, numpy(model(x, training=False))) < 1e-5


@pytest.mark.long
@slow_except("tensorflow")
@pytest.mark.parametrize("format", BACKEND_FORMATS or SUPPORTED)
def test_strides_with_unknown_sizes(tmp_path, format):
    model = model_of(
        involution.Involution2D(3, strides=2, kernel_generator="linear"), None, None, 4
    )
    input_shape = (19, 16, 4) if BACKEND == "jax" else None
    result = export(model, tmp_path / "model", format, input_shape)
    x = random_array(2, 19, 16, 4)
    if format == "onnx":
        got = run_onnx(result.path, x)["output"]
    else:
        (got,) = run_in_subprocess(result.path, format, [x], tmp_path)
    assert relative_error(got, numpy(model(x))) < 1e-5


def decoder():
    """A network that upsamples with and without a guide, for images of any size."""
    image = keras.Input((None, None, 3))
    x = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(image)
    guide = keras.layers.Conv2D(4, 3, padding="same")(keras.layers.UpSampling2D(2)(image))
    x = involution.InvolutionUpSampling2D(2)(x, guide=guide)
    x = involution.InvolutionUpSampling2D(2, kernel_softmax="in_bounds", kernel_size=3)(x)
    x = involution.Involution2DTranspose(3, strides=2, padding="valid")(x)
    model = randomized(keras.Model(image, keras.layers.Conv2D(2, 1)(x)))
    # Logits of the usual size: a softmax of large ones amplifies rounding errors.
    model.set_weights([weight / 4 for weight in model.get_weights()])
    return model


def language_model():
    """Causal layers, for sequences of any length."""
    features = keras.Input((None, 16))
    x = involution.Involution1D(4, padding="causal")(features)
    x = involution.Involution1D(
        3, padding="causal", dilation_rate=2, groups=16, kernel_generator="low_rank"
    )(x)
    x = involution.Involution1D(3, padding="causal", strides=2, kernel_softmax="in_bounds")(x)
    return randomized(keras.Model(features, x))


@pytest.mark.long
@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        pytest.param(
            decoder,
            ((4, 5, 3), (6, 3, 3)),
            marks=() if BACKEND == "tensorflow" else pytest.mark.slow,
        ),
        (language_model, ((11, 16), (6, 16))),
    ],
)
def test_onnx_of_upsampling_and_causal_networks(tmp_path, make, sizes):
    model = make()
    result = None
    for shape in sizes:
        if BACKEND == "jax":  # its exporter requires all sizes but the batch's
            result = export(model, tmp_path / "model.onnx", input_shape=shape)
        elif result is None:
            result = export(model, tmp_path / "model.onnx")
        for batch in BATCHES:
            x = random_array(batch, *shape)
            (got,) = run_onnx(result.path, x).values()
            assert relative_error(got, numpy(model(x, training=False))) < 1e-5


@pytest.mark.long
def test_input_shape_sets_unknown_sizes(tmp_path):
    import onnx

    model = model_of(involution.Involution2D(3, kernel_generator="linear"), None, None, 4)
    result = export(model, tmp_path / "model.onnx", input_shape=(12, 7, 4))
    sizes = onnx.load(result.path).graph.input[0].type.tensor_type.shape.dim
    assert [size.dim_param or size.dim_value for size in sizes] == ["batch", 12, 7, 4]


@pytest.mark.parametrize(
    "given", [(12, 7), (12, 7, 5), (12, 0, 4), (12, 7.5, 4), (-1, 7, 4), ("12", 7, 4)]
)
def test_an_incompatible_input_shape_raises(tmp_path, given):
    model = model_of(involution.Involution2D(3), None, None, 4)
    with pytest.raises(InputError, match=r"None, None, 4\)\. Received: input_shape=\("):
        export(model, tmp_path / "model.onnx", input_shape=given)


@pytest.mark.long
def test_a_subclass_requires_input_shape(tmp_path):
    class Subclass(keras.Model):
        def __init__(self):
            super().__init__(name="mine")
            self.involution = involution.Involution1D(3)

        def call(self, x):
            return self.involution(x)

    model = Subclass()
    with pytest.raises(InputError, match="must be built"):
        export(model, tmp_path / "model.onnx", input_shape=(8, 4))
    model(random_array(1, 8, 4))
    with pytest.raises(InputError, match=r"Received: mine, input_shape=None"):
        export(model, tmp_path / "model.onnx")
    result = export(model, tmp_path / "model.onnx", input_shape=(8, 4))
    x = random_array(2, 8, 4)
    assert relative_error(run_onnx(result.path, x)["output"], numpy(model(x))) < 1e-5


# --- Backend-specific formats --------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("format", BACKEND_FORMATS)
def test_exported_files_run_without_the_package(tmp_path, format):
    model = randomized(involution.models.inn((16, 12, 3)))
    model.predict(random_array(2, 16, 12, 3), verbose=0)  # traces a function with ``native``
    result = export(model, tmp_path / "inn", format)
    assert result.runtime.startswith("torch " if format == "pt2" else "tensorflow ")
    assert [file.name for file in tmp_path.iterdir()] == ["inn"]
    xs = [random_array(batch, 16, 12, 3) for batch in BATCHES]
    for x, got in zip(xs, run_in_subprocess(result.path, format, xs, tmp_path), strict=True):
        assert relative_error(got, numpy(model(x, training=False))) < 1e-5


@pytest.mark.parametrize(
    "format",
    [f for f in FORMATS if f not in SUPPORTED and (f, BACKEND) != ("tflite", "tensorflow")],
)
def test_a_format_of_another_backend_raises(tmp_path, format):
    other = "torch" if format == "pt2" else "tensorflow"
    message = (
        rf"{format} requires the {other} backend: --backend {other}.* Received: .*backend={BACKEND}"
    )
    with pytest.raises(InputError, match=message) as caught:
        export(sequence(), tmp_path / "model", format)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="LiteRT files are written on TensorFlow")
def test_litert_requires_its_runtime(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    with pytest.raises(InputError, match=r"involution\[export-litert\]'\. .*: no module ai_edge"):
        export(sequence(), tmp_path / "model", "tflite")


def test_an_unknown_format_raises(tmp_path):
    with pytest.raises(InputError, match=r"pt2, tflite\. Received: format='coreml'"):
        export(sequence(), tmp_path / "model", "coreml")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        InputError, match=r"pip install 'involution\[export(-jax)?\]'.*: no module onnxr"
    ):
        export(sequence(), tmp_path / "model.onnx")


# --- No custom operations ------------------------------------------------------------------------


@pytest.mark.long
@slow_except("tensorflow")
@pytest.mark.skipif(native_missing_reason() is not None, reason="installed without native")
def test_functions_traced_with_native_are_exported_as_portable_operations(tmp_path):
    if BACKEND == "tensorflow":
        import tensorflow as tf

        compiled = tf.function
    elif BACKEND == "jax":
        import jax

        compiled = jax.jit
    else:
        compiled = lambda function: function  # noqa: E731 - PyTorch caches nothing

    class Cached(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.function = compiled(
                lambda x, kernel: involution.ops.involution(x, kernel, 3, implementation="native")
            )

        def call(self, x):
            return self.function(x, keras.ops.ones((*keras.ops.shape(x)[:-1], 3, 1)))

    inputs = keras.Input((8, 4), batch_size=2)
    with involution.ops.force_implementation("reference"):
        model = keras.Model(inputs, Cached()(inputs))
    for batch in BATCHES:
        model.layers[-1](random_array(batch, 8, 4))
    for format in SUPPORTED:
        result = export(model, tmp_path / format, format)
        assert result.error < 1e-5
        if format == "onnx":
            x = random_array(2, 8, 4)
            assert relative_error(run_onnx(result.path, x)["output"], numpy(model(x))) < 1e-5
        elif format == "saved_model":
            assert "involution" not in str((result.path / "saved_model.pb").read_bytes()).lower()


# --- Failed verification -------------------------------------------------------------------------


def corrupted(how):
    def run(path, format, spec, samples, operator):
        results = [
            {k: numpy(v).copy() for k, v in spec.call(*sample).items()} for sample in samples
        ]
        last = results[-1]
        if how == "missing":
            del last["output"]
        elif how == "shape":
            last["output"] = last["output"][:1]
        elif how == "wrong":
            last["output"] += np.abs(last["output"]).max() * 2 * TOLERANCE
        else:
            last["output"].flat[3] = how
        return "a runtime", results

    return run


@pytest.fixture
def fast_exporter(monkeypatch):
    """An exporter that writes a placeholder."""

    def convert(spec, path, format, backend):
        if format == "saved_model":
            path.mkdir()
            path /= "saved_model.pb"
        path.write_bytes(b"model")

    monkeypatch.setattr(api, "_convert", convert)


@pytest.mark.long
@pytest.mark.parametrize("how", [np.nan, np.inf, "wrong", "shape", "missing"])
@pytest.mark.parametrize("format", SUPPORTED)
def test_a_file_that_fails_verification_is_deleted(
    tmp_path, monkeypatch, fast_exporter, format, how
):
    monkeypatch.setattr(verify, "run", corrupted(how))
    with pytest.raises(ExportError, match=r"Received: .* in output, for a batch of 5$"):
        export(sequence(), tmp_path / "model", format)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_a_model_with_nan_outputs_is_not_exported(tmp_path, fast_exporter, monkeypatch):
    model = model_of(involution.Involution1D(3), 9, 4)
    model.weights[0].assign(np.full(model.weights[0].shape, np.nan))

    def run(path, format, spec, samples, operator):
        return "a runtime", [{"output": numpy(spec.call(*s)["output"])} for s in samples]

    monkeypatch.setattr(verify, "run", run)
    with pytest.raises(ExportError, match="in output, for a batch of 1"):
        export(model, tmp_path / "model.onnx")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_export_keeps_the_old_file(tmp_path, monkeypatch, error):
    def run(path, format, spec, samples, operator):
        assert path.exists()
        raise error

    def convert(spec, path, format, backend):
        path.write_bytes(b"half")

    monkeypatch.setattr(api, "_convert", convert)
    monkeypatch.setattr(verify, "run", run)
    (tmp_path / "model.onnx").write_bytes(b"old")
    with pytest.raises(error):
        export(sequence(), tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == b"old"


@pytest.mark.long
@slow_except("jax")
def test_an_unreadable_file_is_deleted(tmp_path, fast_exporter):
    for format in SUPPORTED:
        with pytest.raises(ExportError, match=rf"runtime of the format {format} .* Received: \w"):
            export(sequence(), tmp_path / format, format)
    assert not list(tmp_path.iterdir())


# --- Targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", SUPPORTED)
def test_invalid_targets_raise(tmp_path, format):
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


@pytest.mark.long
@slow_except("tensorflow")
def test_a_file_is_replaced_and_readable_by_others(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    export(sequence(), str(path))
    assert path.read_bytes() != b"old"
    pathlib.Path(tmp_path, "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


# --- The model -----------------------------------------------------------------------------------


@pytest.mark.long
@slow_except("tensorflow")
def test_the_model_is_not_modified(tmp_path):
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
    x = random_array(3, 9, 4)
    one, two = (run_onnx(result.path, x)["output"] for result in (first, second))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float64"])
def test_other_precisions_raise(tmp_path, policy):
    inputs = keras.Input((8, 4))
    model = keras.Model(inputs, involution.Involution1D(3, dtype=policy, name="inv")(inputs))
    computes = policy.removeprefix("mixed_")
    with pytest.raises(InputError, match=f"set_weights.*Received: inv, .* in {computes}"):
        export(model, tmp_path / "model.onnx")
