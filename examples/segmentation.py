"""Semantic segmentation of digits by RedNet and by its convolutional counterpart of equal size.

Scenes of 64x64 pixels contain handwritten digits of scikit-learn in random sizes and colors over
noise. A head of 1x1 convolutions on the feature maps of all stages classifies each pixel as a digit
or background. Metric on scenes of held-out digits: mean intersection over union of the ten digits.
"""

import common
import keras
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits

from involution import models

SIDE, BACKGROUND = 64, 10


def network(width, spatial="involution"):
    """Maps scenes (B, 64, 64, 3) to per-pixel logits of 10 digits and the background."""
    layers = keras.layers
    features = models.rednet_tiny(
        (SIDE, SIDE, 3),
        feature_maps=True,
        blocks=(1, 1, 2),
        widths=(width, 2 * width, 3 * width),
        stem_pool=False,
        reduction_ratio=4,
        group_channels=width,
    )
    if spatial == "convolution":
        features = models.conv_counterpart(features)
    scores = []
    for i, stage in enumerate(features.output.values()):
        score = layers.Conv2D(BACKGROUND + 1, 1, name=f"scores{i + 1}")(stage)
        if i > 0:
            score = layers.UpSampling2D(2**i, interpolation="bilinear")(score)
        scores.append(score)
    return keras.Model(features.input, layers.Add()(scores), name=spatial)


def scenes(images, labels, count, random):
    """(scenes, per-pixel classes)."""
    x = random.uniform(0, 0.5, (count, SIDE, SIDE, 3)).astype("float32")
    y = np.full((count, SIDE, SIDE), BACKGROUND, "int32")
    for scene, truth in zip(x, y, strict=True):
        for _ in range(random.integers(3, 6)):
            chosen = random.integers(len(images))
            side = int(random.integers(16, 29))
            digit = Image.fromarray((images[chosen] * 15.9).astype("uint8"))
            ink = np.asarray(digit.resize((side, side), Image.Resampling.BILINEAR)) / 255
            top, left = random.integers(0, SIDE - side, 2)
            region = np.s_[top : top + side, left : left + side]
            color = random.uniform(0.6, 1, 3)
            scene[region] = scene[region] * (1 - ink[..., None]) + color * ink[..., None]
            truth[region][ink > 0.4] = labels[chosen]
    return x, y


def mean_iou(prediction, truth):
    """Mean intersection over union of the digits."""
    intersection = [np.sum((prediction == c) & (truth == c)) for c in range(BACKGROUND)]
    union = [np.sum((prediction == c) | (truth == c)) for c in range(BACKGROUND)]
    return float(np.mean(np.divide(intersection, np.maximum(union, 1))))


def main():
    options = common.arguments(__doc__, "segmentation.png")
    count, epochs, width = (16, 1, 8) if options.quick else (2000, 15, 16)
    random = np.random.default_rng(options.seed)
    digits = load_digits()
    x, y = scenes(digits.images[:1400], digits.target[:1400], count, random)
    x_test, y_test = scenes(digits.images[1400:], digits.target[1400:], 200, random)
    keras.utils.set_random_seed(options.seed)
    first = network(width)
    second = common.nearest(first, lambda w: network(w, "convolution"), range(4, 2 * width))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    predictions, rows = {}, []
    for model in (first, second):
        common.train(model, x, y, loss, epochs, options.seed)
        predictions[model.name] = model.predict(x_test, verbose=0).argmax(-1)
        rows.append(
            (model.name, common.size(model), f"{mean_iou(predictions[model.name], y_test):.4f}")
        )
    common.table("mean intersection over union", rows)
    draw(x_test, {"truth": y_test, **predictions}, options.output)


def draw(x, maps, file, count=4):
    figure = Figure(figsize=(2.2 * (1 + len(maps)), 2.2 * count), layout="constrained")
    axes = figure.subplots(count, 1 + len(maps))
    for i in range(count):
        axes[i, 0].imshow(x[i])
        for ax, (name, classes) in zip(axes[i, 1:], maps.items(), strict=True):
            ax.imshow(classes[i], cmap="tab20", vmin=0, vmax=19, interpolation="nearest")
            ax.set_title(name if i == 0 else "")
        for ax in axes[i]:
            ax.axis("off")
    figure.savefig(file, dpi=90)


if __name__ == "__main__":
    main()
