"""Atomic writes and file formats."""

import errno
import hashlib
import json
import math
import os
import pathlib
import stat

import pytest

from involution.utils import atomic_files
from involution.utils.atomic_files import atomic_write, write_json, write_text
from involution.utils.errors import WriteError

pytestmark = pytest.mark.any_backend


def test_files_are_replaced(tmp_path):
    path = tmp_path / "x.json"
    write_text(path, "old")
    write_json(path, {"a": [1, "é"]})
    assert path.read_text(encoding="utf-8") == '{\n  "a": [\n    1,\n    "é"\n  ]\n}\n'
    assert os.listdir(tmp_path) == ["x.json"]


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.txt"
    write_text(path, "old")

    def fail():
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.txt"]


@pytest.mark.parametrize(
    ("cause", "error_number", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC, "No space left on device"),
        (OSError("without a number"), None, "without a number"),
    ],
)
def test_write_errors_have_one_line(tmp_path, cause, error_number, reason):
    path = tmp_path / "x.txt"
    with pytest.raises(WriteError) as caught, atomic_write(str(path)):
        raise cause
    assert str(caught.value) == f"Could not write {path}: {reason}"
    assert (caught.value.errno, caught.value.filename) == (error_number, str(path))
    assert caught.value.__cause__ is cause
    assert os.listdir(tmp_path) == []


def test_temporary_file_is_named_after_its_target(tmp_path):
    with atomic_write(tmp_path / ("n" * 50 + ".keras")) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".part-" + "n" * 40 + "-")
        assert temporary.suffix == ".keras"
        assert temporary.read_bytes() == b""


def test_sync_precedes_rename_and_folder_sync_follows(tmp_path, monkeypatch):
    path, events = tmp_path / "x.txt", []
    real_sync, real_replace = os.fsync, pathlib.Path.replace

    def sync(handle):
        status = os.fstat(handle)
        events.append(("folder" if stat.S_ISDIR(status.st_mode) else "file", path.exists()))
        real_sync(handle)

    def replace(source, target):
        events.append(("name", path.exists()))
        return real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(pathlib.Path, "replace", replace)
    write_text(path, "new")
    assert events == [("file", False), ("name", False), ("folder", True)]


@pytest.mark.parametrize("mask", [0o027, 0o000])
def test_permissions_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "x.txt", "new")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.txt").stat().st_mode) == 0o666 & ~mask


def test_folder_handle_is_closed_on_error(tmp_path, monkeypatch):
    handles, closed = [], []
    real_close = os.close

    def sync(handle):
        handles.append(handle)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "close", lambda handle: closed.append(handle) or real_close(handle))
    with pytest.raises(OSError, match="Input/output error"):
        atomic_files.sync_folder(tmp_path)
    assert len(handles) == 1
    assert closed == handles
    # Folders cannot be opened on Windows.
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        atomic_files.sync_folder("missing")


def test_remove_temporaries_deletes_only_temporary_files(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in (".part-1", "a/.part-x.keras", "a/b/.part-", "a/part-1", ".parts", "a/x.part-"):
        (tmp_path / name).write_bytes(b"x")
    atomic_files.remove_temporaries(str(tmp_path))
    kept = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert kept == [".parts", "a/part-1", "a/x.part-"]


def test_file_formats_do_not_depend_on_the_platform(tmp_path):
    path = tmp_path / "x"
    write_text(path, "é\n\n")
    assert path.read_bytes() == b"\xc3\xa9\n\n"
    assert atomic_files.sha256(path) == hashlib.sha256(b"\xc3\xa9\n\n").hexdigest()
    value = {"nan": math.nan, "deep": [(math.inf, 1.5), {"x": -math.inf, "n": None, "i": 10**400}]}
    write_json(path, value)
    assert path.read_text() == (
        '{\n  "nan": null,\n  "deep": [\n    [\n      null,\n      1.5\n    ],\n    {\n'
        '      "x": null,\n      "n": null,\n      "i": 1' + "0" * 400 + "\n    }\n  ]\n}\n"
    )
    rows = [{"a": 1, "b": "x,y", "c": 3}, {"b": '"', "a": None}]
    assert atomic_files.csv_text(("a", "b"), rows) == 'a,b\n1,"x,y"\n,""""\n'


def test_names_that_are_not_utf_8_are_escaped(tmp_path):
    """Python decodes such file names with lone surrogates."""
    name = "caf\udce9 \u2603"
    atomic_files.write_text(tmp_path / "x.txt", name)
    assert (tmp_path / "x.txt").read_bytes() == b"caf\\udce9 \xe2\x98\x83"
    atomic_files.write_json(tmp_path / "x.json", {"name": name})
    assert json.loads((tmp_path / "x.json").read_bytes()) == {"name": name}
