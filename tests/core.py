"""The native core alone, on NumPy arrays: without a framework every new shape costs nothing."""

import ml_dtypes
import numpy as np

from involution.ops import native_call, native_library
from involution.ops.geometry import Geometry
from involution.ops.gradients import INPUT, KERNEL, OUTPUT

DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}
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
    g = Geometry(**call.arguments)
    numbers = native_call.numbers(member, g, call.sizes, a, b)
    result, edges = surrounded(native_call.result_shape(member, g, call.sizes, a, b), a.dtype)
    inside = []
    for array in (a, b):
        inside.append(surrounded(array.shape, array.dtype)[0])
        inside[-1][...] = array
    addresses = (array.ctypes.data for array in (*inside, result))
    native_library.run(numbers, len(a), threads, *addresses)
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


def coarse(arrays):
    """Multiples of 1/8 up to 2: exact in every type, and so are their products' sums in float32."""
    return [np.clip(np.round(8 * a), -16, 16) / 8 for a in arrays]
