"""Builds models with shapes but no values, to check a file before memory is allocated."""

import concurrent.futures
import contextlib
import inspect
import math
import threading
from collections.abc import Callable
from typing import TypeVar

import keras

Built = TypeVar("Built")

# RedNet152 has 728, including those inside its involutions. A layer takes about 50 KB, and a chain
# of layers takes time quadratic in its length.
MAX_LAYERS = 2000
# RedNet152 has 522. A call takes about 2 KB. A Sequential calls all its layers again for each layer
# added: 10,000 times for 140 layers.
MAX_CALLS = 10_000
# Variables that are not stored, such as those of LoRA, are at most as large as the stored ones plus
# this number of elements (16 MiB in float32).
EXTRA_ELEMENTS = 2**22
# By thread identifier.
_budgets: dict[int, "_Budget"] = {}
_restorers: list[Callable[[], None]] = []
_patching = threading.Lock()


def build_abstract(build: Callable[[], Built], stored: float = math.inf) -> Built:
    """Calls a function that builds a model, without values for its variables (compare
    ``jax.eval_shape``).

    The backend traces the function instead of executing it, so that tensors take no memory. The
    function runs in a separate thread: Keras records uninitialized variables by thread, and the
    record ends with the thread.

    Args:
        build: A function without arguments.
        stored: Number of elements stored for the variables. The build is stopped at more than
            twice as many elements plus four million. The default sets no limit. Independently, at
            most 2,000 layers and 10,000 layer calls are allowed, including those outside of the
            resulting model.

    Returns:
        The function's result. Only names, dtypes and shapes of its variables may be used.

    Raises:
        ValueError: Too many variables, layers or layer calls.
        Exception: Any that the function raises.

    Example:

    >>> import involution
    >>> from involution.utils.abstract_build import build_abstract
    >>> build_abstract(lambda: involution.models.cnn(classes=10**12)).count_params()
    65000000318528
    """

    def run():
        with _limited(_Budget(stored)), keras.StatelessScope(initialize_variables=False):
            return _traced(build)

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


class _Budget:
    """Limits the layers, layer calls and elements of variables that a thread creates."""

    def __init__(self, stored):
        self.stored = stored
        self.layers = self.calls = self.elements = 0

    def layer(self, _):
        self.layers += 1
        if self.layers > MAX_LAYERS:
            raise ValueError(f"more than {MAX_LAYERS:,} layers")

    def call(self, _):
        self.calls += 1
        if self.calls > MAX_CALLS:
            raise ValueError(f"more than {MAX_CALLS:,} layer calls")

    def variable(self, variable):
        self.elements += math.prod(variable.shape)
        if self.elements > 2 * self.stored + EXTRA_ELEMENTS:
            raise ValueError(
                f"variables of at least {self.elements:,} elements, of which {self.stored:,} are "
                "stored"
            )


@contextlib.contextmanager
def _limited(budget):
    """Applies the budget to the layers, layer calls and variables of this thread in the block.

    Counting those of the resulting model would miss unused layers, which take memory too.
    """
    thread = threading.get_ident()
    with _patching:
        if not _budgets:
            _restorers[:] = [
                _hook(keras.Operation, "__init__", "layer"),
                _hook(keras.Operation, "__call__", "call"),
                _hook(keras.Variable, "__init__", "variable"),
            ]
        _budgets[thread] = budget
    try:
        yield
    finally:
        with _patching:
            del _budgets[thread]
            if not _budgets:
                while _restorers:
                    _restorers.pop()()


def _hook(cls, method, counter) -> Callable[[], None]:
    """Counts calls of a method; returns a function that restores the method."""
    own, original = vars(cls).get(method), getattr(cls, method)

    def counted(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if (budget := _budgets.get(threading.get_ident())) is not None:
            getattr(budget, counter)(self)
        return result

    def restore():
        if own is None:
            delattr(cls, method)
        else:
            setattr(cls, method, own)

    # Keras inspects the signature of constructors.
    vars(counted)["__signature__"] = inspect.signature(original)
    setattr(cls, method, counted)
    return restore


def _traced(build):
    """The result of a function whose operations the backend traces and does not execute."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        results = []
        jax.eval_shape(lambda: results.append(build()))
        return results[0]
    if backend == "tensorflow":
        import tensorflow

        with tensorflow.Graph().as_default():
            return build()
    with keras.device("meta"):
        return build()
