"""The color photographs that scikit-learn and scikit-image contain."""

import numpy as np
from skimage import data
from sklearn.datasets import load_sample_images


def load() -> dict[str, np.ndarray]:
    """Photographs by name, float32 in [0, 1], cropped to multiples of 16."""
    images = dict(zip(("china", "flower"), load_sample_images().images, strict=True))
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        images[name] = getattr(data, name)()
    images["motorcycle"] = data.stereo_motorcycle()[0]
    return {
        name: image[: image.shape[0] // 16 * 16, : image.shape[1] // 16 * 16].astype("float32")
        / 255
        for name, image in images.items()
    }


def crops(images, count, side, random, step=1) -> np.ndarray:
    """Random square crops of random images, half of them flipped; corners at multiples of
    ``step``."""
    result = []
    for i in range(count):
        image = images[random.integers(len(images))]
        top, left = (random.integers((n - side) // step + 1) * step for n in image.shape[:2])
        crop = image[top : top + side, left : left + side]
        result.append(crop[:, ::-1] if i % 2 else crop)
    return np.stack(result)
