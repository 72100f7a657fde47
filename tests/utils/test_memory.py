"""Settings of the C allocator, which cannot be undone: each test uses a subprocess."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.any_backend

SCRIPT = """
import resource, sys
import numpy as np
from involution.utils import memory
if sys.argv[1] == "keep":
    assert memory.disable_malloc_trim()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(16_000_000, "uint8")
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults(setting):
    command = [sys.executable, "-c", SCRIPT, setting]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(run.stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="requires glibc")
def test_disable_malloc_trim_avoids_page_faults_on_reuse():
    assert faults("keep") < 100 < faults("default")
