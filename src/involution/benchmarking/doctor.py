"""What runs on this machine, what does not and why: ``involution doctor``."""

import os
import platform
from collections.abc import Iterator
from importlib import metadata

import keras
import numpy as np

from involution import backend, ops
from involution.ops.cases import CASES
from involution.utils.environment import versions

# In float32, relative to the largest value: sums of up to some hundred terms.
TOLERANCE = 1e-5
EXTRAS = {"matplotlib": "figures", "jinja2": "reports", "scikit-learn": "digits"}


def lines() -> Iterator[tuple[str, bool]]:
    """Lines for people, each with whether all is well there."""
    yield f"machine: {platform.platform()}, {os.cpu_count()} processors", True
    yield "versions: " + ", ".join(f"{n} {v}" for n, v in versions().items()), True
    for name in backend.BACKENDS:
        there = name in backend.installed()
        yield f"backend {name}: {'installed' if there else 'no: ' + backend.INSTALL[name]}", True
    yield f"backend in use: {keras.config.backend()}", True
    for package, use in EXTRAS.items():
        try:
            yield f"{package} ({use}): {metadata.version(package)}", True
        except metadata.PackageNotFoundError:
            yield f"{package} ({use}): no: pip install 'involution[compare]'", True
    yield "implementations by case, with the largest difference from `reference`, relative:", True
    for case in CASES:
        yield from _case(case.small())


def _case(case):
    random = np.random.default_rng(0)
    x, kernel, hidden, weight, bias = (
        random.standard_normal(shape).astype("float32")
        for shape in (case.x_shape, case.kernel_shape, *case.generator_shapes)
    )
    inputs = [keras.Input(array.shape[1:]) for array in (x, kernel, hidden)]

    def given(name):
        # As a model, so that it is compiled where Keras compiles.
        y = ops.involution(inputs[0], inputs[1], implementation=name, **case.arguments)
        return keras.Model(inputs[:2], y).predict([x, kernel], verbose=0)

    def generated(name):
        chosen = {"implementation": name, **case.arguments}
        y = ops.fused_involution(inputs[0], inputs[2], weight, bias, **chosen)
        return keras.Model([inputs[0], inputs[2]], y).predict([x, hidden], verbose=0)

    possible = ops.implementations(*inputs[:2], **case.arguments)
    yield from _compared(case, given, possible, possible)
    possible = ops.implementations(inputs[0], None, hidden=len(weight), **case.arguments)
    own = [(name, reason) for name, reason in possible if name == "fused"]
    yield from _compared(case, generated, possible, own, " where kernels are generated")


def _compared(case, run, possible, shown, where=""):
    chosen = next(name for name, reason in possible if reason is None)
    truth = run("reference")
    for name, reason in shown:
        label = f"  {case.name:5} {name:10}"
        if reason is not None:
            yield f"{label} cannot run: {reason}", True
            continue
        error = np.abs(run(name) - truth).max() / np.abs(truth).max()
        fine = bool(error <= TOLERANCE)
        verdict = "" if fine else f", WRONG: above {TOLERANCE:.0e}"
        yield f"{label} error {error:.1e}{verdict}{f' (taken{where})' * (name == chosen)}", fine
