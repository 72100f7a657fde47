"""Observes executed code, opened files, sockets and memory growth of a block, by audit hooks,
inotify and /proc."""

import contextlib
import ctypes
import os
import pathlib
import sys
import tempfile

import involution
from involution.utils import memory

EXECUTION_EVENTS = (
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
# Keras reads the amount of free memory.
SYSTEM = ("/proc", "/sys/fs/cgroup", "/dev/null", "/dev/urandom")
IN_OPEN, IN_NONBLOCK = 0x20, 0x800


class Watch:
    """Records audit events while ``active``.

    Attributes:
        executed: Imports, executed code and started processes.
        opened: Files outside the allowed folders.
        sockets: Names of socket events.
        memory_growth: Growth of peak memory in bytes.
    """

    def __init__(self, *folders):
        self.folders = [str(folder) for folder in folders]
        self.executed: list[str] = []
        self.opened: list[str] = []
        self.sockets: list[str] = []
        self.memory_growth = 0
        self.active = False
        # Number of libraries' bytecode files that were opened and not yet unmarshaled.
        self.pending_bytecode = 0
        self.imported = {name.split(".")[0] for name in sys.modules}

    def event(self, name, arguments):
        if name.startswith("socket."):
            self.sockets.append(name)
        elif name == "marshal.loads" and self.pending_bytecode:
            self.pending_bytecode -= 1
        elif name in EXECUTION_EVENTS:
            self.executed.append(f"{name} {arguments!r}"[:300])
        elif name == "import" and arguments[0].split(".")[0] not in self.imported:
            self.executed.append(f"import {arguments[0]}")
        elif name in ("exec", "compile"):
            self.code(name, arguments)
        elif name in ("open", "os.remove", "os.mkdir", "os.rename", "os.listdir", "os.scandir"):
            self.file(name, arguments)

    def code(self, name, arguments):
        file = arguments[0].co_filename if name == "exec" else arguments[1]
        file = os.fsdecode(file) if isinstance(file, (str, bytes)) else repr(file)
        # namedtuple and dataclasses generate code with file names such as "<string>".
        if not file.startswith("<") and not within(file, LIBRARIES):
            self.executed.append(f"{name} {file}")

    def file(self, name, arguments):
        path = arguments[0]
        if not isinstance(path, (str, bytes, os.PathLike)):
            return  # an open file
        if name == "os.remove" and arguments[1] != -1:
            return  # relative to a folder handle
        path = os.path.abspath(os.fsdecode(path))
        self.pending_bytecode += path.endswith(".pyc") and within(path, LIBRARIES)
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
def observe(*folders):
    """Yields a ``Watch`` of the block. Files in ``folders`` are allowed; temporary files go to the
    last one."""
    if not _watches:
        sys.addaudithook(_hook)  # cannot be removed
    watch = Watch(*folders)
    _watches[:] = [watch]
    memory.malloc_trim()
    before, temporary = memory_bytes(), tempfile.tempdir
    tempfile.tempdir = str(folders[-1])
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    watch.active = True
    try:
        yield watch
    finally:
        watch.active = False
        watch.memory_growth = memory_bytes("VmHWM") - before
        tempfile.tempdir = temporary


def memory_bytes(what="VmRSS") -> int:
    """Bytes of memory: ``VmRSS`` now, ``VmHWM`` at the peak."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


class FileOpenMonitor:
    """Detects that a file is opened, also by C libraries, which raise no audit events."""

    def __init__(self, path):
        self.library = ctypes.CDLL(None)
        self.handle = self.library.inotify_init1(IN_NONBLOCK)
        assert self.library.inotify_add_watch(self.handle, os.fsencode(path), IN_OPEN) >= 0

    def was_opened(self) -> bool:
        try:
            return bool(os.read(self.handle, 4096))
        except BlockingIOError:
            return False

    def close(self):
        os.close(self.handle)
