"""Training and testing a model, epoch by epoch, in an order that is a function of the seed."""

import dataclasses
import time
from collections.abc import Callable, Iterator

import keras
import numpy as np

from involution import data

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
    """

    learning_rate: float
    weight_decay: float = 0.0
    one_cycle: bool = False
    flip: bool = False
    batch_size: int | None = None

    def optimizer(self, steps) -> keras.optimizers.Optimizer:
        """The optimizer for so many steps."""
        rate = self.learning_rate
        if self.one_cycle:
            rising = steps // 4
            rate = keras.optimizers.schedules.CosineDecay(
                rate / 25, max(steps - rising, 1), warmup_target=rate, warmup_steps=rising
            )
        if self.weight_decay == 0:
            return keras.optimizers.Adam(rate)
        optimizer = keras.optimizers.AdamW(rate, weight_decay=self.weight_decay)
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
        return optimizer


# By the names that commands know. The first is the keras.io example's.
RECIPES = {
    "example": Recipe(1e-3),
    "one-cycle": Recipe(0.018, weight_decay=0.02, one_cycle=True, flip=True, batch_size=128),
}


class Trainer:
    """A model, its images, and the loss and the metric of the keras.io example.

    Args:
        network: The model that is trained; it is never compiled itself, so that its file carries no
            optimizer.
        dataset: The images.
        recipe: How to train.
        epochs: Passes over the training images.
        seed: Of the order of images and whatever else is random from here on.

    Attributes:
        steps: Batches in all epochs, of training and of testing.
    """

    def __init__(self, network, dataset, recipe, epochs, seed):
        keras.utils.set_random_seed(seed)
        self.network, self.dataset, self.recipe = network, dataset, recipe
        self._epochs, self._seed = epochs, seed
        self.batch_size = recipe.batch_size or dataset.batch_size
        train, test = (
            -(-len(images) // self.batch_size) for images in (dataset.x_train, dataset.x_test)
        )
        self.steps = epochs * (train + test)
        inputs = keras.Input(network.input_shape[1:])
        self._compiled = keras.Model(inputs, network(inputs))
        self._compiled.compile(
            optimizer=recipe.optimizer(epochs * train),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        self._compiled.optimizer.build(self._compiled.trainable_variables)

    @property
    def optimizer_variables(self) -> list:
        return self._compiled.optimizer.variables

    def epochs(self, step: Callable[[], None] = lambda: None) -> Iterator[dict]:
        """Trains epoch by epoch; yields each one's measures, and its seconds, when it is done."""
        for epoch in range(1, self._epochs + 1):
            start = time.perf_counter()
            order = data.order(len(self.dataset.x_train), self._seed, epoch)
            mirrored = data.mirrored(len(order), self._seed, epoch) if self.recipe.flip else None
            train = self.train(order, mirrored, step)
            test = self.test(step)
            yield {
                "epoch": epoch,
                **dict(zip(MEASURES, (*train, *test), strict=True)),
                "seconds": time.perf_counter() - start,
            }

    def train(self, order, mirrored=None, step=lambda: None) -> tuple[float, float]:
        """One pass over training images in this order, some of them seen in a mirror; the means of
        loss and accuracy."""

        def images(batch):
            chosen = self.dataset.x_train[batch]
            if mirrored is not None:
                chosen[mirrored[batch]] = chosen[mirrored[batch], :, ::-1]
            return chosen

        return self._mean(self._compiled.train_on_batch, images, self.dataset.y_train, order, step)

    def test(self, step=lambda: None) -> tuple[float, float]:
        """Loss and accuracy on the test images."""
        images, order = self.dataset.x_test.__getitem__, np.arange(len(self.dataset.x_test))
        return self._mean(self._compiled.test_on_batch, images, self.dataset.y_test, order, step)

    def _mean(self, run, images, labels, order, step):
        loss = accuracy = 0.0
        for i in range(0, len(order), self.batch_size):
            batch = order[i : i + self.batch_size]
            result = run(data.scale(images(batch)), labels[batch], return_dict=True)
            loss += float(result["loss"]) * len(batch)
            accuracy += float(result["accuracy"]) * len(batch)
            step()
        return loss / len(order), accuracy / len(order)
