"""A model with shapes and without values: what a file asks for, known before memory is taken."""

import concurrent.futures
import contextlib
import inspect
import math
import threading
from collections.abc import Callable
from typing import TypeVar

import keras

Built = TypeVar("Built")

# RedNet152 has 728, those inside its involutions included. Each takes some 50 KB, and a row of
# them the square of its length in time.
MOST_LAYERS = 2000
# RedNet152 makes 522. Each takes some 2 KB. A Sequential calls its layers again for every layer
# that is added: 10,000 times for 140 layers.
MOST_CALLS = 10_000
# Variables that a file leaves out, as those of LoRA, are at most as large as those it holds, but
# for these: 16 MiB of float32.
SPARE = 2**22
# By thread: what counts the objects that are made in it.
_counts: dict[int, "_Count"] = {}
_originals: list[Callable[[], None]] = []
_patching = threading.Lock()


def outline(build: Callable[[], Built], stored: float = math.inf) -> Built:
    """What a function builds, its variables without values.

    The function runs in a thread of its own, traced by the backend instead of computed, so that
    tensors take no memory either: Keras keeps by thread which variables still wait for values, so
    that nothing of them is left when the thread ends.

    Args:
        build: A function without arguments.
        stored: How many numbers there are for the variables. With twice as many variables, and
            four million more, or with more than 2,000 layers or 10,000 calls of layers, those that
            end up in no model included, the function is stopped; unless given, variables may have
            any size.

    Returns:
        What it returns. Of its variables only names, types and shapes can be asked.

    Raises:
        ValueError: Too many variables, layers or calls of layers.
        Exception: Whatever the function raises.

    Example:

    >>> import involution
    >>> from involution.utils.abstract_build import outline
    >>> outline(lambda: involution.models.cnn(classes=10**12)).count_params()
    65000000318528
    """

    def within():
        with _counted(_Count(stored)), keras.StatelessScope(initialize_variables=False):
            return _traced(build)

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(within).result()


class _Count:
    """Raises when a thread has more layers, calls of layers or variables than there may be."""

    def __init__(self, stored):
        self.stored = stored
        self.layers = self.calls = self.numbers = 0

    def layer(self, _):
        self.layers += 1
        if self.layers > MOST_LAYERS:
            raise ValueError(f"more than {MOST_LAYERS:,} layers")

    def call(self, _):
        self.calls += 1
        if self.calls > MOST_CALLS:
            raise ValueError(f"more than {MOST_CALLS:,} calls of layers")

    def variable(self, made):
        self.numbers += math.prod(made.shape)
        if self.numbers > 2 * self.stored + SPARE:
            raise ValueError(
                f"variables of {self.numbers:,} numbers or more, where {self.stored:,} are stored"
            )


@contextlib.contextmanager
def _counted(count):
    """Within the block the layers and variables that this thread makes are counted.

    Not those of the model that results: layers that it does not use take memory too.
    """
    thread = threading.get_ident()
    with _patching:
        if not _counts:
            _originals[:] = [
                _watch(keras.Operation, "__init__", "layer"),
                _watch(keras.Operation, "__call__", "call"),
                _watch(keras.Variable, "__init__", "variable"),
            ]
        _counts[thread] = count
    try:
        yield
    finally:
        with _patching:
            del _counts[thread]
            if not _counts:
                while _originals:
                    _originals.pop()()


def _watch(kind, method, counted) -> Callable[[], None]:
    """Has calls of a class's method counted; returns what ends that."""
    own, original = vars(kind).get(method), getattr(kind, method)

    def watched(self, *arguments, **named):
        result = original(self, *arguments, **named)
        if (count := _counts.get(threading.get_ident())) is not None:
            getattr(count, counted)(self)
        return result

    def end():
        if own is None:
            delattr(kind, method)
        else:
            setattr(kind, method, own)

    # Keras asks constructors for their arguments.
    vars(watched)["__signature__"] = inspect.signature(original)
    setattr(kind, method, watched)
    return end


def _traced(build):
    """What a function returns, its operations noted by the backend and not carried out."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        found = []
        jax.eval_shape(lambda: found.append(build()))
        return found[0]
    if backend == "tensorflow":
        import tensorflow

        with tensorflow.Graph().as_default():
            return build()
    with keras.device("meta"):
        return build()
