"""Guided upsampling of colors: kernels from the luminance, or a residual from it.

Of a photograph the luminance has full size, and the chroma is averaged over 8x8 pixels, as in
compressed images and in colorization. All arms but the static one have the same trunk, five 3x3
convolutions of the luminance and the enlarged chroma, and equal numbers of parameters within 2 %:

    involution      InvolutionUpSampling2D: softmax kernels of 3x3 coarse pixels for each fine one
    signed          the same without the softmax: weights may be negative
    no guide        involution without the luminance: CARAFE's situation
    direct          a residual that is added to the bilinear interpolation
    gated static    a transposed convolution and the nearest pixel, mixed by a gate for each pixel
    static          a transposed convolution alone, of the same 3x3 coarse pixels; without a trunk

Each photograph is left out once: the arms are trained on the others, and tested on it. Metric:
peak signal-to-noise ratio of the chroma in dB, of all pixels and of those within two pixels of an
edge of the luminance. Training starts from the bilinear interpolation, itself an arm.

Expectation, written before the first full run: involution leads direct by 0.5 dB, and direct leads
static by 0.5 dB, more near edges; no guide equals static; gated static lies between static and
direct. Of the quick form, 60 steps on one photograph, this was seen before: static 0.3 dB above the
bilinear interpolation and no guide equal to it, because positive weights cannot sharpen, direct
0.35 dB above, signed 0.55. So the lead is expected from signed rather than from involution.

    python examples/guided_upsampling.py            # two minutes
    python examples/guided_upsampling.py --full
"""

import functools

import experiments
import keras
import numpy as np
import photographs
from matplotlib.figure import Figure
from scipy import ndimage
from skimage.feature import canny

from involution import InvolutionUpSampling2D

FACTOR, WINDOW, WIDTH = 8, 3, 16
DILATIONS = (1, 1, 2, 4, 8)
# Of BT.601; the chroma is in [-0.5, 0.5].
TO_YCC = np.float32(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
)


# --- Data -----------------------------------------------------------------------------------------


def split(images):
    """Luminance (N, H, W, 1), coarse chroma (N, H / 8, W / 8, 2) and chroma, of colors."""
    ycc = images @ TO_YCC.T
    luminance, chroma = ycc[..., :1] - 0.5, ycc[..., 1:]
    count, height, width, _ = chroma.shape
    blocks = chroma.reshape(count, height // FACTOR, FACTOR, width // FACTOR, FACTOR, 2)
    return luminance, blocks.mean(axis=(2, 4)), chroma


def near_edges(luminance):
    """Pixels within two pixels of an edge."""
    edges = canny(luminance, sigma=1.5)
    return ndimage.binary_dilation(edges, np.ones((3, 3)), iterations=2)


# --- Networks -------------------------------------------------------------------------------------


def tent(distance):
    """Weight of a coarse pixel in the bilinear interpolation, by the distance in fine pixels."""
    return np.maximum(0, 1 - np.abs(distance) / FACTOR)


def bilinear_kernels():
    """The kernels (8, 8, 9) of the fine pixels of one coarse pixel, by row and column."""
    fine = np.arange(FACTOR) - (FACTOR - 1) / 2
    weights = tent(fine[:, None] - FACTOR * (np.arange(WINDOW) - WINDOW // 2))
    return np.einsum("ik,jl->ijkl", weights, weights).reshape(FACTOR, FACTOR, WINDOW**2)


def bilinear_transposed(shape, dtype=None):
    """The initial kernel of a transposed convolution of 3x3 coarse pixels."""
    n = FACTOR * WINDOW
    weights = tent(np.arange(n) - (n - 1) / 2)
    return keras.ops.convert_to_tensor(np.outer(weights, weights).reshape(shape), dtype)


@keras.saving.register_keras_serializable(package="examples")
class FromGuide(keras.layers.Layer):
    """A kernel generator: one 1x1 convolution of the guide, added to the bilinear kernels, with
    which training starts, or to their logarithm if a softmax follows."""

    kernel_size = groups = None  # set by the involution layer

    def __init__(self, softmax=True, **kwargs):
        super().__init__(**kwargs)
        kernels = bilinear_kernels()
        self.initial = np.log(kernels + 1e-3) if softmax else kernels

    def build(self, shapes):
        self.convolution = keras.layers.Conv2D(WINDOW**2, 1, kernel_initializer="zeros")
        self.convolution.build(shapes[1])

    def call(self, features):
        coarse, guide = features
        initial = keras.ops.convert_to_tensor(self.initial[None], guide.dtype)
        rows, columns = keras.ops.shape(coarse)[1:3]
        return self.convolution(guide) + keras.ops.tile(initial, (1, rows, columns, 1))


def network(arm, hidden):
    layers = keras.layers
    luminance = keras.Input((None, None, 1), name="luminance")
    coarse = keras.Input((None, None, 2), name="chroma")
    inputs = [luminance, coarse]
    bilinear = layers.UpSampling2D(FACTOR, interpolation="bilinear")(coarse)

    def static():
        # The windows of 3x3 coarse pixels that the kernels of the other arms have.
        shape = FACTOR * WINDOW
        channels = [coarse[..., i : i + 1] for i in range(2)]
        shared = layers.Conv2DTranspose(
            1,
            shape,
            FACTOR,
            padding="same",
            use_bias=False,
            kernel_initializer=bilinear_transposed,
        )
        return layers.Concatenate()([shared(channel) for channel in channels])

    if arm == "static":
        return keras.Model(inputs, static(), name=arm)
    guide = luminance * 0 if arm == "no guide" else luminance
    # How a pixel differs from the mean of its block: what the coarse chroma cannot contain.
    means = layers.AveragePooling2D(FACTOR)(guide)
    detail = guide - layers.UpSampling2D(FACTOR)(means)
    x = layers.Concatenate()([guide, detail, bilinear])
    for rate in DILATIONS:
        x = layers.Conv2D(WIDTH, 3, padding="same", dilation_rate=rate, activation="relu")(x)
    x = layers.Conv2D(hidden, 1, activation="relu", name="features")(x)
    if arm in ("involution", "signed", "no guide"):
        softmax = arm != "signed"
        upsampling = InvolutionUpSampling2D(
            FACTOR,
            kernel_size=WINDOW,
            kernel_generator=FromGuide(softmax),
            kernel_softmax=softmax,
            name="upsampling",
        )
        outputs = upsampling(coarse, guide=x)
    elif arm == "direct":
        outputs = bilinear + layers.Conv2D(2, 1, kernel_initializer="zeros")(x)
    else:
        gate = layers.Conv2D(1, 1, activation="sigmoid")(x)
        outputs = gate * static() + (1 - gate) * layers.UpSampling2D(FACTOR)(coarse)
    return keras.Model(inputs, outputs, name=arm.replace(" ", "_"))


def networks():
    first = network("involution", WIDTH)
    models = {"involution": first}
    for arm in ("signed", "no guide", "direct", "gated static"):
        make = functools.partial(network, arm)
        models[arm] = experiments.of_size(first, make, range(1, 8 * WIDTH))
    return {**models, "static": network("static", 0)}


def inner(images):
    """Without the pixels whose windows leave the image."""
    return images[:, FACTOR:-FACTOR, FACTOR:-FACTOR]


def squared_error(truth, outputs):
    return keras.ops.mean(keras.ops.square(inner(truth) - inner(outputs)))


def quality(outputs, truth, edges):
    """Peak signal-to-noise ratio in dB, of all pixels and near edges."""
    errors = np.square(inner(outputs) - inner(truth)).mean(axis=-1)
    edges = inner(edges[None])
    return {
        "quality": -10 * np.log10(errors.mean()),
        "edges": -10 * np.log10(errors[edges].mean()),
    }


# --- Experiment -----------------------------------------------------------------------------------


def main():
    options = experiments.arguments(__doc__, "guided_upsampling")
    steps, every, side, batch = (450, 75, 96, 8) if options.full else (60, 30, 48, 4)
    results = experiments.Results(options)
    images = photographs.load()
    names = list(images) if options.full else ["chelsea"]
    for seed, name in enumerate(names):
        others = [image for other, image in images.items() if other != name]
        *test, truth = split(images[name][None])
        edges = near_edges(test[0][0, ..., 0])

        def batches(count, random, others=others):
            *inputs, chroma = split(photographs.crops(others, count * batch, side, random))
            return inputs, chroma, batch

        def evaluate(model, test=test, truth=truth, edges=edges):
            return quality(model.predict_on_batch(test), truth, edges)

        key = {"task": "chroma", "seed": seed}
        if not results.has(**key, arm="bilinear"):
            enlarged = keras.layers.UpSampling2D(FACTOR, interpolation="bilinear")(test[1])
            found = quality(keras.ops.convert_to_numpy(enlarged), truth, edges)
            found = {metric: float(value) for metric, value in found.items()}
            curve = [(step, found["quality"]) for step in (every, steps)]
            results.add(**key, arm="bilinear", parameters=0, curve=curve, **found, seconds=0)
        keep = functools.partial(save, results.folder, name, test, truth)
        experiments.train_arms(
            results, key, networks, batches, squared_error, evaluate, steps, every, keep
        )
    for metric, title in (("quality", "all pixels"), ("edges", "within two pixels of an edge")):
        text = f"Chroma, {title}: PSNR in dB; left out: {', '.join(names)}"
        results.table(metric, text, "involution", task="chroma")
    draw(results, names)


def save(folder, name, test, truth, arm, model):
    """Saves a crop of an output, and the kernels there."""
    height, width = (n // 2 // FACTOR * FACTOR for n in truth.shape[1:3])
    crop = (slice(height - 64, height + 64), slice(width - 64, width + 64))
    output = model.predict_on_batch(test)[0]
    arrays = {"luminance": test[0][0][crop] + 0.5, "truth": truth[0][crop], "output": output[crop]}
    if arm == "signed":
        features = keras.Model(model.inputs, model.get_layer("features").output)
        generator = model.get_layer("upsampling").kernel_generator
        kernels = generator([test[1], features.predict_on_batch(test)])
        arrays["kernels"] = keras.ops.convert_to_numpy(kernels)[0][crop]
    file = folder / f"{name}-{arm.replace(' ', '-')}.npz"
    experiments.save_arrays(file, arrays)


def draw(results, names):
    curves = Figure(figsize=(3.4 * min(len(names), 4), 3.2 * -(-len(names) // 4) + 0.6))
    curves.set_layout_engine("constrained")
    axes = curves.subplots(-(-len(names) // 4), min(len(names), 4), squeeze=False).ravel()
    for seed, (ax, name) in enumerate(zip(axes, names, strict=False)):
        experiments.draw_curves(ax, results, "PSNR (dB)", task="chroma", seed=seed)
        ax.set_title(name)
    for ax in axes[len(names) :]:
        ax.axis("off")
    curves.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    curves.savefig(results.folder / "curves.png", dpi=110)
    for name in names:
        _draw_pictures(results.folder, name)


def _draw_pictures(folder, name):
    arms = ("involution", "signed", "no-guide", "direct", "gated-static", "static")
    found = {arm: np.load(folder / f"{name}-{arm}.npz") for arm in arms}
    first = {key: found["signed"][key].astype("float32") for key in found["signed"].files}
    figure = Figure(figsize=(2.2 * 7, 4.8), layout="constrained")
    axes = figure.subplots(2, 7)
    chroma = {
        "truth": first["truth"],
        **{a.replace("-", " "): f["output"] for a, f in found.items()},
    }
    for ax, (title, values) in zip(axes[0], chroma.items(), strict=True):
        colors = np.concatenate([first["luminance"], values.astype("float32")], -1)
        ax.imshow(np.clip(colors @ np.linalg.inv(TO_YCC).T, 0, 1))
        ax.set_title(title)
    axes[1, 0].imshow(first["luminance"][..., 0], cmap="gray")
    axes[1, 0].set_title("luminance")
    coarse = first["truth"].reshape(16, FACTOR, 16, FACTOR, 2).mean(axis=(1, 3))
    gray = np.concatenate([np.full((16, 16, 1), 0.5, "float32"), coarse], -1)
    axes[1, 1].imshow(np.clip(gray @ np.linalg.inv(TO_YCC).T, 0, 1))
    axes[1, 1].set_title("chroma, coarse")
    # Of pixels at the same place of their coarse pixels, those whose kernels differ most and least
    # from the initial ones, and one between them.
    kernels = first["kernels"][3::FACTOR, 3::FACTOR]
    change = np.square(kernels - bilinear_kernels()[3, 3]).sum(-1)
    order = change.argsort(axis=None)
    for ax, number in zip(axes[1, 2:5], order[[-1, len(order) // 2, 0]], strict=True):
        row, column = (3 + FACTOR * n for n in np.unravel_index(number, change.shape))
        ax.imshow(
            first["kernels"][row, column].reshape(WINDOW, WINDOW), "RdBu", vmin=-0.8, vmax=0.8
        )
        ax.set_title(f"kernel at {row}, {column}")
    for ax in axes.flat:
        ax.axis("off")
    figure.savefig(folder / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
