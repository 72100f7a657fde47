"""The folder of a run: checks before writing and resuming, and the content of history.csv."""

import os

from involution.training.trainer import METRICS
from involution.utils.atomic_files import csv_text
from involution.utils.errors import InputError


def check_folder(folder, resume=False, is_primary=True):
    """Raises InputError unless a run can be written to the folder.

    Args:
        folder: The folder.
        resume: Whether it may contain a run.
        is_primary: Whether this host writes to it; all others only read.
    """
    try:
        if folder.exists():
            empty = folder.is_dir() and all(map(_is_hidden, folder.iterdir()))
            if not (empty or (resume and folder.is_dir())):
                raise InputError(f"The output folder must be new or empty. Received: {folder}")
        parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        usable = parent.is_dir() and (not is_primary or os.access(parent, os.W_OK))
    except OSError:
        usable = False
    if not usable:
        raise InputError(f"The output folder must be writable. Received: {folder}")


def is_resumable(folder) -> bool:
    """Whether the folder contains a run. A process killed before its first checkpoint leaves only a
    lock file and temporary files."""
    return any(file.is_file() and not _is_hidden(file) for file in folder.rglob("*"))


def _is_hidden(file) -> bool:
    """Whether this is a file that is a lock, temporary, or a desktop's, such as .DS_Store."""
    return file.is_file() and file.name.startswith(".")


def make_folder(folder):
    """Creates the folder and its parents."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"The output folder must be writable. Received: {folder}: {error.strerror}"
        ) from error


def history(results) -> str:
    """The content of history.csv, without times, so that equal seeds produce equal files."""
    columns = ("model", "epoch", *METRICS)
    rows = [{"model": result.label, **row} for result in results for row in result.rows]
    return csv_text(columns, rows)
