"""Installed backends, available implementations and their errors: ``involution doctor``."""

import os
import platform
from collections.abc import Iterator
from importlib import metadata

import keras
import numpy as np

from involution import backend, ops
from involution.ops.cases import CASES
from involution.utils.environment import versions

# Maximum relative error in float32, for sums of about a hundred terms.
TOLERANCE = 1e-5
EXTRAS = {"matplotlib": "figures", "jinja2": "reports", "scikit-learn": "digits"}


def lines() -> Iterator[tuple[str, bool]]:
    """Lines to print, each with whether its check passed."""
    yield f"machine: {platform.platform()}, {os.cpu_count()} CPUs", True
    yield "versions: " + ", ".join(f"{n} {v}" for n, v in versions().items()), True
    for name in backend.BACKENDS:
        installed = name in backend.installed()
        status = "installed" if installed else f"not installed: {backend.INSTALL[name]}"
        yield f"backend {name}: {status}", True
    yield f"backend in use: {keras.config.backend()}", True
    for package, use in EXTRAS.items():
        try:
            yield f"{package} ({use}): {metadata.version(package)}", True
        except metadata.PackageNotFoundError:
            yield f"{package} ({use}): not installed: pip install 'involution[compare]'", True
    yield "implementations by case, with the maximum relative error against `reference`:", True
    for case in CASES:
        yield from _case(case.small())


def _case(case):
    rng = np.random.default_rng(0)
    x, kernel, hidden, weight, bias = (
        rng.standard_normal(shape).astype("float32")
        for shape in (case.x_shape, case.kernel_shape, *case.generator_shapes)
    )
    inputs = [keras.Input(array.shape[1:]) for array in (x, kernel, hidden)]

    def apply(name):
        # A model, which Keras compiles on backends with a compiler.
        y = ops.involution(inputs[0], inputs[1], implementation=name, **case.arguments)
        return keras.Model(inputs[:2], y).predict([x, kernel], verbose=0)

    def generate_and_apply(name):
        arguments = {"implementation": name, **case.arguments}
        y = ops.fused_involution(inputs[0], inputs[2], weight, bias, **arguments)
        return keras.Model([inputs[0], inputs[2]], y).predict([x, hidden], verbose=0)

    candidates = ops.implementations(*inputs[:2], **case.arguments)
    yield from _compare(case, apply, candidates, candidates)
    candidates = ops.implementations(inputs[0], None, hidden_channels=len(weight), **case.arguments)
    fused = [(name, reason) for name, reason in candidates if name == "fused"]
    yield from _compare(case, generate_and_apply, candidates, fused, " for generated kernels")


def _compare(case, run, candidates, shown, condition=""):
    selected = next(name for name, reason in candidates if reason is None)
    expected = run("reference")
    for name, reason in shown:
        label = f"  {case.name:5} {name:10}"
        if reason is not None:
            yield f"{label} unavailable: {reason}", True
            continue
        error = np.abs(run(name) - expected).max() / np.abs(expected).max()
        ok = bool(error <= TOLERANCE)
        failure = "" if ok else f", WRONG: exceeds {TOLERANCE:.0e}"
        selection = f" (selected{condition})" if name == selected else ""
        yield f"{label} error {error:.1e}{failure}{selection}", ok
