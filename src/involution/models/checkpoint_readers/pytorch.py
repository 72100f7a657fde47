"""PyTorch checkpoints: the zip format, and the legacy format of concatenated pickles.

Both are read without PyTorch. A tensor is pickled as a reference to a storage, an offset, sizes and
strides; storages are members ``data/<key>`` of the archive, or follow the pickles one by one. The
formats are defined by pytorch/pytorch, ``torch/serialization.py``.
"""

import dataclasses
import io
import math
import mmap
import struct
import zipfile
import zlib
from collections.abc import Callable

import numpy as np

from involution.models.checkpoint_readers import restricted_unpickler
from involution.models.checkpoint_readers.arrays import array, format_shape, is_shape
from involution.models.checkpoint_readers.errors import CheckpointError

ZIP_START = b"PK\x03\x04"
# The pickled magic number of the legacy format, 0x1950a86a20f9469cfc6c.
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
LEGACY_PROTOCOL = 1001
TYPES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
# Keys of the state dict in the dictionaries of training programs.
WRAPPERS = ("state_dict", "model")


@dataclasses.dataclass(frozen=True)
class Storage:
    key: str
    kind: str
    count: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    storage: Storage
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


def read_zip(file) -> dict[str, np.ndarray]:
    """The tensors by name: views of the file, which is mapped while one of them exists.

    Args:
        file: The open file.

    Raises:
        CheckpointError: The file has objects other than tensors, or is incomplete.
    """
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
    starts = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(starts) != 1:
        raise CheckpointError(
            "A PyTorch archive must have one member data.pkl. "
            f"Received: a zip file with {len(starts)} of them"
        )
    start = starts[0]
    if start + "byteorder" in members:
        _check_order(bytes(_member(mapped, members[start + "byteorder"])) == b"little")
    pickled = io.BytesIO(_member(mapped, members[start + "data.pkl"]))
    tensors = _tensors(_unpickle(pickled))
    used = {
        key: members[f"{start}data/{key}"]
        for key in {tensor.storage.key for tensor in tensors.values()}
    }
    # Overlapping members would multiply the data read.
    if sum(member.file_size for member in used.values()) > len(mapped):
        raise CheckpointError(
            "A checkpoint must contain all bytes that it declares. "
            f"Received: {len(mapped)} bytes in all"
        )
    storages = {key: _member(mapped, member) for key, member in used.items()}
    return _arrays(tensors, storages)


def read_legacy(file) -> dict[str, np.ndarray]:
    """Like ``read_zip``, for the legacy format of PyTorch before 1.6."""
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    used: dict[str, Storage] = {}
    _, protocol, system, value, keys = (_unpickle(mapped, used) for _ in range(5))
    if protocol != LEGACY_PROTOCOL:
        raise CheckpointError(
            f"The legacy format must have protocol {LEGACY_PROTOCOL}. Received: another"
        )
    _check_order(system["little_endian"] is True)
    storages = {}
    view, position = memoryview(mapped), mapped.tell()
    for key in keys:
        (count,) = struct.unpack_from("<q", view, position)
        size = count * _item_size(used[key])
        position += 8
        if not 0 <= size <= len(view) - position:
            raise CheckpointError(
                "A checkpoint must contain all bytes that it declares. "
                f"Received: {len(view) - position} of {size}"
            )
        storages[key] = view[position : position + size]
        position += size
    return _arrays(_tensors(value), storages)


def _check_order(is_little):
    if not is_little:
        raise CheckpointError("A checkpoint must be little-endian. Received: another byte order")


def _member(mapped, member) -> memoryview:
    """The bytes of a member of the archive. PyTorch does not compress members."""
    size = member.file_size
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != size:
        raise CheckpointError(
            "A PyTorch archive must be uncompressed. Received: "
            f"{member.filename[:200]!a}, compressed"
        )
    name_size, extra_size = struct.unpack_from("<HH", mapped, member.header_offset + 26)
    begin = member.header_offset + 30 + name_size + extra_size
    if size > len(mapped) - begin:
        raise CheckpointError(
            "A checkpoint must contain all bytes that it declares. "
            f"Received: {max(0, len(mapped) - begin)} of {size}"
        )
    data = memoryview(mapped)[begin : begin + size]
    if zlib.crc32(data) != member.CRC:
        raise CheckpointError(
            "The members of an archive must match their checksums. "
            f"Received: {member.filename[:200]!a}"
        )
    return data


def _unpickle(file, used=None):
    """A pickle's value with ``Tensor`` objects; storages are added to ``used`` by key."""

    def storage(identifier):
        tag, kind, key, _, count, *view = identifier
        if (
            tag != "storage"
            or not isinstance(kind, restricted_unpickler.GlobalRef)
            or not isinstance(key, str)
        ):
            raise CheckpointError("A tensor must have a storage. Received: another reference")
        if not is_shape((count,)) or view not in ([], [None]):
            raise CheckpointError("A storage must not be a view. Received: a part of another")
        found = Storage(key, kind.text.removeprefix("torch."), count)
        # State dicts do not have storages that tensors view in several dtypes.
        if used is not None and used.setdefault(key, found) != found:
            raise CheckpointError("A storage must have one dtype. Received: two")
        return found

    functions: dict[str, Callable | None] = {f"torch.{name}": None for name in TYPES}
    functions["torch._utils._rebuild_tensor_v2"] = _tensor
    functions["torch._utils._rebuild_parameter"] = lambda tensor, *_: tensor
    functions["collections.OrderedDict"] = restricted_unpickler.empty_dict
    return restricted_unpickler.read(file, functions, storage)


def _tensor(storage, offset, sizes, strides, *_):
    """A tensor inside the bounds of its storage, with no more elements than the storage."""
    if not isinstance(storage, Storage):
        raise TypeError("a tensor without a storage")
    valid = is_shape(sizes) and is_shape(strides) and is_shape((offset,))
    if valid and len(sizes) == len(strides):
        last = offset + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
        if 0 not in sizes and last < storage.count and math.prod(sizes) <= storage.count:
            return Tensor(storage, offset, sizes, strides)
    raise CheckpointError(
        "A tensor must have values, all inside its storage. Received: shape "
        f"{format_shape(sizes)}, strides {format_shape(strides)}, for a storage of {storage.count}"
    )


def _tensors(value) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(value, dict) and isinstance(value.get(wrapper), dict):
            value = value[wrapper]
    if not isinstance(value, dict):
        raise CheckpointError(
            f"A PyTorch checkpoint must be a dictionary. Received: {type(value).__name__}"
        )
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                "A state dict must contain tensors by name only. "
                f"Received: {ascii(name)[:200]} of type {type(tensor).__name__}"
            )
    return value


def _item_size(storage) -> int:
    return np.dtype(TYPES[storage.kind]).itemsize


def _arrays(tensors, storages):
    arrays = {}
    for name, tensor in tensors.items():
        storage = tensor.storage
        flat = array(
            storages[storage.key], TYPES[storage.kind], (storage.count,), ascii(name[:200])
        )
        strides = tuple(s * flat.itemsize for s in tensor.strides)
        arrays[name] = np.lib.stride_tricks.as_strided(
            flat[tensor.offset :], tensor.sizes, strides, writeable=False
        )
    return arrays
