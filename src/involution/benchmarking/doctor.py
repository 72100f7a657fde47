"""Backends, devices, packages, and whether implementations agree: ``involution doctor``."""

import dataclasses
import importlib
import os
import platform
from collections.abc import Iterator
from importlib import metadata

import keras
import numpy as np

from involution import backend, ops
from involution.ops.cases import CASES
from involution.ops.native import library
from involution.utils.comparison import relative_error
from involution.utils.environment import versions

# Maximum relative error in float32, for sums of about a hundred terms.
TOLERANCE = 1e-5
# Optional packages: the extra that installs each, and what for.
EXTRAS = {
    "matplotlib": ("compare", "figures"),
    "jinja2": ("compare", "reports"),
    "scikit-learn": ("compare", "the digits"),
    "optuna": ("sweep", "sweeps"),
    "gradio": ("demo", "the web demo"),
    "onnx": ("export", "ONNX files"),
    "onnxruntime": ("export", "running ONNX files"),
}
# The converter to ONNX of each backend.
CONVERTERS = {
    "tensorflow": ("tf2onnx", "export"),
    "jax": ("jax2onnx", "export-jax"),
    "torch": ("onnxscript", "export"),
}
# Implementations that are several times as fast as the others.
COMPILED = {"native", "triton"}
# The case that is checked by default: a layer of RedNet's first stage.
CASE = next(case for case in CASES if case.name == "red1")


def lines(all_cases=False) -> Iterator[tuple[str, bool]]:
    """Lines to print, each with whether its check passed; the last one is the verdict.

    Args:
        all_cases: Whether to compare all implementations on all cases, compiled as in a model, and
            to give the reasons why others are unavailable; by default those that are available are
            compared on one case, uncompiled.
    """
    yield _line("machine", f"{platform.platform()}, {os.cpu_count()} CPUs"), True
    others = {n: v for n, v in versions().items() if n.split("-")[0] not in backend.BACKENDS}
    yield _line("versions", ", ".join(f"{n} {v}" for n, v in others.items())), True
    for name in backend.BACKENDS:
        yield _line(name, _backend(name)), True
    yield _line("GPU", ", ".join(_gpus()) or f"none that {keras.config.backend()} can use"), True
    _, core_reason = library.core()
    yield _line("native core", core_reason or f"{_target()}, of {_targets()} here"), True
    for package, (extra, use) in _packages().items():
        how = f"not installed: pip install 'involution[{extra}]'"
        yield _line(package, f"{_version(package) or how} ({use})"), True
    if all_cases:
        yield "implementations by case, with the maximum relative error against `reference`:", True
        checks = (check for case in CASES for check in _compiled(case.small()))
        checked = f"{len(CASES)} cases, compiled"
    else:
        yield "maximum relative error against `reference`, on one case:", True
        # The reason why there is no native core matters; that of others is their design.
        checks = (c for c in _eager(CASE.small()) if c.reason is None or c.name == "native")
        checked = "one case; --all: all cases"
    wrong, selected = set(), set()
    for check in checks:
        if not check.ok:
            wrong.add(check.name)
        if check.selected:
            selected.add(check.name)
        yield check.line(), check.ok
    if wrong:
        yield _line("verdict", f"WRONG results: {', '.join(sorted(wrong))}; please report"), False
        return
    fast = bool(selected & COMPILED)
    result = "OK: results agree" if fast else "OK, but slow without the native core"
    yield _line("verdict", f"{result} ({checked})"), True


def _line(name, text):
    return f"{name + ':':13} {text}"


def _version(package) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _backend(name) -> str:
    if name not in backend.installed():
        return f"not installed: {backend.INSTALL[name]}"
    version = versions().get(name) or versions().get(f"{name}-cpu") or "installed"
    return f"{version} (in use)" if name == keras.config.backend() else version


def _gpus() -> list[str]:
    """Names of the GPUs that the backend can use."""
    name = keras.config.backend()
    framework = importlib.import_module(name)
    if name == "tensorflow":
        return [device.name for device in framework.config.list_physical_devices("GPU")]
    if name == "jax":
        return [str(device) for device in framework.devices() if device.platform != "cpu"]
    if name == "torch" and framework.cuda.is_available():
        count = framework.cuda.device_count()
        return [framework.cuda.get_device_name(index) for index in range(count)]
    return []


def _target() -> str:
    """The instruction set that the native core uses."""
    return os.environ.get("INVOLUTION_INSTRUCTIONS") or library.targets()[-1]


def _targets() -> str:
    return ", ".join(library.targets())


def _packages() -> dict[str, tuple[str, str]]:
    converter = CONVERTERS.get(keras.config.backend())
    if converter is None:
        return EXTRAS
    name, extra = converter
    return {**EXTRAS, name: (extra, "to ONNX")}


# --- Comparison of implementations


@dataclasses.dataclass(frozen=True)
class Check:
    """One implementation on one case.

    Attributes:
        case: Name of the case.
        name: Name of the implementation.
        reason: Why the implementation is unavailable; None: it is available.
        error: Its maximum relative error.
        selected: What it is selected for by default, in parentheses; empty: it is not.
    """

    case: str
    name: str
    reason: str | None
    error: float = 0.0
    selected: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= TOLERANCE  # False for NaN

    def line(self) -> str:
        label = f"  {self.case:5} {self.name:10}"
        if self.reason is not None:
            return f"{label} unavailable: {self.reason}"
        wrong = "" if self.ok else f", WRONG: exceeds {TOLERANCE:.0e}"
        return f"{label} error {self.error:.1e}{wrong}{self.selected}"


def _arrays(case) -> list[np.ndarray]:
    """Input, kernel, hidden features, weight and bias of a case."""
    rng = np.random.default_rng(0)
    shapes = (case.x_shape, case.kernel_shape, *case.generator_shapes)
    return [rng.standard_normal(shape).astype("float32") for shape in shapes]


def _eager(case) -> Iterator[Check]:
    x, kernel, hidden, weight, bias = map(keras.ops.convert_to_tensor, _arrays(case))

    def apply(name):
        y = ops.involution(x, kernel, implementation=name, **case.arguments)
        return keras.ops.convert_to_numpy(y)

    def generate_and_apply(name):
        arguments = {"implementation": name, **case.arguments}
        y = ops.fused_involution(x, hidden, weight, bias, **arguments)
        return keras.ops.convert_to_numpy(y)

    yield from _checks(case, x, kernel, apply, generate_and_apply)


def _compiled(case) -> Iterator[Check]:
    x, kernel, hidden, weight, bias = _arrays(case)
    inputs = [keras.Input(array.shape[1:]) for array in (x, kernel, hidden)]

    def apply(name):
        # A model, which Keras compiles on backends with a compiler.
        y = ops.involution(inputs[0], inputs[1], implementation=name, **case.arguments)
        return keras.Model(inputs[:2], y).predict([x, kernel], verbose=0)

    def generate_and_apply(name):
        arguments = {"implementation": name, **case.arguments}
        y = ops.fused_involution(inputs[0], inputs[2], weight, bias, **arguments)
        return keras.Model([inputs[0], inputs[2]], y).predict([x, hidden], verbose=0)

    yield from _checks(case, inputs[0], inputs[1], apply, generate_and_apply)


def _checks(case, x, kernel, apply, generate_and_apply) -> Iterator[Check]:
    """Compares functions of the name of an implementation with their values for `reference`."""
    hidden = case.generator_shapes[1][0]
    candidates = ops.implementations(x, kernel, **case.arguments)
    yield from _compare(case, apply, candidates, candidates, " (selected)")
    candidates = ops.implementations(x, None, hidden_channels=hidden, **case.arguments)
    fused = [(name, reason) for name, reason in candidates if name == "fused"]
    selected = " (selected for generated kernels)"
    yield from _compare(case, generate_and_apply, candidates, fused, selected)


def _compare(case, run, candidates, shown, selected) -> Iterator[Check]:
    fastest = next(name for name, reason in candidates if reason is None)
    expected = run("reference")
    for name, reason in shown:
        if reason is not None:
            yield Check(case.name, name, reason)
            continue
        error = relative_error(run(name), expected)
        yield Check(case.name, name, None, error, selected if name == fastest else "")
