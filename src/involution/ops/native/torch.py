"""The core in PyTorch: custom ops for CPUs."""

import ctypes
import os
import pathlib

import torch

from involution.ops import torch_custom_ops
from involution.ops.native import library


def _openmp() -> ctypes.CDLL | None:
    """The loaded OpenMP library whose threads PyTorch uses; None if it cannot be identified."""
    if torch.backends.openmp.is_available() and hasattr(os, "RTLD_NOLOAD"):
        bundled = (pathlib.Path(torch.__file__).parent / "lib").glob("libgomp*")
        for name in (*bundled, "libgomp.so.1"):
            try:
                return ctypes.CDLL(str(name), mode=os.RTLD_NOLOAD)
            except OSError:
                continue
    return None


# Its threads spin for a while after an op; other threads would compete with them for CPUs.
library.set_openmp(_openmp())


def unsupported_reason(problem) -> str | None:
    if problem.device not in (None, "cpu", "meta"):
        return f"it runs on CPUs, and the tensors are on {problem.device}"
    return None


def _execute(params, rank, a, b, result):
    _with_addresses(library.execute, params, (a, b), (result,))


def _execute_fused(params, rank, arguments, results):
    _with_addresses(library.execute_fused, params, arguments, results)


def _with_addresses(execute, params, arguments, results):
    # Keeps contiguous copies alive during the call.
    tensors = (*(tensor.contiguous() for tensor in arguments), *results)
    addresses = (tensor.data_ptr() for tensor in tensors)
    execute(params, len(tensors[0]), torch.get_num_threads(), *addresses)


operations = torch_custom_ops.register_ops("native", _execute, _execute_fused, "cpu")
call, call_fused = operations.call, operations.call_fused
