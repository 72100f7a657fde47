"""Validates a ``.keras`` file before Keras reads it.

Keras's safe mode rejects code, but imports any object that a configuration names, and allocates the
memory that the weights declare. This module accepts only what Keras writes for models of numerical
layers:

* an archive of at most the four known members, uncompressed;
* a configuration of objects in the tables below, or registered in this process with
  ``keras.saving.register_keras_serializable``, whose code is the user's, not the file's;
* weights in contiguous arrays whose bytes are in the file.
"""

import contextlib
import io
import json
import math
import pathlib
import zipfile
from collections.abc import Iterator

import h5py
import keras

METADATA_ENTRY = "involution.json"
CONFIG, WEIGHTS = "config.json", "model.weights.h5"
# Maximum bytes by member. RedNet152's configuration has 0.6 MB, and takes about 12 MB when parsed.
LIMITS = {"metadata.json": 2**16, CONFIG: 2**21, METADATA_ENTRY: 2**20, WEIGHTS: math.inf}
MAX_DEPTH = 64
# Excludes layers that contain code (Lambda, wrappers of other frameworks' models), read files
# (lookups, TextVectorization), or create arrays of arbitrary size that are not weights
# (Normalization, spectrograms).
LAYERS = """
    Activation ActivityRegularization Add AdditiveAttention AlphaDropout Attention Average
    AveragePooling1D AveragePooling2D AveragePooling3D BatchNormalization Bidirectional CenterCrop
    Concatenate Conv1D Conv1DTranspose Conv2D Conv2DTranspose Conv3D Conv3DTranspose ConvLSTM1D
    ConvLSTM2D ConvLSTM3D Cropping1D Cropping2D Cropping3D Dense DepthwiseConv1D DepthwiseConv2D Dot
    Dropout ELU EinsumDense Embedding Flatten GRU GRUCell GaussianDropout GaussianNoise
    GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D GlobalMaxPooling1D
    GlobalMaxPooling2D GlobalMaxPooling3D GroupNormalization GroupQueryAttention Identity InputLayer
    LSTM LSTMCell LayerNormalization LeakyReLU Masking MaxPooling1D MaxPooling2D MaxPooling3D
    Maximum Minimum MultiHeadAttention Multiply PReLU Permute RMSNormalization RNN RandomBrightness
    RandomContrast RandomCrop RandomFlip RandomRotation RandomTranslation RandomZoom ReLU
    RepeatVector Rescaling Reshape Resizing SeparableConv1D SeparableConv2D SimpleRNN SimpleRNNCell
    Softmax SpatialDropout1D SpatialDropout2D SpatialDropout3D SpectralNormalization
    StackedRNNCells Subtract TimeDistributed UnitNormalization UpSampling1D UpSampling2D
    UpSampling3D ZeroPadding1D ZeroPadding2D ZeroPadding3D
"""
INITIALIZERS = """
    Constant GlorotNormal GlorotUniform HeNormal HeUniform Identity LecunNormal LecunUniform Ones
    Orthogonal OrthogonalInitializer RandomNormal RandomUniform TruncatedNormal VarianceScaling
    Zeros
"""
# Operators and functions of keras.ops in a functional model.
OPERATIONS = """
    Absolute Add Clip Concatenate Divide Exp ExpandDims GetItem Log Max Maximum Mean Min Minimum
    Multiply Negative Power Reshape Sqrt Square Squeeze Stack Subtract Sum Tanh Transpose TrueDivide
"""
ACTIVATIONS = "Elu Gelu LeakyRelu LogSoftmax Relu Relu6 Sigmoid Silu Softmax Softplus"
OBJECTS = {
    "keras": "DTypePolicy Functional Sequential",
    "keras.src.models.functional": "Functional",
    "keras.layers": LAYERS,
    "keras.initializers": INITIALIZERS,
    "keras.regularizers": "L1 L1L2 L2 OrthogonalRegularizer",
    "keras.constraints": "MaxNorm MinMaxNorm NonNeg UnitNorm",
    "keras.random": "SeedGenerator",
    "keras.src.ops.numpy": OPERATIONS,
    "keras.src.ops.nn": ACTIVATIONS,
}
ALLOWED = {(module, name) for module, names in OBJECTS.items() for name in names.split()}
# Values without a JSON type, no larger in memory than in the file.
VALUES = ("__keras_tensor__", "__ellipsis__", "__slice__", "__bytes__")
MAX_RANK = 8


def check(path) -> tuple[dict, int]:
    """Checks that a ``.keras`` file is safe to load.

    Args:
        path: The file.

    Returns:
        A dictionary from registered names in the file to their classes and functions in this
        process, and the number of elements of all weights.

    Raises:
        ValueError: The file contains something that is not accepted.
        Exception: The file is damaged.
    """
    registered: dict = {}
    with _open(path) as archive:
        config = json.loads(member(archive, CONFIG))
        # Unused with compile=False. Keras still uses those of nested models.
        del config["compile_config"]
        _check_value(config, registered, 0)
        return registered, _count_weights(archive)


def check_weights(path):
    """As ``check``, of the weights alone, for a model that exists: its layers may be of any class,
    because the configuration in the file is not used."""
    with _open(path) as archive:
        _count_weights(archive)


@contextlib.contextmanager
def _open(path) -> Iterator[zipfile.ZipFile]:
    """The archive, whose members are checked."""
    path = pathlib.Path(path)
    # Keras selects the reader by suffix; its HDF5 reader has fewer checks.
    if path.suffix != ".keras":
        raise ValueError(f"a name that ends with {path.suffix!a}")
    with zipfile.ZipFile(path) as archive:
        _check_members(archive.infolist(), path.stat().st_size)
        yield archive


def _count_weights(archive) -> int:
    """The number of elements of all weights, which are checked."""
    weights = member(archive, WEIGHTS)
    with h5py.File(io.BytesIO(weights), "r") as file:
        return _check_weights(file, len(weights))


def member(archive, name) -> bytes:
    """The bytes of a member of an open archive.

    Raises:
        ValueError: The member is compressed or too large.
    """
    found = archive.getinfo(name)
    if found.compress_type != zipfile.ZIP_STORED or found.file_size != found.compress_size:
        raise ValueError(f"{name}, compressed; Keras does not compress it")
    if found.file_size > LIMITS[name]:
        raise ValueError(f"{name} of {found.file_size:,} bytes")
    return archive.read(name)


def _check_members(members, size):
    names = [found.filename for found in members]
    if len(set(names)) != len(names) or not {CONFIG, WEIGHTS} <= set(names) <= set(LIMITS):
        raise ValueError(f"an archive with members {ascii(names[:8])[:300]}")
    # Overlapping members would multiply the data read.
    declared = sum(found.file_size for found in members)
    if declared > size:
        raise ValueError(f"{declared:,} bytes declared in a file of {size:,}")


def _check_value(value, registered, depth):
    if depth > MAX_DEPTH:
        raise ValueError(f"a configuration nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, dict):
        if "class_name" in value:
            _check_object(value, registered)
        # Losses and metrics of a nested model, which inference does not need.
        if value.get("compile_config"):
            raise ValueError("a compiled nested model")
        if "output_layers" in value:
            _check_graph(value)
        for part in value.values():
            _check_value(part, registered, depth + 1)
    elif isinstance(value, list):
        for part in value:
            _check_value(part, registered, depth + 1)


def _check_object(value, registered):
    kind, module = value["class_name"], value.get("module")
    if kind in VALUES:
        return
    # Keras reads an object without a module as a legacy format.
    name = value.get("config" if kind == "function" else "registered_name")
    found = keras.saving.get_registered_object(name) if "module" in value else None
    if found is not None:
        registered[name] = found
    elif (module, kind) not in ALLOWED:
        what = ".".join(str(part) for part in (module, kind, name) if part)
        raise ValueError(
            f"{ascii(what[:200])[1:-1]}, which is neither a numerical layer nor registered here"
        )


def _check_graph(model):
    """Checks that every layer of a functional model leads to an output, as Keras writes it.

    Keras would also build unused layers, and execute calls of constants.
    """
    names = [layer["name"] for layer in model["layers"]]
    if len(set(names)) != len(names):
        raise ValueError(f"layers with equal names, {ascii(names[:8])[:300]}")
    used: set = set()
    for layer in model["layers"]:
        for node in layer["inbound_nodes"]:
            found = set(_input_layers([node["args"], node["kwargs"]]))
            if not found:
                raise ValueError(f"a call without tensors, of {ascii(layer['name'])[:200]}")
            used |= found
    used |= set(_strings([model["input_layers"], model["output_layers"]]))
    unused = [name for name in names if name not in used]
    if unused:
        raise ValueError(f"layers that lead to no output, {ascii(unused[:8])[:300]}")


def _input_layers(value) -> Iterator[str]:
    """Names of the layers whose outputs are in a call's arguments."""
    if isinstance(value, list):
        for part in value:
            yield from _input_layers(part)
    elif isinstance(value, dict):
        if value.get("class_name") == "__keras_tensor__":
            yield value["config"]["keras_history"][0]
        else:
            yield from _input_layers(list(value.values()))


def _strings(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _check_weights(file, size) -> int:
    """The number of elements of all arrays."""
    declared, elements, groups = 0, 0, [file]
    while groups:
        group = groups.pop()
        for name in group:
            # Soft and external links may refer to other files or form loops.
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"a link in the weights, {name[:200]!a}")
            found = group[name]
            if h5py.h5o.get_info(found.id).rc != 1:
                raise ValueError(f"an array or group with two names, {name[:200]!a}")
            if isinstance(found, h5py.Group):
                groups.append(found)
            else:
                declared += _check_array(name, found, size)
                elements += math.prod(found.shape)
    # Overlapping arrays would multiply the data read.
    if declared > size:
        raise ValueError(f"weights of {declared:,} bytes in a file of {size:,}")
    return elements


def _check_array(name, found, size) -> int:
    """The size of an array in bytes, all of which are in the file."""
    escaped = ascii(name[:200])
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"weights that are not an array, {escaped}")
    properties = found.id.get_create_plist()
    # Chunks may be compressed, missing, or in other files.
    if properties.get_layout() not in (h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT):
        raise ValueError(f"a chunked array, {escaped}")
    if properties.get_external_count():
        raise ValueError(f"an array in another file, {escaped}")
    # bfloat16 is stored as two opaque bytes.
    if found.dtype.kind not in "biuf" and found.dtype.str != "|V2":
        raise ValueError(f"an array of dtype {ascii(str(found.dtype))[:50]}, {escaped}")
    if found.shape is None or len(found.shape) > MAX_RANK:
        raise ValueError(f"an array of rank above {MAX_RANK} or without a shape, {escaped}")
    declared = math.prod(found.shape) * found.dtype.itemsize
    stored = found.id.get_storage_size()
    if declared > stored or (found.id.get_offset() or 0) + stored > size:
        raise ValueError(f"an array of {declared:,} bytes with {stored:,} in the file, {escaped}")
    return declared
