"""What the benchmark reads off the machine, and where it refuses."""

import keras
import pytest

from involution.benchmarking import devices, runner
from involution.ops.cases import Case
from involution.utils.errors import InputError
from tests.support.backends import BACKEND


def test_a_processor_says_what_it_can_do():
    processor = devices.DEVICES["cpu"]
    assert processor.refusal() is None
    assert "processors" in processor.said()
    assert 1e8 < processor.copy_bandwidth(2**20) < 1e13
    assert processor.peak("float32") == processor.peak("bfloat16") == 2 * processor.peak("float64")


def test_cuda_is_refused_where_it_is_not(monkeypatch):
    reason = "PyTorch alone has kernels for CUDA, and events to time them by"
    if BACKEND == "torch":
        import torch

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        reason = "there is no CUDA device"
    with pytest.raises(InputError, match=f"--device must be one to measure on: {reason}."):
        runner.check(runner.Plan(device="cuda"))


@pytest.mark.parametrize("name", ["per-number", "compiled-taps"])
def test_what_is_of_pytorch_is_left_out_elsewhere(name, monkeypatch):
    case = Case("small", 1, (4, 5), 4, 2, 3)
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(NotImplementedError, match=r"PyTorch on CUDA|compiled by XLA"):
        runner.candidate(name, case, "float32")
