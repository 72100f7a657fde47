"""Checks the wheels that ``make wheels`` built: what is in them, and what their libraries ask for.

    python packaging/check_wheels.py dist/*.whl

Of every wheel: its size, that it has the core and its bindings and no sources, what the libraries
import and export. ``auditwheel`` holds the symbols of Linux's against the wheel's platform.
"""

import pathlib
import re
import subprocess
import sys
import zipfile

import lief

LARGEST = 10 * 1000**2  # bytes
# What each system has without installing anything, or the frameworks bring with their own process.
SYSTEM = {
    "manylinux": r"lib(c|m|dl|pthread|rt)\.so\.\d|ld-linux-[\w-]+\.so\.\d",
    "macosx": r"/usr/lib/libSystem\.B\.dylib",
    "win": r"(kernel32|ntdll|msvcrt|ucrtbase|api-ms-win-crt-[\w-]+)\.dll",
}
OWN = (
    r"(@rpath/)?libinvolution(_jax|_tensorflow)?\.(so|dll)"  # on macOS a library names itself, too
)
BINDINGS = {"manylinux": ("jax", "tensorflow"), "macosx": ("jax", "tensorflow"), "win": ("jax",)}
MACHINES = {"x86_64": "X86_64", "amd64": "AMD64", "aarch64": "AARCH64", "arm64": "ARM64"}


def check(wheel):
    system, machine = re.fullmatch(
        r"involution-[^-]+-py3-none-(manylinux|macosx|win)_(?:\d+_\d+_)?(\w+)\.whl", wheel.name
    ).groups()
    suffix = ".dll" if system == "win" else ".so"
    size = wheel.stat().st_size
    assert size < LARGEST, f"it is larger than {LARGEST} bytes. Received: {size}"
    with zipfile.ZipFile(wheel) as archive:
        folder = "involution/native/"
        files = {n.removeprefix(folder) for n in archive.namelist() if n.startswith(folder)}
        wanted = {f"libinvolution{suffix}"}
        wanted |= {f"libinvolution_{name}{suffix}" for name in BINDINGS[system]}
        # The reason why there is none.
        expected = wanted | ({"missing_tensorflow.txt"} if system == "win" else set())
        assert files == expected, (
            f"{folder} must hold {sorted(expected)}. Received: {sorted(files)}"
        )
        for name in sorted(wanted):
            check_library(name, lief.parse(archive.read(folder + name)), system, machine)
    if system == "manylinux":
        check_glibc(wheel)
    print(f"{wheel.name}: {size / 1e6:.1f} MB, {', '.join(sorted(wanted))}")


def check_glibc(wheel):
    command = [sys.executable, "-m", "auditwheel", "show", str(wheel)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    shown = " ".join(shown.split())
    found = re.search(r'following platform tag: "manylinux_2_(\d+)_', shown)
    named = re.search(r"manylinux_2_(\d+)_", wheel.name)
    # An older one will do.
    assert found is not None, f"{wheel.name}: auditwheel says: {shown}"
    assert int(found[1]) <= int(named[1]), f"{wheel.name}: auditwheel says: {shown}"


def check_library(name, library, system, machine):
    # Mach-O's are commands, of which the first may name the library itself.
    imports = {getattr(found, "name", found) for found in library.libraries}
    allowed = f"({SYSTEM[system]}|{OWN})"
    foreign = sorted(i for i in imports if not re.fullmatch(allowed, i, re.IGNORECASE))
    assert not foreign, f"{name} may import only the system's libraries. Received: {foreign}"
    # Any other, of the C++ library say, could meet a framework's own of that name.
    exports = {str(f.name).removeprefix("_") for f in library.exported_functions}
    # Zig's linker for macOS hides no symbol of its C++ library. There it exports `operator new` and
    # `delete`, which like the system's are `malloc` and `free`: either may serve both.
    harmless = r"_Z(n[aw]|d[al])\w*|_mh_dylib_header|__dso_handle"
    harmless = harmless if system == "macosx" else r"(?!)"
    others = sorted(
        e for e in exports if not e.startswith("involution_") and not re.fullmatch(harmless, e)
    )
    assert not others, f"{name} must export its entries alone. Received: {others[:5]}"
    header = library.header
    kind = header.machine_type if system == "manylinux" else getattr(header, "machine", None)
    if system == "macosx":
        kind = header.cpu_type
        oldest = library.build_version.minos
        assert oldest == [11, 0, 0], f"{name} must run on macOS 11.0. Received: {oldest}"
        # Apple silicon runs no code that is not signed.
        assert machine != "arm64" or library.has_code_signature, f"{name} must be signed"
    told = str(kind).rpartition(".")[2]
    assert told == MACHINES[machine], f"{name} must be for {machine}. Received: {told}"


if __name__ == "__main__":
    assert len(sys.argv) > 1, "no wheel was given"
    for argument in sys.argv[1:]:
        check(pathlib.Path(argument))
