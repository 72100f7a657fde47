"""The algorithm of the paper's CUDA code, compiled by CuPy: a baseline of the benchmark.

One thread per output element. Two differences, without effect on speed: windows are clipped to the
input, and the kernel tensor has its taps before its groups, as in this package.
"""

import functools
import importlib.util
import math
import pathlib

import keras
import torch

SOURCE = pathlib.Path(__file__).with_suffix(".cu")
TYPES = {torch.float32: "float", torch.float64: "double"}
THREADS = 1024


def unsupported_reason(case, dtype) -> str | None:
    if len(case.sizes) != 2:
        return "requires two spatial dimensions"
    if case.window.group_layout != "contiguous":
        return "requires contiguous groups"
    if dtype not in ("float32", "float64"):
        return "requires float32 or float64"
    # Indices have 32 bits.
    if max(math.prod(case.kernel_shape), math.prod(case.x_shape)) >= 2**31:
        return "requires tensors of fewer than 2**31 elements"
    if _device() != "cuda":
        return "requires a CUDA device"
    if importlib.util.find_spec("cupy") is None:
        return "requires cupy (pip install cupy-cuda12x or cupy-cuda13x, by the driver's version)"
    return None


def _device() -> str:
    """The device of new Keras tensors."""
    return keras.ops.zeros(()).device.type


def definitions(case, dtype) -> dict[str, object]:
    """Preprocessor definitions of the CUDA source."""
    (top, _), (left, _) = case.window.clamp_steps(case.sizes).pads(case.sizes)
    return {
        "T": TYPES[dtype],
        "BATCH": case.batch,
        "CHANNELS": case.channels,
        "GROUPS": case.window.groups,
        "HEIGHT": case.sizes[0],
        "WIDTH": case.sizes[1],
        "OUT_HEIGHT": case.kernel_shape[1],
        "OUT_WIDTH": case.kernel_shape[2],
        "SIZE": case.window.kernel_size[0],
        "STRIDES": case.window.strides[0],
        "DILATION": case.window.dilation_rate[0],
        "PAD_TOP": top,
        "PAD_LEFT": left,
    }


@functools.cache
def _compiled(case, dtype):
    import cupy

    options = (f"-D{name}={value}" for name, value in definitions(case, dtype).items())
    return cupy.RawModule(code=SOURCE.read_text("utf-8"), options=("-std=c++17", *options))


def _launch(case, name, result, *tensors):
    import cupy

    blocks = -(-result.numel() // THREADS)
    pointers = tuple(t.contiguous().data_ptr() for t in (*tensors, result))
    with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        _compiled(case, result.dtype).get_function(name)((blocks,), (THREADS,), pointers)
    return result


class _Involution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel, case):
        ctx.save_for_backward(x, kernel)
        ctx.case = case
        _, channels = x.shape[:2]
        y = x.new_empty((len(x), channels, *kernel.shape[-2:]))
        return _launch(case, "output", y, x, kernel)

    @staticmethod
    def backward(ctx, dy):
        x, kernel = ctx.saved_tensors
        dx = _launch(ctx.case, "input", torch.empty_like(x), kernel, dy)
        dkernel = _launch(ctx.case, "kernel_gradient", torch.empty_like(kernel), x, dy)
        return dx, dkernel, None


def involution(x, kernel, case):
    """Computes ``case`` for channels-first tensors: ``x`` (batch, channels, height, width),
    ``kernel`` (batch, taps, groups, height, width)."""
    return _Involution.apply(x, kernel, case)
