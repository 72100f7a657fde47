"""RedNet: the numbers of the paper, and every network of the family on every backend."""

import functools

import keras
import numpy as np
import pytest

import involution
from involution import models
from involution.models.rednet import VARIANTS
from tests.support.backends import numpy
from tests.support.keras_io_formula import relative_error

pytestmark = pytest.mark.any_backend

NAMES = ("rednet_tiny", *VARIANTS)
BUILDERS = {name: models.MODELS[name] for name in NAMES}
# Millions of parameters, and GFLOPs, from the paper.
PAPER = {
    "rednet26": (9.23, 1.73),
    "rednet38": (12.39, 2.22),
    "rednet50": (15.54, 2.71),
    "rednet101": (25.65, 4.74),
    "rednet152": (33.99, 6.79),
}
# Channels of the feature maps, by stage.
CHANNELS = dict.fromkeys(PAPER, (256, 512, 1024, 2048)) | {"rednet_tiny": (64, 64)}
# XLA compiles the larger networks slowly: they run in `make test-long` only.
every = pytest.mark.parametrize(
    "name",
    [n if n == "rednet_tiny" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES],
)


def images(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, "float32")


def set_moderate_weights(model, seed=1):
    """Sets random weights that keep the outputs in a moderate range."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        shape = tuple(weight.shape)
        if weight.path.endswith("variance"):
            weight.assign(rng.uniform(0.5, 2, shape))
        elif weight.path.endswith(("gamma", "moving_mean", "beta", "bias")):
            values = rng.normal(1 if weight.path.endswith("gamma") else 0, 0.2, shape)
            # Involutions are quadratic: without batch statistics, many blocks overflow.
            small = weight.path.endswith(("_1_bn/gamma", "_3_bn/gamma"))
            weight.assign(values * (0.2 if small else 1))
    return model


# --- Numbers of the paper ------------------------------------------------------------------------


@functools.cache
def network(name):
    """The paper's network, cached: tests must not change it."""
    return BUILDERS[name]()


def trainable(model):
    return sum(int(np.prod(w.shape)) for w in model.trainable_weights)


@pytest.mark.parametrize("name", PAPER)
def test_parameter_counts_match_the_paper(name):
    # The paper's counts are those with the 7x7 stem: 33.985 million for RedNet-152, not 33.984.
    assert round((trainable(network(name)) + 720) / 1e6, 2) == PAPER[name][0]


@pytest.mark.long
@pytest.mark.parametrize("name", PAPER)
def test_multiply_adds_match_the_paper_except_uncounted_layers(name):
    # The paper does not define its count. Ours omits biases, normalization, activations and
    # pooling, some 2 % of these networks.
    ours = models.count_multiply_adds(network(name), (224, 224, 3)) / 1e9
    assert 0.97 * PAPER[name][1] < ours < PAPER[name][1]


def test_multiply_adds_of_known_layers():
    inputs = keras.Input((None, None, 6))
    x = keras.layers.Conv2D(8, 3, strides=2, padding="same")(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.DepthwiseConv2D(3, padding="same")(x)
    x = involution.Involution2D(5, strides=2, groups=2, reduction_ratio=2, filters=3)(x)
    x = involution.Involution(3, 1, 3, 1, 1)(x)[0]
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, keras.layers.Dense(10)(x))
    # 17 x 13 gives 9 x 7 and then 5 x 4 positions.
    convolutions = 63 * (9 * 6 * 8 + 9 * 8)
    layer = 20 * (8 * 4 + 4 * 50 + 25 * 8 + 8 * 3)
    drop_in = 20 * (3 * 3 + 3 * 9 + 9 * 3)
    assert models.count_multiply_adds(model, (17, 13, 6)) == (
        convolutions + layer + drop_in + 3 * 10
    )
    without = models.count_multiply_adds(model, (17, 13, 6), involutions=False)
    assert without == convolutions + layer + drop_in + 30 - 20 * (25 * 8 + 9 * 3)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(
    ("generator", "each"),
    [
        ("static", 0),
        # Query and key of 4 x 4, and a product of 4 numbers for each tap.
        ("pairwise_attention", 4 * 4 + 4 * 4 + 9 * 4),
        ("linear", 4 * 18),
    ],
)
def test_multiply_adds_of_generators(generator, each, data_format):
    layer = involution.Involution2D(
        3, groups=2, kernel_generator=generator, data_format=data_format
    )
    shape = (5, 6, 4) if data_format == "channels_last" else (4, 5, 6)
    model = keras.Sequential([keras.Input(shape), layer])
    assert models.count_multiply_adds(model) == 30 * (each + 9 * 4)


def test_unknown_multiply_adds_raise():
    with pytest.raises(ValueError, match=r"whose input shape has None.*input_shape=None"):
        models.count_multiply_adds(models.rednet_tiny())
    model = keras.Sequential([keras.Input((8, 4)), keras.layers.LSTM(3, name="memory")])
    with pytest.raises(ValueError, match="Received: memory, a LSTM"):
        models.count_multiply_adds(model)


@keras.saving.register_keras_serializable(package="tests")
class OwnHidden(involution.kernel_generators.Linear):
    def hidden(self, features):
        return keras.ops.concatenate([features, features], axis=-1)


@keras.saving.register_keras_serializable(package="tests")
class OwnCall(keras.layers.Conv2D):
    def call(self, inputs):
        return super().call(super().call(inputs))


@keras.saving.register_keras_serializable(package="tests")
class OwnKernels(involution.Involution2D):
    def generate_kernel(self, inputs):
        return -super().generate_kernel(inputs)


@pytest.mark.parametrize(
    ("layer", "received"),
    [
        (OwnCall(6, 3, padding="same", name="conv"), "conv, a OwnCall"),
        (OwnKernels(3, name="inv"), "inv, a OwnKernels that does"),
        (
            involution.Involution2D(3, groups=2, kernel_generator=OwnHidden(name="gen")),
            "gen, a OwnHidden",
        ),
    ],
)
def test_multiply_adds_of_overridden_computation_raise(layer, received):
    with pytest.raises(ValueError, match="Received: " + received):
        models.count_multiply_adds(keras.Sequential([keras.Input((5, 4, 6)), layer]))


def test_multiply_adds_of_a_model_as_generator():
    """Each layer is counted at its own positions: the second has a quarter of the first's."""
    generator = keras.Sequential(
        [keras.layers.Conv2D(4, 3, padding="same"), keras.layers.Conv2D(18, 1, strides=2)]
    )
    layer = involution.Involution2D(3, strides=2, groups=2, kernel_generator=generator)
    model = keras.Sequential([keras.Input((6, 8, 6)), layer])
    expected = 48 * 9 * 6 * 4 + 12 * (4 * 18 + 9 * 6)
    assert models.count_multiply_adds(model) == expected


def test_multiply_adds_of_generators_with_work_at_each_input_position():
    inputs = keras.Input((8, 8, 16))
    strided = involution.Involution2D(3, strides=2, groups=2, kernel_generator="pairwise_attention")
    queries, keys, products = 16 * 16 * 16, 64 * 16 * 16, 16 * 9 * 16
    model = keras.Model(inputs, strided(inputs))
    assert models.count_multiply_adds(model) == queries + keys + 2 * products
    assert models.count_multiply_adds(model, involutions=False) == queries + keys + products
    # A factor that does not divide the multiply-adds.
    model = keras.Model(inputs, involution.InvolutionUpSampling2D(3)(inputs))
    expected = 64 * (16 * 64 + 9 * 64 * 25 * 9) + 24 * 24 * 25 * 16
    assert models.count_multiply_adds(model) == expected


@keras.saving.register_keras_serializable(package="tests")
class OwnCount(involution.kernel_generators.PairwiseAttention):
    def count_multiply_adds(self):
        return 7


def test_a_generator_that_counts_everything_at_its_outputs():
    inputs = keras.Input((5, 4, 6))
    layer = involution.Involution2D(3, kernel_generator=OwnCount())
    model = keras.Model(inputs, layer(inputs))
    assert models.count_multiply_adds(model, involutions=False) == 7 * 5 * 4


def test_multiply_adds_of_a_layer_that_is_called_by_keyword():
    inputs = keras.Input((8, 8, 16))
    model = keras.Model(inputs, keras.layers.Conv2D(4, 3)(inputs=inputs))
    assert models.count_multiply_adds(model) == 36 * 9 * 16 * 4


@pytest.mark.parametrize("pack", [list, lambda tensors: {"image": tensors[0]}])
def test_multiply_adds_of_a_model_whose_input_is_in_a_structure(pack):
    image = keras.Input((5, 4, 6), name="image")
    model = keras.Model(pack([image]), keras.layers.Conv2D(3, 1)(image))
    assert models.count_multiply_adds(model) == 5 * 4 * 6 * 3


def test_multiply_adds_with_lora_are_those_of_the_kernel():
    layer = keras.layers.Dense(5)
    model = keras.Sequential([keras.Input((7,)), layer])
    layer.enable_lora(2)
    assert models.count_multiply_adds(model) == 35


# --- Strides -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAPER)
def test_layers_with_stride_2(name):
    model = network(name)
    strided = {
        layer.name for layer in model.layers if getattr(layer, "strides", (1, 1)) in ((2, 2), 2)
    }
    first = [f"stage{stage}_block1_" for stage in (2, 3, 4)]
    assert strided == {
        "stem_1_conv",
        "stem_pool",
        *(f"{block}2_involution" for block in first),
        *(f"{block}shortcut_conv" for block in first),
    }
    paddings = {
        layer.padding for layer in model.layers if isinstance(layer, involution.Involution2D)
    }
    assert paddings == {"symmetric"}


def test_stem_kernel_sizes():
    both = {3: network("rednet26"), 7: models.RedNet26(stem_kernel_size=7)}
    for size, model in both.items():
        layer = model.get_layer("stem_2_involution")
        assert (layer.kernel_size, layer.groups) == ((size, size), 2)
    assert trainable(both[7]) == trainable(both[3]) + 720


def test_blocks_are_initialized_as_their_shortcut():
    model = models.rednet_tiny((16, 16, 3))
    block = keras.Model(
        model.input,
        [model.get_layer(f"stage2_block1_{part}").output for part in ("shortcut_bn", "add")],
    )
    shortcut, added = (numpy(t) for t in block(images(2, 16, 16, 3)))
    np.testing.assert_array_equal(shortcut, added)


# --- Every network -------------------------------------------------------------------------------


def halved(n, times):
    for _ in range(times):
        n = -(-n // 2)
    return n


@pytest.mark.long
@every
def test_feature_maps_at_any_size(name):
    model = BUILDERS[name](feature_maps=True)
    first = 1 if name == "rednet_tiny" else 2
    last = BUILDERS[name](include_top=False)
    last.set_weights(model.get_weights())
    for height, width in ((64, 32), (45, 37)):
        x = images(1, height, width, 3)
        maps = model.predict(x, verbose=0)
        assert list(maps) == [f"stage{i + 1}" for i in range(len(CHANNELS[name]))]
        for i, (map_, channels) in enumerate(zip(maps.values(), CHANNELS[name], strict=True)):
            sizes = (halved(height, first + i), halved(width, first + i))
            assert map_.shape == (1, *sizes, channels)
        np.testing.assert_array_equal(last.predict(x, verbose=0), map_)


@pytest.mark.long
@every
def test_channels_first_matches_channels_last(name):
    last = set_moderate_weights(BUILDERS[name](classes=7))
    first = BUILDERS[name](classes=7, data_format="channels_first")
    assert first.input.shape == (None, 3, None, None)
    first.set_weights(last.get_weights())
    x = images(2, 33, 40, 3)
    want = last.predict(x, verbose=0)
    got = first.predict(np.moveaxis(x, -1, 1), verbose=0)
    assert got.shape == (2, 7)
    assert relative_error(got, want) < 1e-4
    maps = BUILDERS[name](feature_maps=True, data_format="channels_first")
    headless = BUILDERS[name](include_top=False, data_format="channels_first")
    for model in (maps, headless):
        model.set_weights(last.get_weights()[:-2])
    stages = maps.predict(np.moveaxis(x, -1, 1), verbose=0)
    assert [m.shape[1] for m in stages.values()] == list(CHANNELS[name])
    *_, final = stages.values()
    assert relative_error(headless.predict(np.moveaxis(x, -1, 1), verbose=0), final) < 1e-6
    matrix, bias = last.get_layer("logits").get_weights()
    assert relative_error(final.mean((2, 3)) @ matrix + bias, want) < 1e-4


@pytest.mark.long
@every
def test_a_training_step_changes_every_parameter(name):
    keras.utils.set_random_seed(0)
    model = set_moderate_weights(BUILDERS[name](classes=5))
    before = [numpy(w).copy() for w in model.trainable_weights]
    model.compile(
        keras.optimizers.SGD(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    loss = model.train_on_batch(images(4, 47, 64, 3), np.arange(4))
    assert np.isfinite(numpy(loss)).all()
    for weight, old in zip(model.trainable_weights, before, strict=True):
        new = numpy(weight)
        assert np.isfinite(new).all(), weight.path
        assert (new != old).any(), weight.path


@pytest.mark.long
@every
def test_round_trip_predicts_the_same_at_two_sizes(name, tmp_path):
    model = set_moderate_weights(BUILDERS[name](classes=5))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    again = BUILDERS[name](classes=5)
    again.load_weights(tmp_path / "model.weights.h5")
    for size in ((32, 48), (33, 41)):
        x = images(2, *size, 3)
        want = model.predict(x, verbose=0)
        assert np.ptp(want) > 0
        for other in (loaded, again):
            np.testing.assert_array_equal(other.predict(x, verbose=0), want)


def test_dtype_policy():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = models.rednet_tiny()
    finally:
        keras.config.set_dtype_policy(policy)
    assert model.get_layer("stage1_block1_2_involution").compute_dtype == "bfloat16"
    assert model.get_layer("logits").variable_dtype == "float32"
    assert np.isfinite(model.predict(images(1, 17, 16, 3), verbose=0)).all()


@pytest.mark.parametrize(
    ("arguments", "received"),
    [
        ({"input_shape": (32, 32)}, r"input_shape=\(32, 32\)"),
        ({"input_shape": (32, 32, None)}, r"input_shape=\(32, 32, None\)"),
        ({"input_shape": (0, 32, 3)}, r"input_shape=\(0, 32, 3\)"),
        ({"classes": 0}, "classes=0"),
        ({"stem_kernel_size": 0}, "stem_kernel_size=0"),
        ({"include_top": "no"}, "include_top='no'"),
        ({"feature_maps": 1}, "feature_maps=1"),
        ({"data_format": "NHWC"}, "data_format='NHWC'"),
    ],
)
def test_invalid_arguments(arguments, received):
    with pytest.raises(ValueError, match="Received: " + received):
        models.RedNet26(**arguments)


@pytest.mark.long
def test_rednet_tiny_options():
    generator = involution.kernel_generators.Linear()
    model = models.rednet_tiny(
        (20, 17, 3),
        classes=4,
        blocks=(1, 2),
        widths=(6, 8),
        expansion=3,
        stem_width=5,
        stem_pool=False,
        kernel_size=5,
        group_channels=2,
        reduction_ratio=2,
        kernel_generator=generator,
    )
    found = [layer for layer in model.layers if isinstance(layer, involution.Involution2D)]
    assert [(f.kernel_size, f.groups, f.strides) for f in found] == [
        ((5, 5), 3, (1, 1)),
        ((5, 5), 4, (2, 2)),
        ((5, 5), 4, (1, 1)),
    ]
    generators = [f.kernel_generator for f in found]
    assert {type(g) for g in generators} == {type(generator)}
    assert len({*map(id, generators), id(generator)}) == 4
    assert model.get_layer("stem_conv").filters == 5
    assert model.get_layer("stage2_block2_add").output.shape == (None, 10, 9, 24)
    assert (
        models.rednet_tiny(blocks=2, widths=16).get_layer("stage1_block2_add").output.shape[-1]
        == 32
    )
    assert models.rednet_tiny((20, 17, 3)).get_layer("stem_pool").output.shape[1:3] == (10, 9)
    static = models.rednet_tiny((8, 8, 3), kernel_generator="static")
    assert trainable(static) < trainable(models.rednet_tiny((8, 8, 3)))


@pytest.mark.parametrize(
    ("arguments", "received"),
    [
        ({"blocks": (1, 2), "widths": (8,)}, r"blocks=\(1, 2\), widths=\(8,\)"),
        ({"blocks": (), "widths": ()}, r"blocks=\(\), widths=\(\)"),
        ({"blocks": (1, 0, 1)}, r"blocks=\(1, 0, 1\)"),
        ({"widths": (8, 8.5, 8)}, r"widths=\(8, 8.5, 8\)"),
        ({"kernel_size": 4}, "kernel_size=4"),
        ({"expansion": 0}, "expansion=0"),
        ({"stem_width": -1}, "stem_width=-1"),
        ({"stem_pool": 2}, "stem_pool=2"),
        ({"kernel_generator": "magic"}, "kernel_generator='magic'"),
    ],
)
def test_invalid_arguments_of_rednet_tiny(arguments, received):
    with pytest.raises(ValueError, match="Received: " + received):
        models.rednet_tiny((16, 16, 3), **arguments)


def test_multiply_adds_count_every_call_of_a_layer():
    layers = keras.layers
    inputs = keras.Input((8, 8, 4))
    shared = layers.Conv2D(4, 3, padding="same")
    small = shared(layers.MaxPooling2D()(shared(inputs)))
    inv = involution.Involution2D(3, groups=2, kernel_generator=layers.Dense(18))
    model = keras.Model(inputs, inv(inv(small)))
    each = 4 * 18 + 9 * 4
    assert models.count_multiply_adds(model) == (64 + 16) * 9 * 16 + 2 * 16 * each
