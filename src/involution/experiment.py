"""One run = one folder: models trained on the same data, side by side, and what came of it."""

import contextlib
import dataclasses
import datetime
import functools
import math
import os
import pathlib
import platform
import signal
import sys
import threading
import time
from importlib import metadata

import keras

from involution import data, model_labels, training
from involution.errors import InputError
from involution.files import csv_text, write_json, write_text
from involution.models import count_multiply_adds
from involution.saved_model import Classifier

# Keras's policies by the names of types.
PRECISIONS = {"float32": "float32", "bfloat16": "mixed_bfloat16"}


class Silent:
    """Where a run tells how far it is: this one says nothing. ``console.Console`` speaks."""

    def say(self, text):
        """One line."""

    def start(self, label, total):
        """A piece of work of so many steps begins."""

    def step(self):
        """One step is done."""

    def stop(self):
        """The piece of work is over."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        dataset: See ``data.load``.
        models: Names of models: see ``model_labels.parse``.
        epochs: Passes over the training images.
        recipe: How to train, one of ``training.RECIPES``.
        batch_size: Images in a step; None: the recipe's, or what suits the data set (256, for the
            digits 32).
        seed: Of the initial weights, the order of the images and the choice of examples.
        learning_rate: Of Adam; with a one-cycle recipe the largest. None: the recipe's.
        weight_decay: Of AdamW, 0 for Adam. None: the recipe's.
        validation: So many training images, always the same, are held out and measured on in place
            of the test images; None: none.
        image_size: (height, width) for a folder of images, None for their own.
        download: Whether CIFAR-10 may be fetched.
        precision: Of what layers compute, one of ``PRECISIONS``; weights are float32 in any case.
    """

    dataset: str = "digits"
    models: str = "cnn,inn"
    epochs: int = 20
    batch_size: int | None = None
    seed: int = 42
    learning_rate: float | None = None
    weight_decay: float | None = None
    image_size: tuple[int, int] | None = None
    download: bool = False
    precision: str = "float32"
    recipe: str = "example"
    validation: int | None = None

    def __post_init__(self):
        for name in ("epochs", "batch_size", "validation"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1. Received: {name}={value}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be from 0 to 2**32 - 1. Received: seed={self.seed}")
        if self.learning_rate is not None and not (0 < self.learning_rate < math.inf):
            raise InputError(
                f"learning_rate must be above 0. Received: learning_rate={self.learning_rate}"
            )
        if self.weight_decay is not None and not (0 <= self.weight_decay < math.inf):
            raise InputError(
                f"weight_decay must be at least 0. Received: weight_decay={self.weight_decay}"
            )
        if self.precision not in PRECISIONS:
            raise InputError(
                f"precision must be one of {', '.join(PRECISIONS)}. Received: {self.precision}"
            )
        if self.recipe not in training.RECIPES:
            raise InputError(
                f"recipe must be one of {', '.join(training.RECIPES)}. Received: {self.recipe}"
            )

    def recipe_for(self, dataset) -> training.Recipe:
        """The recipe, with what else is asked for."""
        recipe = training.RECIPES[self.recipe]
        return dataclasses.replace(
            recipe,
            learning_rate=self.learning_rate or recipe.learning_rate,
            weight_decay=recipe.weight_decay if self.weight_decay is None else self.weight_decay,
            batch_size=self.batch_size or recipe.batch_size or dataset.batch_size,
        )


@dataclasses.dataclass
class Result:
    """One model of a run, as far as it came."""

    label: str
    classifier: Classifier
    optimizer_variables: list
    rows: list[dict]
    seconds: float

    @property
    def file(self) -> str:
        """Name of the model's file in the run's folder."""
        return model_labels.file_name(self.label)

    @functools.cached_property
    def parameters(self) -> dict[str, int]:
        """Numbers of parameters, and their bytes with the optimizer's: training changes none."""
        model = self.classifier.model
        kinds = (model.trainable_variables, model.non_trainable_variables, self.optimizer_variables)
        counts = [count(variables) for variables in kinds]
        return {
            "trainable_params": counts[0],
            "non_trainable_params": counts[1],
            "optimizer_params": counts[2],
            "total_params": sum(counts),
            "bytes": sum(
                keras.ops.convert_to_numpy(v).nbytes
                for v in (*model.variables, *self.optimizer_variables)
            ),
        }

    @functools.cached_property
    def multiply_adds(self) -> int | None:
        """Of one image; None where a layer is of a kind that cannot be counted."""
        try:
            return count_multiply_adds(self.classifier.model)
        except ValueError:
            return None

    @property
    def metrics(self) -> dict:
        """This model's entry in metrics.json."""
        last = self.rows[-1] if self.rows else {}
        return {
            **self.parameters,
            "multiply_adds": self.multiply_adds,
            **{measure: last.get(measure) for measure in training.MEASURES},
            "best_test_accuracy": max((r["test_accuracy"] for r in self.rows), default=None),
            # The first epoch compiles; where there are others, they tell the speed.
            "seconds_per_epoch": _median([r["seconds"] for r in self.rows[1:] or self.rows]),
            "seconds": self.seconds,
            "epochs": len(self.rows),
        }


@dataclasses.dataclass
class Run:
    """A run, as far as it came: everything its report shows."""

    config: Config
    dataset: data.Dataset
    recipe: training.Recipe
    results: list[Result]
    command: str
    started: str
    interrupted: bool = False
    peak_memory_bytes: int | None = None

    @property
    def metrics(self) -> dict:
        return {
            "dataset": self.dataset.name,
            "backend": keras.config.backend(),
            "interrupted": self.interrupted,
            "peak_memory_bytes": self.peak_memory_bytes,
            "models": {r.label: r.metrics for r in self.results},
        }

    @property
    def description(self) -> dict:
        """What config.json holds: all it takes to repeat it, and where it ran."""
        return {
            **dataclasses.asdict(self.config),
            "training": dataclasses.asdict(self.recipe),
            "command": self.command,
            "started": self.started,
            "images": {"train": len(self.dataset.x_train), "test": len(self.dataset.x_test)},
            "backend": keras.config.backend(),
            "versions": versions(),
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
        }


def compare(
    config: Config,
    output,
    console=None,
    builders: dict[str, model_labels.Builder] | None = None,
    command: str = "",
) -> Run:
    """Trains models on the same data and writes one folder about it.

    The folder gets config.json, history.csv, metrics.json, the models, figures and report.html. An
    interruption (Ctrl-C) takes effect after the step at work and leaves what there is, with a
    report of it; a second one stops at once. Keras's session is cleared and its seed set.

    Args:
        config: What to run.
        output: The folder: new, or empty.
        console: Where progress goes; see ``Silent``.
        builders: Models of one's own, instead of ``config.models``: functions of (input_shape,
            classes) that return a Keras model from images to logits, by label.
        command: What was typed, for the report.

    Raises:
        InputError: Something given cannot be used; nothing has been written then.
    """
    from involution import report  # draws, and so needs the extra packages

    console = console or Silent()
    output = pathlib.Path(output)
    check_folder(output)
    builders = model_labels.parse(config.models) if builders is None else builders
    dataset = load(config, console)
    networks = {
        label: build(label, builder, dataset, config) for label, builder in builders.items()
    }
    run = Run(
        config=config,
        dataset=dataset,
        recipe=config.recipe_for(dataset),
        results=[],
        command=command,
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    make_folder(output)
    write_json(output / "config.json", run.description)
    with interruptions(console) as step:
        try:
            for label, network in networks.items():
                _train(run, label, network, output, console, step)
        except KeyboardInterrupt:
            run.interrupted = True
            console.stop()
            console.say("Interrupted: writing what there is.")
        run.peak_memory_bytes = peak_memory()
        write_json(output / "metrics.json", run.metrics)
        report.write(run, output)
    return run


@contextlib.contextmanager
def interruptions(console):
    """Within the block the first Ctrl-C is a request: an exception in the midst of a step could
    leave a model without its weights. The function yielded, called after each step, tells the
    console and raises KeyboardInterrupt when asked to. The second one is as ever."""
    asked = threading.Event()

    def step():
        console.step()
        if asked.is_set():
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield step  # signals are for the main thread alone
        return

    def ask(signal_number, frame):
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        console.say("Stopping after this step; once more to stop at once.")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield step
    finally:
        signal.signal(signal.SIGINT, before)


def load(config, console) -> data.Dataset:
    """The images of a run."""

    def progress(done, total):
        if done == 1:
            console.start("reading images", total)
        console.step()
        if done == total:
            console.stop()

    dataset = data.load(config.dataset, config.image_size, config.download, progress)
    return dataset if config.validation is None else dataset.validation(config.validation)


def build(label, builder, dataset, config) -> keras.Model:
    """A model for these images, from the seed, or InputError."""
    classes = len(dataset.class_names)
    # Every model starts from the seed alone, whatever was made before it.
    keras.utils.clear_session()
    keras.utils.set_random_seed(config.seed)
    policy = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy(PRECISIONS[config.precision])
        network = builder(input_shape=dataset.image_shape, classes=classes)
        if not isinstance(network, keras.Model):
            raise TypeError(f"a {type(network).__name__}, not a Keras model")
        shape = network(keras.KerasTensor((None, *dataset.image_shape))).shape
        if tuple(shape) != (None, classes):
            raise ValueError(f"outputs of shape {tuple(shape)}, not {(None, classes)}")
        if not getattr(network, "inputs", None):
            raise TypeError("a subclassed model, neither functional nor Sequential")
    except Exception as error:  # a user's own function may raise anything
        reason = " ".join(str(error).split())
        raise InputError(f"A model must build for {classes} classes: {label}: {reason}") from error
    finally:
        keras.config.set_dtype_policy(policy)
    return network


def _train(run, label, network, output, console, step):
    config, dataset = run.config, run.dataset
    trainer = training.Trainer(network, dataset, run.recipe, config.epochs, config.seed)
    classifier = Classifier(network, dataset.class_names, dataset.image_shape)
    result = Result(label, classifier, trainer.optimizer_variables, [], 0.0)
    run.results.append(result)
    start = time.perf_counter()
    console.start(label, trainer.steps)
    try:
        for row in trainer.epochs(step):
            result.rows.append(row)
            result.seconds = time.perf_counter() - start
            write_text(output / "history.csv", history(run.results))
            console.say(
                f"{label}: epoch {row['epoch']}/{config.epochs}: "
                f"train loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.4f}; "
                f"test loss {row['test_loss']:.4f}, accuracy {row['test_accuracy']:.4f} "
                f"({row['seconds']:.1f} s)"
            )
    finally:
        console.stop()
        result.seconds = time.perf_counter() - start
        classifier.save(output / result.file)


def history(results) -> str:
    """history.csv: nothing in it depends on the clock, so one seed gives one file."""
    columns = ("model", "epoch", *training.MEASURES)
    rows = [{"model": result.label, **row} for result in results for row in result.rows]
    return csv_text(columns, rows)


def check_folder(output):
    """Raises InputError unless a run can be written there."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"The output folder must be new or empty. Received: {output}")
    parent = next(p for p in (output, *output.absolute().parents) if p.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise InputError(f"The output folder must be writable. Received: {output}")


def make_folder(output):
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"The output folder must be writable. Received: {output}: {error.strerror}"
        ) from error


def versions() -> dict[str, str]:
    """Versions of what the figures of a run depend on, as far as installed."""
    found = {"python": platform.python_version()}
    for name in ("involution", "keras", "numpy", "tensorflow", "tensorflow-cpu", "jax", "torch"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_memory() -> int | None:
    """The most memory this process held so far, in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def count(variables) -> int:
    """Of numbers in variables."""
    return sum(math.prod(v.shape) for v in variables)


def _median(values):
    values = sorted(values)
    return values[len(values) // 2] if values else None
