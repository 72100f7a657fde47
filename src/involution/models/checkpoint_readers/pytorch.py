"""PyTorch's checkpoints: the zip archive of today and the older row of pickles.

Both are read without PyTorch. A tensor is a pickled record of a storage, an offset, sizes and
strides; storages are members ``data/<key>`` of the archive, or follow the pickles one by one. What
``torch.save`` writes was read in pytorch/pytorch, ``torch/serialization.py``.
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
from involution.models.checkpoint_readers.arrays import array, is_sizes, shown
from involution.models.checkpoint_readers.errors import CheckpointError

ZIP_START = b"PK\x03\x04"
# The pickled number 0x1950a86a20f9469cfc6c, with which the older form begins.
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
# Where the tensors stand in the dictionaries that training programs write around them.
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
    """The tensors by name: views of the file, which stays mapped while one of them lives.

    Args:
        file: The open file.

    Raises:
        CheckpointError: It holds something else than tensors, or not all that it declares.
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
    tensors = _tensors(_unpickled(pickled))
    used = {
        key: members[f"{start}data/{key}"]
        for key in {tensor.storage.key for tensor in tensors.values()}
    }
    # Members that overlap would be read again and again.
    if sum(member.file_size for member in used.values()) > len(mapped):
        raise CheckpointError(
            "A checkpoint must hold all bytes that it declares. "
            f"Received: {len(mapped)} bytes in all"
        )
    storages = {key: _member(mapped, member) for key, member in used.items()}
    return _arrays(tensors, storages)


def read_legacy(file) -> dict[str, np.ndarray]:
    """As ``read_zip``, for files from before PyTorch 1.6."""
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    used: dict[str, Storage] = {}
    _, protocol, system, value, keys = (_unpickled(mapped, used) for _ in range(5))
    if protocol != LEGACY_PROTOCOL:
        raise CheckpointError(
            f"The older PyTorch form must have protocol {LEGACY_PROTOCOL}. Received: another"
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
                "A checkpoint must hold all bytes that it declares. "
                f"Received: {len(view) - position} of {size}"
            )
        storages[key] = view[position : position + size]
        position += size
    return _arrays(_tensors(value), storages)


def _check_order(is_little):
    if not is_little:
        raise CheckpointError("A checkpoint must be little-endian. Received: another byte order")


def _member(mapped, member) -> memoryview:
    """The bytes of a member of the archive, which PyTorch never compresses."""
    size = member.file_size
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != size:
        raise CheckpointError(
            "A PyTorch archive must not be compressed. Received: "
            f"{member.filename[:200]!a}, compressed"
        )
    name_size, extra_size = struct.unpack_from("<HH", mapped, member.header_offset + 26)
    begin = member.header_offset + 30 + name_size + extra_size
    if size > len(mapped) - begin:
        raise CheckpointError(
            "A checkpoint must hold all bytes that it declares. "
            f"Received: {max(0, len(mapped) - begin)} of {size}"
        )
    data = memoryview(mapped)[begin : begin + size]
    if zlib.crc32(data) != member.CRC:
        raise CheckpointError(
            "A checkpoint's parts must have their checksums: the file is damaged. "
            f"Received: {member.filename[:200]!a}"
        )
    return data


def _unpickled(file, used=None):
    """A pickle's value with ``Tensor`` records in it; ``used`` takes up the storages by key."""

    def storage(identifier):
        tag, kind, key, _, count, *view = identifier
        if (
            tag != "storage"
            or not isinstance(kind, restricted_unpickler.Name)
            or not isinstance(key, str)
        ):
            raise CheckpointError("A tensor must have a storage. Received: another reference")
        if not is_sizes((count,)) or view not in ([], [None]):
            raise CheckpointError("A storage must be whole. Received: part of another")
        found = Storage(key, kind.text.removeprefix("torch."), count)
        # A storage that one tensor sees in another type is none of a state dict's.
        if used is not None and used.setdefault(key, found) != found:
            raise CheckpointError("A storage must have one type. Received: two types")
        return found

    functions: dict[str, Callable | None] = {f"torch.{name}": None for name in TYPES}
    functions["torch._utils._rebuild_tensor_v2"] = _tensor
    functions["torch._utils._rebuild_parameter"] = lambda tensor, *_: tensor
    functions["collections.OrderedDict"] = restricted_unpickler.empty_dictionary
    return restricted_unpickler.read(file, functions, storage)


def _tensor(storage, offset, sizes, strides, *_):
    """A tensor's record, all of which lies within its storage and takes no more than that."""
    if not isinstance(storage, Storage):
        raise TypeError("a tensor without a storage")
    numbers = is_sizes(sizes) and is_sizes(strides) and is_sizes((offset,))
    if numbers and len(sizes) == len(strides):
        last = offset + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
        if 0 not in sizes and last < storage.count and math.prod(sizes) <= storage.count:
            return Tensor(storage, offset, sizes, strides)
    raise CheckpointError(
        "A tensor must have values, all within its storage. Received: shape "
        f"{shown(sizes)}, strides {shown(strides)}, for a storage of {storage.count}"
    )


def _tensors(value) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(value, dict) and isinstance(value.get(wrapper), dict):
            value = value[wrapper]
    if not isinstance(value, dict):
        raise CheckpointError(
            f"A PyTorch checkpoint must hold a dictionary. Received: {type(value).__name__}"
        )
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                "A state dict must hold tensors by name alone. "
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
