"""Conversion of public checkpoints, against a PyTorch network and the keras.io model."""

import pickle
import shutil

import keras
import numpy as np
import pytest

from involution import models
from involution.models import checkpoint_readers, convert, weights
from involution.models.checkpoint_readers import CheckpointError
from tests.support.backends import BACKEND, numpy
from tests.support.keras_io_formula import relative_error
from tests.support.paths import FILES

torch = pytest.importorskip("torch", reason="PyTorch computes the expected outputs")
from tests.support import rednet_torch  # noqa: E402 - needs PyTorch

pytestmark = pytest.mark.any_backend

DEPTHS = (26, 38, 50, 101, 152)
BOUNDS = {"float32": 1e-4, "float64": 1e-9}
# Sizes that no stride divides.
IMAGES = np.random.default_rng(1).random((2, 65, 47, 3))


every_policy = pytest.mark.parametrize("policy", BOUNDS, indirect=True)


@pytest.fixture(scope="module")
def network():
    return rednet_torch.network(26)


@pytest.fixture
def state(network):
    """The state dict of the network in float32, which a test may change."""
    return {k: v.float() if v.is_floating_point() else v for k, v in network.state_dict().items()}


def saved(state, kind, folder):
    path = folder / f"checkpoint.{kind}"
    if kind == "pdparams":
        path.write_bytes(pickle.dumps(rednet_torch.paddle_names(state), protocol=4))
    else:
        torch.save({"meta": {"epoch": 130}, "state_dict": state}, path)
    return path


def outputs(folder, images, dtype="float32"):
    return keras.tree.map_structure(numpy, weights.load(folder)(images.astype(dtype)))


def rejection(source, folder):
    """The message with which a checkpoint is rejected; nothing is written."""
    with pytest.raises(CheckpointError) as caught:
        convert.convert(source, folder / "out")
    assert "\n" not in str(caught.value)
    assert "Received: " in str(caught.value)
    assert not (folder / "out").exists()
    return str(caught.value)


@pytest.mark.long
@every_policy
@pytest.mark.parametrize("kind", ["pth", "pdparams"])
def test_f26_converted_logits_match_the_independent_network(policy, kind, network, tmp_path):
    typed = {k: v.to(getattr(torch, policy)) for k, v in network.state_dict().items()}
    conversion = convert.convert(saved(typed, kind, tmp_path), tmp_path / "out")
    error = relative_error(
        outputs(tmp_path / "out", IMAGES, policy), rednet_torch.logits(network, IMAGES)
    )
    print(f"{BACKEND}, {policy}, {kind}: {error:.1e}, {conversion.max_relative_error:.1e}")
    assert error <= BOUNDS[policy]
    assert conversion.max_relative_error <= BOUNDS[policy]
    assert conversion.reload_error == 0
    assert (conversion.name, conversion.arguments["classes"]) == ("rednet26", 5)
    assert len(conversion.unused) == (40 if kind == "pth" else 0)
    assert f"{conversion.parameters:,} parameters" in conversion.lines[0]
    assert weights.read_config(tmp_path / "out")["extra"]["source"]["file"] == f"checkpoint.{kind}"


@pytest.mark.slow
@every_policy
@pytest.mark.parametrize("depth", DEPTHS)
def test_f26_logits_of_all_depths_match_the_independent_network(policy, depth, tmp_path):
    network = rednet_torch.network(depth, classes=1000, seed=depth)
    typed = {k: v.to(getattr(torch, policy)) for k, v in network.state_dict().items()}
    want = rednet_torch.logits(network, IMAGES)
    for kind in "pth", "pdparams":
        conversion = convert.convert(saved(typed, kind, tmp_path), tmp_path / kind)
        error = relative_error(outputs(tmp_path / kind, IMAGES, policy), want)
        print(f"{BACKEND}, {policy}, rednet{depth}, {kind}: {error:.1e}")
        assert conversion.name == f"rednet{depth}"
        assert error <= BOUNDS[policy]


# Tensors of an official checkpoint: 25 for the stem and each block, 6 for each of four shortcuts,
# 2 for the classifier; and how many of them count batches, one for each normalization.
COUNTS = {26: (251, 40), 38: (351, 56), 50: (451, 72), 101: (876, 140), 152: (1301, 208)}


@pytest.mark.parametrize("depth", DEPTHS)
def test_tensor_names_match_the_independent_network(depth):
    with torch.device("meta"):
        state = rednet_torch.Classifier(depth, 10).state_dict()
    counters = [name for name in state if name.endswith("num_batches_tracked")]
    assert (len(state), len(counters)) == COUNTS[depth]
    plain = convert.strip_prefixes(state)
    blocks = rednet_torch.BLOCKS[depth]
    expected = convert.rednet_weight_maps(checkpoint_readers.PYTORCH, blocks)
    assert {name for name in plain.values() if name} == set(expected)
    assert [name for name, short in plain.items() if short is None] == counters
    without = convert.rednet_weight_maps(checkpoint_readers.PYTORCH, blocks, top=False)
    assert set(expected) - set(without) == {"fc.weight", "fc.bias"}
    renamed = {n.replace("running_mean", "_mean") for n in expected}
    renamed = {n.replace("running_var", "_variance") for n in renamed}
    assert set(convert.rednet_weight_maps(checkpoint_readers.PADDLE, blocks)) == renamed


@pytest.fixture(scope="module")
def rednet26():
    """Tests must not change it."""
    return models.RedNet26()


@pytest.mark.parametrize("depth", DEPTHS)
def test_blocks_are_those_of_the_independent_network(depth):
    assert models.rednet.VARIANTS[f"rednet{depth}"].blocks == rednet_torch.BLOCKS[depth]


def test_every_weight_of_the_model_has_a_tensor(rednet26):
    weight_maps = convert.rednet_weight_maps("PyTorch", rednet_torch.BLOCKS[26])
    targets = [target for target, _ in weight_maps.values()]
    assert len(set(targets)) == len(targets)
    assert set(targets) == set(weights.named_weights(rednet26))


def test_f26_epsilon_and_momentum_match_the_independent_network(rednet26):
    """No output depends on the momentum; PyTorch's is 1 minus Keras's."""
    with torch.device("meta"):
        parts = rednet_torch.Classifier(26, 5).modules()
    theirs = [(m.eps, 1 - m.momentum) for m in parts if isinstance(m, torch.nn.BatchNorm2d)]
    layers = [getattr(p, "kernel_generator", p) for p in rednet26.layers]
    layers = [getattr(p, "normalization", p) for p in layers]
    ours = [p for p in layers if isinstance(p, keras.layers.BatchNormalization)]
    assert [(p.epsilon, p.momentum) for p in ours] == theirs


def test_layers_with_stride_2(rednet26):
    strided = {
        layer.name for layer in rednet26.layers if 2 in np.ravel(getattr(layer, "strides", 1))
    }
    assert strided == {
        "stem_1_conv",
        "stem_pool",
        "stage2_block1_2_involution",
        "stage2_block1_shortcut_conv",
        "stage3_block1_2_involution",
        "stage3_block1_shortcut_conv",
        "stage4_block1_2_involution",
        "stage4_block1_shortcut_conv",
    }


@pytest.mark.long
def test_detector_becomes_feature_maps(tmp_path):
    """The stem's kernel size is 7, other parts are unused, and names have the prefix module."""
    network = rednet_torch.network(26, stem_size=7, seed=2)
    state = {k: v for k, v in network.float().state_dict().items() if "head" not in k}
    others = ["neck.lateral_convs.0.conv.weight", "rpn_head.rpn_cls.bias", "roi_head.bbox.fc.bias"]
    others += ["decode_head.conv_seg.weight", "auxiliary_head.convs.0.bn.weight"]
    state.update({name: torch.ones(2) for name in others})
    path = saved({f"module.{name}": tensor for name, tensor in state.items()}, "pth", tmp_path)
    conversion = convert.convert(path, tmp_path / "out")
    assert conversion.arguments == {
        "input_shape": (None, None, 3),
        "stem_kernel_size": 7,
        "include_top": False,
        "feature_maps": True,
    }
    unused = [name for name in conversion.unused if not name.endswith("tracked")]
    assert unused == [f"module.{name}" for name in others]
    with torch.no_grad():
        want = network.backbone(torch.tensor(np.moveaxis(IMAGES, -1, 1), dtype=torch.float32))
    got = outputs(tmp_path / "out", IMAGES)
    assert list(got) == ["stage1", "stage2", "stage3", "stage4"]
    for y, expected in zip(got.values(), want, strict=True):
        assert relative_error(np.moveaxis(y, -1, 1), expected.double().numpy()) <= 1e-4


@pytest.mark.long
@pytest.mark.parametrize("mistake", ["group order", "classifier", "epsilon"])
def test_f03_f26_verification_finds_errors_that_shapes_do_not_show(
    mistake, state, tmp_path, monkeypatch
):
    if mistake == "group order":
        monkeypatch.setattr(convert, "tap_major", lambda taps: lambda array: array)
    elif mistake == "classifier":
        # As many classes as channels: the matrix fits with and without a transpose.
        state["head.fc.weight"] = torch.randn(2048, 2048)
        state["head.fc.bias"] = torch.randn(2048)
        monkeypatch.setattr(convert, "TRANSPOSE", convert.IDENTITY)
    else:
        for name in state:
            if name.endswith("running_var"):
                state[name] = state[name] * 1e-3

        def wrong(**arguments):
            model = models.RedNet26(**arguments)
            for layer in model.layers:
                if isinstance(layer, keras.layers.BatchNormalization):
                    layer.epsilon = 1e-3
            return model

        monkeypatch.setitem(models.MODELS, "rednet26", wrong)
    assert "must match those of the checkpoint" in rejection(
        saved(state, "pth", tmp_path), tmp_path
    )


@pytest.mark.long
def test_missing_unknown_and_misshapen_tensors_are_named(state, tmp_path):
    def message(changes):
        changed = {k: v for k, v in (state | changes).items() if v is not None}
        return rejection(saved(changed, "pth", tmp_path), tmp_path)

    names = {f"backbone.layer1.0.{n}": None for n in ("bn2.weight", "conv2.conv2.conv.bias")}
    text = message({**names, "backbone.extra.weight": torch.ones(1), "ema": torch.ones(1)})
    assert "2 missing: layer1.0.conv2.conv2.conv.bias, layer1.0.bn2.weight" in text
    assert "2 unknown: extra.weight, ema" in text
    text = message({"backbone.layer1.0.conv1.weight": torch.ones(64, 65, 1, 1)})
    assert "layer1.0.conv1.weight (64, 65, 1, 1) instead of (64, 64, 1, 1)" in text
    text = message({"head.fc.weight": torch.ones(5, 3)})
    assert "fc.weight (5, 3) instead of (5, 2048)" in text
    text = message({"head.fc.bias": torch.ones(10**6)})
    assert "fc.weight (5, 2048) instead of (1000000, 2048)" in text
    assert "2 * K * K rows" in message({"backbone.stem.1.conv2.conv.weight": torch.ones(17, 8)})
    assert "under two prefixes" in message({"layer1.0.bn2.weight": torch.ones(64)})
    many = {name: None for name in state if "layer1" in name and not name.endswith("0.bn1.weight")}
    assert "25 missing: " in message(many)
    assert " and 5 more" in message(many)
    without = {name: None for name in state if "layer4" in name}
    assert "of a RedNet, in numbers" in message(without)
    assert "(1, 2, 4, 0)" in message(without)


@pytest.mark.long
def test_weights_that_are_not_finite_are_named(state, tmp_path):
    name = "backbone.layer1.0.bn1.running_mean"
    for value in (np.nan, np.inf):
        state[name][3] = value
        assert "in 1: layer1.0.bn1.running_mean" in rejection(
            saved(state, "pth", tmp_path), tmp_path
        )
    state[name] = torch.ones(64, dtype=torch.int64)
    assert "finite floating-point" in rejection(saved(state, "pth", tmp_path), tmp_path)
    state[name] = torch.ones(64)
    state["backbone.layer1.0.bn1.running_var"] = -torch.ones(64)
    assert "maximum relative error of inf" in rejection(saved(state, "pth", tmp_path), tmp_path)


def test_preconditions_are_checked_first(tmp_path):
    source = FILES / "hosted"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CheckpointError, match="new or empty"):
        convert.convert(source, tmp_path / "full")
    assert "begins with" in rejection(__file__, tmp_path)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        assert "dtype policy" in rejection(source, tmp_path)
    finally:
        keras.config.set_dtype_policy("float32")


def test_hosted_model_gives_the_kernels_computed_by_keras_2(tmp_path):
    images, *want = np.load(FILES / "hosted.npz").values()
    conversion = convert.convert(FILES / "hosted", tmp_path / "out")
    assert (conversion.name, conversion.arguments["head"]) == ("inn", "kernels")
    got = keras.tree.flatten(outputs(tmp_path / "out", images))
    for y, expected in zip(got, want, strict=True):
        assert y.shape == expected.shape
        assert relative_error(y, expected) <= 1e-5
    assert conversion.max_relative_error <= 1e-5
    assert conversion.reload_error == 0


def test_hosted_model_with_object_graph_names(tmp_path, monkeypatch):
    """As tf.train.Checkpoint names the variables."""
    read = checkpoint_readers.read(FILES / "hosted").tensors
    renamed = {}
    for name, array in read.items():
        layer, index = divmod(int(name.split("/")[1]), 8)
        inside = convert.KERAS_IO_VARIABLES[index][0]
        path = f"layer_with_weights-{layer}/kernel_gen/{inside}/.ATTRIBUTES/VARIABLE_VALUE"
        renamed[path] = array
    both = convert._keras_io_plan(read, "source"), convert._keras_io_plan(renamed, "source")
    assert both[0].weight_maps == both[1].weight_maps
    for name, array in both[0].tensors.items():
        assert both[1].tensors[name] is array
    counted = {**renamed, "save_counter/.ATTRIBUTES/VARIABLE_VALUE": np.array(1)}
    assert convert._keras_io_plan(counted, "source").unused == tuple(counted)[-1:]
    del renamed[path]
    with pytest.raises(CheckpointError, match="1 missing: inv_2/sequential/conv2d/bias"):
        convert._keras_io_plan(
            {k: v for k, v in read.items() if not k.startswith("variables/9/")}, "source"
        )
    with pytest.raises(CheckpointError, match="1 unknown: dense/kernel"):
        convert._keras_io_plan({**read, "dense/kernel": np.ones(3)}, "source")


def test_damaged_bundle_is_rejected(tmp_path):
    shutil.copytree(FILES / "hosted", tmp_path / "hosted")
    data = tmp_path / "hosted/variables/variables.data-00000-of-00001"
    contents = bytearray(data.read_bytes())
    contents[5] ^= 1
    data.write_bytes(contents)
    assert "checksum" in rejection(tmp_path / "hosted", tmp_path)
