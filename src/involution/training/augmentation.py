"""Random changes of training images by Keras's layers: a function of seed, epoch and batch, so that
a resumed run repeats them."""

import keras
import numpy as np

# Largest shift as a fraction of the size, as in crops of padded images.
SHIFT = 1 / 8
JITTER = 0.2
MIXUP_ALPHA = 0.2

LAYERS = {
    "crop": lambda seed: keras.layers.RandomTranslation(SHIFT, SHIFT, "reflect", seed=seed),
    "color": lambda seed: keras.layers.RandomColorJitter(
        (0, 1),
        brightness_factor=JITTER,
        contrast_factor=JITTER,
        saturation_factor=(0.5 - JITTER, 0.5 + JITTER),
        hue_factor=JITTER / 4,
        seed=seed,
    ),
    "mixup": lambda seed: keras.layers.MixUp(MIXUP_ALPHA, seed=seed),
}


def augment(images, labels, names, key) -> tuple[np.ndarray, np.ndarray]:
    """Changes a batch of training images.

    Args:
        images: float32 (B, height, width, channels), in [0, 1].
        labels: Class probabilities (B, classes) with ``"mixup"``, else of any shape.
        names: Keys of ``LAYERS``; unknown ones are ignored.
        key: Integers that determine the random numbers.
    """
    # Keras's seeds are 32-bit integers with a sign on PyTorch.
    seeds = (np.random.SeedSequence(key).generate_state(len(LAYERS)) >> 1).tolist()
    data = {"images": images, "labels": labels}
    for name, seed in zip(LAYERS, seeds, strict=True):
        if name in names:
            layer = LAYERS[name](seed)
            if name == "mixup":
                data = layer(data, training=True)
            else:
                data["images"] = layer(data["images"], training=True)
    return tuple(keras.ops.convert_to_numpy(data[part]) for part in ("images", "labels"))
