"""The benchmark of JAX's CUDA device without one: the CPU is in its place."""

import types

import jax
import pytest
from keras.src.backend.jax import distribution_lib

from involution.benchmarking import devices, runner
from involution.ops.cases import Case
from involution.utils.errors import InputError

CUDA = devices.CUDA


class FakeDevice:
    """A device with memory statistics."""

    device_kind = "NVIDIA fake"
    platform, id = "gpu", 0
    client = types.SimpleNamespace(platform_version="PJRT C API\ncuda 13000")

    def __init__(self):
        self.in_use, self.peak = 100, 110

    def memory_stats(self):
        return {"bytes_in_use": self.in_use, "peak_bytes_in_use": self.peak}


@pytest.fixture
def device(monkeypatch):
    fake, find = FakeDevice(), jax.devices

    def fake_devices(backend=None):
        return [fake] if backend in ("cuda", "gpu") else find(backend)

    monkeypatch.setattr(jax, "devices", fake_devices)
    monkeypatch.setattr(CUDA, "keras_name", "cpu")
    return fake


def test_keras_scope_is_the_platform_of_the_device(monkeypatch):
    device = FakeDevice()
    monkeypatch.setattr(jax, "devices", lambda backend: [device])
    assert distribution_lib._to_backend_device(CUDA.keras_name) is device


def test_a_machine_without_cuda_is_refused(monkeypatch):
    def fail(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(InputError, match=r"no CUDA device is available\. Received: cuda"):
        runner.check(runner.Plan(device="cuda"))


def test_candidates_are_measured(device, monkeypatch):
    monkeypatch.setattr(runner, "CASES", (Case.of("small", 2, (5, 4), 6, 2, 3),))
    monkeypatch.setattr("involution.benchmarking.devices.jax_cuda._copy_bandwidth", lambda n: 1e9)
    monkeypatch.setattr("involution.benchmarking.devices.jax_cuda._peak", lambda dtype: 1e10)
    plan = runner.Plan(
        cases=("small",),
        candidates=runner.default_candidates("cuda"),
        seconds=1e-6,
        calls=2,
        device="cuda",
    )
    runner.check(plan)
    assert next(runner.header(plan)) == "jax on NVIDIA fake, PJRT C API"
    skipped = []
    rows = list(runner.run(plan, skipped.append))
    assert {row.candidate for row in rows} == {"taps", "reference", "im2col", "conv3", "depthwise"}
    assert all(row.median_ms > 0 for row in rows)
    text = "\n".join(skipped)
    assert "pallas float32: skipped: it requires a GPU, and JAX's default device is a cpu" in text
    assert "triton float32: skipped: " in text
    assert "paper-cuda float32: skipped: requires the PyTorch backend" in text


def test_pallas_is_measured_in_its_interpreter(device, monkeypatch):
    monkeypatch.setenv("INVOLUTION_PALLAS_INTERPRET", "1")
    monkeypatch.setattr(runner, "CASES", (Case.of("small", 1, (3, 2), 4, 2, 3),))
    monkeypatch.setattr("involution.benchmarking.devices.jax_cuda._copy_bandwidth", lambda n: 1e9)
    monkeypatch.setattr("involution.benchmarking.devices.jax_cuda._peak", lambda dtype: 1e10)
    plan = runner.Plan(
        cases=("small",), candidates=("pallas",), seconds=1e-6, calls=1, device="cuda"
    )
    forward, backward = runner.run(plan)
    assert (forward.candidate, backward.passes) == ("pallas", "forward+backward")


def test_rates_are_those_of_compiled_programs(device, monkeypatch):
    monkeypatch.setattr("involution.benchmarking.devices.base.DRAM_BYTES", 2**20)
    read, write = CUDA.memory_bandwidth()
    assert read == write
    assert 1e6 < read < 1e13
    assert 1e6 < CUDA.copy_bandwidth(2**16) < 1e13


def test_peak_memory_is_that_of_the_run(device):
    def prepare():
        device.in_use += 30

        def run():
            device.peak = device.in_use + 12

        return run

    assert CUDA.peak_bytes(lambda: None, prepare) == 42
