"""``triton`` and its part of ``fused``, on a CUDA device or else in Triton's interpreter."""

import dataclasses
import functools
import itertools
import math

import keras
import numpy as np
import pytest
import torch

import involution
from involution.ops import triton
from involution.ops.autodiff import FORWARD, INPUT_GRAD, KERNEL_GRAD
from involution.ops.dispatch import select
from involution.ops.native import params
from involution.ops.problem import problem_of
from involution.ops.window import Window
from tests.support import native_core
from tests.support.backends import operation
from tests.support.native_core import ARGUMENTS, DTYPES, FUSED_ARGUMENTS
from tests.support.oracle import Call, error_bound, ieee, random_calls, with_non_finite

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with pytest.MonkeyPatch.context() as patch:
    # Triton chooses between compiler and interpreter when a kernel is defined.
    if DEVICE == "cpu":
        patch.setenv("TRITON_INTERPRET", "1")
    from involution.ops.triton import kernels
    from involution.ops.triton import launch as triton_torch

# Skips autotuning, on a device too: the configuration affects only speed.
for triton_kernel in (*kernels.KERNELS.values(), kernels.FUSED):
    triton_kernel.configs = triton_kernel.configs[:1]

CALL = Call(2, (4, 5), 6, (3, 2), (2, 1), "same", (1, 2), 3)
FIRST = dataclasses.replace(CALL, data_format="channels_first", group_layout="interleaved")
# More channels per group, groups, hidden channels and taps than a block has.
MANY = Call(1, (5, 6), 130, (5, 5), (1, 1), "same", (1, 1), 1)
GROUPS = Call(1, (5, 3), 70, (1, 3), (1, 2), "symmetric", (1, 1), 70, "interleaved")
HIDDEN = (1, 3, 8, 17, 70)
MARGIN = 37


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def tensor(array, dtype, permuted=False):
    """On the device, between NaN; ``permuted``: with the axes in reverse order in memory."""
    values = torch.tensor(np.asarray(array, "float64")).to(getattr(torch, dtype))
    axes = range(values.dim())[::-1] if permuted else range(values.dim())
    memory = torch.full((values.numel() + 2 * MARGIN,), math.nan, dtype=values.dtype)
    inside = memory[MARGIN : MARGIN + values.numel()]
    inside.view([values.shape[i] for i in axes])[...] = values.permute(*axes)
    moved = memory.to(DEVICE)[MARGIN : MARGIN + values.numel()]
    return moved.view([values.shape[i] for i in axes]).permute(*axes)


def run(launch, shapes, types):
    """The results that ``launch`` writes, in memory between NaN that it must not overwrite."""
    memory = [
        torch.full((math.prod(shape) + 2 * MARGIN,), math.nan, dtype=dtype, device=DEVICE)
        for shape, dtype in zip(shapes, types, strict=True)
    ]
    inside = [m[MARGIN : len(m) - MARGIN].view(s) for m, s in zip(memory, shapes, strict=True)]
    launch(*inside)
    for m in memory:
        assert m[:MARGIN].isnan().all()
        assert m[len(m) - MARGIN :].isnan().all()
    return [result.double().cpu().numpy() for result in inside]


def bound(truth, magnitude, terms, dtype):
    # The interpreter truncates to bfloat16; devices round.
    factor = 2 if DEVICE == "cpu" and dtype == "bfloat16" else 1
    return factor * error_bound(truth, magnitude, terms, dtype)


def is_near(value, truth, limit):
    """Within the limit; a non-finite truth must be reproduced, its finite values to 1e-4."""
    if np.isfinite(truth).all():
        return (np.abs(value - truth) <= limit).all()
    return np.isclose(value, truth, rtol=0, atol=1e-4, equal_nan=True).all()


@ieee
def check(call, dtype, permuted=False, seed=0, change=list):
    given = [tensor(a, dtype, permuted) for a in change(call.arrays(seed))]
    wide = [t.double().cpu().numpy() for t in given]
    truth, magnitude = (
        native_core.expected(call, *wide),
        native_core.expected(call, *map(np.abs, wide)),
    )
    window = Window(**call.arguments)
    for pass_, arguments in ARGUMENTS.items():
        a, b = arguments(*given)
        encoded = params.encode(pass_, window, call.sizes, a, b)
        shape = params.result_shape(pass_, window, call.sizes, a, b)
        launch = functools.partial(triton_torch._execute, encoded, window.rank, a, b)
        (result,) = run(launch, [shape], [a.dtype])
        terms = call.channels // call.groups if pass_ == KERNEL_GRAD else call.taps
        limit = bound(truth[pass_], magnitude[pass_], terms, dtype)
        assert is_near(result, truth[pass_], limit), (pass_, call)


# Every rank, padding, layout and format. The interpreter takes seconds for each call: `make test`
# divides calls with every pair of these among the dtypes, `make test-long` runs all for each.
KINDS = 48
SUBSET_OR_ALL = pytest.mark.parametrize(
    "every", [False, pytest.param(True, marks=pytest.mark.slow)]
)


def covering(calls):
    """Numbers of a few calls, with every pair of a rank, padding, layout and format that occurs."""
    pairs = []
    for call in calls:
        padding = call.padding if isinstance(call.padding, str) else "explicit"
        kind = len(call.sizes), padding, call.group_layout, call.data_format
        pairs.append(set(itertools.combinations(enumerate(kind), 2)))
    missing, chosen = set().union(*pairs), []
    while missing:
        most = max(range(len(calls)), key=lambda n: len(pairs[n] & missing))
        chosen.append(most)
        missing -= pairs[most]
    return chosen


def calls_for(dtype, dtypes, every, seed):
    first = list(dtypes).index(dtype)
    calls = random_calls(KINDS, seed + first)
    return [
        (n, calls[n]) for n in (range(KINDS) if every else covering(calls)[first :: len(dtypes)])
    ]


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@SUBSET_OR_ALL
def test_passes_equal_the_oracle(dtype, every):
    for n, call in calls_for(dtype, DTYPES, every, seed=0):
        check(call, dtype, permuted=n % 3 == 2, seed=n)


@pytest.mark.long
def test_f20_non_finite_values_propagate_as_in_the_formula():
    """One array at a time contains a non-finite value."""

    def changing(which, seed, arrays):
        return [with_non_finite([a], seed)[0] if i == which else a for i, a in enumerate(arrays)]

    calls = random_calls(KINDS, seed=31)
    for n in covering(calls)[::2]:
        call = calls[n]
        check(call, "float32", seed=n, change=functools.partial(changing, n % 3, n))
    calls = random_calls(KINDS, seed=32)
    for n in covering(calls)[1::2]:
        call = dataclasses.replace(calls[n], data_format="channels_last")
        change = functools.partial(changing, n % 5, n)
        check_fused(call, HIDDEN[n % len(HIDDEN)], "float32", seed=n, change=change)


@pytest.mark.long
def test_f13_input_without_positions_gives_zeros():
    last = Call(2, (0, 5), 6, (3, 3), (1, 2), ((2, 2), (1, 1)), (1, 1), 2)
    for call in (last, dataclasses.replace(last, data_format="channels_first")):
        check(call, "float32")
    check_fused(last, 3, "float32")


@pytest.mark.long
@pytest.mark.parametrize("call", [MANY, GROUPS], ids=["channels", "groups"])
def test_more_than_one_block(call):
    check(call, "float32")


@ieee
def check_fused(call, hidden, dtype, seed=0, change=list):
    given = [tensor(a, dtype) for a in change(native_core.fused_arrays(call, hidden, seed))]
    wide = [t.double().cpu().numpy() for t in given]
    truth = native_core.expected_fused(call, *wide)
    magnitude = native_core.expected_fused(call, *map(np.abs, wide))
    terms = hidden + 1 + call.taps + call.channels // call.groups + call.taps * call.groups
    weight_terms = terms + call.batch * math.prod(call.output_sizes)
    window = Window(**call.arguments)
    for pass_, arguments in FUSED_ARGUMENTS.items():
        tensors = arguments(*given)
        encoded = params.encode_fused(pass_, window, call.sizes, tensors)
        shapes = params.fused_result_shapes(pass_, window, call.sizes, tensors)
        launch = functools.partial(_run_fused, encoded, window.rank, tensors)
        first, second = run(launch, shapes, (tensors[0].dtype, torch.float32))
        # Unfused steps round the kernels and their gradients too.
        rounding = {"float32": 0, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
        results = (first, second.sum(0))
        for result, want, size, count in zip(
            results, truth[pass_], magnitude[pass_], (terms, weight_terms), strict=True
        ):
            if want is not None:
                limit = bound(want, size, count, dtype) + rounding * size
                assert is_near(result, want, limit), (pass_, call)


def _run_fused(encoded, rank, tensors, *results):
    triton_torch._execute_fused(encoded, rank, tensors, results)


FUSED_DTYPES = "float32", "float16", "bfloat16"


@pytest.mark.long
@pytest.mark.parametrize("dtype", FUSED_DTYPES)
@SUBSET_OR_ALL
def test_fused_passes_equal_the_oracle(dtype, every):
    for n, call in calls_for(dtype, FUSED_DTYPES, every, seed=7):
        call = dataclasses.replace(call, data_format="channels_last")
        check_fused(call, HIDDEN[n % len(HIDDEN)], dtype, seed=n)


@pytest.mark.long
@pytest.mark.parametrize("call", [MANY, GROUPS], ids=["channels", "groups"])
def test_more_than_one_fused_block(call):
    check_fused(call, 5, "float32")


@pytest.mark.long
def test_fused_gradients_a_few_samples_at_a_time(monkeypatch):
    monkeypatch.setattr(triton_torch, "CHUNK_BYTES", 2 * 4 * 3 * 4 * 6 * 5 * 3 // 2)
    check_fused(dataclasses.replace(CALL, batch=5), 3, "float32")


@pytest.mark.long
def test_offsets_have_64_bits():
    """Samples, taps, groups or channels with strides of up to 2**31 elements. 32-bit offsets fail
    on devices only: the interpreter tolerates them."""
    call = Call(2, (3,), 4, (3,), (1,), "same", (1,), 2)
    arrays = call.arrays()
    x, kernel, dy = (tensor(a, "float16") for a in arrays)
    wide = [t.double().cpu().numpy() for t in (x, kernel, dy)]
    want = native_core.expected(call, *wide)
    memory = torch.empty(2**31 + 100, dtype=torch.float16, device=DEVICE)
    window = Window(**call.arguments)
    for given, strides in (
        (0, (2**31 + 11, 4, 1)),
        (0, (13, 4, 2**29 + 9)),
        (0, (1, 2**30 - 9, 2)),
        (1, (18, 6, 2**30 - 9, 1)),
        (1, (19, 6, 2, 2**31 - 9)),
        (2, (13, 4, 2**29 + 9)),
    ):
        tensors = [x, kernel, dy]
        strided = memory.as_strided(tensors[given].shape, strides)
        strided[...] = tensors[given]
        tensors[given] = strided
        for pass_, arguments in ARGUMENTS.items():
            a, b = arguments(*tensors)
            y = triton_torch.operations.call(pass_, window, call.sizes, a, b)
            np.testing.assert_allclose(y.double().cpu().numpy(), want[pass_], rtol=0, atol=1e-2)


# --- The operator ---------------------------------------------------------------------------------


def leaves(call, dtype="float64", arrays=None):
    arrays = call.arrays()[:2] if arrays is None else arrays
    return [tensor(a, dtype).contiguous().requires_grad_() for a in arrays]


@pytest.mark.long
@pytest.mark.parametrize("call", [CALL, FIRST])
def test_first_and_second_order_gradients_equal_finite_differences(call):
    call = dataclasses.replace(call, batch=1, sizes=(3, 3), channels=3)
    operator = operation(call, "triton")
    assert torch.autograd.gradcheck(operator, leaves(call), fast_mode=True)
    assert torch.autograd.gradgradcheck(operator, leaves(call), fast_mode=True)


def fused(call):
    return functools.partial(
        involution.ops.fused_involution, **call.arguments, implementation="fused"
    )


@pytest.mark.long
def test_fused_gradients_equal_the_oracle(monkeypatch):
    ran = []
    call_fused = triton.call_fused
    monkeypatch.setattr(triton, "call_fused", lambda *a: ran.append(a[0]) or call_fused(*a))
    *arrays, dy = native_core.fused_arrays(CALL)
    given = leaves(CALL, "float32", arrays)
    gradients = torch.autograd.grad(fused(CALL)(*given), given, tensor(dy, "float32"))
    assert ran == [FORWARD]
    truth = native_core.expected_fused(CALL, *arrays, dy)
    dhidden, dweights = truth[KERNEL_GRAD]
    unstacked = dhidden, dweights[:-1], dweights[-1]
    want = truth[INPUT_GRAD][0], *unstacked
    for value, expected in zip(gradients, want, strict=True):
        np.testing.assert_allclose(value.cpu().numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("layout", ["contiguous", "interleaved"])
def test_layer_selects_triton(layout):
    layer = involution.Involution2D(3, groups=2, group_layout=layout)
    x = tensor(np.random.default_rng(0).standard_normal((2, 7, 5, 8)), "float32")
    layer.to(DEVICE)(x)
    kernel = layer.generate_kernel(x)
    y = involution.ops.involution(
        x,
        kernel,
        3,
        groups=2,
        group_layout=layout,
        padding=layer.padding,
        implementation="reference",
    )
    assert select(problem_of(layer.window, x)).name == "triton"
    assert layer.chosen_implementation(x) == "fused"
    np.testing.assert_allclose(
        layer(x).detach().cpu().numpy(), y.detach().cpu().numpy(), rtol=1e-4, atol=1e-5
    )


def unfused(call):
    return operation(call, "triton")


@pytest.mark.long
@pytest.mark.parametrize("operator", [unfused, fused])
def test_f22_torch_compile_has_no_graph_breaks(operator):
    torch.compiler.reset()
    arrays = native_core.fused_arrays(CALL)[:-1] if operator is fused else CALL.arrays()[:2]
    results = []
    eager = operator(CALL)
    for function in (eager, torch.compile(eager, fullgraph=True, backend="aot_eager")):
        tensors = leaves(CALL, "float32", arrays)
        y = function(*tensors)
        results.append((y, *torch.autograd.grad(y.pow(2).sum(), tensors)))
    for expected, compiled in zip(*results, strict=True):
        assert torch.equal(expected, compiled)


@pytest.mark.long
def test_custom_ops_pass_opcheck():
    window = Window(**CALL.arguments)
    for pass_, arguments in ARGUMENTS.items():
        given = [tensor(a, "float32") for a in arguments(*CALL.arrays())]
        encoded = params.encode(pass_, window, CALL.sizes, *given)
        torch.library.opcheck(triton_torch.operations.unfused, (*given, encoded, window.rank))
    for pass_, arguments in FUSED_ARGUMENTS.items():
        given = [tensor(a, "float32") for a in arguments(*native_core.fused_arrays(CALL))]
        encoded = params.encode_fused(pass_, window, CALL.sizes, given)
        torch.library.opcheck(triton_torch.operations.fused, (*given, encoded, window.rank))


# --- Unsupported calls ----------------------------------------------------------------------------


def problem(dtype="float32", device="cuda"):
    x = keras.KerasTensor((2, 5, 5, 4), dtype=dtype)
    return dataclasses.replace(problem_of(Window(3, rank=2), x), device=device)


def test_unsupported_reasons(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    elsewhere = "it requires CUDA tensors; the device is"
    assert triton.unsupported_reason(problem(device="cpu")) == f"{elsewhere} cpu"
    assert triton.unsupported_reason(problem(device=None)) == f"{elsewhere} unknown"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton.unsupported_reason(problem()) == "there is no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, dtype, reason in (
        ((7, 0), "float32", "compute capability 7.0 of the device is too low"),
        ((7, 5), "float32", None),
        ((7, 5), "bfloat16", "compute capability 7.5 of the device is too low"),
        ((9, 0), "bfloat16", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        assert triton.unsupported_reason(problem(dtype)) == reason
    assert (
        triton.fused_unsupported_reason(problem("float64"))
        == "its matrix products do not support float64"
    )
    assert triton.unsupported_reason(problem("float64")) is None
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    assert triton.unsupported_reason(problem()) == "it requires PyTorch tensors"
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert triton.unsupported_reason(problem()) == "Triton is not installed"
