"""Abstract builds, and their limits on layers and variables."""

import contextlib
import json
import sys
import threading
import tracemalloc

import keras
import numpy as np
import pytest

import involution
from involution.saving import classifier
from involution.utils import memory
from involution.utils.abstract_build import EXTRA_ELEMENTS, MAX_LAYERS, build_abstract
from involution.utils.errors import InputError
from tests.support import hostile_configs
from tests.support.backends import numpy
from tests.support.syscall_watch import memory_bytes

pytestmark = pytest.mark.any_backend

L = keras.layers
MAX_GROWTH = 64 * 2**20


def message(function, *arguments):
    with pytest.raises(ValueError, match=r"\d") as caught:
        build_abstract(function, *arguments)
    return str(caught.value)


def dense(units):
    L.Dense(units).build((None, 1000))


def test_unused_variables_are_counted():
    stored = 10**6
    max_units = (2 * stored + EXTRA_ELEMENTS) // 1001
    build_abstract(lambda: dense(max_units), stored)
    assert message(lambda: dense(max_units + 1), stored).endswith("of which 1,000,000 are stored")
    # The limit applies to the sum over all layers, of every class.
    assert "of which 0 are" in message(lambda: [dense(1000) for _ in range(9)], 0)
    assert "of which 0 are" in message(lambda: L.Embedding(10**6, 10).build(), 0)
    # Variables are unlimited without `stored` and after the build.
    build_abstract(lambda: dense(10**9))
    assert keras.Variable.__init__.__name__ == keras.Operation.__init__.__name__ == "__init__"
    dense(10)


@pytest.mark.long
def test_unused_layers_are_counted():
    build_abstract(lambda: [L.ReLU() for _ in range(MAX_LAYERS)])
    text = message(lambda: [L.ReLU() for _ in range(MAX_LAYERS + 1)])
    assert text == f"more than {MAX_LAYERS:,} layers"


@pytest.mark.long
def test_counts_are_per_thread():
    def nested_and_threaded():
        # A nested abstract build has its own counts.
        build_abstract(lambda: dense(5000))
        thread = threading.Thread(target=lambda: [L.ReLU() for _ in range(MAX_LAYERS + 1)])
        thread.start()
        thread.join()
        dense(10)
        return "built"

    assert build_abstract(nested_and_threaded, 0) == "built"


def test_operations_are_not_computed():
    def build():
        return keras.ops.zeros((10**6, 10**6)).shape

    assert tuple(build_abstract(build)) == (10**6, 10**6)


@pytest.mark.parametrize("generator", [None, "PairwiseAttention"])
def test_large_kernel_sizes_allocate_no_memory_before_use(generator):
    if generator is not None:
        generator = getattr(involution.kernel_generators, generator)()
    tracemalloc.start()
    try:
        layer = involution.Involution2D(2001, kernel_generator=generator, padding="symmetric")
        shape = layer.compute_output_shape((None, 9, 8, 16))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert shape == (None, 9, 8, 16)
    assert peak < 2**22


def test_invalid_groups_of_many_channels_raise_immediately():
    with pytest.raises(ValueError, match="one of 1, 2, 4, 5"):
        involution.Involution2D(3, groups=3).build((None, 8, 8, 10**15))


# Layers that create variables in unusual ways, or none. Slow tests cover the other layers.
UNUSUAL_LAYERS = [
    "Dense",
    "EinsumDense",
    "Embedding",
    "Bidirectional",
    "StackedRNNCells",
    "MultiHeadAttention",
    "UpSampling2D",
    "Involution2D",
    "pairwise",
]


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] * (n not in UNUSUAL_LAYERS))
        for n in hostile_configs.NAMES
    ],
)
def test_memory_is_bounded_for_any_number_in_a_configuration(name, tmp_path):
    parts = hostile_configs.parts(hostile_configs.valid_model(name), tmp_path)
    classifier.load_model(tmp_path / "valid.keras")
    config = json.loads(parts["config.json"])
    configs = list(hostile_configs.with_one_huge_integer(config, ("config", "build_config")))
    assert len(configs) > 2 or name not in UNUSUAL_LAYERS
    for position, changed in configs:
        path = hostile_configs.write(tmp_path / "x.keras", parts, changed)
        memory.malloc_trim()
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the peak
        before = memory_bytes()
        with contextlib.suppress(InputError):
            classifier.load_model(path)
        assert memory_bytes("VmHWM") - before < MAX_GROWTH, position


def lora():
    model = keras.Sequential([keras.Input((6,)), L.Dense(5), L.Dense(2)])
    model.layers[0].enable_lora(3)
    return model


def cells():
    states = [keras.Input((n,)) for n in (4, 4)]
    inputs = keras.Input((3,))
    return keras.Model([inputs, *states], L.LSTMCell(4)(inputs, states)[0])


def shared():
    inputs = [keras.Input((4,)), keras.Input((4,))]
    layer = L.Dense(3, kernel_initializer="orthogonal")
    return keras.Model(inputs, 1 - layer(inputs[0]) * 2.0 + layer(inputs[1])[:, :1])


def nested():
    inner = keras.Sequential([keras.Input((6, 5, 3)), L.Conv2D(4, 3), L.SpatialDropout2D(0.1)])
    inputs = keras.Input((6, 5, 3))
    twice = keras.Model(inputs, L.Concatenate()([inner(inputs), inner(inputs)]))
    outer = keras.Input((6, 5, 3))
    return keras.Model(outer, L.TimeDistributed(L.Dense(2))(twice(outer)))


def recurrent():
    stack = L.RNN(L.StackedRNNCells([L.GRUCell(3), L.SimpleRNNCell(2)]), return_sequences=True)
    return keras.Sequential([keras.Input((5, 3)), stack, L.Bidirectional(L.LSTM(2))])


@pytest.mark.parametrize("make_model", [lora, cells, shared, nested, recurrent])
def test_ordinary_models_are_loaded(make_model, tmp_path):
    model = make_model()
    model.save(tmp_path / "x.keras")
    loaded = classifier.load_model(tmp_path / "x.keras")
    random = np.random.default_rng(0)
    x = [random.random((2, *each.shape[1:]), "float32") for each in model.inputs]
    x = x if len(x) > 1 else x[0]
    got, want = (numpy(network(x, training=False)) for network in (loaded, model))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
