"""The contract of Keras layers: weight paths, configurations, stateless calls and input shapes."""

import gc
import json

import keras
import numpy as np
import pytest

from involution import Involution, Involution1D, Involution2D, Involution3D
from involution.kernel_generators.attachment import clone
from involution.kernel_generators.attention import PairwiseAttention
from involution.kernel_generators.convolutional import Bottleneck, Linear
from involution.kernel_generators.pointwise import PointwiseConv1D, PointwiseConv2D, PointwiseConv3D
from involution.kernel_generators.registry import GENERATORS
from involution.kernel_generators.static import Static
from involution.models.registry import MODELS
from tests.support.backends import numpy
from tests.support.keras_io_formula import randomize

BACKEND = keras.backend.backend()


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def two_convolutions(channels=9):
    layers = keras.layers
    return keras.Sequential([layers.Conv2D(4, 1, activation="relu"), layers.Conv2D(channels, 1)])


@keras.saving.register_keras_serializable(package="involution_tests")
class Sized(keras.layers.Layer):
    """A custom generator that inherits its sizes; its ``call`` has no ``training`` argument."""

    def __init__(self, kernel_size=None, groups=None, **kwargs):
        super().__init__(**kwargs)
        self.kernel_size, self.groups = kernel_size, groups

    def build(self, input_shape):
        self.normalization = keras.layers.BatchNormalization(name="normalization")
        self.normalization.build(input_shape)
        taps = int(np.prod(self.kernel_size))
        self.scale = self.add_weight((input_shape[-1], taps * self.groups), name="scale")

    def call(self, features):
        return keras.ops.matmul(self.normalization(features), self.scale)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], int(np.prod(self.kernel_size)) * self.groups)

    def get_config(self):
        return {
            **super().get_config(),
            "kernel_size": self.kernel_size,
            "groups": self.groups,
        }


# --- Weight paths --------------------------------------------------------------------------------

FACTORIES = {
    **{name: lambda name=name: name for name in GENERATORS},
    "Bottleneck": lambda: Bottleneck(2),
    "Sequential": two_convolutions,
    "user's": Sized,
}


def network(generator):
    """A model with both kinds of involution layers and random weights."""
    inputs = keras.Input((5, 6, 8))
    x = Involution(4, 2, return_kernel=False, name="drop_in")(inputs)
    x = Involution2D(3, kernel_generator=generator(), kernel_dropout=0.5, filters=8, name="a")(x)
    outputs = Involution2D(3, strides=2, name="b")(x)
    model = keras.Model(inputs, outputs, name="network")
    randomize(model)
    return model


@pytest.mark.any_backend
@pytest.mark.parametrize("name", ["bottleneck", "Bottleneck", "Sequential", "user's"])
def test_equal_models_have_equal_paths_and_exchange_state_trees(name):
    generator = FACTORIES[name]
    old = network(generator)
    keras.layers.Conv2D(3, 1)  # advances Keras's name counters
    Linear()
    new = network(generator)
    old.compile("sgd")
    new.compile("sgd")
    paths = [v.path for v in old.variables]
    assert paths == [v.path for v in new.variables]
    assert len(set(paths)) == len(paths)
    for variable in new.weights:
        variable.assign(np.zeros(variable.shape, "float32"))
    new.set_state_tree(old.get_state_tree(value_format="numpy_array"))
    for want, got in zip(old.variables, new.variables, strict=True):
        np.testing.assert_array_equal(numpy(got.value), numpy(want.value))


@pytest.mark.any_backend
@pytest.mark.skipif(BACKEND != "torch", reason="requires PyTorch's state_dict")
@pytest.mark.parametrize("name", ["Sequential", "user's"])
def test_state_dict_loads_into_an_equal_model(name):
    old, new = network(FACTORIES[name]), network(FACTORIES[name])
    stored = {key: value.clone() for key, value in old.state_dict().items()}
    for variable in new.weights:
        variable.assign(np.zeros(variable.shape, "float32"))
    new.load_state_dict(stored, strict=True)
    for want, got in zip(old.weights, new.weights, strict=True):
        np.testing.assert_array_equal(numpy(got.value), numpy(want.value))


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("cnn", {}),
        ("cnn", {"head": "convolutional"}),
        ("inn", {}),
        ("inn", {"kernel_generator": "linear", "head": "convolutional"}),
        ("rednet_tiny", {"kernel_generator": "contextual"}),
        ("rednet_tiny", {"kernel_generator": Static()}),
        ("rednet26", {}),
    ],
)
def test_registered_models_have_reproducible_paths(name, arguments):
    # Only names are compared, so the variables need no values.
    with keras.StatelessScope(initialize_variables=False):
        first, second = (MODELS[name](**arguments) for _ in range(2))
    paths = [v.path for v in first.variables]
    assert paths == [v.path for v in second.variables]
    assert len(set(paths)) == len(paths)
    assert [layer.name for layer in first.layers[1:]] == [layer.name for layer in second.layers[1:]]


@pytest.mark.any_backend
def test_explicit_names_in_a_generator_are_kept():
    generator = keras.Sequential(
        [keras.layers.Conv2D(4, 1), keras.layers.Conv2D(9, 1, name="last"), keras.layers.ReLU()],
        name="mine",
    )
    layer = Involution2D(3, kernel_generator=generator, name="a")
    layer.build((None, 5, 6, 8))
    names = ["conv2d/kernel", "conv2d/bias", "last/kernel", "last/bias"]
    assert [w.path for w in layer.weights] == [f"a/mine/{name}" for name in names]


@pytest.mark.any_backend
def test_automatic_names_in_a_generator_are_unique():
    built = keras.layers.Conv2D(4, 1, name="conv2d")
    built.build((None, None, None, 8))
    generator = keras.Sequential([built, keras.layers.Conv2D(9, 1)])
    layer = Involution2D(3, kernel_generator=generator, name="a")
    layer.build((None, 5, 6, 8))
    assert [part.name for part in generator.layers] == ["conv2d", "conv2d_1"]


@pytest.mark.long
@pytest.mark.parametrize("name", ["linear", "Sequential", "user's"])
def test_loading_preserves_paths(name, tmp_path):
    model = network(FACTORIES[name])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [w.path for w in loaded.weights] == [w.path for w in model.weights]
    for want, got in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(numpy(got.value), numpy(want.value))


# --- Configurations ------------------------------------------------------------------------------


def legacy_config(layer):
    """A configuration as earlier releases wrote it: with inherited values and Keras's names."""
    generator = keras.saving.serialize_keras_object(layer.kernel_generator)
    generator.pop("build_config", None)
    for name in ("kernel_size", "groups", "strides", "padding", "dilation_rate", "data_format"):
        if name in generator["config"]:
            generator["config"][name] = getattr(layer, name)
    generator["config"]["name"] += "_7"
    return {**layer.get_config(), "groups": layer.groups, "kernel_generator": generator}


@pytest.mark.any_backend
@pytest.mark.parametrize("generator", [*GENERATORS, "user's"])
def test_legacy_configurations_load(generator):
    layer = Involution2D(
        3, strides=1, padding="valid", kernel_generator=FACTORIES[generator](), group_channels=4
    )
    x = random(2, 5, 7, 8)
    layer(x)
    randomize(layer)
    old = json.loads(json.dumps(legacy_config(layer)))
    loaded = Involution2D.from_config(old)
    loaded(x)
    loaded.set_weights(layer.get_weights())
    np.testing.assert_allclose(numpy(loaded(x)), numpy(layer(x)), rtol=1e-6, atol=1e-6)
    assert loaded.groups == 2


@pytest.mark.any_backend
@pytest.mark.parametrize("generator", FACTORIES.values(), ids=FACTORIES)
def test_build_does_not_change_the_config(generator):
    layer = Involution2D(
        3,
        strides=1,
        padding="valid",
        dilation_rate=(1, 2),
        kernel_generator=generator(),
        group_channels=4,
    )
    before = json.dumps(layer.get_config())
    layer(random(2, 7, 9, 4))
    assert json.dumps(layer.get_config()) == before
    assert layer.groups == 1
    assert layer.get_config()["groups"] is None


@pytest.mark.any_backend
@pytest.mark.parametrize("name", GENERATORS)
def test_build_does_not_change_the_config_of_a_standalone_generator(name):
    generator = GENERATORS[name](kernel_size=3, groups=2)
    before = generator.get_config()
    assert before["kernel_size"] == 3
    shape = generator.compute_output_shape((2, 5, 6, 8))
    assert generator.get_config() == before
    y = generator(random(2, 5, 6, 8))
    assert tuple(y.shape) == tuple(shape) == tuple(generator.compute_output_shape((2, 5, 6, 8)))
    assert generator.get_config() == before
    assert (generator.kernel_size, generator.strides) == ((3, 3), (1, 1))


@pytest.mark.any_backend
@pytest.mark.parametrize("generator", [*GENERATORS, "Bottleneck", "user's"])
def test_clone_model_accepts_other_channels(generator):
    model = keras.Sequential(
        [keras.Input((6, 5, 16)), Involution2D(3, kernel_generator=FACTORIES[generator]())]
    )
    clone = keras.models.clone_model(model, input_tensors=keras.Input((6, 5, 48)))
    assert clone.output_shape == (None, 6, 5, 48)
    assert (model.layers[0].groups, clone.layers[0].groups) == (1, 3)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("change", "hidden_channels", "kernel_shape"),
    [
        ({"reduction_ratio": 2}, 8, (2, 5, 6, 9, 1)),
        ({"kernel_size": 5}, 4, (2, 5, 6, 25, 1)),
        ({"strides": 2}, 4, (2, 3, 3, 9, 1)),
        ({"groups": 4}, 4, (2, 5, 6, 9, 4)),
        ({"dtype": "float16"}, 4, (2, 5, 6, 9, 1)),
    ],
)
def test_edited_config_takes_effect(change, hidden_channels, kernel_shape):
    layer = Involution2D(3, return_kernel=True)
    layer.build((None, 5, 6, 16))
    edited = Involution2D.from_config({**layer.get_config(), **change})
    _, kernel = edited(random(2, 5, 6, 16))
    assert tuple(kernel.shape) == kernel_shape
    assert edited.kernel_generator.reduce.filters == hidden_channels
    assert edited.kernel_generator.dtype_policy == edited.dtype_policy


@pytest.mark.any_backend
def test_config_keeps_changes_to_a_named_generator():
    layer = Involution2D(3)
    layer.kernel_generator.trainable = False
    copy = Involution2D.from_config(layer.get_config())
    assert not copy.kernel_generator.trainable
    assert copy.trainable


@pytest.mark.any_backend
def test_failed_build_leaves_inherited_arguments_unset():
    layer = Involution2D(3, group_channels=2, reduction_ratio=5)
    with pytest.raises(ValueError, match="reduction_ratio=5, channels=4"):
        layer.build((None, 5, 6, 4))
    layer(random(1, 5, 6, 8))
    assert layer.groups == layer.kernel_generator.groups == 4


# --- Shared generators ---------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.any_backend
@pytest.mark.parametrize("generator", [two_convolutions, lambda: Bottleneck(2), Sized])
def test_f27_generators_with_weights_cannot_be_shared(generator):
    shared = generator()
    first = Involution2D(3, kernel_generator=shared, name="first")
    second = Involution2D(3, kernel_generator=shared, name="second")
    x = random(1, 5, 6, 8)
    first(x)
    with pytest.raises(ValueError, match=r"only one layer\. Received: .* belongs to layer first"):
        second(x)
    # The first layer still works, and copies of the generator are independent.
    first(first(x))
    Involution2D.from_config(first.get_config())(x)
    Involution2D(3, kernel_generator=clone(shared))(x)
    # A generator whose layer was deleted can be used again.
    del first
    gc.collect()
    second(x)


@pytest.mark.long
@pytest.mark.any_backend
def test_f27_sublayers_with_weights_cannot_be_shared():
    shared = keras.layers.Conv2D(4, 1)
    first, second = (
        Involution2D(3, kernel_generator=keras.Sequential([shared, keras.layers.Conv2D(9, 1)]))
        for _ in range(2)
    )
    first(random(1, 5, 6, 8))
    with pytest.raises(ValueError, match=f"{shared.name}, which belongs to layer {first.name}"):
        second(random(1, 5, 6, 8))


class Ones(keras.layers.Layer):
    """A generator without weights."""

    groups = None

    def call(self, features):
        return keras.ops.ones((*keras.ops.shape(features)[:-1], 9 * self.groups))

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], 9 * self.groups)


@pytest.mark.any_backend
def test_generators_without_weights_can_be_shared():
    ones = keras.layers.AveragePooling2D(1)
    x = random(1, 5, 6, 9)
    for _ in range(2):
        Involution2D(3, groups=1, kernel_generator=ones)(x)


@pytest.mark.any_backend
def test_sharing_a_generator_requires_equal_groups():
    ones = Ones()
    first, second = (Involution2D(3, groups=g, kernel_generator=ones) for g in (1, 2))
    first(random(1, 5, 6, 8))
    with pytest.raises(ValueError, match=r"equal `groups`.*groups=1, in layer .* groups=2"):
        second(random(1, 5, 6, 8))


# --- Training ------------------------------------------------------------------------------------

TRAINING_LAYERS = {
    "drop-in": lambda: Involution(return_kernel=False),
    "fused": lambda: Involution2D(3),
    "dropout": lambda: Involution2D(3, kernel_dropout=0.5),
    "user's": lambda: Involution2D(3, kernel_generator=Sized()),
    "Sequential": lambda: Involution2D(
        3,
        kernel_generator=keras.Sequential([keras.layers.BatchNormalization(), Linear(3, groups=1)]),
    ),
    "generator": lambda: Bottleneck(2, kernel_size=3, groups=1),
}


@pytest.mark.long
@pytest.mark.parametrize("make", TRAINING_LAYERS.values(), ids=TRAINING_LAYERS)
def test_stateless_call_supports_training(make):
    x = random(3, 5, 6, 8) + 1
    layer = make()
    layer(x)
    randomize(layer)
    trainable = [v.value for v in layer.trainable_variables]
    others = [numpy(v.value).copy() for v in layer.non_trainable_variables]

    def call(x, training):
        state = [keras.ops.convert_to_tensor(v) for v in others]
        return layer.stateless_call(trainable, state, x, training=training)

    outputs, state = call(x, True)
    inference_outputs, inference_state = call(x, False)
    for before, after, unchanged in zip(others, state, inference_state, strict=True):
        # On PyTorch, Keras's dropout uses PyTorch's generator and does not update its own seed.
        if BACKEND != "torch" or np.issubdtype(before.dtype, np.floating):
            assert not np.array_equal(numpy(after), before)
        np.testing.assert_array_equal(numpy(unchanged), before)
    assert not np.allclose(numpy(outputs), numpy(inference_outputs))
    # The calls changed neither the layer nor the state of Keras.
    for variable, before in zip(layer.non_trainable_variables, others, strict=True):
        np.testing.assert_array_equal(numpy(variable.value), before)
    np.testing.assert_allclose(numpy(layer(x)), numpy(inference_outputs), rtol=1e-5, atol=1e-5)
    if BACKEND == "jax":
        import jax

        _, compiled = jax.jit(call, static_argnums=1)(x, True)
        for a, b in zip(state, compiled, strict=True):
            np.testing.assert_allclose(numpy(a), numpy(b), rtol=1e-5, atol=1e-6)
    # A stateful call updates the variables to the same values.
    layer(x, training=True)
    for variable, after in zip(layer.non_trainable_variables, state, strict=True):
        np.testing.assert_allclose(numpy(variable.value), numpy(after), rtol=1e-5, atol=1e-6)


class Wrapping(keras.layers.Layer):
    """Calls ``call`` of the inner layer directly, as some of Keras's wrappers do."""

    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def build(self, input_shape):
        self.inner.build(input_shape)

    def call(self, x, training=None):
        return self.inner.call(x, training=training)


@pytest.mark.long
def test_training_argument_reaches_a_wrapped_layer():
    x = random(2, 5, 6, 8) + 1
    inner = Involution2D(3)
    wrapped = Wrapping(inner)
    wrapped(x)
    mean = inner.kernel_generator.normalization.moving_mean
    before = numpy(mean.value).copy()
    trainable = [v.value for v in wrapped.trainable_variables]
    others = [v.value for v in wrapped.non_trainable_variables]
    _, state = wrapped.stateless_call(trainable, others, x, training=True)
    assert not np.array_equal(numpy(state[0]), before)
    wrapped(x, training=False)
    np.testing.assert_array_equal(numpy(mean.value), before)
    wrapped(x, training=True)
    assert not np.array_equal(numpy(mean.value), before)


class WithoutTraining(Involution2D):
    """A subclass whose ``call`` has no ``training`` argument."""

    def call(self, inputs):
        return super().call(inputs)


class WrappingWithoutTraining(Wrapping):
    def call(self, x):
        return self.inner.call(x)


class DropoutAfter(keras.Model):
    """A layer, and then dropout, without passing ``training`` to either."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.dropout = keras.layers.Dropout(0.5)

    def call(self, x):
        return self.layer(x), self.dropout(keras.ops.ones((1, 100)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: WithoutTraining(3),
        lambda: WrappingWithoutTraining(Involution2D(3)),
        lambda: WrappingWithoutTraining(Involution(return_kernel=False)),
        lambda: WrappingWithoutTraining(Bottleneck(2, kernel_size=3, groups=1)),
    ],
    ids=["subclass", "wrapper", "drop-in", "generator"],
)
def test_training_of_the_model_reaches_calls_without_the_argument(make):
    x = random(2, 5, 6, 8) + 1
    model = DropoutAfter(make())
    model(x)
    (mean,) = (v for v in model.non_trainable_variables if v.name == "moving_mean")
    for training in (None, False, True):
        before = numpy(mean.value).copy()
        _, dropped = model(x, training=training)
        assert np.array_equal(numpy(mean.value), before) == (not training)
        # Keras passes ``training`` from a layer to those that follow.
        assert (numpy(dropped) == 0).any() == bool(training)


# --- Shapes --------------------------------------------------------------------------------------

LAYERS = {
    "Involution": (2, lambda: Involution()),
    "Involution1D": (1, lambda: Involution1D(3)),
    "Involution2D": (2, lambda: Involution2D(3)),
    "Involution3D": (3, lambda: Involution3D(3)),
    "channels_first": (2, lambda: Involution2D(3, data_format="channels_first")),
    "Linear": (2, lambda: Linear((3, 3), groups=1)),
    "PairwiseAttention": (1, lambda: PairwiseAttention(kernel_size=(3,), groups=1)),
    "Static": (3, lambda: Static((3, 3, 3), groups=1)),
    "PointwiseConv1D": (1, lambda: PointwiseConv1D(4, 1)),
    "PointwiseConv2D": (2, lambda: PointwiseConv2D(4, 1)),
    "PointwiseConv3D": (3, lambda: PointwiseConv3D(4, 1)),
}


@pytest.mark.any_backend
@pytest.mark.parametrize(("rank", "make"), LAYERS.values(), ids=LAYERS)
def test_wrong_number_of_axes_raises(rank, make):
    built = make()
    built.build((2, *[8] * (rank + 1)))
    for axes in (rank + 1, rank + 3):
        shape = (8,) * axes
        match = f"expected ndim={rank + 2}, found ndim={axes}"
        for function in (
            make().build,
            make().compute_output_shape,
            built.compute_output_shape,
            lambda shape: make().compute_output_spec(keras.KerasTensor(shape)),
        ):
            with pytest.raises(ValueError, match=match) as error:
                function(shape)
            assert "\n" not in str(error.value).strip()
            assert f"input_shape={shape}" in str(error.value)
        for layer in (built, make()):
            with pytest.raises(ValueError, match=f"found ndim={axes}"):
                layer(random(*shape))


@pytest.mark.any_backend
@pytest.mark.parametrize("shape", [(8, 8), (2, 3, 4, 5, 6, 7)])
def test_generators_require_one_to_three_spatial_axes(shape):
    with pytest.raises(ValueError, match=rf"expected ndim=3, 4 or 5, found ndim={len(shape)}"):
        Linear(3, groups=1).build(shape)
