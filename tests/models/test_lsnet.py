"""LSNet against an independent PyTorch network, through the converter."""

import keras
import numpy as np
import pytest

import involution
from involution import models
from involution.models import convert, lsnet_checkpoint, weights
from involution.models.checkpoint_readers import CheckpointError
from involution.models.lsnet import VARIANTS
from tests.support.backends import BACKEND, numpy, slow_except
from tests.support.keras_io_formula import relative_error

NAMES = {"lsnet_t": models.LSNetT, "lsnet_s": models.LSNetS, "lsnet_b": models.LSNetB}
EACH = ["lsnet_t", *(pytest.param(n, marks=pytest.mark.slow) for n in ("lsnet_s", "lsnet_b"))]
# JAX compiles each operation of a model that runs eagerly.
eager_on_jax = slow_except("tensorflow", "torch")
BOUNDS = {"float32": 1e-4, "float64": 1e-9}


def checkpoint(network, folder, dtype="float32", **changes):
    import torch

    state = {
        k: v.to(getattr(torch, dtype)) if v.is_floating_point() else v
        for k, v in network.state_dict().items()
    }
    state.update(changes)
    path = folder / "lsnet.pth"
    torch.save({"model": {k: v for k, v in state.items() if v is not None}}, path)
    return path


@pytest.mark.long
@eager_on_jax
@pytest.mark.parametrize("policy", BOUNDS, indirect=True)
@pytest.mark.parametrize("name", EACH)
def test_converted_logits_match_the_independent_network(policy, name, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch computes the expected outputs")
    from tests.support import lsnet_torch

    distilled = name != "lsnet_b"
    network = lsnet_torch.network(name, distilled=distilled)
    path = checkpoint(network, tmp_path, policy)
    conversion = convert.convert(path, tmp_path / "out")
    images = np.random.default_rng(1).random((2, 224, 224, 3))
    with torch.no_grad():
        want = network(torch.from_numpy(np.moveaxis(images, -1, 1))).numpy()
    got = numpy(weights.load(tmp_path / "out")(images.astype(policy)))
    error = relative_error(got, want)
    print(f"{BACKEND}, {policy}, {name}: {error:.1e}, {conversion.max_relative_error:.1e}")
    assert error <= BOUNDS[policy]
    assert conversion.max_relative_error <= BOUNDS[policy]
    assert (conversion.name, conversion.reload_error) == (name, 0)
    assert conversion.arguments["distilled"] == distilled
    assert all(n.endswith(("tracked", "idxs")) for n in conversion.unused)


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_has_a_tensor(name):
    torch = pytest.importorskip("torch", reason="PyTorch has the names")
    from tests.support import lsnet_torch

    with torch.device("meta"):
        state = lsnet_torch.LSNet(name, distilled=True).state_dict()
    maps = lsnet_checkpoint.weight_maps(VARIANTS[name], ["head", "head_dist"])
    assert {n for n in state if not n.endswith(lsnet_checkpoint.UNUSED)} == set(maps)
    if name == "lsnet_t":
        model = models.LSNetT(classes=7, distilled=True)
        assert {target for target, _ in maps.values()} == set(weights.named_weights(model))


@pytest.mark.long
@pytest.mark.any_backend
def test_missing_and_unknown_tensors_are_named(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch writes the checkpoint")
    from tests.support import lsnet_torch

    network = lsnet_torch.network("lsnet_t")
    for change, name in (
        ({"blocks2.3.mixer.lkp.cv4.bias": None}, "blocks2.3.mixer.lkp.cv4.bias"),
        ({"blocks2.9.mixer.conv.c.weight": torch.ones(1)}, "blocks2.9.mixer.conv.c.weight"),
        ({"patch_embed.4.c.weight": torch.ones(5, 3, 3, 3)}, "width of an LSNet, 64, 96, 128"),
        ({"head.l.bias": torch.ones(6)}, "head.l.weight"),
    ):
        path = checkpoint(network, tmp_path, **change)
        with pytest.raises(CheckpointError, match=name):
            convert.convert(path, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.any_backend
def test_a_checkpoint_without_a_classifier_becomes_a_map(tmp_path):
    pytest.importorskip("torch", reason="PyTorch writes the checkpoint")
    from tests.support import lsnet_torch

    network = lsnet_torch.network("lsnet_t")
    heads = {name: None for name in network.state_dict() if name.startswith("head")}
    convert.convert(checkpoint(network, tmp_path, **heads), tmp_path / "out")
    assert weights.load(tmp_path / "out").output_shape == (None, None, None, 384)


# --- Size


@pytest.mark.parametrize(
    ("name", "millions", "billions"),
    [
        ("lsnet_t", (11.41, 11.4), 0.316),
        pytest.param("lsnet_s", (16.15, 16.1), 0.538, marks=pytest.mark.slow),
        pytest.param("lsnet_b", (23.31, 23.2), 1.245, marks=pytest.mark.slow),
    ],
)
def test_parameters_and_multiply_adds(name, millions, billions):
    model = NAMES[name]((224, 224, 3))
    trainable, folded = millions
    count = sum(int(np.prod(v.shape)) for v in model.trainable_weights) / 1e6
    assert count == pytest.approx(trainable, abs=0.005)
    # The paper counts networks for inference: normalization is part of the convolutions, except
    # after involutions, and the two depthwise convolutions are one.
    normalized = sum(
        int(layer.gamma.shape[0])
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    )
    assert count - normalized / 1e6 == pytest.approx(folded, abs=0.06)
    macs = models.count_multiply_adds(model) / 1e9
    assert macs == pytest.approx(billions, abs=0.001)


# --- Arguments


def small(**options):
    """A network whose branches all contribute: gammas of new ones are zero."""
    model = models.LSNetT(options.pop("input_shape", (65, 97, 3)), classes=5, **options)
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if weight.path.endswith(("gamma", "beta", "biases")):
            weight.assign(rng.uniform(0.3, 0.7, tuple(weight.shape)))
    return model


def images(batch=2, sizes=(65, 97), seed=0):
    return np.random.default_rng(seed).random((batch, *sizes, 3)).astype("float32")


@pytest.mark.long
@eager_on_jax
def test_feature_maps_of_odd_sizes():
    maps = small(feature_maps=True)(images())
    shapes = {stage: tuple(map_.shape) for stage, map_ in maps.items()}
    assert shapes == {
        "stage1": (2, 9, 13, 64),
        "stage2": (2, 5, 7, 128),
        "stage3": (2, 3, 4, 256),
        "stage4": (2, 2, 2, 384),
    }
    assert small(include_top=False).output_shape == (None, 2, 2, 384)


@pytest.mark.long
@eager_on_jax
def test_data_formats_and_open_sizes_agree():
    model = small(distilled=True)
    want = numpy(model(images()))
    for options in (
        {"input_shape": (None, None, 3)},
        {
            "input_shape": (3, 65, 97),
            "data_format": "channels_first",
        },
    ):
        other = models.LSNetT(classes=5, distilled=True, **options)
        other.set_weights(model.get_weights())
        x = images()
        x = np.moveaxis(x, -1, 1) if "data_format" in options else x
        assert relative_error(numpy(other(x)), want) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_shape": (64, 64)}, r"`input_shape` must be"),
        ({"classes": 0}, r"`classes` must be a positive integer"),
        ({"distilled": 1}, r"`distilled` must be True or False"),
    ],
)
def test_wrong_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.LSNetT(**arguments)


@pytest.mark.long
@eager_on_jax
def test_saved_and_loaded(tmp_path):
    model = small()
    x = images()
    want = numpy(model(x))
    model.save(tmp_path / "lsnet.keras")
    loaded = keras.models.load_model(tmp_path / "lsnet.keras")
    assert np.array_equal(numpy(loaded(x)), want)
    arguments = {"input_shape": (65, 97, 3), "classes": 5}
    weights.save(tmp_path / "folder", "lsnet_t", arguments, model)
    assert np.array_equal(numpy(weights.load(tmp_path / "folder")(x)), want)


@pytest.mark.slow
def test_exported(tmp_path):
    from involution.export import export

    for operator in ("portable", "native"):
        assert export(small(), tmp_path / "lsnet.onnx", operator=operator).error < 1e-5


@pytest.mark.slow
def test_bfloat16():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = models.LSNetT((65, 97, 3), classes=5)
    finally:
        keras.config.set_dtype_policy("float32")
    reference = models.LSNetT((65, 97, 3), classes=5)
    reference.set_weights(model.get_weights())
    got, want = (numpy(keras.ops.cast(m(images()), "float32")) for m in (model, reference))
    assert relative_error(got, want) < 0.1


# --- Attention


def test_attention_biases_are_interpolated():
    layer = involution.layers.OffsetAttention(2, 4)
    x = [np.zeros((1, 7, 4, 8), "float32")] * 3
    layer(x)
    table = np.random.default_rng(0).random((2, 4, 4)).astype("float32")
    layer.biases.assign(table.reshape(2, 16))
    bias = numpy(layer._bias(7, 4)).reshape(2, 7, 4, 7, 4)
    # Six steps of the map are three of the table.
    assert bias[0, 0, 1, 6, 3] == pytest.approx(table[0, 3, 2], abs=1e-6)
    assert bias[1, 2, 3, 5, 0] == pytest.approx((table[1, 1, 3] + table[1, 2, 3]) / 2, abs=1e-6)
    assert np.allclose(bias, bias.transpose(0, 3, 4, 1, 2))
    assert numpy(layer._bias(1, 1)).ravel() == pytest.approx(table[:, 0, 0])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 4, 4, 6)] * 3, "`heads` must divide the channels"),
        ([(1, 4, 4, 8), (1, 4, 4, 8), (1, 4, 3, 8)], "must be maps of equal sizes"),
    ],
)
def test_attention_refuses_wrong_maps(shapes, message):
    with pytest.raises(ValueError, match=message):
        involution.layers.OffsetAttention(4, 4)([np.zeros(shape, "float32") for shape in shapes])
