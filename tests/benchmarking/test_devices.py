"""Measured rates of the CPU, and errors of unavailable devices."""

import keras
import pytest

from involution.benchmarking import devices, runner
from involution.benchmarking.devices import base
from involution.benchmarking.devices import cpu as cpu_device
from involution.ops.cases import Case
from involution.utils.errors import InputError
from tests.support.backends import BACKEND


def test_measured_rates_of_the_cpu_are_plausible(monkeypatch):
    cpu = devices.DEVICES["cpu"]
    assert cpu.unavailable_reason() is None
    assert cpu.description().endswith(" CPUs")
    assert 1e8 < cpu.copy_bandwidth(2**20) < 1e13
    # Smaller buffers, of which the cache may hold parts, take less time.
    monkeypatch.setattr(base, "cold_bytes", lambda caches: 2**22)
    measured = cpu_device._memory_bandwidth.__wrapped__()
    assert all(1e8 < rate < 1e13 for rate in measured)
    assert cpu.peak("float32") == cpu.peak("bfloat16") == 2 * cpu.peak("float64")


def test_buffers_of_the_memory_bandwidth_exceed_the_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_device.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    for cpu, index, level, kind, size, shared in (
        (0, 0, 1, "Data", 32, "0"),
        (0, 1, 1, "Instruction", 64, "0"),
        (0, 2, 3, "Unified", 2**20, "0-1"),
        (1, 0, 1, "Data", 32, "1"),
        (1, 2, 3, "Unified", 2**20, "0-1"),
        # Not available to this process.
        (2, 2, 3, "Unified", 2**20, "2-3"),
    ):
        folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, value in (
            ("level", level),
            ("type", kind),
            ("size", f"{size}K"),
            ("shared_cpu_list", shared),
        ):
            (folder / name).write_text(f"{value}\n")
    (tmp_path / "cpu1" / "cache" / "index3").mkdir()  # without a size, as in some virtual machines
    caches = cpu_device._cache_bytes(tmp_path)
    assert caches == 1024 * (32 + 32 + 2**20)
    assert base.cold_bytes(caches) == 4 * caches
    assert base.cold_bytes(cpu_device._cache_bytes(tmp_path / "absent")) == 2**28


def test_streams_of_the_memory_bandwidth(monkeypatch):
    """Loads only, then a load and a store of each element, in buffers that no CPUs share."""
    monkeypatch.setattr(base, "cold_bytes", lambda caches: 4 * 3 * 5)
    monkeypatch.setattr(cpu_device, "available_cpus", lambda: 3)
    passes = []

    def best_seconds(function, buffers, repeats, calls):
        before = [buffer.copy() for buffer in buffers]
        for buffer in buffers:
            function(buffer)
        passes.append(list(zip(before, buffers, strict=True)))
        return 2.0 * len(passes)

    monkeypatch.setattr(cpu_device, "_best_seconds", best_seconds)
    assert cpu_device._memory_bandwidth.__wrapped__() == (60 / 2, 60 / 4)
    read, written = passes
    assert [old.shape for old, _ in read] == [(5,)] * 3
    assert all((new == -old).all() for old, new in written)


def test_unavailable_device_raises(monkeypatch):
    reason = "cuda requires the PyTorch or the JAX backend"
    if BACKEND == "torch":
        import torch

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if BACKEND != "tensorflow":
        reason = "no CUDA device is available"
    with pytest.raises(InputError, match=f"--device must be available: {reason}. Received: cuda"):
        runner.check(runner.Plan(device="cuda"))


@pytest.mark.parametrize("name", ["paper-cuda", "compiled-taps"])
def test_candidates_that_require_pytorch_raise_on_jax(name, monkeypatch):
    case = Case.of("small", 1, (4, 5), 4, 2, 3)
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(NotImplementedError, match="requires the PyTorch backend"):
        runner.make_candidate(name, case, "float32")
