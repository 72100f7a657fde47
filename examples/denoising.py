"""Image denoising by involutions and by convolutions with equal parameter counts.

Networks of residual bottlenecks at full resolution, one with 7x7 involutions and one with 3x3
convolutions, predict Gaussian noise (standard deviation 25 of 255). They are trained on crops of
one of scikit-learn's two photographs and tested on the other; metric: PSNR in dB.
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
    """Maps a noisy image of any size to a clean one."""
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


def crops(image, count, random):
    """Random square crops, half of them flipped horizontally."""
    tops = random.integers(0, image.shape[0] - SIDE, count)
    lefts = random.integers(0, image.shape[1] - SIDE, count)
    corners = zip(tops, lefts, strict=True)
    cropped = np.stack([image[top : top + SIDE, left : left + SIDE] for top, left in corners])
    cropped[::2] = cropped[::2, :, ::-1]
    return cropped


def psnr(image, truth):
    """Peak signal-to-noise ratio in dB."""
    return -10 * np.log10(np.mean((np.clip(image, 0, 1) - truth) ** 2))


def main():
    options = common.arguments(__doc__, "denoising.png")
    count, epochs, width = (64, 1, 8) if options.quick else (4096, 20, 16)
    random = np.random.default_rng(options.seed)
    train_image, test_image = (
        image.astype("float32") / 255 for image in load_sample_images().images
    )
    clean = crops(train_image, count, random)
    x, test = noisy(clean, random), noisy(test_image, random)
    keras.utils.set_random_seed(options.seed)
    first = network(width)
    second = common.nearest(first, lambda w: network(w, "convolution"), range(4, 2 * width))
    results = {"noisy": test}
    rows = [("none", 0, f"{psnr(test, test_image):.2f}")]
    for model in (first, second):
        common.train(model, x, clean, "mean_squared_error", epochs, options.seed)
        results[model.name] = model.predict(test[None], verbose=0)[0]
        rows.append(
            (model.name, common.size(model), f"{psnr(results[model.name], test_image):.2f}")
        )
    common.table("PSNR in dB on the test photograph", rows)
    draw(results | {"clean": test_image}, options.output)


def draw(results, file):
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for ax, (name, image) in zip(figure.subplots(1, len(results)), results.items(), strict=True):
        ax.imshow(np.clip(image[120:280, 240:400], 0, 1))
        ax.set_title(name)
        ax.axis("off")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
