"""Verification of an exported file: its runtime's outputs against the model's."""

import json
import os
import subprocess
import sys

import keras
import numpy as np

import involution.onnx
from involution.export.errors import ExportError, as_export_error, ignore_warnings
from involution.export.fusion import all_nodes
from involution.export.onnx import OPSET
from involution.ops.onnxruntime.domain import DOMAIN
from involution.utils.comparison import relative_error

# Verified batch sizes.
BATCHES = (1, 5)

# Maximum error relative to the largest absolute output; a reordered summation stays below it.
TOLERANCE = 1e-4

# Of the formats whose files run in another process.
RUNTIMES = {"saved_model": "tensorflow", "pt2": "torch", "tflite": "litert"}

# Executed in a process that has not imported this package.
_VERIFY_SCRIPT = """
import json, sys
import numpy as np

format, model, names, inputs, outputs = sys.argv[1:]
if format == "pt2":
    import torch as framework
    run = framework.export.load(model).module()
    tensor, array = framework.from_numpy, lambda t: t.detach().cpu().numpy()
elif format == "tflite":
    import ai_edge_litert as framework
    from ai_edge_litert.interpreter import Interpreter
    interpreter = Interpreter(model_path=model)
    runner = interpreter.get_signature_runner()
    run = lambda *xs: runner(**dict(zip(json.loads(names), xs)))
    tensor = array = np.asarray
else:
    import tensorflow as framework
    loaded = framework.saved_model.load(model)  # keeps the variables alive
    run = loaded.serve
    tensor, array = framework.constant, lambda t: t.numpy()
with np.load(inputs) as stored:
    batches = {}
    for key in stored.files:
        batches.setdefault(key.split()[0], []).append(tensor(stored[key]))
results = {}
for batch, tensors in batches.items():
    for name, value in run(*tensors).items():
        results[batch + " " + name] = array(value)
np.savez(outputs, **results)
if "involution" in sys.modules:
    sys.exit("the file imports involution")
print(json.dumps(framework.__version__))
"""


def expected_outputs(spec, samples) -> list[dict[str, np.ndarray]]:
    """The model's own outputs."""
    return [{k: _to_numpy(v) for k, v in spec.call(*sample).items()} for sample in samples]


def run(path, format, spec, samples, operator) -> tuple[str, list[dict]]:
    """The name and version of the format's runtime, and its outputs for each sample."""
    message = (
        f"The runtime of the format {format} cannot run the exported file; another backend's "
        "exporter may work"
    )
    with as_export_error(message):
        if format == "onnx":
            return _run_onnx(path, spec, samples, operator)
        return _run_in_subprocess(path, format, spec.inputs, samples)


def max_relative_error(spec, outputs, expected, batches=BATCHES) -> float:
    """The maximum over all batches and outputs.

    Raises:
        ExportError: It exceeds ``TOLERANCE``.
    """
    maximum = 0.0
    for batch, actual, model_outputs in zip(batches, outputs, expected, strict=True):
        for name, model_output in model_outputs.items():
            found_output = actual.get(name)
            error = np.inf if found_output is None else relative_error(found_output, model_output)
            if error > TOLERANCE:
                found = (
                    f"a relative error of {error:.3g}"
                    if error < np.inf
                    else "a missing, misshapen or non-finite output"
                )
                raise ExportError(
                    f"Exported outputs must match the model's to a relative error of {TOLERANCE:g};"
                    f" {spec.remedy}. Received: {found} in {name}, for a batch of {batch}"
                )
            maximum = max(maximum, error)
    return maximum


def _run_onnx(path, spec, samples, operator):
    import onnx
    import onnxruntime

    proto = onnx.load(path)
    allowed = {"", "ai.onnx", *([DOMAIN] if operator == "native" else [])}
    custom = {node.domain for node in all_nodes(proto.graph)} - allowed
    if custom or proto.functions:
        raise ExportError(
            f"An exported model must consist of operators of these domains: {', '.join(allowed)}. "
            f"Received: {', '.join(custom) or 'local functions'}"
        )
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # failures raise exceptions
    if operator == "native":
        involution.onnx.register(options)
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    outputs = [
        dict(
            zip(
                (value.name for value in session.get_outputs()),
                session.run(None, dict(zip(spec.inputs, sample, strict=True))),
                strict=True,
            )
        )
        for sample in samples
    ]
    return f"onnxruntime {onnxruntime.__version__}", outputs


def run_graph(graph, samples) -> list[list[np.ndarray]]:
    """The outputs of a graph from ``preprocessing.make`` for each sample."""
    import onnx
    import onnxruntime

    proto = onnx.helper.make_model_gen_version(
        graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)]
    )
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return [session.run(None, {graph.input[0].name: sample[0]}) for sample in samples]


def _run_in_subprocess(path, format, inputs, samples):
    inputs_file, outputs_file = (path.with_name(f"{name}.npz") for name in ("inputs", "outputs"))
    batches = {f"{i} {j}": x for i, xs in enumerate(samples) for j, x in enumerate(xs)}
    np.savez(inputs_file, **batches)
    process = subprocess.run(  # noqa: S603 - our own script
        [
            *(sys.executable, "-P", "-c", _VERIFY_SCRIPT),
            *(format, path, json.dumps(inputs), inputs_file, outputs_file),
        ],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        lines = process.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"exit code {process.returncode}")
    outputs: list[dict] = [{} for _ in samples]
    with np.load(outputs_file) as stored:
        for key in stored.files:
            batch, name = key.split(" ", 1)
            outputs[int(batch)][name] = stored[key]
    version = json.loads(process.stdout.splitlines()[-1])
    return f"{RUNTIMES[format]} {version}", outputs


def _to_numpy(tensor) -> np.ndarray:
    with ignore_warnings():  # NumPy 2.4 deprecates Keras's conversion of PyTorch tensors
        return np.asarray(keras.ops.convert_to_numpy(tensor))
