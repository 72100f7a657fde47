"""The CUDA benchmark without a device: fakes replace ``torch.cuda`` and CuPy.

Tests on a device are in ``ops/test_cuda.py``.
"""

import contextlib
import ctypes
import pathlib
import shutil
import subprocess
import sys
import types

import pytest
import torch

from involution.benchmarking import devices, paper_cuda, runner
from involution.benchmarking.devices import torch_cuda
from involution.ops.cases import Case

CUDA = devices.DEVICES["cuda"]


class FakeCuda:
    """Fake of ``torch.cuda``: captures run eagerly, replays are counted."""

    clock, replays = 0.0, 0
    fails_capture = False

    class Stream:
        cuda_stream = 0

        def wait_stream(self, other):
            pass

    class CUDAGraph:
        def replay(self):
            FakeCuda.clock += 250.0  # milliseconds
            FakeCuda.replays += 1

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = FakeCuda.clock

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    @staticmethod
    @contextlib.contextmanager
    def graph(graph):
        yield
        if FakeCuda.fails_capture:
            raise RuntimeError("CUDA error: operation not permitted\nmore")


@pytest.fixture
def fake_cuda(monkeypatch):
    for name in ("Stream", "CUDAGraph", "Event", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(FakeCuda, name))
    monkeypatch.setattr(torch.cuda, "current_stream", FakeCuda.Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(FakeCuda, "replays", 0)
    return FakeCuda


def test_cuda_events_time_a_graph_replay(fake_cuda):
    calls = []
    timer = CUDA.timer(lambda: calls.append(1))
    assert len(calls) == 2  # warmup and capture
    assert [timer(), timer()] == [0.25, 0.25]
    assert (len(calls), fake_cuda.replays) == (2, 2)


@pytest.mark.parametrize(("cache", "want"), [(50 * 2**20, 2**28), (2**27, 2**29), (None, 2**28)])
def test_memory_bandwidth_is_that_of_copies_beyond_the_l2_cache(monkeypatch, cache, want):
    properties = types.SimpleNamespace(**({} if cache is None else {"L2_cache_size": cache}))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    monkeypatch.setattr(torch_cuda, "_copy_bandwidth", lambda total: 10.0 * total)
    assert CUDA.memory_bandwidth() == (10.0 * want, 10.0 * want)


def test_failed_capture_raises(fake_cuda, monkeypatch):
    monkeypatch.setattr(fake_cuda, "fails_capture", True)
    with pytest.raises(
        devices.CaptureError, match="capture failed: CUDA error: operation not permit"
    ):
        CUDA.timer(lambda: None)


def test_device_peak_memory_excludes_earlier_allocations(monkeypatch):
    allocated = [100]
    peak = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: allocated[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.append(allocated[0]))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[-1])

    def prepare():
        allocated[0] += 30

        def run():
            peak[-1] = allocated[0] + 12

        return run

    assert CUDA.peak_bytes(lambda: None, prepare) == 42


class FakeCupy(types.ModuleType):
    """Fake of CuPy, which compiles with the host's C++ compiler."""

    def __init__(self, folder):
        super().__init__("cupy")
        self.cuda = types.SimpleNamespace(ExternalStream=contextlib.nullcontext)
        self.folder, self.compiled = folder, 0

    def RawModule(self, code, options):  # noqa: N802 - CuPy's name
        self.compiled += 1
        cuda_file = self.folder / f"{self.compiled}.cu"
        shared_library = cuda_file.with_suffix(".so")
        cuda_file.write_text(code)
        wrapper = pathlib.Path(__file__).with_name("paper_cuda.cpp")
        subprocess.run(
            [
                shutil.which("c++"),
                "-shared",
                "-fPIC",
                *options,
                f'-DPAPER_CUDA="{cuda_file}"',
                wrapper,
                "-o",
                shared_library,
            ],
            check=True,
        )
        library = ctypes.CDLL(shared_library)

        def function(name):
            def call(blocks, threads, pointers):
                library.launch(
                    getattr(library, name), *blocks, *threads, *map(ctypes.c_void_p, pointers)
                )

            return call

        return types.SimpleNamespace(get_function=function)


@pytest.fixture
def cupy(tmp_path, monkeypatch):
    fake = FakeCupy(tmp_path)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: fake)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeCuda.Stream)
    monkeypatch.setattr(paper_cuda, "_device", lambda: "cuda")
    paper_cuda._compiled.cache_clear()
    yield fake
    paper_cuda._compiled.cache_clear()


@pytest.mark.parametrize(
    "case",
    [
        Case.of("plain", 2, (5, 4), 6, 2, 3),
        Case.of("strided", 2, (7, 9), 8, 2, 5, strides=2, padding="symmetric"),
        Case.of("wide", 1, (6, 7), 4, 4, 3, dilation_rate=2),
    ],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_paper_cuda_matches_the_reference(case, dtype, cupy):
    candidate = runner.make_candidate("paper-cuda", case, dtype)
    assert runner.max_relative_error(candidate, dtype) < {"float32": 1e-5, "float64": 1e-13}[dtype]
    assert cupy.compiled == 1  # once per case


def test_paper_cuda_reports_why_a_case_is_unsupported(cupy, monkeypatch):
    small = Case.of("small", 1, (5, 4), 6, 2, 3)
    line = Case.of("line", 1, (9,), 4, 1, 3)
    alternating = Case.of("alternating", 1, (9, 9), 4, 2, 3, group_layout="interleaved")
    large = Case.of("large", 2**12, (512, 512), 2, 1, 3)
    for case, dtype, reason in (
        (small, "float32", None),
        (small, "bfloat16", "requires float32 or float64"),
        (line, "float32", "requires two spatial dimensions"),
        (alternating, "float32", "requires contiguous groups"),
        (large, "float32", "requires tensors of fewer than 2**31 elements"),
    ):
        assert paper_cuda.unsupported_reason(case, dtype) == reason
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert paper_cuda.unsupported_reason(small, "float32").startswith("requires cupy (pip")
    monkeypatch.setattr(paper_cuda, "_device", lambda: "cpu")
    assert paper_cuda.unsupported_reason(small, "float32") == "requires a CUDA device"


def test_failed_capture_is_logged_for_each_pass(fake_cuda, monkeypatch):
    def fail(run):
        raise devices.CaptureError("it synchronizes")

    monkeypatch.setattr(devices.DEVICES["cpu"], "timer", fail)
    monkeypatch.setattr(runner, "CASES", (Case.of("small", 1, (5, 4), 6, 2, 3),))
    lines = []
    plan = runner.Plan(cases=("small",), candidates=("taps",))
    assert list(runner.run(plan, lines.append)) == []
    assert lines == [
        f"small taps float32 {passes}: skipped: it synchronizes" for passes in runner.PASSES
    ]


@pytest.mark.slow
def test_compiled_taps_match_the_reference():
    candidate = runner.make_candidate(
        "compiled-taps", Case.of("small", 2, (5, 4), 6, 2, 3), "float32"
    )
    assert runner.max_relative_error(candidate, "float32") < 1e-5
