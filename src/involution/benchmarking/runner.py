"""Speed and memory of the operator by case and implementation: ``involution bench``.

All candidates of a case take turns, so that what else the machine does hits them alike; figures are
medians. Beside them stand the convolutions that involution replaces, and the least time that the
machine allows: what it takes to move the bytes, or to do the multiplications and additions, as
measured in the same run.
"""

import dataclasses
import datetime
import functools
import math
import multiprocessing
import os
import pathlib
import statistics
from collections.abc import Callable, Iterator, Sequence

import keras
import numpy as np

from involution import ops
from involution.benchmarking import baselines, devices
from involution.benchmarking.devices import DEVICES
from involution.benchmarking.timed_program import program, tensors
from involution.ops import autodiff, taps
from involution.ops.cases import CASES, Case
from involution.ops.dispatch import IMPLEMENTATIONS, PREFERENCE
from involution.ops.problem import problem_of
from involution.ops.tensor_utils import spatial_shape
from involution.training.experiment import versions
from involution.utils.atomic_files import csv_text
from involution.utils.errors import InputError

PATCHES = "patches"
# PyTorch's: the paper's formula for CUDA devices, and what its compiler makes of `taps`.
PER_NUMBER, COMPILED_TAPS = "per-number", "compiled-taps"
# Kernels from hidden features, and their use: stored between, or not.
TWO_STEPS = "two-steps"
GENERATING = {TWO_STEPS: PREFERENCE, "fused": "fused"}
CANDIDATES = (
    *dict(IMPLEMENTATIONS),
    *GENERATING,
    PATCHES,
    PER_NUMBER,
    COMPILED_TAPS,
    *baselines.CONVOLUTIONS,
)
# What is measured by device, unless told.
USUAL = {
    "cpu": ("native", "taps", "reference", PATCHES, *baselines.CONVOLUTIONS),
    "cuda": (
        *("triton", "taps", "reference", PATCHES, PER_NUMBER, COMPILED_TAPS),
        *baselines.CONVOLUTIONS,
    ),
}
PASSES = {"forward": False, "forward+backward": True}
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Bytes that few caches hold.
LARGE = 2**28
# A gigabyte in float32, and as much again for each gradient.
MOST_PATCHES = 2**28
# Largest difference from `reference` in float32, relative to the largest value.
TOLERANCE = {"float64": 1e-5, "float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure, and how long."""

    cases: tuple[str, ...] = tuple(case.name for case in CASES)
    candidates: tuple[str, ...] = CANDIDATES
    dtypes: tuple[str, ...] = ("float32",)
    calls: int = 10
    seconds: float = 2.0
    memory: bool = False
    device: str = "cpu"
    batch: int | None = None  # instead of the cases' own


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure. Times are in milliseconds for one call, memory in megabytes (10^6 bytes)."""

    case: str
    candidate: str
    dtype: str
    passes: str
    batch: int
    median_ms: float
    spread_ms: float  # half of the distance between the quartiles
    runs: int
    calls: int
    limit_ms: float | None  # the least that this machine allows
    times_limit: float | None
    peak_mb: float | None  # with arguments, results and gradients
    tensors_mb: float | None  # arguments, results and gradients alone


def check(plan: Plan, output: pathlib.Path | None = None) -> None:
    """Raises InputError unless all names are known and the file can be written."""
    for option, names, known in (
        ("cases", plan.cases, [case.name for case in CASES]),
        ("candidates", plan.candidates, CANDIDATES),
        ("dtypes", plan.dtypes, DTYPES),
    ):
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise InputError(
                f"--{option} must be some of {','.join(known)}. Received: {','.join(names)}"
            )
    if plan.device not in DEVICES:
        raise InputError(f"--device must be one of {', '.join(DEVICES)}. Received: {plan.device}")
    reason = DEVICES[plan.device].refusal()
    if reason is not None:
        raise InputError(f"--device must be one to measure on: {reason}. Received: {plan.device}")
    if plan.batch is not None and plan.batch < 1:
        raise InputError(f"--batch must be at least 1. Received: {plan.batch}")
    if plan.calls < 1 or not plan.seconds > 0:
        raise InputError(
            "--calls must be at least 1 and --seconds above 0. "
            f"Received: {plan.calls}, {plan.seconds}"
        )
    if output is not None and (output.is_dir() or not os.access(output.absolute().parent, os.W_OK)):
        raise InputError(
            f"--output must be a file in a folder that can be written. Received: {output}"
        )


def run(plan: Plan, say=lambda line: None) -> Iterator[Row]:
    """Measures, and yields each figure. ``say`` is told what was left out, and why."""
    for name in plan.cases:
        case = next(case for case in CASES if case.name == name)
        if plan.batch is not None:
            case = dataclasses.replace(case, batch=plan.batch)
        for dtype in plan.dtypes:
            # keras.device ends before each yield: the caller's code must not run inside it.
            with keras.device(plan.device):
                candidates = dict(_candidates(case, dtype, plan, say))
            for passes in PASSES:
                with keras.device(plan.device):
                    rows = list(_rows(case, dtype, passes, candidates, plan, say))
                yield from rows


def _candidates(case, dtype, plan, say):
    """Those that can run, each equal to ``reference``."""
    for name in plan.candidates:
        try:
            tried = candidate(name, case, dtype)
        except NotImplementedError as reason:
            say(f"{case.name} {name} {dtype}: left out: {reason}")
            continue
        wrong = 0.0 if tried.reference is None else difference(tried, dtype)
        if wrong > TOLERANCE[dtype]:
            raise RuntimeError(
                f"{case.name} {name} {dtype} is wrong, so it has no speed: its largest "
                f"difference from `reference` is {wrong:.1e}"
            )
        yield name, tried


def _rows(case, dtype, passes, candidates, plan, say):
    backward = PASSES[passes]
    device = DEVICES[plan.device]
    ready = {}
    for name, tried in candidates.items():
        try:
            single = device.stopwatch(tried.program(backward))
            single()  # compiles
            # Very slow ones once a run: their way to the framework does not matter.
            calls = plan.calls if single() < 0.5 else 1
            repeated = device.stopwatch(tried.program(backward, calls)) if calls > 1 else single
        except devices.NotRecordedError as reason:
            say(f"{case.name} {name} {dtype} {passes}: left out: {reason}")
            continue
        ready[name] = repeated, calls
    times = measure({name: watch for name, (watch, _) in ready.items()}, plan.seconds)
    for name, (_, calls) in ready.items():
        each = [t / calls * 1e3 for t in times[name]]
        median = statistics.median(each)
        quartiles = statistics.quantiles(each, n=4) if len(each) > 2 else [median] * 3
        ours = name not in baselines.CONVOLUTIONS
        limit = least_ms(case, dtype, backward, device, generating=name in GENERATING)
        yield Row(
            case=case.name,
            candidate=name,
            dtype=dtype,
            passes=passes,
            batch=case.batch,
            median_ms=median,
            spread_ms=(quartiles[2] - quartiles[0]) / 2,
            runs=len(each),
            calls=calls,
            limit_ms=limit if ours else None,
            times_limit=median / limit if ours else None,
            peak_mb=_peak_mb(case, name, dtype, backward, device) if plan.memory else None,
            tensors_mb=tensor_bytes(case, dtype, backward, name) / 1e6 if ours else None,
        )


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is measured: a function of tensors, with its arguments and its output's gradient."""

    function: Callable
    arguments: list
    cotangent: object
    reference: Callable | None  # the same by `reference`; None for what is no involution

    def program(self, backward: bool, calls: int = 1):
        return program(self.function, self.arguments, self.cotangent if backward else None, calls)


def candidate(name: str, case: Case, dtype: str) -> Candidate:
    """Raises NotImplementedError, with the reason, for what cannot run."""
    random = np.random.default_rng(0)
    named = case.arguments
    y_shape = (case.batch, *case.kernel_shape[1:-2], case.channels)
    shapes = [case.x_shape, case.kernel_shape]
    operation: Callable = ops.involution
    if name in baselines.CONVOLUTIONS:
        function, arguments = baselines.CONVOLUTIONS[name](case, random, dtype)
    elif name in GENERATING:
        operation = ops.fused_involution
        shapes = [case.x_shape, *case.generator_shapes]
        arguments = tensors([random.standard_normal(s) for s in shapes], dtype)
        if name == "fused":
            problem = problem_of(case.window, arguments[0], case.generator_shapes[1][0])
            _refuse(IMPLEMENTATIONS[name].unsupported_reason(problem))
        function = functools.partial(operation, implementation=GENERATING[name], **named)
    else:
        if name == PER_NUMBER:
            function = _per_number(case, dtype)
            # It has channels first.
            named = named | {"data_format": "channels_first"}
            shapes = [_channels_first(shape, case) for shape in shapes]
            y_shape = _channels_first(y_shape, case)
        arguments = tensors([random.standard_normal(s) for s in shapes], dtype)
        if name == PATCHES:
            function = _patches(case)
        elif name == COMPILED_TAPS:
            function = _compiled_taps(case)
        elif name != PER_NUMBER:
            problem = problem_of(case.window, arguments[0])
            _refuse(IMPLEMENTATIONS[name].unsupported_reason(problem))
            function = functools.partial(operation, implementation=name, **named)
    if keras.backend.standardize_dtype(arguments[0].dtype) != dtype:
        raise NotImplementedError(f"{keras.config.backend()} makes no {dtype} here")
    reference = None
    if name not in baselines.CONVOLUTIONS:
        reference = functools.partial(operation, implementation="reference", **named)
    (cotangent,) = tensors([random.standard_normal(y_shape)], dtype)
    return Candidate(function, arguments, cotangent, reference)


def _refuse(reason):
    if reason is not None:
        raise NotImplementedError(reason)


def _channels_first(shape, case):
    last = 1 + len(case.sizes)
    return (shape[0], *shape[last:], *shape[1:last])


def _per_number(case, dtype):
    if keras.config.backend() != "torch":
        raise NotImplementedError("it is for PyTorch on CUDA devices")
    from involution.benchmarking import paper_cuda

    _refuse(paper_cuda.unsupported_reason(case, dtype))
    return functools.partial(paper_cuda.involution, case=case)


def _compiled_taps(case):
    if keras.config.backend() != "torch":
        raise NotImplementedError("`taps` is compiled by XLA as it is")
    import torch

    # Each case anew: PyTorch compiles but a few sizes of what it takes for one function.
    torch.compiler.reset()
    call = autodiff.differentiable(torch.compile(taps.compute, fullgraph=True))

    def apply(x, kernel):
        g = problem_of(case.window, x).window
        return call(autodiff.FORWARD, g, spatial_shape(x, g), x, kernel)

    return apply


def _patches(case):
    if len(case.sizes) != 2:
        raise NotImplementedError("patches are for images")
    if math.prod(case.kernel_shape[:-1]) * case.channels > MOST_PATCHES:
        raise NotImplementedError(f"patches of more than {MOST_PATCHES} numbers fill the memory")
    if case.padding != "same" and (case.padding != "symmetric" or case.strides > 1):
        raise NotImplementedError("patches are padded as Keras does")
    names = "kernel_size", "strides", "dilation_rate", "groups", "group_layout"
    return functools.partial(baselines.patches, **{name: case.arguments[name] for name in names})


def difference(tried: Candidate, dtype) -> float:
    """The largest difference of output and gradients from those of ``reference`` in float32 or
    wider, relative to the largest value of each."""
    wide = "float64" if dtype == "float64" else "float32"
    arguments = [keras.ops.cast(a, wide) for a in tried.arguments]
    want = program(tried.reference, arguments, keras.ops.cast(tried.cotangent, wide))()
    have = tried.program(backward=True)()
    worst = 0.0
    for w, h in zip(want, have, strict=True):
        w, h = (np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(t, wide))) for t in (w, h))
        worst = max(worst, float(np.abs(h - w).max() / np.abs(w).max()))
    return worst if math.isfinite(worst) else math.inf


def measure(watches: dict[str, Callable[[], float]], seconds) -> dict[str, list[float]]:
    """Seconds of each run. They take turns until each had its time, or three runs."""
    times: dict[str, list[float]] = {name: [] for name in watches}
    for watch in watches.values():
        watch()
    while True:
        waiting = [n for n, t in times.items() if len(t) < 3 or sum(t) < seconds]
        if not waiting:
            return times
        for name in waiting:
            times[name].append(watches[name]())


# --- The least time that the machine allows


def _sizes(case, dtype, generating):
    """Bytes of the arguments and of y."""
    item = {"float64": 8, "float32": 4}.get(dtype, 2)
    y = (case.batch, *case.kernel_shape[1:-2], case.channels)
    kernel = case.generator_shapes if generating else [case.kernel_shape]
    return [item * math.prod(shape) for shape in (case.x_shape, *kernel, y)]


def tensor_bytes(case, dtype, backward, name) -> int:
    """Of arguments and results, and of kernels that are stored between; with gradients, of those of
    all of these too."""
    total = sum(_sizes(case, dtype, name in GENERATING))
    if name == TWO_STEPS:
        total += _sizes(case, dtype, False)[1]
    return total * (2 if backward else 1)


def least_ms(case, dtype, backward, device, generating=False) -> float:
    """Moving every tensor that a pass reads or writes once, or the multiplications and additions:
    whichever takes longer. An output, an input gradient and a kernel gradient, or that of what
    generates the kernels, each touch one tensor of every kind and do as many operations."""
    total = sum(_sizes(case, dtype, generating))
    # Of half types too sums are in float32: only bytes are fewer. Products of matrices may be fast.
    sums = "float64" if dtype == "float64" else "float32"
    computing = 2 * case.batch * case.channels * _taps_inside(case) / device.peak(sums)
    if generating:
        operations = 2 * math.prod(case.kernel_shape) * case.generator_shapes[1][0]
        computing += operations / device.peak(dtype)
    seconds = max(total / device.copy_bandwidth(total), computing)
    return 1e3 * seconds * (3 if backward else 1)


def _taps_inside(case) -> int:
    """Of one sample's windows: those that meet the input."""
    pads = case.window.clamp_steps(case.sizes).pads(case.sizes)
    total = 1
    for n, (before, _) in zip(case.sizes, pads, strict=True):
        positions = range(-(-n // case.strides))
        reached = (
            p * case.strides - before + k * case.dilation_rate
            for p in positions
            for k in range(case.kernel_size)
        )
        total *= sum(0 <= q < n for q in reached)
    return total


# --- Memory


def _peak_mb(case, name, dtype, backward, device) -> float | None:
    """Megabytes of one call: of its arguments, its results, and all between."""
    told = case, name, dtype, backward, device.name
    if not device.memory_needs_a_process:
        peak = _peak_bytes(*told)
    else:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak = pool.apply(_peak_bytes, told)
    return None if peak is None else peak / 1e6


def _peak_bytes(case, name, dtype, backward, device) -> int | None:
    def prepare(of):
        return candidate(name, of, dtype).program(backward)

    with keras.device(device):
        # A small call first loads what it needs.
        small, given = (functools.partial(prepare, of) for of in (case.small(), case))
        return DEVICES[device].peak_bytes(lambda: small()(), given)


# --- What is told


def heading(plan: Plan) -> Iterator[str]:
    """What the lines of figures need to be understood."""
    device = DEVICES[plan.device]
    yield f"{keras.config.backend()} on {device.said()}"
    with keras.device(plan.device):
        copies, products = device.copy_bandwidth(LARGE) / 1e9, device.peak("float32") / 1e9
    yield f"copies {copies:.1f} GB/s, read and written; float32 {products:.0f} GFLOP/s"
    yield "ms: median of one call; +-: half the distance between the quartiles;"
    yield "limit: the least that this machine allows; x limit: how far from it; MB: peak memory"
    yield (
        f"{'case':6}{'candidate':12}{'type':10}{'passes':18}{'ms':>10}{'+-':>8}{'limit':>9}"
        f"{'x limit':>9}{'MB':>9}"
    )


def line(row: Row) -> str:
    def number(value, width, digits):
        return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"

    return (
        f"{row.case:6}{row.candidate:12}{row.dtype:10}{row.passes:18}"
        f"{number(row.median_ms, 10, 3)}{number(row.spread_ms, 8, 3)}{number(row.limit_ms, 9, 3)}"
        f"{number(row.times_limit, 9, 2)}{number(row.peak_mb, 9, 1)}"
    )


def to_csv(rows: Sequence[Row], device: str = "cpu") -> str:
    """All figures, as ``with_setting`` writes them."""
    names = [field.name for field in dataclasses.fields(Row)]
    figures = [{n: _rounded(v) for n, v in dataclasses.asdict(row).items()} for row in rows]
    return with_setting(figures, names, device)


def with_setting(rows: Sequence[dict], names: Sequence[str], device: str = "cpu") -> str:
    """CSV of rows with these columns, each with the backend, the device, versions and the day."""
    setting = {
        "backend": keras.config.backend(),
        "device": DEVICES[device].said(),
        "versions": " ".join(f"{n}={v}" for n, v in versions().items()),
        "date": datetime.date.today().isoformat(),
    }
    return csv_text([*names, *setting], [{**row, **setting} for row in rows])


def _rounded(value):
    return f"{value:.6g}" if isinstance(value, float) else value
