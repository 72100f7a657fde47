"""Keras callbacks of a run: the user's, and event files for TensorBoard."""

import contextlib
import importlib
import os

import keras

from involution.models import specs
from involution.utils.errors import InputError


def load(text):
    """The function that a spec names: FILE.py:FUNCTION or MODULE:FUNCTION.

    Called with a model's label, it returns a list of ``keras.callbacks.Callback``.

    Raises:
        InputError: It cannot be imported.
    """
    name, _, function = text.rpartition(":")
    if not name or not function:
        raise InputError(
            f"`callbacks` must be FILE.py:FUNCTION or MODULE:FUNCTION. Received: {text}"
        )
    if name.endswith(".py"):
        return specs.function_from(name, function)
    with specs.importing_from(os.getcwd()):
        try:
            found = getattr(importlib.import_module(name), function)
        except Exception as error:  # a user's module may raise anything
            raise InputError(
                f"`callbacks` must name a function that can be imported. Received: {text}: {error}"
            ) from error
    return found


class EventFiles(keras.callbacks.Callback):
    """Writes the metrics of each epoch for TensorBoard, without TensorFlow.

    Args:
        folder: The folder of the event files.
    """

    def __init__(self, folder):
        super().__init__()
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise InputError(
                "`tensorboard` requires tensorboardX: pip install 'involution[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(str(folder))

    def on_epoch_end(self, epoch, logs=None):
        for name, value in (logs or {}).items():
            self._writer.add_scalar(name, value, epoch + 1)
        self._writer.flush()

    def on_train_end(self, logs=None):
        self._writer.close()


class Callbacks:
    """The callbacks of one model's training.

    Args:
        callbacks: Keras callbacks, called in this order.
        model: The compiled model.
        epochs: Number of epochs.
    """

    def __init__(self, callbacks, model, epochs):
        for callback in callbacks:
            if not isinstance(callback, keras.callbacks.Callback):
                raise InputError(
                    f"`callbacks` must return Keras callbacks. Received: {type(callback).__name__}"
                )
        self._list = keras.callbacks.CallbackList(callbacks, model=model, epochs=epochs)
        self._model = model

    @property
    def stops_training(self) -> bool:
        """Whether a callback asked for the end of training."""
        return bool(getattr(self._model, "stop_training", False))

    def on_train_begin(self):
        self._model.stop_training = False
        self._call("on_train_begin")

    def on_epoch_begin(self, epoch):
        """Epochs are counted from 1 here, and from 0 in Keras."""
        self._call("on_epoch_begin", epoch - 1)

    def on_epoch_end(self, row):
        """Passes the metrics of a row of history.csv by Keras's names."""
        logs = {
            "loss": row["train_loss"],
            "accuracy": row["train_accuracy"],
            "val_loss": row["test_loss"],
            "val_accuracy": row["test_accuracy"],
            "seconds": row["seconds"],
        }
        self._call("on_epoch_end", row["epoch"] - 1, logs)

    def on_train_end(self):
        self._call("on_train_end")

    def _call(self, event, *arguments):
        try:
            getattr(self._list, event)(*arguments)
        except Exception as error:  # a user's callback may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"A callback must not raise. Received: {event}: {reason}") from error


@contextlib.contextmanager
def training(callbacks: Callbacks):
    """Calls ``on_train_begin`` and, however the block ends, ``on_train_end``."""
    callbacks.on_train_begin()
    try:
        yield
    finally:
        callbacks.on_train_end()
