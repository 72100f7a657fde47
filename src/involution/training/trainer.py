"""Training and testing a model, epoch by epoch, in an order that is a function of the seed."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Generator, Iterator

import keras
import numpy as np

from involution.data import datasets, transforms
from involution.data.prefetch import prefetch
from involution.training import distributed
from involution.utils.errors import InputError

# Columns of history.csv after the model and the epoch.
MEASURES = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        learning_rate: Of Adam or SGD; with ``warm_up`` the largest.
        weight_decay: With Adam, what AdamW takes off at each step, times the rate, of all weights
            but biases and those of normalizations. With SGD, how much of a weight is added to its
            gradient, of all weights. 0: none.
        warm_up: The share of the steps in which the rate rises, before it falls to 0 along a
            cosine; None: it stays.
        start: The share of the rate that it rises from.
        flip: Whether half of the images, others in every epoch, are seen in a mirror.
        crop: Whether training sees another random part of an image in every epoch, a 12th of it or
            more, and testing its middle: see ``data.read_image``.
        batch_size: Images in a step; None: what suits the data set.
        clip_norm: What the norm of all gradients together is cut to where it is larger; None: it
            is left as it is.
        sgd: Whether it is SGD with Nesterov's momentum of 0.9, instead of Adam.
        label_smoothing: The share of a label that is given to all classes evenly, in training.
        accumulate: In how many parts a batch goes through the model; the gradients are those of
            the batch, the statistics of batch normalizations those of each part.
        ema: What a mean of the weights keeps of itself at each step; the mean is what is tested
            and written. With ``accumulate`` it nears the weights with every part, of which the
            last alone has new ones. None: the weights themselves are tested and written.
        epochs: Passes over the training images, where a command is not told.
        image_size: (height, width), likewise; None: the images' own.
    """

    learning_rate: float
    weight_decay: float = 0.0
    warm_up: float | None = None
    start: float = 0.0
    flip: bool = False
    crop: bool = False
    batch_size: int | None = None
    clip_norm: float | None = None
    sgd: bool = False
    label_smoothing: float = 0.0
    accumulate: int = 1
    ema: float | None = None
    epochs: int = 20
    image_size: tuple[int, int] | None = None

    def optimizer(self, steps) -> keras.optimizers.Optimizer:
        """The optimizer for so many steps."""
        parts = self.accumulate
        rate = self.learning_rate
        if self.warm_up is not None:
            rising = int(steps * self.warm_up)
            rate = keras.optimizers.schedules.CosineDecay(
                rate * self.start, max(steps - rising, 1), warmup_target=rate, warmup_steps=rising
            )
            if parts > 1:
                rate = _OfBatches(rate, parts)
        how = {"global_clipnorm": self.clip_norm}
        if parts > 1:
            how["gradient_accumulation_steps"] = parts
        if self.ema is not None:
            # Keras takes the mean after every part.
            how |= {"use_ema": True, "ema_momentum": self.ema ** (1 / parts)}
        if self.sgd:
            return NesterovSGD(rate, self.weight_decay, **how)
        if self.weight_decay == 0:
            return keras.optimizers.Adam(rate, **how)
        optimizer = keras.optimizers.AdamW(rate, weight_decay=self.weight_decay, **how)
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
        return optimizer


class _OfBatches(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule by batches, where Keras counts their parts."""

    def __init__(self, schedule, parts):
        self.schedule, self.parts = schedule, parts

    def __call__(self, step):
        return self.schedule(keras.ops.floor_divide(step, self.parts))


class NesterovSGD(keras.optimizers.SGD):
    """SGD with Nesterov's momentum, and weight decay as PyTorch's SGD has it: added to the
    gradient, so that the momentum carries it too. Keras's own takes it off the weights, with the
    effect of a tenth at a momentum of 0.9.

    Args:
        learning_rate: A number or a schedule.
        decay: How much of a weight is added to its gradient.
        kwargs: Of ``keras.optimizers.SGD``.
    """

    def __init__(self, learning_rate, decay=0.0, **kwargs):
        super().__init__(learning_rate, momentum=0.9, nesterov=True, **kwargs)
        self.decay = decay

    def update_step(self, gradient, variable, learning_rate):
        decayed = keras.ops.cast(gradient, variable.dtype) + self.decay * variable
        super().update_step(decayed, variable, learning_rate)


# By the names that commands know. The first is the keras.io example's; the last is the RedNet
# paper's for ImageNet, as its authors' published configuration has it.
RECIPES = {
    "example": Recipe(1e-3),
    "one-cycle": Recipe(
        0.018, weight_decay=0.02, warm_up=0.25, start=1 / 25, flip=True, batch_size=128
    ),
    "imagenet": Recipe(
        0.8,
        weight_decay=1e-4,
        warm_up=5 / 130,
        start=0.25,
        flip=True,
        crop=True,
        batch_size=2048,
        sgd=True,
        label_smoothing=0.1,
        epochs=130,
        image_size=(224, 224),
    ),
}


def images_of_an_epoch(dataset, recipe, together=distributed.ALONE) -> int:
    """How many of the training images an epoch trains on.

    Raises:
        InputError: A batch cannot be shared by the devices, or there are too few images for one.
    """
    batch_size = recipe.batch_size or dataset.batch_size
    together.check_batch(batch_size, recipe.accumulate)
    # A batch in parts is whole, or its short part would count as much as the others.
    even = batch_size if recipe.accumulate > 1 else together.total
    count = len(dataset.x_train)
    if count < even:
        what = "a batch in parts" if recipe.accumulate > 1 else f"each of {even} devices"
        raise InputError(
            f"There must be images for {what}, at least {even}. Received: {count} training images"
        )
    return count - count % even


@dataclasses.dataclass
class Position:
    """How far a training is: after which batch.

    Attributes:
        epoch: The one at work, from 1.
        images: How many of it are done with: of training, then of testing.
        train_images, train_loss, train_accuracy: How many were trained on, and sums over them.
        test_images, test_loss, test_accuracy: The same of those tested.
        seconds: What the epoch took so far.
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
    """Images of this host as a model takes them, their labels as the loss does."""

    images: np.ndarray
    labels: np.ndarray
    share: distributed.Share


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
            epoch when all devices have got as many, or where batches are accumulated is no whole
            one, is not trained on; it is other images each time.

    Attributes:
        batch_size: Images that go through the model at a time: of a batch that is accumulated, a
            part. That is what a step is, and where a training can be left.
        steps: Steps in all epochs, of training and of testing.
        at: After which step the training is.
    """

    def __init__(self, network, dataset, recipe, epochs, seed, together=distributed.ALONE):
        keras.utils.set_random_seed(seed)
        self.network, self.dataset, self.recipe = network, dataset, recipe
        self._epochs, self._seed, self._together = epochs, seed, together
        self._images = images_of_an_epoch(dataset, recipe, together)
        self.batch_size = (recipe.batch_size or dataset.batch_size) // recipe.accumulate
        self.at = Position()
        train, test = self._batches
        self.steps = epochs * (train + test)
        with together.sharing():
            self._trained = network if together.alone else _copy(network)
            inputs = keras.Input(network.input_shape[1:])
            self._compiled = keras.Model(inputs, self._trained(inputs))
            of_labels = (
                keras.losses.CategoricalCrossentropy
                if recipe.label_smoothing
                else keras.losses.SparseCategoricalCrossentropy
            )
            self._compiled.compile(
                optimizer=recipe.optimizer(epochs * train // recipe.accumulate),
                loss=of_labels(from_logits=True),
                # Where images make a batch whole that do not count, the metric knows of it too.
                **{"metrics" if together.alone else "weighted_metrics": ["accuracy"]},
            )
            self._compiled.optimizer.build(self._compiled.trainable_variables)
        self._means = keras.callbacks.SwapEMAWeights()
        self._means.set_model(self._compiled)
        self._testing_means = False

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
        return {n: _exact(variable) for n, variable in self._variables().items()} | random_state()

    def restore(self, arrays, at: Position):
        """Goes on from there.

        Raises:
            InputError: The arrays are those of another model or recipe.
        """
        variables = self._variables()
        shapes = {name: tuple(variable.shape) for name, variable in variables.items()}
        if shapes != {n: array.shape for n, array in arrays.items() if not n.startswith(RANDOM)}:
            raise InputError(
                "A checkpoint must be of this model and recipe. Received: weights of other shapes"
            )
        # TensorFlow compiles a step for the first batch's size, and a second one for all other
        # sizes, which rounds differently: the first must be a whole batch, as it was before.
        for run, make, images in (
            (self._compiled.train_on_batch, self._seen, self._images),
            (self._compiled.test_on_batch, self._tested, len(self.dataset.x_test)),
        ):
            self._on_batch(run, make(np.arange(min(self.batch_size, images))))
        # In the midst of testing, the means are what the model has.
        self._test_means(at.images > len(self.dataset.x_train))
        for name, variable in variables.items():
            variable.assign(arrays[name])
        set_random_state(arrays)
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
        except distributed.LostHostError:
            lost = True
            raise
        finally:
            # What a host was lost in the midst of cannot be read.
            if not lost:
                self._settle()

    def _each_epoch(self, step):
        while self.at.epoch <= self._epochs:
            start = time.perf_counter() - self.at.seconds

            def done(start=start):
                self.at.seconds = time.perf_counter() - start
                step()

            epoch = self.at.epoch
            count = len(self.dataset.x_train)
            order = datasets.epoch_permutation(count, self._seed, epoch)[: self._images]
            mirrored = transforms.flip_mask(count, self._seed, epoch) if self.recipe.flip else None
            self._train(order, mirrored, done)
            self._test(done)
            at = self.at
            row = {
                "epoch": epoch,
                # The devices before a break may have left over others.
                "train_loss": at.train_loss / at.train_images,
                "train_accuracy": at.train_accuracy / at.train_images,
                "test_loss": at.test_loss / at.test_images,
                "test_accuracy": at.test_accuracy / at.test_images,
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
        """Gives the network what is trained: means of its weights, or the weights of its copy."""
        if self.recipe.ema is not None and not self._testing_means:
            self._compiled.optimizer.finalize_variable_values(self._compiled.trainable_variables)
        if self._trained is not self.network:
            for own, trained in zip(self.network.variables, self._trained.variables, strict=True):
                own.assign(_exact(trained))

    def _variables(self) -> dict:
        kinds = {"model": self._trained.variables, "optimizer": self.optimizer_variables}
        return {f"{kind}.{n}": v for kind, of_kind in kinds.items() for n, v in enumerate(of_kind)}

    def _train(self, order, mirrored, step):
        batches = self.batches(order, mirrored, self.at.images)
        self._go_through("train", self._compiled.train_on_batch, batches, step)

    def _test(self, step):
        before = len(self.dataset.x_train)
        self._test_means(True)
        # Without those that were left over.
        self.at.images = max(self.at.images, before)
        todo = self._pieces(np.arange(len(self.dataset.x_test)), self.at.images - before)
        batches = prefetch(self._tested, todo)
        self._go_through("test", self._compiled.test_on_batch, batches, step)
        self._test_means(False)

    def _go_through(self, part, run, batches, step):
        """Trains or tests, and adds to the sums of that part of the epoch."""
        with contextlib.closing(batches):
            for batch in batches:
                result, count = self._run(run, batch), batch.share.count
                sums = {"images": count} | {n: result[n] * count for n in ("loss", "accuracy")}
                for name, more in sums.items():
                    field = f"{part}_{name}"
                    setattr(self.at, field, getattr(self.at, field) + more)
                self.at.images += count
                step()

    def _test_means(self, begin):
        """Swaps the weights and their means, where there are means."""
        if self.recipe.ema is None or begin == self._testing_means:
            return
        with self._together.sharing():
            (self._means.on_test_begin if begin else self._means.on_test_end)()
        self._testing_means = begin

    def batches(self, order, mirrored=None, begin=0) -> Generator[Batch]:
        """What it trains on, from one of the images on, read ahead of the one who wants it."""
        make = functools.partial(self._seen, mirrored=mirrored)
        return prefetch(make, self._pieces(order, begin))

    def _pieces(self, order, begin) -> list[np.ndarray]:
        return [order[n : n + self.batch_size] for n in range(begin, len(order), self.batch_size)]

    def _seen(self, index, mirrored=None) -> Batch:
        """A batch to train on."""
        share = self._together.share(index)
        x, own, epoch = self.dataset.x_train, share.index, self.at.epoch
        images = x.random_crops(own, self._seed, epoch) if self.recipe.crop else x[own]
        if mirrored is not None:
            images[mirrored[own]] = images[mirrored[own], :, ::-1]
        labels = self._labels(self.dataset.y_train[own], self.recipe.label_smoothing)
        return Batch(transforms.to_unit_float(images), labels, share)

    def _tested(self, index) -> Batch:
        """A batch to test on."""
        share = self._together.share(index)
        labels = self._labels(self.dataset.y_test[share.index], 0.0)
        return Batch(transforms.to_unit_float(self.dataset.x_test[share.index]), labels, share)

    def _labels(self, y, smoothing) -> np.ndarray:
        """What the loss takes: where labels are smoothed in training, a share for each class."""
        if not self.recipe.label_smoothing:
            return y
        classes = len(self.dataset.class_names)
        even = np.full((len(y), classes), smoothing / classes, "float32")
        even[np.arange(len(y)), y] += 1 - smoothing
        return even

    def _run(self, run, batch) -> dict[str, float]:
        result = self._on_batch(run, batch)
        if not math.isfinite(result["loss"]):
            raise DivergenceError(
                f"The loss must be finite. Received: {float(result['loss'])} at step "
                f"{self.steps_done + 1}, in epoch {self.at.epoch}; {self._worst()}"
            )
        return {name: float(value) for name, value in result.items()}

    def _on_batch(self, run, batch):
        """On all devices: the means over all hosts' images."""
        if self._together.alone:
            return run(batch.images, batch.labels, return_dict=True)
        with self._together.sharing(), self._together.answering():
            result = run(batch.images, batch.labels, batch.share.weights, return_dict=True)
            # Its mean counts those of weight 0.
            loss = float(result["loss"]) * batch.share.whole / batch.share.count
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


# Of the names of what random generators hold.
RANDOM = "random."


def random_state() -> dict[str, np.ndarray]:
    """What random numbers come next, where they do not come from variables: with PyTorch, Keras's
    dropout takes them from PyTorch's own generators."""
    return {f"{RANDOM}{name}": get().numpy() for name, (get, _) in _generators().items()}


def set_random_state(arrays):
    """Random numbers go on from there, on the devices that are here now."""
    for name, (_, put) in _generators().items():
        if f"{RANDOM}{name}" in arrays:
            put(keras.ops.convert_to_tensor(arrays[f"{RANDOM}{name}"]).cpu())


def _generators() -> dict:
    """Functions that get and set a generator's state, by device."""
    if keras.config.backend() != "torch":
        return {}
    import torch

    found = {"cpu": (torch.get_rng_state, torch.set_rng_state)}
    if torch.cuda.is_available():
        found["cuda"] = (torch.cuda.get_rng_state, torch.cuda.set_rng_state)
    return found


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
