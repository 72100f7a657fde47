"""The build of the native core: what fails there is a reason, and the installation goes on."""

import shutil
import subprocess
import sys

import pytest

from involution.ops.native import library
from tests.support import backends
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.any_backend,
    pytest.mark.skipif(
        shutil.which("cmake") is None or shutil.which("c++") is None,
        reason="the build needs CMake and a C++ compiler",
    ),
]

# Minimal sources that compile at once.
STUBS = {
    "kernels/kernels.cpp": "static int nothing; int* INVOLUTION_TARGET() { return &nothing; }",
    "api.cpp": "int involution_of_the_test() { return 0; }",
    "fused.cpp": "",
    "partition.cpp": "",
    "plan.cpp": "",
    "targets.cpp": "",
    "thread_pool.cpp": "",
    "bindings/tensorflow.cpp": "extern int for_tensorflow; int for_tensorflow = 1;",
    "bindings/jax.cpp": "extern int for_jax; int for_jax = 1;",
}


@pytest.fixture
def sources(tmp_path):
    """A copy of the build files, with stubs for the sources."""
    native = tmp_path / "project" / "csrc"
    for folder in ("kernels", "bindings"):
        (native / folder).mkdir(parents=True)
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path / "project")
    for name in ("CMakeLists.txt", "build.cmake"):
        shutil.copy(ROOT / "csrc" / name, native)
    for name, text in STUBS.items():
        (native / name).write_text(text + "\n")
    return native


def installed(sources, *settings):
    """{file: text, or None for a library} of an installation, as scikit-build-core makes it."""
    project = sources.parent
    build, prefix = project / "build", project / "prefix"
    python = f"-DPython_EXECUTABLE={sys.executable}"
    for command in (
        ["cmake", "-S", project, "-B", build, "-DCMAKE_BUILD_TYPE=Release", python, *settings],
        ["cmake", "--build", build],
        ["cmake", "--install", build, "--prefix", prefix],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    files = (prefix / "involution" / "native").iterdir()
    return {f.name: None if f.suffix in (".so", ".dll") else f.read_text() for f in files}


def test_what_cannot_be_built_costs_only_itself(sources):
    (sources / "bindings/tensorflow.cpp").write_text("#error no such interface\n")
    files = installed(sources)
    assert files.pop("libinvolution.so", "") is None
    reason = files.pop("missing_tensorflow.txt")
    assert reason.startswith("bindings/tensorflow.cpp:1:")
    assert "error" in reason
    assert reason.endswith("no such interface\n")
    assert reason.count("\n") == 1
    assert files == {"libinvolution_jax.so": None}


def test_a_core_that_cannot_be_compiled_is_a_reason(sources):
    (sources / "thread_pool.cpp").write_text("#error another machine's [word]; and so on\n")
    (name, reason), *rest = installed(sources).items()
    assert (name, rest) == ("missing.txt", [])
    assert reason.startswith("thread_pool.cpp:1:")
    assert "another machine's" in reason


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'c++: error: the license has expired' >&2; exit 1", "the license has expired"),
        ("exit 3", "is not able to compile a simple test program."),
    ],
)
def test_a_compiler_that_does_not_work_is_a_reason(sources, script, reason):
    compiler = sources / "c++"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    files = installed(sources, f"-DCMAKE_CXX_COMPILER={compiler}")
    assert list(files) == ["missing.txt"]
    assert files["missing.txt"].endswith(f"{reason}\n")


def test_a_library_that_cannot_be_linked_is_a_reason(sources):
    files = installed(sources, "-DCMAKE_SHARED_LINKER_FLAGS=-linvolution_of_nobody")
    assert list(files) == ["missing.txt"]
    assert "involution_of_nobody" in files["missing.txt"]


def test_a_missing_binding_has_the_reason_of_the_installation(monkeypatch, tmp_path):
    (tmp_path / "missing_jax.txt").write_text("jax.cpp:3:1: error: other headers\n")
    files = {"missing_jax.txt": tmp_path / "missing_jax.txt"}
    monkeypatch.setattr(library, "find", files.get)
    message = "the package was installed without its binding for jax: "
    assert library.binding("jax") == (None, message + "jax.cpp:3:1: error: other headers")
    assert library.binding("torch")[1].endswith("for torch: it was not built")
    # The tests leave out what the installation did.
    monkeypatch.setattr(library, "core", lambda: (object(), None))
    monkeypatch.setattr(backends, "BACKEND", "jax")
    assert backends.missing() == message + "jax.cpp:3:1: error: other headers"


def test_windows_gets_a_core_and_says_why_tensorflow_has_no_binding(sources):
    """As far as another system's CMake goes: names, and what is left out."""
    files = installed(sources, "-DWIN32=ON")
    reason = files.pop("missing_tensorflow.txt")
    assert reason.startswith("on Windows a library cannot")
    assert files == {"libinvolution.dll": None, "libinvolution_jax.dll": None}


def test_each_system_has_its_names_of_libraries(monkeypatch):
    asked = []
    monkeypatch.setattr(library, "find", asked.append)
    monkeypatch.setattr(library, "SUFFIX", ".dll")
    library._load()
    library.binding("jax")
    assert asked[::2] == ["libinvolution.dll", "libinvolution_jax.dll"]
