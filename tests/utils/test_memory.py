"""In processes of their own: what is set stays set."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.any_backend

SCRIPT = """
import resource, sys
import numpy as np
from involution import memory
if sys.argv[1] == "keep":
    assert memory.keep_freed()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(16_000_000, "uint8")
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults(how):
    command = [sys.executable, "-c", SCRIPT, how]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is the GNU C library's")
def test_memory_that_was_freed_is_not_new_again():
    assert faults("keep") < 100 < faults("leave")
