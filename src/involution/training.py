"""Training and testing a model, epoch by epoch, in an order that is a function of the seed."""

import time
from collections.abc import Callable, Iterator

import keras
import numpy as np

from involution import data

# Columns of history.csv after the model and the epoch.
MEASURES = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")


class Trainer:
    """A model with the optimizer, the loss and the metric of the keras.io example.

    Attributes:
        network: The model that is trained; it is never compiled itself, so that its file carries no
            optimizer.
    """

    def __init__(self, network, learning_rate=1e-3):
        self.network = network
        inputs = keras.Input(network.input_shape[1:])
        self._compiled = keras.Model(inputs, network(inputs))
        self._compiled.compile(
            optimizer=keras.optimizers.Adam(learning_rate),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        self._compiled.optimizer.build(self._compiled.trainable_variables)

    @property
    def optimizer_variables(self) -> list:
        return self._compiled.optimizer.variables

    def train_epoch(self, dataset, order, batch_size, step=lambda: None) -> tuple[float, float]:
        """One pass over the training images in this order; the means of loss and accuracy."""
        run = self._compiled.train_on_batch
        return _mean(run, dataset.x_train, dataset.y_train, order, batch_size, step)

    def test(self, dataset, batch_size, step=lambda: None) -> tuple[float, float]:
        """Loss and accuracy on the test images."""
        run, order = self._compiled.test_on_batch, np.arange(len(dataset.x_test))
        return _mean(run, dataset.x_test, dataset.y_test, order, batch_size, step)


def _mean(run, images, labels, order, batch_size, step):
    loss = accuracy = 0.0
    for i in range(0, len(order), batch_size):
        batch = order[i : i + batch_size]
        result = run(data.scale(images[batch]), labels[batch], return_dict=True)
        loss += float(result["loss"]) * len(batch)
        accuracy += float(result["accuracy"]) * len(batch)
        step()
    return loss / len(order), accuracy / len(order)


def steps(dataset, batch_size) -> int:
    """Batches in one epoch, of training and of testing."""
    return sum(-(-len(x) // batch_size) for x in (dataset.x_train, dataset.x_test))


def epochs(
    trainer: Trainer, dataset, count, batch_size, seed, step: Callable[[], None]
) -> Iterator[dict]:
    """Trains epoch by epoch; yields each one's measures, and its seconds, when it is done."""
    for epoch in range(1, count + 1):
        start = time.perf_counter()
        order = data.order(len(dataset.x_train), seed, epoch)
        train = trainer.train_epoch(dataset, order, batch_size, step)
        test = trainer.test(dataset, batch_size, step)
        yield {
            "epoch": epoch,
            **dict(zip(MEASURES, (*train, *test), strict=True)),
            "seconds": time.perf_counter() - start,
        }
