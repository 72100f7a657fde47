"""The compiled core: where it is, or why it is not there.

It is built when the package is installed (CMakeLists.txt) and lies in ``involution/native``: the
core itself, which knows no framework, and beside it a library for each framework that needs one.
"""

import ctypes
import os
import pathlib
import sys

# CMake gives libraries this suffix.
SUFFIX = ".dll" if sys.platform == "win32" else ".so"
# Positions are added up in 64 bits.
LARGEST = 2**60


def find(name: str) -> pathlib.Path | None:
    """A file of ``involution/native``, which has several places if the package is editable."""
    folders = sys.modules[__name__.partition(".")[0]].__path__
    files = (pathlib.Path(folder) / "native" / name for folder in folders)
    return next((file for file in files if file.exists()), None)


def why_missing(binding: str | None = None) -> str | None:
    """Why the installation left out the core, or a backend's binding; None where it did not."""
    file = find(f"missing_{binding}.txt" if binding else "missing.txt")
    return file.read_text(encoding="utf-8").strip() if file else None


def _levels(library) -> list[str]:
    names: list[str] = []
    while (name := library.involution_level(len(names))) is not None:
        names.append(name.decode())
    return names


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    file = find(f"libinvolution{SUFFIX}")
    if file is None:
        return None, f"the package was installed without it: {why_missing() or 'it was not built'}"
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        return None, f"its library cannot be loaded: {error}"
    library.involution_run.restype = ctypes.c_int
    library.involution_run.argtypes = [
        ctypes.POINTER(ctypes.c_int64),
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    library.involution_run_fused.restype = ctypes.c_int
    library.involution_run_fused.argtypes = [
        *library.involution_run.argtypes[:3],
        *[ctypes.c_void_p] * 6,
    ]
    library.involution_level.restype = ctypes.c_char_p
    library.involution_level.argtypes = [ctypes.c_int]
    library.involution_use_level.restype = None
    library.involution_use_level.argtypes = [ctypes.c_int]
    library.involution_multiply_add.restype = ctypes.c_double
    library.involution_multiply_add.argtypes = [ctypes.c_int64]
    library.involution_use_team.restype = None
    library.involution_use_team.argtypes = [ctypes.c_void_p]
    wanted = os.environ.get("INVOLUTION_INSTRUCTIONS")
    if wanted:
        names = _levels(library)
        if wanted not in names:
            return None, (
                f"INVOLUTION_INSTRUCTIONS must be one of {', '.join(names)} here. "
                f"Received: {wanted}"
            )
        library.involution_use_level(names.index(wanted))
    return library, None


# When the module is imported, so that a compiler that traces what calls it finds it done.
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


def levels() -> list[str]:
    """Levels of instructions that this machine can run, the plainest first; none without a core."""
    library, _ = core()
    return [] if library is None else _levels(library)


def use_level(name: str) -> None:
    """Runs everything from now on by the instructions of this level: for tests and comparisons."""
    library, reason = core()
    if library is None:
        raise RuntimeError(reason)
    library.involution_use_level(_levels(library).index(name))


def use_team(openmp: ctypes.CDLL | None) -> None:
    """Works from now on in the threads of this OpenMP library, if like GNU's, or in its own."""
    library, _ = core()
    if library is not None:
        team = getattr(openmp, "GOMP_parallel", None)
        library.involution_use_team(ctypes.cast(team, ctypes.c_void_p) if team else None)


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(numbers, batch: int, threads: int, a: int, b: int, result: int) -> None:
    """One member of the family on tensors in memory, given by their addresses."""
    library, reason = core()
    if library is None:
        raise RuntimeError(reason)
    if library.involution_run(
        (ctypes.c_int64 * len(numbers))(*numbers), batch, threads, a, b, result
    ):
        raise MemoryError("involution: memory ran out")


def run_fused(numbers, batch: int, threads: int, *addresses: int) -> None:
    """The same for one with kernels that are generated: four arguments and two results."""
    library, reason = core()
    if library is None:
        raise RuntimeError(reason)
    if library.involution_run_fused(
        (ctypes.c_int64 * len(numbers))(*numbers), batch, threads, *addresses
    ):
        raise MemoryError("involution: memory ran out")


def multiply_add(times: int) -> float:
    """Does float32 multiply-adds in registers in this thread; returns the number of operations."""
    library, reason = core()
    if library is None:
        raise RuntimeError(reason)
    return library.involution_multiply_add(times)
