"""Checkpoint files: names, metadata, corruption, locks."""

import hashlib
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save as save_arrays

from involution.training import checkpoint
from involution.training.checkpoint import CheckpointManager
from involution.utils import atomic_files
from involution.utils.errors import InputError, WriteError

pytestmark = pytest.mark.any_backend

ARRAYS = {
    "a": np.arange(12, dtype="float32").reshape(3, 4),
    "b": np.array(7, "int64"),
    "c": np.zeros((0, 2), "uint32"),
}
STATE = {"at": 3, "loss": float("nan"), "text": "말"}


def fail_on_log(line):
    raise AssertionError(line)


@pytest.fixture
def store(tmp_path):
    return CheckpointManager(str(tmp_path))


def file_names(store):
    return sorted(path.name for path in store.folder.iterdir())


def test_checkpoint_name_and_metadata(store, tmp_path):
    arrays = {"turned": np.arange(6.0).reshape(2, 3).T, "list": [1, 2]}
    saved = store.save(arrays, {"at": float("inf")})
    assert (saved.number, saved.arrays, saved.state) == (1, arrays, {"at": float("inf")})
    (path,) = (tmp_path / "checkpoints").iterdir()
    data = path.read_bytes()
    assert path.name == f"000000000001-{hashlib.sha256(data).hexdigest()}.safetensors"
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"] == {"state": '{"format": 1, "at": Infinity}'}
    found = store.latest(fail_on_log).arrays
    np.testing.assert_array_equal(found["turned"], arrays["turned"])
    np.testing.assert_array_equal(found["list"], [1, 2])


def test_checkpoint_numbers_continue_from_the_newest(store):
    store.folder.mkdir()
    data = save_arrays({}, {"state": '{"format": 1, "n": 9}'})
    for number in (2, 10**9):
        name = f"{number:012d}-{hashlib.sha256(data).hexdigest()}.safetensors"
        (store.folder / name).write_bytes(data)
    found = store.latest(fail_on_log)
    assert (found.number, found.state) == (10**9, {"n": 9})
    assert store.save({}, {}).number == 10**9 + 1
    assert [name[:12] for name in file_names(store)] == ["001000000000", "001000000001"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"format": 2}', "its format must be 1"),
        ("{}", "'format'"),
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (None, "'state'"),
    ],
)
def test_invalid_metadata_is_corrupt(store, text, reason):
    store.folder.mkdir()
    data = save_arrays({}, {"x": "y"} if text is None else {"state": text})
    name = f"000000000007-{hashlib.sha256(data).hexdigest()}.safetensors"
    (store.folder / name).write_bytes(data)
    lines = []
    assert store.latest(lines.append) is None
    prefix = "Checkpoint 7 is corrupt and skipped: "
    assert lines == [prefix + reason]
    (store.folder / name).write_bytes(b"")
    assert store.latest(lines.append) is None
    assert lines[1:] == [f"{prefix}its content does not match the hash in its name"]


def test_invalid_file_names_are_ignored(store):
    store.folder.mkdir()
    data = save_arrays({}, {"state": '{"format": 1}'})
    digest = hashlib.sha256(data).hexdigest()
    for name in (
        f"{1:011d}-{digest}.safetensors",
        f"{1:012d}-{digest}.safetensors.x",
        f"x{1:012d}-{digest}.safetensors",
        f"{1:012d}-{digest}xsafetensors",
        f"{1:012d}-{digest.upper()}.safetensors",
        f"{1:012d}-{digest[:-1]}.safetensors",
    ):
        (store.folder / name).write_bytes(data)
    assert store.latest(fail_on_log) is None


def test_exclusive_lock(tmp_path):
    with checkpoint.exclusive_lock(str(tmp_path)):
        assert os.listdir(tmp_path) == [".lock"]
        with pytest.raises(InputError) as caught, checkpoint.exclusive_lock(tmp_path):
            raise AssertionError
    assert str(caught.value) == (
        "The output folder must not be in use by another process. "
        f"Received: {tmp_path}, which another process has locked"
    )
    # An exception releases the lock.
    with pytest.raises(KeyboardInterrupt), checkpoint.exclusive_lock(tmp_path):
        raise KeyboardInterrupt
    with checkpoint.exclusive_lock(tmp_path):
        pass


def test_max_to_keep(store):
    for number in range(1, 5):
        store.save({}, {"n": number})
        assert [int(name[:12]) for name in file_names(store)] == [
            *range(max(1, number - 1), number + 1)
        ]
    store.remove_older()
    assert [name[:12] for name in file_names(store)] == ["000000000004"]
    store.remove_older()
    assert store.latest(fail_on_log).state == {"n": 4}


def test_save_verifies_the_written_file(store, monkeypatch):
    store.save({}, {"n": 1})
    real = pathlib.Path.replace

    def replace(source, target):
        source.write_bytes(source.read_bytes()[:-1])
        return real(source, target)

    monkeypatch.setattr(pathlib.Path, "replace", replace)
    with pytest.raises(WriteError) as caught:
        store.save({}, {"n": 2})
    assert re.fullmatch(
        rf"Could not write {store.folder}/0{{11}}2-\w{{64}}\.safetensors: "
        "the file differs from what was written",
        str(caught.value),
    )
    assert store.latest(fail_on_log).state == {"n": 1}
    assert len(file_names(store)) == 1


def test_round_trip_is_exact(store):
    assert store.latest(fail_on_log) is None
    assert store.save(ARRAYS, STATE).number == 1
    found = store.latest(fail_on_log)
    assert found.number == 1
    assert repr(found.state) == repr(STATE)
    assert {k: (v.dtype, v.shape) for k, v in found.arrays.items()} == {
        k: (v.dtype, v.shape) for k, v in ARRAYS.items()
    }
    assert all(np.array_equal(found.arrays[k], ARRAYS[k]) for k in ARRAYS)


def test_older_checkpoint_survives_a_failed_save(store, monkeypatch):
    for number in (1, 2):
        store.save(ARRAYS, {"number": number})
    real = atomic_files.atomic_write

    def faulty(path):
        return real(path.with_name("elsewhere"))

    before = file_names(store)
    monkeypatch.setattr(atomic_files, "atomic_write", faulty)
    with pytest.raises(OSError, match="No such file"):
        store.save(ARRAYS, {"number": 3})
    assert set(before) < set(file_names(store))
    assert store.latest(fail_on_log).state == {"number": 2}


@pytest.mark.parametrize("flips", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_truncation_and_bit_flips_are_detected(store, flips):
    store.save(ARRAYS, {"number": 1})
    store.save(ARRAYS, {"number": 2})
    newest = store.folder / file_names(store)[-1]
    intact = newest.read_bytes()
    rng = np.random.default_rng(0)

    def damaged():
        for length in range(len(intact)):
            yield intact[:length]
        for bit in rng.integers(8 * len(intact), size=flips):
            changed = bytearray(intact)
            changed[bit // 8] ^= 1 << (bit % 8)
            yield bytes(changed)

    for damage in damaged():
        newest.write_bytes(damage)
        lines = []
        assert store.latest(lines.append).state == {"number": 1}
        assert len(lines) == 1
        assert lines[0].startswith("Checkpoint 2 is corrupt and skipped: ")
    newest.write_bytes(intact)
    assert store.latest(fail_on_log).state == {"number": 2}


def test_invalid_content_with_valid_hash_is_corrupt(store):
    store.save(ARRAYS, {"number": 1})
    for number, data in enumerate((b"", b"hello", bytes(8) + b"{}", b"\2" + bytes(7) + b"{}"), 2):
        name = f"{number:012d}-{hashlib.sha256(data).hexdigest()}.safetensors"
        (store.folder / name).write_bytes(data)
    lines = []
    assert store.latest(lines.append).state == {"number": 1}
    assert len(lines) == 4


def test_unrelated_files_are_ignored(store):
    store.save(ARRAYS, {"number": 1})
    for name in (f"{atomic_files.TMP_PREFIX}1-2.safetensors", "notes.txt"):
        (store.folder / name).write_bytes(b"x")
    assert store.latest(fail_on_log).number == 1
    store.remove_older()
    assert store.latest(fail_on_log).number == 1
    assert len(file_names(store)) == 3


def test_lock_excludes_other_processes(tmp_path):
    with checkpoint.exclusive_lock(tmp_path):
        # A process without Keras starts quickly.
        code = (
            "import filelock, sys\n"
            "try:\n    filelock.FileLock(sys.argv[1]).acquire(blocking=False); print('in')\n"
            "except filelock.Timeout: print('out')"
        )
        command = [sys.executable, "-c", code, str(tmp_path / checkpoint.LOCK)]
        second = subprocess.run(command, capture_output=True, text=True, check=True)
        assert second.stdout == "out\n"
        with (
            pytest.raises(InputError, match="must not be in use"),
            checkpoint.exclusive_lock(tmp_path),
        ):
            raise AssertionError
    after = subprocess.run(command, capture_output=True, text=True, check=True)
    assert after.stdout == "in\n"
    with checkpoint.exclusive_lock(tmp_path):
        pass


def compete_for_locks(folders, barrier, wins):
    for folder in folders:
        barrier.wait()
        try:
            with checkpoint.exclusive_lock(folder):
                wins.put(str(folder))
                barrier.wait()  # until the other process fails to acquire the lock
        except InputError:
            barrier.wait()


@pytest.mark.slow  # both processes import Keras
def test_only_one_of_two_processes_acquires_the_lock(tmp_path):
    folders = [tmp_path / str(number) for number in range(100)]
    for folder in folders:
        folder.mkdir()
    context = multiprocessing.get_context("spawn")
    barrier, wins = context.Barrier(2, timeout=120), context.SimpleQueue()
    processes = [
        context.Process(target=compete_for_locks, args=(folders, barrier, wins)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    won = []
    while not wins.empty():
        won.append(wins.get())
    assert won == [str(folder) for folder in folders]
