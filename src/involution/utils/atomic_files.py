"""Atomic writes: a temporary file in the same folder is synced and then renamed."""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import pathlib
import tempfile

from involution.utils.errors import WriteError, escape_controls

# Prefix of temporary files, which killed processes leave behind.
TMP_PREFIX = ".part-"


@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary path in the same folder. It replaces ``path`` when the block succeeds, and
    is removed when the block raises.

    Raises:
        WriteError: The file cannot be written, for example because the disk is full.
    """
    path = pathlib.Path(path)
    with as_write_error(path), _temporary(path) as temporary:
        yield temporary
        _commit(temporary, path)


@contextlib.contextmanager
def as_write_error(path):
    """Raises an ``OSError`` of the block as a ``WriteError`` of ``path``."""
    try:
        yield
    except OSError as error:
        raise WriteError(error.errno, error.strerror or str(error), str(path)) from error


def remove_temporaries(folder):
    """Removes the temporary files that killed processes left in a folder and its subfolders. No
    other process may be writing to the folder."""
    for path in pathlib.Path(folder).rglob(f"{TMP_PREFIX}*"):
        path.unlink()


@contextlib.contextmanager
def _temporary(path):
    prefix = f"{TMP_PREFIX}{path.stem[:40]}-"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=path.suffix)
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _commit(temporary, path):
    with open(temporary, "rb+") as f:
        os.fsync(f.fileno())
    # mkstemp makes files readable by their owner only.
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)
    temporary.replace(path)
    _sync_folder(path.parent)


def sha256(path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path, text):
    """Writes UTF-8. Bytes of file names that are not UTF-8 become escapes."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path, value):
    """Writes strict JSON: NaN and infinities become null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, escape_controls(text, "\n") + "\n")


def csv_text(columns, rows) -> str:
    """CSV with a header and these columns; rows are dictionaries, other keys are ignored."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    for row in rows:
        table.writerow({k: escape_controls(v) if isinstance(v, str) else v for k, v in row.items()})
    return text.getvalue()


def _finite(value):
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sync_folder(folder):
    if os.name != "posix":  # folders cannot be opened elsewhere
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
