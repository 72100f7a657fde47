"""Checkpoints of a run, from which an interrupted run resumes bit-exactly.

A checkpoint is one safetensors file with arrays and a JSON state. It is written
atomically, by a rename. Its name contains the SHA-256 of its content, by which a modified or
truncated file is detected.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterator

import filelock
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from involution.utils import atomic_files
from involution.utils.errors import InputError, WriteError, one_line

FOLDER, LOCK = "checkpoints", ".lock"
FILENAME = re.compile(r"(\d{12})-([0-9a-f]{64})\.safetensors")
MAX_TO_KEEP = 2
# Exceptions that reading malformed JSON of any structure and depth may raise.
CORRUPTION_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
)
STATE, FORMAT = "state", 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A saved checkpoint.

    Attributes:
        number: Its number in the run, from 1.
        arrays: Arrays by name.
        state: A JSON-serializable dictionary.
    """

    number: int
    arrays: dict[str, np.ndarray]
    state: dict


@contextlib.contextmanager
def exclusive_lock(folder) -> Iterator[None]:
    """Locks the folder for the block.

    Raises:
        InputError: Another process holds the lock. The lock of a dead process is released.
        WriteError: The lock file cannot be written.
    """
    lock = filelock.FileLock(pathlib.Path(folder) / LOCK)
    with atomic_files.as_write_error(lock.lock_file):
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout as error:
            raise InputError(
                "The output folder must not be in use by another process. "
                f"Received: {folder}, which another process has locked"
            ) from error
    try:
        yield
    finally:
        lock.release()


class CheckpointManager:
    """The checkpoints in a run folder.

    Args:
        folder: The run folder; checkpoints are in its subfolder ``checkpoints``.
    """

    def __init__(self, folder):
        self.folder = pathlib.Path(folder) / FOLDER

    def save(self, arrays, state) -> Checkpoint:
        """Writes and verifies a checkpoint, and then deletes all but the newest two.

        Raises:
            WriteError: Writing or verification failed; older checkpoints are unchanged.
        """
        found = self._find()
        number = 1 + (found[0][0] if found else 0)
        self._write(f"{number:012d}", arrays, state)
        self._delete(old for _, _, old in self._find()[MAX_TO_KEEP:])
        return Checkpoint(number, arrays, state)

    def _write(self, prefix, arrays, state) -> pathlib.Path:
        """Writes a file whose name ends in the SHA-256 of its content, and verifies it."""
        with atomic_files.as_write_error(self.folder):
            self.folder.mkdir(exist_ok=True)
        content = save_arrays(
            {name: np.asarray(array, order="C") for name, array in arrays.items()},
            # Python's NaN and Infinity are not standard JSON; only Python reads them here.
            metadata={STATE: json.dumps({"format": FORMAT, **state})},
        )
        digest = hashlib.sha256(content).hexdigest()
        path = self.folder / f"{prefix}-{digest}.safetensors"
        with atomic_files.atomic_write(path) as temporary:
            temporary.write_bytes(content)
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            self._delete([path])
            raise WriteError(errno.EIO, "the file differs from what was written", str(path))
        return path

    def save_final(self, label, arrays, state):
        """Writes the state at the end of a model's training, instead of an earlier one.

        Raises:
            WriteError: As for ``save``.
        """
        new = self._write(_final_prefix(label), arrays, state)
        self._delete(path for _, path in self._find_final(label) if path != new)

    def final(self, label, warn: Callable[[str], None]) -> Checkpoint | None:
        """The state at the end of a model's training; None if there is none that is intact.
        ``warn`` receives one line for each corrupt one."""
        for digest, path in self._find_final(label):
            try:
                return _read(0, digest, path)
            except (*CORRUPTION_ERRORS, SafetensorError) as error:
                warn(f"The final state of {label} is corrupt and skipped: {one_line(error)}")
        return None

    def _find_final(self, label) -> list[tuple[str, pathlib.Path]]:
        named = re.compile(rf"{_final_prefix(label)}-([0-9a-f]{{64}})\.safetensors")
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        return [(m[1], path) for path in paths if (m := named.fullmatch(path.name))]

    def latest(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """The newest intact checkpoint; ``warn`` receives one line for each corrupt one."""
        for number, digest, path in self._find():
            try:
                return _read(number, digest, path)
            except (*CORRUPTION_ERRORS, SafetensorError) as error:
                warn(f"Checkpoint {number} is corrupt and skipped: {one_line(error)}")
        return None

    def remove_older(self):
        """Deletes all checkpoints except the newest."""
        self._delete(path for _, _, path in self._find()[1:])

    def _delete(self, paths):
        with atomic_files.as_write_error(self.folder):
            for path in paths:
                path.unlink()

    def _find(self) -> list[tuple[int, str, pathlib.Path]]:
        """(number, digest, path) of each checkpoint, newest first."""
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        named = ((FILENAME.fullmatch(path.name), path) for path in paths)
        return sorted(((int(m[1]), m[2], path) for m, path in named if m), reverse=True)


def _final_prefix(label) -> str:
    """The start of the file name of a model's final state; labels may contain any character."""
    return f"final-{hashlib.sha256(label.encode()).hexdigest()[:16]}"


def _read(number, digest, path) -> Checkpoint:
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError("its content does not match the hash in its name")
    return Checkpoint(number, load_arrays(content), _read_state(content))


def _read_state(content) -> dict:
    """The state in a safetensors file, whose JSON header follows 8 bytes with its length."""
    end = 8 + int.from_bytes(content[:8], "little")
    state = json.loads(json.loads(content[8:end])["__metadata__"][STATE])
    if state.pop("format") != FORMAT:
        raise ValueError(f"its format must be {FORMAT}")
    return state
