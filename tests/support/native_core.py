"""The native core alone, on NumPy arrays: without a framework every new shape costs nothing."""

import ml_dtypes
import numpy as np
import pytest

from involution.ops.autodiff import INPUT, KERNEL, OUTPUT
from involution.ops.native import library, params
from involution.ops.window import Window
from tests.support.oracle import ieee

DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}
# The fixture `level` makes everything run by the instructions of one.
each_level = pytest.mark.parametrize("level", library.levels(), indirect=True)
# The arguments of each member, from x, kernel and dy.
ARGUMENTS = {
    OUTPUT: lambda x, kernel, dy: (x, kernel),
    INPUT: lambda x, kernel, dy: (kernel, dy),
    KERNEL: lambda x, kernel, dy: (x, dy),
}
# Elements on both sides of an array: an odd number, so that no vector begins on its boundary.
MARGIN = 37
# As bytes, NaN in every type.
NAN = 0xFF


def surrounded(shape, dtype):
    """(array, edges): an array full of NaN with NaN around it, and the bytes of these."""
    margin = MARGIN * dtype.itemsize
    buffer = np.full(int(np.prod(shape)) * dtype.itemsize + 2 * margin, NAN, "uint8")
    return buffer[margin:-margin].view(dtype).reshape(shape), (buffer[:margin], buffer[-margin:])


def run(member, call, a, b, threads=1):
    """One member of the family for an ``oracle.Call``."""
    g = Window(**call.arguments)
    numbers = params.numbers(member, g, call.sizes, a, b)
    result, edges = surrounded(params.result_shape(member, g, call.sizes, a, b), a.dtype)
    inside = []
    for array in (a, b):
        inside.append(surrounded(array.shape, array.dtype)[0])
        inside[-1][...] = array
    addresses = (array.ctypes.data for array in (*inside, result))
    library.run(numbers, len(a), threads, *addresses)
    for edge in edges:
        assert (edge == NAN).all(), f"written beside the result: {member} of {call}"
    return result


def results(call, x, kernel, dy, threads=1):
    """The output and both gradients, by member."""
    return {
        member: run(member, call, *pair(x, kernel, dy), threads)
        for member, pair in ARGUMENTS.items()
    }


def expected(call, x, kernel, dy):
    """What ``results`` should be, by the oracle."""
    y, _ = call.involution(x, kernel)
    dx, dkernel = call.gradients(x, kernel, dy)
    return {OUTPUT: y, INPUT: dx, KERNEL: dkernel}


# The arguments of each fused member, from x, hidden, weight, bias and dy.
FUSED_ARGUMENTS = {
    OUTPUT: lambda x, hidden, weight, bias, dy: (x, hidden, weight, bias),
    INPUT: lambda x, hidden, weight, bias, dy: (hidden, weight, bias, dy),
    KERNEL: lambda x, hidden, weight, bias, dy: (x, hidden, weight, dy),
}


def run_fused(member, call, arguments, threads=1):
    """The two results of one member of the fused family for an ``oracle.Call``."""
    g = Window(**call.arguments)
    numbers = params.fused_numbers(member, g, call.sizes, arguments)
    shapes = params.fused_shapes(member, g, call.sizes, arguments)
    dtype = arguments[0].dtype
    wide = np.dtype(params.wide_type(dtype.name))
    results, edges = zip(
        *(surrounded(s, d) for s, d in zip(shapes, (dtype, wide), strict=True)), strict=True
    )
    inside = []
    for array in arguments:
        inside.append(surrounded(array.shape, array.dtype)[0])
        inside[-1][...] = array
    addresses = (array.ctypes.data for array in (*inside, *results))
    library.run_fused(numbers, len(arguments[0]), threads, *addresses)
    for edge in (e for pair in edges for e in pair):
        assert (edge == NAN).all(), f"written beside the result: {member} of {call}"
    return results


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
    """The kernels."""
    kernel = hidden @ weight + bias
    return kernel.reshape(*kernel.shape[:-1], -1, groups)


@ieee
def expected_fused(call, x, hidden, weight, bias, dy):
    """The results of all members, by the oracle; the second ones summed over the samples."""
    kernel = generated(hidden, weight, bias, call.groups)
    y, _ = call.involution(x, kernel)
    dx, dkernel = call.gradients(x, kernel, dy)
    flat = dkernel.reshape(*hidden.shape[:-1], -1)
    dweight = np.tensordot(hidden, flat, axes=(range(flat.ndim - 1),) * 2)
    both = np.concatenate([dweight, flat.reshape(-1, flat.shape[-1]).sum(0)[None]])
    return {OUTPUT: (y, None), INPUT: (dx, None), KERNEL: (flat @ weight.T, both)}


def coarse(arrays):
    """Multiples of 1/8 up to 2: exact in every type, and so are their products' sums in float32."""
    return [np.clip(np.round(8 * a), -16, 16) / 8 for a in arrays]
