"""The native core: its kernels on every target, its threads, and what it rejects."""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import platform
import re
import signal
import threading
import time

import keras
import numpy as np
import pytest

import involution
from involution.ops.autodiff import FORWARD, INPUT_GRAD, KERNEL_GRAD
from involution.ops.native import library as native_library
from tests.support import native_core
from tests.support.backends import (
    BACKEND,
    assert_equals_oracle,
    fresh_process,
    grad,
    gradients,
    in_graph,
    native_missing_reason,
    numpy,
    operation,
    requires_native,
    tensors,
)
from tests.support.memory import on_linux, peak_memory
from tests.support.native_core import DTYPES, each_target, without_outputs
from tests.support.oracle import Call, error_bound, random_calls, with_non_finite
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.any_backend,
    requires_native,
]

TARGETS = native_library.targets()
PASSES = tuple(native_core.ARGUMENTS)


each_half = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


# --- Values ---------------------------------------------------------------------------------------


@functools.cache
def random_call_values(dtype):
    """Random calls with their arrays, and for each pass the expected result and error bound."""
    cases = []
    for call in random_calls(96, seed=8):
        arrays = [a.astype(dtype) for a in call.arrays(seed=8)]
        exact = [a.astype("float64") for a in arrays]
        magnitudes = native_core.expected(call, *map(np.abs, exact))
        bounds = {}
        for pass_, truth in native_core.expected(call, *exact).items():
            terms = call.channels // call.groups if pass_ == KERNEL_GRAD else call.taps
            if pass_ == INPUT_GRAD:
                terms *= math.prod(call.upsampling or ())
            bounds[pass_] = truth, error_bound(truth, magnitudes[pass_], terms, dtype)
        cases.append((call, arrays, bounds))
    return cases


@pytest.mark.long
@each_target
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_output_and_gradients_of_random_calls(dtype, target):
    for call, arrays, bounds in random_call_values(dtype):
        for pass_, value in native_core.results(call, *arrays).items():
            truth, bound = bounds[pass_]
            assert (np.abs(value - truth) <= bound).all(), (pass_, call)


# Below, at and above the lanes of every vector, with all kinds of remainders.
CHANNELS_OF_A_GROUP = (1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 24, 32, 33, 48, 64, 130)
GROUPS = (1, 2, 3, 4, 5, 8, 16, 32)
ROWS = (1, 2, 3, 5, 7, 9, 15, 17, 33, 50)
WINDOWS = (1, 2, 3, 4, 5, 6, 7, 8)


def wide_call(random, channels_per_group, groups, row, window, group_layout, data_format):
    def choose(*values, count):
        return tuple(int(n) for n in random.choice(values, count))

    # Long rows and windows have one dimension: the oracle is slow.
    rank = 1 if row * window > 40 else int(random.integers(1, 4))
    return Call(
        batch=int(random.integers(1, 3)),
        sizes=(*choose(1, 2, 3, count=rank - 1), row),
        channels=channels_per_group * groups,
        kernel_size=(*choose(1, 2, 3, count=rank - 1), window),
        strides=choose(1, 1, 2, 3, count=rank),
        padding=str(random.choice(["same", "same", "symmetric", "valid"])),
        dilation_rate=choose(1, 1, 2, 3, count=rank),
        groups=groups,
        group_layout=group_layout,
        data_format=data_format,
    )


@functools.cache
def wide_calls():
    """Calls with arrays and expected results, for all channels per group and numbers of groups."""
    random = np.random.default_rng(9)
    kinds = itertools.product(
        (pair for pair in itertools.product(CHANNELS_OF_A_GROUP, GROUPS) if np.prod(pair) <= 640),
        ("contiguous", "interleaved"),
        ("channels_last", "channels_first"),
    )
    cases = []
    for (channels_per_group, groups), *kind in kinds:
        row, window = int(random.choice(ROWS)), int(random.choice(WINDOWS))
        draws = (
            wide_call(random, channels_per_group, groups, row, window, *kind)
            for _ in itertools.count()
        )
        call = next(c for c in draws if min(c.output_sizes, default=0) >= 1 and c.taps <= 24)
        arrays = native_core.exact_values(call.arrays(seed=len(cases)))
        cases.append((call, arrays, native_core.expected(call, *arrays)))
    return cases


@pytest.mark.long
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("group_layout", ["contiguous", "interleaved"])
def test_wide_calls_cover_every_row_window_step_and_rank(group_layout, data_format):
    kind = group_layout, data_format
    calls = [c for c, _, _ in wide_calls() if (c.group_layout, c.data_format) == kind]
    assert {c.sizes[-1] for c in calls} == set(ROWS)
    assert {c.kernel_size[-1] for c in calls} == set(WINDOWS)
    assert {c.strides[-1] for c in calls} == {1, 2, 3}
    assert {c.dilation_rate[-1] for c in calls} == {1, 2, 3}
    assert {len(c.sizes) for c in calls} == {1, 2, 3}


def assert_same(value, truth, what):
    """Exact equality with the rounded truth, except for the sign of zero."""
    rounded = truth.astype(value.dtype).astype("float64")
    np.testing.assert_array_equal(value.astype("float64"), rounded, err_msg=str(what))


@pytest.mark.long
@each_target
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_calls_equal_the_oracle(dtype, target):
    for call, arrays, truths in wide_calls():
        values = native_core.results(call, *(a.astype(DTYPES[dtype]) for a in arrays), threads=3)
        for pass_, truth in truths.items():
            assert_same(values[pass_], truth, (pass_, call))


@pytest.mark.parametrize("dtype", DTYPES)
def test_binding_equals_the_oracle(dtype):
    """A sample of the wide calls: XLA compiles each."""
    first = list(DTYPES).index(dtype)
    for call, arrays, truths in wide_calls()[first::61]:
        # The casts are exact in both directions, and so are their gradients.
        def in_dtype(x, kernel, call=call):
            y = operation(call, "native")(*(keras.ops.cast(a, dtype) for a in (x, kernel)))
            return keras.ops.cast(y, "float64")

        values = numpy(in_dtype(*arrays[:2])), *gradients(in_dtype, arrays[:2], arrays[2])
        for value, (pass_, truth) in zip(values, truths.items(), strict=True):
            assert_same(value, truth.astype(DTYPES[dtype]).astype("float64"), (pass_, call))


@pytest.mark.long
@each_target
def test_f20_non_finite_values_propagate_as_in_the_formula(target):
    """Including those of kernel taps and output gradients that meet only padding."""
    propagated = dict.fromkeys(PASSES, 0)
    for n, (call, arrays, _) in enumerate(wide_calls()[::9]):
        for which in range(3):
            mixed = list(arrays)
            (mixed[which],) = with_non_finite([arrays[which]], seed=n, count=1 + n % 2)
            values = native_core.results(call, *(a.astype("float32") for a in mixed), threads=2)
            for pass_, truth in native_core.expected(call, *mixed).items():
                assert_same(values[pass_], truth, (pass_, which, call))
                propagated[pass_] += np.isnan(truth).any() and not np.isnan(truth).all()
    assert min(propagated.values()) > 30


# All windows contain only padding: the input is empty, or lies between the taps.
PADDING_ONLY = [
    Call(2, (0,), 6, (3,), (1,), ((2, 1),), (1,), 2),
    Call(2, (0,), 8, (3,), (2,), ((4, 4),), (1,), 8, "interleaved"),
    Call(1, (0, 9), 12, (3, 3), (1, 1), ((2, 2), (1, 1)), (1, 1), 3),
    Call(2, (5, 0), 17, (2, 3), (2, 1), ((1, 1), (3, 3)), (1, 1), 1, "interleaved"),
    Call(1, (3, 0, 2), 6, (1, 2, 3), (1, 1, 2), ((0, 0), (1, 2), (2, 2)), (1, 1, 1), 2),
    Call(1, (0, 0, 7), 4, (2, 2, 3), (1, 1, 1), ((1, 1), (1, 1), (2, 1)), (1, 1, 1), 4),
    Call(2, (1, 5), 6, (2, 3), (1, 1), ((4, 4), (1, 1)), (8, 1), 3),
]
PADDING_ONLY += [dataclasses.replace(call, data_format="channels_first") for call in PADDING_ONLY]


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
def test_f13_windows_of_padding_only_give_zeros(dtype, target):
    for call in PADDING_ONLY:
        arrays = [a.astype(DTYPES[dtype]) for a in call.arrays()]
        for pass_, value in native_core.results(call, *arrays, threads=2).items():
            assert not value.any(), (pass_, call)
        # Non-finite values give NaN there, as products with 0.
        arrays = with_non_finite(call.arrays(), count=2)
        values = native_core.results(call, *arrays)
        for pass_, truth in native_core.expected(call, *arrays).items():
            assert_same(values[pass_], truth, (pass_, call))


def struct_fields():
    """(name, number of integers) of the fields of ``InvolutionParams`` in ``csrc/params.h``."""
    text = (ROOT / "csrc" / "params.h").read_text()
    text = re.sub("//.*", "", text)
    body = re.search(r"struct InvolutionParams \{(.*?)\n\};", text, re.DOTALL).group(1)
    declarations = re.findall(r"^  (\S+) (\w+)(?:\[(\d+)\])?;", body, re.MULTILINE)
    assert {kind for kind, _, _ in declarations} == {"std::int64_t"}
    assert len(declarations) == body.count(";")
    return [(name, int(count or 1)) for _, name, count in declarations]


def test_params_mirror_the_struct_of_the_core():
    fields = dataclasses.fields(native_core.params.Params)
    spatial = native_core.params.Spatial
    assert struct_fields() == [
        (field.name.removesuffix("_"), 3 if field.type == spatial else 1) for field in fields
    ]


def test_params_are_encoded_in_the_order_of_their_fields():
    encoded = list(range(sum(count for _, count in struct_fields())))
    decoded = native_core.params.Params.decode(encoded)
    assert decoded.encode() == encoded
    flat = []
    for value in dataclasses.astuple(decoded):
        flat += value if isinstance(value, tuple) else [value]
    assert flat == encoded


def test_f13_input_gradient_without_outputs_is_zero():
    """In a traced program an output size may be 0, so that nothing reads the input."""
    call = Call(2, (5,), 6, (3,), (1,), "valid", (1,), 2)
    encoded = native_core.params.encode(
        INPUT_GRAD, native_core.Window(**call.arguments), call.sizes, *call.arrays()[1:]
    )
    encoded = without_outputs(encoded)
    dx, empty = np.full(call.x_shape, np.nan), np.zeros(0)
    addresses = (a.ctypes.data for a in (empty, empty, dx))
    native_library.execute(encoded, call.batch, 2, *addresses)
    assert not dx.any()


def every_pattern(dtype):
    return np.arange(2**16, dtype="uint16").view(DTYPES[dtype])


def is_nan(values):
    # NumPy warns about some bfloat16 values.
    with np.errstate(invalid="ignore"):
        return np.isnan(values)


def product(patterns, factor, channels, data_format):
    """Multiplies each number by the factor, with an involution whose window is one position."""
    shape = (1, -1, channels) if data_format == "channels_last" else (1, channels, -1)
    x = patterns.reshape(shape)
    positions = patterns.size // channels
    call = Call(1, (positions,), channels, (1,), (1,), "same", (1,), 1, "contiguous", data_format)
    kernel = np.full(call.kernel_shape, factor, x.dtype)
    return native_core.execute(FORWARD, call, x, kernel, threads=2).ravel()


# Vectors across positions, vectors across channels, and transposing copies.
HALF_LAYOUTS = [(1, "channels_last"), (64, "channels_last"), (64, "channels_first")]


@each_target
@each_half
@pytest.mark.parametrize(("channels", "data_format"), HALF_LAYOUTS)
def test_f08_every_half_precision_value_is_preserved(channels, data_format, dtype, target):
    patterns = every_pattern(dtype)
    y = product(patterns, 1, channels, data_format)
    nan = is_nan(patterns)
    assert (is_nan(y) == nan).all()
    # A sum starts at +0, and +0 + -0 is +0.
    bits = patterns.view("uint16")
    expected = np.where(bits == 0x8000, 0, bits)
    np.testing.assert_array_equal(y.view("uint16")[~nan], expected[~nan])


@each_target
@each_half
@pytest.mark.parametrize(("channels", "data_format"), HALF_LAYOUTS)
def test_f08_rounds_to_nearest_even(channels, data_format, dtype, target):
    """As in NumPy, with subnormal results and overflow to infinity."""
    patterns = every_pattern(dtype)
    tie = 1.5 if dtype == "float16" else 1.0078125
    for factor in (tie, 1 / 3, 3, 2.0**-9, 1.5 * 2.0**-13, 2.0**10 * tie, 60000):
        factor = DTYPES[dtype](factor)
        with np.errstate(over="ignore", invalid="ignore"):
            exact = patterns.astype("float32") * np.float32(factor)
            expected = (exact + np.float32(0)).astype(DTYPES[dtype])
        y = product(patterns, factor, channels, data_format)
        nan = is_nan(expected)
        assert (is_nan(y) == nan).all()
        np.testing.assert_array_equal(y.view("uint16")[~nan], expected.view("uint16")[~nan])


# --- Targets --------------------------------------------------------------------------------------


@on_linux
def test_targets_match_the_processor():
    flags = set(pathlib.Path("/proc/cpuinfo").read_text().split())
    expected = ["plain"]
    if platform.machine() == "x86_64" and flags >= {"avx2", "fma"}:
        expected.append("avx2")
        if flags >= {"avx512f", "avx512bw", "avx512vl", "avx512dq"}:
            expected.append("avx512")
    assert expected == TARGETS


def roundings():
    """Sums, as text, that depend on whether multiply-adds round once (FMA) or twice."""
    call = Call(1, (64,), 16, (9,), (1,), "same", (1,))
    x, kernel, _ = (a.astype("float32") for a in call.arrays())
    return native_core.execute(FORWARD, call, x, kernel).tobytes().hex()


@pytest.mark.long
def test_environment_variable_selects_the_target(pool):
    expected = {}
    for name in TARGETS:
        native_library.set_target(name)
        expected[name] = roundings()
    # The loop ends at the last target, the default. A single target leaves nothing to compare.
    assert len(TARGETS) == 1 or expected["plain"] != expected[TARGETS[-1]]
    assert pool["roundings"] == expected["plain"]


def load():
    """Loads the core as a new process would."""
    return native_library._load()


def test_unknown_target_is_a_reason(monkeypatch):
    monkeypatch.setenv("INVOLUTION_INSTRUCTIONS", "sse9")
    core_and_reason = load()
    monkeypatch.setattr(native_library, "core", lambda: core_and_reason)
    x, kernel = keras.KerasTensor((1, 5, 8)), keras.KerasTensor((1, 5, 3, 1))
    assert dict(involution.ops.implementations(x, kernel, 3))["native"] == (
        f"INVOLUTION_INSTRUCTIONS must be one of {', '.join(TARGETS)} here. Received: sse9"
    )


# --- Availability ---------------------------------------------------------------------------------


def test_native_is_selected_for_every_kind_of_call():
    kinds = itertools.product(
        (1, 2, 3), DTYPES, ("contiguous", "interleaved"), ("channels_last", "channels_first")
    )
    count = 0
    for rank, dtype, group_layout, data_format in kinds:
        call = Call(
            2,
            (7,) * rank,
            12,
            (3,) * rank,
            (2,) * rank,
            "same",
            (1,) * rank,
            3,
            group_layout,
            data_format,
        )
        x, kernel = tensors(call.arrays()[:2], dtype)
        reasons = involution.ops.implementations(x, kernel, **call.arguments)
        name = next(name for name, reason in reasons if reason is None)
        print(f"{BACKEND}, rank {rank}, {dtype}, {group_layout}, {data_format}: {name}")
        assert name == "native"
        count += 1
    assert count == 48


def load_with_files(monkeypatch, **files):
    """Loads the core of a package that has only these files."""
    names = {"libinvolution": "libinvolution.so", "missing": "missing.txt"}
    paths = {names[name]: file for name, file in files.items()}
    monkeypatch.setattr(native_library, "find", paths.get)
    return load()


def test_missing_core_has_the_recorded_reason(monkeypatch, tmp_path):
    (tmp_path / "missing.txt").write_text("no C++ compiler was found\n")
    library, reason = load_with_files(monkeypatch, missing=tmp_path / "missing.txt")
    assert library is None
    assert reason == "the package was installed without it: no C++ compiler was found"


def test_core_that_was_never_built_has_a_reason(monkeypatch):
    assert load_with_files(monkeypatch) == (
        None,
        "the package was installed without it: it was not built",
    )


def test_broken_core_is_not_missing(monkeypatch, tmp_path):
    """Its tests fail and are not skipped, even if an earlier installation recorded a reason."""
    (tmp_path / "missing.txt").write_text("no C++ compiler was found\n")
    (tmp_path / "libinvolution.so").write_text("no library")
    files = {"libinvolution": tmp_path / "libinvolution.so", "missing": tmp_path / "missing.txt"}
    library, reason = load_with_files(monkeypatch, **files)
    assert library is None
    assert reason.startswith("its library cannot be loaded: ")
    monkeypatch.setattr(native_library, "core", lambda: (library, reason))
    assert native_missing_reason() is None


def test_backend_without_a_binding_is_a_reason(monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "numpy")
    call = Call(1, (5,), 2, (3,), (1,), "same", (1,))
    x, kernel = (keras.KerasTensor(a.shape) for a in call.arrays()[:2])
    reasons = dict(involution.ops.implementations(x, kernel, 3))
    assert reasons["native"] == "it has no binding for the backend numpy"


# --- Absurd arguments -----------------------------------------------------------------------------

LINE = Call(1, (5,), 4, (3,), (1,), "same", (1,), 2)
ABSURD = [
    dataclasses.replace(LINE, dilation_rate=(2**58,)),
    dataclasses.replace(LINE, dilation_rate=(2**58,), strides=(2**59,)),
    dataclasses.replace(LINE, padding=((2**60, 2**60),), strides=(2**60,)),
    dataclasses.replace(LINE, padding=((2**59, 5),), strides=(2**59 - 1,), kernel_size=(2,)),
    dataclasses.replace(LINE, kernel_size=(2001,)),
    dataclasses.replace(LINE, kernel_size=(301,), dilation_rate=(2**50,), padding="symmetric"),
]
each_absurd = pytest.mark.parametrize("call", ABSURD)


@each_absurd
def test_f12_absurd_windows_and_steps(call):
    x, kernel, dy = call.arrays()
    truths = native_core.expected(call, x, kernel, dy)
    apply = operation(call, "native")
    values = numpy(apply(*tensors((x, kernel), "float64"))), *gradients(apply, (x, kernel), dy)
    for value, (pass_, truth) in zip(values, truths.items(), strict=True):
        np.testing.assert_allclose(value, truth, rtol=0, atol=1e-12, err_msg=pass_)


@each_target
@pytest.mark.parametrize("padding", ["same", "symmetric", ((40, 44),)])
@pytest.mark.parametrize(
    ("channels", "groups", "group_layout", "data_format"),
    [
        (3, 1, "contiguous", "channels_last"),
        (8, 2, "contiguous", "channels_last"),
        (8, 4, "interleaved", "channels_last"),
        (6, 3, "contiguous", "channels_first"),
    ],
)
def test_f12_windows_wider_than_the_input(
    target, channels, groups, group_layout, data_format, padding
):
    """For every vector axis, with taps just inside, just outside and far outside the input."""
    for n, kernel_size, rate in itertools.product((4, 5, 33), (2, 3), (3, 4, 5, 6, 11, 32, 40)):
        for strides in (1, 2):
            call = Call(
                1,
                (n,),
                channels,
                (kernel_size,),
                (strides,),
                padding,
                (rate,),
                groups,
                group_layout,
                data_format,
            )
            arrays = call.arrays()
            for pass_, truth in native_core.expected(call, *arrays).items():
                value = native_core.execute(pass_, call, *native_core.ARGUMENTS[pass_](*arrays))
                np.testing.assert_allclose(value, truth, rtol=0, atol=1e-12, err_msg=f"{call}")


@on_linux
@each_absurd
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_f12_absurd_arguments_take_neither_memory_nor_time(data_format, call):
    call = dataclasses.replace(call, data_format=data_format)
    arrays = call.arrays()
    native_core.results(call, *arrays)
    peak_memory()
    before, start = peak_memory(), time.perf_counter()
    native_core.results(call, *arrays)
    assert time.perf_counter() - start < 0.5
    assert peak_memory() - before < 5 * sum(a.nbytes for a in arrays) + 2e6


@pytest.mark.parametrize(
    ("name", "value"),
    [("dilation_rate", 2**60), ("strides", 2**60 + 1), ("padding", ((2**60 + 1, 0),))],
)
def test_f12_steps_beyond_64_bits_are_a_reason(name, value):
    arguments = {"kernel_size": 3, "strides": 2**60, "padding": "same", name: value}
    # Unknown size: for a known one, steps would be clamped.
    x, kernel = keras.KerasTensor((1, None, 2)), keras.KerasTensor((1, None, 3, 1))
    reasons = dict(involution.ops.implementations(x, kernel, **arguments))
    assert reasons["native"] == (
        f"a window's extent, stride, padding or upsampling exceeds {2**60}"
    )


@pytest.mark.parametrize("dilation_rate", [2**60, 2**62, 2**63, 2**64])
def test_f12_window_of_one_position_ignores_dilation(dilation_rate):
    call = Call(1, (5,), 4, (1,), (1,), ((3, 3),), (dilation_rate,), 2)
    x, kernel = tensors(call.arrays()[:2], "float64")
    assert_equals_oracle(call, operation(call, None)(x, kernel), x, kernel)


@each_target
@pytest.mark.parametrize("pass_", [FORWARD, KERNEL_GRAD])
def test_f11_taps_two_to_the_31_elements_apart(pass_, target, tmp_path):
    """No element between them is read: a file with holes takes neither memory nor disk space."""
    near = Call(1, (6,), 64, (2,), (1,), "valid", (3,), 4)
    far = dataclasses.replace(near, sizes=(2**25 + 3,), dilation_rate=(2**25,))
    arrays = native_core.exact_values(near.arrays())
    truth = native_core.expected(near, *arrays)[pass_]
    x, kernel, dy = (a.astype("float32") for a in arrays)
    sparse = np.memmap(tmp_path / "x", "float32", "w+", shape=far.x_shape)
    assert sparse.size > 2**31
    sparse[:, :3], sparse[:, -3:] = x[:, :3], x[:, 3:]
    value = execute_without_copies(pass_, far, *native_core.ARGUMENTS[pass_](sparse, kernel, dy))
    assert_same(value, truth, pass_)


@pytest.mark.slow
def test_f11_more_than_two_to_the_31_elements():
    """One tap and one group, so that the kernel is small; 4 GB for each of x and y."""
    positions, channels = 2**25 + 3, 64
    assert positions * channels > 2**31
    call = Call(1, (positions,), channels, (1,), (1,), "same", (1,))
    nonzero = np.array([0, 1, 12345, 2**24 - 1, 2**25 - 1, 2**25, 2**25 + 1, 2**25 + 2])
    x = np.zeros(call.x_shape, "float16")
    x[0, nonzero] = np.random.default_rng(0).standard_normal((len(nonzero), channels))
    kernel = np.full(call.kernel_shape, 1, "float16")
    kernel[0, nonzero, 0, 0] = np.arange(2, 2 + len(nonzero))
    expected = (x[0, nonzero].astype("float32") * kernel[0, nonzero, 0]).astype("float16")

    y = operation(call, "native")(*tensors((x, kernel), "float16"))
    np.testing.assert_array_equal(numpy(y)[0, nonzero], expected)
    assert np.count_nonzero(numpy(y)) == np.count_nonzero(expected)
    del y

    dx = execute_without_copies(INPUT_GRAD, call, kernel, x)
    np.testing.assert_array_equal(dx[0, nonzero], expected)
    del dx
    dkernel = execute_without_copies(KERNEL_GRAD, call, x, x)
    squares = (x[0, nonzero].astype("float64") ** 2).sum(-1)
    np.testing.assert_allclose(dkernel[0, nonzero, 0, 0], squares, rtol=2e-3)
    assert np.count_nonzero(dkernel) == len(nonzero)


def execute_without_copies(pass_, call, a, b):
    """As ``native_core.execute``."""
    window = native_core.Window(**call.arguments)
    encoded = native_core.params.encode(pass_, window, call.sizes, a, b)
    result = np.empty(native_core.params.result_shape(pass_, window, call.sizes, a, b), a.dtype)
    addresses = (array.ctypes.data for array in (a, b, result))
    native_library.execute(encoded, len(a), native_library.available_cpus(), *addresses)
    return result


# --- Threads --------------------------------------------------------------------------------------

# Enough work for several threads, split into many tiles, of rows and of parts of rows, for every
# vector axis and for the windows whose taps are unrolled.
LARGE = [
    Call(2, (40, 37), 64, (3, 3), (1, 1), "same", (1, 1), 4),
    Call(1, (65, 59), 48, (3, 5), (2, 1), "same", (1, 2), 16, "interleaved"),
    Call(1, (82, 70), 24, (3, 3), (1, 1), "same", (1, 1), 3, "contiguous", "channels_first"),
    Call(1, (121, 141), 32, (3, 3), (2, 2), "same", (1, 1), 8, "contiguous", "channels_first"),
    Call(1, (14003,), 16, (5,), (1,), "same", (2,), 2, "interleaved", "channels_first"),
    Call(1, (270, 210), 3, (3, 3), (1, 1), "same", (1, 1)),
    Call(1, (12003,), 33, (3,), (1,), "valid", (1,), 1),
    Call(4, (9, 14, 35), 8, (2, 3, 3), (1, 2, 1), "same", (2, 1, 1), 2),
    Call(2, (23, 21), 64, (7, 7), (1, 1), "same", (1, 1), 4),
    Call(3, (7, 5, 13), 48, (3, 3, 5), (1, 1, 1), "same", (1, 1, 1), 6),
    Call(1, (19, 43), 32, (3, 3), (1, 1), "same", (1, 1), 2, upsampling=(2, 3)),
    # So much work at each position that a row is split.
    Call(1, (40,), 512, (65,), (1,), "same", (1,), 2, "contiguous", "channels_first"),
]
each_large = pytest.mark.parametrize("call", LARGE)


@pytest.mark.parametrize("call", [*LARGE[1:4], LARGE[-1]])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_calls_of_many_tiles_equal_the_oracle(dtype, call):
    arrays = native_core.exact_values(call.arrays())
    values = native_core.results(call, *(a.astype(DTYPES[dtype]) for a in arrays), threads=8)
    for pass_, truth in native_core.expected(call, *arrays).items():
        assert_same(values[pass_], truth, pass_)


# Windows outside the input, and rows that tiles do not fill.
PADDED = [
    Call(2, (3, 1), 32, (3, 3), (1, 1), ((5, 4), (6, 7)), (1, 1), 2),
    Call(1, (4, 5), 16, (5, 5), (1, 1), ((9, 0), (11, 8)), (1, 1), 1),
    Call(1, (2, 2), 24, (7, 7), (1, 1), ((12, 12), (3, 13)), (1, 1), 3),
]


@pytest.mark.parametrize("call", PADDED)
@each_target
def test_windows_in_the_padding_equal_the_oracle(target, call):
    arrays = native_core.exact_values(call.arrays())
    values = native_core.results(call, *(a.astype("float32") for a in arrays))
    for pass_, truth in native_core.expected(call, *arrays).items():
        assert_same(values[pass_], truth, pass_)


@each_large
@each_target
def test_f18_same_bits_in_any_number_of_threads(target, call):
    arrays = [a.astype("float32") for a in call.arrays()]
    serial = native_core.results(call, *arrays, threads=1)
    for threads in (2, 8):
        parallel = native_core.results(call, *arrays, threads=threads)
        for pass_ in PASSES:
            assert (parallel[pass_] == serial[pass_]).all(), (pass_, threads)


# A few hundred microseconds of work, for up to four threads.
REPEATED = Call(1, (44, 43), 128, (3, 3), (1, 1), "same", (1, 1), 2)
# Less than waking a thread takes.
SMALL = Call(1, (9, 11), 32, (3, 3), (1, 1), "same", (1, 1), 2)


@pytest.mark.long
@pytest.mark.parametrize("pass_", PASSES)
def test_f18_same_bits_a_thousand_times(pass_):
    x, kernel, dy = (a.astype("float32") for a in REPEATED.arrays())
    a, b = native_core.ARGUMENTS[pass_](x, kernel, dy)
    first = native_core.execute(pass_, REPEATED, a, b)
    for n in range(1000):
        assert (native_core.execute(pass_, REPEATED, a, b, threads=(1, 2, 8)[n % 3]) == first).all()


def test_f19_concurrent_callers_do_not_interfere():
    calls = [LARGE[0], REPEATED, LARGE[3], LARGE[4]] * 2
    arrays = [[a.astype("float32") for a in c.arrays(i)] for i, c in enumerate(calls)]
    expected = [native_core.results(c, *a) for c, a in zip(calls, arrays, strict=True)]

    def repeat(i):
        for n in range(25):
            values = native_core.results(calls[i], *arrays[i], threads=1 + n % 4)
            for pass_ in PASSES:
                assert (values[pass_] == expected[i][pass_]).all(), (pass_, calls[i])
        return True

    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        assert all(pool.map(repeat, range(len(calls))))


def test_f30_eight_threads_share_a_program_and_its_gradient():
    def loss(x, kernel):
        y = operation(REPEATED, "native")(x, kernel)
        return keras.ops.sum(y * y)

    program = in_graph(grad(loss))
    arguments = [tensors(REPEATED.arrays(seed)[:2], "float32") for seed in range(8)]
    expected = [[numpy(g) for g in program(*a)] for a in arguments]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            results = list(pool.map(lambda a: [numpy(g) for g in program(*a)], arguments))
            for values, wanted in zip(results, expected, strict=True):
                for value, want in zip(values, wanted, strict=True):
                    assert (value == want).all()


def thread_count():
    """Of this process."""
    return len(os.listdir("/proc/self/task"))


def pool_of_a_process():
    """Prints, as JSON, what the thread pool does in a process where nothing else uses it."""
    x, kernel, dy = (a.astype("float32") for a in REPEATED.arrays())
    before = thread_count()
    native_core.results(SMALL, *(a.astype("float32") for a in SMALL.arrays()), threads=4)
    started = [thread_count() - before]
    for threads in (1, 2, 4, 3):
        expected = native_core.results(REPEATED, x, kernel, dy, threads)
        started.append(thread_count() - before)

    stop = threading.Event()

    def busy():
        while not stop.is_set():
            native_core.execute(FORWARD, REPEATED, x, kernel, threads=4)

    # The first child is forked while the pool is idle, the others while it is busy.
    caller = threading.Thread(target=busy)
    exit_codes = []
    for n in range(20):
        child = os.fork()
        if child == 0:
            # A child that waits for its parent's threads would wait forever.
            signal.alarm(20)
            values = native_core.results(REPEATED, x, kernel, dy, threads=4)
            os._exit(0 if all((values[m] == expected[m]).all() for m in PASSES) else 1)
        exit_codes.append(os.waitpid(child, 0)[1])
        if n == 0:
            caller.start()
    stop.set()
    caller.join()
    print(json.dumps({"started": started, "children": exit_codes, "roundings": roundings()}))


@pytest.fixture(scope="module")
def pool():
    """The output of ``pool_of_a_process``, with a target set by the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVOLUTION_INSTRUCTIONS", "plain")
        output = fresh_process("import tests.native.test_core as t; t.pool_of_a_process()")
    return json.loads(output)


@on_linux
def test_pool_has_the_requested_number_of_threads(pool):
    """The caller is one of them; the others stay alive. A small call needs none of them."""
    assert pool["started"] == [0, 0, 1, 3, 3]


@on_linux
def test_forked_process_computes_the_same_and_exits(pool):
    assert pool["children"] == [0] * 20


def test_available_cpus_are_those_of_the_affinity_mask(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert native_library.available_cpus() == 2
