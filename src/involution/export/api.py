"""``export``: writes a model as ONNX, SavedModel, PT2 or LiteRT, then verifies the file.

By default involutions are traced with portable implementations, which consist of standard
operations: the file runs without this package.
"""

import contextlib
import dataclasses
import importlib
import json
import pathlib
import tempfile
import time
from importlib import metadata

import keras

import involution.onnx
from involution.export import litert, onnx, preprocessing, saved_model, torch_export, verify
from involution.export.errors import as_export_error, ignore_warnings
from involution.export.spec import make_spec
from involution.kernel_generators.attachment import layers_within
from involution.kernel_generators.pointwise import as_convolutions
from involution.models import fold
from involution.ops import force_implementation
from involution.ops.dispatch import PORTABLE
from involution.saving.classifier import SCALING, Classifier
from involution.utils import atomic_files
from involution.utils.errors import InputError

FORMATS = ("onnx", "saved_model", "pt2", "tflite")
# Implementations of the involutions in the file.
OPERATORS: dict[str, tuple[str, ...]] = {
    "portable": PORTABLE,
    "native": ("onnxruntime", *PORTABLE),
}

# By format, the backends that can write it, with the packages that each requires.
REQUIREMENTS: dict[str, dict[str, tuple[str, ...]]] = {
    "onnx": {
        "tensorflow": ("onnx", "onnxruntime", "tf2onnx"),
        "jax": ("onnx", "onnxruntime", "onnxscript", "jax2onnx"),
        "torch": ("onnx", "onnxruntime", "onnxscript"),
    },
    "saved_model": {"tensorflow": ()},
    "pt2": {"torch": ()},
    "tflite": {"tensorflow": ("ai_edge_litert",)},
}

# Extras that install these packages, by format and backend; "export" for all others.
EXTRAS = {("onnx", "jax"): "export-jax", ("tflite", "tensorflow"): "export-litert"}


# Layers of these modules are what their configurations say.
OWN_MODULES = ("keras.", "involution.")


@dataclasses.dataclass(frozen=True)
class Exported:
    """A written and verified file."""

    path: pathlib.Path
    format: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    error: float
    """Maximum error of the outputs, relative to the largest absolute value of each."""
    batches: tuple[int, ...]
    """The verified batch sizes."""
    runtime: str
    """Name and version of the runtime that verified the file."""
    bytes: int
    seconds: float


def export(
    model: keras.Model | Classifier,
    path,
    format="onnx",
    input_shape=None,
    *,
    operator="portable",
    preprocess=False,
) -> Exported:
    """Exports a model to another runtime's format, and verifies the file with that runtime.

    The batch dimension is dynamic in every format, and so are dimensions that are None in the
    model's inputs. A single input or output is named after its tensor, or ``input`` and ``output``;
    several outputs are named after their keys in the model's dictionary, nested keys joined by
    ``_``, or ``output_0``, ``output_1`` and so on. SavedModel's ``serve`` and the module of a .pt2
    file take positional inputs and return a dictionary of outputs. The model is not modified, and
    the file at ``path`` is written atomically.

    An ONNX file of a classifier has these ``metadata_props``: ``class_names``, a JSON list;
    ``layout``, NHWC; ``scaling``, of the pixels that the input takes; ``crop``, if the caller has
    to crop; ``outputs``, logits or probabilities. ``involution_version`` is in every ONNX file.

    Args:
        model: A built model that computes in float32, or a classifier from
            ``involution.saving.classifier.load``.
        path: The file to write; an existing file is replaced. For ``"saved_model"`` a folder that
            does not exist.
        format: ``"onnx"`` on every backend, ``"saved_model"`` and ``"tflite"`` (LiteRT) on
            TensorFlow, ``"pt2"`` (``torch.export``) on PyTorch.
        input_shape: Input shape without the batch, as (height, width, channels), for a model with
            one input that has unknown dimensions, or without symbolic inputs (a subclass). None:
            the model's.
        operator: ``"portable"``: involutions consist of standard operations, and the file runs
            without this package. ``"native"``, for ONNX: they are operators of the domain
            ``involution``, computed by the compiled kernels, several times as fast; a session of
            onnxruntime loads the file after ``involution.onnx.register(session_options)``.
        preprocess: Whether the ONNX file of a classifier takes decoded images, uint8
            (N, height, width, 3) of any size, which it crops, resizes and scales as ``predict``
            does; otherwise it takes the model's input.

    Returns:
        The written file with its measured error.

    Raises:
        InputError: The backend cannot write the format, a package or the native operator is
            missing, or the model, the path or another argument is invalid.
        ExportError: The exporter failed, or the runtime's outputs differ from the model's by more
            than 1e-4 of the largest absolute value.

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
    classifier = model if isinstance(model, Classifier) else None
    model = model.model if isinstance(model, Classifier) else model
    _check_format(format, backend)
    _check_preprocess(preprocess, format, classifier)
    _check_operator(operator, format)
    path = _check_target(path, format)
    _check_precision(model)
    if preprocess and input_shape is None and classifier is not None:
        input_shape = classifier.image_shape
    spec = make_spec(model, input_shape)
    _check_static_sizes(spec, backend)
    samples = [spec.random_inputs(batch) for batch in verify.BATCHES]
    expected = verify.expected_outputs(spec, samples)
    spec = _fold(dataclasses.replace(spec, outputs=tuple(expected[0])), samples[0], expected[0])
    with _temporary_folder(path) as folder:
        # Exporters infer the format from the suffix.
        temporary = folder / f"model.{format}"
        with (
            _restore_training_mode(spec.model),
            force_implementation(OPERATORS[operator]),
            as_convolutions(),
        ):
            _convert(spec, temporary, format, backend)
        runtime, outputs = verify.run(temporary, format, spec, samples, operator)
        error = verify.max_relative_error(spec, outputs, expected)
        if format == "onnx":
            front = preprocessing.make(classifier, input_shape) if preprocess else None
            onnx.finish(temporary, _metadata(classifier, preprocess), front)
        if preprocess:
            samples = [spec.random_images(batch) for batch in verify.BATCHES]
            _, outputs = verify.run(temporary, format, spec, samples, operator)
            scaled = verify.run_graph(front, samples)
            expected = verify.expected_outputs(spec, scaled)
            error = max(error, verify.max_relative_error(spec, outputs, expected))
        files = (temporary, *temporary.rglob("*"))
        size = sum(file.stat().st_size for file in files if file.is_file())
        _commit(temporary, path)
    seconds = time.monotonic() - started
    names = spec.inputs, spec.outputs
    return Exported(path, format, *names, error, verify.BATCHES, runtime, size, seconds)


def _check_format(format, backend):
    if format not in FORMATS:
        raise InputError(
            f"`format` must be one of {', '.join(FORMATS)}. Received: format={format!r}"
        )
    packages = REQUIREMENTS[format]
    if backend not in packages:
        required = " or ".join(packages)
        first = next(iter(packages))
        raise InputError(
            f"The format {format} requires the {required} backend: --backend {first}, or "
            f"KERAS_BACKEND={first}. Received: format={format!r}, backend={backend}"
        )
    try:
        with ignore_warnings():
            for package in packages[backend]:
                importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            f"The format {format} on {backend} requires an extra: pip install "
            f"'involution[{EXTRAS.get((format, backend), 'export')}]'. "
            f"Received: no module {error.name}"
        ) from error


def _fold(spec, sample, expected):
    """``spec`` with the folded model, if that consists of layers whose configurations describe them
    and has the expected outputs."""
    kinds = {type(layer) for layer in layers_within(spec.model)}
    if any(not kind.__module__.startswith(OWN_MODULES) for kind in kinds):
        return spec
    try:
        folded = dataclasses.replace(spec, model=fold(spec.model))
        outputs = verify.expected_outputs(folded, [sample])
        verify.max_relative_error(spec, outputs, [expected], verify.BATCHES[:1])
    except (ValueError, TypeError):  # a subclass of Model; a function in a configuration
        return spec
    return folded


def _check_operator(operator, format):
    if operator not in OPERATORS:
        raise InputError(
            f"`operator` must be one of {', '.join(OPERATORS)}. Received: operator={operator!r}"
        )
    if operator == "native":
        if format != "onnx":
            raise InputError(
                "The native operator is for the format onnx. "
                f"Received: operator={operator!r}, format={format!r}"
            )
        involution.onnx.library_path()


def _check_preprocess(preprocess, format, classifier):
    if preprocess and format != "onnx":
        raise InputError(
            "`preprocess` is for the format onnx. "
            f"Received: preprocess={preprocess!r}, format={format!r}"
        )
    if preprocess and classifier is None:
        raise InputError(
            "`preprocess` requires a classifier, a model with class names and an image size. "
            f"Received: preprocess={preprocess!r}, a model without them"
        )


def _metadata(classifier, preprocess) -> dict[str, str]:
    """The ``metadata_props`` of an ONNX file: what its caller has to know."""
    found = {"involution_version": metadata.version("involution")}
    if classifier is None:
        return found
    found |= {
        "class_names": json.dumps(classifier.class_names, ensure_ascii=False),
        "layout": "NHWC",
        "scaling": "none" if preprocess else SCALING,
        "outputs": classifier.outputs,
    }
    if classifier.crop_fraction is not None and not preprocess:
        found["crop"] = str(classifier.crop_fraction)
    return found


def _check_target(path, format) -> pathlib.Path:
    path = pathlib.Path(path)
    if not path.parent.is_dir():
        raise InputError(f"The folder of the exported file must exist. Received: {path}")
    if format == "saved_model" and (path.exists() or path.is_symlink()):
        raise InputError(
            f"A SavedModel must be written to a new folder. Received: {path}, which exists"
        )
    if path.is_dir():
        raise InputError(
            f"`path` must be a file for this format. Received: {path}, which is a folder"
        )
    return path


def _check_precision(model):
    for layer in (model, *model.layers):
        if layer.compute_dtype != "float32":
            raise InputError(
                "The exported model must compute in float32: build it with that dtype policy and "
                "copy the weights by set_weights(). "
                f"Received: {layer.name}, which computes in {layer.compute_dtype}"
            )


def _check_static_sizes(spec, backend):
    if backend == "jax" and spec.has_unknown_sizes:
        shapes = ", ".join(str(tuple(input_spec.shape)) for input_spec in spec.specs)
        raise InputError(
            "Export on JAX requires static sizes: give `input_shape` as (height, width, channels) "
            "(--image-size on the command line), or export on TensorFlow or PyTorch: "
            "--backend tensorflow. "
            f"Received: inputs of shape {shapes}"
        )


def _convert(spec, path, format, backend):
    message = f"The exporter of {backend} cannot write the model as {format}; {spec.remedy}"
    with as_export_error(message):
        if format == "onnx":
            onnx.write(spec, path, backend)
        elif format == "saved_model":
            saved_model.write(spec, path)
        elif format == "tflite":
            litert.write(spec, path)
        else:
            torch_export.write(spec, path)


@contextlib.contextmanager
def _temporary_folder(path):
    """A folder on the target's file system, so that the file can be renamed into place."""
    try:
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=".")
    except OSError as error:
        raise InputError(
            f"The folder of the exported file must be writable. Received: {path}: {error.strerror}"
        ) from error
    with folder as name:
        yield pathlib.Path(name)


def _commit(temporary, path):
    if temporary.is_dir():
        atomic_files.move_folder(temporary, path)
        return
    with atomic_files.atomic_write(path) as replacement:
        temporary.replace(replacement)


@contextlib.contextmanager
def _restore_training_mode(model):
    """Exporters switch PyTorch modules to evaluation mode."""
    modes = [(m, m.training) for m in model.modules()] if hasattr(model, "modules") else []
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
