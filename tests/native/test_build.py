"""The native build: a failure is recorded as a reason, and the installation continues."""

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

# Minimal sources, which compile fast.
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
    "bindings/onnxruntime.cpp": "extern int for_onnxruntime; int for_onnxruntime = 1;",
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
    """Installs with the commands of scikit-build-core: {file: text, or None for a library}."""
    project = sources.parent
    build, prefix = project / "build", project / "prefix"
    python = f"-DPython_EXECUTABLE={sys.executable}"
    for command in (
        ["cmake", "-S", project, "-B", build, "-DCMAKE_BUILD_TYPE=Release", python, *settings],
        ["cmake", "--build", build],
        ["cmake", "--install", build, "--prefix", prefix],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    files = (prefix / "involution" / "native").iterdir()
    return {f.name: None if f.suffix in (".so", ".dll") else f.read_text() for f in files}


@pytest.mark.long
def test_failed_binding_does_not_affect_the_other_libraries(sources):
    (sources / "bindings/tensorflow.cpp").write_text("#error no such interface\n")
    files = installed(sources)
    assert files.pop("libinvolution.so", "") is None
    reason = files.pop("missing_tensorflow.txt")
    assert reason.startswith("bindings/tensorflow.cpp:1:")
    assert "error" in reason
    assert reason.endswith("no such interface\n")
    assert reason.count("\n") == 1
    assert files == {"libinvolution_jax.so": None, "libinvolution_onnxruntime.so": None}


@pytest.mark.long
def test_compile_error_in_the_core_is_recorded(sources):
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
def test_broken_compiler_is_recorded(sources, script, reason):
    compiler = sources / "c++"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    files = installed(sources, f"-DCMAKE_CXX_COMPILER={compiler}")
    assert list(files) == ["missing.txt"]
    assert files["missing.txt"].endswith(f"{reason}\n")


@pytest.mark.long
def test_link_error_is_recorded(sources):
    files = installed(sources, "-DCMAKE_SHARED_LINKER_FLAGS=-linvolution_of_nobody")
    assert list(files) == ["missing.txt"]
    assert "involution_of_nobody" in files["missing.txt"]


def test_missing_binding_has_the_recorded_reason(monkeypatch, tmp_path):
    (tmp_path / "missing_jax.txt").write_text("jax.cpp:3:1: error: other headers\n")
    files = {"missing_jax.txt": tmp_path / "missing_jax.txt"}
    monkeypatch.setattr(library, "find", files.get)
    message = "the package was installed without its binding for jax: "
    assert library.binding("jax") == (None, message + "jax.cpp:3:1: error: other headers")
    assert library.binding("torch")[1].endswith("for torch: it was not built")
    # Tests of `native` are skipped for this reason.
    monkeypatch.setattr(library, "core", lambda: (object(), None))
    monkeypatch.setattr(backends, "BACKEND", "jax")
    assert backends.native_missing_reason() == message + "jax.cpp:3:1: error: other headers"


@pytest.mark.long
def test_windows_has_no_tensorflow_binding(sources):
    """Built on another system, which shows only file names and omitted bindings."""
    files = installed(sources, "-DWIN32=ON")
    reason = files.pop("missing_tensorflow.txt")
    assert reason.startswith("on Windows a library cannot")
    assert files == {
        "libinvolution.dll": None,
        "libinvolution_jax.dll": None,
        "libinvolution_onnxruntime.dll": None,
    }


def test_library_names_have_the_suffix_of_the_system(monkeypatch):
    names = []
    monkeypatch.setattr(library, "find", names.append)
    monkeypatch.setattr(library, "SUFFIX", ".dll")
    library._load()
    library.binding("jax")
    assert names[::2] == ["libinvolution.dll", "libinvolution_jax.dll"]
