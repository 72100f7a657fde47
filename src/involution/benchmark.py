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
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np

from involution import memory, ops, yardsticks
from involution.errors import InputError
from involution.experiment import versions
from involution.files import csv_text
from involution.ops import native_library
from involution.ops.api import FUSED, IMPLEMENTATIONS
from involution.ops.cases import CASES, Case
from involution.ops.native_library import processors
from involution.ops.problem import make_generating_problem, make_problem
from involution.programs import program, tensors

PATCHES = "patches"
# Kernels from hidden features, and their use: stored between, or not.
TWO_STEPS = "two-steps"
GENERATING = {TWO_STEPS: tuple(dict(IMPLEMENTATIONS)), FUSED[0]: FUSED[0]}
CANDIDATES = (*dict(IMPLEMENTATIONS), *GENERATING, PATCHES, *yardsticks.CONVOLUTIONS)
PASSES = {"forward": False, "forward+backward": True}
DTYPES = ("float32", "bfloat16", "float16", "float64")
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


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure. Times are in milliseconds for one call, memory in megabytes (10^6 bytes)."""

    case: str
    candidate: str
    dtype: str
    passes: str
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
    if plan.calls < 1 or not plan.seconds > 0:
        raise InputError(
            "--calls must be at least 1 and --seconds above 0. "
            f"Received: {plan.calls}, {plan.seconds}"
        )
    if output is not None and not os.access(output.absolute().parent, os.W_OK):
        raise InputError(f"--output must be in a folder that can be written. Received: {output}")


def run(plan: Plan, say=lambda line: None) -> Iterator[Row]:
    """Measures, and yields each figure. ``say`` is told what was left out, and why."""
    peak = multiply_add_peak()
    for name in plan.cases:
        case = next(case for case in CASES if case.name == name)
        for dtype in plan.dtypes:
            for passes in PASSES:
                yield from _rows(case, dtype, passes, plan, peak, say)


def _rows(case, dtype, passes, plan, peak, say):
    backward = PASSES[passes]
    ready = {}
    for name in plan.candidates:
        try:
            function, arguments, cotangent = candidate(name, case, dtype)
        except NotImplementedError as reason:
            if not backward:
                say(f"{case.name} {name} {dtype}: left out: {reason}")
            continue
        if name not in yardsticks.CONVOLUTIONS:
            wrong = difference(function, arguments, cotangent, case, dtype)
            if wrong > TOLERANCE[dtype]:
                raise RuntimeError(
                    f"{case.name} {name} {dtype} is wrong, so it has no speed: its largest "
                    f"difference from `reference` is {wrong:.1e}"
                )
        made = functools.partial(program, function, arguments, cotangent if backward else None)
        single = made(1)
        single()  # compiles
        started = time.perf_counter()
        single()
        seconds = time.perf_counter() - started
        # Very slow ones once a run: their way to the framework does not matter.
        calls = plan.calls if seconds < 0.5 else 1
        ready[name] = (made(calls) if calls > 1 else single, calls)
    times = measure({name: program for name, (program, _) in ready.items()}, plan.seconds)
    for name, (_, calls) in ready.items():
        each = [t / calls * 1e3 for t in times[name]]
        median = statistics.median(each)
        quartiles = statistics.quantiles(each, n=4) if len(each) > 2 else [median] * 3
        ours = name not in yardsticks.CONVOLUTIONS
        limit = least_ms(case, dtype, backward, peak, generating=name in GENERATING)
        yield Row(
            case=case.name,
            candidate=name,
            dtype=dtype,
            passes=passes,
            median_ms=median,
            spread_ms=(quartiles[2] - quartiles[0]) / 2,
            runs=len(each),
            calls=calls,
            limit_ms=limit if ours else None,
            times_limit=median / limit if ours else None,
            peak_mb=_in_fresh_process(case, name, dtype, backward) if plan.memory else None,
            tensors_mb=tensor_bytes(case, dtype, backward, name) / 1e6 if ours else None,
        )


def candidate(name, case: Case, dtype):
    """(function, arguments, cotangent), or NotImplementedError with the reason."""
    random = np.random.default_rng(0)
    if name in yardsticks.CONVOLUTIONS:
        function, arguments = yardsticks.CONVOLUTIONS[name](case, random, dtype)
    elif name in GENERATING:
        generator = case.x_shape, *case.generator_shapes
        arguments = tensors([random.standard_normal(s) for s in generator], dtype)
        if name == FUSED[0]:
            reason = FUSED[1].refusal(make_generating_problem(*arguments, **case.arguments))
            if reason is not None:
                raise NotImplementedError(reason)
        function = functools.partial(
            ops.generate_and_apply, implementation=GENERATING[name], **case.arguments
        )
    else:
        shapes = case.x_shape, case.kernel_shape
        arguments = tensors([random.standard_normal(s) for s in shapes], dtype)
        if name == PATCHES:
            function = _patches(case)
        else:
            problem = make_problem(*arguments, **case.arguments)
            reason = dict(IMPLEMENTATIONS)[name].refusal(problem)
            if reason is not None:
                raise NotImplementedError(reason)
            function = functools.partial(ops.involution, implementation=name, **case.arguments)
    if keras.backend.standardize_dtype(arguments[0].dtype) != dtype:
        raise NotImplementedError(f"{keras.config.backend()} makes no {dtype} here")
    y_shape = (case.batch, *case.kernel_shape[1:-2], case.channels)
    (cotangent,) = tensors([random.standard_normal(y_shape)], dtype)
    return function, arguments, cotangent


def _patches(case):
    if len(case.sizes) != 2:
        raise NotImplementedError("patches are for images")
    if math.prod(case.kernel_shape[:-1]) * case.channels > MOST_PATCHES:
        raise NotImplementedError(f"patches of more than {MOST_PATCHES} numbers fill the memory")
    if case.padding != "same" and (case.padding != "symmetric" or case.strides > 1):
        raise NotImplementedError("patches are padded as Keras does")
    names = "kernel_size", "strides", "dilation_rate", "groups", "group_layout"
    return functools.partial(yardsticks.patches, **{name: case.arguments[name] for name in names})


def difference(function, arguments, cotangent, case, dtype) -> float:
    """The largest difference of output and gradients from those of ``reference`` in float32 or
    wider, relative to the largest value of each."""
    wide = "float64" if dtype == "float64" else "float32"
    operation = ops.involution if len(arguments) == 2 else ops.generate_and_apply
    reference = functools.partial(operation, implementation="reference", **case.arguments)
    want = program(reference, *_cast(arguments, cotangent, wide))()
    have = program(function, arguments, cotangent)()
    worst = 0.0
    for w, h in zip(want, have, strict=True):
        w, h = (np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(t, wide))) for t in (w, h))
        worst = max(worst, float(np.abs(h - w).max() / np.abs(w).max()))
    return worst if math.isfinite(worst) else math.inf


def _cast(arguments, cotangent, dtype):
    return [keras.ops.cast(a, dtype) for a in arguments], keras.ops.cast(cotangent, dtype)


def measure(programs, seconds) -> dict[str, list[float]]:
    """Seconds of each run. The programs take turns until each had its time, or three runs."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for run in programs.values():
        run()
    while True:
        waiting = [n for n, t in times.items() if len(t) < 3 or sum(t) < seconds]
        if not waiting:
            return times
        for name in waiting:
            started = time.perf_counter()
            programs[name]()
            times[name].append(time.perf_counter() - started)


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


def least_ms(case, dtype, backward, peak, generating=False) -> float:
    """Moving every tensor that a pass reads or writes once, or the multiplications and additions:
    whichever takes longer. An output, an input gradient and a kernel gradient, or that of what
    generates the kernels, each touch one tensor of every kind and do as many operations."""
    total = sum(_sizes(case, dtype, generating))
    operations = 2 * case.batch * case.channels * _taps_inside(case)
    if generating:
        operations += 2 * math.prod(case.kernel_shape) * case.generator_shapes[1][0]
    # As many values as in float32: half types move half the bytes, sums are in float32.
    rate = peak / (2 if dtype == "float64" else 1)
    seconds = max(total / copy_bandwidth(total), operations / rate)
    return 1e3 * seconds * (3 if backward else 1)


def _taps_inside(case) -> int:
    """Of one sample's windows: those that meet the input."""
    x, kernel = keras.KerasTensor(case.x_shape), keras.KerasTensor(case.kernel_shape)
    pads = make_problem(x, kernel, **case.arguments).geometry.pads(case.sizes)
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


@functools.cache
def copy_bandwidth(total: int) -> float:
    """Bytes a second, read and written, when all processors copy: for tensors of ``total`` bytes,
    so that what fits into a cache is held to the cache's speed."""
    workers = processors()
    part = max(total // 8 // workers, 1)
    pairs = [(np.ones(part, "float32"), np.empty(part, "float32")) for _ in range(workers)]
    return total / _best(lambda pair: np.copyto(pair[1], pair[0]), pairs)


@functools.cache
def multiply_add_peak() -> float:
    """Float32 operations a second of all processors: multiply-adds in registers by the compiled
    core; without it, the product of two matrices by NumPy, which reaches less."""
    if native_library.levels():
        times = 20_000
        operations = native_library.multiply_add(times) * processors()
        return operations / _best(native_library.multiply_add, [times] * processors())
    n = 1536
    a = np.ones((n, n), "float32")
    return 2 * n**3 / _best(lambda _: a @ a, [None])


def _best(function, parts, repeats=30) -> float:
    """Seconds that all parts take in threads of their own, the best of several runs."""
    best = math.inf
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(repeats):
            # Several times each, so that starting the threads does not count.
            started = time.perf_counter()
            list(pool.map(lambda part: [function(part) for _ in range(10)], parts))
            best = min(best, (time.perf_counter() - started) / 10)
    return best


# --- Memory


def _in_fresh_process(case, name, dtype, backward) -> float | None:
    """Megabytes, in a process where nothing else has left its memory to be used again."""
    if not os.path.exists("/proc/self/clear_refs"):
        return None
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (case, name, dtype, backward))


def _peak_memory(case, name, dtype, backward) -> float:
    small, arguments, cotangent = candidate(name, case.small(), dtype)
    program(small, arguments, cotangent if backward else None)()  # loads what it needs
    memory.give_back()
    before = _resident("VmRSS")
    function, arguments, cotangent = candidate(name, case, dtype)
    # The peak starts anew: making the arguments took more than they do.
    memory.give_back()
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    program(function, arguments, cotangent if backward else None)()
    return (_resident("VmHWM") - before) / 1e6


def _resident(field) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


# --- What is told


def device() -> str:
    """The processor's name and how many of it are used."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line.split(":", 1)[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        pass
    return f"{name}, {processors()} processors"


def heading() -> Iterator[str]:
    """What the lines of figures need to be understood."""
    yield f"{keras.config.backend()} on {device()}"
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


def to_csv(rows: Sequence[Row]) -> str:
    """All figures, as ``with_setting`` writes them."""
    names = [field.name for field in dataclasses.fields(Row)]
    figures = [{n: _rounded(v) for n, v in dataclasses.asdict(row).items()} for row in rows]
    return with_setting(figures, names)


def with_setting(rows: Sequence[dict], names: Sequence[str]) -> str:
    """CSV of rows with these columns, each with the backend, the device, versions and the day."""
    setting = {
        "backend": keras.config.backend(),
        "device": device(),
        "versions": " ".join(f"{n}={v}" for n, v in versions().items()),
        "date": datetime.date.today().isoformat(),
    }
    return csv_text([*names, *setting], [{**row, **setting} for row in rows])


def _rounded(value):
    return f"{value:.6g}" if isinstance(value, float) else value
