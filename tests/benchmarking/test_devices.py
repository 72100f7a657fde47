"""Measured rates of the CPU, and errors of unavailable devices."""

import keras
import pytest

from involution.benchmarking import devices, runner
from involution.ops.cases import Case
from involution.utils.errors import InputError
from tests.support.backends import BACKEND


def test_measured_rates_of_the_cpu_are_plausible():
    cpu = devices.DEVICES["cpu"]
    assert cpu.unavailable_reason() is None
    assert cpu.description().endswith(" CPUs")
    assert 1e8 < cpu.copy_bandwidth(2**20) < 1e13
    assert cpu.peak("float32") == cpu.peak("bfloat16") == 2 * cpu.peak("float64")


def test_unavailable_device_raises(monkeypatch):
    reason = "cuda requires the PyTorch backend"
    if BACKEND == "torch":
        import torch

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        reason = "no CUDA device is available"
    with pytest.raises(InputError, match=f"--device must be available: {reason}. Received: cuda"):
        runner.check(runner.Plan(device="cuda"))


@pytest.mark.parametrize("name", ["paper-cuda", "compiled-taps"])
def test_candidates_that_require_pytorch_raise_on_jax(name, monkeypatch):
    case = Case.of("small", 1, (4, 5), 4, 2, 3)
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(NotImplementedError, match="requires the PyTorch backend"):
        runner.make_candidate(name, case, "float32")
