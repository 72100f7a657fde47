"""The commands: thin wrappers of the library."""

import dataclasses
import inspect
import io
import os
import pathlib
import signal
import sys
import threading
import time
from importlib import metadata
from typing import Annotated, Literal

import cyclopts
from cyclopts import Parameter

from involution_cli import predictions
from involution_cli.options import (
    BACKEND,
    DATA,
    MEASUREMENT,
    MODEL,
    OUTPUT,
    SEARCH,
    SERVER,
    Backend,
    DistributedOptions,
    ResumeOptions,
    SweepOptions,
    TrainingOptions,
    parse_point,
    parse_size,
    replace_deprecated,
    take_config,
)
from involution_cli.session import DIVERGED, WRITE_FAILED, discard_messages, fail, session, watchdog

app = cyclopts.App(
    name="involution",
    help="Involution for Keras: compare with convolution, train, predict, explain, export.",
    help_format="plaintext",
    version=lambda: metadata.version("involution"),
    version_flags=["--version"],
)
app.register_install_completion_command(
    help="Install the completion of commands and options for your shell."
)


def command(function):
    """Registers a command. Its help is its docstring, whose line breaks cyclopts would print: lines
    of a paragraph are joined, except indented ones before the parameters, which are examples."""
    text, heading, parameters = inspect.cleandoc(function.__doc__).partition("\n\nParameters\n")
    paragraphs = [
        paragraph if paragraph.startswith(" ") else paragraph.replace("\n", " ")
        for paragraph in text.split("\n\n")
    ]
    lines: list[str] = []
    for line in parameters.split("\n"):
        if line.startswith(" ") and lines[-1].startswith(" "):
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line)
    function.__doc__ = "\n\n".join(paragraphs) + heading + "\n".join(lines)
    return app.command(function)


@command
def compare(
    *,
    models: Annotated[str, Parameter(group=MODEL)] = "cnn,inn",
    training: TrainingOptions = TrainingOptions(),
    resume: ResumeOptions = ResumeOptions(),
    distributed: DistributedOptions = DistributedOptions(),
):
    """Train models on the same data and write one folder: figures, metrics, models, report.html.

    For example:

        involution compare
        involution compare --models cnn,inn:kernel_size=5 --epochs 5

    Parameters
    ----------
    models
        Model specs, comma-separated: names with options, such as cnn,inn,inn:kernel_size=5,
        my_file.py:my_function, or trained models, as for train --init-from. A Python file may
        import modules from its folder.
    """
    _run("compare", f"Comparing {models} on", models, training, resume, distributed)


@command
def train(
    *,
    model: Annotated[str | None, Parameter(group=MODEL)] = None,
    init_from: Annotated[str | None, Parameter(group=MODEL)] = None,
    training: TrainingOptions = TrainingOptions(),
    resume: ResumeOptions = ResumeOptions(),
    distributed: DistributedOptions = DistributedOptions(),
):
    """Train one model and write its folder.

    For example:

        involution train --model inn --epochs 5
        involution train --model cnn --recipe one-cycle --epochs 10

    Parameters
    ----------
    model
        Model spec, as for compare: inn, inn:kernel_size=5, my_file.py:my_function (default: inn).
    init_from
        Trained model to start from, instead of --model: a .keras file, a folder with a model, or
        the name of a pretrained model, such as rednet_tiny-cifar10. If the number of classes
        differs, its last layer is replaced.
    """
    if model is not None and init_from is not None:
        raise SystemExit(
            fail("At most one of --model and --init-from may be given. Received: both")
        )
    name = init_from or model or "inn"
    _run("train", f"Training {name} on", name, training, resume, distributed)


@command
def sweep(
    *search: str,
    model: Annotated[str, Parameter(group=MODEL)] = "rednet_tiny",
    trials: Annotated[int, Parameter(group=SEARCH)] = 40,
    max_parameters: Annotated[int | None, Parameter(group=SEARCH)] = None,
    study: Annotated[str | None, Parameter(group=SEARCH)] = None,
    training: SweepOptions = SweepOptions(),
):
    """Search hyperparameters of a model and its training with Optuna.

    The same command with the same --output resumes the study; several processes may run it
    concurrently. By default a trial has 5 epochs and is evaluated on held-out training images, and
    unpromising trials are pruned. The folder gets trials.csv and report.html.

    For example:

        involution sweep kernel_size=3,5,7 learning_rate=0.001..0.03
        involution sweep kernel_size=3,5 --model inn --trials 4 --epochs 1

    Parameters
    ----------
    search
        The search space: NAME=A,B,C or NAME=LOW..HIGH, for options of the model or learning_rate,
        weight_decay, batch_size; for example kernel_size=3,5,7 learning_rate=0.001..0.03
    model
        Model spec with the fixed options, as for train.
    trials
        Number of trials of the study, including those of other processes and earlier runs.
    max_parameters
        Maximum number of trainable parameters; larger models are skipped.
    study
        URL of a database that several machines share, such as postgresql://host/name (default: a
        journal in the output folder).
    """
    with _session("sweep", f"Sweep of {model} on {training.dataset}.", training.backend) as current:
        from involution.models.specs import command_line
        from involution.training.search_space import SweepConfig
        from involution.training.sweep import run
        from involution.utils import memory

        memory.disable_malloc_trim()
        config = SweepConfig(_config(model, training, epochs=5), search, trials, max_parameters)
        output = training.output or _new_folder(training.dataset, "sweep-")
        command = command_line("involution", *sys.argv[1:])
        result = run(config, output, study, current.progress, command)
        current.folder = output
        current.result(f"Report: {output / 'report.html'}")
        current.result(f"Trials: {result.trials}")
        if result.best is not None:
            current.result(f"Best: {result.accuracy:.4f}, {config.command(result.best)}")
        if result.exit_code:
            raise SystemExit(result.exit_code)


@command
def predict(
    *files: pathlib.Path,
    top: Annotated[int, Parameter(group=OUTPUT)] = 3,
    json: Annotated[bool, Parameter(group=OUTPUT, negative=())] = False,
    csv: Annotated[bool, Parameter(group=OUTPUT, negative=())] = False,
    backend: Backend = None,
):
    """Classify images: the most likely classes with their probabilities.

    Images that cannot be read are named, and the others classified; the exit code is 2 then.

    For example:

        involution predict photo.jpg
        involution predict cnn-cifar10 photos --top 1 --csv

    Parameters
    ----------
    files
        A model (default: rednet_tiny-cifar10): a .keras file written by compare or train, a folder
        with a model, or the name of a pretrained model, such as cnn-cifar10. Then images, or
        folders of images, which may contain further folders.
    top
        Number of classes per image.
    json
        Print a JSON array with an object for each image.
    csv
        Print CSV with a row for each image and class.
    """
    with _session("predict", "Classifying images.", backend) as current:
        from involution.utils.errors import InputError

        if top < 1:
            raise InputError(f"`top` must be at least 1. Received: {top}")
        if json and csv:
            raise InputError("At most one of `json` and `csv` may be set. Received: both")
        progress = current.progress
        progress.stage("Loading the model")
        classifier, images = load_classifier(files)
        images = _in_folders(images, progress.log)
        results, errors = [], []
        progress.begin("images", len(images))
        for image, scores in classifier.classify(images):
            progress.advance()
            if isinstance(scores, InputError):
                errors.append(scores)
                if len(errors) > 1:  # the first is in the error at the end
                    progress.log(f"Not read: {scores}")
                continue
            ranked = predictions.ranked(scores, classifier.class_names, top)
            results.append((image, ranked))
            if not (json or csv):
                current.result(predictions.as_text(image, ranked))
        if json or csv:
            text = (predictions.as_json if json else predictions.as_csv)(results)
            for line in text.splitlines():
                current.result(line)
        if errors:
            count = f"{len(errors)} of {len(images)} images cannot be read. "
            raise InputError(f"{count if len(images) > 1 else ''}{errors[0]}")


def _in_folders(paths, log) -> list:
    """The paths, with folders replaced by the images in them."""
    from involution.data.image_folder import find_images
    from involution.utils.errors import InputError

    images = []
    for path in paths:
        if not path.is_dir():
            images.append(path)
            continue
        found, skipped = find_images(path)
        if skipped:
            log(f"Skipped images: {skipped}.")
        if not found:
            raise InputError(f"A folder must contain images. Received: {path}, without any")
        images += found
    return images


@command
def explain(
    *files: pathlib.Path,
    output: Annotated[pathlib.Path, Parameter(group=OUTPUT)] = pathlib.Path("explain.png"),
    figure: Annotated[
        Literal["heatmap", "activations", "point", "groups", "use"], Parameter(group=OUTPUT)
    ] = "heatmap",
    point: Annotated[str, Parameter(group=OUTPUT)] = "0.5,0.5",
    backend: Backend = None,
):
    """Plot the kernels that involutions generate for images.

    For example:

        involution explain photo.jpg
        involution explain inn-cifar10 photo.jpg --output photo.html

    Parameters
    ----------
    files
        A model with involutions (default: rednet_tiny-cifar10): a .keras file written by compare or
        train, a folder, or the name of a pretrained model. Then images.
    output
        The file to write: .png or .svg for one figure, .html for a page with all of them. An
        existing file is replaced.
    figure
        heatmap: kernel heat maps next to and over each image; activations: heat maps next to the
        outputs of the involutions; point: the kernels at one point before and after training;
        groups: one heat map per group of channels; use: how many of the images keep their class
        when a layer's kernels are replaced by averages, which a convolution could have.
    point
        ROW,COLUMN of the point as fractions of the image: 0,0 is the top left corner, 1,1 the
        bottom right.
    """
    with _session("explain", "Explaining images.", backend) as current:
        from involution.visualize import explain

        progress = current.progress
        progress.stage("Loading the model and the images")
        classifier, images = read_images(files)
        progress.stage("Computing and drawing the kernels")
        lines = explain.write(
            classifier, images, output, figure, parse_point(point), progress=progress
        )
        for line in lines:
            current.result(line)


@command
def convert(
    source: Annotated[pathlib.Path, Parameter(group=MODEL)],
    destination: Annotated[pathlib.Path, Parameter(group=OUTPUT)],
    *,
    backend: Backend = None,
):
    """Convert a published checkpoint to a model folder: config.json, model.safetensors.

    No code in the checkpoint is executed. The outputs of the new model are verified against a NumPy
    computation from the checkpoint.

    For example:

        involution convert rednet50.pth rednet50
        involution convert rednet50.pdparams rednet50 --backend torch

    Parameters
    ----------
    source
        A RedNet checkpoint of the paper's authors (PyTorch, .pth) or of PaddleClas (.pdparams), an
        LSNet checkpoint (PyTorch, .pth), or the folder of the SavedModel keras-io/involution.
    destination
        Output folder, new or empty.
    """
    with _session("convert", f"Converting {source}.", backend) as current:
        from involution.models.convert import convert

        current.progress.stage("Converting and verifying")
        for line in convert(source, destination).lines:
            current.result(line)
        current.result(f"Model: {destination}")


@command
def export(
    model: Annotated[pathlib.Path, Parameter(group=MODEL)],
    *,
    format: Annotated[
        Literal["onnx", "saved_model", "pt2", "tflite"], Parameter(group=OUTPUT)
    ] = "onnx",
    output: Annotated[pathlib.Path | None, Parameter(group=OUTPUT)] = None,
    image_size: Annotated[str | None, Parameter(group=MODEL)] = None,
    operator: Annotated[Literal["portable", "native"], Parameter(group=MODEL)] = "portable",
    preprocess: Annotated[bool, Parameter(group=MODEL, negative=())] = False,
    backend: Backend = None,
):
    """Export a model for another runtime, and verify its outputs in that runtime.

    For example:

        involution export runs/digits/inn.keras
        involution export runs/digits/inn.keras --operator native --output fast.onnx

    Parameters
    ----------
    model
        A .keras file, a folder written by convert, or the name of a pretrained model, such as
        rednet_tiny-cifar10.
    format
        onnx (every backend), saved_model or tflite, for LiteRT (TensorFlow), or pt2 (PyTorch).
    output
        The file to write, replaced if it exists; saved_model: a new folder (default: named after
        the model).
    image_size
        Image size of the exported model, SIDE or HEIGHTxWIDTH; required if the model accepts any.
    operator
        Form of the involutions. portable: standard operations; native: operators of onnxruntime
        that involution.onnx.register provides, several times as fast (onnx only).
    preprocess
        The file takes decoded images, uint8 (N, height, width, 3) of any size, which it crops,
        resizes and scales as predict does (onnx only, models with class names).
    """
    with _session("export", f"Exporting {model} to {format}.", backend) as current:
        from involution.export.api import export
        from involution.saving import classifier

        size = parse_size(image_size)
        current.progress.stage("Loading the model")
        loaded = classifier.load_any(model)
        path = output or pathlib.Path(
            f"{model.stem}_saved_model" if format == "saved_model" else f"{model.stem}.{format}"
        )
        current.progress.stage("Exporting and verifying")
        network = loaded.model if isinstance(loaded, classifier.Classifier) else loaded
        result = export(
            loaded,
            path,
            format,
            _fixed_shape(network, size),
            operator=operator,
            preprocess=preprocess,
        )
        current.result(
            f"{result.path}: {result.bytes:,} bytes, {', '.join(result.inputs)} to "
            f"{', '.join(result.outputs)}, any batch size, in {result.seconds:.0f} s"
        )
        current.result(
            f"verified: for batches of {' and '.join(map(str, result.batches))} the outputs of "
            f"{result.runtime} match; maximum relative error {result.error:.1e}"
        )


@command
def demo(
    *models: str,
    host: Annotated[str, Parameter(group=SERVER)] = "127.0.0.1",
    port: Annotated[int, Parameter(group=SERVER)] = 7860,
    backend: Backend = None,
):
    """Serve a web demo: upload an image; get classes, heat maps and the kernels at any point.

    By default it listens on this machine only. It stores no images and downloads nothing.

    For example:

        involution demo
        involution demo rednet_tiny-cifar10 --port 0

    Parameters
    ----------
    models
        Models to show side by side, as for predict (default: the pretrained ones).
    host
        The address to listen on; 0.0.0.0 accepts connections from other machines.
    port
        The port; 0 selects a free one.
    """
    with _session("demo", "Starting the demo.", backend) as current:
        current.progress.stage("Importing Gradio")
        from involution.demo import app

        current.progress.stage("Loading the models, and running each once")
        page = app.build(app.load(models), app.model_cards(models))
        current.progress.stage("Starting the server")
        with app.serve(page, host, port) as address:
            current.progress.end()
            current.result(f"Demo: {address} (Ctrl-C to stop)")
            _wait_for_signal()
        current.progress.log("Stopped.")


def _wait_for_signal():
    """Waits for SIGINT (Ctrl-C) or SIGTERM."""
    received = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: received.set())
    # Without a timeout Ctrl-C does not end the wait on Windows before Python 3.14.
    while not received.wait(1):
        pass


@command
def doctor(
    *,
    all: Annotated[bool, Parameter(group=MEASUREMENT, negative=())] = False,
    backend: Backend = None,
):
    """Check this installation: backends, GPUs, optional packages, and results of the operator.

    The last line is the verdict; the exit code is 1 if an implementation gives wrong results.

    For example:

        involution doctor
        involution doctor --all --backend jax

    Parameters
    ----------
    all
        Check every implementation on every case, with the measured errors, and give the reasons
        why others are unavailable: up to a few minutes.
    """
    with _session("doctor", "Checking this installation.", backend) as current:
        from involution.benchmarking import doctor

        current.progress.stage("Comparing the implementations")
        healthy = True
        for line, ok in doctor.lines(all_cases=all):
            current.result(line)
            healthy = healthy and ok
        if not healthy:
            raise SystemExit(1)


@command
def bench(
    *,
    cases: Annotated[str, Parameter(group=DATA)] = "tut,red1,red2,red3,red4,odd,line,cube",
    candidates: Annotated[str | None, Parameter(group=MEASUREMENT)] = None,
    dtypes: Annotated[str, Parameter(group=DATA)] = "float32",
    calls: Annotated[int, Parameter(group=MEASUREMENT)] = 10,
    seconds: Annotated[float, Parameter(group=MEASUREMENT)] = 2.0,
    memory: Annotated[bool, Parameter(group=MEASUREMENT)] = False,
    device: Annotated[str, Parameter(group=BACKEND)] = "cpu",
    runtime: Annotated[Literal["onnxruntime"] | None, Parameter(group=MEASUREMENT)] = None,
    batch: Annotated[int | None, Parameter(group=DATA)] = None,
    output: Annotated[pathlib.Path | None, Parameter(group=OUTPUT)] = None,
    backend: Backend = None,
):
    """Measure speed and memory by case and implementation, compared with convolutions.

    Each candidate is verified first; those with wrong values are not measured. Rooflines are the
    minimum times on this machine, from peak FLOP/s and bandwidths measured in the same run: warm,
    with operands in the cache where they fit, as in the measured calls; cold, with operands in
    memory.

    For example:

        involution bench --cases red1,red4
        involution bench --candidates fused,unfused --memory --output fused.csv

    Parameters
    ----------
    cases
        Comma-separated: tut (the keras.io example's first layer), red1 to red4 (RedNet's stages),
        photo (red1 on a large image), odd (sizes that the stride does not divide), line (1D),
        cube (3D).
    candidates
        Comma-separated: native, taps, reference, triton, pallas (implementations); im2col (the
        formula of the keras.io example); conv3 (Keras's 3x3 convolution); depthwise (Keras's
        depthwise convolution with the window of the involution); fused, unfused (generated
        kernels); onnx-portable, onnx-native (generated kernels, exported and run by onnxruntime,
        forward only); on PyTorch compiled-taps, and on CUDA devices paper-cuda (the formula of the
        paper's code) (default: by device, without generated kernels).
    dtypes
        Comma-separated: float32, bfloat16, float16, float64.
    calls
        Consecutive calls in one compiled program.
    seconds
        Minimum measuring time per candidate.
    memory
        Measure peak memory too, each in its own process: a few more seconds per row.
    device
        cpu, or on PyTorch and JAX cuda: on PyTorch device time of a captured CUDA graph, on JAX
        wall-clock time of a compiled program.
    runtime
        onnxruntime: compare the exported operator in both forms with the framework's (selects the
        candidates unfused, fused, onnx-portable, onnx-native).
    batch
        Batch size (default: the case's).
    output
        The CSV file to write; an existing file is replaced.
    """
    with _session("bench", "Measuring.", backend) as current:
        # Otherwise JAX takes most of a GPU's memory, and processes that measure theirs have none.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

        from involution.benchmarking import runner
        from involution.utils import atomic_files

        plan = runner.Plan(
            cases=tuple(cases.split(",")),
            candidates=runner.default_candidates(device, runtime)
            if candidates is None
            else tuple(candidates.split(",")),
            dtypes=tuple(dtypes.split(",")),
            calls=calls,
            seconds=seconds,
            memory=memory,
            device=device,
            batch=batch,
        )
        runner.check(plan, output)
        rows: list[runner.Row] = []
        current.progress.stage("Measuring the rates of this machine")
        for line in runner.header(plan):
            current.result(line)
        # Without a spinner, whose thread would take time from what is measured.
        current.progress.end()
        current.progress.log("Compiling and verifying the candidates of a case before its rows.")
        for row in runner.run(plan, current.progress.log):
            for line in runner.format_row(row, rows[-1] if rows else None):
                current.result(line)
            rows.append(row)
            if output is not None:
                # After each row, so that an interrupted run loses none.
                atomic_files.write_text(output, runner.to_csv(rows, device))
        if output is not None:
            current.result(f"Results: {output}")


def option_names(command) -> set[str]:
    """The options of a command."""
    arguments = app[command].assemble_argument_collection()
    return {name for argument in arguments for name in argument.names}


def _session(command, first_line, backend):
    return session(first_line, backend, option_names(command))


def _run(command, action, models, training, resume, distributed):
    arguments = (command, action, models, training, resume, distributed)
    # JAX ends a process immediately when it loses the coordinator. The watchdog starts before the
    # package is imported and standard error redirected.
    is_distributed = (
        distributed.num_processes not in (None, 1)
        or "KERAS_DISTRIBUTION_NUM_PROCESSES" in os.environ
    )
    if not is_distributed:
        return _train(*arguments)
    code = 0
    with watchdog(
        "involution: error: The run ended: a host was lost, or did not connect within a minute. "
        "Resume with --resume when all hosts are available."
    ):
        try:
            _train(*arguments)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
    if code:
        # Without waiting for the other hosts.
        sys.stdout.flush()
        os._exit(code)


def _train(command, action, models, training, resume, distributed):
    with _session(command, f"{action} {training.dataset}.", training.backend) as current:
        from involution.models.specs import command_line
        from involution.training import distributed as distribution_strategy
        from involution.training import experiment
        from involution.utils import memory
        from involution.utils.errors import InputError

        memory.disable_malloc_trim()
        config = _config(models, training)
        output = training.output or _new_folder(config.dataset)
        line = command_line("involution", *sys.argv[1:])
        if resume.resume and training.output is None:
            raise InputError("`resume` requires `output`, the folder of the run. Received: none")
        distribution = distribution_strategy.from_environment(**dataclasses.asdict(distributed))
        if distribution.num_processes > 1 and training.output is None:
            raise InputError("`num_processes` requires `output`, the shared folder. Received: none")
        distribution_strategy.initialize(distribution)
        run = experiment.compare(
            config,
            output,
            current.progress,
            command=line,
            distribution=distribution,
            **dataclasses.asdict(resume),
        )
        if distribution.is_primary:
            current.folder = output
            _print_summary(run, output, current)
        else:
            current.progress.log("Done: the first host writes the report.")
        if run.interrupted or run.failure is not None:
            options = command_line("--output", output, "--resume")
            current.progress.log(f"Resume: the same command with {options}")
        if run.interrupted:
            raise SystemExit(run.exit_code)
        if run.failure is not None:
            raise SystemExit(DIVERGED)


def _config(models, training, epochs=None):
    """The configuration of a run; the number of epochs defaults to ``epochs``, then the
    recipe's."""
    from involution.training.recipes import RECIPES, Config

    settings = dataclasses.asdict(training) | {
        "models": models,
        "epochs": epochs if training.epochs is None else training.epochs,
        "image_size": parse_size(training.image_size)
        or RECIPES[training.recipe].image_size
        or _image_size(training.dataset, models),
    }
    for name in ("output", "backend", "config"):
        del settings[name]
    return Config(**settings)


def _image_size(dataset, models) -> tuple[int, int] | None:
    """The image size of the trained model that is to be fine-tuned on a folder of images."""
    from involution.training import fine_tuning

    if not pathlib.Path(dataset).expanduser().is_dir() or not fine_tuning.is_trained(models):
        return None
    return fine_tuning.image_size(models)


def _fixed_shape(model, size) -> tuple | None:
    """The model's input shape with (height, width) in place of its two unknown sizes."""
    if size is None:
        return None
    shape = model.inputs[0].shape[1:]
    if shape.count(None) != len(size):
        from involution.utils.errors import InputError

        raise InputError(
            "`image_size` requires a model whose height and width are not fixed. "
            f"Received: a model for images of {shape}"
        )
    sizes = iter(size)
    return tuple(next(sizes) if n is None else n for n in shape)


def _print_summary(run, output, current):
    from involution.models.specs import command_line
    from involution.training import report
    from involution.visualize import activations

    current.result(report.summary_sentence(run))
    current.result("")
    for line in report.text_table(run):
        current.result(line)
    current.result("")
    current.result(f"Report: {output / 'report.html'}")
    if not run.results:
        return
    file = output / run.results[-1].file
    log = current.progress.log
    log(f"Next: {command_line('involution', 'predict', file)} IMAGE...")
    if activations.has_involutions(run.results[-1].classifier.model):
        log(f"      {command_line('involution', 'explain', file)} IMAGE...")


def _new_folder(dataset, prefix="") -> pathlib.Path:
    """A path in runs/ that does not exist."""
    name = f"{prefix}{pathlib.Path(dataset).resolve().stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, number = pathlib.Path("runs") / name, 1
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{name}-{number}")
    return folder


def load_classifier(files):
    """(classifier, images) from the files of a command, of which the first may be a model."""
    from involution.saving import classifier
    from involution.utils.errors import InputError

    has_model = bool(files) and classifier.is_model(files[0])
    images = files[1:] if has_model else files
    if not images:
        raise InputError("At least one image is required. Received: none")
    return classifier.load(files[0] if has_model else classifier.DEFAULT), images


def read_images(files):
    """(classifier, [(file, image), ...]) from the files of a command, as ``load_classifier``."""
    classifier, images = load_classifier(files)
    return classifier, [(image, classifier.read(image)) for image in images]


def main():
    """Entry point of the console script."""
    if sys.stderr is None:  # closed
        discard_messages()
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - until the end
    if sys.stdout is None:
        raise SystemExit(fail("Standard output must be open. Received: closed", WRITE_FAILED))
    for stream in (sys.stdout, sys.stderr):
        # File names may contain characters that the terminal cannot encode.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        words, app.config = take_config(replace_deprecated(sys.argv[1:]))
        app(words, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        raise SystemExit(fail(str(error))) from None
    except OSError as error:  # of --install-completion; commands handle their own
        raise SystemExit(fail(f"Files must be writable. Received: {error}", WRITE_FAILED)) from None
