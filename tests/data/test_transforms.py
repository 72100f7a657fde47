"""Center crops and random crops."""

import math

import numpy as np
import pytest

from involution.data import decode, transforms

pytestmark = pytest.mark.any_backend

SIZES = [(1, 1), (1, 500), (500, 375), (375, 500), (7, 3), (4000, 31)]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("aspect_ratio", [1.0, 0.5, 3.0])
def test_center_crop_has_the_aspect_ratio(width, height, aspect_ratio):
    left, top, right, bottom = transforms.center_crop(width, height, aspect_ratio)
    assert (right - left) / (bottom - top) == pytest.approx(aspect_ratio)
    assert left == pytest.approx(width - right)
    assert top == pytest.approx(height - bottom)
    assert max((right - left) / width, (bottom - top) / height) == pytest.approx(0.875)


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("aspect_ratio", [1.0, 0.5, 3.0])
def test_random_crops_are_inside_the_image(width, height, aspect_ratio):
    rng = np.random.default_rng(0)
    for _ in range(200):
        left, top, right, bottom = transforms.random_resized_crop(width, height, aspect_ratio, rng)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


@pytest.mark.long
def test_distribution_of_random_crops():
    rng = np.random.default_rng(0)
    boxes = np.array([transforms.random_resized_crop(500, 500, 1.0, rng) for _ in range(20_000)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas, log_ratios = widths * heights / 500**2, np.log(widths / heights)
    assert areas.min() == pytest.approx(0.08, abs=0.01)
    # Crops that exceed the image are drawn again, so large crops are rarer.
    assert 0.85 < areas.max() <= 1
    assert np.quantile(areas, 0.25) == pytest.approx(0.08 + 0.25 * 0.92, abs=0.05)
    assert abs(log_ratios.mean()) < 0.01
    assert log_ratios.max() == pytest.approx(math.log(4 / 3), abs=0.01)
    # Aspect ratios vary around `aspect_ratio`.
    landscape = np.array(
        [transforms.random_resized_crop(500, 250, 2.0, rng) for _ in range(20_000)]
    )
    log_ratios = np.log(
        (landscape[:, 2] - landscape[:, 0]) / (landscape[:, 3] - landscape[:, 1]) / 2
    )
    assert abs(log_ratios.mean()) < 0.01
    assert log_ratios.max() == pytest.approx(math.log(4 / 3), abs=0.01)
    # Positions are uniform.
    x = boxes[:, 0] / (500 - widths)
    assert x.mean() == pytest.approx(0.5, abs=0.01)
    assert x.std() == pytest.approx(math.sqrt(1 / 12), abs=0.01)


def test_random_crop_falls_back_to_the_center_crop():
    rng = np.random.default_rng(0)
    assert transforms.random_resized_crop(1000, 10, 1.0, rng) == (495.0, 0.0, 505.0, 10.0)


def test_rounded_random_crops_stay_inside_the_image():
    rng = np.random.default_rng(0)
    for width in range(3000, 6000, 7):
        for aspect_ratio in (16 / 9, 9 / 16, 7 / 3):
            left, top, right, bottom = transforms.random_resized_crop(width, 5, aspect_ratio, rng)
            assert min(left, top) >= 0
            assert right <= width
            assert bottom <= 5


def test_read_image_applies_center_and_random_crops(tmp_path):
    from PIL import Image

    ramp = np.zeros((80, 160, 3), "uint8")
    ramp[..., 0] = np.arange(160)
    ramp[..., 1] = np.arange(80)[:, None]
    Image.fromarray(ramp).save(tmp_path / "x.png")
    uncropped = decode.read_image(tmp_path / "x.png", (8, 8))
    center = decode.read_image(tmp_path / "x.png", (8, 8), crop_fraction=0.5)
    # The crop has 40 x 40 pixels: pixels of the 8 x 8 result are 5 pixels apart.
    np.testing.assert_allclose(center[0, :, 0], 60 + 2 + 5 * np.arange(8), atol=1)
    np.testing.assert_allclose(center[:, 0, 1], 20 + 2 + 5 * np.arange(8), atol=1)
    wide = decode.read_image(tmp_path / "x.png", (4, 16), crop_fraction=0.5)
    np.testing.assert_allclose(wide[0, :, 0], 40 + 2 + 5 * np.arange(16), atol=1)
    np.testing.assert_allclose(wide[:, 0, 1], 30 + 2 + 5 * np.arange(4), atol=1)
    assert uncropped[0, 0, 0] < 15 < 145 < uncropped[0, -1, 0]
    random = decode.read_image(tmp_path / "x.png", (8, 8), rng=np.random.default_rng(3))
    left, top, right, bottom = transforms.random_resized_crop(
        160, 80, 1.0, np.random.default_rng(3)
    )
    np.testing.assert_allclose(random[..., 0].mean(), (left + right) / 2, atol=1.5)
    np.testing.assert_allclose(random[..., 1].mean(), (top + bottom) / 2, atol=1.5)
