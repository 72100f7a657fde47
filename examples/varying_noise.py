"""Denoising where the noise varies by place and its standard deviation is known.

This is the setting of kernel-predicting denoisers of rendered images. A Gaussian field with
covariance exp(-distance / 6) has noise of standard deviation 0.1 at a random half of the places,
and 1.0 at the others. All arms have the same trunk, three 3x3 convolutions of the noisy field and
the map of the noise, and equal numbers of parameters within 2 %; their heads differ:

    involution     49 weights of a softmax for each place, applied to its 7x7 window
    gated static   a 7x7 kernel for all places, whose taps are weighted by a gate of their places
    direct         the noise, which is subtracted

Metric: -10 log10 of the mean squared error, in dB. Bounds for 7x7 windows, computed here: the best
fixed kernel, a fixed kernel times the inverse variance of the noise, and the best linear kernel of
each place. Then the same on photographs, with noise of 0.02 and 0.2: the arms are trained on all
but one, and tested on that one.

Expectation, written before the first full run: involution closes 90 % of the gap between the best
fixed and the best linear kernels, in a fifth of the steps that direct regression takes, which may
never reach it; gated static ends at the bound of the inverse variance. On photographs involution
leads direct regression by less than on the field, 0.3 dB.

    python examples/varying_noise.py            # two minutes
    python examples/varying_noise.py --full
"""

import functools

import experiments
import keras
import numpy as np
import photographs
from matplotlib.figure import Figure
from scipy.optimize import minimize

from involution import Involution2D, kernel_generators, ops

LENGTH, LEVELS, WINDOW, SIDE, BATCH = 6, (0.1, 1.0), 7, 32, 16
PHOTO_LEVELS = (0.02, 0.2)
MARGIN = WINDOW // 2
ARMS = ("involution", "gated static", "direct")


# --- Bounds ---------------------------------------------------------------------------------------


@functools.cache
def bounds(samples=4000, seed=0) -> dict[str, float]:
    """Of linear kernels of a 7x7 window, in dB: best fixed, fixed times inverse variance, best."""
    offsets = np.arange(WINDOW) - MARGIN
    places = np.stack(np.meshgrid(offsets, offsets, indexing="ij"), -1).reshape(-1, 2)
    distance = np.linalg.norm(places[:, None] - places, axis=-1)
    covariance, center = np.exp(-distance / LENGTH), WINDOW**2 // 2
    with_center = covariance[center]
    random = np.random.default_rng(seed)
    variance = np.square(np.where(random.random((samples, WINDOW**2)) < 0.5, *LEVELS))

    def best(noise):
        total = covariance + np.eye(WINDOW**2) * noise[..., None, :]
        solution = np.linalg.solve(total, np.broadcast_to(with_center, noise.shape)[..., None])
        return 1 - solution[..., 0] @ with_center

    rings = np.unique(distance[center].round(6), return_inverse=True)[1]

    def of_rings(logits):
        weights = np.exp(logits)[rings] / variance
        weights /= weights.sum(axis=1, keepdims=True)
        signal = np.einsum("ni,ij,nj->n", weights, covariance, weights)
        return np.mean(1 + signal + (weights**2 * variance).sum(1) - 2 * weights @ with_center)

    fixed = best(np.full(WINDOW**2, np.mean(np.square(LEVELS))))
    inverse_variance = minimize(of_rings, np.zeros(rings.max() + 1)).fun
    errors = {
        "best fixed kernel": fixed,
        "fixed kernel / variance": inverse_variance,
        "best kernel of each place": best(variance).mean(),
    }
    return {name: float(decibels(error)) for name, error in errors.items()}


def decibels(error):
    return -10 * np.log10(error)


# --- Data -----------------------------------------------------------------------------------------


@functools.cache
def _root():
    places = np.stack(np.meshgrid(*[np.arange(SIDE)] * 2, indexing="ij"), -1).reshape(-1, 2)
    distance = np.linalg.norm(places[:, None] - places, axis=-1)
    return np.linalg.cholesky(np.exp(-distance / LENGTH) + 1e-9 * np.eye(SIDE**2))


def fields(count, random) -> np.ndarray:
    values = _root() @ random.normal(size=(SIDE**2, count))
    return values.T.reshape(count, SIDE, SIDE, 1).astype("float32")


def add_noise(clean, levels, random) -> np.ndarray:
    """The noisy images, and the standard deviation of their noise divided by the larger level."""
    deviation = np.where(random.random(clean.shape) < 0.5, *levels)
    noisy = clean + deviation * random.normal(size=clean.shape)
    return np.concatenate([noisy, deviation / max(levels)], axis=-1).astype("float32")


# --- Networks -------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="examples")
class ApplyKernels(keras.layers.Layer):
    """Applies kernels (B, H, W, 49) to images (B, H, W, 1)."""

    def call(self, image, kernels):
        kernels = keras.ops.expand_dims(kernels, -1)
        return ops.involution(image, kernels, kernel_size=WINDOW, groups=1, padding="same")


def negative_distance(shape, dtype=None):
    """Initial logarithm of a static kernel: minus the distance from the center."""
    offsets = np.arange(WINDOW) - MARGIN
    distance = np.hypot(offsets[:, None], offsets)
    return keras.ops.convert_to_tensor(-distance.reshape(shape), dtype)


def network(arm, width, hidden):
    layers = keras.layers
    inputs = keras.Input((None, None, 2))
    noisy = inputs[..., :1]
    x = inputs
    for _ in range(3):
        x = layers.Conv2D(width, 3, padding="same", activation="relu")(x)
    x = layers.Conv2D(hidden, 1, activation="relu")(x)
    if arm == "involution":
        kernels = layers.Conv2D(WINDOW**2, 1, activation="softmax", name="kernels")(x)
        outputs = ApplyKernels()(noisy, kernels)
    elif arm == "direct":
        outputs = noisy - layers.Conv2D(1, 1)(x)
    else:
        # Both positive: with weights of any sign the quotient overflowed in one of five runs.
        gate = keras.ops.exp(keras.ops.clip(layers.Conv2D(1, 1)(x), -8, 8))
        static = Involution2D(
            WINDOW,
            groups=1,
            kernel_generator=kernel_generators.Static(kernel_initializer=negative_distance),
            kernel_softmax=True,
        )
        outputs = static(noisy * gate) / static(gate)
    return keras.Model(inputs, outputs, name=arm.replace(" ", "_"))


def networks(width):
    """The arms; the numbers of hidden channels make their sizes equal."""
    first = network("involution", width, width)
    others = {
        arm: experiments.of_size(
            first, functools.partial(network, arm, width), range(width, 8 * width)
        )
        for arm in ARMS[1:]
    }
    return {"involution": first, **others}


def inner(images):
    """Without the places whose windows leave the image."""
    return images[:, MARGIN:-MARGIN, MARGIN:-MARGIN]


def squared_error(truth, outputs):
    return keras.ops.mean(keras.ops.square(inner(truth) - inner(outputs)))


def quality(model, x, truth):
    parts = [model.predict_on_batch(x[i : i + 32]) for i in range(0, len(x), 32)]
    outputs = np.concatenate(parts)
    return decibels(np.mean(np.square(inner(truth) - inner(outputs))))


# --- Experiment -----------------------------------------------------------------------------------


def train(results, key, noisy_and_clean, x, truth, steps, every):
    experiments.train_arms(
        results,
        key,
        functools.partial(networks, key["width"]),
        lambda count, random: (*noisy_and_clean(count * BATCH, random), BATCH),
        squared_error,
        lambda model: {"quality": quality(model, x, truth)},
        steps,
        every,
        keep(results, key, x, truth),
    )


def keep(results, key, x, truth):
    """A function that saves a network's output for a crop of the first image, and its kernels."""
    if key["seed"] != 0 or key["width"] != 16:
        return None

    def save(arm, model):
        file = results.folder / f"{key['task']}-{arm.replace(' ', '-')}.npz"
        _save(file, model, x, truth)

    return save


def _save(file, model, x, truth):
    arrays = {"input": x[0], "truth": truth[0], "output": model.predict(x[:1], verbose=0)[0]}
    if model.name == "involution":
        kernels = keras.Model(model.input, model.get_layer("kernels").output)
        arrays["kernels"] = kernels.predict(x[:1], verbose=0)[0]
    crop = tuple(slice(max(n // 2 - 48, 0), n // 2 + 48) for n in truth.shape[1:3])
    experiments.save_arrays(file, {name: array[crop] for name, array in arrays.items()})


def on_fields(results, options, limits):
    steps, every, widths = (1000, 50, (8, 16, 32)) if options.full else (100, 50, (16,))
    random = np.random.default_rng(1_000_000)
    truth = fields(128, random)
    x = add_noise(truth, LEVELS, random)

    def batches(count, random):
        clean = fields(count, random)
        return add_noise(clean, LEVELS, random), clean

    for width in widths:
        for seed in range(options.seeds):
            key = {"task": "field", "width": width, "seed": seed}
            train(results, key, batches, x, truth, steps, every)
    low, _, high = limits.values()
    for run in results.of(task="field"):
        run["gap"] = (run["quality"] - low) / (high - low)
        run["steps"] = experiments.steps_to(run["curve"], low + 0.9 * (high - low))
    for width in widths:
        key = {"task": "field", "width": width}
        results.table("quality", f"Field, {width} channels: dB", "involution", **key)
        results.table("gap", f"Field, {width} channels: fraction of the gap", "involution", **key)
        print(f"\nSteps to 90 % of the gap: {results.values('steps', **key)}")


def on_photographs(results, options):
    """Each photograph is left out once; its number is the seed."""
    steps, every = (1000, 100) if options.full else (50, 25)
    images = {
        name: image.mean(axis=-1, keepdims=True) for name, image in photographs.load().items()
    }
    names = list(images) if options.full else ["chelsea"]
    for seed, name in enumerate(names):
        others = [image for other, image in images.items() if other != name]
        truth = images[name][None]
        x = add_noise(truth, PHOTO_LEVELS, np.random.default_rng(seed))

        def batches(count, random, others=others):
            clean = photographs.crops(others, count, SIDE, random)
            return add_noise(clean, PHOTO_LEVELS, random), clean

        key = {"task": "photograph", "width": 16, "seed": seed}
        train(results, key, batches, x, truth, steps, every)
    title = f"Photographs left out ({', '.join(names)}): PSNR in dB"
    results.table("quality", title, "involution", task="photograph")


def draw(results, limits):
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    experiments.draw_curves(axes[0], results, "dB", limits.items(), task="field", width=16)
    axes[0].set_title("field")
    experiments.draw_curves(axes[1], results, "PSNR (dB)", task="photograph")
    axes[1].set_title("photographs left out")
    axes[0].legend(loc="lower right")
    figure.savefig(results.folder / "curves.png", dpi=110)
    for task in ("field", "photograph"):
        files = {arm: results.folder / f"{task}-{arm.replace(' ', '-')}.npz" for arm in ARMS}
        _draw_pictures(results.folder / f"{task}.png", {a: np.load(f) for a, f in files.items()})


def _draw_pictures(file, found):
    first = found["involution"]
    images = {"clean": first["truth"], "noisy": first["input"][..., :1]}
    images |= {arm: arrays["output"] for arm, arrays in found.items()}
    low, high = first["truth"].min(), first["truth"].max()
    figure = Figure(figsize=(2.4 * len(images), 5.2), layout="constrained")
    axes = figure.subplots(2, len(images))
    for ax, (name, image) in zip(axes[0], images.items(), strict=True):
        ax.imshow(image[..., 0].astype("float32"), cmap="gray", vmin=low, vmax=high)
        ax.set_title(name)
    axes[1, 0].imshow(first["input"][..., 1].astype("float32"), cmap="gray")
    axes[1, 0].set_title("noise map")
    height, width = first["truth"].shape[:2]
    places = [(height // 4, width // 4), (height // 2, width // 2), (height // 2, width // 4)]
    for ax, (row, column) in zip(axes[1, 1:4], places, strict=True):
        ax.imshow(first["kernels"][row, column].reshape(WINDOW, WINDOW).astype("float32"))
        ax.set_title(f"kernel at {row}, {column}")
    for ax in axes.flat:
        ax.axis("off")
    figure.savefig(file, dpi=110)


def main():
    options = experiments.arguments(__doc__, "varying_noise")
    limits = bounds()
    for name, value in limits.items():
        print(f"{name}: {value:.2f} dB")
    results = experiments.Results(options)
    on_fields(results, options, limits)
    on_photographs(results, options)
    draw(results, limits)


if __name__ == "__main__":
    main()
