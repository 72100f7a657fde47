"""The core in PyTorch: custom operations for CPUs."""

import ctypes
import os
import pathlib

import torch

from involution.ops import torch_custom_ops
from involution.ops.native import library


def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library whose threads PyTorch works in, if it can be told which one that is."""
    if torch.backends.openmp.is_available() and hasattr(os, "RTLD_NOLOAD"):
        own = (pathlib.Path(torch.__file__).parent / "lib").glob("libgomp*")
        for name in (*own, "libgomp.so.1"):
            try:
                return ctypes.CDLL(str(name), mode=os.RTLD_NOLOAD)
            except OSError:
                continue
    return None


# They go on looking for work for a while after an operation: others would wait for a processor.
library.use_team(_openmp())


def unsupported_reason(problem) -> str | None:
    if problem.device not in (None, "cpu", "meta"):
        return f"it runs on CPUs, and the tensors are on {problem.device}"
    return None


def _run(numbers, rank, a, b, result):
    _with_addresses(library.run, numbers, (a, b), (result,))


def _run_fused(numbers, rank, arguments, results):
    _with_addresses(library.run_fused, numbers, arguments, results)


def _with_addresses(run, numbers, arguments, results):
    # They must live until it has run.
    tensors = (*(tensor.contiguous() for tensor in arguments), *results)
    addresses = (tensor.data_ptr() for tensor in tensors)
    run(numbers, len(tensors[0]), torch.get_num_threads(), *addresses)


operations = torch_custom_ops.define("native", _run, _run_fused, "cpu")
call, call_fused = operations.call, operations.call_fused
