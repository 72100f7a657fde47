"""Recording of the involutions that run, for visualization and analysis."""

import contextlib
import threading
from typing import NamedTuple

import keras

from involution.ops.window import Window


class InvolutionTrace(NamedTuple):
    """One recorded call of an involution layer.

    Attributes:
        layer: The layer.
        window: Its window.
        inputs: Its input.
        kernel: The kernels, in the layout of ``involution.ops.involution``.
        outputs: Its output, without the kernels.
    """

    layer: keras.layers.Layer
    window: Window
    inputs: object
    kernel: object
    outputs: object


class _Recorder(threading.local):
    """The traces of this thread; None while nothing is recorded."""

    traces: list[InvolutionTrace] | None = None


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


def is_recording() -> bool:
    return _recorder.traces is not None


def record(*fields):
    """Appends a trace with these fields if a recording is active."""
    if _recorder.traces is not None:
        _recorder.traces.append(InvolutionTrace(*fields))
