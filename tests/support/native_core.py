"""Calls the native core on NumPy arrays, without a framework: new shapes need no compilation."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from involution.ops.autodiff import FORWARD, INPUT_GRAD, KERNEL_GRAD
from involution.ops.native import library, params
from involution.ops.window import Window
from tests.support.oracle import ieee

DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}
each_target = pytest.mark.parametrize("target", library.targets(), indirect=True)
# Selects the arguments of each pass from x, kernel and dy.
ARGUMENTS = {
    FORWARD: lambda x, kernel, dy: (x, kernel),
    INPUT_GRAD: lambda x, kernel, dy: (kernel, dy),
    KERNEL_GRAD: lambda x, kernel, dy: (x, dy),
}
# Guard elements on each side of an array: an odd number, so that vectors are unaligned.
MARGIN = 37
# All bytes of a NaN in every dtype.
NAN = 0xFF


def guarded_array(shape, dtype):
    """(array, guards): an array full of NaN, and the guard bytes on each side of it."""
    margin = MARGIN * dtype.itemsize
    buffer = np.full(int(np.prod(shape)) * dtype.itemsize + 2 * margin, NAN, "uint8")
    return buffer[margin:-margin].view(dtype).reshape(shape), (buffer[:margin], buffer[-margin:])


def execute(pass_, call, a, b, threads=1):
    """The result of a pass for an ``oracle.Call``."""
    window = Window(**call.arguments)
    encoded = params.encode(pass_, window, call.sizes, a, b)
    result, guards = guarded_array(params.result_shape(pass_, window, call.sizes, a, b), a.dtype)
    inputs = []
    for array in (a, b):
        inputs.append(guarded_array(array.shape, array.dtype)[0])
        inputs[-1][...] = array
    addresses = (array.ctypes.data for array in (*inputs, result))
    library.execute(encoded, len(a), threads, *addresses)
    for guard in guards:
        assert (guard == NAN).all(), f"written outside the result: {pass_} of {call}"
    return result


def results(call, x, kernel, dy, threads=1):
    """The output and both gradients, by pass."""
    return {
        pass_: execute(pass_, call, *pair(x, kernel, dy), threads)
        for pass_, pair in ARGUMENTS.items()
    }


def expected(call, x, kernel, dy):
    """The oracle's values of ``results``."""
    y, _ = call.involution(x, kernel)
    dx, dkernel = call.gradients(x, kernel, dy)
    return {FORWARD: y, INPUT_GRAD: dx, KERNEL_GRAD: dkernel}


# Selects the arguments of each fused pass from x, hidden, weight, bias and dy.
FUSED_ARGUMENTS = {
    FORWARD: lambda x, hidden, weight, bias, dy: (x, hidden, weight, bias),
    INPUT_GRAD: lambda x, hidden, weight, bias, dy: (hidden, weight, bias, dy),
    KERNEL_GRAD: lambda x, hidden, weight, bias, dy: (x, hidden, weight, dy),
}


def execute_fused(pass_, call, arguments, threads=1):
    """The two results of a fused pass for an ``oracle.Call``."""
    window = Window(**call.arguments)
    encoded = params.encode_fused(pass_, window, call.sizes, arguments)
    shapes = params.fused_result_shapes(pass_, window, call.sizes, arguments)
    dtype = arguments[0].dtype
    wide = np.dtype(params.accumulation_dtype(dtype.name))
    results, guards = zip(
        *(guarded_array(s, d) for s, d in zip(shapes, (dtype, wide), strict=True)), strict=True
    )
    inputs = []
    for array in arguments:
        inputs.append(guarded_array(array.shape, array.dtype)[0])
        inputs[-1][...] = array
    addresses = (array.ctypes.data for array in (*inputs, *results))
    library.execute_fused(encoded, len(arguments[0]), threads, *addresses)
    for guard in (g for pair in guards for g in pair):
        assert (guard == NAN).all(), f"written outside the result: {pass_} of {call}"
    return results


def without_outputs(encoded):
    """The encoded parameters of a call, with an empty output."""
    decoded = params.Params.decode(encoded)
    return dataclasses.replace(decoded, output_size=(*decoded.output_size[:2], 0)).encode()


def fused_arrays(call, hidden=5, seed=0):
    """x, hidden, weight, bias and dy for a call."""
    x, kernel, dy = call.arrays(seed)
    random = np.random.default_rng(seed)
    count = kernel.shape[-2] * kernel.shape[-1]
    return [
        x,
        random.standard_normal((*kernel.shape[:-2], hidden)),
        random.standard_normal((hidden, count)) / np.sqrt(hidden),
        random.standard_normal(count),
        dy,
    ]


@ieee
def generated(hidden, weight, bias, groups):
    """The kernels that the last, pointwise layer of a generator computes."""
    kernel = hidden @ weight + bias
    return kernel.reshape(*kernel.shape[:-1], -1, groups)


@ieee
def expected_fused(call, x, hidden, weight, bias, dy):
    """The oracle's results of all fused passes; second results are sums over the batch."""
    kernel = generated(hidden, weight, bias, call.groups)
    y, _ = call.involution(x, kernel)
    dx, dkernel = call.gradients(x, kernel, dy)
    flat = dkernel.reshape(*hidden.shape[:-1], -1)
    dweight = np.tensordot(hidden, flat, axes=(range(flat.ndim - 1),) * 2)
    dparams = np.concatenate([dweight, flat.reshape(-1, flat.shape[-1]).sum(0)[None]])
    return {FORWARD: (y, None), INPUT_GRAD: (dx, None), KERNEL_GRAD: (flat @ weight.T, dparams)}


def exact_values(arrays):
    """Rounds to multiples of 1/8 in [-2, 2], which are exact in every dtype; sums of their products
    are exact in float32."""
    return [np.clip(np.round(8 * a), -16, 16) / 8 for a in arrays]
