"""Time and memory of the operator by case and candidate: ``involution bench``.

The candidates of a case run alternately, so that other load on the machine affects all of them;
times are medians. Baselines are the convolutions that involution replaces, and two rooflines, each
the larger of the times for memory traffic and for arithmetic, at rates measured in the same run:
*warm*, with operands in the cache where they fit, as in the measured calls, and *cold*, with
operands in memory.
"""

import dataclasses
import datetime
import functools
import math
import multiprocessing
import os
import pathlib
import statistics
import textwrap
from collections.abc import Callable, Iterator, Sequence

import keras
import numpy as np

from involution import ops
from involution.benchmarking import baselines, devices, exported
from involution.benchmarking.devices import DEVICES
from involution.benchmarking.timed_program import repeat, tensors
from involution.ops import autodiff, taps
from involution.ops.cases import CASES, Case
from involution.ops.dispatch import IMPLEMENTATIONS, PREFERENCE
from involution.ops.problem import problem_of
from involution.ops.tensor_utils import spatial_shape
from involution.ops.validation import SAME, SYMMETRIC
from involution.utils.atomic_files import csv_text
from involution.utils.comparison import relative_error
from involution.utils.environment import versions
from involution.utils.errors import InputError

IM2COL = "im2col"
# On PyTorch: the paper's CUDA algorithm, and `taps` with torch.compile.
PAPER_CUDA, COMPILED_TAPS = "paper-cuda", "compiled-taps"
# On JAX and CUDA devices.
PALLAS = "pallas"
# Kernel generation and involution as separate operations, with stored kernels.
UNFUSED = "unfused"
# Candidates that include kernel generation, with their implementations.
GENERATED = {UNFUSED: PREFERENCE, "fused": "fused"}
CANDIDATES = (
    *PREFERENCE,
    PALLAS,
    *GENERATED,
    IM2COL,
    PAPER_CUDA,
    COMPILED_TAPS,
    *exported.OPERATORS,
    *baselines.CONVOLUTIONS,
)
RENAMED_CANDIDATES = {"patches": IM2COL, "per-number": PAPER_CUDA, "two-steps": UNFUSED}
# By runtime of exported models, with the framework's for comparison.
RUNTIME_CANDIDATES = {"onnxruntime": (UNFUSED, "fused", *exported.OPERATORS)}
# By device.
DEFAULT_CANDIDATES = {
    "cpu": ("native", "taps", "reference", IM2COL, *baselines.CONVOLUTIONS),
    "cuda": (
        *("triton", PALLAS, "taps", "reference", IM2COL, PAPER_CUDA, COMPILED_TAPS),
        *baselines.CONVOLUTIONS,
    ),
}
PASSES = {"forward": False, "forward+backward": True}
DTYPES = ("float32", "bfloat16", "float16", "float64")
# 1 GiB in float32, and as much for each gradient.
MAX_IM2COL_ELEMENTS = 2**28
# Maximum relative error against `reference`, which is computed in at least float32.
TOLERANCE = {"float64": 1e-5, "float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}


def default_candidates(device, runtime=None) -> tuple[str, ...]:
    """The candidates for a device, or for a runtime of exported models."""
    if runtime is not None:
        return RUNTIME_CANDIDATES[runtime]
    return DEFAULT_CANDIDATES.get(device, CANDIDATES)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure, and for how long. Earlier names of candidates are accepted."""

    cases: tuple[str, ...] = tuple(case.name for case in CASES)
    candidates: tuple[str, ...] = CANDIDATES
    dtypes: tuple[str, ...] = ("float32",)
    calls: int = 10
    seconds: float = 2.0
    memory: bool = False
    device: str = "cpu"
    batch: int | None = None  # replaces the cases' batch sizes

    def __post_init__(self):
        candidates = tuple(RENAMED_CANDIDATES.get(name, name) for name in self.candidates)
        object.__setattr__(self, "candidates", candidates)


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement: milliseconds per call, megabytes (10^6 bytes).

    The rooflines, their ratios and bounds are None for convolutions.
    """

    case: str
    candidate: str
    dtype: str
    passes: str
    batch: int
    median_ms: float
    half_iqr_ms: float  # half the interquartile range
    runs: int
    calls: int
    roofline_warm_ms: float | None  # operands in the cache where they fit
    x_roofline_warm: float | None  # median_ms / roofline_warm_ms
    bound_warm: str | None  # what sets the warm roofline: "memory" or "arithmetic"
    roofline_cold_ms: float | None  # operands in memory
    x_roofline_cold: float | None  # can be below 1 where operands stay in the cache
    bound_cold: str | None
    peak_mb: float | None  # including arguments, results and gradients
    tensors_mb: float | None  # arguments, results and gradients


def check(plan: Plan, output: pathlib.Path | None = None) -> None:
    """Validates a plan and the output file.

    Raises:
        InputError: A name is unknown, a number is out of range, the device is unavailable, or the
            file is not writable.
    """
    for option, names, known in (
        ("cases", plan.cases, [case.name for case in CASES]),
        ("candidates", plan.candidates, CANDIDATES),
        ("dtypes", plan.dtypes, DTYPES),
    ):
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise InputError(
                f"--{option} must be from {','.join(known)}. Received: {','.join(names)}"
            )
    if plan.device not in DEVICES:
        raise InputError(f"--device must be one of {', '.join(DEVICES)}. Received: {plan.device}")
    reason = DEVICES[plan.device].unavailable_reason()
    if reason is not None:
        raise InputError(f"--device must be available: {reason}. Received: {plan.device}")
    if plan.batch is not None and plan.batch < 1:
        raise InputError(f"--batch must be at least 1. Received: {plan.batch}")
    if plan.calls < 1 or not plan.seconds > 0:
        raise InputError(
            "--calls must be at least 1 and --seconds above 0. "
            f"Received: {plan.calls}, {plan.seconds}"
        )
    if output is not None and (output.is_dir() or not os.access(output.absolute().parent, os.W_OK)):
        raise InputError(f"--output must be a file in a writable folder. Received: {output}")


def run(plan: Plan, log=lambda line: None) -> Iterator[Row]:
    """Yields the measurements; ``log`` receives a line for each skipped candidate, with the
    reason."""
    scope = DEVICES[plan.device].keras_name
    for case in _cases(plan):
        for dtype in plan.dtypes:
            # No yield inside keras.device: it would also apply to the caller's code.
            with keras.device(scope):
                candidates = dict(_candidates(case, dtype, plan, log))
            for passes in PASSES:
                with keras.device(scope):
                    rows = list(_rows(case, dtype, passes, candidates, plan, log))
                yield from rows


def _cases(plan) -> list[Case]:
    """The plan's cases, with its batch size."""
    named = {case.name: case for case in CASES}
    cases = [named[name] for name in plan.cases]
    if plan.batch is None:
        return cases
    return [dataclasses.replace(case, batch=plan.batch) for case in cases]


def _candidates(case, dtype, plan, log):
    """The available candidates, verified against ``reference``."""
    for name in plan.candidates:
        try:
            candidate = make_candidate(name, case, dtype)
        except NotImplementedError as reason:
            log(f"{case.name} {name} {dtype}: skipped: {reason}")
            continue
        error = 0.0 if candidate.reference is None else max_relative_error(candidate, dtype)
        if error > TOLERANCE[dtype]:
            raise RuntimeError(
                f"Measured candidates must match `reference` to {TOLERANCE[dtype]:.0e}. "
                f"Received: {case.name} {name} {dtype} with a maximum relative error of {error:.1e}"
            )
        yield name, candidate


def _rows(case, dtype, passes, candidates, plan, log):
    backward = PASSES[passes]
    device = DEVICES[plan.device]
    ready = {}
    for name, candidate in candidates.items():
        try:
            single = device.timer(candidate.program(backward))
            single()  # compiles
            # Slow calls are not repeated: their dispatch overhead is negligible.
            calls = plan.calls if single() < 0.5 else 1
            repeated = device.timer(candidate.program(backward, calls)) if calls > 1 else single
        except (devices.CaptureError, NotImplementedError) as reason:
            log(f"{case.name} {name} {dtype} {passes}: skipped: {reason}")
            continue
        ready[name] = repeated, calls
    times = measure({name: timer for name, (timer, _) in ready.items()}, plan.seconds)
    for name, (_, calls) in ready.items():
        each = [t / calls * 1e3 for t in times[name]]
        median = statistics.median(each)
        quartiles = statistics.quantiles(each, n=4) if len(each) > 2 else [median] * 3
        is_involution = name not in baselines.CONVOLUTIONS
        warm = cold = None
        if is_involution:
            warm, cold = rooflines(case, dtype, backward, device, _is_generated(name))
        yield Row(
            case=case.name,
            candidate=name,
            dtype=dtype,
            passes=passes,
            batch=case.batch,
            median_ms=median,
            half_iqr_ms=(quartiles[2] - quartiles[0]) / 2,
            runs=len(each),
            calls=calls,
            roofline_warm_ms=warm.ms if warm else None,
            x_roofline_warm=median / warm.ms if warm else None,
            bound_warm=warm.bound if warm else None,
            roofline_cold_ms=cold.ms if cold else None,
            x_roofline_cold=median / cold.ms if cold else None,
            bound_cold=cold.bound if cold else None,
            peak_mb=_peak_mb(case, name, dtype, backward, device) if plan.memory else None,
            tensors_mb=tensor_bytes(case, dtype, backward, name) / 1e6 if is_involution else None,
        )


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A measured function of tensors, with its arguments and its output's gradient."""

    function: Callable
    arguments: list
    cotangent: object
    reference: Callable | None  # the implementation `reference`; None for convolutions

    def program(self, backward: bool, calls: int = 1):
        cotangent = self.cotangent if backward else None
        return repeat(self.function, self.arguments, cotangent, calls)


class ExportedCandidate(Candidate):
    """A candidate that another runtime computes, forward only; ``function`` has no arguments."""

    def program(self, backward: bool, calls: int = 1):
        if backward:
            raise NotImplementedError("an exported model has no gradients")
        return lambda: [self.function() for _ in range(calls)][-1:]


def make_candidate(name: str, case: Case, dtype: str) -> Candidate:
    """Raises NotImplementedError, with the reason, for an unavailable candidate."""
    rng = np.random.default_rng(0)
    options = case.arguments
    y_shape = case.y_shape
    shapes = [case.x_shape, case.kernel_shape]
    operation: Callable = ops.involution
    if name in baselines.CONVOLUTIONS:
        function, arguments = baselines.CONVOLUTIONS[name](case, rng, dtype)
    elif name in exported.OPERATORS:
        if dtype != "float32":
            raise NotImplementedError("requires float32")
        arguments = tensors([rng.standard_normal(s) for s in _generated_shapes(case)], dtype)
        function = exported.session_call(case, exported.OPERATORS[name], arguments)
        formula = functools.partial(ops.fused_involution, implementation="reference", **options)
        return ExportedCandidate(function, arguments, None, formula)
    elif name in GENERATED:
        operation = ops.fused_involution
        shapes = _generated_shapes(case)
        arguments = tensors([rng.standard_normal(s) for s in shapes], dtype)
        if name == "fused":
            problem = problem_of(case.window, arguments[0], case.generator_shapes[1][0])
            _check_supported(IMPLEMENTATIONS[name].unsupported_reason(problem))
        function = functools.partial(operation, implementation=GENERATED[name], **options)
    else:
        if name == PAPER_CUDA:
            function = _paper_cuda(case, dtype)
            options = options | {"data_format": "channels_first"}
            shapes = [_channels_first(shape, case) for shape in shapes]
            y_shape = _channels_first(y_shape, case)
        arguments = tensors([rng.standard_normal(s) for s in shapes], dtype)
        if name == IM2COL:
            function = _im2col(case)
        elif name == COMPILED_TAPS:
            function = _compiled_taps(case)
        elif name != PAPER_CUDA:
            problem = problem_of(case.window, arguments[0])
            _check_supported(IMPLEMENTATIONS[name].unsupported_reason(problem))
            function = functools.partial(operation, implementation=name, **options)
    if keras.backend.standardize_dtype(arguments[0].dtype) != dtype:
        raise NotImplementedError(f"{keras.config.backend()} does not support {dtype} here")
    reference = None
    if name not in baselines.CONVOLUTIONS:
        reference = functools.partial(operation, implementation="reference", **options)
    (cotangent,) = tensors([rng.standard_normal(y_shape)], dtype)
    return Candidate(function, arguments, cotangent, reference)


def _generated_shapes(case):
    return [case.x_shape, *case.generator_shapes]


def _check_supported(reason):
    if reason is not None:
        raise NotImplementedError(reason)


def _channels_first(shape, case):
    last = 1 + len(case.sizes)
    return (shape[0], *shape[last:], *shape[1:last])


def _paper_cuda(case, dtype):
    if keras.config.backend() != "torch":
        raise NotImplementedError("requires the PyTorch backend and a CUDA device")
    from involution.benchmarking import paper_cuda

    _check_supported(paper_cuda.unsupported_reason(case, dtype))
    return functools.partial(paper_cuda.involution, case=case)


def _compiled_taps(case):
    if keras.config.backend() != "torch":
        raise NotImplementedError("requires the PyTorch backend")
    import torch

    from involution.ops.autodiff.torch import differentiable

    # torch.compile limits the number of specializations of a function.
    torch.compiler.reset()
    call = differentiable(torch.compile(taps.compute, fullgraph=True))

    def apply(x, kernel):
        window = problem_of(case.window, x).window
        return call(autodiff.FORWARD, window, spatial_shape(x, window), x, kernel)

    return apply


def _im2col(case):
    if len(case.sizes) != 2:
        raise NotImplementedError("requires two spatial dimensions")
    if math.prod(case.kernel_shape[:-1]) * case.channels > MAX_IM2COL_ELEMENTS:
        raise NotImplementedError(f"requires patches of at most {MAX_IM2COL_ELEMENTS} elements")
    window = case.window
    if window.padding != SAME and (window.padding != SYMMETRIC or max(window.strides) > 1):
        raise NotImplementedError('requires Keras\'s "same" padding')
    return functools.partial(baselines.im2col, window=window)


def max_relative_error(candidate: Candidate, dtype) -> float:
    """Error of the output and the gradients against ``reference`` in at least float32, relative to
    the largest absolute value of each; infinite for nonfinite values."""
    wide = "float64" if dtype == "float64" else "float32"

    def to_numpy(tensor):
        return np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(tensor, wide)))

    arguments = [keras.ops.cast(a, wide) for a in candidate.arguments]
    backward = not isinstance(candidate, ExportedCandidate)
    cotangent = keras.ops.cast(candidate.cotangent, wide) if backward else None
    expected = repeat(candidate.reference, arguments, cotangent)()
    results = candidate.program(backward)()
    return max(
        relative_error(to_numpy(result), to_numpy(want))
        for want, result in zip(expected, results, strict=True)
    )


def measure(timers: dict[str, Callable[[], float]], seconds) -> dict[str, list[float]]:
    """Seconds of each run. Timers alternate until each has ``seconds`` in total and three runs."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    for timer in timers.values():
        timer()
    while True:
        unfinished = [n for n, t in times.items() if len(t) < 3 or sum(t) < seconds]
        if not unfinished:
            return times
        for name in unfinished:
            times[name].append(timers[name]())


# --- Roofline


def _is_generated(name) -> bool:
    return name in GENERATED or name in exported.OPERATORS


def _tensor_sizes(case, dtype, generated):
    """Bytes of each argument and of the output."""
    item = {"float64": 8, "float32": 4}.get(dtype, 2)
    kernel = case.generator_shapes if generated else [case.kernel_shape]
    return [item * math.prod(shape) for shape in (case.x_shape, *kernel, case.y_shape)]


def tensor_bytes(case, dtype, backward, name) -> int:
    """Bytes of arguments, results and stored kernels, and with ``backward`` of their gradients."""
    total = sum(_tensor_sizes(case, dtype, _is_generated(name)))
    if name == UNFUSED:
        total += _tensor_sizes(case, dtype, False)[1]
    return total * (2 if backward else 1)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The minimum time of a measurement, and what sets it: "memory" or "arithmetic"."""

    ms: float
    bound: str


def rooflines(case, dtype, backward, device, generated=False) -> tuple[Roofline, Roofline]:
    """The warm and the cold roofline: the larger of the times for memory traffic and arithmetic.

    The forward pass reads the arguments and writes the output, once; the backward pass reads the
    arguments and the output's gradient and writes the gradients of the arguments.

    * Cold: bytes read / read bandwidth + bytes written / write bandwidth, of memory.
    * Warm: bytes / bandwidth of copies of as many bytes as all these tensors have; at most cold.

    The output, the input gradient, and the gradient of the kernel or of its generator have the
    same number of operations.
    """
    sizes = _tensor_sizes(case, dtype, generated)
    read, written = sum(sizes[:-1]), sizes[-1]
    total, passes = read + written, 1
    if backward:
        read, written = read + total, total
        total, passes = 2 * total, 3
    # Half types accumulate in float32; their matrix products may run at a higher rate.
    accumulation = "float64" if dtype == "float64" else "float32"
    arithmetic = 2 * case.batch * case.channels * _taps_inside(case) / device.peak(accumulation)
    if generated:
        operations = 2 * math.prod(case.kernel_shape) * case.generator_shapes[1][0]
        arithmetic += operations / device.peak(dtype)
    memory = device.memory_bandwidth()
    cold = read / memory.read + written / memory.write
    warm = min((read + written) / device.copy_bandwidth(total), cold)
    return _roofline(warm, passes * arithmetic), _roofline(cold, passes * arithmetic)


def _roofline(memory, arithmetic):
    bound = "memory" if memory > arithmetic else "arithmetic"
    return Roofline(1e3 * max(memory, arithmetic), bound)


def _taps_inside(case) -> int:
    """Number of taps inside the input, over all windows of a sample."""
    window = case.window.clamp_steps(case.sizes)
    total = 1
    for i, (n, out) in enumerate(zip(case.sizes, window.output_sizes(case.sizes), strict=True)):
        before, _ = window.pads(case.sizes)[i]
        sources = (
            p * window.strides[i] - before + k * window.dilation_rate[i]
            for p in range(out)
            for k in range(window.kernel_size[i])
        )
        total *= sum(0 <= q < n for q in sources)
    return total


# --- Memory


def _peak_mb(case, name, dtype, backward, device) -> float | None:
    """Peak megabytes of one call, including arguments, results and temporaries."""
    args = case, name, dtype, backward, device.name
    if not device.measures_memory_in_subprocess:
        peak = _peak_bytes(*args)
    else:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak = pool.apply(_peak_bytes, args)
    return None if peak is None else peak / 1e6


def _peak_bytes(case, name, dtype, backward, device) -> int | None:
    def prepare(case):
        return make_candidate(name, case, dtype).program(backward)

    with keras.device(DEVICES[device].keras_name):
        # A small call loads libraries and workspaces first.
        return DEVICES[device].peak_bytes(
            lambda: prepare(case.small())(), functools.partial(prepare, case)
        )


# --- Output


# Columns of a terminal.
WIDTH = 80


def header(plan: Plan) -> Iterator[str]:
    """Lines with the device, its measured rates, and the meaning of the columns of ``format_row``.

    Explanations are at most 80 characters wide.
    """
    device = DEVICES[plan.device]
    yield f"{keras.config.backend()} on {device.description()}"
    case, dtype = _cases(plan)[0], plan.dtypes[0]
    total = sum(_tensor_sizes(case, dtype, generated=False))
    with keras.device(device.keras_name):
        cold = device.memory_bandwidth()
        warm, peak = device.copy_bandwidth(total), device.peak("float32")
    read, write, copy = (f"{rate / 1e9:.1f} GB/s" for rate in (*cold, warm))
    for text in (
        f"cold: operands in memory, read at {read} and written at {write}",
        f"warm: operands in the cache where they fit; copies of the {total / 1e6:.1f} MB of "
        f"{case.name}: {copy}, read plus written",
        f"arithmetic: float32 {peak / 1e9:.0f} GFLOP/s",
        "ms: median per call, operands warm; +-: half the interquartile range; MB: peak memory",
        "warm, cold: rooflines in ms, the larger of the times for memory traffic and arithmetic",
        "x warm, x cold: ms / roofline; x cold can be below 1 where operands stay in the cache",
        "bound: what sets both rooflines; mixed: memory the cold, arithmetic the warm one",
    ):
        yield from textwrap.wrap(text, WIDTH, subsequent_indent="  ")


def format_row(row: Row, previous: Row | None = None) -> list[str]:
    """Lines of the table, at most 80 characters wide.

    Args:
        row: A measurement.
        previous: The measurement before; None: the row is the first. If it is of another case,
            dtype or pass, the line of the row follows a heading.
    """

    def number(value, width, digits):
        return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"

    def group(row):
        return f"{row.case} {row.dtype} {row.passes}, batch size {row.batch}"

    heading = []
    if previous is None or group(row) != group(previous):
        heading = ["", group(row)]
        heading.append(
            f"{'candidate':14}{'ms':>9}{'+-':>8}{'warm':>9}{'x warm':>7}{'cold':>9}{'x cold':>7}"
            f"{'bound':>9}{'MB':>8}"
        )
    bound = (row.bound_cold or "-").replace("arithmetic", "arith.")
    if row.bound_warm != row.bound_cold:
        # The warm time for memory is at most the cold one, so warm is arithmetic.
        bound = "mixed"
    line = (
        f"{row.candidate:14}{number(row.median_ms, 9, 3)}{number(row.half_iqr_ms, 8, 3)}"
        f"{number(row.roofline_warm_ms, 9, 3)}{number(row.x_roofline_warm, 7, 2)}"
        f"{number(row.roofline_cold_ms, 9, 3)}{number(row.x_roofline_cold, 7, 2)}"
        f"{bound:>9}{number(row.peak_mb, 8, 1)}"
    )
    return [*heading, line]


def to_csv(rows: Sequence[Row], device: str = "cpu") -> str:
    """CSV of all measurements, see ``with_environment``."""
    names = [field.name for field in dataclasses.fields(Row)]
    values = [{n: _rounded(v) for n, v in dataclasses.asdict(row).items()} for row in rows]
    return with_environment(values, names, device)


def with_environment(rows: Sequence[dict], names: Sequence[str], device: str = "cpu") -> str:
    """CSV of rows with these columns, plus backend, device, versions and date."""
    environment = {
        "backend": keras.config.backend(),
        "device": DEVICES[device].description(),
        "versions": " ".join(f"{n}={v}" for n, v in versions().items()),
        "date": datetime.date.today().isoformat(),
    }
    return csv_text([*names, *environment], [{**row, **environment} for row in rows])


def _rounded(value):
    return f"{value:.6g}" if isinstance(value, float) else value
