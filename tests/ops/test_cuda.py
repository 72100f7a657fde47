"""Tests that require a CUDA device; ``benchmarks/gpu.sh`` runs them."""

import functools

import pytest
import torch

import involution
from involution.benchmarking import devices, runner
from involution.ops.cases import Case
from involution.ops.window import Window
from tests.support import native_core
from tests.support.native_core import ARGUMENTS, FUSED_ARGUMENTS
from tests.support.oracle import Call

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def untuned(monkeypatch):
    """Skips autotuning: the configuration affects only speed."""
    from involution.ops.triton import kernels

    for triton_kernel in (*kernels.KERNELS.values(), kernels.FUSED):
        monkeypatch.setattr(triton_kernel, "configs", triton_kernel.configs[:1])


CALL = Call(2, (9, 11), 24, (3, 5), (2, 1), "same", (1, 2), 3)
STAGE = Call(4, (28, 28), 128, (7, 7), (1, 1), "symmetric", (1, 1), 8)


def on_device(arrays, dtype, device="cuda"):
    return [torch.tensor(a, dtype=getattr(torch, dtype), device=device) for a in arrays]


def passes(call, dtype, device="cuda"):
    """A function without arguments for each pass, unfused and fused."""
    from involution.ops.triton import launch

    window = Window(**call.arguments)
    x, kernel, dy = on_device(call.arrays(), dtype, device)
    for pass_, arguments in ARGUMENTS.items():
        a, b = arguments(x, kernel, dy)
        yield functools.partial(launch.operations.call, pass_, window, call.sizes, a, b)
    fused_tensors = on_device(native_core.fused_arrays(call), dtype, device)
    for pass_, arguments in FUSED_ARGUMENTS.items():
        call_fused = launch.operations.call_fused
        yield functools.partial(call_fused, pass_, window, call.sizes, *arguments(*fused_tensors))


def tensors(results):
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_thousand_runs_are_bitwise_equal(dtype):
    for call in (CALL, STAGE):
        for run in passes(call, dtype):
            first = tensors(run())
            for _ in range(1000):
                assert all(map(torch.equal, first, tensors(run())))


def test_more_than_2_to_the_31_elements():
    """The last sample, whose offsets are 2**31 and more, equals a batch of that sample."""
    batch, side, channels, groups = 33, 1024, 64, 2
    from involution.ops.triton import launch

    window = Window((7, 7), (1, 1), "same", (1, 1), groups, "contiguous", "channels_last")
    generator = torch.Generator("cuda").manual_seed(0)
    randn = functools.partial(torch.randn, device="cuda", dtype=torch.float16, generator=generator)
    x, dy = (randn(batch, side, side, channels) for _ in range(2))
    kernel = randn(batch, side, side, 49, groups)
    assert min(x.numel(), kernel.numel()) > 2**31
    for pass_, arguments in ARGUMENTS.items():
        a, b = arguments(x, kernel, dy)
        call = functools.partial(launch.operations.call, pass_, window, (side, side))
        assert torch.equal(call(a, b)[-1:], call(a[-1:], b[-1:]))


@pytest.mark.parametrize("device", range(torch.cuda.device_count()))
def test_tensors_on_a_device_other_than_the_current_one(device):
    others = [d for d in range(torch.cuda.device_count()) if d != device] or [device]
    expected = [tensors(run()) for run in passes(CALL, "float32", f"cuda:{device}")]
    with torch.cuda.device(others[0]):
        results = [tensors(run()) for run in passes(CALL, "float32", f"cuda:{device}")]
    for want, result in zip(expected, results, strict=True):
        assert all(map(torch.equal, want, result))


def test_cuda_graph_captures_every_pass():
    for run in passes(CALL, "float32"):
        want = tensors(run())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = tensors(run())
        for _ in range(2):
            for result in results:
                result.zero_()
            graph.replay()
            assert all(map(torch.equal, want, results))


def test_torch_compile_has_no_graph_breaks():
    arguments = [
        t.requires_grad_() for t in on_device(native_core.fused_arrays(CALL)[:-1], "float32")
    ]
    eager = functools.partial(involution.ops.fused_involution, **CALL.arguments)
    for run in (eager, torch.compile(eager, fullgraph=True)):
        y = run(*arguments)
        gradients = torch.autograd.grad(y.pow(2).sum(), arguments)
        if run is eager:
            want = y, *gradients
    for expected, result in zip(want, (y, *gradients), strict=True):
        torch.testing.assert_close(expected, result, rtol=1e-4, atol=1e-4)


def test_benchmark_runs_on_cuda(monkeypatch):
    case = Case.of("small", 4, (28, 28), 64, 4, 7, padding="symmetric")
    monkeypatch.setattr(runner, "CASES", (case,))
    plan = runner.Plan(
        cases=("small",),
        candidates=("triton", "fused", "unfused", "compiled-taps", "conv3"),
        dtypes=("float32", "bfloat16"),
        seconds=0.01,
        device="cuda",
        memory=True,
    )
    runner.check(plan)
    messages = []
    rows = list(runner.run(plan, messages.append))
    assert not messages
    assert len(rows) == 5 * 2 * 2
    assert all(row.median_ms > 0 and row.peak_mb > 0 for row in rows)
    assert devices.DEVICES["cuda"].copy_bandwidth(2**28) > 1e10
    assert min(devices.DEVICES["cuda"].memory_bandwidth()) > 1e10
