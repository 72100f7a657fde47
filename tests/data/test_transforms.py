"""Parts of photographs: the middle, and others at random."""

import math

import numpy as np
import pytest

from involution.data import datasets, transforms

pytestmark = pytest.mark.any_backend

SIZES = [(1, 1), (1, 500), (500, 375), (375, 500), (7, 3), (4000, 31)]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("proportions", [1.0, 0.5, 3.0])
def test_the_middle_has_the_proportions_that_are_asked_for(width, height, proportions):
    left, top, right, bottom = transforms.middle(width, height, proportions)
    assert (right - left) / (bottom - top) == pytest.approx(proportions)
    assert left == pytest.approx(width - right)
    assert top == pytest.approx(height - bottom)
    assert max((right - left) / width, (bottom - top) / height) == pytest.approx(0.875)


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("proportions", [1.0, 0.5, 3.0])
def test_parts_are_within_the_image(width, height, proportions):
    random = np.random.default_rng(0)
    for _ in range(200):
        left, top, right, bottom = transforms.at_random(width, height, proportions, random)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def test_parts_are_as_inception_has_them():
    random = np.random.default_rng(0)
    boxes = np.array([transforms.at_random(500, 500, 1.0, random) for _ in range(20_000)])
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    shares, stretches = wide * high / 500**2, np.log(wide / high)
    assert shares.min() == pytest.approx(0.08, abs=0.01)
    # Those that do not fit are drawn again, so the largest are fewer.
    assert 0.85 < shares.max() <= 1
    assert np.quantile(shares, 0.25) == pytest.approx(0.08 + 0.25 * 0.92, abs=0.05)
    assert abs(stretches.mean()) < 0.01
    assert stretches.max() == pytest.approx(math.log(4 / 3), abs=0.01)
    # The proportions are those that are asked for.
    lying = np.array([transforms.at_random(500, 250, 2.0, random) for _ in range(20_000)])
    stretches = np.log((lying[:, 2] - lying[:, 0]) / (lying[:, 3] - lying[:, 1]) / 2)
    assert abs(stretches.mean()) < 0.01
    assert stretches.max() == pytest.approx(math.log(4 / 3), abs=0.01)
    # Everywhere: they lie at random within what is left.
    across = boxes[:, 0] / (500 - wide)
    assert across.mean() == pytest.approx(0.5, abs=0.01)
    assert across.std() == pytest.approx(math.sqrt(1 / 12), abs=0.01)


def test_what_no_part_fits_is_seen_in_its_middle():
    random = np.random.default_rng(0)
    assert transforms.at_random(1000, 10, 1.0, random) == (495.0, 0.0, 505.0, 10.0)


def test_rounding_does_not_lead_out_of_the_image():
    random = np.random.default_rng(0)
    for width in range(3000, 6000, 7):
        for proportions in (16 / 9, 9 / 16, 7 / 3):
            left, top, right, bottom = transforms.at_random(width, 5, proportions, random)
            assert min(left, top) >= 0
            assert right <= width
            assert bottom <= 5


def test_an_image_is_read_in_part(tmp_path):
    from PIL import Image

    ramp = np.zeros((80, 160, 3), "uint8")
    ramp[..., 0] = np.arange(160)
    ramp[..., 1] = np.arange(80)[:, None]
    Image.fromarray(ramp).save(tmp_path / "x.png")
    whole = datasets.read_image(tmp_path / "x.png", (8, 8))
    middle = datasets.read_image(tmp_path / "x.png", (8, 8), crop=0.5)
    # 40 x 40 pixels about the middle: their centres are 5 apart.
    np.testing.assert_allclose(middle[0, :, 0], 60 + 2 + 5 * np.arange(8), atol=1)
    np.testing.assert_allclose(middle[:, 0, 1], 20 + 2 + 5 * np.arange(8), atol=1)
    wide = datasets.read_image(tmp_path / "x.png", (4, 16), crop=0.5)
    np.testing.assert_allclose(wide[0, :, 0], 40 + 2 + 5 * np.arange(16), atol=1)
    np.testing.assert_allclose(wide[:, 0, 1], 30 + 2 + 5 * np.arange(4), atol=1)
    assert whole[0, 0, 0] < 15 < 145 < whole[0, -1, 0]
    part = datasets.read_image(tmp_path / "x.png", (8, 8), random=np.random.default_rng(3))
    left, top, right, bottom = transforms.at_random(160, 80, 1.0, np.random.default_rng(3))
    np.testing.assert_allclose(part[..., 0].mean(), (left + right) / 2, atol=1.5)
    np.testing.assert_allclose(part[..., 1].mean(), (top + bottom) / 2, atol=1.5)
