"""Tests the installed package's native kernels and their gradients against the oracle.

Run by ``packaging/test_wheels.sh`` with the repository root on the path.
"""

import jax
import jax.numpy as jnp
import numpy as np

from involution import ops
from involution.ops.native import library
from tests.support.oracle import Call, error_bound

CALLS = [
    Call(2, (7, 5), 12, (3, 2), (2, 1), "same", (1, 2), 3),
    Call(2, (7, 5), 12, (3, 3), (1, 1), "same", (1, 1), 4, "interleaved", "channels_first"),
    Call(1, (3, 4, 5), 40, (2, 3, 3), (1, 2, 1), "same", (2, 1, 1), 5),
    Call(3, (37,), 6, (4,), (1,), "symmetric", (1,), 2),
]


def main():
    targets = library.targets()
    assert targets, library.core()[1]
    with open("/proc/cpuinfo") as file:
        assert ("avx2" in targets) == ("avx2" in file.read().split())
    for target in targets:
        library.set_target(target)
        for call in CALLS:
            x, kernel, dy = (a.astype("float32") for a in call.arrays())
            reasons = dict(ops.implementations(x, kernel, **call.arguments))
            assert reasons["native"] is None, reasons["native"]

            def apply(x, kernel, call=call):
                return ops.involution(x, kernel, implementation="native", **call.arguments)

            y, back = jax.vjp(jax.jit(apply), jnp.asarray(x), jnp.asarray(kernel))
            arrays = x, kernel, dy
            truths, sizes = passes(call, *arrays), passes(call, *map(np.abs, arrays))
            terms = (call.taps, call.taps, call.channels // call.groups)
            for value, truth, size, n in zip(
                (y, *back(jnp.asarray(dy))), truths, sizes, terms, strict=True
            ):
                assert (np.abs(value - truth) <= error_bound(truth, size, n, "float32")).all()
    print(f"{', '.join(targets)}: {len(CALLS)} calls and their gradients match the oracle")


def passes(call, x, kernel, dy):
    return call.involution(x, kernel)[0], *call.gradients(x, kernel, dy)


if __name__ == "__main__":
    main()
