import numpy as np
import pytest
from matplotlib.figure import Figure

from involution import models
from involution.visualize import capture, figures, kernel_maps

pytestmark = pytest.mark.any_backend


@pytest.fixture(scope="module")
def inn():
    return models.inn((32, 32, 3), 4, kernel_size=5, group_number=3, reduction_ratio=1)


images = np.random.default_rng(0).random((3, 32, 32, 3), "float32")


def titles(figure):
    return [ax.get_title() for ax in figure.axes]


def panel(figure, title):
    """The array drawn under a title, and its color limits."""
    (ax,) = (ax for ax in figure.axes if ax.get_title() == title)
    return np.asarray(ax.images[-1].get_array()), ax.images[-1].get_clim()


def colorbars(figure):
    return [ax for ax in figure.axes if ax.get_label() == "<colorbar>"]


def test_a_constant_map_is_drawn_in_one_color():
    maps = {"flat": np.full((1, 4, 5), 0.3, "float32"), "other": np.eye(4)[None]}
    maps["flat"][0, 1, 1] += 1e-8
    figure = figures.heat_maps(images[:1], maps, overlay=True)
    assert isinstance(figure, Figure)
    assert {"flat (5x4, constant)", "flat, overlay (5x4, constant)", "other (4x4)"} < set(
        titles(figure)
    )
    drawn, limits = panel(figure, "flat (5x4, constant)")
    assert np.ptp(drawn) == 0
    assert limits[0] < 0.3 < limits[1]
    assert len(colorbars(figure)) == 4


def test_nonfinite_maps_are_marked_in_titles():
    values = np.linspace(0, 1, 16).reshape(1, 4, 4)
    values[0, 0, 0] = np.nan
    figure = figures.heat_maps(images[:1], {"m": values, "none": values * np.nan})
    assert panel(figure, "m (4x4, not finite)")[1] == (1 / 15, 1)
    assert "none (4x4, not finite)" in titles(figure)


@pytest.mark.long
def test_columns_share_a_scale(inn):
    maps = kernel_maps(inn, images)
    figure = figures.heat_maps(images, maps, ["a", "b", "c"])
    grid = [ax for ax in figure.axes if ax not in colorbars(figure)]
    assert len(grid) == 3 * 4
    assert len(colorbars(figure)) == 3
    for column, values in enumerate(maps.values(), start=1):
        for row in range(3):
            (drawn,) = grid[4 * row + column].images
            np.testing.assert_allclose(drawn.get_array(), values[row].sum(-1))
            assert drawn.get_clim() == pytest.approx(
                (values.sum(-1).min(), values.sum(-1).max()), rel=1e-6
            )
    unshared = figures.heat_maps(images, maps, share_scale=False)
    grid = [ax for ax in unshared.axes if ax not in colorbars(unshared)]
    for row in range(3):
        (drawn,) = grid[4 * row + 1].images
        assert drawn.get_clim() == (drawn.get_array().min(), drawn.get_array().max())
    assert len(colorbars(unshared)) == 9


def test_activations_are_drawn_next_to_the_maps():
    values = np.linspace(-3, 7, 16).reshape(1, 4, 4)
    figure = figures.heat_maps(images[:1], {"m": values}, ["a title"], activations={"m": values**2})
    assert panel(figure, "m (4x4)")[1] == (-3, 7)
    np.testing.assert_array_equal(panel(figure, "m: output RMS (4x4)")[0], values[0] ** 2)
    assert titles(figure)[0] == "a title"


@pytest.mark.parametrize("shape", [(1, 9, 2), (1, 3, 4, 5, 2)])
def test_maps_of_sequences_and_volumes_raise(shape):
    maps = {"m": np.ones(shape)}
    if len(shape) == 3:  # (N, length, groups) is a valid shape without groups
        maps = {"m": np.ones((1, 9))}
    with pytest.raises(ValueError, match=r"`maps` must have shape .* Received: m of shape"):
        figures.heat_maps(images[:1], maps)


def test_group_maps_share_a_scale():
    maps = {"a": np.arange(60.0).reshape(4, 5, 3), "b": np.eye(3)[..., None].repeat(11, -1)}
    figure = figures.group_maps(maps, columns=4)
    shown = [ax for ax in figure.axes if ax.images and ax not in colorbars(figure)]
    assert [ax.get_title() for ax in shown] == [
        *(f"group {i}" for i in range(3)),
        *(f"group {i}" for i in range(11)),
    ]
    for i in range(3):
        np.testing.assert_array_equal(shown[i].images[-1].get_array(), maps["a"][..., i])
        assert shown[i].images[-1].get_clim() == (0, 59)
    over = figures.group_maps(maps, image=images[0])
    assert all(len(ax.images) == 2 for ax in over.axes if ax.get_title().startswith("group"))


def test_kernels_at_a_point(inn):
    records = capture(inn, images)
    point = (0.25, 0.75)
    random = np.random.default_rng(0)
    after = {
        name: record.kernel_at(0, point) + random.normal(size=(5, 5, 3))
        for name, record in records.items()
    }
    before = {name: np.zeros_like(kernel) for name, kernel in after.items()}
    windows = {name: record.window_at(point) for name, record in records.items()}
    figure = figures.kernels_at(images[0], point, {"before": before, "after": after}, windows)
    rows = [[ax for ax in figure.axes if ax.get_title() == t] for t in ("before", "after")]
    assert [len(row) for row in rows] == [3, 3]
    for ax_before, ax_after, kernel in zip(*rows, after.values(), strict=True):
        np.testing.assert_array_equal(ax_after.images[0].get_array(), kernel.mean(-1))
        low, high = ax_after.images[0].get_clim()
        assert -low == high == np.abs(kernel.mean(-1)).max()
        assert ax_before.images[0].get_clim() == (low, high)
    first = figure.axes[0]
    box = first.patches[0]
    # The window of size 5 centered at pixel (8, 24) of 32 x 32.
    assert (box.get_y(), box.get_height()) == pytest.approx((6, 5))
    assert (box.get_x(), box.get_width()) == pytest.approx((22, 5))


def test_curves_share_axes():
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
    figure = figures.curves({"cnn": rows, "inn": rows[:2]})
    assert titles(figure) == ["cnn: loss", "inn: loss", "cnn: accuracy", "inn: accuracy"]
    loss, other = figure.axes[0], figure.axes[1]
    assert loss.get_ylim() == other.get_ylim()
    assert loss.get_ylabel() == "cross-entropy (nats)"
    assert [line.get_label() for line in loss.lines] == ["train", "test"]
    np.testing.assert_allclose(loss.lines[1].get_ydata(), [3, 1.5, 1])


def test_image_grids_are_stratified_and_seeded():
    labels = np.repeat(np.arange(10), 50)
    chosen = figures.stratified_sample(labels, 25, 42)
    np.testing.assert_array_equal(chosen, figures.stratified_sample(labels, 25, 42))
    assert (chosen != figures.stratified_sample(labels, 25, 43)).any()
    assert set(np.bincount(labels[chosen])) == {2, 3}
    assert len(set(chosen)) == 25
    pictures = np.zeros((500, 4, 4, 3), "uint8")
    figure = figures.image_grid(pictures, labels, [f"class {i}" for i in range(10)], 42)
    assert titles(figure) == [f"class {labels[i]}" for i in chosen]


def test_a_grid_with_fewer_images_than_cells():
    figure = figures.image_grid(np.zeros((2, 4, 4, 3), "uint8"), np.array([0, 1]), ["a", "b"], 0)
    assert sorted(t for t in titles(figure) if t) == ["a", "b"]


def test_compare_kernels_varies_by_position_and_by_channel():
    random = np.random.default_rng(0)
    kernel, filters = random.random((8, 8, 3, 3)), random.random((3, 3, 2))
    positions = [(1, 1), (5, 2), (6, 6)]
    figure = figures.compare_kernels(kernel, filters, positions)
    panels = np.array([ax.images[0].get_array() for ax in figure.axes if ax.images]).reshape(
        2, 2, 3, 3, 3
    )
    involution, convolution = panels
    for c in range(2):
        for i, position in enumerate(positions):
            np.testing.assert_array_equal(involution[c, i], kernel[position])
            np.testing.assert_array_equal(convolution[c, i], filters[..., c])
