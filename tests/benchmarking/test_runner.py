"""What `involution bench` measures, and that it refuses to measure what is wrong."""

import csv
import dataclasses
import functools
import io
import os

import keras
import numpy as np
import pytest

from involution.benchmarking import devices, runner
from involution.benchmarking.timed_program import program
from involution.ops import dispatch, taps
from involution.ops.cases import CASES, Case
from involution.utils.errors import InputError
from tests.support.backends import BACKEND, IMPLEMENTATIONS, numpy

FUSED = ["fused"] if "native" in IMPLEMENTATIONS else []
ELSEWHERE = {"per-number"} if BACKEND == "torch" else {"per-number", "compiled-taps"}
SMALL = Case("small", 2, (5, 4), 6, 2, 3)
STRIDED = Case("strided", 1, (5, 4), 6, 2, 3, strides=2, group_layout="interleaved")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(runner, "CASES", (SMALL, STRIDED))
    return runner.Plan(cases=("small", "strided"), seconds=1e-6, calls=2)


def test_every_candidate_is_measured_forward_and_backward(small):
    # PyTorch's compiler takes half a minute a case, so compiled-taps is measured on one case.
    others = tuple(n for n in runner.CANDIDATES if n != runner.COMPILED_TAPS)
    for case, candidates in (("small", runner.CANDIDATES), ("strided", others)):
        messages = []
        plan = dataclasses.replace(small, cases=(case,), candidates=candidates)
        rows = list(runner.run(plan, messages.append))
        names = [
            n
            for n in candidates
            if n in (*IMPLEMENTATIONS, *FUSED) or n not in (*dispatch.IMPLEMENTATIONS, *ELSEWHERE)
        ]
        expected = [(case, n, passes) for passes in ("forward", "forward+backward") for n in names]
        assert [(r.case, r.candidate, r.passes) for r in rows] == expected
        assert all(r.median_ms > 0 and r.runs >= 3 for r in rows)
        ours = [r for r in rows if r.candidate not in ("conv3", "depthwise")]
        assert all(r.times_limit == pytest.approx(r.median_ms / r.limit_ms) for r in ours)
        # One message for each unavailable candidate.
        assert len(messages) == len(candidates) - len(names)


def test_figures_are_written_with_what_made_them(small):
    rows = list(runner.run(dataclasses.replace(small, candidates=("taps", "conv3"))))
    table = list(csv.DictReader(io.StringIO(runner.to_csv(rows))))
    assert [row["candidate"] for row in table] == [row.candidate for row in rows]
    for row in table:
        assert row["backend"] == BACKEND
        assert f"keras={keras.__version__}" in row["versions"]
        assert "processors" in row["device"]
        assert row["date"]


def test_what_is_wrong_gets_no_figure(small, monkeypatch):
    right = taps.apply
    monkeypatch.setattr(taps, "apply", lambda *arguments: right(*arguments) * 1.01)
    with pytest.raises(RuntimeError, match="small taps float32 is wrong, so it has no speed"):
        list(runner.run(small))


@pytest.mark.parametrize("case", [SMALL, STRIDED], ids=lambda case: case.name)
def test_the_formula_of_the_example_is_involution(case):
    tried = runner.candidate("patches", case, "float32")
    have, want = tried.function(*tried.arguments), tried.reference(*tried.arguments)
    np.testing.assert_allclose(numpy(have), numpy(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cases": ("red1", "red9")}, "--cases must be some of tut,red1"),
        ({"candidates": ()}, "--candidates must be some of triton,native,taps"),
        ({"dtypes": ("int8",)}, "--dtypes must be some of float32"),
        ({"device": "gpu"}, "--device must be one of cpu, cuda. Received: gpu"),
        ({"batch": 0}, "--batch must be at least 1. Received: 0"),
        ({"calls": 0}, "--calls must be at least 1"),
        ({"seconds": float("nan")}, "--seconds above 0"),
    ],
)
def test_unknown_names_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        runner.check(runner.Plan(**changes))


def test_what_is_usual_is_known_and_a_folder_is_no_file(tmp_path):
    for device, names in runner.USUAL.items():
        assert device in devices.DEVICES
        assert set(names) <= set(runner.CANDIDATES)
    with pytest.raises(InputError, match=rf"must be a file in a folder .* Received: {tmp_path}"):
        runner.check(runner.Plan(), tmp_path)


def test_the_limit_counts_what_meets_the_input():
    # Windows of 3 x 3 on 5 x 4 positions: (3 * 5 - 2) * (3 * 4 - 2) taps lie inside.
    assert runner._taps_inside(SMALL) == 13 * 10
    # x and y 2 * 5 * 4 * 6 numbers each, the kernel 2 * 5 * 4 * 9 * 2.
    assert runner.tensor_bytes(SMALL, "float32", False, "native") == 4 * (2 * 240 + 720)
    assert runner.tensor_bytes(SMALL, "bfloat16", True, "native") == 2 * 2 * (2 * 240 + 720)
    # One hidden channel: 2 * 5 * 4 of its numbers, 18 of the weight and as many of the bias.
    fused = 2 * 240 + 40 + 36
    assert runner.tensor_bytes(SMALL, "float32", False, "fused") == 4 * fused
    assert runner.tensor_bytes(SMALL, "float32", True, "two-steps") == 2 * 4 * (fused + 720)

    class Slow(devices.Processor):
        def peak(self, dtype):
            return {"float32": 1e3, "bfloat16": 2e3, "float64": 5e2}[dtype]

    forward, generating = 1e3 * 2 * 2 * 6 * 130 / 1e3, 1e3 * 2 * 720 / 1e3
    for dtype, backward, made, want in (
        ("float32", False, False, forward),
        ("float32", True, True, 3 * (forward + generating)),
        # Products of matrices alone are faster of half types.
        ("bfloat16", False, True, forward + generating / 2),
        ("float64", False, True, 2 * (forward + generating)),
    ):
        slow = runner.least_ms(SMALL, dtype, backward, Slow(), generating=made)
        assert slow == pytest.approx(want)


def test_memory_is_measured_in_a_process_of_its_own(small):
    (case,) = (case for case in CASES if case.name == "red4")
    name = IMPLEMENTATIONS[0]
    peak = runner._peak_mb(case, name, "float32", True, devices.Processor())
    tensors = runner.tensor_bytes(case, "float32", True, name) / 1e6
    assert peak is None or tensors / 2 < peak < 40 * tensors


def test_peak_memory_leaves_out_what_was_there_before(small):
    """Measured here, where others have left memory that is used again: no lower bound."""
    if not os.path.exists("/proc/self/clear_refs"):
        return
    (case,) = (case for case in CASES if case.name == "red2")
    for backward in (False, True):
        tensors = runner.tensor_bytes(case, "float32", backward, IMPLEMENTATIONS[0])
        assert tensors < devices.resident("VmRSS")
        peak = runner._peak_bytes(case, IMPLEMENTATIONS[0], "float32", backward, "cpu")
        assert 0 <= peak < 6 * tensors


def test_another_batch_may_be_asked_for(small):
    plan = dataclasses.replace(small, cases=("small",), candidates=("reference",), batch=3)
    rows = list(runner.run(plan))
    assert [row.batch for row in rows] == [3, 3]
    sizes = runner.tensor_bytes(dataclasses.replace(SMALL, batch=3), "float32", False, "taps")
    assert rows[0].tensors_mb == sizes / 1e6


def pure(function, x):
    """``function`` of NumPy arrays as an operation without effects, which compilers may merge."""
    if BACKEND == "jax":
        import jax

        return jax.pure_callback(function, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.numpy_function(function, [x], x.dtype, stateful=False)
    return keras.ops.convert_to_tensor(function(numpy(x)))


@pytest.mark.parametrize(
    ("use", "number", "want"),
    [
        (lambda count, x: pure(count, x), 1, 2.0),
        # What is made of one argument alone is not taken out of the repetition.
        (lambda count, x, other: x + pure(count, other), 2, 3.0),
    ],
    ids=["whole", "part"],
)
def test_a_program_makes_as_many_calls_as_it_says(use, number, want):
    calls = []

    def count(x):
        calls.append(1)
        return np.asarray(x) * 2

    x = keras.ops.ones((3,), "float32")
    run = program(functools.partial(use, count), [x] * number, calls=5)
    (y,) = run()
    np.testing.assert_allclose(numpy(y), want)
    calls.clear()
    run()
    assert len(calls) == 5


def test_a_program_gives_the_output_and_all_gradients():
    a, b, c = (keras.ops.convert_to_tensor([n], "float32") for n in (2.0, 3.0, 10.0))
    results = program(lambda a, b: a * b, [a, b], cotangent=c, calls=3)()
    assert [float(numpy(r)[0]) for r in results] == pytest.approx([6.0, 30.0, 20.0])
