"""Runs: models trained on the same data, and one folder with all results."""

import contextlib
import dataclasses
import datetime
import functools
import json
import math
import os
import pathlib
import platform
import statistics
import time

import keras

from involution import renamed
from involution.data import datasets, transforms
from involution.models import count_multiply_adds, specs
from involution.models.outputs import outputs_of
from involution.saving.classifier import Classifier, load_weights
from involution.training import callbacks, checkpoint, distributed, fine_tuning
from involution.training.evaluation import evaluate
from involution.training.interrupts import exit_code, graceful_shutdown
from involution.training.recipes import PRECISIONS, RECIPES, Config, Recipe, current_name, stored
from involution.training.run_folder import check_folder, history, is_resumable, make_folder
from involution.training.trainer import (
    METRICS,
    DivergenceError,
    Trainer,
    TrainerState,
    check_distribution,
    images_per_epoch,
)
from involution.utils.atomic_files import (
    csv_text,
    remove_temporaries,
    sha256,
    write_json,
    write_text,
)
from involution.utils.environment import peak_memory, versions
from involution.utils.errors import InputError, WriteError, convert_exceptions
from involution.utils.progress import NullProgress

__all__ = ["Config", "NullProgress", "Result", "Run", "build", "compare", "fingerprint", "load"]


@dataclasses.dataclass
class Result:
    """A model of a run and its training results so far."""

    label: str
    classifier: Classifier
    optimizer: tuple[int, int] = (0, 0)  # parameters and bytes of the optimizer's state
    rows: list[dict] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    digest: str | None = None  # SHA-256 of the model's file; None until training is complete
    planned_epochs: int | None = None  # of the training that is complete
    best_epoch: int | None = None  # whose weights the file has, with early stopping
    final_test_accuracy: float | None = None  # on test images that did not guide the training

    @property
    def file(self) -> str:
        """Name of the model's file in the run folder."""
        return specs.file_name(self.label)

    @functools.cached_property
    def parameters(self) -> dict[str, int]:
        """Numbers of parameters, and the bytes of all variables, including the optimizer's."""
        model = self.classifier.model
        kinds = (model.trainable_variables, model.non_trainable_variables)
        counts = [*(num_parameters(variables) for variables in kinds), self.optimizer[0]]
        return {
            "trainable_params": counts[0],
            "non_trainable_params": counts[1],
            "optimizer_params": counts[2],
            "total_params": sum(counts),
            "bytes": num_bytes(model.variables) + self.optimizer[1],
        }

    @functools.cached_property
    def multiply_adds(self) -> int | None:
        """Multiply-adds for one image; None if those of a layer cannot be counted."""
        try:
            return count_multiply_adds(self.classifier.model)
        except ValueError:
            return None

    @property
    def metrics(self) -> dict:
        """This model's entry in metrics.json: metrics of the epoch whose weights are saved."""
        saved = self.rows[(self.best_epoch or len(self.rows)) - 1] if self.rows else {}
        # Excludes the first epoch, which compiles, unless it is the only one.
        seconds = [row["seconds"] for row in self.rows[1:] or self.rows]
        return {
            **self.parameters,
            "multiply_adds": self.multiply_adds,
            **{metric: saved.get(metric) for metric in METRICS},
            "best_test_accuracy": max((r["test_accuracy"] for r in self.rows), default=None),
            "seconds_per_epoch": statistics.median_high(seconds) if seconds else None,
            "seconds": self.seconds,
            "epochs": len(self.rows),
            "best_epoch": self.best_epoch,
            "final_test_accuracy": self.final_test_accuracy,
        }


@dataclasses.dataclass
class Run:
    """A run and its results so far, as shown in its report."""

    config: Config
    dataset: datasets.Dataset
    recipe: Recipe
    results: list[Result]
    command: str
    started: str
    exit_code: int = 0  # 128 plus the number of the signal that interrupted the run
    failure: str | None = None  # why training stopped
    peak_memory_bytes: int | None = None

    @property
    def interrupted(self) -> bool:
        return self.exit_code != 0

    @property
    def metrics(self) -> dict:
        """The content of metrics.json."""
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
        """The content of config.json: everything needed to repeat the run, and the machine."""
        return {
            **stored(self.config),
            "training": stored(self.recipe),
            "command": self.command,
            "started": self.started,
            "images": {"train": len(self.dataset.x_train), "test": len(self.dataset.x_test)},
            "images_by_class": self.dataset.class_counts(),
            "backend": keras.config.backend(),
            "keras": keras_settings(),
            "versions": versions(),
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
        }


def compare(
    config: Config,
    output,
    progress: NullProgress | None = None,
    builders: dict[str, specs.Builder] | None = None,
    command: str = "",
    resume: bool = False,
    checkpoint_every: int | None = None,
    allow_config_change: bool = False,
    distribution: distributed.Distribution = distributed.SINGLE_PROCESS,
) -> Run:
    """Trains models on the same data and writes one folder with all results.

    The folder gets config.json, history.csv, metrics.json, the models, figures, report.html, and
    checkpoints: at the start, after each epoch and on interruption. SIGINT (Ctrl-C) or SIGTERM
    takes effect after the current step, and the report covers what is complete; a second signal
    ends the process immediately. Keras's session is cleared and its seed set.

    Args:
        config: The run.
        output: The folder: new or empty, or with ``resume`` that of the run.
        progress: Receives progress; None: none is reported.
        builders: Models by label, instead of ``config.models``: functions of (input_shape, classes)
            that return a Keras model from images to logits, or to probabilities if its last
            operation is a softmax.
        command: The command line, for the report.
        resume: Whether to resume from the last checkpoint in the folder, if there is one. On the
            same machine and backend the result is bit-identical to that of an uninterrupted run.
        checkpoint_every: Steps between checkpoints within an epoch; None: only after epochs.
        allow_config_change: Whether to resume despite changed settings, images or versions.
        distribution: Devices and hosts that split each batch, after ``distributed.initialize``.
            All hosts use the same folder; all must be able to read it, and the first writes it. The
            number of hosts may change when a run resumes.

    Raises:
        InputError: An argument is invalid, another process uses the folder, or the run to resume
            differs: nothing is written in these cases. A callback fails: the folder has the last
            checkpoint.
        LostHostError: A host was lost.
        WriteError: A file could not be written. A model whose loss is not finite raises nothing: it
            is recorded as the failure in its result.
    """
    from involution.training import report  # requires the extra `compare`

    if checkpoint_every is not None and checkpoint_every < 1:
        raise InputError(f"`checkpoint_every` must be at least 1. Received: {checkpoint_every}")
    if config.early_stopping is not None and distribution.num_processes > 1:
        raise InputError(
            "`early_stopping` is available on one host. "
            f"Received: {config.early_stopping} with num_processes={distribution.num_processes}"
        )
    progress = progress or NullProgress()
    output = pathlib.Path(output)
    check_folder(output, resume, distribution.is_primary)
    builders = specs.parse(config.models, fine_tuning.builder) if builders is None else builders
    dataset = load(config, progress)
    progress.stage("Building the models")
    models = {label: build(label, builder, dataset, config) for label, builder in builders.items()}
    run = Run(
        config=config,
        dataset=dataset,
        recipe=config.recipe_for(dataset),
        results=[],
        command=command,
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    images_per_epoch(dataset, run.recipe, distribution)
    check_distribution(run.recipe, distribution)
    build_callbacks = callbacks.builder(config.callbacks, config.tensorboard)
    with contextlib.ExitStack() as stack:
        if distribution.is_primary:
            make_folder(output)
            stack.enter_context(checkpoint.exclusive_lock(output))
            check_folder(output, resume)
        on_step = stack.enter_context(graceful_shutdown(progress))
        state = RunState(run, output, progress, checkpoint_every, distribution, build_callbacks)
        state.check_hosts()
        resumes = is_resumable(output)
        if resumes:
            state.restore(allow_config_change)
        distribution.assert_equal_across_hosts(
            state.resumed_from, "start from the same checkpoint of one folder"
        )
        if not resumes:
            state.save(None)  # makes the run resumable
        try:
            if distribution.is_primary:
                remove_temporaries(output)
                write_json(output / "config.json", run.description)
                write_text(output / "config.yaml", config_file(config))
                if dataset.split_files is not None:
                    write_text(output / "split.csv", split_table(dataset.split_files))
            with distribution.detect_lost_hosts():
                state.train_all(models, on_step)
            run.peak_memory_bytes = peak_memory()
            if not run.interrupted and run.failure is None:
                distribution.shutdown()
            if distribution.is_primary:
                progress.stage("Writing the report")
                write_json(output / "metrics.json", run.metrics)
                report.write(run, output, progress)
                progress.end()
        except WriteError:
            progress.log(f"Stopped: {state.last}.")
            raise
        except distributed.LostHostError as lost:
            # Only the first host writes checkpoints.
            last = state.last if distribution.is_primary else "its last checkpoint is in the folder"
            raise distributed.LostHostError(f"{lost}; {last}: resume with `resume`") from lost
        if distribution.is_primary and not run.interrupted and run.failure is None:
            state.checkpoints.remove_older()
    return run


# Settings that may change although models are already trained; images may have been repaired.
RESUMABLE_CHANGES = ("dataset", "images", "models", "backend")
# Prefixes of a fingerprint's keys, which checkpoints store.
VERSION = "version of "
KERAS_SETTING = "Keras's "
RECIPE_SETTING = "recipe: "
# Attributes of a result that a checkpoint stores, in addition to the label.
PERSISTED_FIELDS = (
    *("digest", "optimizer", "rows", "seconds"),
    *("planned_epochs", "best_epoch", "final_test_accuracy"),
)
# Settings whose increase is further training.
EPOCHS = ("epochs", f"{RECIPE_SETTING}epochs")


class RunState:
    """A run in progress, and its checkpoints.

    Attributes:
        last: The last checkpoint, for messages.
        resumed_from: The checkpoint that the run resumes from, as text; empty for a new run.
    """

    def __init__(self, run, output, progress, checkpoint_every, distribution, build_callbacks):
        self.run, self.output, self.progress = run, output, progress
        self.checkpoint_every, self.distribution = checkpoint_every, distribution
        self.checkpoints = checkpoint.CheckpointManager(output)
        self.last = "there is no earlier checkpoint"
        self._build_callbacks = build_callbacks
        self._fingerprint = fingerprint(run)
        self.resumed_from = ""
        self._saved: dict[str, dict] = {}
        self._arrays: dict = {}
        self._trainer_state = TrainerState()

    def check_hosts(self):
        """Raises InputError unless all hosts have the same run; the path of the data may differ."""
        shared = {k: v for k, v in self._fingerprint.items() if k != "dataset"}
        self.distribution.assert_equal_across_hosts(
            json.dumps(shared, sort_keys=True), "have the same images, settings and versions"
        )

    def restore(self, allow_config_change):
        """Loads the newest checkpoint of the folder."""
        found = self.checkpoints.latest(self.progress.log)
        if found is None:
            raise InputError(
                "To resume, the output folder must contain an intact checkpoint. "
                f"Received: {self.output}, which has none"
            )
        # Checkpoints of early releases lack Keras's settings.
        before = {k: v for k, v in self._fingerprint.items() if k.startswith(KERAS_SETTING)}
        before |= found.state["identity"]
        now = self._fingerprint
        # Unset settings may be absent. Packages that are no longer installed do not matter.
        names = now | {name: None for name in before if not name.startswith(VERSION)}
        changed = {
            name: f"{_displayed(name)} was {before.get(name)} and is {now.get(name)}"
            for name in names
            if before.get(name) != now.get(name)
        }
        # More epochs than before need no permission.
        for name in EPOCHS:
            if name in changed and before.get(name, 0) < self._fingerprint[name]:
                del changed[name]
        if changed and not allow_config_change:
            raise InputError(
                "A run must resume with the same settings, images and versions, unless "
                f"`allow_config_change` is set. Received: {'; '.join(changed.values())}"
            )
        for saved in found.state["results"]:
            if self._is_intact(saved):
                self._saved[saved["label"]] = saved
        self._check_trained_models(changed)
        self.resumed_from = f"{found.number} {json.dumps(found.state, sort_keys=True)}"
        self._arrays = found.arrays
        if found.state["at"] is not None:
            self._trainer_state = TrainerState(**found.state["at"])
        self.last = _last_checkpoint(found)
        self.progress.log(f"Resuming from checkpoint {found.number}.")

    def _check_trained_models(self, changed):
        """Raises InputError if the folder would mix models trained with different settings."""
        trained = [label for label, saved in self._saved.items() if saved["digest"] is not None]
        relevant = [
            text
            for name, text in changed.items()
            if name not in RESUMABLE_CHANGES and not name.startswith(VERSION)
        ]
        if trained and relevant:
            raise InputError(
                "The settings of a folder with trained models must not change; use a new folder. "
                f"Received: {', '.join(trained)}, already trained; {'; '.join(relevant)}"
            )

    def _is_intact(self, saved) -> bool:
        """Whether the file of a trained model is unchanged."""
        file = self.output / specs.file_name(saved["label"])
        if saved["digest"] in (None, sha256(file) if file.is_file() else ""):
            return True
        self.progress.log(f"{file.name} is missing or changed; training it again.")
        return False

    def train_all(self, models, on_step):
        """Trains the models in turn until the end, an interruption or divergence."""
        try:
            for label, model in models.items():
                self.train(label, model, on_step)
        except KeyboardInterrupt as interrupt:
            self.run.exit_code = exit_code(interrupt)
            self.progress.log("Interrupted: writing the report.")
        except DivergenceError as failure:
            self.run.failure = f"{failure}; {self.last}"
            self.progress.log(f"Stopped: {self.run.failure}")

    def train(self, label, model, on_step):
        run, progress = self.run, self.progress
        config, dataset = run.config, run.dataset
        classifier = Classifier(
            model,
            dataset.class_names,
            dataset.image_shape,
            dataset.crop_fraction,
            outputs_of(model),
        )
        result = Result(label, classifier)
        saved = self._saved.get(label)
        if saved is not None:
            # Checkpoints of earlier releases lack some.
            for name in PERSISTED_FIELDS:
                setattr(result, name, saved.get(name, getattr(result, name)))
        run.results.append(result)
        arrays, trainer_state = self._arrays, self._trainer_state
        if result.digest is not None:
            if config.epochs <= (result.planned_epochs or len(result.rows)):
                load_weights(model, self.output / result.file)
                self._write_history()
                return
            arrays, trainer_state = self._final_state(label)
            result.digest = None
            progress.log(f"{label}: training further, to {config.epochs} epochs.")
        trainer = Trainer(model, dataset, run.recipe, config.epochs, config.seed, self.distribution)
        variables = trainer.optimizer_variables
        result.optimizer = (num_parameters(variables), num_bytes(variables))
        if saved is not None:
            trainer.restore(arrays, trainer_state)
        start = time.perf_counter() - result.seconds

        def after_step():
            result.seconds = time.perf_counter() - start
            try:
                on_step()
            except KeyboardInterrupt:
                self.save(trainer)
                raise
            every = self.checkpoint_every
            if every is not None and trainer.steps_done % every == 0:
                self.save(trainer)

        called = callbacks.Callbacks(self._callbacks(label), trainer.compiled, config.epochs)
        progress.begin(label, trainer.steps, trainer.steps_done, "compiling the first step")
        try:
            with callbacks.training(called):
                final = self._train_epochs(result, trainer, called, after_step, start)
            # Callbacks may have changed them at the end.
            trainer.copy_weights()
        except (KeyboardInterrupt, DivergenceError):
            if result.best_epoch is None:
                self._write_model(result)
            raise
        finally:
            progress.end()
            result.seconds = time.perf_counter() - start
        if result.best_epoch is None:
            self._write_model(result)
        else:
            load_weights(model, self.output / result.file)
        if dataset.final_test is not None:
            x, y = dataset.final_test
            found = evaluate(classifier, x, y, progress)
            if found is not None:
                result.final_test_accuracy = found.accuracy
                progress.log(
                    f"{label}: accuracy {found.accuracy:.4f} on {len(y)} test images that did not "
                    "guide the training"
                )
        result.planned_epochs = config.epochs
        if self.distribution.is_primary:
            self.checkpoints.save_final(label, *final)
            result.digest = sha256(self.output / result.file)
        self.save(None)

    def _train_epochs(self, result, trainer, called, after_step, start):
        """Trains until the last epoch, or an earlier one by early stopping or a callback.

        Returns:
            The arrays and the state at the end, before averages replace the weights.
        """
        config = self.run.config
        final = None
        if self._is_stopped(result) or trainer.state.epoch > config.epochs:
            final = trainer.arrays(), dataclasses.asdict(trainer.state)
        if self._is_stopped(result):
            return final
        if final is None:
            called.on_epoch_begin(trainer.state.epoch)
        # Closed explicitly. When it ends, also without an epoch, it copies the trained weights, or
        # their averages, to the model.
        with contextlib.closing(trainer.epochs(after_step)) as epochs:
            for row in epochs:
                result.rows.append(row)
                result.seconds = time.perf_counter() - start
                self._write_history()
                if config.early_stopping is not None:
                    self._keep_best(result, trainer)
                self.save(trainer)
                self.progress.log(
                    f"{result.label}: epoch {row['epoch']}/{config.epochs}: "
                    f"train loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.4f}; "
                    f"test loss {row['test_loss']:.4f}, accuracy {row['test_accuracy']:.4f} "
                    f"({row['seconds']:.1f} s)"
                )
                called.on_epoch_end(row)
                is_last = row["epoch"] == config.epochs
                stops = called.stops_training or self._is_stopped(result)
                if stops or is_last:
                    final = trainer.arrays(), dataclasses.asdict(trainer.state)
                if stops and not is_last:
                    self.progress.log(f"{result.label}: stopped after epoch {row['epoch']}")
                    break
                if not is_last:
                    called.on_epoch_begin(row["epoch"] + 1)
        return final

    def _callbacks(self, label) -> list:
        """New callbacks for the training of a model."""
        if not self.distribution.is_primary:
            return []
        folder = self.output / "tensorboard" / specs.file_name(label).removesuffix(".keras")
        return self._build_callbacks(label, folder)

    def _keep_best(self, result, trainer):
        """Saves the model if this epoch's accuracy is the highest; of equal ones the first."""
        accuracies = [row["test_accuracy"] for row in result.rows]
        if accuracies[-1] > max(accuracies[:-1], default=-1):
            with trainer.evaluated_weights():
                self._write_model(result)
            result.best_epoch = len(accuracies)

    def _is_stopped(self, result) -> bool:
        """Whether early stopping has ended the training of a model."""
        patience = self.run.config.early_stopping
        if patience is None or result.best_epoch is None:
            return False
        return len(result.rows) - result.best_epoch >= patience

    def _final_state(self, label):
        """The arrays and the state at the end of a model's training, for further training."""
        found = self.checkpoints.final(label, self.progress.log)
        if found is None:
            raise InputError(
                "To train further, the run folder must contain the intact state of the training, "
                "which earlier releases did not keep. "
                f"Received: {self.output}, without that of {label}"
            )
        return found.arrays, TrainerState(**found.state)

    def _write_history(self):
        if self.distribution.is_primary:
            write_text(self.output / "history.csv", history(self.run.results))

    def _write_model(self, result):
        if self.distribution.is_primary:
            result.classifier.save(self.output / result.file)

    def save(self, trainer):
        """Saves a checkpoint of all results, and of the model in training unless it is None."""
        if not self.distribution.is_primary:
            return
        results = [
            {
                "label": r.label,
                **{name: getattr(r, name) for name in PERSISTED_FIELDS},
            }
            for r in self.run.results
        ]
        # Models that were trained before the run resumed and that it has not reached again.
        labels = {result["label"] for result in results}
        results += [
            saved
            for label, saved in self._saved.items()
            if label not in labels and saved["digest"] is not None
        ]
        state = {
            "identity": self._fingerprint,
            "results": results,
            "at": None if trainer is None else dataclasses.asdict(trainer.state),
        }
        arrays = {} if trainer is None else trainer.arrays()
        self.last = _last_checkpoint(self.checkpoints.save(arrays, state))


def _last_checkpoint(saved) -> str:
    return f"the last checkpoint is number {saved.number}"


def fingerprint(run) -> dict:
    """Everything that determines the result of a run: JSON values by the keys in checkpoints."""
    config = stored(run.config)
    # These do not change the result.
    for name in ("download", "callbacks", "tensorboard"):
        config.pop(name, None)
    values = {
        **config,
        **{f"{RECIPE_SETTING}{k}": v for k, v in stored(run.recipe).items()},
        "backend": keras.config.backend(),
        **{f"{KERAS_SETTING}{k}": v for k, v in keras_settings().items()},
        **{f"{VERSION}{k}": v for k, v in versions().items()},
        "images": run.dataset.fingerprint(),
    }
    return json.loads(json.dumps(values))


def _displayed(name) -> str:
    """A key of ``fingerprint`` in messages: settings by their current names."""
    of_recipe = name.startswith(RECIPE_SETTING)
    setting = current_name(name.removeprefix(RECIPE_SETTING))
    if of_recipe:
        return f"the recipe's `{setting}`"
    return f"`{setting}`" if setting in Config.__dataclass_fields__ else name


def load(config, progress) -> datasets.Dataset:
    """The images of a run.

    Raises:
        InputError: The data set is invalid, or Keras's floatx is not float32.
    """
    transforms.check_floatx()
    progress.stage(f"Reading {config.dataset}")

    def on_image(done, total):
        if done == 1:
            progress.begin("reading images", total)
        progress.advance()
        if done == total:
            progress.end()

    crop = transforms.CENTER_FRACTION if RECIPES[config.recipe].random_crop else None
    dataset = datasets.load(
        config.dataset,
        config.image_size,
        config.download,
        on_image,
        crop,
        split=config.split,
        seed=config.seed,
    )
    if dataset.description:
        progress.log(dataset.description)
    if dataset.files_digest is not None:
        progress.log(f"Images by class, train + test: {_short_list(dataset.class_counts())}.")
    held_out = config.validation_images
    return dataset if held_out is None else dataset.validation_split(held_out)


def build(label, builder, dataset, config) -> keras.Model:
    """Builds a model for these images, with initial weights that depend only on the seed.

    Raises:
        InputError: The builder fails, or returns no suitable model.
    """
    classes = len(dataset.class_names)
    # Independent of the models built before.
    keras.utils.clear_session()
    keras.utils.set_random_seed(config.seed)
    policy = keras.config.dtype_policy()
    rule = f"The model could not be built for {classes} classes."
    try:
        keras.config.set_dtype_policy(PRECISIONS[config.precision])
        with convert_exceptions(InputError, rule, label):  # a user's function may raise anything
            model = builder(input_shape=dataset.image_shape, classes=classes)
            if not isinstance(model, keras.Model):
                raise TypeError(f"{type(model).__name__}, not a Keras model")
            shape = model(keras.KerasTensor((None, *dataset.image_shape))).shape
            if tuple(shape) != (None, classes):
                raise ValueError(f"outputs of shape {tuple(shape)}, not {(None, classes)}")
            if not getattr(model, "inputs", None):
                raise TypeError("a subclassed model, neither functional nor Sequential")
    finally:
        keras.config.set_dtype_policy(policy)
    return model


def config_file(config) -> str:
    """The content of config.yaml: the options of ``involution compare`` that repeat a run."""
    import yaml  # in the extra `compare`

    options = {
        name.replace("_", "-"): value
        for name, value in dataclasses.asdict(config).items()
        if value is not None and value is not False
    }
    if config.image_size is not None:
        options["image-size"] = "x".join(map(str, config.image_size))
    options["backend"] = keras.config.backend()
    text = yaml.safe_dump(options, allow_unicode=True, sort_keys=False)
    return f"# involution compare --config config.yaml\n{text}"


def _short_list(class_counts, limit=12) -> str:
    texts = [f"{name} {n['train']} + {n['test']}" for name, n in class_counts.items()]
    more = f", and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def split_table(split_files) -> str:
    """The content of split.csv: the files of a folder that was split."""
    rows = ({"split": part, "file": f} for part, files in split_files.items() for f in files)
    return csv_text(("split", "file"), rows)


def keras_settings() -> dict[str, str | float]:
    """Keras's settings that affect results, except the backend."""
    names = ("floatx", "epsilon", "image_data_format")
    return {name: getattr(keras.config, name)() for name in names}


def num_parameters(variables) -> int:
    return sum(math.prod(v.shape) for v in variables)


def num_bytes(variables) -> int:
    return sum(keras.ops.convert_to_numpy(v).nbytes for v in variables)


__getattr__ = renamed.attributes(__name__, {"Silent": "NullProgress"})
