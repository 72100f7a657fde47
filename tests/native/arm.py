"""All passes of the core's library, without the package and Keras, against the oracle.

    python -m tests.native.arm libinvolution.so

Run for Arm under emulation by ``make test-arm``, where no framework is installed.
"""

import ctypes
import dataclasses
import itertools
import math
import platform
import sys

import numpy as np

from tests.support.oracle import Call, error_bound, pads, random_calls, with_non_finite

FORWARD, INPUT_GRAD, KERNEL_GRAD = range(3)
DTYPES = ("float64", "float32")
# Every vector axis, with sizes that are not multiples of the vector width.
WIDE = [
    Call(2, (7, 5), 48, (3, 3), (1, 1), "same", (1, 1), 3),
    Call(1, (9, 6), 34, (3, 2), (2, 1), "same", (1, 2), 17, "interleaved"),
    Call(1, (5, 13), 12, (2, 3), (1, 1), "symmetric", (1, 1), 4, "contiguous", "channels_first"),
    Call(1, (37,), 3, (5,), (1,), "same", (2,)),
    Call(1, (3, 4, 5), 40, (2, 3, 3), (1, 2, 1), "same", (2, 1, 1), 5),
    Call(2, (0, 5), 4, (3, 3), (1, 1), ((2, 2), (1, 1)), (1, 1), 2),
    # Windows whose taps are unrolled.
    Call(1, (9, 10), 32, (7, 7), (1, 1), "same", (1, 1), 2),
    Call(1, (6, 5), 40, (5, 5), (1, 1), "same", (1, 1), 5),
    Call(1, (5, 7), 24, (3, 3), (1, 1), "same", (1, 1), 3, upsampling=(2, 3)),
]


def encode(call, pass_, dtype, hidden_channels=0):
    """``InvolutionParams`` of ``csrc/params.h`` as a list."""
    dimensions = list(
        zip(call.sizes, call.kernel_size, call.strides, call.dilation_rate, strict=True)
    )
    before = [pads(*d, call.padding, i)[0] for i, d in enumerate(dimensions)]
    rows = call.sizes, call.output_sizes, call.kernel_size, call.strides, call.dilation_rate
    filled = [[fill] * (3 - len(row)) + list(row) for row, fill in zip(rows, (1,) * 5, strict=True)]
    upsampling = call.upsampling or (1,) * len(before)
    layout = call.data_format == "channels_first", call.group_layout == "interleaved"
    return [
        *(pass_, DTYPES.index(dtype), *map(int, layout), call.channels, call.groups),
        *itertools.chain.from_iterable(filled),
        *([0] * (3 - len(before)) + before),
        hidden_channels,
        *([1] * (3 - len(before)) + list(upsampling)),
    ]


def execute(function, params, batch, arguments, results):
    arrays = [np.ascontiguousarray(a) for a in arguments]
    addresses = [ctypes.c_void_p(a.ctypes.data) for a in (*arrays, *results)]
    failed = function((ctypes.c_int64 * len(params))(*params), ctypes.c_int64(batch), 3, *addresses)
    assert not failed


def check(value, truth, bound, what):
    assert np.isfinite(truth).all() == np.isfinite(value).all(), what
    if np.isfinite(truth).all():
        assert (np.abs(value - truth) <= bound).all(), what
    else:
        assert np.isclose(value, truth, rtol=0, atol=1e-4, equal_nan=True).all(), what


@np.errstate(invalid="ignore")
def check_call(library, call, dtype, arrays):
    x, kernel, dy = (a.astype(dtype) for a in arrays)

    def passes(x, kernel, dy):
        return call.involution(x, kernel)[0], *call.gradients(x, kernel, dy)

    truths, sizes = passes(x, kernel, dy), passes(*map(np.abs, (x, kernel, dy)))
    for pass_, pair in enumerate(((x, kernel), (kernel, dy), (x, dy))):
        value = np.full(truths[pass_].shape, np.nan, dtype)
        execute(library.involution_execute, encode(call, pass_, dtype), call.batch, pair, [value])
        terms = call.channels // call.groups if pass_ == KERNEL_GRAD else call.taps
        if pass_ == INPUT_GRAD:
            terms *= math.prod(call.upsampling or ())
        bound = error_bound(truths[pass_], sizes[pass_], terms, dtype)
        check(value, truths[pass_], bound, (pass_, dtype, call))


def check_fused(library, call, hidden_channels, dtype):
    call = dataclasses.replace(call, data_format="channels_last")
    rng = np.random.default_rng(0)
    x, kernel, dy = (a.astype(dtype) for a in call.arrays())
    columns = call.taps * call.groups
    hidden, weight, bias = (
        rng.standard_normal(shape).astype(dtype)
        for shape in (
            (*kernel.shape[:-2], hidden_channels),
            (hidden_channels, columns),
            (columns,),
        )
    )

    def passes(x, hidden, weight, bias, dy):
        x, hidden, weight, bias, dy = (a.astype("float64") for a in (x, hidden, weight, bias, dy))
        kernel = (hidden @ weight + bias).reshape(kernel_shape)
        dx, dkernel = call.gradients(x, kernel, dy)
        flat = dkernel.reshape(call.batch, -1, columns)
        rows = hidden.reshape(call.batch, -1, hidden_channels)
        dweights = np.concatenate([rows.swapaxes(1, 2) @ flat, flat.sum(1, keepdims=True)], 1)
        return (
            (call.involution(x, kernel)[0],),
            (dx,),
            (
                (flat @ weight.T).reshape(hidden.shape),
                dweights,
            ),
        )

    kernel_shape = kernel.shape
    given = x, hidden, weight, bias, dy
    truths, sizes = passes(*given), passes(*map(np.abs, given))
    arguments = (x, hidden, weight, bias), (hidden, weight, bias, dy), (x, hidden, weight, dy)
    terms = hidden_channels + 1 + columns + call.channels + int(np.prod(call.output_sizes))
    for pass_ in (FORWARD, INPUT_GRAD, KERNEL_GRAD):
        values = [np.full(t.shape, np.nan, dtype) for t in truths[pass_]]
        results = [*values, np.zeros(0, dtype)][:2]
        params = encode(call, pass_, dtype, hidden_channels)
        execute(library.involution_execute_fused, params, call.batch, arguments[pass_], results)
        for value, truth, size in zip(values, truths[pass_], sizes[pass_], strict=True):
            bound = error_bound(truth, size, terms, dtype)
            check(value, truth, bound, ("fused", pass_, dtype, call))


def main(path):
    library = ctypes.CDLL(path)
    library.involution_target.restype = ctypes.c_char_p
    calls = [*random_calls(48, seed=15), *WIDE]
    for n, (call, dtype) in enumerate(itertools.product(calls, DTYPES)):
        check_call(library, call, dtype, call.arrays(n))
        check_call(library, call, dtype, with_non_finite(call.arrays(n), n))
        check_fused(library, call, (1, 5, 8)[n % 3], dtype)
    target = library.involution_target(0).decode()
    print(f"{platform.machine()}, {target}: {len(calls)} calls match the oracle")


if __name__ == "__main__":
    main(sys.argv[1])
