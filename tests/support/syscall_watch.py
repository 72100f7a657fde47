"""What happens while a function runs: code, files, sockets, memory."""

import contextlib
import ctypes
import os
import pathlib
import sys
import tempfile

import involution
from involution.utils import memory

RUNS = (
    "marshal.loads",
    "pickle.find_class",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "subprocess.Popen",
    "webbrowser.open",
)
LIBRARIES = {sys.prefix, sys.base_prefix, *sys.path[1:], *involution.__path__} - {""}
# What the machine has: Keras asks how much memory is free.
SYSTEM = ("/proc", "/sys/fs/cgroup", "/dev/null", "/dev/urandom")
IN_OPEN, IN_NONBLOCK = 0x20, 0x800


class Watch:
    """Notes what Python tells its audit hooks while ``active``.

    Attributes:
        ran: What was imported, executed or started.
        opened: Files outside of what may be opened.
        sockets: Names of events.
        grown: Bytes that the process has taken at most.
    """

    def __init__(self, *folders):
        self.folders = [str(folder) for folder in folders]
        self.ran: list[str] = []
        self.opened: list[str] = []
        self.sockets: list[str] = []
        self.grown = 0
        self.active = False
        # Compiled modules of libraries, opened and not yet read.
        self.modules = 0
        self.known = {name.split(".")[0] for name in sys.modules}

    def event(self, name, arguments):
        if name.startswith("socket."):
            self.sockets.append(name)
        elif name == "marshal.loads" and self.modules:
            self.modules -= 1
        elif name in RUNS:
            self.ran.append(f"{name} {arguments!r}"[:300])
        elif name == "import" and arguments[0].split(".")[0] not in self.known:
            self.ran.append(f"import {arguments[0]}")
        elif name in ("exec", "compile"):
            self.code(name, arguments)
        elif name in ("open", "os.remove", "os.mkdir", "os.rename", "os.listdir", "os.scandir"):
            self.file(name, arguments)

    def code(self, name, arguments):
        file = arguments[0].co_filename if name == "exec" else arguments[1]
        file = os.fsdecode(file) if isinstance(file, (str, bytes)) else repr(file)
        # "<string>" and its like are what namedtuple and dataclasses write for themselves.
        if not file.startswith("<") and not within(file, LIBRARIES):
            self.ran.append(f"{name} {file}")

    def file(self, name, arguments):
        path = arguments[0]
        if not isinstance(path, (str, bytes, os.PathLike)):
            return  # an open file
        if name == "os.remove" and arguments[1] != -1:
            return  # in a folder that was opened
        path = os.path.abspath(os.fsdecode(path))
        self.modules += path.endswith(".pyc") and within(path, LIBRARIES)
        writes = name != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        reads = () if writes and name not in ("os.listdir", "os.scandir") else LIBRARIES
        if not within(path, [*self.folders, *reads, *SYSTEM]):
            self.opened.append(f"{name} {path}")


def within(path, folders):
    return any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)


_watches: list[Watch] = []


def _hook(name, arguments):
    for watch in _watches:
        if watch.active:
            watch.event(name, arguments)


@contextlib.contextmanager
def watching(*folders):
    """Yields a ``Watch`` of the block, in which these folders are free; temporary files go into the
    last one."""
    if not _watches:
        sys.addaudithook(_hook)  # for ever
    watch = Watch(*folders)
    _watches[:] = [watch]
    memory.malloc_trim()
    before, temporary = held(), tempfile.tempdir
    tempfile.tempdir = str(folders[-1])
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    watch.active = True
    try:
        yield watch
    finally:
        watch.active = False
        watch.grown = held("VmHWM") - before
        tempfile.tempdir = temporary


def held(what="VmRSS") -> int:
    """Bytes of memory, now or at most."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


class Doorbell:
    """Tells whether a file was opened, by whomever: libraries in C ask no audit hook."""

    def __init__(self, path):
        self.library = ctypes.CDLL(None)
        self.handle = self.library.inotify_init1(IN_NONBLOCK)
        assert self.library.inotify_add_watch(self.handle, os.fsencode(path), IN_OPEN) >= 0

    def rang(self) -> bool:
        try:
            return bool(os.read(self.handle, 4096))
        except BlockingIOError:
            return False

    def close(self):
        os.close(self.handle)
