"""Noise taken out of a photograph, by involutions and by convolutions of equal size.

Residual bottlenecks at full resolution, once with 7x7 involutions and once with 3x3 convolutions,
learn on pieces of one of scikit-learn's two photographs to tell Gaussian noise (standard deviation
25 of 255). Measured on the other photograph: peak signal-to-noise ratio, in dB.
"""

import common
import keras
import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_images

from involution import models

NOISE = 25 / 255
SIDE = 40


def network(width, spatial="involution"):
    """From a noisy image to a clean one, of any size."""
    features = models.rednet_tiny(
        include_top=False,
        blocks=4,
        widths=width,
        stem_width=2 * width,
        stem_pool=False,
        group_channels=width,
        reduction_ratio=4,
        kernel_size=7 if spatial == "involution" else 3,
    )
    if spatial == "convolution":
        features = models.conv_counterpart(features)
    noisy = keras.Input((None, None, 3))
    noise = keras.layers.Conv2D(3, 3, padding="same")(features(noisy))
    return keras.Model(noisy, keras.layers.Subtract()([noisy, noise]), name=spatial)


def noisy(images, random):
    return (images + random.normal(0, NOISE, images.shape)).astype("float32")


def pieces(image, count, random):
    """Squares from random places, half of them mirrored."""
    tops = random.integers(0, image.shape[0] - SIDE, count)
    lefts = random.integers(0, image.shape[1] - SIDE, count)
    corners = zip(tops, lefts, strict=True)
    found = np.stack([image[top : top + SIDE, left : left + SIDE] for top, left in corners])
    found[::2] = found[::2, :, ::-1]
    return found


def ratio(image, truth):
    """Peak signal-to-noise ratio in dB."""
    return -10 * np.log10(np.mean((np.clip(image, 0, 1) - truth) ** 2))


def main():
    options = common.arguments(__doc__, "denoising.png")
    count, epochs, width = (64, 1, 8) if options.quick else (4096, 20, 16)
    random = np.random.default_rng(options.seed)
    seen, unseen = (image.astype("float32") / 255 for image in load_sample_images().images)
    clean = pieces(seen, count, random)
    x, test = noisy(clean, random), noisy(unseen, random)
    keras.utils.set_random_seed(options.seed)
    first = network(width)
    second = common.nearest(first, lambda w: network(w, "convolution"), range(4, 2 * width))
    results = {"noisy": test}
    rows = [("none", 0, f"{ratio(test, unseen):.2f}")]
    for model in (first, second):
        common.train(model, x, clean, "mean_squared_error", epochs, options.seed)
        results[model.name] = model.predict(test[None], verbose=0)[0]
        rows.append((model.name, common.size(model), f"{ratio(results[model.name], unseen):.2f}"))
    common.table("PSNR in dB on the unseen photograph", rows)
    draw(results | {"clean": unseen}, options.output)


def draw(results, file):
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for ax, (name, image) in zip(figure.subplots(1, len(results)), results.items(), strict=True):
        ax.imshow(np.clip(image[120:280, 240:400], 0, 1))
        ax.set_title(name)
        ax.axis("off")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
