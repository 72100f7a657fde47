"""Memory of this process, on Linux."""

import pathlib
import sys

import pytest

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def peak_memory() -> int:
    """In bytes, since the last call. A new process inherits the peak of ``getrusage`` from its
    parent, so that only what exceeds the parent's would be seen there."""
    peak = _status("VmHWM")
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return peak


def resident_memory() -> int:
    """In bytes."""
    return _status("VmRSS")


def _status(name):
    status = pathlib.Path("/proc/self/status").read_text()
    (line,) = (s for s in status.splitlines() if s.startswith(name))
    return int(line.split()[1]) * 1024
