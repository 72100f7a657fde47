import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure

from involution import models
from involution.visualize import capture, figures, html, kernel_maps
from involution.visualize.colors import DIVERGING_CMAP, SEQUENTIAL_CMAP

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


def colormaps(figure):
    return [ax.images[-1].get_cmap().name for ax in figure.axes if ax.child_axes]


def test_a_constant_map_is_drawn_in_one_color():
    maps = {"flat": np.full((1, 4, 5), 0.3, "float32"), "other": np.eye(4)[None]}
    maps["flat"][0, 1, 1] += 1e-8
    figure = figures.heat_maps(images[:1], maps, overlay=True)
    assert isinstance(figure, Figure)
    assert {"flat\n5x4, constant", "flat\noverlay, 5x4, constant", "other\n4x4"} < set(
        titles(figure)
    )
    drawn, limits = panel(figure, "flat\n5x4, constant")
    assert np.ptp(drawn) == 0
    assert limits[0] < 0.3 < limits[1]
    assert len(colormaps(figure)) == 4


def test_nonfinite_maps_are_marked_in_titles():
    values = np.linspace(0, 1, 16).reshape(1, 4, 4)
    values[0, 0, 0] = np.nan
    figure = figures.heat_maps(images[:1], {"m": values, "none": values * np.nan})
    assert panel(figure, "m\n4x4, not finite")[1] == pytest.approx(
        np.percentile(np.arange(1, 16) / 15, (1, 99))
    )
    assert "none\n4x4, not finite" in titles(figure)


def test_maps_of_both_signs_have_a_scale_centered_at_zero():
    signed = np.linspace(-1, 3, 100).reshape(1, 10, 10)
    figure = figures.heat_maps(images[:1], {"signed": signed, "positive": signed + 2})
    assert colormaps(figure) == [DIVERGING_CMAP, SEQUENTIAL_CMAP]
    low, high = panel(figure, "signed\n10x10")[1]
    assert -low == high == pytest.approx(np.percentile(signed, 99))
    assert panel(figure, "positive\n10x10")[1] == pytest.approx(np.percentile(signed + 2, (1, 99)))
    assert figure.get_supxlabel().split() == " ".join(figures.NOTES.values()).split()
    assert "Purple" not in figures.heat_maps(images[:1], {"m": signed + 2}).get_supxlabel()


def test_maps_of_a_layer_have_one_color_map():
    # Only the first image's map has both signs.
    values = np.stack([np.linspace(-5, 5, 100), np.linspace(1, 5, 100)]).reshape(2, 10, 10)
    figure = figures.heat_maps(images[:2], {"m": values})
    assert colormaps(figure) == [DIVERGING_CMAP] * 2


def test_outliers_do_not_determine_the_colors():
    values = np.linspace(1, 2, 900).reshape(1, 30, 30)
    values[0, 3, 3] = 1e6
    low, high = panel(figures.heat_maps(images[:1], {"m": values}), "m\n30x30")[1]
    assert 1 < low < high < 2
    # Of a map with less than 1% of other values, they are all there is to see.
    sparse = np.ones((1, 30, 30))
    sparse[0, 3, 3] = 2
    assert panel(figures.heat_maps(images[:1], {"m": sparse}), "m\n30x30")[1] == (1, 2)


@pytest.mark.long
def test_scales_of_images_and_of_layers(inn):
    maps = kernel_maps(inn, images)
    for share_scale in (False, True):
        figure = figures.heat_maps(images, maps, ["a", "b", "c"], share_scale=share_scale)
        grid = np.reshape(figure.axes, (3, 4))
        assert [ax.get_title() for ax in grid[:, 0]] == ["a", "b", "c"]
        for column, values in zip(grid.T[1:], maps.values(), strict=True):
            sums = values.sum(axis=-1)
            for row, ax in enumerate(column):
                np.testing.assert_allclose(ax.images[0].get_array(), sums[row])
                limits = np.percentile(sums if share_scale else sums[row], (1, 99))
                extreme = np.abs(ax.images[0].get_clim()).max()
                np.testing.assert_allclose(extreme, np.abs(limits).max())


def test_activations_are_drawn_next_to_the_maps():
    values = np.linspace(-3, 7, 16).reshape(1, 4, 4)
    figure = figures.heat_maps(images[:1], {"m": values}, ["a title"], activations={"m": values**2})
    np.testing.assert_array_equal(panel(figure, "m\n4x4")[0], values[0])
    np.testing.assert_array_equal(panel(figure, "m\noutput RMS, 4x4")[0], values[0] ** 2)
    assert titles(figure)[0] == "a title"


def test_many_layers_continue_in_further_rows():
    maps = {f"layer{i}": np.full((2, 4, 4), 1 + i) for i in range(8)}
    figure = figures.heat_maps(images[:2], maps, overlay=True)
    # The image and three maps with their overlays, and two more rows.
    assert np.shape(figure.axes) == (2 * 3 * 7,)
    assert figure.get_figwidth() <= figures.WIDTH
    for image in np.reshape(figure.axes, (2, 21)):
        shown = [ax.get_title().split("\n")[0] for ax in image if ax.images]
        assert shown == ["image", *(f"layer{i}" for i in range(8) for _ in range(2))]
    # Rows of equal length, instead of six maps and two.
    assert np.shape(figures.heat_maps(images[:2], maps).axes) == (2 * 2 * 5,)


def test_short_names():
    names = ["stage1_block1_2_involution", "stage2_block10_2_involution"]
    assert list(figures.short_names(names).values()) == ["stage1_block1", "stage2_block10"]
    for unchanged in (["inv_1", "inv_2"], ["a_involution"], ["x_a", "x_a#2"]):
        assert list(figures.short_names(unchanged).values()) == unchanged
    assert figures.short_names(["inv", "a_inv"]) == {"inv": "inv", "a_inv": "a_inv"}
    assert figures.short_names(["a_b", "c_a_b"]) == {"a_b": "a", "c_a_b": "c_a"}


@pytest.mark.parametrize("length", [1, 20, 60])
@pytest.mark.parametrize("letter", ["e", "고"])
def test_titles_are_neither_clipped_nor_overlapping(letter, length):
    names = [f"{letter * length}{i}" for i in range(6)]
    maps = {name: np.ones((2, 4, 4)) for name in names}
    figure = figures.heat_maps(images[:2], maps, [f"{name}\n{name}" for name in names[:2]])
    html.png(figure)
    grid = np.reshape(figure.axes, (2, 7))
    assert all(ax.get_title() for ax in grid.ravel())
    for row in grid:
        boxes = [ax.title.get_window_extent() for ax in row]
        assert boxes[0].x0 >= 0
        assert boxes[-1].x1 <= figure.bbox.width
        assert all(a.x1 <= b.x0 for a, b in itertools.pairwise(boxes))


@pytest.mark.parametrize(
    ("text", "width", "short"),
    [
        ("abc", 3, "abc"),
        ("abcdef", 5, "ab…ef"),
        ("고양이", 6, "고양이"),
        ("고양이강아지", 7, "고양…지"),
    ],
)
def test_shorten(text, width, short):
    assert figures.shorten(text, width) == short


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
    shown = [ax for ax in figure.axes if ax.images and ax.get_label() != "<colorbar>"]
    assert [ax.get_title() for ax in shown] == [
        *(f"group {i}" for i in range(3)),
        *(f"group {i}" for i in range(11)),
    ]
    for i in range(3):
        np.testing.assert_array_equal(shown[i].images[-1].get_array(), maps["a"][..., i])
        assert shown[i].images[-1].get_clim() == pytest.approx(np.percentile(maps["a"], (1, 99)))
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


def test_windows_of_many_layers_continue_in_further_rows():
    names = [f"l{i}" for i in range(7)]
    kernels = {"after": {name: np.full((3, 3, 1), i) for i, name in enumerate(names)}}
    windows = dict.fromkeys(names, ((0.0, 0.5), (0.0, 0.5)))
    figure = figures.kernels_at(images[0], (0.2, 0.2), kernels, windows)
    grid = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
    grid = np.reshape(grid, (2, 2, 5)).swapaxes(1, 2).reshape(10, 2)
    assert [ax.get_title() for ax in grid[:, 0]] == [*names, "", "", ""]
    assert [ax.images[0].get_array().max() for ax in grid[:7, 1]] == list(range(7))
    assert figure.get_figwidth() <= figures.WIDTH


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


def test_most_different_positions():
    kernels = np.zeros((4, 5, 3, 3))
    kernels[1, 2] = 9
    kernels[3, 4] = -5
    kernels[0, 3] = -1
    assert figures.most_different(kernels, 4)[:3] == [(1, 2), (3, 4), (0, 0)]
    assert figures.most_different(kernels, 4)[3] == (0, 3)
    equal = figures.most_different(np.ones((1, 3, 3, 3)), 4)
    assert sorted(equal) == [(0, 0), (0, 1), (0, 2)]


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


def test_axes_of_costs_are_logarithmic_unless_costs_are_within_an_octave():
    def scales(*costs):
        drawn = {
            str(n): {"test_accuracy": 0.5, "trainable_params": n, "multiply_adds": None}
            for n in costs
        }
        return [ax.get_xscale() for ax in figures.accuracy_vs_cost(drawn).axes]

    assert scales(1000, 2000) == ["log", "linear"]
    assert scales(1000, 1999) == ["linear", "linear"]
