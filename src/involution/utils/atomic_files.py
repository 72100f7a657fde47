"""Atomic writes: a temporary file in the same folder is synced and then renamed."""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import pathlib
import secrets

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


def move_folder(folder, path):
    """Syncs a folder's files and renames it; both are on one file system, and ``path`` is new.

    Raises:
        WriteError: A file cannot be written, for example because the disk is full.
    """
    folder, path = pathlib.Path(folder), pathlib.Path(path)
    with as_write_error(path):
        for entry in [*folder.rglob("*"), folder]:
            if entry.is_dir():
                sync_folder(entry)
            else:
                _sync_file(entry)
        folder.rename(path)
        sync_folder(path.parent)


def remove_temporaries(folder):
    """Removes the temporary files that killed processes left in a folder and its subfolders. No
    other process may be writing to the folder."""
    for path in pathlib.Path(folder).rglob(f"{TMP_PREFIX}*"):
        path.unlink()


@contextlib.contextmanager
def _temporary(path):
    # Not by ``tempfile``, whose files only their owner can read.
    name = f"{TMP_PREFIX}{path.stem[:40]}-{secrets.token_hex(8)}{path.suffix}"
    temporary = path.with_name(name)
    temporary.open("xb").close()
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _commit(temporary, path):
    _sync_file(temporary)
    temporary.replace(path)
    sync_folder(path.parent)


def sha256(path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path, text):
    """Writes UTF-8. Bytes of file names that are not UTF-8 become escapes."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path, value):
    """Writes ``json_text(value)``."""
    write_text(path, json_text(value))


def json_text(value) -> str:
    """Strict JSON: NaN and infinities become null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    return escape_controls(text, "\n") + "\n"


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


def _sync_file(path):
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder):
    if os.name != "posix":  # folders cannot be opened elsewhere
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
