"""Measurements of `involution bench`, and its verification of candidates."""

import csv
import dataclasses
import functools
import io
import os

import keras
import numpy as np
import pytest

from involution.benchmarking import devices, runner
from involution.benchmarking.timed_program import repeat
from involution.ops import dispatch, taps
from involution.ops.cases import CASES, Case
from involution.utils.errors import InputError
from tests.support.backends import BACKEND, IMPLEMENTATIONS, numpy

pytestmark = pytest.mark.any_backend

FUSED = ["fused"] if "native" in IMPLEMENTATIONS else []
UNAVAILABLE = {"paper-cuda"} if BACKEND == "torch" else {"paper-cuda", "compiled-taps"}
SMALL = Case.of("small", 2, (5, 4), 6, 2, 3)
STRIDED = Case.of("strided", 1, (5, 4), 6, 2, 3, strides=2, group_layout="interleaved")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(runner, "CASES", (SMALL, STRIDED))
    return runner.Plan(cases=("small", "strided"), seconds=1e-6, calls=2)


@pytest.mark.long
def test_every_candidate_is_measured_forward_and_backward(small):
    # torch.compile takes 30 s per case, so compiled-taps is measured on one case.
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
        expected = [(case, n, passes) for passes in ("forward", "forward+backward") for n in names]
        assert [(r.case, r.candidate, r.passes) for r in rows] == expected
        assert all(r.median_ms > 0 and r.runs >= 3 for r in rows)
        involutions = [r for r in rows if r.candidate not in ("conv3", "depthwise")]
        assert all(r.x_roofline == pytest.approx(r.median_ms / r.roofline_ms) for r in involutions)
        # One message for each unavailable candidate.
        assert len(messages) == len(candidates) - len(names)


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

    class SlowCpu(devices.Cpu):
        def peak(self, dtype):
            return {"float32": 1e3, "bfloat16": 2e3, "float64": 5e2}[dtype]

    forward, generation = 1e3 * 2 * 2 * 6 * 130 / 1e3, 1e3 * 2 * 720 / 1e3
    for dtype, backward, generated, want in (
        ("float32", False, False, forward),
        ("float32", True, True, 3 * (forward + generation)),
        # Half precision speeds up matrix products only.
        ("bfloat16", False, True, forward + generation / 2),
        ("float64", False, True, 2 * (forward + generation)),
    ):
        roofline = runner.roofline_ms(SMALL, dtype, backward, SlowCpu(), generated=generated)
        assert roofline == pytest.approx(want)


@pytest.mark.long
def test_memory_is_measured_in_a_subprocess(small):
    (case,) = (case for case in CASES if case.name == "red4")
    name = IMPLEMENTATIONS[0]
    peak = runner._peak_mb(case, name, "float32", True, devices.Cpu())
    tensors = runner.tensor_bytes(case, "float32", True, name) / 1e6
    assert peak is None or tensors / 2 < peak < 40 * tensors


@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="requires /proc/self/clear_refs"
)
def test_peak_memory_excludes_earlier_allocations(small):
    """There is no lower bound: this process may reuse freed memory."""
    (case,) = (case for case in CASES if case.name == "red2")
    for backward in (False, True):
        tensors = runner.tensor_bytes(case, "float32", backward, IMPLEMENTATIONS[0])
        assert tensors < devices.rss("VmRSS")
        peak = runner._peak_bytes(case, IMPLEMENTATIONS[0], "float32", backward, "cpu")
        assert 0 <= peak < 6 * tensors


def test_batch_of_the_plan_overrides_the_case(small):
    plan = dataclasses.replace(small, cases=("small",), candidates=("reference",), batch=3)
    rows = list(runner.run(plan))
    assert [row.batch for row in rows] == [3, 3]
    size = runner.tensor_bytes(dataclasses.replace(SMALL, batch=3), "float32", False, "taps")
    assert rows[0].tensors_mb == size / 1e6


def pure(function, x):
    """``function`` of NumPy arrays as a pure operation, which compilers may deduplicate."""
    if BACKEND == "jax":
        import jax

        return jax.pure_callback(function, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.numpy_function(function, [x], x.dtype, stateful=False)
    return keras.ops.convert_to_tensor(function(numpy(x)))


@pytest.mark.parametrize(
    ("use", "argument_count", "want"),
    [
        (lambda count, x: pure(count, x), 1, 2.0),
        # An operation on `other` alone is not hoisted out of the loop.
        (lambda count, x, other: x + pure(count, other), 2, 3.0),
    ],
    ids=["one-argument", "two-arguments"],
)
def test_repeat_executes_every_call(use, argument_count, want):
    calls = []

    def count(x):
        calls.append(1)
        return np.asarray(x) * 2

    x = keras.ops.ones((3,), "float32")
    run = repeat(functools.partial(use, count), [x] * argument_count, calls=5)
    (y,) = run()
    np.testing.assert_allclose(numpy(y), want)
    calls.clear()
    run()
    assert len(calls) == 5


def test_repeat_returns_the_output_and_all_gradients():
    a, b, c = (keras.ops.convert_to_tensor([n], "float32") for n in (2.0, 3.0, 10.0))
    results = repeat(lambda a, b: a * b, [a, b], cotangent=c, calls=3)()
    assert [float(numpy(r)[0]) for r in results] == pytest.approx([6.0, 30.0, 20.0])
