import keras
import numpy as np
import pytest
from frameworks import numpy
from matplotlib.figure import Figure

from involution import Involution2D, models, visualize


@pytest.fixture(scope="module")
def inn():
    return models.inn((32, 32, 3), 4, kernel_size=5, group_number=3, reduction_ratio=1)


images = np.random.default_rng(0).random((3, 32, 32, 3), "float32")


def test_a_heat_map_is_the_sum_over_the_window_and_the_groups(inn):
    maps = visualize.kernel_maps(inn, images)
    assert {name: m.shape for name, m in maps.items()} == {
        "inv_1": (3, 32, 32),
        "inv_2": (3, 16, 16),
        "inv_3": (3, 8, 8),
    }
    outputs = [inn.get_layer(name).output[1] for name in maps]
    for name, kernel in zip(maps, keras.Model(inn.input, outputs)(images), strict=True):
        assert kernel.shape[3:] == (25, 1, 3)
        np.testing.assert_allclose(maps[name], numpy(kernel).sum((3, 4, 5)), atol=1e-5)


def test_layers_that_return_no_kernel_and_channels_first_are_explained_too():
    inputs = keras.Input((3, 10, 12))
    layer = Involution2D(3, strides=2, reduction_ratio=1, data_format="channels_first", name="i")
    model = keras.Model(inputs, layer(inputs))
    x = np.moveaxis(images[:, :10, :12], -1, 1)
    found = visualize.kernels(model, x)["i"]
    assert found.shape == (3, 5, 6, 9, 1)
    np.testing.assert_allclose(
        found, np.moveaxis(numpy(layer.generate_kernel(x)), (1, 2), (-2, -1)), atol=1e-6
    )


def test_a_model_without_involutions_has_no_maps():
    assert visualize.kernel_maps(models.cnn((32, 32, 3), 4), images) == {}


def titles(figure):
    return [ax.get_title() for ax in figure.axes]


def test_a_constant_map_is_drawn_flat_and_says_so():
    maps = {"flat": np.full((1, 4, 5), 0.3, "float32"), "other": np.eye(4)[None]}
    maps["flat"][0, 1, 1] += 1e-8
    figure = visualize.heat_maps(images[:1], maps, overlay=True)
    assert isinstance(figure, Figure)
    assert "flat (5x4, constant)" in titles(figure)
    assert "flat over the image (5x4, constant)" in titles(figure)
    assert "other (4x4)" in titles(figure)
    drawn = next(ax for ax in figure.axes if ax.get_title() == "flat (5x4, constant)").images[0]
    assert np.ptp(drawn.get_array()) == 0
    bars = [ax for ax in figure.axes if not ax.get_title()]
    assert len(bars) == 4


def test_every_map_shows_its_own_range():
    values = np.linspace(-3, 7, 16).reshape(1, 4, 4)
    figure = visualize.heat_maps(images[:1], {"m": values}, ["a title"])
    (drawn,) = next(ax for ax in figure.axes if ax.get_title() == "m (4x4)").images
    assert drawn.get_clim() == (-3, 7)
    assert titles(figure)[0] == "a title"


def test_curves_have_the_same_axes_titles_and_units():
    rows = [
        {
            "epoch": e,
            "train_loss": 2 / e,
            "test_loss": 3 / e,
            "train_accuracy": 0.1 * e,
            "test_accuracy": 0.05 * e,
        }
        for e in (1, 2, 3)
    ]
    figure = visualize.curves({"cnn": rows, "inn": rows[:2]})
    assert titles(figure) == ["cnn: loss", "inn: loss", "cnn: accuracy", "inn: accuracy"]
    loss, other = figure.axes[0], figure.axes[1]
    assert loss.get_ylim() == other.get_ylim()
    assert loss.get_ylabel() == "cross-entropy (nats)"
    assert [line.get_label() for line in loss.lines] == ["train", "test"]
    np.testing.assert_allclose(loss.lines[1].get_ydata(), [3, 1.5, 1])


def test_samples_are_drawn_by_seed_across_classes():
    labels = np.repeat(np.arange(10), 50)
    chosen = visualize.across_classes(labels, 25, 42)
    np.testing.assert_array_equal(chosen, visualize.across_classes(labels, 25, 42))
    assert (chosen != visualize.across_classes(labels, 25, 43)).any()
    assert set(np.bincount(labels[chosen])) == {2, 3}
    assert len(set(chosen)) == 25
    pictures = np.zeros((500, 4, 4, 3), "uint8")
    figure = visualize.samples(pictures, labels, [f"class {i}" for i in range(10)], 42)
    assert titles(figure) == [f"class {labels[i]}" for i in chosen]


def test_fewer_images_than_places_leave_places_empty():
    figure = visualize.samples(np.zeros((2, 4, 4, 3), "uint8"), np.array([0, 1]), ["a", "b"], 0)
    assert sorted(t for t in titles(figure) if t) == ["a", "b"]


def test_words_shows_that_kernels_differ_between_places_and_filters_between_channels():
    """What the figure draws, panel by panel."""
    random = np.random.default_rng(0)
    kernel, filters = random.random((8, 8, 3, 3)), random.random((3, 3, 2))
    places = [(1, 1), (5, 2), (6, 6)]
    figure = visualize.words(kernel, filters, places)
    panels = np.array([ax.images[0].get_array() for ax in figure.axes if ax.images]).reshape(
        2, 2, 3, 3, 3
    )
    involution, convolution = panels
    for c in range(2):
        for i, place in enumerate(places):
            np.testing.assert_array_equal(involution[c, i], kernel[place])
            np.testing.assert_array_equal(convolution[c, i], filters[..., c])
