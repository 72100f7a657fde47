"""Inference time of RedNet and ResNet in Keras and, exported, in other runtimes.

All candidates run alternately, one batch each, on the same number of threads; medians in
milliseconds. By form:

    keras      the model; `folded`: after `models.fold`
    onnx       exported with the portable operator; `onnx rows`: as before the implementation
               `banded`, without convolutions for its 1x1 layers
    native     exported with the operator of onnxruntime
    openvino   the portable file in OpenVINO (pip install openvino), in float32
    litert     on TensorFlow, the exported SavedModel converted for LiteRT (pip install
               ai-edge-litert), one image at a time

    KERAS_BACKEND=tensorflow python benchmarks/deploy.py --batches 1,8 --steps 12
    KERAS_BACKEND=tensorflow python benchmarks/deploy.py --forms onnx,native,openvino,litert
"""

import argparse
import contextlib
import pathlib
import statistics
import tempfile
import time
from unittest import mock

import keras
import numpy as np
import onnx
import onnxruntime

import involution
import involution.onnx
from involution.export import export
from involution.models import fold
from involution.ops import dispatch
from involution.ops.native.library import available_cpus

MODELS = {
    "rednet50": lambda: involution.models.RedNet50((224, 224, 3)),
    "rednet26": lambda: involution.models.RedNet26((224, 224, 3)),
    "resnet50": lambda: keras.applications.ResNet50(weights=None, classifier_activation=None),
    "mobilenet_v3_large": lambda: keras.applications.MobileNetV3Large(
        input_shape=(224, 224, 3), weights=None, classifier_activation=None
    ),
    "rednet_tiny": lambda: involution.models.rednet_tiny((32, 32, 3)),
}
FORMS = ("keras", "folded", "onnx", "native")


def rows_form():
    """The portable form of earlier versions."""
    return (
        mock.patch.object(dispatch, "PORTABLE", ("rows", "reference")),
        mock.patch("involution.export.api.as_convolutions", contextlib.nullcontext),
    )


def write(model, path, form):
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        for context in rows_form() if form == "onnx rows" else ():
            stack.enter_context(context)
        exported = export(model, path, operator="native" if form == "native" else "portable")
    seconds = time.perf_counter() - started
    nodes = len(onnx.load(path).graph.node)
    print(
        f"{path.stem}: exported in {seconds:.0f} s, {nodes} nodes, "
        f"{exported.bytes / 2**20:.1f} MiB, error {exported.error:.1e}",
        flush=True,
    )


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cpus()
    # Threads of a waiting session would take the CPUs of the one that is measured.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    involution.onnx.register(options)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def offset_normalization(model):
    """Small offsets in batch normalization: exporters omit those of a new layer, which are 0."""
    rng = np.random.default_rng(0)
    for variable in model.variables:
        if variable.name == "beta":
            variable.assign(rng.uniform(-1e-3, 1e-3, variable.shape))


def openvino_run(path, model):
    import openvino

    settings = {"INFERENCE_NUM_THREADS": available_cpus(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", settings)

    def run(x):
        return compiled(x)[0]

    print_error(path.stem, f"openvino {openvino.__version__}", run, model)
    return run


def litert_run(path, model):
    import ai_edge_litert
    import tensorflow as tf
    from ai_edge_litert.interpreter import Interpreter

    folder = export(model, path.with_suffix(""), "saved_model").path
    content = tf.lite.TFLiteConverter.from_saved_model(str(folder)).convert()
    interpreter = Interpreter(model_content=content, num_threads=available_cpus())
    index = interpreter.get_input_details()[0]["index"]
    interpreter.resize_tensor_input(index, (1, *model.input_shape[1:]))
    interpreter.allocate_tensors()

    def run(x):
        results = []
        for image in x:
            interpreter.set_tensor(index, image[None])
            interpreter.invoke()
            results.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))
        return np.concatenate(results)

    print_error(path.stem, f"litert {ai_edge_litert.__version__}", run, model)
    return run


def print_error(name, runtime, run, model):
    x = np.random.default_rng(0).standard_normal((5, *model.input_shape[1:]), "float32")
    want = keras.ops.convert_to_numpy(model(x, training=False))
    error = np.abs(run(x) - want).max() / np.abs(want).max()
    print(f"{name}: {runtime}, error {error:.1e}", flush=True)


def runs(name, forms, folder):
    """For each form a function of a batch."""
    keras.utils.set_random_seed(0)
    model = MODELS[name]()
    offset_normalization(model)
    found = {}
    for form in forms:
        if form in ("onnx rows", "native") and "rednet" not in name:
            continue
        if form in ("keras", "folded"):
            network = model if form == "keras" else fold(model)
            network.compile(jit_compile=keras.config.backend() == "jax")
            found[form] = network.predict_on_batch
        else:
            path = folder / f"{name}_{form.replace(' ', '_')}.onnx"
            if form == "litert":
                found[form] = litert_run(path, model)
                continue
            write(model, path, form)
            if form == "openvino":
                found[form] = openvino_run(path, model)
                continue
            loaded = session(path)
            input_name = loaded.get_inputs()[0].name
            found[form] = lambda x, s=loaded, n=input_name: s.run(None, {n: x})[0]
    return model.input_shape[1:], found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="rednet50,resnet50,rednet26,mobilenet_v3_large")
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    backend = keras.config.backend()
    print(f"{backend}, onnxruntime {onnxruntime.__version__}, {available_cpus()} threads")
    with tempfile.TemporaryDirectory() as folder:
        candidates = {
            (name, form): (shape, run)
            for name in options.models.split(",")
            for shape, found in [runs(name, options.forms.split(","), pathlib.Path(folder))]
            for form, run in found.items()
        }
        for batch in map(int, options.batches.split(",")):
            times = {key: [] for key in candidates}
            for step in range(options.steps + 2):
                for key, (shape, run) in candidates.items():
                    x = np.random.default_rng(step).standard_normal((batch, *shape), "float32")
                    started = time.perf_counter()
                    run(x)
                    if step >= 2:
                        times[key].append(1e3 * (time.perf_counter() - started))
            for (name, form), values in times.items():
                low, high = np.percentile(values, [25, 75])
                median = statistics.median(values)
                print(
                    f"batch {batch}  {name:20}{form:12}{median:9.1f} ms  ({low:.1f}-{high:.1f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
