"""The benchmark on CUDA devices, where there is none: its parts are stood in for, by what makes the
same calls at once. ``test_cuda.py`` asks a device itself."""

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
from involution.ops.cases import Case

CUDA = devices.DEVICES["cuda"]


class Stand:
    """Of ``torch.cuda``: graphs run at once what they record, and count what they replay."""

    clock, replays = 0.0, 0
    refuses = False

    class Stream:
        cuda_stream = 0

        def wait_stream(self, other):
            pass

    class CUDAGraph:
        def replay(self):
            Stand.clock += 250.0  # milliseconds
            Stand.replays += 1

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = Stand.clock

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    @staticmethod
    @contextlib.contextmanager
    def graph(graph):
        yield
        if Stand.refuses:
            raise RuntimeError("CUDA error: operation not permitted\nmore")


@pytest.fixture
def stand(monkeypatch):
    for name in ("Stream", "CUDAGraph", "Event", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(Stand, name))
    monkeypatch.setattr(torch.cuda, "current_stream", Stand.Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(Stand, "replays", 0)
    return Stand


def test_a_device_is_timed_by_its_events_around_a_replay(stand):
    ran = []
    watch = CUDA.stopwatch(lambda: ran.append(1))
    assert len(ran) == 2  # once to make ready, once to be recorded
    assert [watch(), watch()] == [0.25, 0.25]
    assert (len(ran), stand.replays) == (2, 2)


def test_what_no_graph_holds_is_left_out(stand, monkeypatch):
    monkeypatch.setattr(stand, "refuses", True)
    with pytest.raises(devices.NotRecordedError, match="hold it: CUDA error: operation not permit"):
        CUDA.stopwatch(lambda: None)


def test_peak_memory_of_a_device_is_beyond_what_was_held(monkeypatch):
    held = [100]
    peak = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.append(held[0]))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[-1])

    def prepare():
        held[0] += 30

        def run():
            peak[-1] = held[0] + 12

        return run

    assert CUDA.peak_bytes(lambda: None, prepare) == 42


class Cupy(types.ModuleType):
    """Compiles for this machine, by C++."""

    def __init__(self, folder):
        super().__init__("cupy")
        self.cuda = types.SimpleNamespace(ExternalStream=contextlib.nullcontext)
        self.folder, self.made = folder, 0

    def RawModule(self, code, options):  # noqa: N802 - CuPy's name
        self.made += 1
        text, library = self.folder / f"{self.made}.cu", self.folder / f"{self.made}.so"
        text.write_text(code)
        here = pathlib.Path(__file__).with_name("paper_cuda.cpp")
        subprocess.run(
            [
                shutil.which("c++"),
                "-shared",
                "-fPIC",
                *options,
                f'-DPER_NUMBER="{text}"',
                here,
                "-o",
                library,
            ],
            check=True,
        )
        loaded = ctypes.CDLL(library)

        def function(name):
            def call(blocks, threads, pointers):
                loaded.launch(
                    getattr(loaded, name), *blocks, *threads, *map(ctypes.c_void_p, pointers)
                )

            return call

        return types.SimpleNamespace(get_function=function)


@pytest.fixture
def cupy(tmp_path, monkeypatch):
    made = Cupy(tmp_path)
    monkeypatch.setitem(sys.modules, "cupy", made)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: made)
    monkeypatch.setattr(torch.cuda, "current_stream", Stand.Stream)
    monkeypatch.setattr(paper_cuda, "_device", lambda: "cuda")
    paper_cuda._compiled.cache_clear()
    yield made
    paper_cuda._compiled.cache_clear()


@pytest.mark.parametrize(
    "case",
    [
        Case("plain", 2, (5, 4), 6, 2, 3),
        Case("strided", 2, (7, 9), 8, 2, 5, strides=2, padding="symmetric"),
        Case("wide", 1, (6, 7), 4, 4, 3, dilation_rate=2),
    ],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_formula_for_cuda_is_involution(case, dtype, cupy):
    tried = runner.candidate("per-number", case, dtype)
    assert runner.difference(tried, dtype) < {"float32": 1e-5, "float64": 1e-13}[dtype]
    assert cupy.made == 1  # once for a case


def test_the_formula_for_cuda_says_what_it_cannot(cupy, monkeypatch):
    small = Case("small", 1, (5, 4), 6, 2, 3)
    line = Case("line", 1, (9,), 4, 1, 3)
    alternating = Case("alternating", 1, (9, 9), 4, 2, 3, group_layout="interleaved")
    large = Case("large", 2**12, (512, 512), 2, 1, 3)
    for case, dtype, reason in (
        (small, "float32", None),
        (small, "bfloat16", "it knows float32 and float64 alone"),
        (line, "float32", "it is for images"),
        (alternating, "float32", "its groups are contiguous"),
        (large, "float32", "its tensors have fewer than 2**31 numbers"),
    ):
        assert paper_cuda.unsupported_reason(case, dtype) == reason
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert paper_cuda.unsupported_reason(small, "float32").startswith("there is no module cupy")
    monkeypatch.setattr(paper_cuda, "_device", lambda: "cpu")
    assert paper_cuda.unsupported_reason(small, "float32") == "it runs on CUDA devices"


def test_what_is_not_recorded_is_told_of_each_pass(stand, monkeypatch):
    def refuse(run):
        raise devices.NotRecordedError("it waits")

    monkeypatch.setattr(devices.DEVICES["cpu"], "stopwatch", refuse)
    monkeypatch.setattr(runner, "CASES", (Case("small", 1, (5, 4), 6, 2, 3),))
    told = []
    plan = runner.Plan(cases=("small",), candidates=("taps",))
    assert list(runner.run(plan, told.append)) == []
    assert told == [f"small taps float32 {passes}: left out: it waits" for passes in runner.PASSES]


def test_taps_compiled_by_pytorch_are_involution():
    tried = runner.candidate("compiled-taps", Case("small", 2, (5, 4), 6, 2, 3), "float32")
    assert runner.difference(tried, "float32") < 1e-5
