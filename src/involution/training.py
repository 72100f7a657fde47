"""Training and testing a model, epoch by epoch, in an order that is a function of the seed."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import keras
import numpy as np

from involution import cluster, data
from involution.errors import InputError

# Columns of history.csv after the model and the epoch.
MEASURES = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        learning_rate: Of Adam; with ``one_cycle`` the largest.
        weight_decay: What AdamW takes off at each step, times the rate, of all weights but biases
            and those of normalizations; 0: Adam.
        one_cycle: Whether the rate rises for the first quarter of the steps, from a 25th, and then
            falls to 0 along a cosine.
        flip: Whether half of the images, others in every epoch, are seen in a mirror.
        batch_size: Images in a step; None: what suits the data set.
        clip_norm: What the norm of all gradients together is cut to where it is larger; None: it
            is left as it is.
    """

    learning_rate: float
    weight_decay: float = 0.0
    one_cycle: bool = False
    flip: bool = False
    batch_size: int | None = None
    clip_norm: float | None = None

    def optimizer(self, steps) -> keras.optimizers.Optimizer:
        """The optimizer for so many steps."""
        rate = self.learning_rate
        if self.one_cycle:
            rising = steps // 4
            rate = keras.optimizers.schedules.CosineDecay(
                rate / 25, max(steps - rising, 1), warmup_target=rate, warmup_steps=rising
            )
        if self.weight_decay == 0:
            return keras.optimizers.Adam(rate, global_clipnorm=self.clip_norm)
        optimizer = keras.optimizers.AdamW(
            rate, weight_decay=self.weight_decay, global_clipnorm=self.clip_norm
        )
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
        return optimizer


# By the names that commands know. The first is the keras.io example's.
RECIPES = {
    "example": Recipe(1e-3),
    "one-cycle": Recipe(0.018, weight_decay=0.02, one_cycle=True, flip=True, batch_size=128),
}


@dataclasses.dataclass
class Position:
    """How far a training is: after which batch.

    Attributes:
        epoch: The one at work, from 1.
        images: How many of it are done with: of training, then of testing.
        train_loss, train_accuracy, test_loss, test_accuracy: Sums over these images.
        seconds: What the epoch took so far.
    """

    epoch: int = 1
    images: int = 0
    train_loss: float = 0.0
    train_accuracy: float = 0.0
    test_loss: float = 0.0
    test_accuracy: float = 0.0
    seconds: float = 0.0


class DivergenceError(InputError):
    """The loss is no number any more, or infinite: of no use to go on."""


class Trainer:
    """A model, its images, and the loss and the metric of the keras.io example.

    Args:
        network: The model that is trained; it is never compiled itself, so that its file carries no
            optimizer.
        dataset: The images.
        recipe: How to train.
        epochs: Passes over the training images.
        seed: Of the order of images and whatever else is random from here on.
        together: The devices and hosts that share every batch. What is left over at the end of an
            epoch when all devices have got as many is not trained on; it is other images each time.

    Attributes:
        steps: Batches in all epochs, of training and of testing.
        at: After which batch the training is.
    """

    def __init__(self, network, dataset, recipe, epochs, seed, together=cluster.ALONE):
        keras.utils.set_random_seed(seed)
        self.network, self.dataset, self.recipe = network, dataset, recipe
        self._epochs, self._seed, self._together = epochs, seed, together
        self.batch_size = recipe.batch_size or dataset.batch_size
        together.check_batch(self.batch_size)
        self._images = len(dataset.x_train) - len(dataset.x_train) % together.total
        if self._images == 0:
            raise InputError(
                f"There must be an image for each of {together.total} devices. "
                f"Received: {len(dataset.x_train)} training images"
            )
        self.at = Position()
        train, test = self._batches
        self.steps = epochs * (train + test)
        with together.sharing():
            self._trained = network if together.alone else _copy(network)
            inputs = keras.Input(network.input_shape[1:])
            self._compiled = keras.Model(inputs, self._trained(inputs))
            self._compiled.compile(
                optimizer=recipe.optimizer(epochs * train),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                # Where images make a batch whole that do not count, the metric knows of it too.
                **{"metrics" if together.alone else "weighted_metrics": ["accuracy"]},
            )
            self._compiled.optimizer.build(self._compiled.trainable_variables)

    @property
    def optimizer_variables(self) -> list:
        return self._compiled.optimizer.variables

    @property
    def steps_done(self) -> int:
        train, test = self._batches
        seen = min(self.at.images, self._images)
        rest = max(self.at.images - len(self.dataset.x_train), 0)
        return (self.at.epoch - 1) * (train + test) + sum(
            -(-images // self.batch_size) for images in (seen, rest)
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """All that training changes but ``at``, for ``restore``."""
        return {name: _exact(variable) for name, variable in self._variables().items()}

    def restore(self, arrays, at: Position):
        """Goes on from there.

        Raises:
            InputError: The arrays are those of another model or recipe.
        """
        variables = self._variables()
        shapes = {name: tuple(variable.shape) for name, variable in variables.items()}
        if shapes != {name: array.shape for name, array in arrays.items()}:
            raise InputError(
                "A checkpoint must be of this model and recipe. Received: weights of other shapes"
            )
        # TensorFlow compiles a step for the first batch's size, and a second one for all other
        # sizes, which rounds differently: the first must be a whole batch, as it was before.
        first = slice(0, self.batch_size)
        for run, images, labels in (
            (self._compiled.train_on_batch, self.dataset.x_train, self.dataset.y_train),
            (self._compiled.test_on_batch, self.dataset.x_test, self.dataset.y_test),
        ):
            self._on_batch(run, images[first], labels[first])
        for name, variable in variables.items():
            variable.assign(arrays[name])
        self.at = at

    def epochs(self, step: Callable[[], None] = lambda: None) -> Iterator[dict]:
        """Trains epoch by epoch; yields each one's measures, and its seconds, when it is done.

        ``step`` is called after each batch, when ``at`` and ``arrays`` are those of that moment.
        A network that several devices train has its weights when this ends, however it ends.

        Raises:
            DivergenceError: The loss of a batch is not finite.
        """
        lost = False
        try:
            yield from self._each_epoch(step)
        except cluster.LostHostError:
            lost = True
            raise
        finally:
            # What a host was lost in the midst of cannot be read.
            if not lost:
                self._settle()

    def _each_epoch(self, step):
        train, test = self._images, len(self.dataset.x_test)
        while self.at.epoch <= self._epochs:
            start = time.perf_counter() - self.at.seconds

            def done(start=start):
                self.at.seconds = time.perf_counter() - start
                step()

            epoch = self.at.epoch
            count = len(self.dataset.x_train)
            order = data.order(count, self._seed, epoch)[:train]
            mirrored = data.mirrored(count, self._seed, epoch) if self.recipe.flip else None
            self._train(order, mirrored, done)
            self._test(done)
            row = {
                "epoch": epoch,
                "train_loss": self.at.train_loss / train,
                "train_accuracy": self.at.train_accuracy / train,
                "test_loss": self.at.test_loss / test,
                "test_accuracy": self.at.test_accuracy / test,
                "seconds": time.perf_counter() - start,
            }
            self.at = Position(epoch + 1)
            yield row

    def train(self, order, mirrored=None, step=lambda: None) -> tuple[float, float]:
        """One pass over training images in this order, some of them seen in a mirror; the means of
        loss and accuracy."""
        self.at = Position()
        self._train(order, mirrored, step)
        return self.at.train_loss / len(order), self.at.train_accuracy / len(order)

    @property
    def _batches(self) -> tuple[int, int]:
        """Numbers of batches in an epoch, of training and of testing."""
        train, test = (
            -(-images // self.batch_size) for images in (self._images, len(self.dataset.x_test))
        )
        return train, test

    def _settle(self):
        """Gives the network the weights of its copy that is trained, where there is one."""
        if self._trained is not self.network:
            for own, trained in zip(self.network.variables, self._trained.variables, strict=True):
                own.assign(_exact(trained))

    def _variables(self) -> dict:
        kinds = {"model": self._trained.variables, "optimizer": self.optimizer_variables}
        return {f"{kind}.{n}": v for kind, of_kind in kinds.items() for n, v in enumerate(of_kind)}

    def _train(self, order, mirrored, step):
        while self.at.images < len(order):
            batch = order[self.at.images : self.at.images + self.batch_size]
            images = self.dataset.x_train[batch]
            if mirrored is not None:
                images[mirrored[batch]] = images[mirrored[batch], :, ::-1]
            result = self._run(self._compiled.train_on_batch, images, self.dataset.y_train[batch])
            self.at.train_loss += result["loss"] * len(batch)
            self.at.train_accuracy += result["accuracy"] * len(batch)
            self.at.images += len(batch)
            step()

    def _test(self, step):
        before = len(self.dataset.x_train)
        # Without those that were left over.
        self.at.images = max(self.at.images, before)
        while (begin := self.at.images - before) < len(self.dataset.x_test):
            batch = slice(begin, begin + self.batch_size)
            images, labels = self.dataset.x_test[batch], self.dataset.y_test[batch]
            result = self._run(self._compiled.test_on_batch, images, labels)
            self.at.test_loss += result["loss"] * len(images)
            self.at.test_accuracy += result["accuracy"] * len(images)
            self.at.images += len(images)
            step()

    def _run(self, run, images, labels) -> dict[str, float]:
        result = self._on_batch(run, images, labels)
        if not math.isfinite(result["loss"]):
            raise DivergenceError(
                f"The loss must be finite. Received: {float(result['loss'])} at step "
                f"{self.steps_done + 1}, in epoch {self.at.epoch}; {self._worst()}"
            )
        return {name: float(value) for name, value in result.items()}

    def _on_batch(self, run, images, labels):
        """Of this host's part, on all devices: the means over all hosts' images."""
        together, count = self._together, len(images)
        if together.alone:
            return run(data.scale(images), labels, return_dict=True)
        # Once more the first ones, for devices that have fewer; of weight 0.
        whole = -(-count // together.total) * together.total
        index = np.arange(whole) % count
        weights = (np.arange(whole) < count).astype("float32")
        own, labels, weights = map(together.part, (images[index], labels[index], weights))
        with together.sharing(), together.answering():
            result = run(data.scale(own), labels, weights, return_dict=True)
            # Its mean counts those of weight 0.
            loss = float(result["loss"]) * whole / count
            (accuracy,) = (float(v) for name, v in result.items() if name != "loss")
        return {"loss": loss, "accuracy": accuracy}

    def _worst(self, shown=3) -> str:
        """Of which layers the weights are strangest."""
        layers = []
        for variable in self._trained.variables:
            values = keras.ops.convert_to_numpy(variable).astype("float64")
            finite = values[np.isfinite(values)]
            layers.append((values.size - finite.size, np.abs(finite).max(initial=0), variable.path))
        return "weights: " + "; ".join(
            f"{path} {lost} not finite, largest {largest:.3g}"
            for lost, largest, path in sorted(layers, reverse=True)[:shown]
        )


def _copy(network):
    """The same model and weights, for the devices that share it now."""
    copy = keras.models.clone_model(network)
    for own, variable in zip(copy.variables, network.variables, strict=True):
        own.assign(_exact(variable))
    return copy


def _exact(variable) -> np.ndarray:
    """A variable's values; those of types that NumPy lacks as float32, which holds them exactly."""
    values = keras.ops.convert_to_numpy(variable)
    return values if values.dtype.isbuiltin == 1 else values.astype("float32")
