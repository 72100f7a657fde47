"""The memory limit of the process, and the GNU C library's allocator."""

import ctypes
import math
import os
import pathlib
import platform

# M_TRIM_THRESHOLD and M_MMAP_MAX of <malloc.h>.
TRIM_THRESHOLD, MMAP_MAX = -1, -4


def disable_malloc_trim() -> bool:
    """Configures the allocator to keep freed memory instead of returning it to the system.

    Returned memory costs page faults and clearing in the next step: up to half of a training step's
    time with JAX. The resident size stays at its peak. False if the C library is not GNU's.
    """
    library = _glibc()
    return library is not None and bool(
        library.mallopt(MMAP_MAX, 0) and library.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    )


def malloc_trim() -> bool:
    """Returns freed memory to the system, for measurements; True if there was any."""
    library = _glibc()
    return library is not None and bool(library.malloc_trim(0))


def memory_limit() -> float:
    """Bytes that this process may use: the minimum of the machine's memory and the limits of
    process and container; infinity if unknown."""
    limits = [math.inf]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        import resource

        rlimits = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
        limits += [s for s, _ in map(resource.getrlimit, rlimits) if s != resource.RLIM_INFINITY]
        limits.append(int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text()))
    except (ImportError, OSError, ValueError):  # Windows; no container; "max" for no limit
        pass
    return min(limits)


def _glibc():
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
