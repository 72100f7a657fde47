"""Keras callbacks of a run: the user's, and event files for TensorBoard."""

import contextlib
import importlib
import os
import pathlib
from collections.abc import Callable
from typing import Any

import keras

from involution.models import specs
from involution.utils.errors import InputError, convert_exceptions


def builder(spec, tensorboard) -> Callable[[str, pathlib.Path], list]:
    """A function from a model's label, and the folder of its event files, to new callbacks.

    Args:
        spec: As for ``load``; None: there are none of the user's.
        tensorboard: Whether event files are written.

    Raises:
        InputError: ``spec`` cannot be imported, or tensorboardX is missing. The function raises it
            too, if that of ``spec`` fails.
    """
    make = (lambda label: []) if spec is None else load(spec)
    writer_class = _summary_writer() if tensorboard else None

    def build(label, folder):
        rule = "`callbacks` must return a list of Keras callbacks."
        with convert_exceptions(InputError, rule, spec):
            found = list(make(label))
        if writer_class is not None:
            found.append(EventFiles(writer_class(str(folder))))
        return found

    return build


def _summary_writer():
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise InputError(
            "`tensorboard` requires tensorboardX: pip install 'involution[tensorboard]'. "
            f"Received: no module {error.name}"
        ) from error
    return SummaryWriter


def load(text) -> Callable[[str], Any]:
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
    rule = "`callbacks` must name a function that can be imported."
    with specs.importing_from(os.getcwd()), convert_exceptions(InputError, rule, text):
        return getattr(importlib.import_module(name), function)


class EventFiles(keras.callbacks.Callback):
    """Writes the metrics of each epoch for TensorBoard, without TensorFlow.

    Args:
        writer: A ``tensorboardX.SummaryWriter``.
    """

    def __init__(self, writer):
        super().__init__()
        self._writer = writer

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
        with convert_exceptions(InputError, "A callback must not raise.", event):
            getattr(self._list, event)(*arguments)


@contextlib.contextmanager
def training(callbacks: Callbacks):
    """Calls ``on_train_begin`` and, however the block ends, ``on_train_end``."""
    callbacks.on_train_begin()
    try:
        yield
    except BaseException:
        with contextlib.suppress(InputError):  # would hide the first exception
            callbacks.on_train_end()
        raise
    callbacks.on_train_end()
