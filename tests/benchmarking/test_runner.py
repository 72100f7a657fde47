"""Measurements of `involution bench`, and its verification of candidates."""

import csv
import dataclasses
import functools
import io
import os
import sys

import keras
import numpy as np
import pytest

from involution.benchmarking import devices, exported, runner
from involution.ops import dispatch, taps
from involution.ops.cases import CASES, Case
from involution.utils.errors import InputError
from tests.support.backends import BACKEND, IMPLEMENTATIONS, numpy

pytestmark = pytest.mark.any_backend

FUSED = ["fused"] if "native" in IMPLEMENTATIONS else []
EXPORTED = set(exported.OPERATORS)
UNAVAILABLE = {"paper-cuda"} if BACKEND == "torch" else {"paper-cuda", "compiled-taps"}
SMALL = Case.of("small", 2, (5, 4), 6, 2, 3)
STRIDED = Case.of("strided", 1, (5, 4), 6, 2, 3, strides=2, group_layout="interleaved")


class FakeDevice:
    """A device with given rates, in bytes and operations per second."""

    keras_name = "cpu"

    def __init__(self, read=1e15, write=1e15, copy=1e15, flops=1e15):
        self.bandwidth = devices.Bandwidth(read, write)
        self.copy, self.flops = copy, flops
        self.copied = []

    def description(self):
        return "a fake"

    def memory_bandwidth(self):
        return self.bandwidth

    def copy_bandwidth(self, total):
        self.copied.append(total)
        return self.copy

    def peak(self, dtype):
        return self.flops * {"float32": 1, "bfloat16": 2, "float64": 0.5}[dtype]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(runner, "CASES", (SMALL, STRIDED))
    # Its measurement takes a second.
    monkeypatch.setattr(devices.DEVICES["cpu"], "memory_bandwidth", FakeDevice().memory_bandwidth)
    return runner.Plan(cases=("small", "strided"), seconds=1e-6, calls=2)


@pytest.mark.long
def test_every_candidate_is_measured_forward_and_backward(small, monkeypatch):
    if BACKEND == "torch":
        import torch

        # Inductor takes 10 to 30 s; test_compiled_taps_match_the_reference runs it.
        compile_ = functools.partial(torch.compile, backend="aot_eager")
        monkeypatch.setattr(torch, "compile", compile_)
    # compiled-taps is measured on one case, because compilation is slow.
    uncompiled = tuple(n for n in runner.CANDIDATES if n != runner.COMPILED_TAPS)
    for case, candidates in (("small", runner.CANDIDATES), ("strided", uncompiled)):
        messages = []
        plan = dataclasses.replace(small, cases=(case,), candidates=candidates)
        rows = list(runner.run(plan, messages.append))
        names = [
            n
            for n in candidates
            if n in (*IMPLEMENTATIONS, *FUSED) or n not in (*dispatch.IMPLEMENTATIONS, *UNAVAILABLE)
        ]
        expected = [
            (case, n, passes)
            for passes in ("forward", "forward+backward")
            for n in names
            if passes == "forward" or n not in EXPORTED
        ]
        assert [(r.case, r.candidate, r.passes) for r in rows] == expected
        assert all(r.median_ms > 0 and r.runs >= 3 for r in rows)
        involutions = [r for r in rows if r.candidate not in ("conv3", "depthwise")]
        for r in involutions:
            assert r.x_roofline_warm == pytest.approx(r.median_ms / r.roofline_warm_ms)
            assert r.x_roofline_cold == pytest.approx(r.median_ms / r.roofline_cold_ms)
            assert r.roofline_warm_ms <= r.roofline_cold_ms
        # One message for each unavailable candidate, and for each without gradients.
        assert len(messages) == len(candidates) - len(names) + len(EXPORTED & set(names))


def test_csv_contains_the_environment(small):
    rows = list(runner.run(dataclasses.replace(small, candidates=("taps", "conv3"))))
    table = list(csv.DictReader(io.StringIO(runner.to_csv(rows))))
    assert [row["candidate"] for row in table] == [row.candidate for row in rows]
    for row in table:
        assert row["backend"] == BACKEND
        assert f"keras={keras.__version__}" in row["versions"]
        assert row["device"].endswith(" CPUs")
        assert row["date"]


@pytest.mark.parametrize(("factor", "error"), [(1.01, "1.0e-02"), (np.nan, "inf")])
def test_wrong_results_are_not_measured(small, monkeypatch, factor, error):
    apply = taps.apply
    monkeypatch.setattr(taps, "apply", lambda *arguments: apply(*arguments) * factor)
    message = rf"must match `reference` to 1e-04\. Received: small .* error of {error}"
    with pytest.raises(RuntimeError, match=message):
        list(runner.run(small))


@pytest.mark.parametrize("case", [SMALL, STRIDED], ids=lambda case: case.name)
def test_im2col_matches_the_reference(case):
    candidate = runner.make_candidate("im2col", case, "float32")
    got, want = candidate.function(*candidate.arguments), candidate.reference(*candidate.arguments)
    np.testing.assert_allclose(numpy(got), numpy(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cases": ("red1", "red9")}, "--cases must be from tut,red1"),
        ({"candidates": ()}, "--candidates must be from triton,native,taps"),
        ({"dtypes": ("int8",)}, "--dtypes must be from float32"),
        ({"device": "gpu"}, "--device must be one of cpu, cuda. Received: gpu"),
        ({"batch": 0}, "--batch must be at least 1. Received: 0"),
        ({"calls": 0}, "--calls must be at least 1"),
        ({"seconds": float("nan")}, "--seconds above 0"),
    ],
)
def test_invalid_plans_raise(changes, message):
    with pytest.raises(InputError, match=message):
        runner.check(runner.Plan(**changes))


def test_default_candidates_exist_and_output_folder_is_rejected(tmp_path):
    for device, names in runner.DEFAULT_CANDIDATES.items():
        assert device in devices.DEVICES
        assert set(names) <= set(runner.CANDIDATES)
    with pytest.raises(
        InputError, match=rf"must be a file in a writable folder. Received: {tmp_path}"
    ):
        runner.check(runner.Plan(), tmp_path)


def test_renamed_candidates_are_accepted():
    plan = runner.Plan(candidates=("patches", "per-number", "two-steps", "taps"))
    assert plan.candidates == ("im2col", "paper-cuda", "unfused", "taps")
    runner.check(plan)


def test_the_roofline_counts_taps_inside_the_input():
    # Windows of 3 x 3 at 5 x 4 positions: (3 * 5 - 2) * (3 * 4 - 2) taps are inside.
    assert runner._taps_inside(SMALL) == 13 * 10
    # 2 * 5 * 4 * 6 elements of x and of y each, 2 * 5 * 4 * 9 * 2 of the kernel.
    assert runner.tensor_bytes(SMALL, "float32", False, "native") == 4 * (2 * 240 + 720)
    assert runner.tensor_bytes(SMALL, "bfloat16", True, "native") == 2 * 2 * (2 * 240 + 720)
    # One hidden channel: 2 * 5 * 4 features, 18 weights and 18 biases.
    fused = 2 * 240 + 40 + 36
    assert runner.tensor_bytes(SMALL, "float32", False, "fused") == 4 * fused
    assert runner.tensor_bytes(SMALL, "float32", True, "unfused") == 2 * 4 * (fused + 720)

    slow = FakeDevice(flops=1e3)
    forward, generation = 1e3 * 2 * 2 * 6 * 130 / 1e3, 1e3 * 2 * 720 / 1e3
    for dtype, backward, generated, want in (
        ("float32", False, False, forward),
        ("float32", True, True, 3 * (forward + generation)),
        # Half precision speeds up matrix products only.
        ("bfloat16", False, True, forward + generation / 2),
        ("float64", False, True, 2 * (forward + generation)),
    ):
        for roofline in runner.rooflines(SMALL, dtype, backward, slow, generated=generated):
            assert roofline.ms == pytest.approx(want)
            assert roofline.bound == "arithmetic"


def test_the_cold_roofline_distinguishes_reads_from_writes():
    # A byte: 1 s read, 10 s written, 0.5 s copied.
    device = FakeDevice(read=1.0, write=0.1, copy=2.0)
    x = y = 4 * 240
    kernel, generator = 4 * 720, 4 * (40 + 36)
    for generated, arguments in ((False, x + kernel), (True, x + generator)):
        warm, cold = runner.rooflines(SMALL, "float32", False, device, generated=generated)
        assert cold == runner.Roofline(pytest.approx(1e3 * (arguments + 10 * y)), "memory")
        assert warm == runner.Roofline(pytest.approx(1e3 * (arguments + y) / 2), "memory")
        # The backward pass reads the output's gradient and writes those of the arguments.
        warm, cold = runner.rooflines(SMALL, "float32", True, device, generated=generated)
        read, written = 2 * arguments + y, y + arguments
        assert cold == runner.Roofline(pytest.approx(1e3 * (read + 10 * written)), "memory")
        assert warm == runner.Roofline(pytest.approx(1e3 * (read + written) / 2), "memory")
        # The copies have as many bytes as the tensors and their gradients.
        assert device.copied == [arguments + y, 2 * (arguments + y)]
        device.copied.clear()
    half, _ = runner.rooflines(SMALL, "bfloat16", False, device)
    assert half.ms == pytest.approx(1e3 * (x + kernel + y) / 2 / 2)


def test_one_roofline_can_be_arithmetic_and_the_other_memory():
    operations = 2 * 2 * 6 * 130
    tensors = 4 * (2 * 240 + 720)
    # Arithmetic takes 1 s, memory 2 s cold and 0.5 s warm.
    device = FakeDevice(tensors / 2, tensors / 2, 2 * tensors, flops=operations)
    warm, cold = runner.rooflines(SMALL, "float32", False, device)
    assert warm == runner.Roofline(pytest.approx(1e3), "arithmetic")
    assert cold == runner.Roofline(pytest.approx(2e3), "memory")


def test_the_warm_roofline_is_at_most_the_cold_one():
    device = FakeDevice(read=4.0, write=3.0, copy=2.0)
    warm, cold = runner.rooflines(SMALL, "float32", False, device)
    assert warm == cold
    assert cold.ms == pytest.approx(1e3 * (4 * 960 / 4 + 4 * 240 / 3))


ROW = runner.Row(
    case="small",
    candidate="compiled-taps",
    dtype="bfloat16",
    passes="forward+backward",
    batch=2,
    median_ms=12345.6789,
    half_iqr_ms=123.4567,
    runs=3,
    calls=2,
    roofline_warm_ms=1234.5678,
    x_roofline_warm=10.0,
    bound_warm="arithmetic",
    roofline_cold_ms=9876.54321,
    x_roofline_cold=1.25,
    bound_cold="memory",
    peak_mb=98765.43,
    tensors_mb=0.0096,
)


@pytest.mark.parametrize(
    ("changes", "end"),
    [
        ({}, " 1234.568  10.00 9876.543   1.25    mixed 98765.4"),
        ({"bound_warm": "memory", "peak_mb": None}, "   1.25   memory       -"),
        ({"bound_cold": "arithmetic"}, "   1.25   arith. 98765.4"),
    ],
    ids=["differ", "memory", "arithmetic"],
)
def test_lines_of_the_table(changes, end):
    *_, line = runner.format_row(dataclasses.replace(ROW, **changes))
    assert line.startswith("compiled-taps 12345.679 123.457")
    assert line.endswith(end)
    assert len(line) <= 80


def test_convolutions_have_no_roofline():
    fields = [f.name for f in dataclasses.fields(runner.Row) if "roofline" in f.name]
    empty = dict.fromkeys([*fields, "bound_warm", "bound_cold", "tensors_mb"])
    *_, line = runner.format_row(dataclasses.replace(ROW, **empty))
    assert line.split()[-6:] == ["-"] * 5 + ["98765.4"]
    assert len(line) == len(runner.format_row(ROW)[-1])


def test_rows_of_one_case_dtype_and_pass_have_one_heading():
    blank, heading, columns, line = runner.format_row(ROW)
    assert blank == ""
    assert heading == "small bfloat16 forward+backward, batch size 2"
    # Right-aligned columns end where those of a row do.
    assert len(columns) == len(line)
    for name, value in (("ms", "12345.679"), ("x cold", "1.25"), ("bound", "mixed")):
        assert columns.index(f" {name} ") + 1 + len(name) == line.index(value) + len(value)
    other = dataclasses.replace(ROW, candidate="native")
    assert len(runner.format_row(other, ROW)) == 1
    for change in ({"case": "red1"}, {"dtype": "float32"}, {"passes": "forward"}):
        assert len(runner.format_row(dataclasses.replace(ROW, **change), ROW)) == 4


def test_the_header_names_the_rates_and_columns(small, monkeypatch):
    device = FakeDevice(read=8.6e9, write=6.5e9, copy=42.3e9, flops=86e9)
    monkeypatch.setitem(devices.DEVICES, "cpu", device)
    lines = list(runner.header(small))
    assert all(len(line) <= 80 for line in lines)
    text = " ".join(line.strip() for line in lines)
    assert lines[0] == f"{BACKEND} on a fake"
    assert "cold: operands in memory, read at 8.6 GB/s and written at 6.5 GB/s" in lines
    # 4800 bytes, of the first case.
    assert "copies of the 0.0 MB of small: 42.3 GB/s, read plus written" in text
    assert device.copied == [4 * (2 * 240 + 720)]
    assert "arithmetic: float32 86 GFLOP/s" in lines
    for name in ("ms:", "+-:", "warm, cold:", "x warm, x cold:", "bound:", "mixed:", "MB:"):
        assert name in text


def test_the_csv_file_has_every_field_of_a_row():
    empty = dataclasses.replace(ROW, roofline_warm_ms=None, bound_warm=None, peak_mb=None)
    first, second = csv.DictReader(io.StringIO(runner.to_csv([ROW, empty])))
    for field in dataclasses.fields(runner.Row):
        value = getattr(ROW, field.name)
        got = type(value)(first[field.name])
        assert got == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value)
        if getattr(empty, field.name) is None:
            assert second[field.name] == ""


@pytest.mark.long
def test_memory_is_measured_in_a_subprocess(small):
    (case,) = (case for case in CASES if case.name == "red4")
    name = IMPLEMENTATIONS[0]
    peak = runner._peak_mb(case, name, "float32", True, devices.Cpu())
    tensors = runner.tensor_bytes(case, "float32", True, name) / 1e6
    if sys.platform != "linux":
        assert peak is None
    else:
        assert tensors / 2 < peak < 40 * tensors


@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="requires /proc/self/clear_refs"
)
def test_peak_memory_excludes_earlier_allocations(small):
    """There is no lower bound: this process may reuse freed memory."""
    (case,) = (case for case in CASES if case.name == "red2")
    for backward in (False, True):
        tensors = runner.tensor_bytes(case, "float32", backward, IMPLEMENTATIONS[0])
        assert tensors < devices.cpu.rss("VmRSS")
        peak = runner._peak_bytes(case, IMPLEMENTATIONS[0], "float32", backward, "cpu")
        assert 0 <= peak < 6 * tensors


def test_batch_of_the_plan_overrides_the_case(small):
    plan = dataclasses.replace(small, cases=("small",), candidates=("reference",), batch=3)
    rows = list(runner.run(plan))
    assert [row.batch for row in rows] == [3, 3]
    size = runner.tensor_bytes(dataclasses.replace(SMALL, batch=3), "float32", False, "taps")
    assert rows[0].tensors_mb == size / 1e6
