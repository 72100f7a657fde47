"""What may stand in a ``.keras`` file, looked at before Keras reads it.

Keras's safe mode refuses code, but it looks up whatever a configuration names, and takes memory for
whatever the weights declare. Here only that passes which Keras writes for layers of numbers:

* an archive of the four members that there can be, none of them compressed;
* a configuration whose objects are in the tables below, or are registered in this process, by
  ``keras.saving.register_keras_serializable``: these are the user's own code and not the file's;
* weights that are plain arrays, each with its bytes in the file.
"""

import io
import json
import math
import pathlib
import zipfile
from collections.abc import Iterator

import h5py
import keras

ENTRY = "involution.json"
CONFIG, WEIGHTS = "config.json", "model.weights.h5"
# Bytes. RedNet152's configuration takes 0.6 MB; Python's objects take some twenty times as much.
LIMITS = {"metadata.json": 2**16, CONFIG: 2**21, ENTRY: 2**20, WEIGHTS: math.inf}
DEPTH = 64
# Not among them: layers that hold code (Lambda, wrappers of other frameworks' models), that read
# files (lookups, TextVectorization), or that make arrays of any size besides their weights
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
# What operators and functions of keras.ops become in a functional model.
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
# Values that JSON has no form for, and that take no more memory than their texts.
VALUES = ("__keras_tensor__", "__ellipsis__", "__slice__", "__bytes__")
MOST_AXES = 8


def check(path) -> tuple[dict, int]:
    """Reads a ``.keras`` file as far as to know that Keras can.

    Args:
        path: The file.

    Returns:
        From registered names to the classes and functions of this process that the file asks for;
        and how many numbers its weights hold.

    Raises:
        Exception: It holds something else, or is damaged: a ``ValueError`` that says what, or
            whatever a damaged file does to its readers.
    """
    path = pathlib.Path(path)
    # Keras takes the reader by the name's ending; of an HDF5 file it would ask less.
    if path.suffix != ".keras":
        raise ValueError(f"a name that ends with {path.suffix!a}")
    with zipfile.ZipFile(path) as archive:
        _check_members(archive.infolist(), path.stat().st_size)
        config = json.loads(member(archive, CONFIG))
        # Without compiling Keras drops this one, and no other.
        del config["compile_config"]
        registered: dict = {}
        _check_value(config, registered, 0)
        weights = member(archive, WEIGHTS)
    with h5py.File(io.BytesIO(weights), "r") as file:
        return registered, _check_weights(file, len(weights))


def member(archive, name) -> bytes:
    """A member of an open archive.

    Raises:
        ValueError: It is compressed, or too large.
    """
    found = archive.getinfo(name)
    if found.compress_type != zipfile.ZIP_STORED or found.file_size != found.compress_size:
        raise ValueError(f"{name}, compressed, which Keras does not")
    if found.file_size > LIMITS[name]:
        raise ValueError(f"{name} of {found.file_size:,} bytes")
    return archive.read(name)


def _check_members(members, size):
    names = [found.filename for found in members]
    if len(set(names)) != len(names) or not {CONFIG, WEIGHTS} <= set(names) <= set(LIMITS):
        raise ValueError(f"an archive of {ascii(names[:8])[:300]}")
    # Members that overlap would be read again and again.
    declared = sum(found.file_size for found in members)
    if declared > size:
        raise ValueError(f"{declared:,} bytes declared in {size:,}")


def _check_value(value, registered, depth):
    if depth > DEPTH:
        raise ValueError(f"a configuration of more than {DEPTH} levels")
    if isinstance(value, dict):
        if "class_name" in value:
            _check_object(value, registered)
        # Of a model within the model: losses and metrics, which are not needed.
        if value.get("compile_config"):
            raise ValueError("a compiled model within the model")
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
    # Without a module Keras would read it as a form of old.
    name = value.get("config" if kind == "function" else "registered_name")
    found = keras.saving.get_registered_object(name) if "module" in value else None
    if found is not None:
        registered[name] = found
    elif (module, kind) not in ALLOWED:
        what = ".".join(str(part) for part in (module, kind, name) if part)
        raise ValueError(
            f"{ascii(what[:200])[1:-1]}, which is neither a layer of numbers nor registered here"
        )


def _check_graph(model):
    """Every layer of a functional model leads to its outputs, as those do that Keras writes.

    Others would be built all the same, and calls of constants would be computed.
    """
    names = [layer["name"] for layer in model["layers"]]
    if len(set(names)) != len(names):
        raise ValueError(f"layers of one name, {ascii(names[:8])[:300]}")
    used: set = set()
    for layer in model["layers"]:
        for node in layer["inbound_nodes"]:
            found = set(_tensors([node["args"], node["kwargs"]]))
            if not found:
                raise ValueError(f"a call without tensors, of {ascii(layer['name'])[:200]}")
            used |= found
    used |= set(_texts([model["input_layers"], model["output_layers"]]))
    unused = [name for name in names if name not in used]
    if unused:
        raise ValueError(f"layers that lead to no output, {ascii(unused[:8])[:300]}")


def _tensors(value) -> Iterator[str]:
    """Names of the layers whose outputs stand in a call's arguments."""
    if isinstance(value, list):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        if value.get("class_name") == "__keras_tensor__":
            yield value["config"]["keras_history"][0]
        else:
            yield from _tensors(list(value.values()))


def _texts(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _check_weights(file, size) -> int:
    """How many numbers there are."""
    declared, numbers, groups = 0, 0, [file]
    while groups:
        group = groups.pop()
        for name in group:
            # Other links lead to other files, or in circles.
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"a link in the weights, {name[:200]!a}")
            found = group[name]
            if h5py.h5o.get_info(found.id).rc != 1:
                raise ValueError(f"an array or group with two names, {name[:200]!a}")
            if isinstance(found, h5py.Group):
                groups.append(found)
            else:
                declared += _bytes(name, found, size)
                numbers += math.prod(found.shape)
    # Arrays that overlap would be read again and again.
    if declared > size:
        raise ValueError(f"weights of {declared:,} bytes in {size:,}")
    return numbers


def _bytes(name, found, size) -> int:
    """What an array takes, all of which stands in the file."""
    shown = ascii(name[:200])
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"weights that are no array, {shown}")
    properties = found.id.get_create_plist()
    # Not in pieces, which may be compressed, missing, or parts of other files.
    if properties.get_layout() not in (h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT):
        raise ValueError(f"an array in pieces, {shown}")
    if properties.get_external_count():
        raise ValueError(f"an array in another file, {shown}")
    # bfloat16 is stored as two bytes without a meaning.
    if found.dtype.kind not in "biuf" and found.dtype.str != "|V2":
        raise ValueError(f"an array of {ascii(str(found.dtype))[:50]}, {shown}")
    if found.shape is None or len(found.shape) > MOST_AXES:
        raise ValueError(f"an array with too many axes or none, {shown}")
    taken = math.prod(found.shape) * found.dtype.itemsize
    stored = found.id.get_storage_size()
    if taken > stored or (found.id.get_offset() or 0) + stored > size:
        raise ValueError(f"an array of {taken:,} bytes with {stored:,} in the file, {shown}")
    return taken
