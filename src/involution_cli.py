"""The command ``involution``.

A module beside the package, because importing the package imports Keras (2-5 s): this one parses,
settles the backend, says its first line, and only then imports ``involution``.
"""

import contextlib
import dataclasses
import io
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from importlib import metadata
from typing import Literal

import cyclopts
from cyclopts import Parameter

app = cyclopts.App(
    name="involution",
    help="Involution for Keras: compare it with convolution, train, predict, explain, export.",
    help_format="plaintext",
    version=lambda: metadata.version("involution"),
    version_flags=["--version"],
)

Backend = Literal["tensorflow", "jax", "torch"]

# As in involution.utils.errors, which a test compares.
CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]"
)

# Exit code of an error that is not the user's.
OWN_ERROR = 3
# Of a run whose loss was no number any more.
DIVERGED = 4
# Where a file could not be written: the disk is full.
UNWRITTEN = 5
# Of a host whose fellow was lost.
LOST = 6
# Where memory did not suffice.
TOO_LARGE = 7


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What ``compare`` and ``train`` have in common."""

    dataset: str = "digits"
    """digits, cifar10, a CIFAR-10 archive, or a folder with train/<class>/ and test/<class>/ or
    val/<class>/, or with tar files of these."""
    epochs: int | None = None
    """Passes over the training images; the recipe's unless given (20; imagenet's 130)."""
    recipe: Literal["example", "one-cycle", "imagenet"] = "example"
    """The keras.io example's training; AdamW, a rate that rises and falls, images mirrored; or the
    RedNet paper's for ImageNet: SGD, batches of 2048, random parts of 224x224."""
    batch_size: int | None = None
    """Images in a step; the recipe's, or what suits the data set, unless given."""
    seed: int = 42
    """Of the initial weights, the order of images and the choice of examples."""
    learning_rate: float | None = None
    """Of Adam or SGD; the recipe's unless given (0.001 in the example's)."""
    weight_decay: float | None = None
    """Of AdamW or SGD; the recipe's unless given (none in the example's)."""
    clip_norm: float | None = None
    """Cut the gradients, all together, to this norm; they are left as they are unless given."""
    accumulate: int | None = None
    """In how many parts a batch goes through the model, where it is too large for memory."""
    ema: float | None = None
    """Test and write a mean of the weights, which keeps so much of itself at each step: 0.999."""
    validation: int | None = None
    """Hold out so many training images, and measure on them in place of the test images; a search
    holds out a tenth unless told."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of what layers compute; bfloat16 is faster where the processor has it. Weights: float32."""
    image_size: str | None = None
    """Side, or HEIGHTxWIDTH, that a folder's images are resized to."""
    output: pathlib.Path | None = None
    """The folder to write: new or empty; runs/<dataset>-<time> unless given."""
    download: bool = False
    """Fetch CIFAR-10 (163 MB) where it is not in Keras's cache."""
    backend: Backend | None = None
    """Keras backend; otherwise KERAS_BACKEND, Keras's configuration, or the first installed."""


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Resume:
    """How ``compare`` and ``train`` outlive the process."""

    resume: bool = False
    """Go on from the last checkpoint in --output, if there is one; the result is the same."""
    checkpoint_every: int | None = None
    """Steps between checkpoints within an epoch; there is one after each epoch in any case."""
    allow_change: bool = False
    """Go on although options, images or versions are others than before."""


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Together:
    """What ``compare`` and ``train`` run on, with the JAX backend."""

    devices: int | None = None
    """Devices of a machine that share every batch; one, or with several hosts all, unless given."""
    coordinator: str | None = None
    """HOST:PORT of the first of several hosts, as all reach it; all are given the same --output."""
    num_hosts: int | None = None
    """How many hosts there are, each with this command and a --host-id of its own."""
    host_id: int | None = None
    """Which one this is, from 0."""


@app.command
def compare(
    *,
    models: str = "cnn,inn",
    recipe: Recipe = Recipe(),
    resume: Resume = Resume(),
    together: Together = Together(),
):
    """Train models on the same data and write one folder: figures, metrics, models, report.html.

    Parameters
    ----------
    models
        Names, comma-separated, with options: cnn,inn,inn:kernel_size=5,my_file.py:my_function. A
        file may import modules in its folder.
    """
    _run(f"Comparing {models} on {recipe.dataset}", models, recipe, resume, together)


@app.command
def train(
    *,
    model: str = "inn",
    recipe: Recipe = Recipe(),
    resume: Resume = Resume(),
    together: Together = Together(),
):
    """Train one model and write its folder.

    Parameters
    ----------
    model
        A name with options, as for compare: inn, inn:kernel_size=5, my_file.py:my_function. The
        file may import modules in its folder.
    """
    _run(f"Training {model} on {recipe.dataset}", model, recipe, resume, together)


@app.command
def sweep(
    *search: str,
    model: str = "rednet_tiny",
    trials: int = 40,
    max_parameters: int | None = None,
    study: str | None = None,
    recipe: Recipe = Recipe(),
):
    """Search for the best values of a model's options, and of the training, by Optuna.

    Run it again with the same --output to go on, or several times at once to share the work: the
    processes take turns at the trials of one study. Each trial takes 5 epochs unless told, and is
    judged on training images that were held out; hopeless ones are given up early. The folder gets
    trials.csv and report.html.

    Parameters
    ----------
    search
        What to vary: NAME=A,B,C or NAME=LOW..HIGH, of the model's options or learning_rate,
        weight_decay, batch_size; as kernel_size=3,5,7 learning_rate=0.001..0.03
    model
        A name with the options that stay as they are, as for train.
    trials
        How many the study shall have, those of all processes and of earlier runs together.
    max_parameters
        Models with more trainable parameters are not tried.
    study
        URL of a database to share between machines, as postgresql://host/name; otherwise a journal
        in the output folder.
    """
    with _session(f"Searching {model} on {recipe.dataset}.", recipe.backend) as session:
        from involution.models.specs import command_line
        from involution.training import experiment
        from involution.training.sweep import Plan, run
        from involution.utils import memory

        if recipe.epochs is None:
            recipe = dataclasses.replace(recipe, epochs=5)
        memory.keep_freed()
        plan = Plan(_config(experiment, model, recipe), search, trials, max_parameters)
        output = recipe.output or _free_folder(f"sweep-{recipe.dataset}")
        command = command_line("involution", *sys.argv[1:])
        done = run(plan, output, study, session.console, command)
        session.folder = output
        session.console.say(f"Report: {output / 'report.html'}")
        session.console.say(f"Trials: {done.trials}")
        if done.best is not None:
            session.console.say(f"Best: {done.accuracy:.4f}, {plan.command(done.best)}")
        if done.exit_code:
            raise SystemExit(done.exit_code)


@app.command
def predict(
    *files: pathlib.Path,
    top: int = 3,
    backend: Backend | None = None,
):
    """Classify images: the most likely classes with their probabilities.

    Parameters
    ----------
    files
        A model, if not rednet_tiny-cifar10: a .keras file written by compare or train, a folder,
        or the name of a model that comes along, as cnn-cifar10. Then images: PNG, JPEG or WebP.
    top
        How many classes to show for each image.
    backend
        Keras backend; otherwise KERAS_BACKEND, Keras's configuration, or the first installed.
    """
    with _session("Reading the model.", backend) as session:
        from involution.saving import classifier as saved_model
        from involution.utils.errors import InputError

        if top < 1:
            raise InputError(f"--top must be at least 1. Received: {top}")
        classifier, images = _read(saved_model, files)
        for image, tensor in images:
            scores = classifier.scores(tensor)[0]
            best = scores.argsort()[::-1][:top]
            session.console.say(
                f"{image}: "
                + ", ".join(f"{classifier.class_names[i]} {scores[i]:.3f}" for i in best)
            )


@app.command
def explain(
    *files: pathlib.Path,
    output: pathlib.Path = pathlib.Path("explain.png"),
    show: Literal["maps", "outputs", "place", "groups"] = "maps",
    place: str = "0.5,0.5",
    backend: Backend | None = None,
):
    """Draw the kernels that involutions generate for images.

    Parameters
    ----------
    files
        A model with involutions, if not rednet_tiny-cifar10, which comes along: a .keras file
        written by compare or train, or a folder. Then images: PNG, JPEG or WebP.
    output
        The file to write: .png or .svg, for one kind of figure, or .html, a page with all of them.
        An existing one is replaced.
    show
        The figure: maps, heat maps beside and over each image; outputs, heat maps beside what the
        involutions give; place, the kernels at one place before and after training; groups, a heat
        map for each group of channels.
    place
        ROW,COLUMN of the place, as shares of the image: 0,0 is the top left corner, 1,1 the other.
    backend
        Keras backend; otherwise KERAS_BACKEND, Keras's configuration, or the first installed.
    """
    with _session("Explaining images.", backend) as session:
        from involution.saving import classifier as saved_model
        from involution.visualize import explain as explaining

        classifier, images = _read(saved_model, files)
        for line in explaining.write(classifier, images, output, show, _place(place)):
            session.console.say(line)


@app.command
def convert(source: pathlib.Path, destination: pathlib.Path, *, backend: Backend | None = None):
    """Convert a published checkpoint into a folder of this package: config.json, model.safetensors.

    Nothing in the checkpoint is executed. What the new model computes is compared with what NumPy
    computes from the checkpoint.

    Parameters
    ----------
    source
        A RedNet of the paper's authors (PyTorch, .pth) or of PaddleClas (.pdparams); or the folder
        of the SavedModel keras-io/involution.
    destination
        The folder to write: new or empty.
    backend
        Keras backend; otherwise KERAS_BACKEND, Keras's configuration, or the first installed.
    """
    with _session(f"Converting {source}.", backend) as session:
        from involution.models.convert import convert

        for line in convert(source, destination).lines:
            session.console.say(line)
        session.console.say(f"Model: {destination}")


@app.command
def export(
    model: pathlib.Path,
    *,
    format: Literal["onnx", "saved_model", "pt2"] = "onnx",
    output: pathlib.Path | None = None,
    image_size: str | None = None,
    backend: Backend | None = None,
):
    """Write a model for another runtime, and check what was written by that runtime.

    Parameters
    ----------
    model
        A .keras file, or a folder written by convert.
    format
        onnx, from every backend; saved_model, from TensorFlow; pt2, from PyTorch.
    output
        What to write: an existing file is replaced, a folder (saved_model) must be new. Named after
        the model unless given.
    image_size
        Side, or HEIGHTxWIDTH, for a model that takes images of any size; then only of that one.
    backend
        Keras backend; otherwise KERAS_BACKEND, Keras's configuration, or the first installed.
    """
    with _session(f"Exporting {model} as {format}, and checking it.", backend) as session:
        from involution.export.api import export
        from involution.saving import classifier as saved_model

        size = _size(image_size)
        loaded = saved_model.load_model(model)
        path = output or pathlib.Path(
            f"{model.stem}_saved_model" if format == "saved_model" else f"{model.stem}.{format}"
        )
        done = export(loaded, path, format, _with_size(loaded, size))
        session.console.say(
            f"{done.path}: {done.bytes:,} bytes, from {', '.join(done.inputs)} to "
            f"{', '.join(done.outputs)}, any batch, in {done.seconds:.0f} s"
        )
        session.console.say(
            f"check: for batches of {' and '.join(map(str, done.batches))} {done.runtime} gives "
            f"the model's numbers to {done.error:.1e} of the largest"
        )


@app.command
def demo(
    *models: str,
    host: str = "127.0.0.1",
    port: int = 7860,
    backend: Backend | None = None,
):
    """Serve the page: an image in; classes, heat maps and the kernels of any place out.

    It listens to this machine alone unless told otherwise, keeps no image, and fetches nothing.

    Parameters
    ----------
    models
        Models to show side by side, as for predict; those that come along unless given.
    host
        The address to listen at; 0.0.0.0 lets other machines in.
    port
        The port; 0 takes a free one.
    backend
        Keras backend; otherwise KERAS_BACKEND, Keras's configuration, or the first installed.
    """
    with _session("Preparing the page.", backend) as session:
        from involution.demo import app as page

        with page.serve(
            page.build(page.load(models), page.model_cards(models)), host, port
        ) as address:
            session.console.say(f"Page: {address} (Ctrl-C ends it)")
            _wait_for_the_end()
        session.console.say("Ended.")


def _wait_for_the_end():
    """Until Ctrl-C or a request to terminate."""
    end = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: end.set())
    end.wait()


@app.command
def doctor(*, backend: Backend | None = None):
    """Show what runs here, what does not and why, with each implementation's measured error.

    Parameters
    ----------
    backend
        Keras backend; otherwise KERAS_BACKEND, Keras's configuration, or the first installed.
    """
    with _session("Examining this installation.", backend) as session:
        from involution.benchmarking import doctor as checks

        healthy = True
        for line, ok in checks.lines():
            session.console.say(line)
            healthy = healthy and ok
        if not healthy:
            raise SystemExit(1)


@app.command
def bench(
    *,
    cases: str = "tut,red1,red2,red3,red4,odd,line,cube",
    candidates: str | None = None,
    dtypes: str = "float32",
    calls: int = 10,
    seconds: float = 2.0,
    memory: bool = False,
    device: str = "cpu",
    batch: int | None = None,
    output: pathlib.Path | None = None,
    backend: Backend | None = None,
):
    """Measure speed and memory by case and implementation, beside what involution replaces.

    Each case is checked first: what computes wrong values gets no figure. The limit is the least
    time that this machine allows, measured in the same run.

    Parameters
    ----------
    cases
        Named sizes, comma-separated.
    candidates
        native, taps, reference, rows, triton: implementations; patches, the keras.io example's
        formula; conv3, Keras's convolution with a window of 3; depthwise, its depthwise convolution
        with involution's window; fused and two-steps, with kernels that are generated; on PyTorch
        compiled-taps, and on CUDA devices per-number, the formula of the paper's own code.
        Otherwise what suits the device, and no generated kernels.
    dtypes
        Some of float32, bfloat16, float16, float64.
    calls
        Calls that follow each other in one compiled program.
    seconds
        How long to measure each candidate at least.
    memory
        Measure peak memory too, each in a process of its own: some seconds more for every figure.
    device
        cpu, or on PyTorch cuda: there the device's time for a recorded graph of the calls.
    batch
        How many samples, instead of the cases' own.
    output
        A CSV file to write; an existing one is replaced.
    backend
        Keras backend; otherwise KERAS_BACKEND, Keras's configuration, or the first installed.
    """
    with _session("Measuring.", backend) as session:
        from involution.benchmarking import runner
        from involution.utils import atomic_files

        plan = runner.Plan(
            cases=tuple(cases.split(",")),
            candidates=tuple(
                runner.DEFAULT_CANDIDATES.get(device, runner.CANDIDATES)
                if candidates is None
                else candidates.split(",")
            ),
            dtypes=tuple(dtypes.split(",")),
            calls=calls,
            seconds=seconds,
            memory=memory,
            device=device,
            batch=batch,
        )
        runner.check(plan, output)
        rows = []
        for line in runner.header(plan):
            session.console.say(line)
        for row in runner.run(plan, session.console.say):
            rows.append(row)
            session.console.say(runner.format_row(row))
            if output is not None:
                # After each: a run that is cut short has lost nothing.
                atomic_files.write_text(output, runner.to_csv(rows, device))
        if output is not None:
            session.console.say(f"Figures: {output}")


class _Session:
    """One command at work: its console, and the folder that its log belongs into."""

    def __init__(self):
        from involution import backend
        from involution.utils.progress import Console

        self.console = Console()
        self.folder: pathlib.Path | None = None
        if backend.notice is not None:
            self.console.say(f"involution: {backend.notice}")


@contextlib.contextmanager
def _session(first_line, backend):
    print(f"involution: {_shown(first_line)}", flush=True)
    if backend is not None:
        os.environ["KERAS_BACKEND"] = backend
    try:
        log = pathlib.Path(tempfile.mkdtemp(prefix="involution-")) / "log.txt"
    except OSError as error:
        reason = f"A folder for temporary files must be writable. Received: {error}"
        raise SystemExit(_fail(reason, UNWRITTEN)) from error
    session = failure = None
    try:
        with _chatter_to(log):
            try:
                session = _Session()
                yield session
            except KeyboardInterrupt:
                failure = ("interrupted.", 130)
            except Exception as error:  # noqa: BLE001 - none may reach a person as a traceback
                failure = _explain(error, log)
            finally:
                if session is not None:
                    session.console.stop()
    finally:
        # The log goes where the run is; without a run only an error of our own keeps it.
        if session is not None and session.folder is not None:
            _keep(log, session.folder)
        if failure is None or failure[1] != OWN_ERROR:
            shutil.rmtree(log.parent, ignore_errors=True)
    if failure is not None:
        raise SystemExit(_fail(*failure))


def _keep(log, folder):
    from involution.utils import atomic_files

    # Of a full disk the command has told by now.
    with contextlib.suppress(OSError):
        text = log.read_text(encoding="utf-8", errors="backslashreplace")
        atomic_files.write_text(folder / "log.txt", "\n".join(map(_shown, text.split("\n"))))


def _explain(error, log) -> tuple[str, int]:
    """What to say of an error, and the exit code."""
    ours, cluster = (sys.modules.get(f"involution.{name}") for name in ("errors", "cluster"))
    if cluster and isinstance(error, cluster.LostHostError):
        return str(error), LOST
    if isinstance(error, ImportError) or (ours and isinstance(error, ours.InputError)):
        return str(error), 2
    if ours and isinstance(error, ours.WriteError):
        return str(error), UNWRITTEN
    if isinstance(error, PermissionError):
        told = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return f"Files and folders must be open to this user. Received: {told}", 2
    reason = ours.out_of_memory(error) if ours else None
    if reason is not None:
        return (
            "Memory must suffice; in training a smaller --batch-size or --image-size takes less, "
            f"or --accumulate. Received: {reason}",
            TOO_LARGE,
        )
    with open(log, "a", encoding="utf-8", errors="backslashreplace") as file:
        for line in "".join(traceback.format_exception(error)).split("\n"):
            print(_shown(line), file=file)
    return f"an error of our own, {type(error).__name__}; all about it is in {log}", OWN_ERROR


@contextlib.contextmanager
def _chatter_to(log):
    """What frameworks write to standard error, from C++ too, goes to a file."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def _fail(message, code=2) -> int:
    line = _shown(" ".join(message.split()))
    print(f"involution: error: {line}", file=sys.stderr, flush=True)
    return code


def _shown(text) -> str:
    """Writes control characters as escapes, as ``involution.utils.errors.shown``, whose package
    takes seconds to import."""
    return CONTROL.sub(lambda m: f"\\u{ord(m[0]):04x}", text)


def _run(what, models, recipe, resume, together):
    # Of several hosts JAX ends those whose coordinator is lost at once. What tells of them is asked
    # before the package, which takes seconds to import, turns standard error to the log.
    several = (
        together.num_hosts not in (None, 1) or "KERAS_DISTRIBUTION_NUM_PROCESSES" in os.environ
    )
    if not several:
        return _train(what, models, recipe, resume, together)
    code = 0
    with _last_words(
        "involution: error: The run was ended: a host was lost, or did not come within a minute. "
        "With all hosts there, go on with --resume."
    ):
        try:
            _train(what, models, recipe, resume, together)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    if code:
        # The others are not waited for.
        sys.stdout.flush()
        os._exit(code)


@contextlib.contextmanager
def _last_words(text):
    """Prints ``text`` if this process dies within the block."""
    program = "import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr, flush=True)"
    command = [sys.executable, "-S", "-E", "-c", program, text]
    witness = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # noqa: S603 - our own
    try:
        yield
    finally:
        witness.communicate(b"all is said")


def _train(what, models, recipe, resume, together):
    with _session(f"{what}.", recipe.backend) as session:
        from involution.models.specs import command_line
        from involution.training import distributed, experiment
        from involution.utils import memory
        from involution.utils.errors import InputError

        memory.keep_freed()
        config = _config(experiment, models, recipe)
        output = recipe.output or _free_folder(config.dataset)
        command = command_line("involution", *sys.argv[1:])
        if resume.resume and recipe.output is None:
            raise InputError("--resume needs --output, the folder to go on in. Received: none")
        hosts = distributed.of(
            together.devices, together.coordinator, together.num_hosts, together.host_id
        )
        if hosts.hosts > 1 and recipe.output is None:
            raise InputError("--num-hosts needs --output, the folder of all. Received: none")
        distributed.begin(hosts)
        how = {**dataclasses.asdict(resume), "together": hosts}
        run = experiment.compare(config, output, session.console, command=command, **how)
        if hosts.writes:
            session.folder = output
            _conclude(run, output, session.console)
        else:
            session.console.say("Done: the first host writes the report.")
        if run.interrupted or run.failure is not None:
            again = command_line("--output", output, "--resume")
            session.console.say(f"Go on:  the same command with {again}")
        if run.interrupted:
            raise SystemExit(run.exit_code)
        if run.failure is not None:
            raise SystemExit(DIVERGED)


def _config(experiment, models, recipe):
    """What is run: the recipe's fields are the configuration's, but for these."""
    own = experiment.training.RECIPES[recipe.recipe]
    given = dataclasses.asdict(recipe) | {
        "models": models,
        "epochs": own.epochs if recipe.epochs is None else recipe.epochs,
        "image_size": _size(recipe.image_size) or own.image_size,
    }
    del given["output"], given["backend"]
    return experiment.Config(**given)


def _size(text) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        from involution.utils.errors import InputError

        raise InputError(f"--image-size must be a side or HEIGHTxWIDTH, above 0. Received: {text}")
    return (int(parts[0]), int(parts[-1]))


def _place(text) -> tuple[float, ...]:
    try:
        return tuple(float(share) for share in text.split(","))
    except ValueError:
        from involution.utils.errors import InputError

        raise InputError(f"--place must be ROW,COLUMN. Received: {text}") from None


def _with_size(model, size) -> tuple | None:
    """The model's input shape with (height, width) where it leaves two sizes open."""
    if size is None:
        return None
    shape = model.inputs[0].shape[1:]
    if shape.count(None) != len(size):
        from involution.utils.errors import InputError

        raise InputError(
            "--image-size is for a model that leaves both sizes open. "
            f"Received: one for images of {shape}"
        )
    sizes = iter(size)
    return tuple(next(sizes) if n is None else n for n in shape)


def _conclude(run, output, console):
    from involution.models.specs import command_line
    from involution.training import report
    from involution.visualize import activations

    console.say("")
    console.say(report.verdict(run))
    console.say("")
    for line in report.markdown(run).splitlines():
        console.say(line)
    console.say("")
    console.say(f"Report: {output / 'report.html'}")
    if not run.results:
        return
    file = output / run.results[-1].file
    console.say(f"Next: {command_line('involution', 'predict', file)} IMAGE...")
    if activations.has_involutions(run.results[-1].classifier.model):
        console.say(f"      {command_line('involution', 'explain', file)} IMAGE...")


def _free_folder(dataset) -> pathlib.Path:
    name = f"{pathlib.Path(dataset).resolve().stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, number = pathlib.Path("runs") / name, 1
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{name}-{number}")
    return folder


def _read(saved_model, files):
    """(classifier, pairs of a file and its image), of the files that a command was given."""
    from involution.utils.errors import InputError

    named = bool(files) and saved_model.is_model(files[0])
    images = files[1:] if named else files
    if not images:
        raise InputError("At least one image must be given. Received: none")
    classifier = saved_model.load(files[0] if named else saved_model.DEFAULT)
    return classifier, [(image, classifier.read(image)) for image in images]


def main():
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal cannot show is no reason to stop.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        raise SystemExit(_fail(str(error))) from None


if __name__ == "__main__":
    main()
