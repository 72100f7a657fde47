"""A model in a file for other runtimes: ONNX, TensorFlow's SavedModel, PyTorch's .pt2.

Every involution is traced as ``rows``, in three dimensions as ``reference``, made of standard
operations alone: what is written runs where involution is not installed. A file counts as written
when the runtime of its format has read it and given the model's numbers.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import warnings
from typing import Any

import keras
import numpy as np
from keras import tree

from involution.ops import use
from involution.utils.atomic_files import atomic_write
from involution.utils.errors import InputError

FORMATS = ("onnx", "saved_model", "pt2")

# What each format is written by, under Keras's backends that can.
WRITERS: dict[str, dict[str, tuple[str, ...]]] = {
    "onnx": {
        "tensorflow": ("onnx", "onnxruntime", "tf2onnx"),
        "jax": ("onnx", "onnxruntime", "onnxscript", "jax2onnx"),
        "torch": ("onnx", "onnxruntime", "onnxscript"),
    },
    "saved_model": {"tensorflow": ()},
    "pt2": {"torch": ()},
}

# What brings the packages, where it is not "export".
EXTRAS = {"jax": "export-jax"}

# Implementations that every runtime has.
PORTABLE = ("rows", "reference")

# The newest version of ONNX's operators that all three exporters write.
OPSET = 18

# A file is checked with these batches; where sizes are open, with another size for each.
BATCHES = (1, 5)
OPEN_SIZES = {1: 33, 5: 40}

# The largest difference that is the order of summation and no mistake, relative to the largest
# value of an output.
LIMIT = 1e-4


class ExportError(InputError):
    """No file was written: the exporter failed, or its file does not give the model's numbers."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """A file that was written and checked."""

    path: pathlib.Path
    format: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    error: float
    """Largest difference from the model, relative to the largest value of an output."""
    batches: tuple[int, ...]
    """The batches that it was checked with."""
    runtime: str
    """What it was checked by."""
    bytes: int
    seconds: float


def export(model: keras.Model, path, format="onnx", input_shape=None) -> Exported:
    """Writes a model for another runtime, and checks what was written by that runtime.

    The batch is open in every format, and so are sizes that are None in the model's inputs. One
    input and one output have their tensor's name, or ``input`` and ``output``; of several outputs
    each has its key in the model's dictionary, keys within keys joined by ``_``, or ``output_0``
    and so on. SavedModel's ``serve`` and the module of a .pt2 file take inputs by position and
    give a dictionary of outputs. The model stays as it is, and a file appears at ``path`` whole or
    not at all.

    Args:
        model: A built model that computes in float32.
        path: The file to write, which replaces an older one; for ``"saved_model"`` a folder, which
            must not exist.
        format: ``"onnx"`` on every backend, ``"saved_model"`` on TensorFlow, ``"pt2"``
            (``torch.export``) on PyTorch.
        input_shape: Sizes without the batch, as (height, width, channels), for a model of one
            input that leaves some open, or that has no input of its own (a subclass). None: the
            model's.

    Returns:
        What was written, with the error that was measured.

    Raises:
        InputError: The format does not go with the backend, a package is missing, or the model, the
            path or ``input_shape`` cannot be used.
        ExportError: The exporter failed, or its file does not give the model's numbers to 1e-4 of
            the largest one.

    Example:

    >>> import keras, pathlib, tempfile, involution
    >>> from involution.export import export
    >>> model = keras.Sequential([keras.Input((8, 4)), involution.Involution1D(3)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     done = export(model, pathlib.Path(folder, "model.onnx"))
    >>> done.inputs, done.outputs, done.error < 1e-5
    (('input',), ('output',), True)
    """
    started = time.monotonic()
    backend = keras.config.backend()
    _check_format(format, backend)
    path = _free(path, format)
    _check_precision(model)
    entry = _entry(model, input_shape)
    _check_open_sizes(entry, backend)
    samples = [entry.random(batch) for batch in BATCHES]
    wanted = [{k: _numpy(v) for k, v in entry.call(*sample).items()} for sample in samples]
    entry = dataclasses.replace(entry, outputs=tuple(wanted[0]))
    with _scratch(path) as folder:
        # A converter takes its temporary's suffix for its format.
        made = folder / f"model.{format}"
        with _as_it_was(model), use(PORTABLE):
            _convert(entry, made, format, backend)
        runtime, results = _run(made, format, entry, samples)
        error = _largest_error(entry, results, wanted)
        size = sum(f.stat().st_size for f in (made, *made.rglob("*")) if f.is_file())
        _place(made, path)
    seconds = time.monotonic() - started
    names = entry.inputs, entry.outputs
    return Exported(path, format, *names, error, BATCHES, runtime, size, seconds)


# --- What is asked for ---------------------------------------------------------------------------


def _check_format(format, backend):
    if format not in FORMATS:
        raise InputError(
            f"`format` must be one of {', '.join(FORMATS)}. Received: format={format!r}"
        )
    writers = WRITERS[format]
    if backend not in writers:
        only = " or ".join(writers)
        raise InputError(
            f"The format {format} is written on {only} alone: --backend {next(iter(writers))}, or "
            f"KERAS_BACKEND={next(iter(writers))}. Received: format={format!r}, backend={backend}"
        )
    try:
        with _unwarned():
            for package in writers[backend]:
                importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            f"The format {format} is written on {backend} with packages of an extra: pip install "
            f"'involution[{EXTRAS.get(backend, 'export')}]'. Received: no module {error.name}"
        ) from error


def _free(path, format) -> pathlib.Path:
    """Where the file can go, or InputError."""
    path = pathlib.Path(path)
    if not path.parent.is_dir():
        raise InputError(f"The folder of an exported model must exist. Received: {path}")
    if format == "saved_model" and (path.exists() or path.is_symlink()):
        raise InputError(
            "A SavedModel is a folder, and must be given the name of a new one. "
            f"Received: {path}, which exists"
        )
    if path.is_dir():
        raise InputError(f"An exported model must be a file. Received: {path}, which is a folder")
    return path


def _check_precision(model):
    for layer in (model, *model.layers):
        if layer.compute_dtype != "float32":
            raise InputError(
                "A model to be exported must compute in float32, which every runtime has: make it "
                "under that policy and give it the weights by set_weights(). "
                f"Received: {layer.name}, which computes in {layer.compute_dtype}"
            )


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A model as a function from tensors to a dictionary of tensors."""

    model: keras.Model
    structure: Any
    """Of the model's input, with a specification in each tensor's place."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ()

    @property
    def is_open(self) -> bool:
        return any(None in spec.shape[1:] for spec in self.specs)

    @property
    def specs(self) -> list[keras.InputSpec]:
        return tree.flatten(self.structure)

    def call(self, *tensors) -> dict:
        outputs = self.model(tree.pack_sequence_as(self.structure, tensors), training=False)
        paths, values = zip(*tree.flatten_with_path(outputs), strict=True)
        if paths == ((),):
            return {"output": values[0]}
        names = ["_".join(map(str, path)) for path in paths]
        if not any(isinstance(path[0], str) for path in paths) or len({*names, *self.inputs}) < len(
            names
        ) + len(self.inputs):
            names = [f"output_{i}" for i in range(len(names))]
        return dict(zip(names, values, strict=True))

    def sizes(self, batch) -> list[tuple[int, ...]]:
        """A shape for every input, with another size at each open place."""
        return [
            tuple(
                batch if axis == 0 else OPEN_SIZES.get(batch, 35) + 3 * axis if n is None else n
                for axis, n in enumerate(spec.shape)
            )
            for spec in self.specs
        ]

    def random(self, batch) -> list[np.ndarray]:
        rng = np.random.default_rng(batch)
        return [
            rng.standard_normal(size).astype(spec.dtype)
            if "float" in spec.dtype
            else rng.integers(0, 2, size).astype(spec.dtype)
            for spec, size in zip(self.specs, self.sizes(batch), strict=True)
        ]


def _entry(model, input_shape) -> _Entry:
    if not model.built:
        raise InputError(
            "A model to be exported must be built: call it once. "
            f"Received: {model.name}, which is not"
        )
    tensors = _inputs(model)
    given = None if input_shape is None else tuple(input_shape)
    if tensors is None:
        if given is None or not _fits((None,) * len(given), given):
            raise InputError(
                "A model without inputs of its own needs `input_shape` to be exported. "
                f"Received: {model.name}, input_shape={input_shape!r}"
            )
        spec = keras.InputSpec(shape=(None, *given), dtype=model.input_dtype)
        return _Entry(model, spec, ("input",))
    flat = tree.flatten(tensors)
    shapes = [(None, *tensor.shape[1:]) for tensor in flat]
    if given is not None:
        own = shapes[0][1:]
        if len(shapes) > 1 or not _fits(own, given):
            raise InputError(
                "`input_shape` must fit the model's one input, where None fits every size: "
                f"{', '.join(str(shape[1:]) for shape in shapes)}. "
                f"Received: input_shape={input_shape!r}"
            )
        shapes = [(None, *given)]
    specs = [
        keras.InputSpec(shape=shape, dtype=keras.backend.standardize_dtype(tensor.dtype))
        for shape, tensor in zip(shapes, flat, strict=True)
    ]
    automatic = [t.name.startswith(("keras_tensor", "input_layer")) for t in flat]
    names = tuple(
        ("input" if len(flat) == 1 else f"input_{i}") if automatic[i] else tensor.name
        for i, tensor in enumerate(flat)
    )
    return _Entry(model, tree.pack_sequence_as(tensors, specs), names)


def _inputs(model):
    """The structure of a model's input; None where it has none, as a subclass."""
    try:
        return model.input
    except AttributeError:
        inputs = getattr(model, "inputs", None)
        return inputs[0] if inputs else None


def _fits(own, given) -> bool:
    return len(own) == len(given) and all(
        (n is None or (isinstance(n, int) and n > 0)) and m in (None, n)
        for m, n in zip(own, given, strict=True)
    )


def _check_open_sizes(entry, backend):
    if backend == "jax" and entry.is_open:
        raise InputError(
            "On JAX an exported model's sizes must be known: give `input_shape`, as (height, width,"
            " channels), or export on TensorFlow or PyTorch: --backend tensorflow. Received: "
            f"inputs of {', '.join(str(tuple(spec.shape)) for spec in entry.specs)}"
        )


# --- Writing -------------------------------------------------------------------------------------


def _convert(entry, made, format, backend):
    try:
        # What exporters warn of is their own inside; whether they are right is measured.
        with _unwarned():
            if format == "onnx":
                _write_onnx(entry, made, backend)
            elif format == "saved_model":
                _write_saved_model(entry, made)
            else:
                _write_pt2(entry, made)
    except Exception as error:  # exporters raise many kinds for a model that they cannot take
        remedy = "give `input_shape`" if entry.is_open else "another backend's may"
        raise ExportError(
            f"The exporter of {backend} cannot write this model as {format}: {remedy}. "
            f"Received: {type(error).__name__}: {_one_line(error)}"
        ) from error


def _write_onnx(entry, made, backend):
    # Not by ``keras.Model.export``: it gives outputs no names, refuses nested ones on TensorFlow,
    # puts weights into a second file on JAX, and on PyTorch takes the deprecated exporter, which
    # writes files that do not load. It calls the same packages.
    import onnx

    program = {"tensorflow": _onnx_by_tf2onnx, "jax": _onnx_by_jax2onnx, "torch": _onnx_by_torch}
    proto = program[backend](entry)
    _name_sizes(proto.graph, entry)
    for node in _nodes(proto.graph):
        del node.metadata_props[:]  # where in whose files it was traced
    used = {node.domain or "" for node in _nodes(proto.graph)}
    for opset in list(proto.opset_import):
        if opset.domain not in used:
            proto.opset_import.remove(opset)
    onnx.save(proto, made)


def _onnx_by_tf2onnx(entry):
    import tensorflow as tf
    import tf2onnx

    function, signature = _tf_function(entry)
    # A function of its own: those that the model has may be traced with another implementation.
    traced = tf.function(function, signature, autograph=False)
    return tf2onnx.convert.from_function(traced, signature, opset=OPSET)[0]


def _onnx_by_jax2onnx(entry):
    import jax
    import jax2onnx
    import onnxscript.optimizer

    proto = jax2onnx.to_onnx(
        lambda *tensors: list(entry.call(*tensors).values()),
        [jax.ShapeDtypeStruct(("batch", *s.shape[1:]), np.dtype(s.dtype)) for s in entry.specs],
        input_names=entry.inputs,
        output_names=entry.outputs,
        opset=OPSET,
    )
    _pool_spatial_axes(proto.graph)
    # A fifth of the operations is left: the rest computes constants.
    return onnxscript.optimizer.optimize(proto)


def _onnx_by_torch(entry):
    import torch

    exported = torch.onnx.export(
        _torch_program(entry),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=entry.inputs,
        output_names=entry.outputs,
    )
    assert exported is not None
    return exported.model_proto


def _pool_spatial_axes(graph):
    """Has MaxPool see (B, C, *spatial). jax2onnx gives it (1, 1, B, *spatial, C) and windows of 1
    for the batch and the channels; runtimes know three axes of a window at most."""
    from onnx import helper, numpy_helper

    axes = "pool_axes"
    nodes = []
    for node in graph.node:
        found = {a.name: list(a.ints) for a in node.attribute if a.ints}
        window = found.get("kernel_shape", [])
        if node.op_type != "MaxPool" or len(window) <= 3:
            nodes.append(node)
            continue
        rank = len(window)
        pads = found.get("pads", [0] * 2 * rank)
        strides, rates = (found.get(k, [1] * rank) for k in ("strides", "dilations"))
        order = sorted(
            range(rank),
            key=lambda i: (window[i], strides[i], pads[i], pads[rank + i]) != (1, 1, 0, 0),
        )
        moved = order[2:]
        x, y = node.input[0], node.output[0]
        a, b, c, d = (f"{y}/{step}" for step in ("squeezed", "moved", "pooled", "back"))
        nodes += [
            helper.make_node("Squeeze", [x, axes], [a]),
            helper.make_node("Transpose", [a], [b], perm=order),
            helper.make_node(
                "MaxPool",
                [b],
                [c],
                kernel_shape=[window[i] for i in moved],
                strides=[strides[i] for i in moved],
                dilations=[rates[i] for i in moved],
                pads=[pads[i + end] for end in (0, rank) for i in moved],
            ),
            helper.make_node("Transpose", [c], [d], perm=[order.index(i) for i in range(rank)]),
            helper.make_node("Unsqueeze", [d, axes], [y]),
        ]
    if len(nodes) > len(graph.node):
        graph.initializer.append(numpy_helper.from_array(np.array([0, 1]), axes))
        del graph.node[:]
        graph.node.extend(nodes)


def _name_sizes(graph, entry):
    """The batch is called ``batch``, an open size by its input and axis."""
    for value, spec, name in zip(graph.input, entry.specs, entry.inputs, strict=True):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if spec.shape[axis] is None:
                dim.dim_param = "batch" if axis == 0 else f"{name}_{axis}"
    for value in graph.output:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.dim_value:
                dim.dim_param = "batch" if axis == 0 else f"{value.name}_{axis}"
    # They still have the exporter's names there, and runtimes infer them.
    del graph.value_info[:]


def _nodes(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _tf_function(entry):
    """What TensorFlow traces: a function, and its inputs."""
    import tensorflow as tf

    signature = [
        tf.TensorSpec(spec.shape, spec.dtype, name=name)
        for spec, name in zip(entry.specs, entry.inputs, strict=True)
    ]
    return lambda *tensors: entry.call(*tensors), signature


def _write_saved_model(entry, made):
    # Not by ``keras.Model.export``, which refuses nested outputs; this is what it calls.
    archive = keras.export.ExportArchive()
    archive.track(entry.model)
    archive.add_endpoint("serve", *_tf_function(entry))
    archive.write_out(str(made), verbose=False)


def _write_pt2(entry, made):
    # Not by ``keras.Model.export``: it traces open sizes at 2, too few for a window.
    import torch

    torch.export.save(_torch_program(entry), made)


def _torch_program(entry):
    import torch

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = entry.model.eval()

        def forward(self, *tensors):
            return entry.call(*tensors)

    # Sizes of 0 and 1 would be taken for constants.
    samples = [
        keras.ops.ones(size, spec.dtype)
        for spec, size in zip(entry.specs, entry.sizes(2), strict=True)
    ]
    is_open = [
        {axis: torch.export.Dim.DYNAMIC for axis, n in enumerate(spec.shape) if n is None}
        for spec in entry.specs
    ]
    program = torch.export.export(
        Module(), tuple(samples), dynamic_shapes=(tuple(is_open),), strict=False
    )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # where in whose files it was traced
    return program


# --- Checking ------------------------------------------------------------------------------------

# Runs in a process of its own, where nothing has imported the package.
FRESH = """
import json, sys
import numpy as np

format, model, inputs, outputs = sys.argv[1:]
if format == "pt2":
    import torch as framework
    run = framework.export.load(model).module()
    tensor, array = framework.from_numpy, lambda t: t.detach().cpu().numpy()
else:
    import tensorflow as framework
    loaded = framework.saved_model.load(model)  # whose variables go with it
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


def _run(made, format, entry, samples) -> tuple[str, list[dict]]:
    """The name of the format's runtime, and what it computes from the samples."""
    try:
        with _unwarned():
            if format == "onnx":
                return _run_onnx(made, entry, samples)
            return _run_fresh(made, format, samples)
    except ExportError:
        raise
    except Exception as error:  # a runtime's errors are its own
        raise ExportError(
            f"The runtime of the format {format} must be able to run what was exported, and cannot:"
            f" another backend's exporter may. Received: {type(error).__name__}: {_one_line(error)}"
        ) from error


def _run_onnx(made, entry, samples):
    import onnx
    import onnxruntime

    proto = onnx.load(made)
    others = {node.domain for node in _nodes(proto.graph)} - {"", "ai.onnx"}
    if others or proto.functions:
        raise ExportError(
            "An exported model must hold the operations of ONNX alone. "
            f"Received: operations of {', '.join(others) or 'its own'}"
        )
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    results = [
        dict(
            zip(
                (value.name for value in session.get_outputs()),
                session.run(None, dict(zip(entry.inputs, sample, strict=True))),
                strict=True,
            )
        )
        for sample in samples
    ]
    return f"onnxruntime {onnxruntime.__version__}", results


def _run_fresh(made, format, samples):
    inputs, outputs = (made.with_name(f"{name}.npz") for name in ("inputs", "outputs"))
    batches = {f"{i} {j}": x for i, xs in enumerate(samples) for j, x in enumerate(xs)}
    np.savez(inputs, **batches)
    done = subprocess.run(  # noqa: S603 - our own script
        [sys.executable, "-P", "-c", FRESH, format, made, inputs, outputs],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "it died").splitlines()[-1])
    results: list[dict] = [{} for _ in samples]
    with np.load(outputs) as stored:
        for key in stored.files:
            batch, name = key.split(" ", 1)
            results[int(batch)][name] = stored[key]
    version = json.loads(done.stdout.splitlines()[-1])
    return f"{'torch' if format == 'pt2' else 'tensorflow'} {version}", results


def _largest_error(entry, results, wanted) -> float:
    """Over all batches and outputs, or ExportError where it is too large."""
    largest = 0.0
    for batch, got, want in zip(BATCHES, results, wanted, strict=True):
        for name, true in want.items():
            error = _error(got.get(name), true)
            if error > LIMIT:
                remedy = "give `input_shape`" if entry.is_open else "another backend's exporter may"
                found = f"an error of {error:.3g}" if error < np.inf else "no numbers of that shape"
                raise ExportError(
                    f"An exported model must give the model's numbers to {LIMIT:g} of the largest: "
                    f"{remedy}. Received: {found} in {name}, for a batch of {batch}"
                )
            largest = max(largest, error)
    return largest


def _error(got, want) -> float:
    """The largest difference, relative to the largest value; infinite where there is no number."""
    if got is None or got.shape != want.shape:
        return np.inf
    if not want.size:
        return 0.0
    got, want = np.asarray(got, "float64"), np.asarray(want, "float64")
    if not (np.isfinite(got).all() and np.isfinite(want).all()):
        return np.inf
    difference, magnitude = np.abs(got - want).max(), np.abs(want).max()
    return float(difference / magnitude) if magnitude else np.inf if difference else 0.0


# --- Leaving things as they were -----------------------------------------------------------------


@contextlib.contextmanager
def _scratch(path):
    """A folder beside the target, on its file system; gone at the end, whatever happens."""
    try:
        temporary = tempfile.TemporaryDirectory(dir=path.parent, prefix=".")
    except OSError as error:
        raise InputError(
            f"An exported model's folder must be writable. Received: {path}: {error.strerror}"
        ) from error
    with temporary as name:
        yield pathlib.Path(name)


def _place(made, path):
    try:
        if made.is_dir():
            made.rename(path)
            return
        with atomic_write(path) as temporary:
            made.replace(temporary)
    except OSError as error:
        raise InputError(
            f"The exported model's place must be free. Received: {path}: {error.strerror}"
        ) from error


@contextlib.contextmanager
def _as_it_was(model):
    """PyTorch's modules know whether they train, and exporters tell them."""
    modes = [(m, m.training) for m in model.modules()] if hasattr(model, "modules") else []
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _unwarned():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _numpy(tensor) -> np.ndarray:
    with _unwarned():  # Keras copies PyTorch's tensors in a manner that NumPy 2.4 warns of
        return np.asarray(keras.ops.convert_to_numpy(tensor))


def _one_line(error) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + "..."
