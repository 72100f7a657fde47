"""Checks the wheels built by ``make wheels``: contents, and imports and exports of the libraries.

    python packaging/check_wheels.py dist/*.whl

Each wheel must be below the size limit and contain the core and its bindings, without sources.
``auditwheel`` checks the symbol versions of Linux wheels against the platform tag.
"""

import pathlib
import re
import subprocess
import sys
import zipfile

import lief

MAX_BYTES = 10 * 1000**2
# Libraries of a minimal installation, or loaded by the frameworks.
SYSTEM = {
    "manylinux": r"lib(c|m|dl|pthread|rt)\.so\.\d|ld-linux-[\w-]+\.so\.\d",
    "macosx": r"/usr/lib/libSystem\.B\.dylib",
    "win": r"(kernel32|ntdll|msvcrt|ucrtbase|api-ms-win-crt-[\w-]+)\.dll",
}
# A Mach-O library lists itself, the bindings list the core.
OWN_LIBRARIES = r"(@rpath/)?libinvolution(_jax|_onnxruntime|_tensorflow)?\.(so|dll)"
BINDINGS = {
    "manylinux": ("jax", "onnxruntime", "tensorflow"),
    "macosx": ("jax", "onnxruntime", "tensorflow"),
    "win": ("jax", "onnxruntime"),
}
# The name that onnxruntime calls.
ONNXRUNTIME_EXPORT = "RegisterCustomOps"
MACHINES = {"x86_64": "X86_64", "amd64": "AMD64", "aarch64": "AARCH64", "arm64": "ARM64"}


def check(wheel):
    system, machine = re.fullmatch(
        r"involution-[^-]+-py3-none-(manylinux|macosx|win)_(?:\d+_\d+_)?(\w+)\.whl", wheel.name
    ).groups()
    suffix = ".dll" if system == "win" else ".so"
    size = wheel.stat().st_size
    assert size < MAX_BYTES, f"a wheel must have less than {MAX_BYTES} bytes. Received: {size}"
    with zipfile.ZipFile(wheel) as archive:
        folder = "involution/native/"
        files = {n.removeprefix(folder) for n in archive.namelist() if n.startswith(folder)}
        libraries = {f"libinvolution{suffix}"}
        libraries |= {f"libinvolution_{name}{suffix}" for name in BINDINGS[system]}
        # The text file has the reason why a binding is missing.
        expected = libraries | ({"missing_tensorflow.txt"} if system == "win" else set())
        assert files == expected, (
            f"{folder} must contain {sorted(expected)}. Received: {sorted(files)}"
        )
        for name in sorted(libraries):
            check_library(name, lief.parse(archive.read(folder + name)), system, machine)
    if system == "manylinux":
        check_glibc(wheel)
    print(f"{wheel.name}: {size / 1e6:.1f} MB, {', '.join(sorted(libraries))}")


def check_glibc(wheel):
    command = [sys.executable, "-m", "auditwheel", "show", str(wheel)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    output = " ".join(output.split())
    found = re.search(r'following platform tag: "manylinux_2_(\d+)_', output)
    named = re.search(r"manylinux_2_(\d+)_", wheel.name)
    # An older glibc is compatible.
    assert found is not None, f"{wheel.name}: auditwheel reports: {output}"
    assert int(found[1]) <= int(named[1]), f"{wheel.name}: auditwheel reports: {output}"


def check_library(name, library, system, machine):
    # Mach-O imports are load commands; the first may be the library's own name.
    imports = {getattr(found, "name", found) for found in library.libraries}
    allowed = f"({SYSTEM[system]}|{OWN_LIBRARIES})"
    foreign = sorted(i for i in imports if not re.fullmatch(allowed, i, re.IGNORECASE))
    assert not foreign, f"{name} may only import system libraries. Received: {foreign}"
    # Other exports, such as those of the C++ library, could clash with a framework's symbols.
    exports = {str(f.name).removeprefix("_") for f in library.exported_functions}
    # Zig's macOS linker does not hide C++ library symbols: it exports `operator new` and `delete`,
    # which call `malloc` and `free` as the system's do, and are interchangeable with them.
    harmless = r"_Z(n[aw]|d[al])\w*|_mh_dylib_header|__dso_handle"
    harmless = harmless if system == "macosx" else r"(?!)"
    others = sorted(
        e
        for e in exports - {ONNXRUNTIME_EXPORT}
        if not e.startswith("involution_") and not re.fullmatch(harmless, e)
    )
    assert not others, f"{name} may only export involution_* symbols. Received: {others[:5]}"
    header = library.header
    kind = header.machine_type if system == "manylinux" else getattr(header, "machine", None)
    if system == "macosx":
        kind = header.cpu_type
        oldest = library.build_version.minos
        assert oldest == [11, 0, 0], f"{name} must run on macOS 11.0. Received: {oldest}"
        # Apple silicon requires signed code.
        assert machine != "arm64" or library.has_code_signature, f"{name} must be signed"
    found = str(kind).rpartition(".")[2]
    assert found == MACHINES[machine], f"{name} must be for {machine}. Received: {found}"


if __name__ == "__main__":
    assert len(sys.argv) > 1, "at least one wheel is required"
    for argument in sys.argv[1:]:
        check(pathlib.Path(argument))
