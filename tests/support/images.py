"""Small image folders for training."""

import numpy as np
from PIL import Image


def write_image(path, seed=0, size=(16, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), "uint8")
    Image.fromarray(pixels).save(path)


def write_folder(root, classes=("ant", "bee", "cat"), train=8, test=4, size=(16, 16)):
    """Images whose brightness depends on their class, so that a model can learn them."""
    for split, count in (("train", train), ("test", test)):
        for number, name in enumerate(classes):
            for i in range(count):
                path = root / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                low = number * 256 // len(classes)
                random = np.random.default_rng([number, i, count])
                pixels = random.integers(low, low + 256 // len(classes), (*size, 3), "uint8")
                Image.fromarray(pixels).save(path)
    return root
