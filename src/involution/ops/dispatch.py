"""The implementations of the operator, and the choice of one for each call.

An implementation is a module with

    unsupported_reason(problem)  why it cannot compute a problem, or None
    apply(x, kernel, problem)    the output
    kernel_grad(x, dy, problem)  the gradient of the kernel
    input_grad(kernel, dy, x_sizes, problem)  the gradient of the input, of these spatial sizes

and, optionally, ``deprioritize_reason(problem)``, why the next one is faster, or None; and
``apply_generated(x, hidden, weight, bias, problem)``, the output with the kernels ``hidden @ weight
+ bias``, for channels_last; ``fused`` has only the latter; and ``CHECKS_SHAPES = True`` where
it compares sizes that are known only when the program runs.
"""

import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

from involution.ops import (
    banded,
    fused,
    native,
    onnxruntime,
    pallas,
    reference,
    rows,
    taps,
    triton,
)
from involution.ops.problem import Problem
from involution.ops.validation import CHANNELS_LAST

IMPLEMENTATIONS: dict[str, ModuleType] = {
    "triton": triton,
    "native": native,
    "pallas": pallas,
    "taps": taps,
    "reference": reference,
    "rows": rows,
    "banded": banded,
    "fused": fused,
    "onnxruntime": onnxruntime,
}
# In order of preference: the first that supports a problem is selected. ``fused`` precedes them
# where kernels are generated; ``pallas``, and those of ``PORTABLE`` before ``reference``, are
# selected by name only.
PREFERENCE = ("triton", "native", "taps", "reference")
# ``"portable"``, for exported programs: standard operations only.
PORTABLE = ("banded", "rows", "reference")


class Selection(NamedTuple):
    """The implementation of one call, and the problem it computes."""

    name: str
    problem: Problem

    @property
    def implementation(self) -> ModuleType:
        return IMPLEMENTATIONS[self.name]

    @property
    def checks_shapes(self) -> bool:
        """Whether ``apply`` compares sizes that are known only when the program runs."""
        return getattr(self.implementation, "CHECKS_SHAPES", False)

    @property
    def generates(self) -> bool:
        """Whether it generates kernels itself, from hidden channels, a weight and a bias."""
        last = self.problem.window.data_format == CHANNELS_LAST
        return last and hasattr(self.implementation, "apply_generated")


class _Override(threading.local):
    """The setting of ``force_implementation`` in this thread. Not a context variable, which
    torch.compile cannot trace."""

    names: tuple[str, ...] | None = None


_override = _Override()


@contextlib.contextmanager
def force_implementation(implementation: str | Sequence[str] | None) -> Iterator[None]:
    """Context manager in which every involution of this thread uses the given implementation.

    It overrides the argument ``implementation`` of functions and layers. The implementation is
    selected when Python code runs: programs traced by ``jax.jit``, ``tf.function`` or
    ``torch.compile`` keep the implementation they were traced with, before, inside and after the
    block. To change it, trace again, for example with a new function. For programs that run without
    this package: ``"portable"``. ``use`` is a deprecated alias.

    Args:
        implementation: As for ``involution``: a name, or a sequence of names tried in order.

    Example:

    >>> import numpy as np, involution
    >>> with involution.ops.force_implementation("reference"):
    ...     y = involution.ops.involution(np.ones((1, 4, 6)), np.ones((1, 4, 3, 1)), 3)
    """
    before, _override.names = _override.names, standardize_implementation(implementation)
    try:
        yield
    finally:
        _override.names = before


use = force_implementation


def select(problem: Problem, implementation=None) -> Selection:
    """The implementation of a call; ValueError with the reasons if none supports it."""
    names = _override.names or (
        preferred(problem) if implementation is None else standardize_implementation(implementation)
    )
    reasons = {}
    for name in names:
        reasons[name] = IMPLEMENTATIONS[name].unsupported_reason(problem)
        if reasons[name] is None:
            return Selection(name, problem)
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    arguments = problem.window.arguments().items()
    raise ValueError(
        f"`implementation` must support the call ({why}). Received: "
        f"x.shape={problem.x_shape}, x.dtype={problem.dtype}, "
        + ", ".join(f"{name}={value!r}" for name, value in arguments)
    )


def preferred(problem: Problem) -> list[str]:
    """Names of implementations, the fastest first."""
    if problem.framework == "torch" and _is_exporting_onnx():
        return list(PORTABLE)
    names = list(PREFERENCE)
    for i, name in enumerate(PREFERENCE[:-1]):
        deprioritize_reason = getattr(IMPLEMENTATIONS[name], "deprioritize_reason", None)
        if deprioritize_reason is not None and deprioritize_reason(problem) is not None:
            names[i], names[i + 1] = names[i + 1], names[i]
    if problem.hidden_channels is None:
        return names
    if fused.deprioritize_reason(problem) is None:
        return ["fused", *names]
    return [*names, "fused"]


def _is_exporting_onnx() -> bool:
    torch = sys.modules["torch"]
    return torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()


def standardize_implementation(implementation) -> tuple[str, ...]:
    """The names to be tried in order; ValueError unless all are known."""
    if implementation == "portable":
        return PORTABLE
    names = (implementation,) if isinstance(implementation, str) else implementation
    if (
        not isinstance(names, Sequence)
        or not names
        or any(name not in IMPLEMENTATIONS for name in names)
    ):
        raise ValueError(
            f"`implementation` must be one of {list(IMPLEMENTATIONS)}, a sequence of them, or "
            f"'portable'. Received: implementation={implementation!r}"
        )
    return tuple(names)
