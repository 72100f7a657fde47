"""One run = one folder: models trained on the same data, side by side, and what came of it."""

import contextlib
import dataclasses
import datetime
import functools
import json
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

from involution.data import datasets, transforms
from involution.models import count_multiply_adds, specs
from involution.saving.classifier import Classifier, load_weights
from involution.training import checkpoint, distributed
from involution.training import trainer as training
from involution.utils.atomic_files import (
    TMP_PREFIX,
    csv_text,
    remove_temporaries,
    sha256,
    write_json,
    write_text,
)
from involution.utils.errors import InputError, WriteError

# Keras's policies by the names of types.
PRECISIONS = {"float32": "float32", "bfloat16": "mixed_bfloat16"}


class Silent:
    """Where a run tells how far it is: this one says nothing. ``console.Console`` speaks."""

    def say(self, text):
        """One line."""

    def start(self, label, total, done=0):
        """A piece of work of so many steps begins, some of which are done."""

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
        learning_rate: Of Adam or SGD; where it changes, the largest. None: the recipe's.
        weight_decay: Of AdamW or SGD, see ``training.Recipe``. None: the recipe's.
        validation: So many training images, always the same, are held out and measured on in place
            of the test images; None: none.
        image_size: (height, width) for a folder of images, None for their own.
        download: Whether CIFAR-10 may be fetched.
        precision: Of what layers compute, one of ``PRECISIONS``; weights are float32 in any case.
        clip_norm: What the norm of all gradients together is cut to; None: the recipe's.
        accumulate: In how many parts a batch goes through the model; None: the recipe's.
        ema: What a mean of the weights, which is tested and written, keeps of itself at each step;
            None: the recipe's.
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
    clip_norm: float | None = None
    accumulate: int | None = None
    ema: float | None = None

    def __post_init__(self):
        for name in ("epochs", "batch_size", "validation", "accumulate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1. Received: {name}={value}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be from 0 to 2**32 - 1. Received: seed={self.seed}")
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} must be above 0. Received: {name}={value}")
        if self.weight_decay is not None and not (0 <= self.weight_decay < math.inf):
            raise InputError(
                f"weight_decay must be at least 0. Received: weight_decay={self.weight_decay}"
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise InputError(f"ema must be above 0 and below 1. Received: ema={self.ema}")
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
            clip_norm=self.clip_norm or recipe.clip_norm,
            accumulate=self.accumulate or recipe.accumulate,
            ema=self.ema or recipe.ema,
            epochs=self.epochs,
            image_size=self.image_size,
        )


@dataclasses.dataclass
class Result:
    """One model of a run, as far as it came."""

    label: str
    classifier: Classifier
    optimizer: tuple[int, int] = (0, 0)  # numbers that the optimizer holds, and their bytes
    rows: list[dict] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    digest: str | None = None  # of the model's file, once it is trained

    @property
    def file(self) -> str:
        """Name of the model's file in the run's folder."""
        return specs.file_name(self.label)

    @functools.cached_property
    def parameters(self) -> dict[str, int]:
        """Numbers of parameters, and their bytes with the optimizer's: training changes none."""
        model = self.classifier.model
        kinds = (model.trainable_variables, model.non_trainable_variables)
        counts = [*(count(variables) for variables in kinds), self.optimizer[0]]
        return {
            "trainable_params": counts[0],
            "non_trainable_params": counts[1],
            "optimizer_params": counts[2],
            "total_params": sum(counts),
            "bytes": size(model.variables) + self.optimizer[1],
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
    dataset: datasets.Dataset
    recipe: training.Recipe
    results: list[Result]
    command: str
    started: str
    exit_code: int = 0  # 128 and the number of the signal that ended it early
    failure: str | None = None  # why it could not go on
    peak_memory_bytes: int | None = None

    @property
    def interrupted(self) -> bool:
        return self.exit_code != 0

    @property
    def metrics(self) -> dict:
        return {
            "dataset": self.dataset.name,
            "backend": keras.config.backend(),
            "interrupted": self.interrupted,
            "failure": self.failure,
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
            "keras": settings(),
            "versions": versions(),
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
        }


def compare(
    config: Config,
    output,
    console=None,
    builders: dict[str, specs.Builder] | None = None,
    command: str = "",
    resume: bool = False,
    checkpoint_every: int | None = None,
    allow_change: bool = False,
    together: distributed.Cluster = distributed.ALONE,
) -> Run:
    """Trains models on the same data and writes one folder about it.

    The folder gets config.json, history.csv, metrics.json, the models, figures and report.html;
    and checkpoints: at the beginning, after each epoch, and when the run is interrupted. An
    interruption (SIGINT, which is Ctrl-C, or SIGTERM) takes effect after the step at work and
    leaves what there is, with a report of it; a second one ends the process at once.
    Keras's session is cleared and its seed set.

    Args:
        config: What to run.
        output: The folder: new, or empty.
        console: Where progress goes; see ``Silent``.
        builders: Models of one's own, instead of ``config.models``: functions of (input_shape,
            classes) that return a Keras model from images to logits, by label.
        command: What was typed, for the report.
        resume: Whether to go on from the last checkpoint in the folder, where there is one. On the
            machine and backend of the first part what comes of it is the same, to the bit, as
            without a break.
        checkpoint_every: Steps between checkpoints within an epoch; None: only after epochs.
        allow_change: Whether to go on although the configuration, the images or a version is
            another than before.
        together: The devices and hosts that share every batch, for which ``cluster.begin`` was
            called. All hosts are given the same folder, which all can read and the first writes.
            What goes on may be other ones than what began.

    Raises:
        InputError: Something given cannot be used, another process is at work in the folder, or
            what is resumed was something else; nothing has been written then. A host was lost.
    """
    from involution.training import report  # draws, and so needs the extra packages

    if checkpoint_every is not None and checkpoint_every < 1:
        raise InputError(f"checkpoint_every must be at least 1. Received: {checkpoint_every}")
    console = console or Silent()
    output = pathlib.Path(output)
    check_folder(output, resume, together.writes)
    builders = specs.parse(config.models) if builders is None else builders
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
    training.images_of_an_epoch(dataset, run.recipe, together)
    with contextlib.ExitStack() as stack:
        if together.writes:
            make_folder(output)
            stack.enter_context(checkpoint.alone(output))
            check_folder(output, resume)
        step = stack.enter_context(interruptions(console))
        work = _Work(run, output, console, checkpoint_every, together)
        work.check_same()
        begun = _has_begun(output)
        if begun:
            work.restore(allow_change)
        together.check_same(work.begun_at, "begin at the same checkpoint of one folder")
        if not begun:
            work.save(None)  # from here on the run can be gone on with
        try:
            if together.writes:
                remove_temporaries(output)
                write_json(output / "config.json", run.description)
            with together.answering():
                work.train_all(networks, step)
            run.peak_memory_bytes = peak_memory()
            if not run.interrupted and run.failure is None:
                together.end()
            if together.writes:
                write_json(output / "metrics.json", run.metrics)
                report.write(run, output)
        except WriteError:
            console.say(f"Stopped: {work.last}.")
            raise
        except distributed.LostHostError as lost:
            # Only the first host's checkpoints are the run's.
            last = work.last if together.writes else "its last checkpoint is in the folder"
            raise distributed.LostHostError(f"{lost}; {last}: go on with --resume") from lost
        if together.writes and not run.interrupted and run.failure is None:
            work.store.remove_older()
    return run


# What is no other way to train; an image may have been mended.
MAY_DIFFER = ("dataset", "images", "models", "backend")
VERSION = "version of "
SETTING = "Keras's "
# What a checkpoint keeps of a result, besides the label.
KEPT = ("digest", "optimizer", "rows", "seconds")


class _Work:
    """A run at work, and what it takes to go on with it."""

    def __init__(self, run, output, console, every, together):
        self.run, self.output, self.console, self.every = run, output, console, every
        self.together = together
        self.store = checkpoint.Store(output)
        self.last = "there is no checkpoint from before"
        self._identity = identity(run)
        # What is gone on from: which checkpoint, and what it holds.
        self.begun_at = ""
        self._begun: dict[str, dict] = {}
        self._arrays: dict = {}
        self._at = training.Position()

    def check_same(self):
        """Whether all hosts are at the same run; a folder may be another place on each."""
        same = {k: v for k, v in self._identity.items() if k != "dataset"}
        what = "have the same images, options and versions"
        self.together.check_same(json.dumps(same, sort_keys=True), what)

    def restore(self, allow_change):
        """Takes up the newest checkpoint of the folder."""
        saved = self.store.latest(self.console.say)
        if saved is None:
            raise InputError(
                "To go on, the output folder must have a whole checkpoint. "
                f"Received: {self.output}, which has none"
            )
        # Checkpoints of earlier releases do not have Keras's settings.
        was = {k: v for k, v in self._identity.items() if k.startswith(SETTING)}
        was |= saved.state["identity"]
        changed = {
            name: f"{name} was {was.get(name)} and is {now}"
            for name, now in self._identity.items()
            if was.get(name) != now
        }
        if changed and not allow_change:
            raise InputError(
                "To go on, all must be as before, or --allow-change given. "
                f"Received: {'; '.join(changed.values())}"
            )
        for begun in saved.state["results"]:
            if self._is_whole(begun):
                self._begun[begun["label"]] = begun
        self._refuse_other_trainings(changed)
        self.begun_at = f"{saved.number} {json.dumps(saved.state, sort_keys=True)}"
        self._arrays = saved.arrays
        if saved.state["at"] is not None:
            self._at = training.Position(**saved.state["at"])
        self.last = f"checkpoint {saved.number} is from before"
        self.console.say(f"Going on from checkpoint {saved.number}.")

    def _refuse_other_trainings(self, changed):
        """What is trained stays as it is, and beside it nothing is trained otherwise."""
        ended = [label for label, begun in self._begun.items() if begun["digest"] is not None]
        others = [
            told
            for name, told in changed.items()
            if name not in MAY_DIFFER and not name.startswith(VERSION)
        ]
        if ended and others:
            raise InputError(
                "What is trained cannot be changed, a new folder can be given. "
                f"Received: {', '.join(ended)}, trained before; {'; '.join(others)}"
            )

    def _is_whole(self, begun) -> bool:
        """Whether the file of a trained model is as it was written."""
        file = self.output / specs.file_name(begun["label"])
        if begun["digest"] in (None, sha256(file) if file.is_file() else ""):
            return True
        self.console.say(f"{file.name} is not as it was written: it is trained again.")
        return False

    def train_all(self, networks, step):
        """Trains them in turn, as far as that goes: the run tells how far."""
        try:
            for label, network in networks.items():
                self.train(label, network, step)
        except KeyboardInterrupt as stop:
            self.run.exit_code = exit_code(stop)
            self.console.say("Interrupted: writing what there is.")
        except training.DivergenceError as failure:
            self.run.failure = f"{failure}; {self.last}"
            self.console.say(f"Stopped: {self.run.failure}")

    def train(self, label, network, step):
        run, console = self.run, self.console
        config, dataset = run.config, run.dataset
        classifier = Classifier(
            network, dataset.class_names, dataset.image_shape, dataset.crop_fraction
        )
        result = Result(label, classifier)
        begun = self._begun.get(label)
        if begun is not None:
            for name in KEPT:
                setattr(result, name, begun[name])
        run.results.append(result)
        if result.digest is not None:
            load_weights(network, self.output / result.file)
            self._write_history()
            return
        trainer = training.Trainer(
            network, dataset, run.recipe, config.epochs, config.seed, self.together
        )
        variables = trainer.optimizer_variables
        result.optimizer = (count(variables), size(variables))
        if begun is not None:
            trainer.restore(self._arrays, self._at)
        start = time.perf_counter() - result.seconds

        def after_step():
            result.seconds = time.perf_counter() - start
            try:
                step()
            except KeyboardInterrupt:
                self.save(trainer)
                raise
            if self.every is not None and trainer.steps_done % self.every == 0:
                self.save(trainer)

        console.start(label, trainer.steps, trainer.steps_done)
        try:
            for row in trainer.epochs(after_step):
                result.rows.append(row)
                result.seconds = time.perf_counter() - start
                self._write_history()
                self.save(trainer)
                console.say(
                    f"{label}: epoch {row['epoch']}/{config.epochs}: "
                    f"train loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.4f}; "
                    f"test loss {row['test_loss']:.4f}, accuracy {row['test_accuracy']:.4f} "
                    f"({row['seconds']:.1f} s)"
                )
        except (KeyboardInterrupt, training.DivergenceError):
            self._write_model(result)
            raise
        finally:
            console.stop()
            result.seconds = time.perf_counter() - start
        self._write_model(result)
        if self.together.writes:
            result.digest = sha256(self.output / result.file)
        self.save(None)

    def _write_history(self):
        if self.together.writes:
            write_text(self.output / "history.csv", history(self.run.results))

    def _write_model(self, result):
        if self.together.writes:
            result.classifier.save(self.output / result.file)

    def save(self, trainer):
        """A checkpoint of all results, and of the training at work if there is one."""
        if not self.together.writes:
            return
        results = [
            {
                "label": r.label,
                **{name: getattr(r, name) for name in KEPT},
            }
            for r in self.run.results
        ]
        # Of those trained before whose turn is yet to come, too.
        at = {result["label"] for result in results}
        results += [
            begun
            for label, begun in self._begun.items()
            if label not in at and begun["digest"] is not None
        ]
        state = {
            "identity": self._identity,
            "results": results,
            "at": None if trainer is None else dataclasses.asdict(trainer.at),
        }
        saved = self.store.save({} if trainer is None else trainer.arrays(), state)
        self.last = f"checkpoint {saved.number} is from before"


def identity(run) -> dict:
    """What must be the same for a run to go on as if there had been no break, as JSON has it."""
    config = dataclasses.asdict(run.config)
    del config["download"]
    told = {
        **config,
        **{f"recipe: {k}": v for k, v in dataclasses.asdict(run.recipe).items()},
        "backend": keras.config.backend(),
        **{f"{SETTING}{k}": v for k, v in settings().items()},
        **{f"{VERSION}{k}": v for k, v in versions().items()},
        "images": run.dataset.fingerprint(),
    }
    return json.loads(json.dumps(told))


def exit_code(stop: KeyboardInterrupt) -> int:
    """128 and the number of the signal, which is SIGINT's unless the exception tells another."""
    return stop.args[0] if stop.args else 128 + signal.SIGINT


@contextlib.contextmanager
def interruptions(console):
    """Within the block the first SIGINT (Ctrl-C) or SIGTERM is a request: an exception in the midst
    of a step could leave a model without its weights. The function yielded, called after each step,
    tells the console and raises KeyboardInterrupt when asked to; ``exit_code`` takes it. The second
    signal ends the process at once: files are whole or not there at any moment."""
    asked: list[int] = []

    def step():
        console.step()
        if asked:
            raise KeyboardInterrupt(asked[0])

    if threading.current_thread() is not threading.main_thread():
        yield step  # signals are for the main thread alone
        return

    def ask(signal_number, frame):
        if asked:
            os._exit(128 + signal_number)
        asked.append(128 + signal_number)
        console.say("Stopping after this step; once more to stop at once.")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield step
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def load(config, console) -> datasets.Dataset:
    """The images of a run.

    Raises:
        InputError: They cannot be used, or Keras's floatx is not float32.
    """
    transforms.check_floatx()

    def progress(done, total):
        if done == 1:
            console.start("reading images", total)
        console.step()
        if done == total:
            console.stop()

    crop = transforms.CENTER_FRACTION if training.RECIPES[config.recipe].crop else None
    dataset = datasets.load(config.dataset, config.image_size, config.download, progress, crop)
    if dataset.description:
        console.say(dataset.description)
    return dataset if config.validation is None else dataset.validation_split(config.validation)


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


def history(results) -> str:
    """history.csv: nothing in it depends on the clock, so one seed gives one file."""
    columns = ("model", "epoch", *training.MEASURES)
    rows = [{"model": result.label, **row} for result in results for row in result.rows]
    return csv_text(columns, rows)


def check_folder(output, resume=False, writes=True):
    """Raises InputError unless a run can be written there; ``resume``: or may have begun there;
    ``writes``: otherwise another host writes it."""
    try:
        if output.exists():
            empty = output.is_dir() and all(f.name == checkpoint.LOCK for f in output.iterdir())
            if not (empty or (resume and output.is_dir())):
                raise InputError(f"The output folder must be new or empty. Received: {output}")
        parent = next(p for p in (output, *output.absolute().parents) if p.exists())
        usable = parent.is_dir() and (not writes or os.access(parent, os.W_OK))
    except OSError:
        usable = False
    if not usable:
        raise InputError(f"The output folder must be writable. Received: {output}")


def _has_begun(output) -> bool:
    """Whether there is more than a process leaves that was killed before its first checkpoint."""
    return any(
        file.is_file() and file.name != checkpoint.LOCK and not file.name.startswith(TMP_PREFIX)
        for file in output.rglob("*")
    )


def make_folder(output):
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"The output folder must be writable. Received: {output}: {error.strerror}"
        ) from error


def settings() -> dict[str, str | float]:
    """What of keras.json the figures of a run depend on, besides the backend."""
    names = ("floatx", "epsilon", "image_data_format")
    return {name: getattr(keras.config, name)() for name in names}


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


def size(variables) -> int:
    """Of variables, in bytes."""
    return sum(keras.ops.convert_to_numpy(v).nbytes for v in variables)


def _median(values):
    values = sorted(values)
    return values[len(values) // 2] if values else None
