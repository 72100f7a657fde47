"""The process's memory: how much it may take, and what the C library does with what is freed."""

import ctypes
import math
import os
import pathlib
import platform

# Of <malloc.h>.
TRIM_THRESHOLD, MMAP_MAX = -1, -4


def keep_freed() -> bool:
    """Keeps freed memory in this process, instead of giving it back to the system each time.

    Memory that is given back is new, and must be cleared page by page, at the next step: up to
    half of a training step's time with JAX. What the process holds does not grow beyond what it
    once needed. False where the C library is not GNU's.
    """
    library = _library()
    return library is not None and bool(
        library.mallopt(MMAP_MAX, 0) and library.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    )


def give_back() -> bool:
    """Gives freed memory back to the system now: whether there was any. For measuring."""
    library = _library()
    return library is not None and bool(library.malloc_trim(0))


def allowed() -> float:
    """Bytes that this process may hold: the machine's, or less where a limit is set; infinity where
    the system does not tell."""
    limits = [math.inf]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        import resource

        of_process = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
        limits += [s for s, _ in map(resource.getrlimit, of_process) if s != resource.RLIM_INFINITY]
        limits.append(int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text()))  # a container's
    except (ImportError, OSError, ValueError):  # Windows; no container; "max", which is none
        pass
    return min(limits)


def _library():
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
