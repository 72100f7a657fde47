"""The C library's memory, for programs that make the same large tensors again and again."""

import ctypes
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


def _library():
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
