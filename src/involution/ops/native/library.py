"""Loads the compiled core, or gives the reason why it is missing.

The installation (CMakeLists.txt) builds it into ``involution/native``: the core, which depends on
no framework, and a library for each framework that needs a binding.
"""

import ctypes
import os
import pathlib
import sys

# Set in csrc/CMakeLists.txt.
SUFFIX = ".dll" if sys.platform == "win32" else ".so"
# Positions and their sums are 64-bit integers.
MAX_STEP = 2**60


def find(name: str) -> pathlib.Path | None:
    """A file of ``involution/native``; an editable installation has several such folders."""
    folders = sys.modules[__name__.partition(".")[0]].__path__
    files = (pathlib.Path(folder) / "native" / name for folder in folders)
    return next((file for file in files if file.exists()), None)


def why_missing(binding: str | None = None) -> str | None:
    """Why the installation has no core, or no binding for a backend; None if it has one."""
    file = find(f"missing_{binding}.txt" if binding else "missing.txt")
    return file.read_text(encoding="utf-8").strip() if file else None


def target_names(library: ctypes.CDLL) -> list[str]:
    """Targets of a core that this machine supports, the most basic first."""
    names: list[str] = []
    while (name := library.involution_target(len(names))) is not None:
        names.append(name.decode())
    return names


def open_core(file: str | pathlib.Path) -> ctypes.CDLL:
    """A build of the core, its functions declared as in ``csrc/params.h``; raises OSError."""
    library = ctypes.CDLL(str(file))
    library.involution_execute.restype = ctypes.c_int
    library.involution_execute.argtypes = [
        ctypes.POINTER(ctypes.c_int64),
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    library.involution_execute_fused.restype = ctypes.c_int
    library.involution_execute_fused.argtypes = [
        *library.involution_execute.argtypes[:3],
        *[ctypes.c_void_p] * 6,
    ]
    library.involution_target.restype = ctypes.c_char_p
    library.involution_target.argtypes = [ctypes.c_int]
    library.involution_set_target.restype = None
    library.involution_set_target.argtypes = [ctypes.c_int]
    library.involution_fma_peak_loop.restype = ctypes.c_double
    library.involution_fma_peak_loop.argtypes = [ctypes.c_int64]
    library.involution_set_openmp.restype = None
    library.involution_set_openmp.argtypes = [ctypes.c_void_p]
    return library


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    file = find(f"libinvolution{SUFFIX}")
    if file is None:
        return None, f"the package was installed without it: {why_missing() or 'it was not built'}"
    try:
        library = open_core(file)
    except OSError as error:
        return None, f"its library cannot be loaded: {error}"
    requested = os.environ.get("INVOLUTION_INSTRUCTIONS")
    if requested:
        names = target_names(library)
        if requested not in names:
            return None, (
                f"INVOLUTION_INSTRUCTIONS must be one of {', '.join(names)} here. "
                f"Received: {requested}"
            )
        library.involution_set_target(names.index(requested))
    return library, None


# At import, so that torch.compile does not trace it.
_LOADED = _load()


def core() -> tuple[ctypes.CDLL | None, str | None]:
    """The core, or None and the reason."""
    return _LOADED


def binding(name: str) -> tuple[pathlib.Path | None, str | None]:
    """The library that a framework loads, or None and the reason."""
    file = find(f"libinvolution_{name}{SUFFIX}")
    if file is None:
        reason = why_missing(name) or "it was not built"
        return None, f"the package was installed without its binding for {name}: {reason}"
    return file, None


def targets() -> list[str]:
    """Targets (instruction sets) that this machine supports, the most basic first."""
    library, _ = core()
    return [] if library is None else target_names(library)


def set_target(name: str) -> None:
    """Selects the target of all subsequent calls, for tests and comparisons."""
    library, reason = core()
    if library is None:
        raise RuntimeError(reason)
    library.involution_set_target(target_names(library).index(name))


def set_openmp(openmp: ctypes.CDLL | None) -> None:
    """Runs on the threads of this OpenMP library if it has GNU's ABI, else on the core's own."""
    library, _ = core()
    if library is not None:
        parallel = getattr(openmp, "GOMP_parallel", None)
        library.involution_set_openmp(ctypes.cast(parallel, ctypes.c_void_p) if parallel else None)


def available_cpus() -> int:
    """Number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def execute(params, batch: int, threads: int, a: int, b: int, result: int) -> None:
    """A pass on tensors given by their addresses; ``params`` are encoded ``Params``."""
    library, reason = core()
    if library is None:
        raise RuntimeError(reason)
    if library.involution_execute(
        (ctypes.c_int64 * len(params))(*params), batch, threads, a, b, result
    ):
        raise MemoryError("involution: out of memory")


def execute_fused(params, batch: int, threads: int, *addresses: int) -> None:
    """A fused pass: the addresses of four arguments and two results."""
    library, reason = core()
    if library is None:
        raise RuntimeError(reason)
    if library.involution_execute_fused(
        (ctypes.c_int64 * len(params))(*params), batch, threads, *addresses
    ):
        raise MemoryError("involution: out of memory")


def fma_peak_loop(iterations: int) -> float:
    """Runs float32 FMAs in registers in this thread; returns the number of operations."""
    library, reason = core()
    if library is None:
        raise RuntimeError(reason)
    return library.involution_fma_peak_loop(iterations)
