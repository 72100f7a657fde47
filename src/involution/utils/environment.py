"""Versions and memory of this process."""

import platform
import sys
from importlib import metadata

PACKAGES = ("involution", "keras", "numpy", "tensorflow", "tensorflow-cpu", "jax", "torch")


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that affect results, by name."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_memory() -> int | None:
    """Peak resident memory of this process in bytes; None where the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
