"""Exported classifiers: their metadata and preprocessing, run by onnxruntime on image files."""

import dataclasses
import json
import types

import keras
import numpy as np
import onnx
import pytest
from PIL import Image

from involution.data import decode, transforms
from involution.export import TOLERANCE, export, preprocessing, verify
from involution.saving.classifier import Classifier
from involution.utils.errors import InputError
from tests.support.backends import BACKEND, numpy, slow_except
from tests.support.images import write_image
from tests.support.keras_io_formula import randomize

layers = keras.layers
NAMES = ("a", "말", '"c"')


def classifier(height=12, width=9, **changes):
    """A small one, whose logits differ by image."""
    inputs = keras.Input((height, width, 3))
    x = layers.Dense(3)(layers.Flatten()(inputs))
    if changes.get("outputs") == "probabilities":
        x = layers.Softmax()(x)
    model = keras.Model(inputs, x)
    randomize(model)
    # Probabilities of the usual size, not 0 and 1.
    model.set_weights([weight / 10 for weight in model.get_weights()])
    return Classifier(model, NAMES, (height, width, 3), **changes)


def session(path):
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def metadata(path):
    import onnx

    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


@pytest.mark.long
@slow_except("jax")
def test_onnx_metadata_say_what_the_input_and_the_outputs_are(tmp_path):
    cropped = classifier(crop_fraction=0.5, outputs="probabilities")
    given = metadata(export(cropped, tmp_path / "x.onnx").path)
    assert json.loads(given.pop("class_names")) == list(NAMES)
    assert given.pop("involution_version")
    assert given == {
        "layout": "NHWC",
        "scaling": "pixels / 255",
        "crop": "0.5",
        "outputs": "probabilities",
    }
    whole = metadata(export(cropped, tmp_path / "x.onnx", preprocess=True).path)
    assert (whole["scaling"], "crop" in whole) == ("none", False)
    assert list(metadata(export(cropped.model, tmp_path / "y.onnx").path)) == ["involution_version"]


@pytest.mark.long
@pytest.mark.parametrize("crop_fraction", [None, 0.8])
def test_onnx_with_preprocessing_reproduces_predict(tmp_path, crop_fraction):
    original = classifier(crop_fraction=crop_fraction)
    result = export(original, tmp_path / "x.onnx", preprocess=True)
    assert (result.inputs, result.outputs) == (("input",), ("output",))
    assert result.error <= TOLERANCE
    run = session(result.path)
    (given,) = run.get_inputs()
    assert (given.type, given.shape) == ("tensor(uint8)", ["batch", "height", "width", 3])
    # onnxruntime warns of initializers that no node reads.
    graph = onnx.load(result.path).graph
    read = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= read
    for size in ((40, 31), (9, 12), (5, 200)):
        path = tmp_path / "image.png"
        write_image(path, size=size)
        pixels = np.stack([decode.read_image(path)] * 2)
        (logits,) = run.run(None, {"input": pixels})
        expected = original.predict_proba(original.read(path))
        np.testing.assert_allclose(
            original.probabilities(logits), np.repeat(expected, 2, 0), atol=1e-4
        )


def preprocess(shape, crop_fraction, pixels):
    graph = preprocessing.make(types.SimpleNamespace(crop_fraction=crop_fraction), shape)
    ((scaled,),) = verify.run_graph(graph, [[pixels[None]]])
    return scaled[0]


@pytest.mark.any_backend
@pytest.mark.parametrize("crop_fraction", [None, 0.875, 0.3])
def test_preprocessing_equals_pillows_filter(crop_fraction):
    random = np.random.default_rng(0)
    for shape in ((24, 40, 3), (7, 5, 3)):
        aspect_ratio = shape[1] / shape[0]
        for size in ((50, 70), (11, 17), (24, 90), (100, 9), (1, 1)):
            pixels = random.integers(0, 256, (*size, 3), "uint8")
            box = None
            if crop_fraction is not None:
                box = transforms.center_crop(size[1], size[0], aspect_ratio, crop_fraction)
            want = decode.resize(Image.fromarray(pixels), shape[:2], box).astype("float32")
            got = 255 * preprocess(shape, crop_fraction, pixels)
            np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.any_backend
def test_preprocess_is_refused_without_class_names_and_in_other_formats(tmp_path):
    with pytest.raises(InputError, match=r"requires a classifier.*Received: preprocess=True"):
        export(classifier().model, tmp_path / "x.onnx", preprocess=True)
    format = {"tensorflow": "saved_model", "torch": "pt2", "jax": None}[BACKEND]
    if format is not None:
        with pytest.raises(InputError, match=rf"format onnx\. Received: .*format='{format}'"):
            export(classifier(), tmp_path / "x", format, preprocess=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@slow_except("jax")
def test_preprocessing_gives_open_sizes_the_image_size(tmp_path):
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(inputs)))
    opened = dataclasses.replace(classifier(), model=model)
    for input_shape, (height, width) in ((None, (12, 9)), ((6, 5, 3), (6, 5))):
        path = export(opened, tmp_path / "x.onnx", "onnx", input_shape, preprocess=True).path
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), "uint8")
        (got,) = session(path).run(None, {"input": pixels[None]})
        want = numpy(model(transforms.to_unit_float(pixels[None])))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.long
@pytest.mark.skipif(BACKEND != "tensorflow", reason="LiteRT files are written on TensorFlow")
def test_litert_file_runs_with_any_batch(tmp_path):
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    import involution

    # Stored kernels, whose bands have the most axes.
    inputs = keras.Input((9, 8, 3))
    x = involution.Involution2D(3, groups=1, reduction_ratio=1, kernel_softmax=True)(inputs)
    model = keras.Model(inputs, x)
    randomize(model)
    result = export(model, tmp_path / "x.tflite", "tflite")
    assert result.runtime.startswith("litert ")
    assert [file.name for file in tmp_path.iterdir()] == ["x.tflite"]
    run = interpreter.Interpreter(model_path=str(result.path)).get_signature_runner()
    images = np.random.default_rng(0).random((3, 9, 8, 3), "float32")
    np.testing.assert_allclose(run(input=images)["output"], numpy(model(images)), atol=1e-5)
