"""What `involution bench` measures, and that it refuses to measure what is wrong."""

import csv
import io
import os

import keras
import numpy as np
import pytest
from frameworks import BACKEND, IMPLEMENTATIONS, numpy

import involution
from involution import benchmark
from involution.errors import InputError
from involution.ops import api, taps
from involution.ops.cases import CASES, Case
from involution.programs import program

FUSED = ["fused"] if "native" in IMPLEMENTATIONS else []
SMALL = Case("small", 2, (5, 4), 6, 2, 3)
STRIDED = Case("strided", 1, (5, 4), 6, 2, 3, strides=2, group_layout="interleaved")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(benchmark, "CASES", (SMALL, STRIDED))
    return benchmark.Plan(cases=("small", "strided"), seconds=1e-6, calls=2)


def test_every_candidate_is_measured_forward_and_backward(small):
    told = []
    rows = list(benchmark.run(small, told.append))
    names = [
        n
        for n in benchmark.CANDIDATES
        if n in (*IMPLEMENTATIONS, *FUSED) or n not in dict((*api.IMPLEMENTATIONS, api.FUSED))
    ]
    expected = [
        (case, name, passes)
        for case in small.cases
        for passes in ("forward", "forward+backward")
        for name in names
    ]
    assert [(r.case, r.candidate, r.passes) for r in rows] == expected
    assert all(r.median_ms > 0 and r.runs >= 3 for r in rows)
    ours = [r for r in rows if r.candidate not in ("conv3", "depthwise")]
    assert all(r.times_limit == pytest.approx(r.median_ms / r.limit_ms) for r in ours)
    assert len(told) == 2 * (len(benchmark.CANDIDATES) - len(names))


def test_figures_are_written_with_what_made_them(small):
    rows = list(benchmark.run(small))
    table = list(csv.DictReader(io.StringIO(benchmark.to_csv(rows))))
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
        list(benchmark.run(small))


@pytest.mark.parametrize("case", [SMALL, STRIDED], ids=lambda case: case.name)
def test_the_formula_of_the_example_is_involution(case):
    function, arguments, _ = benchmark.candidate("patches", case, "float32")
    want = involution.ops.involution(*arguments, **case.arguments, implementation="reference")
    np.testing.assert_allclose(numpy(function(*arguments)), numpy(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cases": ("red1", "red9")}, "--cases must be some of tut,red1"),
        ({"candidates": ()}, "--candidates must be some of triton,native,taps"),
        ({"dtypes": ("int8",)}, "--dtypes must be some of float32"),
        ({"calls": 0}, "--calls must be at least 1"),
        ({"seconds": float("nan")}, "--seconds above 0"),
    ],
)
def test_unknown_names_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        benchmark.check(benchmark.Plan(**changes))


def test_the_limit_counts_what_meets_the_input():
    # Windows of 3 x 3 on 5 x 4 positions: (3 * 5 - 2) * (3 * 4 - 2) taps lie inside.
    assert benchmark._taps_inside(SMALL) == 13 * 10
    # x and y 2 * 5 * 4 * 6 numbers each, the kernel 2 * 5 * 4 * 9 * 2.
    assert benchmark.tensor_bytes(SMALL, "float32", False, "native") == 4 * (2 * 240 + 720)
    assert benchmark.tensor_bytes(SMALL, "bfloat16", True, "native") == 2 * 2 * (2 * 240 + 720)
    # One hidden channel: 2 * 5 * 4 of its numbers, 18 of the weight and as many of the bias.
    fused = 2 * 240 + 40 + 36
    assert benchmark.tensor_bytes(SMALL, "float32", False, "fused") == 4 * fused
    assert benchmark.tensor_bytes(SMALL, "float32", True, "two-steps") == 2 * 4 * (fused + 720)
    slow = benchmark.least_ms(SMALL, "float32", False, peak=1e3)
    assert slow == pytest.approx(1e3 * 2 * 2 * 6 * 130 / 1e3)
    slow = benchmark.least_ms(SMALL, "float32", True, peak=1e3, generating=True)
    assert slow == pytest.approx(3 * 1e3 * (2 * 2 * 6 * 130 + 2 * 720) / 1e3)


def test_memory_is_measured_in_a_process_of_its_own(small):
    (case,) = (case for case in CASES if case.name == "red4")
    peak = benchmark._in_fresh_process(case, IMPLEMENTATIONS[0], "float32", True)
    tensors = benchmark.tensor_bytes(case, "float32", True, IMPLEMENTATIONS[0]) / 1e6
    assert peak is None or tensors / 2 < peak < 40 * tensors


def test_peak_memory_leaves_out_what_was_there_before(small):
    """Measured here, where others have left memory that is used again: no lower bound."""
    if not os.path.exists("/proc/self/clear_refs"):
        return
    (case,) = (case for case in CASES if case.name == "red2")
    for backward in (False, True):
        tensors = benchmark.tensor_bytes(case, "float32", backward, IMPLEMENTATIONS[0]) / 1e6
        assert tensors < benchmark._resident("VmRSS") / 1e6
        peak = benchmark._peak_memory(case, IMPLEMENTATIONS[0], "float32", backward)
        assert 0 <= peak < 6 * tensors


def pure(function, x):
    """``function`` of NumPy arrays as an operation without effects, which compilers may merge."""
    if BACKEND == "jax":
        import jax

        return jax.pure_callback(function, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.numpy_function(function, [x], x.dtype, stateful=False)
    return keras.ops.convert_to_tensor(function(numpy(x)))


def test_a_program_makes_as_many_calls_as_it_says():
    calls = []

    def count(x):
        calls.append(1)
        return np.asarray(x) * 2

    x = keras.ops.ones((3,), "float32")
    run = program(lambda x: pure(count, x), [x], calls=5)
    (y,) = run()
    np.testing.assert_allclose(numpy(y), 2.0)
    calls.clear()
    run()
    assert len(calls) == 5


def test_a_program_gives_the_output_and_all_gradients():
    a, b, c = (keras.ops.convert_to_tensor([n], "float32") for n in (2.0, 3.0, 10.0))
    results = program(lambda a, b: a * b, [a, b], cotangent=c, calls=3)()
    assert [float(numpy(r)[0]) for r in results] == pytest.approx([6.0, 30.0, 20.0])
