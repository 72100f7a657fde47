"""Hostile files, one for each known vulnerability of Keras's formats and similar ones of pickles,
archives and HDF5.

A maker takes a ``Place`` and returns the path of what it wrote to ``place.given``.
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
class Place:
    """The folders and files of one case.

    Attributes:
        given: Folder of the hostile file.
        secret: A file elsewhere, which must not be opened.
        marker: A file that hostile code would write.
    """

    given: pathlib.Path
    secret: pathlib.Path
    marker: pathlib.Path

    @property
    def command(self) -> str:
        return f"touch {self.marker}"


FILES: dict[str, tuple[Callable[[Place], pathlib.Path], tuple[str, ...]]] = {}


def hostile(*entries):
    """Registers a maker under its name, for these entry points."""

    def decorate(function):
        FILES[function.__name__] = function, entries
        return function

    return decorate


class Call:
    """Is pickled as a call."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


# .keras files, from the members of an ordinary one.


@functools.cache
def parts() -> dict[str, bytes]:
    layers = [keras.Input((4, 4, 3)), keras.layers.Flatten(), keras.layers.Dense(2, name="dense")]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "x.keras")
        Classifier(keras.Sequential(layers), ("a", "b"), (4, 4, 3)).save(path)
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}


def archive(place, changes=None, name="model.keras", compression=zipfile.ZIP_STORED, more=()):
    path = place.given / name
    with zipfile.ZipFile(path, "w", compression) as made:
        for member, content in {**parts(), **(changes or {})}.items():
            if content is not None:
                made.writestr(member, content)
        for member, content in more:
            made.writestr(member, content)
    return path


def configured(place, change):
    """With another configuration: ``change`` gets its layers."""
    config = json.loads(parts()["config.json"])
    change(config["config"]["layers"])
    return archive(place, {"config.json": json.dumps(config)})


def with_layer(place, module, class_name, config, **more):
    """With an additional layer."""
    layer = {"module": module, "class_name": class_name, "config": config, "registered_name": None}
    return configured(place, lambda layers: layers.insert(2, layer | more))


def function(module, name):
    return {"module": module, "class_name": "function", "config": name, "registered_name": name}


def with_function(place, module, name):
    return configured(place, lambda layers: layers.insert(2, function(module, name)))


def weighted(place, change):
    """With other weights: ``change`` gets the open HDF5 file."""
    content = io.BytesIO(parts()["model.weights.h5"])
    with h5py.File(content, "a") as file:
        change(file)
    return archive(place, {"model.weights.h5": content.getvalue()})


ARRAY = "layers/dense/vars/0"


def replace_array(file, make):
    """Replaces the first array of the weights: ``make`` gets its group."""
    del file[ARRAY]
    make(file["layers/dense/vars"])


@hostile(*KERAS)
def cve_2024_3660_lambda(place):
    marker = str(place.marker)
    inputs = keras.Input((4, 4, 3))
    harm = keras.layers.Lambda(lambda x: (open(marker, "w").close(), x)[1], output_shape=(4, 4, 3))
    outputs = keras.layers.Dense(2)(keras.layers.Flatten()(harm(inputs)))
    Classifier(keras.Model(inputs, outputs), ("a", "b"), (4, 4, 3)).save(place.given / "x.keras")
    place.marker.unlink(missing_ok=True)
    return place.given / "x.keras"


@hostile(*KERAS)
def lambda_of_a_named_function(place):
    return with_layer(place, "keras.layers", "Lambda", {"function": function("os", "system")})


@hostile(*KERAS)
def cve_2025_1550_function_of_a_module(place):
    return with_function(place, "os", "system")


@hostile(*KERAS)
def cve_2025_1550_class_of_a_module(place):
    return with_layer(place, "subprocess", "Popen", {"args": ["touch", str(place.marker)]})


@hostile(*KERAS)
def cve_2025_1550_module_that_runs_when_imported(place):
    (place.given / "canary_of_the_attacker.py").write_text(f"open({str(place.marker)!r}, 'w')\n")
    return with_layer(place, "canary_of_the_attacker", "Layer", {})


@hostile(*KERAS)
def cve_2025_8747_get_file(place):
    return with_layer(
        place, "keras.utils", "get_file", {"fname": "x", "origin": "http://127.0.0.1:1/x"}
    )


@hostile(*KERAS)
def cve_2025_8747_get_file_by_its_inner_name(place):
    return with_function(place, "keras.src.utils.file_utils", "get_file")


@hostile(*KERAS)
def cve_2025_9906_unsafe_deserialization(place):
    return with_function(place, "keras.config", "enable_unsafe_deserialization")


@hostile(*KERAS)
def load_model_in_a_configuration(place):
    return with_function(place, "keras.models", "load_model")


@hostile(*KERAS)
def cve_2025_49655_torch_module(place):
    harm = pickle.dumps(Call(os.system, place.command))
    config = {"module": base64.b64encode(harm).decode()}
    return with_layer(place, "keras.layers", "TorchModuleWrapper", config)


@hostile(*KERAS)
def cve_2026_1462_tensorflow_saved_model(place):
    config = {"filepath": str(place.secret.parent), "call_endpoint": "serve"}
    return with_layer(place, "keras.layers", "TFSMLayer", config)


@hostile(*KERAS)
def jax_layer(place):
    config = {"call_fn": function("os", "system"), "init_fn": function("os", "system")}
    return with_layer(place, "keras.layers", "JaxLayer", config)


@hostile(*KERAS)
def flax_layer(place):
    return with_layer(place, "keras.layers", "FlaxLayer", {"module": "os"})


@hostile(*KERAS)
def cve_2025_12058_vocabulary_of_a_file(place):
    return with_layer(place, "keras.layers", "StringLookup", {"vocabulary": str(place.secret)})


@hostile(*KERAS)
def cve_2025_12058_vocabulary_of_a_server(place):
    config = {"vocabulary": "http://127.0.0.1:1/words"}
    return with_layer(place, "keras.layers", "StringLookup", config)


@hostile(*KERAS)
def integer_vocabulary_of_a_file(place):
    return with_layer(place, "keras.layers", "IntegerLookup", {"vocabulary": str(place.secret)})


@hostile(*KERAS)
def text_vocabulary_of_a_file(place):
    config = {"vocabulary": str(place.secret), "standardize": None}
    return with_layer(place, "keras.layers", "TextVectorization", config)


@hostile(*KERAS)
def vocabulary_among_the_assets(place):
    more = [("assets/string_lookup/vocabulary.txt", "a\nb\n")]
    return archive(place, more=more)


@hostile(*KERAS)
def feature_space(place):
    return with_layer(place, "keras.utils", "FeatureSpace", {"features": {}})


@hostile(*KERAS)
def callback_that_writes(place):
    return with_layer(place, "keras.callbacks", "CSVLogger", {"filename": str(place.marker)})


@hostile(*KERAS)
def tokenizer_of_keras_hub(place):
    config = {"vocabulary": str(place.secret), "merges": str(place.secret)}
    return with_layer(place, "keras_hub.tokenizers", "BytePairTokenizer", config)


@hostile(*KERAS)
def class_of_this_package_that_is_not_registered(place):
    return with_layer(place, "involution.data.lazy_images", "LazyImages", {"sources": ["x"]})


@hostile(*KERAS)
def unknown_registered_name(place):
    return with_layer(place, "os", "X", {}, registered_name="attacker>X")


@hostile(*KERAS)
def registered_name_that_is_no_string(place):
    return with_layer(place, "os", "X", {}, registered_name={"class_name": "x"})


@hostile(*KERAS)
def lambda_in_a_wrapper(place):
    harm = {"function": function("os", "system")}
    inner = {"module": "keras.layers", "class_name": "Lambda", "config": harm}
    return with_layer(place, "keras.layers", "TimeDistributed", {"layer": inner})


@hostile(*KERAS)
def function_as_activation(place):
    config = {"activation": function("os", "system")}
    return with_layer(place, "keras.layers", "Activation", config)


@hostile(*KERAS)
def function_as_initializer(place):
    config = {"units": 2, "kernel_initializer": function("builtins", "eval")}
    return with_layer(place, "keras.layers", "Dense", config)


@hostile(*KERAS)
def function_as_regularizer(place):
    config = {"units": 2, "kernel_regularizer": function("keras.regularizers", "deserialize")}
    return with_layer(place, "keras.layers", "Dense", config)


@hostile(*KERAS)
def object_in_a_build_config(place):
    harm = {"module": "subprocess", "class_name": "Popen", "config": {"args": ["id"]}}
    build = {"input_shape": [None, harm]}
    return with_layer(place, "keras.layers", "Flatten", {}, build_config=build)


@hostile(*KERAS)
def nested_compiled_model(place):
    config = {"name": "inner", "layers": []}
    compiled = {"loss": function("os", "system")}
    return with_layer(place, "keras", "Sequential", config, compile_config=compiled)


@hostile(*KERAS)
def layer_in_legacy_format(place):
    harm = {"class_name": "Lambda", "config": {"function": ["4wEAAAAA", None, None]}}
    return configured(place, lambda layers: layers.insert(2, harm))


@hostile(*KERAS)
def lambda_in_legacy_format(place):
    harm = {"class_name": "__lambda__", "config": {"value": ["4wEAAAAA", None, None]}}
    config = {"activation": harm}
    return with_layer(place, "keras.layers", "Activation", config)


@hostile(*KERAS)
def tensorflow_typespec(place):
    harm = {"module": "os", "class_name": "__typespec__", "spec_name": "system", "config": ["id"]}
    return with_layer(
        place, "keras.layers", "Rescaling", {"scale": {**harm, "registered_name": ""}}
    )


@hostile(*KERAS)
def array_of_gigabytes_by_its_dtype(place):
    harm = {"class_name": "__numpy__", "config": {"value": ["x"], "dtype": f"S{2**30}"}}
    return with_layer(place, "keras.layers", "Rescaling", {"scale": harm})


@hostile(*KERAS)
def tensor_in_a_configuration(place):
    harm = {"class_name": "__tensor__", "config": {"value": [1.0] * 1000, "dtype": "float32"}}
    return with_layer(place, "keras.layers", "Rescaling", {"scale": harm})


@hostile(*KERAS)
def statistics_of_any_size(place):
    config = {"axis": None, "mean": 0.0, "variance": 1.0}
    build = {"input_shape": [None, 2**30]}
    return with_layer(place, "keras.layers", "Normalization", config, build_config=build)


@hostile(*KERAS)
def billions_of_units(place):
    return configured(place, lambda layers: layers[2]["config"].update(units=2**31))


@hostile(*KERAS)
def embedding_of_gigabytes(place):
    config = {"input_dim": 2**30, "output_dim": 8}
    return with_layer(place, "keras.layers", "Embedding", config)


@hostile(*KERAS)
def build_shape_of_gigabytes(place):
    config = {"units": 8, "name": "dense_1"}
    build = {"input_shape": [None, 2**30]}
    return with_layer(place, "keras.layers", "Dense", config, build_config=build)


@hostile(*KERAS)
def weights_smaller_than_the_model(place):
    return configured(place, lambda layers: layers[2]["config"].update(units=10**6))


@hostile(*KERAS)
def thousands_of_layers(place):
    one = {
        "module": "keras.layers",
        "class_name": "Identity",
        "config": {},
        "registered_name": None,
    }
    return configured(place, lambda layers: layers.extend([one] * 12_000))


@hostile(*KERAS)
def deeply_nested_configuration(place):
    return archive(place, {"config.json": "[" * 10**5})


@hostile(*KERAS)
def nested_configuration(place):
    value: list = []
    for _ in range(200):
        value = [value]
    return with_layer(place, "keras.layers", "Rescaling", {"scale": value})


@hostile(*KERAS)
def configuration_of_megabytes(place):
    return archive(place, {"config.json": "[" + "{}," * 2**21 + "{}]"})


@hostile(*KERAS)
def null_configuration(place):
    return archive(place, {"config.json": "null"})


@hostile(*KERAS)
def number_of_many_digits(place):
    return archive(place, {"config.json": '{"compile_config": ' + "9" * 10**6 + "}"})


@hostile(*KERAS)
def image_of_gigabytes(place):
    metadata = {**METADATA, "image_shape": [10**5, 10**5, 3]}
    config = json.loads(parts()["config.json"])
    config["config"]["layers"][0]["config"]["batch_shape"] = [None, 10**5, 10**5, 3]
    changes = {"involution.json": json.dumps(metadata), "config.json": json.dumps(config)}
    return archive(place, changes)


# Functional models that build layers without weights in the file. Each takes some hundred megabytes
# without validation.


@functools.cache
def graph_parts() -> dict[str, bytes]:
    inputs = keras.Input((4, 4, 3))
    model = keras.Model(inputs, keras.layers.Dense(2, name="dense")(keras.layers.Flatten()(inputs)))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "x.keras")
        Classifier(model, ("a", "b"), (4, 4, 3)).save(path)
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}


def with_node(place, module, class_name, config, nodes=(), **more):
    """With an additional layer and calls of it, which lead to no output."""
    config_json = json.loads(graph_parts()["config.json"])
    layer = {"module": module, "class_name": class_name, "registered_name": None, "name": "more"}
    layer |= {"config": {"name": "more", **config}, "inbound_nodes": list(nodes), **more}
    config_json["config"]["layers"].append(layer)
    return archive(place, {**graph_parts(), "config.json": json.dumps(config_json)})


def unused(name, shape, **config):
    def make(place):
        build = {"build_config": {"input_shape": shape}}
        return with_node(place, "keras.layers", name, config, **build)

    FILES[f"{name.lower()}_that_nothing_uses"] = make, ("export",)


ZEROS = {
    "module": "keras.initializers",
    "class_name": "Zeros",
    "config": {},
    "registered_name": None,
}
unused("Dense", [None, 1000], units=30_000)
unused("Embedding", [None, 5], input_dim=30_000, output_dim=1000)
unused("SimpleRNN", [None, 4, 4], units=6000, recurrent_initializer=ZEROS)
unused("MultiHeadAttention", [None, 4, 1000], num_heads=100, key_dim=100)


@hostile("export")
def call_of_constants(place):
    column, row = [[1.0]] * 8000, [1.0] * 8000
    nodes = [{"args": [column, row], "kwargs": {}}]
    return with_node(place, "keras.src.ops.numpy", "Add", {}, nodes)


@hostile("export")
def layers_with_equal_names(place):
    config = {"units": 30_000, "name": "dense"}
    build = {"input_shape": [None, 1000]}
    return with_node(place, "keras.layers", "Dense", config, name="dense", build_config=build)


@hostile("export")
def lora_rank_of_a_million(place):
    return configured(place, lambda layers: layers[2]["config"].update(lora_rank=10**6))


@hostile("export")
def layer_as_an_activation(place):
    harm = {"module": "keras.layers", "class_name": "Dense", "config": {"units": 30_000}}
    harm |= {"registered_name": None, "build_config": {"input_shape": [None, 1000]}}
    return with_layer(place, "keras.layers", "Activation", {"activation": harm})


@hostile("export")
def states_of_any_batch(place):
    def change(layers):
        layers[0]["config"]["batch_shape"] = [10**8, 4, 12]
        rnn = {"module": "keras.layers", "class_name": "SimpleRNN", "registered_name": None}
        layers[1] = rnn | {"config": {"units": 1, "stateful": True}}

    return configured(place, change)


# HDF5.


@hostile(*KERAS)
def cve_2026_1669_external_link(place):
    link = h5py.ExternalLink(str(place.secret), "/x")
    return weighted(place, lambda f: replace_array(f, lambda group: group.__setitem__("0", link)))


@hostile(*KERAS)
def external_link_as_a_group(place):
    def change(file):
        del file["layers"]
        file["layers"] = h5py.ExternalLink(str(place.secret), "/layers")

    return weighted(place, change)


@hostile(*KERAS)
def soft_link(place):
    link = h5py.SoftLink("/layers/dense/vars/1")
    return weighted(place, lambda f: replace_array(f, lambda group: group.__setitem__("0", link)))


@hostile(*KERAS)
def hard_link_loop(place):
    return weighted(place, lambda file: file["layers"].__setitem__("again", file["layers"]))


@hostile(*KERAS)
def array_with_two_names(place):
    return weighted(place, lambda file: file["layers/dense/vars"].__setitem__("2", file[ARRAY]))


@hostile(*KERAS)
def cve_2026_1669_external_storage(place):
    def make(group):
        stored = [(str(place.secret), 0, h5py.h5f.UNLIMITED)]
        group.create_dataset("0", (48, 2), "f4", external=stored)

    return weighted(place, lambda f: replace_array(f, make))


@hostile(*KERAS)
def virtual_array(place):
    def make(group):
        layout = h5py.VirtualLayout((48, 2), "f4")
        layout[:] = h5py.VirtualSource(str(place.secret), "x", (48, 2))
        group.create_virtual_dataset("0", layout)

    return weighted(place, lambda f: replace_array(f, make))


@hostile(*KERAS)
def cve_2026_0897_shape_bomb(place):
    def make(group):
        group.create_dataset("0", (2**33,), "f4", chunks=(2**20,), compression="gzip")

    return weighted(place, lambda f: replace_array(f, make))


@hostile(*KERAS)
def shape_bombs_below_keras_s_floor(place):
    def make(group):
        for number in range(40):
            name = str(number) if number != 1 else "x"
            group.create_dataset(name, (2**29,), "f4", chunks=(2**20,))

    return weighted(place, lambda f: replace_array(f, make))


@hostile(*KERAS)
def compressed_array(place):
    def make(group):
        zeros = np.zeros(2**25, "f4")
        group.create_dataset("0", data=zeros, chunks=(2**22,), compression="gzip")

    return weighted(place, lambda f: replace_array(f, make))


@hostile(*KERAS)
def array_without_bytes(place):
    # Contiguous, not written.
    return weighted(
        place, lambda f: replace_array(f, lambda group: group.create_dataset("0", (2**27,), "f4"))
    )


@hostile(*KERAS)
def arrays_that_overlap(place):
    """Each array is in the file, at the offset of the first one."""
    content = io.BytesIO(parts()["model.weights.h5"])
    with h5py.File(content, "a") as file:
        first = file.create_dataset("again/0", data=np.zeros(2**14, "f4"))
        for name in "1234":
            file.create_dataset(f"again/{name}", (2**14,), "f4")
        address, size = (number.to_bytes(8, "little") for number in (first.id.get_offset(), 2**16))
    nowhere = b"\xff" * 8 + size
    assert content.getvalue().count(nowhere) == 4
    changed = content.getvalue().replace(nowhere, address + size)
    return archive(place, {"model.weights.h5": changed})


@hostile(*KERAS)
def array_of_strings(place):
    texts = np.array(["x"] * 96, object)
    return weighted(
        place, lambda f: replace_array(f, lambda group: group.create_dataset("0", data=texts))
    )


@hostile(*KERAS)
def array_of_long_strings(place):
    texts = np.zeros(96, "S1000")
    return weighted(
        place, lambda f: replace_array(f, lambda group: group.create_dataset("0", data=texts))
    )


@hostile(*KERAS)
def array_of_references(place):
    def make(group):
        made = group.create_dataset("0", (1,), h5py.ref_dtype)
        made[0] = group.ref

    return weighted(place, lambda f: replace_array(f, make))


@hostile(*KERAS)
def array_of_records(place):
    records = np.zeros((48, 2), [("a", "f4"), ("b", "i8")])
    return weighted(
        place, lambda f: replace_array(f, lambda group: group.create_dataset("0", data=records))
    )


@hostile(*KERAS)
def array_without_a_shape(place):
    nothing = h5py.Empty("f4")
    return weighted(
        place, lambda f: replace_array(f, lambda group: group.create_dataset("0", data=nothing))
    )


@hostile(*KERAS)
def dtype_instead_of_an_array(place):
    kind = np.dtype("f4")
    return weighted(place, lambda f: replace_array(f, lambda group: group.__setitem__("0", kind)))


@hostile(*KERAS)
def missing_array(place):
    return weighted(place, lambda f: replace_array(f, lambda group: None))


@hostile(*KERAS)
def half_of_the_weights(place):
    content = parts()["model.weights.h5"]
    return archive(place, {"model.weights.h5": content[: len(content) // 2]})


@hostile(*KERAS)
def pickle_as_weights(place):
    return archive(place, {"model.weights.h5": pickle.dumps(Call(os.system, place.command))})


@hostile(*KERAS)
def npz_of_pickled_objects(place):
    content = io.BytesIO()
    np.savez(content, __root__=np.array([Call(os.system, place.command)], object))
    return archive(place, {"model.weights.h5": None, "model.weights.npz": content.getvalue()})


# Archives.


@hostile(*KERAS)
def zip_bomb_of_weights(place):
    return archive(place, {"model.weights.h5": bytes(2**28)}, compression=zipfile.ZIP_DEFLATED)


@hostile(*KERAS)
def zip_bomb_of_a_configuration(place):
    return archive(place, {"config.json": " " * 2**28}, compression=zipfile.ZIP_DEFLATED)


@hostile(*KERAS)
def zip_bomb_of_metadata(place):
    return archive(place, {"involution.json": " " * 2**26}, compression=zipfile.ZIP_LZMA)


def listed_sizes(path, name, size):
    """The archive with another size of a member in the central directory."""
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\1\2", 0, content.rindex(name.encode()))
    struct.pack_into("<II", content, at + 20, size, size)
    path.write_bytes(content)
    return path


@hostile(*KERAS)
def member_that_declares_gigabytes(place):
    return listed_sizes(archive(place), "model.weights.h5", 2**32 - 16)


@hostile(*KERAS)
def members_that_overlap(place):
    path = archive(place)
    content = path.read_bytes()
    at = content.rindex(b"PK\1\2", 0, content.rindex(b"metadata.json"))
    return listed_sizes(path, "metadata.json", at)


@hostile(*KERAS)
def two_configurations(place):
    with warnings.catch_warnings(action="ignore"):
        return archive(place, more=[("config.json", b"{}")])


@hostile(*KERAS)
def member_above_the_folder(place):
    return archive(place, more=[("../../attacker.txt", b"x")])


@hostile(*KERAS)
def member_with_an_absolute_path(place):
    return archive(place, more=[(str(place.marker), b"x")])


@hostile(*KERAS)
def member_that_is_a_link(place):
    link = zipfile.ZipInfo("assets")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return archive(place, more=[(link, str(place.secret.parent))])


@hostile(*KERAS)
def archive_without_a_configuration(place):
    return archive(place, {"config.json": None})


@hostile(*KERAS)
def tar_with_links(place):
    return tar(place, "model.keras", "w")


@hostile(*KERAS)
def pickle_as_a_model(place):
    path = place.given / "model.keras"
    path.write_bytes(pickle.dumps(Call(os.system, place.command)))
    return path


def legacy(place, name):
    """A model in Keras 2's HDF5 format, with a Lambda."""
    code = base64.b64encode(b"\xe3\x00").decode()
    layer = {"class_name": "Lambda", "config": {"name": "x", "function": [code, None, None]}}
    config = {"class_name": "Sequential", "config": {"name": "s", "layers": [layer]}}
    path = place.given / name
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps(config)
        file.attrs["keras_version"] = "2.15.0"
        file.create_group("model_weights")
    return path


@hostile(*KERAS)
def cve_2025_9905_legacy_hdf5(place):
    return legacy(place, "model.h5")


@hostile(*KERAS)
def archive_appended_to_legacy_hdf5(place):
    path = legacy(place, "model.h5")
    with zipfile.ZipFile(path, "a") as made:
        for member, content in parts().items():
            made.writestr(member, content)
    return path


@hostile(*KERAS)
def folder_that_keras_would_read(place):
    harm = {"function": function("os", "system")}
    layer = {"module": "keras.layers", "class_name": "Lambda", "config": harm}
    (place.given / "config.json").write_text(json.dumps(layer))
    (place.given / "model.weights.h5").write_bytes(parts()["model.weights.h5"])
    return place.given


@hostile(*KERAS)
def saved_model_of_tensorflow(place):
    (place.given / "variables").mkdir()
    (place.given / "saved_model.pb").write_bytes(b"\x08\x01")
    return place.given


# Folders of JSON and safetensors.

SMALL = {"input_shape": [4, 4, 3], "classes": 2, "filters": [1, 1, 1], "hidden": 1}


@functools.cache
def folder_parts() -> tuple[dict, bytes]:
    with tempfile.TemporaryDirectory() as name:
        weights.save(name, "cnn", SMALL, models.cnn(**SMALL), METADATA)
        folder = pathlib.Path(name)
        content = (folder / weights.WEIGHTS).read_bytes()
        return json.loads((folder / weights.CONFIG).read_text()), content


def folder(place, arguments=None, content=None, **changes):
    config, whole = copy.deepcopy(folder_parts())
    # Another model gets only these arguments.
    config["arguments"] = {**({} if "name" in changes else SMALL), **(arguments or {})}
    (place.given / weights.CONFIG).write_text(json.dumps({**config, **changes}))
    (place.given / weights.WEIGHTS).write_bytes(whole if content is None else content)
    return place.given


@hostile(*FOLDER)
def a_trillion_classes(place):
    return folder(place, {"classes": 10**12})


@hostile(*FOLDER)
def millions_of_filters(place):
    return folder(place, {"filters": [10**6] * 3})


@hostile(*FOLDER)
def images_of_gigabytes(place):
    return folder(place, {"input_shape": [10**5, 10**5, 3]})


@hostile(*FOLDER)
def a_billion_blocks(place):
    return folder(place, {"blocks": [1, 10**9], "widths": [16, 16]}, name="rednet_tiny")


@hostile(*FOLDER)
def huge_kernel_size(place):
    arguments = {"input_shape": [4, 4, 3], "kernel_size": 10**9 + 1}
    return folder(place, name="inn", arguments=arguments)


@hostile(*FOLDER)
def layer_as_an_argument(place):
    harm = {"module": "subprocess", "class_name": "Popen", "config": {"args": ["id"]}}
    arguments = {"input_shape": [4, 4, 3], "kernel_generator": harm}
    return folder(place, name="inn", arguments=arguments)


@hostile(*FOLDER)
def lookup_as_an_argument(place):
    config = {"vocabulary": str(place.secret)}
    harm = {"module": "keras.layers", "class_name": "StringLookup", "config": config}
    arguments = {"input_shape": [4, 4, 3], "kernel_generator": {**harm, "registered_name": None}}
    return folder(place, name="inn", arguments=arguments)


@hostile(*FOLDER)
def model_of_a_python_file(place):
    (place.given / "attacker.py").write_text(f"open({str(place.marker)!r}, 'w')\n")
    return folder(place, name=f"{place.given}/attacker.py:model")


@hostile(*FOLDER)
def deeply_nested_arguments(place):
    path = folder(place)
    (path / weights.CONFIG).write_text('{"arguments": ' + "[" * 10**5)
    return path


@hostile(*FOLDER)
def settings_of_megabytes(place):
    return folder(place, extra={"x": ["y"] * 10**6})


def tensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@hostile(*FOLDER)
def header_of_exabytes(place):
    return folder(place, content=struct.pack("<Q", 2**63 - 1) + b"{}")


@hostile(*FOLDER)
def header_of_gigabytes(place):
    return folder(place, content=struct.pack("<Q", GIGABYTES) + b"{}")


@hostile(*FOLDER)
def tensor_of_gigabytes(place):
    entry = {"dtype": "F32", "shape": [2**31], "data_offsets": [0, GIGABYTES]}
    return folder(place, content=tensors({"conv2d/kernel": entry}, bytes(24)))


@hostile(*FOLDER)
def tensor_whose_shape_overflows(place):
    entry = {"dtype": "F32", "shape": [2**33, 2**33], "data_offsets": [0, 24]}
    return folder(place, content=tensors({"conv2d/kernel": entry}, bytes(24)))


@hostile(*FOLDER)
def tensors_that_overlap(place):
    entry = {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}
    header = {f"conv2d_{number}/kernel": entry for number in range(1000)}
    return folder(place, content=tensors(header, bytes(24)))


@hostile(*FOLDER)
def thousands_of_empty_tensors(place):
    entry = {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [0, 0]}
    return folder(place, content=tensors({str(number): entry for number in range(10_000)}))


@hostile(*FOLDER)
def deeply_nested_header(place):
    return folder(place, content=tensors(b'{"a":' + b"[" * 10**6))


@hostile(*FOLDER)
def pickle_as_tensors(place):
    return folder(place, content=pickle.dumps(Call(os.system, place.command)))


# Checkpoints for conversion.


@hostile("convert")
def pickled_command_in_a_torch_archive(place):
    path = place.given / "x.pth"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("archive/data.pkl", pickle.dumps(Call(os.system, place.command), 2))
        made.writestr("archive/data/0", bytes(24))
    return path


@hostile("convert")
def pickled_command_in_a_legacy_torch_file(place):
    path = place.given / "x.pth"
    start = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
    path.write_bytes(start + pickle.dumps(Call(os.system, place.command), 2))
    return path


@hostile("convert")
def zip_bomb_as_a_torch_archive(place):
    path = place.given / "x.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("archive/data.pkl", bytes(2**28))
    return path


@hostile("convert")
def torch_archive_with_a_path_above(place):
    path = place.given / "x.pth"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("../../data.pkl", pickle.dumps({}, 2))
    return path


@hostile("convert")
def pickled_command_in_a_paddle_file(place):
    path = place.given / "x.pdparams"
    path.write_bytes(pickle.dumps({"a": Call(os.system, place.command)}, 4))
    return path


def paddle(name):
    def make(place):
        path = place.given / "x.pdparams"
        path.write_bytes(test_checkpoint_readers.PADDLE[name]())
        return path

    FILES[f"paddle_{name.replace(' ', '_')}"] = make, ("convert",)


for _name in ("shape", "item size", "objects", "bytes", "text", "memo", "key of tuples"):
    paddle(_name)


def bundle(place, size):
    shutil.copytree(paths.FILES / "hosted", place.given, dirs_exist_ok=True)
    shape = b"\x12\x06\x08" + b"\x80\x80\x80\x80\x28"
    index = test_checkpoint_readers.crafted_index([(1, 1), (2, shape), (5, size)])
    (place.given / "variables/variables.index").write_bytes(index)
    return place.given


@hostile("convert", "hub")
def bundle_whose_shape_takes_gigabytes(place):
    return bundle(place, 24)


@hostile("convert", "hub")
def bundle_whose_bytes_take_gigabytes(place):
    return bundle(place, GIGABYTES)


# Data.


def tar(place, name, mode):
    path = place.given / name
    with tarfile.open(path, mode) as made:
        for member, kind, target in (
            ("../../attacker.txt", tarfile.REGTYPE, ""),
            ("data_batch_1", tarfile.SYMTYPE, str(place.secret)),
            ("data_batch_2", tarfile.LNKTYPE, str(place.secret)),
            (str(place.marker), tarfile.REGTYPE, ""),
        ):
            entry = tarfile.TarInfo(member)
            entry.type, entry.linkname = kind, target
            made.addfile(entry, io.BytesIO())
    return path


@hostile("data")
def archive_with_links_and_paths_above(place):
    return tar(place, "cifar-10-python.tar.gz", "w:gz")


@hostile("data")
def archive_of_pickled_commands(place):
    path = place.given / "cifar-10-python.tar.gz"
    content = pickle.dumps(Call(os.system, place.command))
    with tarfile.open(path, "w:gz") as made:
        for name in ("data_batch_1", "test_batch"):
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            made.addfile(entry, io.BytesIO(content))
    return path


def image(name):
    def make(place):
        for split in ("train", "test"):
            for name_ in ("a", "b"):
                write_image(place.given / split / name_ / "1.png")
        content = hostile_images.invalid()[name]
        (place.given / "train" / "a" / "2.png").write_bytes(content)
        return place.given

    FILES[f"image_{name.rpartition('.')[0].replace(' ', '_')}"] = make, ("data", "image")


for _name in (
    "claims 100000 by 100000.png",
    "claims 2**31 - 1 wide.png",
    "bomb of 64 million black pixels.png",
    "a bomb of text.png",
    "svg.png",
    "pickle.png",
    "ghostscript.jpg",
):
    image(_name)


# Runs to resume.


def checkpoint(place, content, digest=None):
    digest = digest or hashlib.sha256(content).hexdigest()
    path = place.given / "checkpoints" / f"{1:012d}-{digest}.safetensors"
    path.parent.mkdir()
    path.write_bytes(content)
    return place.given


@hostile("resume")
def pickle_as_a_checkpoint(place):
    return checkpoint(place, pickle.dumps(Call(os.system, place.command)))


@hostile("resume")
def checkpoint_of_gigabytes(place):
    entry = {"dtype": "F32", "shape": [2**31], "data_offsets": [0, GIGABYTES]}
    return checkpoint(place, tensors({"a": entry}, bytes(24)))


@hostile("resume")
def deeply_nested_checkpoint(place):
    return checkpoint(place, tensors({"__metadata__": {"state": "[" * 10**5}}))


@hostile("resume")
def checkpoint_without_state(place):
    return checkpoint(place, tensors({"__metadata__": {"state": "[]"}}))
