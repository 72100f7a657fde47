import keras
import numpy as np
import pytest

from involution import Involution, Involution1D, Involution2D, Involution3D, models
from involution.kernel_generators.generators import PairwiseAttention, Static
from involution.visualize.activations import has_involutions, kernel_maps, looks
from tests.support.backends import in_graph, numpy

images = np.random.default_rng(0).random((3, 10, 13, 4), "float32")


@keras.saving.register_keras_serializable(package="tests")
class Given(keras.layers.Layer):
    """A generator that gives the kernels it holds, (H, W, taps * groups)."""

    def __init__(self, values, **kwargs):
        super().__init__(**kwargs)
        self.values = values

    def call(self, features):
        values = keras.ops.convert_to_tensor(self.values[None], features.dtype)
        return keras.ops.repeat(values, keras.ops.shape(features)[0], axis=0)


def by_hand(shape, places):
    """Kernels that are 0 but at some places."""
    values = np.zeros(shape, "float32")
    for place, value in places.items():
        values[place] = value
    return values


def test_the_map_of_a_kernel_made_by_hand_is_what_it_must_be():
    # Two groups of nine taps, tap-major: 1 on tap 4 of group 0 at one place, 2 and 3 at another.
    values = by_hand((10, 13, 18), {(2, 5, 8): 1, (7, 1, 1): 2, (7, 1, 17): 3})
    layer = Involution2D(3, groups=2, kernel_generator=Given(values), name="i")
    maps = kernel_maps(layer, images)["i"]
    expected = np.zeros((3, 10, 13, 2))
    expected[:, 2, 5, 0], expected[:, 7, 1, 1] = 1, 5
    np.testing.assert_array_equal(maps, expected)
    look = looks(layer, images)["i"]
    kernel = look.kernel_at(1, ((7 + 0.5) / 10, (1 + 0.5) / 13))
    assert kernel.shape == (3, 3, 2)
    assert kernel[0, 0, 1] == 2
    assert kernel[2, 2, 1] == 3
    assert np.count_nonzero(kernel) == 2
    # The centre of the first place's window is the place itself, and so is what it gives.
    np.testing.assert_array_equal(look.outputs[:, 2, 5, :2], images[:, 2, 5, :2])
    np.testing.assert_allclose(
        look.activations[:, 2, 5], np.sqrt(np.square(images[:, 2, 5, :2]).sum(-1) / 4), rtol=1e-6
    )


def test_what_places_receive():
    values = by_hand((5, 7, 9), {(2, 3, 0): 1, (2, 3, 5): 2, (0, 0, 0): 4, (4, 6, 3): 8})
    layer = Involution2D(3, 2, groups=1, kernel_generator=Given(values), name="i")
    received = looks(layer, images)["i"].received
    # "same" for 10 with windows of 3 at strides of 2 begins at 0; for 13 one position before.
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
def test_what_is_received_is_the_gradient_of_the_sum(arguments, data_format):
    """With kernels k, the sum of all outputs is the sum of what each position receives times its
    value: for an input of ones at one place alone it is what that place receives."""
    layer = Involution2D(**arguments, groups=2, data_format=data_format, reduction_ratio=1)
    x = images if data_format == "channels_last" else np.moveaxis(images, -1, 1)
    (look,) = looks(layer, x).values()
    kernel = numpy(layer.generate_kernel(x))
    layer.generate_kernel = lambda inputs: keras.ops.convert_to_tensor(kernel)
    for place in [(0, 0), (4, 6), (9, 12), (3, 11)]:
        one = np.zeros_like(images)
        one[(slice(None), *place, slice(0, None, 2))] = 1  # the first channel of each group
        y = numpy(layer(one if data_format == "channels_last" else np.moveaxis(one, -1, 1)))
        y = y if data_format == "channels_last" else np.moveaxis(y, 1, -1)
        np.testing.assert_allclose(
            y[..., ::2].sum((1, 2)), look.received[(slice(None), *place)], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("arguments", GEOMETRIES, ids=str)
def test_windows_and_positions_belong_together(arguments):
    layer = Involution2D(**arguments, groups=1, reduction_ratio=1)
    (look,) = looks(layer, images).values()
    for p in np.ndindex(look.kernels.shape[1:3]):
        place = centre_of(look.window, look.sizes, p)
        inside = [min(max(share, 0), 1) for share in place]
        if inside == place:
            assert look.position(place) == p
            (top, bottom), (left, right) = look.window_at(place)
            assert (top + bottom) / 2 == pytest.approx(place[0])
            assert (left + right) / 2 == pytest.approx(place[1])
    for corner in [(0, 0), (1, 1)]:
        assert look.kernel_at(0, corner).shape == (*layer.kernel_size, 1)


def centre_of(g, sizes, position):
    """By the formula of the operator, from its first and its last tap."""
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


def test_attention_is_shown_as_what_places_receive():
    layer = Involution2D(5, groups=2, kernel_generator=PairwiseAttention(), name="a")
    (look,) = looks(layer, images).values()
    assert look.shares
    np.testing.assert_array_equal(look.maps, look.received)
    # Every window gives all of its attention, and none of it leaves the image.
    np.testing.assert_allclose(look.maps.sum((1, 2)), 130, rtol=1e-5)
    assert np.ptp(look.maps) > 0.1
    soft = Involution2D(3, groups=1, reduction_ratio=1, kernel_softmax=True)
    assert next(iter(looks(soft, images).values())).shares


class Block(keras.layers.Layer):
    """A layer that is no model."""

    def __init__(self):
        super().__init__()
        self.deep = Involution2D(3, reduction_ratio=1, name="deep")

    def call(self, x):
        return self.deep(x)


class Wrapped(keras.Model):
    """A subclassed model with an involution in a block and one that is called twice."""

    def __init__(self):
        super().__init__()
        self.block = Block()
        self.twice = Involution2D(3, reduction_ratio=1, name="twice")

    def call(self, x):
        return self.twice(self.twice(self.block(x)))


class Compiled(Block):
    def call(self, x):
        return in_graph(self.deep)(x)


def test_involutions_in_compiled_code_are_refused():
    if keras.config.backend() == "torch":  # which runs it as it is
        assert list(looks(Compiled(), images)) == ["deep"]
        return
    with pytest.raises(ValueError, match=r"run its involutions where .* Received: deep in such"):
        looks(Compiled(), images)


def test_involutions_within_other_models_are_found():
    found = looks(Wrapped(), images)
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


class Holder(keras.layers.Layer):
    """A layer that holds others, however they are given."""

    def __init__(self, held):
        super().__init__()
        self.held = held


@pytest.mark.parametrize("make", [Involution2D, Involution, Involution1D])
def test_an_involution_is_found_wherever_it_is_held(make):
    layer = make()
    for held in (
        layer,
        Holder(layer),
        Holder([keras.layers.Dense(1), (layer,)]),
        Holder({"a": {"b": [layer]}}),
        keras.layers.TimeDistributed(layer),
        keras.layers.TimeDistributed(Holder(keras.layers.TimeDistributed(layer))),
        keras.Sequential([keras.layers.Flatten(), Holder(keras.Sequential([layer]))]),
    ):
        assert has_involutions(held)


def test_what_holds_no_involution():
    circle = Holder(keras.layers.Dense(1))
    circle.back = [circle]
    dense = keras.layers.Dense(1, name="involution")
    for held in (circle, Holder([dense, None, "text", 3]), keras.Sequential([dense]), Holder({})):
        assert not has_involutions(held)


def test_dropin_and_batches_of_any_size():
    many = np.concatenate([images] * 4)
    layer = Involution(4, 2, 5, 2, 1, "inv")
    found = looks(layer, many)["inv"]
    output, kernel = layer(many)
    np.testing.assert_allclose(found.kernels, numpy(kernel)[..., 0, :], atol=1e-5)
    np.testing.assert_allclose(found.outputs, numpy(output), atol=1e-5)
    np.testing.assert_allclose(kernel_maps(layer, many)["inv"], found.kernels.sum(-2), atol=1e-5)
    assert kernel_maps(layer, many[:0]) == looks(layer, many[:0]) == {}


@pytest.mark.parametrize("layer", [Involution1D, Involution3D])
def test_other_ranks(layer):
    x = np.ones((2, *(7, 5, 6)[: layer.rank], 4), "float32")
    static = Static(kernel_initializer="ones")
    (look,) = looks(layer(3, groups=2, kernel_generator=static), x).values()
    assert look.maps.shape == (*x.shape[:-1], 2)
    np.testing.assert_array_equal(look.maps, 3**layer.rank)
    assert look.received.max() == 3**layer.rank
    assert look.received.min() == 2**layer.rank
    assert look.kernel_at(0, (0.5,) * layer.rank).shape == (3,) * layer.rank + (2,)
    assert len(look.window_at((0.5,) * layer.rank)) == layer.rank


class Sharpened(PairwiseAttention):
    """Kernels that sum to 0 and not to 1."""

    def _generate(self, features):
        return super()._generate(features) - 1 / 9


def test_what_a_map_shows_follows_from_the_kernels():
    """A subclass of the attention's generator may have other kernels than a softmax's."""
    ones = by_hand((10, 13, 9), dict.fromkeys(np.ndindex(10, 13, 9), 1 / 9))
    for generator, shares in ((Sharpened(), False), (Given(ones), True), (Given(2 * ones), False)):
        layer = Involution2D(3, groups=1, kernel_generator=generator, name="i")
        assert looks(layer, images)["i"].shares == shares
    assert looks(Involution2D(3, kernel_softmax=True, name="i"), images)["i"].shares
