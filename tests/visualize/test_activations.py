import keras
import numpy as np
import pytest

from involution import (
    Involution,
    Involution1D,
    Involution2D,
    Involution3D,
    InvolutionUpSampling2D,
    models,
    visualize,
)
from involution.kernel_generators.attention import PairwiseAttention
from involution.kernel_generators.static import Static
from involution.visualize import activations
from involution.visualize.activations import capture, has_involutions, kernel_maps
from tests.support.backends import numpy

pytestmark = pytest.mark.any_backend

images = np.random.default_rng(0).random((3, 10, 13, 4), "float32")


@keras.saving.register_keras_serializable(package="tests")
class Constant(keras.layers.Layer):
    """A generator that returns given kernels, (H, W, taps * groups), for every input."""

    def __init__(self, values, **kwargs):
        super().__init__(**kwargs)
        self.values = values

    def call(self, features):
        values = keras.ops.convert_to_tensor(self.values[None], features.dtype)
        return keras.ops.repeat(values, keras.ops.shape(features)[0], axis=0)


def sparse(shape, entries):
    """Kernels that are 0 except for some entries."""
    values = np.zeros(shape, "float32")
    for index, value in entries.items():
        values[index] = value
    return values


def test_heat_maps_and_kernels_of_known_weights():
    # Two groups of nine taps, tap-major: 1 on tap 4 of group 0 at one position, 2 and 3 at another.
    values = sparse((10, 13, 18), {(2, 5, 8): 1, (7, 1, 1): 2, (7, 1, 17): 3})
    layer = Involution2D(3, groups=2, kernel_generator=Constant(values), name="i")
    maps = kernel_maps(layer, images)["i"]
    expected = np.zeros((3, 10, 13, 2))
    expected[:, 2, 5, 0], expected[:, 7, 1, 1] = 1, 5
    np.testing.assert_array_equal(maps, expected)
    record = capture(layer, images)["i"]
    kernel = record.kernel_at(1, ((7 + 0.5) / 10, (1 + 0.5) / 13))
    assert kernel.shape == (3, 3, 2)
    assert kernel[0, 0, 1] == 2
    assert kernel[2, 2, 1] == 3
    assert np.count_nonzero(kernel) == 2
    # The center of the first window is its own position, so its output equals the input there.
    np.testing.assert_array_equal(record.outputs[:, 2, 5, :2], images[:, 2, 5, :2])
    np.testing.assert_allclose(
        record.activations[:, 2, 5], np.sqrt(np.square(images[:, 2, 5, :2]).sum(-1) / 4), rtol=1e-6
    )


def test_upsampling_at_known_positions():
    values = sparse((10, 21, 9), {(4, 9, 0): 2, (5, 10, 0): -1, (0, 0, 8): 3})
    layer = keras.Sequential(
        [
            InvolutionUpSampling2D(
                (2, 3),
                kernel_size=3,
                kernel_generator=Constant(values),
                kernel_softmax=False,
                name="up",
            )
        ]
    )
    record = capture(layer, images[:1, :5, :7])["up"]
    maps = record.heat_map[0, ..., 0]
    assert maps.shape == (10, 21)
    np.testing.assert_array_equal(np.argwhere(maps), [[0, 0], [4, 9], [5, 10]])
    # The point in the middle of output (5, 10), of the window of input (2, 3).
    point = (5.5 / 10, 10.5 / 21)
    assert record.nearest_position(point) == (5, 10)
    assert record.nearest_position((0.99, 0)) == (9, 0)
    assert record.kernel_at(0, point)[0, 0, 0] == -1
    np.testing.assert_allclose(record.window_at(point), [(1 / 5, 4 / 5), (2 / 7, 5 / 7)])
    # Weights of all outputs of a window, at the input they read.
    received = record.attention_received[0, ..., 0]
    assert received.shape == (5, 7)
    np.testing.assert_array_equal(np.argwhere(received), [[1, 1], [1, 2]])
    assert received[1, 2] == 1
    assert received[1, 1] == 3


def test_attention_received_at_known_positions():
    values = sparse((5, 7, 9), {(2, 3, 0): 1, (2, 3, 5): 2, (0, 0, 0): 4, (4, 6, 3): 8})
    layer = Involution2D(3, strides=2, groups=1, kernel_generator=Constant(values), name="i")
    received = capture(layer, images)["i"].attention_received
    # "same" padding of size 10 with window 3 and stride 2 begins at 0; of size 13 at -1.
    expected = np.zeros((3, 10, 13, 1))
    expected[:, 4, 5], expected[:, 5, 7], expected[:, 9, 11] = 1, 2, 8
    np.testing.assert_array_equal(received, expected)


GEOMETRIES = [
    {"kernel_size": 3},
    {"kernel_size": (2, 5), "strides": 2},
    {"kernel_size": 3, "strides": (1, 3), "padding": "valid", "dilation_rate": 2},
    {"kernel_size": 4, "strides": 3, "padding": "symmetric"},
    {"kernel_size": 3, "padding": ((0, 1), (1, 2)), "dilation_rate": (1, 2), "strides": 2},
]


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("arguments", GEOMETRIES, ids=str)
def test_attention_received_is_the_gradient_of_the_sum(arguments, data_format):
    """The output is linear in the input for fixed kernels: for an input of ones at one position,
    its sum is the attention that this position receives."""
    layer = Involution2D(**arguments, groups=2, data_format=data_format, reduction_ratio=1)
    x = images if data_format == "channels_last" else np.moveaxis(images, -1, 1)
    (record,) = capture(layer, x).values()
    kernel = numpy(layer.generate_kernel(x))
    layer.generate_kernel = lambda inputs: keras.ops.convert_to_tensor(kernel)
    for position in [(0, 0), (4, 6), (9, 12), (3, 11)]:
        one = np.zeros_like(images)
        one[(slice(None), *position, slice(0, None, 2))] = 1  # the first channel of each group
        y = numpy(layer(one if data_format == "channels_last" else np.moveaxis(one, -1, 1)))
        y = y if data_format == "channels_last" else np.moveaxis(y, 1, -1)
        np.testing.assert_allclose(
            y[..., ::2].sum((1, 2)),
            record.attention_received[(slice(None), *position)],
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize("arguments", GEOMETRIES, ids=str)
def test_nearest_position_inverts_window_centers(arguments):
    layer = Involution2D(**arguments, groups=1, reduction_ratio=1)
    (record,) = capture(layer, images).values()
    for p in np.ndindex(record.kernels.shape[1:3]):
        point = window_center(record.window, record.sizes, p)
        if all(0 <= coordinate <= 1 for coordinate in point):
            assert record.nearest_position(point) == p
            (top, bottom), (left, right) = record.window_at(point)
            assert (top + bottom) / 2 == pytest.approx(point[0])
            assert (left + right) / 2 == pytest.approx(point[1])
    for corner in [(0, 0), (1, 1)]:
        assert record.kernel_at(0, corner).shape == (*layer.kernel_size, 1)


def window_center(g, sizes, position):
    """The midpoint of the window's first and last tap, relative to the image."""
    ends = []
    for tap in (0, g.taps - 1):
        k = np.unravel_index(tap, g.kernel_size)
        ends.append(
            [
                p * s - pad[0] + i * d
                for p, s, pad, i, d in zip(
                    position, g.strides, g.pads(sizes), k, g.dilation_rate, strict=True
                )
            ]
        )
    return [(a + b + 1) / 2 / n for a, b, n in zip(*ends, sizes, strict=True)]


def test_the_heat_map_of_attention_is_the_attention_received():
    layer = Involution2D(5, groups=2, kernel_generator=PairwiseAttention(), name="a")
    (record,) = capture(layer, images).values()
    assert record.is_attention
    np.testing.assert_array_equal(record.heat_map, record.attention_received)
    # The weights of every window sum to 1, and none lies outside the image.
    np.testing.assert_allclose(record.heat_map.sum((1, 2)), 130, rtol=1e-5)
    assert np.ptp(record.heat_map) > 0.1
    soft = Involution2D(3, groups=1, reduction_ratio=1, kernel_softmax=True)
    assert next(iter(capture(soft, images).values())).is_attention


class Block(keras.layers.Layer):
    """A layer that is not a model."""

    def __init__(self):
        super().__init__()
        self.deep = Involution2D(3, reduction_ratio=1, name="deep")

    def call(self, x):
        return self.deep(x)


class Wrapped(keras.Model):
    """A subclassed model with an involution in a block, and one that is called twice."""

    def __init__(self):
        super().__init__()
        self.block = Block()
        self.twice = Involution2D(3, reduction_ratio=1, name="twice")

    def call(self, x):
        return self.twice(self.twice(self.block(x)))


@pytest.mark.long
def test_involutions_in_nested_models_are_captured():
    found = capture(Wrapped(), images)
    assert list(found) == ["deep", "twice", "twice#2"]
    assert found["deep"].kernels.shape == (3, 10, 13, 9, 1)
    nested = keras.Sequential(
        [models.rednet_tiny((10, 13, 4), include_top=False), keras.layers.Flatten()]
    )
    maps = kernel_maps(nested, images)
    assert len(maps) == 5
    assert has_involutions(nested)
    assert maps["stage1_block1_2_involution"].shape == (3, 5, 7, 4)
    assert not has_involutions(models.cnn((32, 32, 3), 4))


class Container(keras.layers.Layer):
    """A layer with an attribute of any structure."""

    def __init__(self, content):
        super().__init__()
        self.content = content


@pytest.mark.parametrize("make", [Involution2D, Involution, Involution1D])
def test_has_involutions_in_any_structure(make):
    layer = make()
    for content in (
        layer,
        Container(layer),
        Container([keras.layers.Dense(1), (layer,)]),
        Container({"a": {"b": [layer]}}),
        keras.layers.TimeDistributed(layer),
        keras.layers.TimeDistributed(Container(keras.layers.TimeDistributed(layer))),
        keras.Sequential([keras.layers.Flatten(), Container(keras.Sequential([layer]))]),
    ):
        assert has_involutions(content)


def test_has_no_involutions():
    cycle = Container(keras.layers.Dense(1))
    cycle.back = [cycle]
    dense = keras.layers.Dense(1, name="involution")
    for content in (
        cycle,
        Container([dense, None, "text", 3]),
        keras.Sequential([dense]),
        Container({}),
    ):
        assert not has_involutions(content)


def test_dropin_layer_and_batches():
    many = np.concatenate([images] * 4)
    layer = Involution(4, 2, 5, 2, 1, "inv")
    found = capture(layer, many)["inv"]
    output, kernel = layer(many)
    np.testing.assert_allclose(found.kernels, numpy(kernel)[..., 0, :], atol=1e-5)
    np.testing.assert_allclose(found.outputs, numpy(output), atol=1e-5)
    np.testing.assert_allclose(kernel_maps(layer, many)["inv"], found.kernels.sum(-2), atol=1e-5)
    assert kernel_maps(layer, many[:0]) == capture(layer, many[:0]) == {}


@pytest.mark.parametrize("layer", [Involution1D, Involution3D])
def test_other_ranks(layer):
    x = np.ones((2, *(7, 5, 6)[: layer.rank], 4), "float32")
    static = Static(kernel_initializer="ones")
    (record,) = capture(layer(3, groups=2, kernel_generator=static), x).values()
    assert record.heat_map.shape == (*x.shape[:-1], 2)
    np.testing.assert_array_equal(record.heat_map, 3**layer.rank)
    assert record.attention_received.max() == 3**layer.rank
    assert record.attention_received.min() == 2**layer.rank
    assert record.kernel_at(0, (0.5,) * layer.rank).shape == (3,) * layer.rank + (2,)
    assert len(record.window_at((0.5,) * layer.rank)) == layer.rank


class Sharpened(PairwiseAttention):
    """Kernels that sum to 0 instead of 1."""

    def _generate(self, features):
        return super()._generate(features) - 1 / 9


def test_attention_is_detected_by_values():
    """A subclass of ``PairwiseAttention`` may generate other kernels than a softmax's."""
    ones = sparse((10, 13, 9), dict.fromkeys(np.ndindex(10, 13, 9), 1 / 9))
    for generator, is_attention in (
        (Sharpened(), False),
        (Constant(ones), True),
        (Constant(2 * ones), False),
    ):
        layer = Involution2D(3, groups=1, kernel_generator=generator, name="i")
        assert capture(layer, images)["i"].is_attention == is_attention
    assert capture(Involution2D(3, kernel_softmax=True, name="i"), images)["i"].is_attention


def test_renamed_attributes_and_arguments():
    record = capture(Involution2D(3, groups=1, reduction_ratio=1, name="i"), images)["i"]
    with pytest.warns(DeprecationWarning, match=r"InvolutionRecord.maps is now InvolutionRecord\."):
        np.testing.assert_array_equal(record.maps, record.heat_map)
    with pytest.warns(DeprecationWarning, match="now InvolutionRecord.is_attention"):
        assert record.shares is False
    with pytest.warns(DeprecationWarning, match="now InvolutionRecord.nearest_position"):
        assert record.position((0, 1)) == record.nearest_position((0, 1)) == (0, 12)
    with pytest.warns(DeprecationWarning, match=r"Argument `place` of .*\) is now `point`"):
        assert record.nearest_position(place=(0, 1)) == (0, 12)
    with pytest.raises(TypeError, match="both `point` and its old name `place`"):
        record.nearest_position(place=(0, 1), point=(0, 1))
    with pytest.raises(AttributeError, match="'InvolutionRecord' object has no attribute 'color'"):
        record.color  # noqa: B018 - raises
    for module, names in RENAMED.items():
        for old, new in names.items():
            with pytest.warns(DeprecationWarning, match=rf"{module.__name__}\.{new};"):
                assert getattr(module, old) is getattr(module, new)


RENAMED = {
    activations: {"looks": "capture", "Look": "InvolutionRecord"},
    visualize: {
        "looks": "capture",
        "Look": "InvolutionRecord",
        "across_classes": "stratified_sample",
        "costs": "accuracy_vs_cost",
        "place_kernels": "kernels_at",
        "samples": "image_grid",
        "words": "compare_kernels",
    },
}
