"""A run's state on disk: what a killed run goes on from, to the bit.

One checkpoint is one file of safetensors, arrays and a text, and its name holds the SHA-256 of its
bytes: one rename makes it, and no changed or shortened file passes for one.
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
from involution.utils.errors import InputError, WriteError

FOLDER, LOCK = "checkpoints", ".lock"
NAME = re.compile(r"(\d{12})-([0-9a-f]{64})\.safetensors")
KEEP = 2
# What reading another's JSON may raise, of any form and depth.
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
STATE, FORMAT = "state", 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What was saved.

    Attributes:
        number: It counts checkpoints of a run.
        arrays: By name.
        state: What JSON can hold.
    """

    number: int
    arrays: dict[str, np.ndarray]
    state: dict


@contextlib.contextmanager
def alone(folder) -> Iterator[None]:
    """Within the block no other process works in this folder.

    Raises:
        InputError: Another one does. A dead process holds nothing.
        WriteError: The file that tells others cannot be written.
    """
    lock = filelock.FileLock(pathlib.Path(folder) / LOCK)
    with atomic_files.as_write_error(lock.lock_file):
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout as error:
            raise InputError(
                "The output folder must be free. "
                f"Received: {folder}, where another process is at work"
            ) from error
    try:
        yield
    finally:
        lock.release()


class Store:
    """The checkpoints of a run's folder.

    Args:
        folder: The run's folder; they are in one of their own within it.
    """

    def __init__(self, folder):
        self.folder = pathlib.Path(folder) / FOLDER

    def save(self, arrays, state) -> Checkpoint:
        """Writes a checkpoint, reads it back, and only then removes all older ones but one.

        Raises:
            WriteError: It cannot be written, or read back; the older ones are there as before.
        """
        found = self._found()
        number = 1 + (found[0][0] if found else 0)
        with atomic_files.as_write_error(self.folder):
            self.folder.mkdir(exist_ok=True)
        content = save_arrays(
            {name: np.asarray(array, order="C") for name, array in arrays.items()},
            # NaN and infinities as Python writes them: only Python reads this.
            metadata={STATE: json.dumps({"format": FORMAT, **state})},
        )
        digest = hashlib.sha256(content).hexdigest()
        path = self.folder / f"{number:012d}-{digest}.safetensors"
        with atomic_files.atomic_write(path) as temporary:
            temporary.write_bytes(content)
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            path.unlink()
            raise WriteError(errno.EIO, "it is not read back as it was written", str(path))
        for _, _, old in self._found()[KEEP:]:
            old.unlink()
        return Checkpoint(number, arrays, state)

    def latest(self, say: Callable[[str], None]) -> Checkpoint | None:
        """The newest whole checkpoint; of damaged ones ``say`` is told in one line each."""
        for number, digest, path in self._found():
            try:
                content = path.read_bytes()
                if hashlib.sha256(content).hexdigest() != digest:
                    raise ValueError("its content is not what its name says")
                return Checkpoint(number, load_arrays(content), _state(content))
            except (*DAMAGED, SafetensorError) as error:
                say(f"Checkpoint {number} is damaged, the one before it is taken: {error}")
        return None

    def remove_older(self):
        """Removes all checkpoints but the newest."""
        for _, _, path in self._found()[1:]:
            path.unlink()

    def _found(self) -> list[tuple[int, str, pathlib.Path]]:
        """(number, digest, path), the newest first."""
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        named = ((NAME.fullmatch(path.name), path) for path in paths)
        return sorted(((int(m[1]), m[2], path) for m, path in named if m), reverse=True)


def _state(content) -> dict:
    """The text of a file of safetensors: its header is JSON after 8 bytes with its length."""
    end = 8 + int.from_bytes(content[:8], "little")
    state = json.loads(json.loads(content[8:end])["__metadata__"][STATE])
    if state.pop("format") != FORMAT:
        raise ValueError(f"its format must be {FORMAT}")
    return state
