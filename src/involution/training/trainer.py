"""Training and evaluation of a model, in an image order that the seed determines."""

import contextlib
import dataclasses
import functools
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator

import keras
import numpy as np

from involution.data import datasets, transforms
from involution.data.prefetch import prefetch
from involution.models.outputs import LOGITS, outputs_of
from involution.training import distributed
from involution.training.augmentation import augment
from involution.training.optimizers import NesterovSGD, make_optimizer
from involution.training.recipes import RECIPES, Recipe
from involution.utils.errors import InputError

__all__ = [
    "METRICS",
    "RECIPES",
    "Batch",
    "DivergenceError",
    "NesterovSGD",
    "Recipe",
    "Trainer",
    "TrainerState",
    "check_distribution",
    "images_per_epoch",
    "random_state",
    "set_random_state",
]

# Columns of history.csv after the model and the epoch.
METRICS = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")


def images_per_epoch(dataset, recipe, distribution=distributed.SINGLE_PROCESS) -> int:
    """The number of training images in an epoch.

    Raises:
        InputError: The batch size does not divide evenly among the devices, or there are too few
            images for one batch.
    """
    batch_size = recipe.batch_size or dataset.batch_size
    accumulation = recipe.gradient_accumulation_steps
    distribution.check_batch_size(batch_size, accumulation)
    # With accumulation all batches are full: a shorter step would weigh as much as the others.
    divisor = batch_size if accumulation > 1 else distribution.num_devices
    count = len(dataset.x_train)
    if count < divisor:
        reason = "for one batch" if accumulation > 1 else "one for each device"
        raise InputError(
            f"Training needs at least {divisor} images, {reason}. Received: {count} training images"
        )
    return count - count % divisor


@dataclasses.dataclass
class TrainerState:
    """The progress of a training run, which a checkpoint stores.

    Attributes:
        epoch: The current epoch, from 1.
        images: Images processed in the epoch: first the training images, then the test images.
        train_images, train_loss, train_accuracy: Number of images trained on, and sums over them.
        test_images, test_loss, test_accuracy: The same for testing.
        seconds: Duration of the epoch so far.
    """

    epoch: int = 1
    images: int = 0
    train_images: int = 0
    train_loss: float = 0.0
    train_accuracy: float = 0.0
    test_images: int = 0
    test_loss: float = 0.0
    test_accuracy: float = 0.0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Batch:
    """This host's part of a batch: model inputs, labels in the format of the loss, and the weights
    of the images in it."""

    images: np.ndarray
    labels: np.ndarray
    shard: distributed.Shard
    weights: np.ndarray | None = None


def _class_weights(dataset, recipe) -> np.ndarray | None:
    """The weight of each class, whose mean over the training images is 1; None: all are 1."""
    if recipe.class_weight is None:
        return None
    counts = np.bincount(dataset.y_train, minlength=len(dataset.class_names))
    return (len(dataset.y_train) / (len(counts) * np.maximum(counts, 1))).astype("float32")


def check_distribution(recipe, distribution):
    """Raises InputError if the recipe requires a single device, and there are several."""
    if recipe.class_weight is not None and not distribution.is_single:
        raise InputError(
            "`class_weight` is available on a single device. "
            f"Received: {recipe.class_weight} with {distribution.num_devices} devices"
        )


class DivergenceError(InputError):
    """The loss is NaN or infinite."""


class Trainer:
    """Trains a model with the loss and the metric of the keras.io example.

    Args:
        model: The model, from images to logits, or to probabilities if it ends in a softmax. It is
            not compiled itself, so that its file contains no optimizer.
        dataset: The images.
        recipe: The hyperparameters.
        epochs: Training epochs.
        seed: Seed of the image order and of all random numbers from here on.
        distribution: Devices and hosts that split each batch. An epoch skips the images that do not
            divide evenly among the devices or, with gradient accumulation, do not fill a batch;
            they differ from epoch to epoch.

    Attributes:
        micro_batch_size: Images per step: with gradient accumulation a part of the batch.
        steps: Number of training and test steps in all epochs. Training can be interrupted after
            each step.
        state: The progress of the training.
    """

    def __init__(
        self, model, dataset, recipe, epochs, seed, distribution=distributed.SINGLE_PROCESS
    ) -> None:
        keras.utils.set_random_seed(seed)
        self.model, self.dataset, self.recipe = model, dataset, recipe
        self._epochs, self._seed, self._distribution = epochs, seed, distribution
        self._images_per_epoch = images_per_epoch(dataset, recipe, distribution)
        accumulation = recipe.gradient_accumulation_steps
        self.micro_batch_size = (recipe.batch_size or dataset.batch_size) // accumulation
        self._augmentations = recipe.augmentation_names
        check_distribution(recipe, distribution)
        self._class_weights = _class_weights(dataset, recipe)
        # The devices of a step wait for each other, each in a thread of XLA's pool. On CPUs, where
        # augmentations use the same pool, both together may wait forever.
        self._exclusive = contextlib.nullcontext() if distribution.is_single else threading.Lock()
        self.state = TrainerState()
        train_steps, test_steps = self._steps_per_epoch
        self.steps = epochs * (train_steps + test_steps)
        with distribution.scope():
            self._trained = model if distribution.is_single else _clone(model)
            inputs = keras.Input(model.input_shape[1:])
            self._compiled = keras.Model(inputs, self._trained(inputs))
            loss = (
                keras.losses.CategoricalCrossentropy
                if self._has_soft_labels
                else keras.losses.SparseCategoricalCrossentropy
            )
            # The images that pad a batch have weight 0, in the metric too.
            metrics = "metrics" if distribution.is_single else "weighted_metrics"
            self._compiled.compile(
                optimizer=make_optimizer(recipe, epochs * train_steps // accumulation),
                loss=loss(from_logits=outputs_of(model) == LOGITS),
                **{metrics: ["accuracy"]},
            )
            self._compiled.optimizer.build(self._compiled.trainable_variables)
        self._ema_callback = keras.callbacks.SwapEMAWeights()
        self._ema_callback.set_model(self._compiled)
        self._ema_active = False

    @property
    def compiled(self) -> keras.Model:
        """The model with its optimizer, for Keras callbacks."""
        return self._compiled

    @property
    def optimizer_variables(self) -> list:
        return self._compiled.optimizer.variables

    @property
    def steps_done(self) -> int:
        train_steps, test_steps = self._steps_per_epoch
        trained = min(self.state.images, self._images_per_epoch)
        tested = max(self.state.images - len(self.dataset.x_train), 0)
        return (self.state.epoch - 1) * (train_steps + test_steps) + sum(
            -(-images // self.micro_batch_size) for images in (trained, tested)
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything that training changes, except ``state``, for ``restore``."""
        return {n: _to_numpy(v) for n, v in self._variables().items()} | random_state()

    def restore(self, arrays, state: TrainerState):
        """Continues from a checkpoint.

        Raises:
            InputError: The arrays are of another model or recipe.
        """
        variables = self._variables()
        shapes = {name: tuple(variable.shape) for name, variable in variables.items()}
        stored = {n: a.shape for n, a in arrays.items() if not n.startswith(RNG_PREFIX)}
        if shapes != stored:
            raise InputError(
                "A checkpoint must match the model and the recipe. Received: weights of other "
                "shapes"
            )
        # TensorFlow compiles a step for the first batch's size, and a second one for all other
        # sizes, which rounds differently: the first must be a full batch, as in the first run.
        for step, make_batch, images in (
            (self._compiled.train_on_batch, self._train_batch, self._images_per_epoch),
            (self._compiled.test_on_batch, self._eval_batch, len(self.dataset.x_test)),
        ):
            self._run_step(step, make_batch(np.arange(min(self.micro_batch_size, images))))
        # During testing the model has the averaged weights.
        self._swap_ema(state.images > len(self.dataset.x_train))
        for name, variable in variables.items():
            variable.assign(arrays[name])
        set_random_state(arrays)
        self.state = state

    def epochs(self, on_step: Callable[[], None] = lambda: None) -> Iterator[dict]:
        """Trains epoch by epoch; yields the metrics and the seconds of each.

        ``on_step`` is called after each step, when ``state`` and ``arrays`` are consistent. With
        several devices the trained weights are copied to the model when the iteration ends, for any
        reason.

        Raises:
            DivergenceError: The loss of a batch is not finite.
        """
        lost = False
        try:
            yield from self._each_epoch(on_step)
        except distributed.LostHostError:
            lost = True
            raise
        finally:
            # Weights sharded over a lost host cannot be read.
            if not lost:
                self._sync_weights()

    def _each_epoch(self, on_step):
        while self.state.epoch <= self._epochs:
            start = time.perf_counter() - self.state.seconds

            def after_step(start=start):
                self.state.seconds = time.perf_counter() - start
                on_step()

            epoch = self.state.epoch
            count = len(self.dataset.x_train)
            order = datasets.epoch_permutation(count, self._seed, epoch)[: self._images_per_epoch]
            flip = (
                transforms.flip_mask(count, self._seed, epoch)
                if "flip" in self._augmentations
                else None
            )
            self._train(order, flip, after_step)
            self._test(after_step)
            state = self.state
            row = {
                "epoch": epoch,
                # Not len(order), which may differ if the run resumed with more or fewer devices.
                "train_loss": state.train_loss / state.train_images,
                "train_accuracy": state.train_accuracy / state.train_images,
                "test_loss": state.test_loss / state.test_images,
                "test_accuracy": state.test_accuracy / state.test_images,
                "seconds": time.perf_counter() - start,
            }
            self.state = TrainerState(epoch + 1)
            yield row

    def train(self, order, flip=None, on_step=lambda: None) -> tuple[float, float]:
        """Trains on these images once; returns the mean loss and accuracy.

        Args:
            order: Indices of the training images, in order.
            flip: For each training image, whether it is flipped horizontally; None: no flips.
            on_step: Called after each step.
        """
        self.state = TrainerState()
        self._train(order, flip, on_step)
        return self.state.train_loss / len(order), self.state.train_accuracy / len(order)

    @property
    def _steps_per_epoch(self) -> tuple[int, int]:
        """Steps of training and of testing in an epoch."""
        train, test = (
            -(-images // self.micro_batch_size)
            for images in (self._images_per_epoch, len(self.dataset.x_test))
        )
        return train, test

    def _sync_weights(self):
        """Copies the trained weights, or their averages, to the caller's model."""
        if self.recipe.ema_momentum is not None and not self._ema_active:
            self._compiled.optimizer.finalize_variable_values(self._compiled.trainable_variables)
        self.copy_weights()

    def copy_weights(self):
        """Copies the weights from all devices to the caller's model, if there are several."""
        if self._trained is not self.model:
            for target, trained in zip(self.model.variables, self._trained.variables, strict=True):
                target.assign(_to_numpy(trained))

    @contextlib.contextmanager
    def evaluated_weights(self):
        """In the block the caller's model has the weights that testing uses."""
        self._swap_ema(True)
        self.copy_weights()
        try:
            yield
        finally:
            self._swap_ema(False)

    def _variables(self) -> dict:
        kinds = {"model": self._trained.variables, "optimizer": self.optimizer_variables}
        return {f"{kind}.{n}": v for kind, of_kind in kinds.items() for n, v in enumerate(of_kind)}

    def _train(self, order, flip, on_step):
        batches = self.batches(order, flip, self.state.images)
        self._run_phase("train", self._compiled.train_on_batch, batches, on_step)

    def _test(self, on_step):
        train_images = len(self.dataset.x_train)
        self._swap_ema(True)
        # Includes the training images that the epoch skipped.
        self.state.images = max(self.state.images, train_images)
        images = np.arange(len(self.dataset.x_test))
        indices = self._batch_indices(images, self.state.images - train_images)
        batches = prefetch(self._eval_batch, indices)
        self._run_phase("test", self._compiled.test_on_batch, batches, on_step)
        self._swap_ema(False)

    def _run_phase(self, phase, step, batches, on_step):
        """Trains or tests on batches, and updates the sums of the phase."""
        with contextlib.closing(batches):
            for batch in batches:
                result, count = self._run_finite_step(step, batch), batch.shard.count
                sums = {"images": count} | {n: result[n] * count for n in ("loss", "accuracy")}
                for name, value in sums.items():
                    field = f"{phase}_{name}"
                    setattr(self.state, field, getattr(self.state, field) + value)
                self.state.images += count
                on_step()

    def _swap_ema(self, active):
        """Exchanges the weights and their averages, if there are averages."""
        if self.recipe.ema_momentum is None or active == self._ema_active:
            return
        with self._distribution.scope():
            (self._ema_callback.on_test_begin if active else self._ema_callback.on_test_end)()
        self._ema_active = active

    def batches(self, order, flip=None, start=0) -> Generator[Batch]:
        """Training batches from position ``start`` of the order on, prefetched by a thread."""
        make_batch = functools.partial(self._train_batch, flip=flip)
        return prefetch(make_batch, self._batch_indices(order, start))

    def _batch_indices(self, order, start) -> list[np.ndarray]:
        size = self.micro_batch_size
        return [order[n : n + size] for n in range(start, len(order), size)]

    def _train_batch(self, indices, flip=None) -> Batch:
        shard = self._distribution.shard(indices)
        x, own, epoch = self.dataset.x_train, shard.indices, self.state.epoch
        images = x.random_crops(own, self._seed, epoch) if self.recipe.random_crop else x[own]
        if flip is not None:
            images[flip[own]] = images[flip[own], :, ::-1]
        labels = self._labels(self.dataset.y_train[own], self.recipe.label_smoothing)
        images = transforms.to_unit_float(images)
        if set(self._augmentations) - {"flip"}:
            key = (self._seed, epoch, 4, int(own[0]))
            with self._exclusive:
                images, labels = augment(images, labels, self._augmentations, key)
        of_class = self._class_weights
        if of_class is None:
            return Batch(images, labels, shard)
        weights = labels @ of_class if self._has_soft_labels else of_class[labels]
        return Batch(images, labels, shard, weights)

    def _eval_batch(self, indices) -> Batch:
        shard = self._distribution.shard(indices)
        labels = self._labels(self.dataset.y_test[shard.indices], 0.0)
        return Batch(transforms.to_unit_float(self.dataset.x_test[shard.indices]), labels, shard)

    @property
    def _has_soft_labels(self) -> bool:
        """Whether labels are class probabilities: those of smoothed and of blended labels."""
        return bool(self.recipe.label_smoothing) or "mixup" in self.recipe.augmentation_names

    def _labels(self, y, smoothing) -> np.ndarray:
        """Class indices, or class probabilities if the loss needs them."""
        if not self._has_soft_labels:
            return y
        classes = len(self.dataset.class_names)
        uniform = np.full((len(y), classes), smoothing / classes, "float32")
        uniform[np.arange(len(y)), y] += 1 - smoothing
        return uniform

    def _run_finite_step(self, step, batch) -> dict[str, float]:
        result = self._run_step(step, batch)
        if not math.isfinite(result["loss"]):
            raise DivergenceError(
                f"The loss must be finite. Received: {float(result['loss'])} at step "
                f"{self.steps_done + 1}, in epoch {self.state.epoch}; {self._describe_nonfinite()}"
            )
        return {name: float(value) for name, value in result.items()}

    def _run_step(self, step, batch):
        """Runs a step; returns the mean loss and accuracy over the images of all hosts."""
        if self._distribution.is_single:
            return step(batch.images, batch.labels, batch.weights, return_dict=True)
        distribution = self._distribution
        with self._exclusive, distribution.scope(), distribution.detect_lost_hosts():
            result = step(batch.images, batch.labels, batch.shard.weights, return_dict=True)
            # Keras divides by the number of all images, including those of weight 0.
            loss = float(result["loss"]) * batch.shard.padded_count / batch.shard.count
            (accuracy,) = (float(v) for name, v in result.items() if name != "loss")
        return {"loss": loss, "accuracy": accuracy}

    def _describe_nonfinite(self, limit=3) -> str:
        """The layers with the most non-finite weights, or else with the largest."""
        layers = []
        for variable in self._trained.variables:
            values = keras.ops.convert_to_numpy(variable).astype("float64")
            finite = values[np.isfinite(values)]
            layers.append((values.size - finite.size, np.abs(finite).max(initial=0), variable.path))
        return "weights: " + "; ".join(
            f"{path} {nonfinite} not finite, largest {largest:.3g}"
            for nonfinite, largest, path in sorted(layers, reverse=True)[:limit]
        )


# Prefix of the names of random-generator states among the arrays of a checkpoint.
RNG_PREFIX = "random."


def random_state() -> dict[str, np.ndarray]:
    """States of the random generators that are not variables: on PyTorch, Keras's dropout draws
    from PyTorch's own generators."""
    return {f"{RNG_PREFIX}{name}": get().numpy() for name, (get, _) in _generators().items()}


def set_random_state(arrays):
    """Restores the states from ``random_state``, for the devices that exist here."""
    for name, (_, put) in _generators().items():
        if f"{RNG_PREFIX}{name}" in arrays:
            put(keras.ops.convert_to_tensor(arrays[f"{RNG_PREFIX}{name}"]).cpu())


def _generators() -> dict:
    """Functions that get and set a generator's state, by device."""
    if keras.config.backend() != "torch":
        return {}
    import torch

    found = {"cpu": (torch.get_rng_state, torch.set_rng_state)}
    if torch.cuda.is_available():
        found["cuda"] = (torch.cuda.get_rng_state, torch.cuda.set_rng_state)
    return found


def _clone(model):
    """The same model and weights, on the devices of the current distribution."""
    clone = keras.models.clone_model(model)
    for target, variable in zip(clone.variables, model.variables, strict=True):
        target.assign(_to_numpy(variable))
    return clone


def _to_numpy(variable) -> np.ndarray:
    """A variable's values; those of dtypes that NumPy lacks as float32, which is exact."""
    values = keras.ops.convert_to_numpy(variable)
    return values if values.dtype.isbuiltin == 1 else values.astype("float32")
