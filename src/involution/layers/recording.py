"""Recording of the involutions that run, and replacement of their kernels, for analysis."""

import contextlib
import threading
from collections.abc import Callable
from typing import NamedTuple

import keras

from involution.ops.window import Window


class InvolutionTrace(NamedTuple):
    """One recorded call of an involution layer.

    Attributes:
        layer: The layer.
        window: Its window: in the input, or of a transposed involution in the output.
        inputs: Its input.
        kernel: The kernels, in the layout of ``involution.ops.involution``: at each position of the
            output, or of a transposed involution of the input.
        outputs: Its output, without the kernels.
    """

    layer: keras.layers.Layer
    window: Window
    inputs: object
    kernel: object
    outputs: object


class _Recorder(threading.local):
    """The traces and the replacement of this thread; None while there is none."""

    traces: list[InvolutionTrace] | None = None
    replacement: Callable | None = None


_recorder = _Recorder()


@contextlib.contextmanager
def record_involutions():
    """Context manager that yields a list, to which every involution that runs in this thread
    appends an ``InvolutionTrace``: of values in eager calls, of symbolic tensors in traced ones."""
    before, _recorder.traces = _recorder.traces, []
    try:
        yield _recorder.traces
    finally:
        _recorder.traces = before


@contextlib.contextmanager
def replace_kernels(function):
    """Context manager in which every involution that runs in this thread applies
    ``function(layer, kernel)`` instead of the kernels that it generates, of the same shape."""
    before, _recorder.replacement = _recorder.replacement, function
    try:
        yield
    finally:
        _recorder.replacement = before


def is_recording() -> bool:
    return _recorder.traces is not None


def stores_kernels() -> bool:
    """Whether involutions must store their kernels, to be recorded or replaced."""
    return is_recording() or _recorder.replacement is not None


def replaced(layer, kernel):
    """The kernels that a layer applies instead of ``kernel``."""
    return kernel if _recorder.replacement is None else _recorder.replacement(layer, kernel)


def record(*fields):
    """Appends a trace with these fields if a recording is active."""
    if _recorder.traces is not None:
        _recorder.traces.append(InvolutionTrace(*fields))
