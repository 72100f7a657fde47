"""Checkpoint readers, on valid, damaged and hostile files."""

import builtins
import collections
import io
import os
import pickle
import re
import shutil
import struct
import zipfile
import zlib

import numpy as np
import pytest

from involution.models import checkpoint_readers
from involution.models.checkpoint_readers import CheckpointError, tensorflow
from tests.support.backends import fresh_process
from tests.support.memory import on_linux
from tests.support.paths import FILES

pytestmark = pytest.mark.any_backend

KINDS = ("zip", "legacy", "paddle 2", "paddle 4", "paddle 5", "bundle")
every_kind = pytest.mark.parametrize("kind", KINDS)
GLOBALS = ("posix.system", "builtins.eval", "__builtin__.eval")


def pytorch():
    return pytest.importorskip("torch", reason="PyTorch writes the files of this test")


def arrays():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.normal(size=(3, 5, 2)).astype("float32"),
        "b": rng.normal(size=(4, 7)).T,
        "half": rng.normal(size=6).astype("float16"),
        "n": np.arange(3),
        "one": np.array(2.5),
    }


def write(kind, folder):
    """(path of a checkpoint, its arrays, its files)."""
    path, tensors = folder / "checkpoint", arrays()
    if kind == "bundle":
        shutil.copytree(FILES / "hosted", path)
        return path, checkpoint_readers.read(FILES / "hosted").tensors, sorted(path.glob("*/*"))
    if kind.startswith("paddle"):
        pickled = {**tensors, "b": ("linear_0.w", tensors["b"])}
        pickled["StructuredToParameterName@@"] = {"b": "linear_0.w"}
        path.write_bytes(pickle.dumps(pickled, protocol=int(kind[-1])))
    else:
        torch = pytorch()
        state = collections.OrderedDict((k, torch.tensor(v)) for k, v in tensors.items())
        # A view with an offset and transposed strides.
        both = torch.tensor(np.concatenate([np.zeros(3), tensors["b"].T.reshape(-1)]))
        state["b"] = torch.nn.Parameter(both[3:].reshape(4, 7).T)
        wrapped = {"meta": {"epoch": 3, "CLASSES": ("cat", "dog"), "lr": 0.1}, "state_dict": state}
        torch.save(wrapped, path, _use_new_zipfile_serialization=kind == "zip")
    return path, tensors, [path]


def rejection(path, read=checkpoint_readers.read):
    """The message of the error with which a checkpoint is rejected."""
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert "Received: " in str(caught.value)
    return str(caught.value)


def assert_same(got, want):
    assert list(got) == list(want)
    for name, array in want.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array, strict=True)


@every_kind
def test_arrays_are_read_exactly(kind, tmp_path):
    path, want, _ = write(kind, tmp_path)
    read = checkpoint_readers.read(path)
    assert (
        read.kind
        == {"z": "PyTorch", "l": "PyTorch", "p": "PaddlePaddle", "b": "TensorFlow"}[kind[0]]
    )
    assert_same(read.tensors, want)


@every_kind
def test_truncated_files_are_rejected(kind, tmp_path):
    path, want, files = write(kind, tmp_path)
    for file in files:
        original = file.read_bytes()
        cuts = {*range(0, 60), *np.linspace(60, len(original) - 1, 150, dtype=int).tolist()}
        for cut in sorted(cuts):
            file.write_bytes(original[:cut])
            if kind == "bundle" and "data" in file.name and cut >= 312:
                # The object graph after the numbers is not read.
                assert_same(checkpoint_readers.read(path).tensors, want)
            else:
                rejection(path)
        file.write_bytes(original)


@every_kind
def test_flipped_bits_give_an_error_or_arrays(kind, tmp_path):
    path, want, files = write(kind, tmp_path)
    rng = np.random.default_rng(1)
    errors = lines = 0
    for file in files:
        original = file.read_bytes()
        for _ in range(400):
            damaged = bytearray(original)
            for position in rng.integers(len(original), size=rng.integers(1, 4)):
                damaged[position] ^= 1 << rng.integers(8)
            file.write_bytes(damaged)
            try:
                got = checkpoint_readers.read(path).tensors
            except CheckpointError as error:
                errors += 1
                lines += str(error).count("\n")
            else:
                assert all(isinstance(array, np.ndarray) for array in got.values())
                if kind in ("zip", "bundle"):  # which have checksums
                    assert_same(got, want)
        file.write_bytes(original)
    assert errors > 40
    assert lines == 0


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.pair = function, arguments

    def __reduce__(self):
        return self.pair


def replace_member(path, name, contents):
    """Replaces the content of a member of a zip file."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, contents if member.endswith(name) else data)


@pytest.mark.parametrize("form", ["paddle", "zip", "legacy"])
@pytest.mark.parametrize("protocol", range(6))
def test_code_in_a_pickle_is_not_executed(form, protocol, tmp_path):
    marker = tmp_path / "ran"
    command = f"touch {marker}"
    for call in (
        Call(os.system, command),
        Call(builtins.eval, f"open({str(marker)!r}, 'w')"),
        Call(builtins.exec, "1 / 0"),
    ):
        hostile = pickle.dumps({"a": call}, protocol)
        path = tmp_path / "checkpoint"
        if form == "paddle":
            path.write_bytes(hostile)
        else:
            path, _, _ = write(form, tmp_path)
            if form == "zip":
                replace_member(path, "/data.pkl", hostile)
            else:
                start = path.read_bytes()
                # Instead of the third of its pickles.
                end = start.index(b".", start.index(b".\x80\x02M\xe9\x03.") + 1) + 1
                path.write_bytes(start[:end] + b"\x80\x02M\xe9\x03." + hostile + start[end:])
        message = rejection(path)
        if protocol >= 2 and form != "legacy":
            assert any(name in message for name in (*GLOBALS, "builtins.exec", "__builtin__.exec"))
        assert not marker.exists()
    # Python's unpickler executes the command: the marker would reveal an execution.
    pickle.loads(pickle.dumps(Call(os.system, command), protocol))  # noqa: S301 - our own
    assert marker.exists()


def persistent(value, protocol=2):
    """A pickle with persistent IDs for PyTorch's storages."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return value.identifier if isinstance(value, Reference) else None

    file = io.BytesIO()
    Pickler(file, protocol).dump(value)
    return file.getvalue()


class Reference:
    def __init__(self, *identifier):
        self.identifier = identifier


def torch_tensor(count, offset, sizes, strides):
    torch = pytorch()
    storage = Reference("storage", torch.FloatStorage, "0", "cpu", count)
    rebuild = torch._utils._rebuild_tensor_v2
    return Call(rebuild, storage, offset, sizes, strides, False, collections.OrderedDict())


def torch_zip(path, value, **members):
    """An archive in PyTorch's format with the storages ``members``."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", persistent(value))
        archive.writestr("archive/data/0", bytes(24))
        for name, data in members.items():
            archive.writestr(f"archive/data/{name}", data)


HUGE = 10 * 2**30 // 4


def reconstructed(state):
    class Array:
        def __reduce__(self):
            function, arguments, _ = np.zeros(2).__reduce__()
            return function, arguments, state

    return {"a": Array()}


def raw_pickle(text):
    """A handwritten pickle of {"a": ...}."""
    return b"\x80\x04}\x8c\x01a" + text + b"s."


PADDLE = {
    "shape": lambda: pickle.dumps(
        reconstructed((1, (HUGE,), np.dtype("f4"), False, bytes(24))), protocol=4
    ),
    "empty shape": lambda: pickle.dumps(
        reconstructed((1, (HUGE, 0), np.dtype("f4"), False, b"")), protocol=4
    ),
    "item size": lambda: pickle.dumps(
        reconstructed((1, (1,), np.dtype(f"S{2**31 - 1}"), False, bytes(24))), protocol=4
    ),
    "structure": lambda: pickle.dumps(
        reconstructed((1, (1,), np.dtype([("x", "f4", 9)]), False, bytes(36))), protocol=4
    ),
    "objects": lambda: pickle.dumps({"a": np.array([{}, None])}, protocol=4),
    "bytes": lambda: raw_pickle(b"\x8e" + struct.pack("<Q", 4 * HUGE)),
    "bytearray": lambda: raw_pickle(b"\x96" + struct.pack("<Q", 4 * HUGE)),
    "text": lambda: raw_pickle(b"\x8d" + struct.pack("<Q", 4 * HUGE)),
    "memo": lambda: raw_pickle(b"Nr\xff\xff\xff\x7f"),
    "large integer": lambda: raw_pickle(b"\x8b" + struct.pack("<i", 2**31 - 1)),
    "called bytearray": lambda: pickle.dumps({"a": Call(bytearray, 4 * HUGE)}, protocol=4),
    # A string of 2 MB, encoded 20,000 times.
    "encode": lambda: raw_pickle(
        b"](c_codecs\nencode\n\x94X"
        + struct.pack("<I", 2**21)
        + b"x" * 2**21
        + b"\x94\x8c\x06latin1\x94\x86R"
        + b"h\x00h\x01h\x02\x86R" * 20_000
        + b"e"
    ),
    # Nested tuples with 2 ** 60 elements, which a dictionary would hash.
    "key of tuples": lambda: (
        b"\x80\x04})\x94" + b"".join(b"h%c\x86\x94" % i for i in range(60)) + b"Ns."
    ),
    "deep": lambda: b"\x80\x04})" + b"\x85" * 900_000 + b"Ns.",
    "long": lambda: b"\x80\x04}" + b"]" * 20_000_000,
}


def varint(n):
    out = b""
    while n >= 128:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def block(pairs, shared=0):
    """A block of a table that declares ``shared`` prefix bytes for every key."""
    body = b"".join(
        varint(shared) + varint(len(k)) + varint(len(v)) + k + v for k, v in pairs
    ) + struct.pack("<II", 0, 1)
    return body + b"\0" + struct.pack("<I", tensorflow._masked_checksum(body + b"\0"))


def crafted_index(
    entry_fields, key=b"variables/0/.ATTRIBUTES/VARIABLE_VALUE", header=b"\x08\x01", blocks=1
):
    """A bundle's index with a header and one entry, in TensorFlow's format; its block is listed
    ``blocks`` times."""
    entry = b"".join(
        varint(number << 3 | (2 if isinstance(value, bytes) else 0))
        + (varint(len(value)) + value if isinstance(value, bytes) else varint(value))
        for number, value in entry_fields
    )
    data = block([(b"", header), (key, entry)])
    meta = block([])
    index = block([(key, varint(0) + varint(len(data) - 5))] * blocks)
    handles = varint(len(data)) + varint(len(meta) - 5)
    handles += varint(len(data + meta)) + varint(len(index) - 5)
    return data + meta + index + handles.ljust(40, b"\0") + struct.pack("<Q", tensorflow.MAGIC)


def hostile(folder):
    """Paths of small files that declare gigabytes or take hours in a naive reader."""
    for name, make in PADDLE.items():
        path = folder / f"paddle {name}"
        path.write_bytes(make())
        yield path
    for name, value in {
        "count": torch_tensor(HUGE, 0, (HUGE,), (1,)),
        "expanded": torch_tensor(6, 0, (HUGE,), (0,)),
        "beyond": torch_tensor(6, 4, (3,), (1,)),
        "backwards": torch_tensor(6, 4, (3,), (-1,)),
        "offset": torch_tensor(6, -1, (3,), (1,)),
        "sizes": torch_tensor(6, 0, (2**61, 2**61, 0), (1, 1, 1)),
    }.items():
        path = folder / f"torch {name}"
        torch_zip(path, {"a": value})
        yield path
    path = folder / "torch member"
    torch_zip(path, {"a": torch_tensor(HUGE, 0, (HUGE,), (1,))})
    # The sizes of a member in the central directory.
    contents = bytearray(path.read_bytes())
    at = contents.index(b"PK\x01\x02", contents.index(b"PK\x01\x02") + 1)
    struct.pack_into("<II", contents, at + 20, 0xFFFFFFF0, 0xFFFFFFF0)
    path.write_bytes(contents)
    yield path
    path = folder / "torch compressed"
    torch_zip(path, {"a": torch_tensor(HUGE, 0, (HUGE,), (1,))})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", persistent({"a": torch_tensor(2**24, 0, (1,), (1,))}))
        archive.writestr("archive/data/0", bytes(2**26))
    yield path
    shape = b"\x12\x06\x08" + b"\x80\x80\x80\x80\x28"
    for name, fields in {
        "shape": [(1, 1), (2, shape), (5, 24)],
        "size": [(1, 1), (2, shape), (5, 4 * HUGE)],
    }.items():
        path = folder / f"bundle {name}"
        shutil.copytree(FILES / "hosted", path)
        (path / "variables/variables.index").write_bytes(crafted_index(fields))
        yield path


@on_linux
@pytest.mark.long
def test_hostile_files_take_little_memory_and_time(tmp_path):
    pytorch()
    paths = list(hostile(tmp_path))
    larger = max(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
    assert larger <= 21e6
    code = f"""
import time
from involution.models import checkpoint_readers
from tests.support.memory import peak_memory, resident_memory
checkpoint_readers.read({str(FILES / "hosted")!r})
for path in {[str(p) for p in paths]!r}:
    peak_memory()
    before, start = resident_memory(), time.perf_counter()
    try:
        checkpoint_readers.read(path)
        print(path, "was read")
    except checkpoint_readers.CheckpointError as error:
        assert "\\n" not in str(error)
    grown, took = peak_memory() - before, time.perf_counter() - start
    if grown > 100e6 or took > 30:
        print(path, "took", grown, "bytes and", took, "seconds")
print("end")
"""
    assert fresh_process(code) == "end\n"


def test_out_of_memory_is_not_a_damaged_checkpoint(tmp_path, monkeypatch):
    def read(path):
        raise MemoryError

    monkeypatch.setattr(checkpoint_readers, "_read", read)
    with pytest.raises(MemoryError):
        checkpoint_readers.read(tmp_path)


def test_crafted_index_is_read_if_it_is_correct(tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(FILES / "hosted", folder)
    data = np.arange(6, dtype="float32").tobytes()
    (folder / "variables/variables.data-00000-of-00001").write_bytes(data)
    dims = b"".join(b"\x12\x02\x08" + bytes([n]) for n in (2, 3))
    fields = [(1, 1), (2, dims), (5, 24)]
    index = folder / "variables/variables.index"
    index.write_bytes(crafted_index(fields))
    assert "checksum" in rejection(folder)
    entry = {1: 1, 2: dims, 5: 24, 6: tensorflow._masked_checksum(data)}
    np.testing.assert_array_equal(tensorflow._tensor("x", entry, data), [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (crafted_index([(1, 1)], header=b"\x08\x02"), "in one data file"),
        (crafted_index([(1, 99), (5, 4)]), "numeric and not partitioned.*of dtype 99"),
        (crafted_index([(1, 1), (5, 4), (7, b"")]), "of dtype 1, in slices"),
        (crafted_index([(1, 1)], blocks=2), "blocks of a table must be in order"),
        (crafted_index([(1, 1), (5, 4)])[:-48] + bytes(40) + struct.pack("<Q", 7), "magic number"),
    ],
)
def test_invalid_bundles(index, message, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(FILES / "hosted", folder)
    (folder / "variables/variables.index").write_bytes(index)
    assert re.search(message, rejection(folder))


def test_limits_of_bundles(tmp_path, monkeypatch):
    folder = tmp_path / "bundle"
    shutil.copytree(FILES / "hosted", folder)
    for limit, message in (("KEYS_LIMIT", "at most 1 keys"), ("INDEX_LIMIT", "at most 1 bytes")):
        monkeypatch.setattr(tensorflow, limit, 1)
        assert message in rejection(folder)


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: tensorflow._varint(b"\xff" * 11, 0), "at most 10 bytes"),
        (lambda: list(tensorflow._fields(b"\x0b")), "known wire types. Received: 3"),
        (lambda: list(tensorflow._fields(b"\x0a\x05ab")), "contain all its bytes"),
        (lambda: list(tensorflow._block(bytes(60), (50, 100))), "with a block up to 155"),
        (
            lambda: list(
                tensorflow._block(
                    (data := block([(b"key", b"value")], shared=2)) + bytes(tensorflow.FOOTER),
                    (0, len(data) - 5),
                )
            ),
            "keys must be inside their block",
        ),
        (
            lambda: checkpoint_readers.arrays.array(b"", "f4", (0,), "x"),
            "must have values. Received: x",
        ),
    ],
)
def test_invalid_parts_of_bundles(read, message):
    with pytest.raises(CheckpointError, match=message):
        read()


def test_fixed_size_fields():
    assert list(tensorflow._fields(b"\x0d\x01\0\0\0\x11\x02" + bytes(7))) == [(1, 1), (2, 2)]


def legacy_file(path, *, protocol=1001, little=True, value=None, keys=()):
    """A file in the format of PyTorch before 1.6, without storages."""
    parts = (0x1950A86A20F9469CFC6C, protocol, {"little_endian": little}, value or {}, list(keys))
    path.write_bytes(b"".join(persistent(part) for part in parts))
    return path


def test_invalid_pytorch_files(tmp_path):
    torch = pytorch()
    path = tmp_path / "checkpoint"

    def view(*reference):
        rebuild = torch._utils._rebuild_tensor_v2
        return Call(rebuild, Reference(*reference), 0, (3,), (1,), False, collections.OrderedDict())

    floats = "storage", torch.FloatStorage, "0", "cpu", 6
    for value, message in (
        ({"a": view("other", *floats[1:])}, "must have a storage"),
        ({"a": view(*floats, ("0", 0, 3))}, "must not be a view"),
        ({"a": torch_tensor(6, -1, (3,), (1,))}, "all inside its storage"),
        (
            {
                "a": Call(
                    torch._utils._rebuild_tensor_v2,
                    "no storage", 0, (3,), (1,), False, collections.OrderedDict(),
                )
            },
            "",
        ),
    ):  # fmt: skip
        torch_zip(path, value)
        assert message in rejection(path)
    both = {"a": view(*floats), "b": view("storage", torch.IntStorage, *floats[2:])}
    for given, message in (
        ({"protocol": 1000}, "must have protocol 1001"),
        ({"little": False}, "must be little-endian"),
        ({"value": both}, "must have one dtype"),
    ):
        assert message in rejection(legacy_file(path, **given))


def test_pairs_and_strings_of_paddle(tmp_path):
    path = tmp_path / "x.pdparams"
    path.write_bytes(pickle.dumps({"a": Call(tuple, ("linear_0.w", np.ones(2)))}, 4))
    np.testing.assert_array_equal(checkpoint_readers.read(path).tensors["a"], [1, 1])
    twice = b"](c_codecs\nencode\n\x94X\x01\0\0\0x\x94\x8c\x06latin1\x94\x86R"
    for content, message in (
        (pickle.dumps({"a": Call(tuple, [1, 2])}, 4), "tuple"),
        (
            pickle.dumps(reconstructed((1, (1,), np.dtype("f4"), False, [1])), 4),
            "bytes and a dtype",
        ),
        # The same string again.
        (raw_pickle(twice + b"h\x00h\x01h\x02\x86Re"), "list"),
    ):
        path.write_bytes(content)
        assert message in rejection(path)


def test_checksum_is_crc32c():
    # The check value of CRC-32C, for the digits 1 to 9.
    masked = tensorflow._masked_checksum(b"123456789")
    rotated = (masked - 0xA282EAD8) & 0xFFFFFFFF
    assert (rotated >> 17 | rotated << 15) & 0xFFFFFFFF == 0xE3069283


def test_files_that_are_not_checkpoints(tmp_path):
    def file(name, contents):
        (tmp_path / name).write_bytes(contents)
        return tmp_path / name

    (tmp_path / "folder").mkdir()
    assert "empty file" in rejection(file("empty.pth", b""))
    assert "folder without variables" in rejection(tmp_path / "folder")
    assert "begins with b'GIF89a" in rejection(file("image.pth", b"GIF89a" + bytes(40)))
    assert "No such file" in rejection(tmp_path / "missing.pth")
    assert "data.pkl" in rejection(FILES / "example_inv_model.keras")
    assert "dictionary" in rejection(file("list.pdparams", pickle.dumps([1, 2], 4)))
    assert "without any" in rejection(file("none.pdparams", pickle.dumps({}, 4)))
    assert "of type str" in rejection(file("text.pdparams", pickle.dumps({"a": "b"}, 4)))
    split = {"a@@.0": np.ones(2), "UnpackBigParamInfor@@": {"a": {}}}
    assert "protocol 4" in rejection(file("split.pdparams", pickle.dumps(split, 2)))
    # A value that is not a tensor.
    (tmp_path / "step.pdparams").write_bytes(pickle.dumps({"a": np.ones(2), "epoch": 3}, 4))
    assert "'epoch' of type int" in rejection(tmp_path / "step.pdparams")


def test_state_dicts_contain_tensors_only(tmp_path):
    torch = pytorch()
    for value in ({"a": torch.ones(2), "epoch": 3}, [torch.ones(2)], torch.ones(2)):
        torch.save(value, tmp_path / "x.pth")
        rejection(tmp_path / "x.pth")
    torch.save({"model": {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "x.pth")
    assert list(checkpoint_readers.read(tmp_path / "x.pth").tensors) == ["a"]
    torch.save({"a": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "x.pth")
    assert "torch.BFloat16Storage" in rejection(tmp_path / "x.pth")


def test_member_checksums_are_verified(tmp_path):
    path, want, _ = write("zip", tmp_path)
    contents = path.read_bytes()
    position = contents.index(want["a.weight"].tobytes()) + 5
    path.write_bytes(
        contents[:position] + bytes([contents[position] ^ 1]) + contents[position + 1 :]
    )
    assert zlib.crc32(path.read_bytes()) != zlib.crc32(contents)
    assert "checksums" in rejection(path)


def test_compressed_tables_are_rejected(tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(FILES / "hosted", folder)
    index = folder / "variables/variables.index"
    contents = bytearray(index.read_bytes())
    _, position = tensorflow._handle(contents, len(contents) - tensorflow.FOOTER)
    (offset, size), _ = tensorflow._handle(contents, position)
    contents[offset + size] = 1
    index.write_bytes(contents)
    assert "Snappy" in rejection(folder)


@pytest.mark.long
def test_bundles_written_by_tensorflow(tmp_path):
    tf = pytest.importorskip("tensorflow", reason="TensorFlow writes the bundle")

    rng = np.random.default_rng(0)
    module, want = tf.Module(), {}
    # Enough long names for several blocks.
    for i in range(300):
        kind = ("float32", "float64", "int32", "int64", "float16", "uint8", "bool")[i % 7]
        values = (rng.normal(size=(i % 4 + 1, 3)[: i % 3]) * 9).astype(kind)
        name = f"variable_with_a_long_name_{i}"
        setattr(module, name, tf.Variable(values))
        want[f"{name}/.ATTRIBUTES/VARIABLE_VALUE"] = values
    tf.saved_model.save(module, str(tmp_path / "saved"))
    assert_same(checkpoint_readers.read(tmp_path / "saved").tensors, dict(sorted(want.items())))
    tf.train.Checkpoint(module=module).write(str(tmp_path / "bundle"))
    got = tensorflow.read(tmp_path / "bundle")
    assert_same(got, {f"module/{name}": array for name, array in sorted(want.items())})


def test_views_of_storages(tmp_path):
    """Every view that PyTorch can write is read as in PyTorch."""
    torch = pytorch()
    base = torch.arange(24.0)
    state = {
        "reversed axes": base.reshape(2, 3, 4).permute(2, 1, 0),
        "every second": base[1::2],
        "diagonal": base[:9].reshape(3, 3).diagonal(),
        "windows": base.unfold(0, 3, 8),
        "scalar": base[7],
        "last": base[23:],
    }
    for zipped in (True, False):
        torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
        got = checkpoint_readers.read(tmp_path / "x.pth").tensors
        assert_same(got, {name: tensor.numpy() for name, tensor in state.items()})
