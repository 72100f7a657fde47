"""Files that are whole or not there: written beside their place, synced, renamed."""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import pathlib
import tempfile

from involution.utils.errors import WriteError, shown

# Of files that are being written; where a process was killed, such a file is left.
PART = ".part-"


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path in the same folder; what is written there replaces ``path`` when the
    block ends well, and is removed when it does not.

    Raises:
        WriteError: The disk is full, or something else keeps the file from being written.
    """
    path = pathlib.Path(path)
    with writing(path), _part(path) as temporary:
        yield temporary
        _place(temporary, path)


@contextlib.contextmanager
def writing(path):
    """Within the block what the system refuses is a WriteError of this path."""
    try:
        yield
    except OSError as error:
        raise WriteError(error.errno, error.strerror or str(error), str(path)) from error


def remove_parts(folder):
    """Removes what killed processes left of files that they were writing, in this folder and in
    those within. No other process may be at work there."""
    for path in pathlib.Path(folder).rglob(f"{PART}*"):
        path.unlink()


@contextlib.contextmanager
def _part(path):
    prefix = f"{PART}{path.stem[:40]}-"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=path.suffix)
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _place(temporary, path):
    with open(temporary, "rb+") as f:
        os.fsync(f.fileno())
    # mkstemp's files are readable by their owner alone; these are made to be shared.
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)
    temporary.replace(path)
    _sync_folder(path.parent)


def sha256(path) -> str:
    """Of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path, text):
    """UTF-8. Bytes of a file's name that are not text become escapes, in JSON its own."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path, value):
    """JSON as every parser reads it: what is not finite is null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    # The same value: escapes as JSON has them.
    write_text(path, shown(text, "\n") + "\n")


def csv_text(columns, rows) -> str:
    """CSV with a heading of these columns, from dictionaries that may hold more."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    for row in rows:
        table.writerow({k: shown(v) if isinstance(v, str) else v for k, v in row.items()})
    return text.getvalue()


def _finite(value):
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sync_folder(folder):
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
