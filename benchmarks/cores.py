"""Milliseconds of two builds of the native core, called alternately in one process.

For each case of `involution bench` and each pass, on tensors aligned to cache lines that exist
before the calls: the cost of frameworks and of fresh memory is left out. The parameters of a call
must be the same in both builds. `difference` is the largest one between their results, relative to
the largest result; 0 means the same bits.

    python benchmarks/cores.py old/libinvolution.so new/libinvolution.so --threads 2 --target avx2
"""

import argparse
import ctypes
import statistics
import time

import numpy as np

from involution.ops.cases import CASES
from involution.ops.native import library, params

ALIGNMENT = 64


def load(path, target):
    core = library.open_core(path)
    names = library.target_names(core)
    if target not in (None, *names):
        raise SystemExit(
            f"--target must be one of {', '.join(names)} for {path}. Received: {target}"
        )
    core.involution_set_target(names.index(target) if target else len(names) - 1)
    return core


def aligned(array):
    memory = np.empty(array.nbytes + ALIGNMENT, "uint8")
    start = -memory.ctypes.data % ALIGNMENT
    result = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    result[...] = array
    return result


def passes(case):
    """For each pass its encoded parameters, its arguments and an array for its result."""
    random = np.random.default_rng(0)
    y_shape = (case.batch, *case.window.output_sizes(case.sizes), case.channels)
    x, kernel, dy = (
        aligned(random.standard_normal(shape, "float32"))
        for shape in (case.x_shape, case.kernel_shape, y_shape)
    )
    arguments = {"forward": (x, kernel), "input_grad": (kernel, dy), "kernel_grad": (x, dy)}
    for pass_, (a, b) in arguments.items():
        encoded = params.encode(pass_, case.window, case.sizes, a, b)
        shape = params.result_shape(pass_, case.window, case.sizes, a, b)
        yield pass_, encoded, a, b, aligned(np.zeros(shape, "float32"))


def compare(cores, case, pass_arguments, threads, calls):
    """Medians of both cores in milliseconds, and the difference of their results."""
    _, encoded, a, b, result = pass_arguments
    encoded = (ctypes.c_int64 * len(encoded))(*encoded)
    addresses = [array.ctypes.data for array in (a, b, result)]
    times, results = ([], []), [None, None]
    for call in range(calls + 2):
        for n in (0, 1) if call % 2 else (1, 0):
            started = time.perf_counter()
            if cores[n].involution_execute(encoded, case.batch, threads, *addresses):
                raise SystemExit("out of memory")
            times[n].append(1e3 * (time.perf_counter() - started))
            if call == 0:
                results[n] = result.copy()
    difference = np.abs(results[0] - results[1]).max() / np.abs(results[0]).max()
    return *(statistics.median(t[2:]) for t in times), difference


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--cases", default="tut,red1,red2,red3,red4,photo")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--target", help="instruction set; default: the last one of each build")
    parser.add_argument("--calls", type=int, default=40)
    options = parser.parse_args()
    cores = [load(path, options.target) for path in (options.old, options.new)]
    print(f"{options.threads} threads, target {options.target or 'default'}")
    print(f"{'case':6}{'pass':18}{'old ms':>9}{'new ms':>9}{'old / new':>11}{'difference':>12}")
    for case in (c for c in CASES if c.name in options.cases.split(",")):
        totals = [0.0, 0.0]
        for pass_arguments in passes(case):
            old, new, difference = compare(
                cores, case, pass_arguments, options.threads, options.calls
            )
            totals[0] += old
            totals[1] += new
            print(
                f"{case.name:6}{pass_arguments[0]:18}{old:9.3f}{new:9.3f}{old / new:11.2f}"
                f"{difference:12.0e}",
                flush=True,
            )
        print(
            f"{case.name:6}{'all':18}{totals[0]:9.3f}{totals[1]:9.3f}{totals[0] / totals[1]:11.2f}"
        )


if __name__ == "__main__":
    main()
