"""TensorFlow bundles: ``NAME.index`` and ``NAME.data-00000-of-00001``, read without TensorFlow.

The index is a LevelDB table: blocks of sorted, prefix-compressed keys with checksums, then an index
of the blocks and a footer. Its values are protocol buffers, a header under the empty key and an
entry for each tensor, defined by tensorflow/tensorflow in
``tensorflow/core/protobuf/tensor_bundle.proto``.
"""

import pathlib
import struct

import numpy as np

from involution.models.checkpoint_readers.arrays import array
from involution.models.checkpoint_readers.errors import CheckpointError

MAGIC = 0xDB4775248B80FB57
FOOTER = 48
# Checksums in Python take 1 s per 10 MB, and shared prefixes multiply the size of keys.
INDEX_LIMIT, DATA_LIMIT = 4 * 2**20, 16 * 2**20
KEY_LIMIT, KEYS_LIMIT = 4096, 10_000
TYPES = {
    1: "<f4",
    2: "<f8",
    3: "<i4",
    4: "u1",
    5: "<i2",
    6: "i1",
    9: "<i8",
    10: "?",
    19: "<f2",
}
STRING = 7


def read(prefix) -> dict[str, np.ndarray]:
    """The numeric tensors of a bundle by name; strings, such as the object graph, are omitted.

    Args:
        prefix: Path of the bundle: ``folder/variables/variables`` in a SavedModel.

    Raises:
        CheckpointError: The bundle is damaged, compressed, or too large for this reader.
    """
    index = _contents(f"{prefix}.index", INDEX_LIMIT)
    entries = dict(_table(index))
    header = _fields_by_number(entries.pop(b"", b""))
    if header.get(1) != 1 or header.get(2, 0) != 0:
        raise CheckpointError(
            "A TensorFlow bundle must be little-endian and in one data file. "
            f"Received: {prefix}.index with {header.get(1, 0)} data files"
        )
    data = _contents(f"{prefix}.data-00000-of-00001", DATA_LIMIT)
    tensors = {key.decode(): _fields_by_number(value) for key, value in entries.items()}
    tensors = {name: entry for name, entry in tensors.items() if entry.get(1) != STRING}
    # Overlapping tensors would multiply the data read.
    declared = sum(entry.get(5, 0) for entry in tensors.values())
    if declared > len(data):
        raise CheckpointError(
            "A TensorFlow bundle must contain all bytes that it declares. "
            f"Received: {len(data)} of {declared}"
        )
    return {name: _tensor(ascii(name), entry, data) for name, entry in tensors.items()}


def _contents(path, limit) -> bytes:
    with open(path, "rb") as file:
        contents = file.read(limit + 1)
    if len(contents) > limit:
        raise CheckpointError(
            f"A file of a TensorFlow bundle must have at most {limit:,} bytes here. "
            f"Received: {pathlib.Path(path).name}, which is larger"
        )
    return contents


def _tensor(name, entry, data):
    shape, kind = entry.get(2, b""), entry.get(1)
    if kind not in TYPES or 7 in entry:
        raise CheckpointError(
            "A tensor of a bundle must be numeric and not partitioned. "
            f"Received: {name}, of dtype {kind}" + (", in slices" if 7 in entry else "")
        )
    sizes = tuple(_fields_by_number(dim).get(1, 0) for number, dim in _fields(shape) if number == 2)
    begin, size = entry.get(4, 0), entry.get(5, 0)
    part = data[begin : begin + size]
    values = array(part, TYPES[kind], sizes, name)
    if _masked_checksum(part) != entry.get(6):
        raise CheckpointError(
            f"A tensor must match its checksum. Received: {name}, which is damaged"
        )
    return values


def _table(data):
    """Pairs (key, value) of a table."""
    (magic,) = struct.unpack("<Q", data[-8:])
    if len(data) < FOOTER or magic != MAGIC:
        raise CheckpointError(
            "The index of a TensorFlow bundle must end with its magic number. Received: other bytes"
        )
    _, position = _handle(data, len(data) - FOOTER)  # the unused meta index
    index, _ = _handle(data, position)
    count, end = 0, 0
    for _, value in _block(data, index):
        handle, _ = _handle(value, 0)
        # Overlapping blocks would multiply the data read.
        if handle[0] < end:
            raise CheckpointError(
                "The blocks of a table must be in order. Received: unordered or overlapping blocks"
            )
        end = sum(handle)
        for key, entry in _block(data, handle):
            count += 1
            if count > KEYS_LIMIT:
                raise CheckpointError(
                    f"A TensorFlow bundle must have at most {KEYS_LIMIT:,} keys. Received: more"
                )
            yield key, entry


def _block(data, handle):
    begin, size = handle
    if begin + size + 5 > len(data) - FOOTER:
        raise CheckpointError(
            "A TensorFlow bundle must contain all bytes that it declares. "
            f"Received: {len(data)} bytes, with a block up to {begin + size + 5}"
        )
    kind, checksum = struct.unpack_from("<BI", data, begin + size)
    if kind != 0:
        raise CheckpointError(
            "The blocks of a table must be uncompressed, as in checkpoints of TensorFlow. "
            f"Received: compression {kind}" + (" (Snappy)" if kind == 1 else "")
        )
    if _masked_checksum(data[begin : begin + size + 1]) != checksum:
        raise CheckpointError("A block must match its checksum. Received: a damaged block")
    block = data[begin : begin + size]
    (restarts,) = struct.unpack_from("<I", block, size - 4)
    end, position, key = size - 4 - 4 * restarts, 0, b""
    while position < end:
        shared, position = _varint(block, position)
        own, position = _varint(block, position)
        length, position = _varint(block, position)
        if shared > len(key) or shared + own > KEY_LIMIT or position + own + length > end:
            raise CheckpointError(
                "A table's keys must be inside their block. Received: an invalid key"
            )
        key = key[:shared] + block[position : position + own]
        position += own + length
        yield key, block[position - length : position]


def _handle(data, position):
    """((offset, size) of a block, the next position)."""
    offset, position = _varint(data, position)
    size, position = _varint(data, position)
    return (offset, size), position


def _varint(data, position):
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise CheckpointError("A varint must have at most 10 bytes. Received: a longer one")


def _fields(message):
    """Pairs (field number, value) of a protocol buffer."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, wire = divmod(tag, 8)
        if wire == 0:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire == 2:
            size, position = _varint(message, position)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise CheckpointError(f"A message must have known wire types. Received: {wire}")
        part = message[position : position + size]
        position += size
        if len(part) < size:
            raise CheckpointError("A message must contain all its bytes. Received: too few")
        yield number, part if wire == 2 else int.from_bytes(part, "little")


def _fields_by_number(message):
    """The fields by number; the last value of a repeated field."""
    return dict(_fields(message))


def _polynomial_table():
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


CRC32C = _polynomial_table()


def _masked_checksum(data) -> int:
    """CRC-32C, rotated and offset as TensorFlow stores it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC32C[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
