"""A chaotic series foretold, by involutions and by convolutions of equal size.

The Mackey-Glass equation, a standard test of forecasting: x' = 0.2 x(t - 17) / (1 + x(t - 17)^10) -
0.1 x. From 128 values, one for each unit of time, a network foretells the value 20 units after each
of them, seeing no later ones. Measured on a later stretch of the series: root mean square error,
relative to the standard deviation.
"""

import common
import keras
import numpy as np
from matplotlib.figure import Figure

from involution import Involution1D

LENGTH, AHEAD = 128, 20


def mackey_glass(count, substeps=10, delay=17):
    """One value for each unit of time, by the method of Runge and Kutta with steps of a tenth."""
    step, lag = 1 / substeps, delay * substeps
    x = np.full(lag + (count + 500) * substeps, 1.2)

    def slope(value, delayed):
        return 0.2 * delayed / (1 + delayed**10) - 0.1 * value

    for i in range(lag, len(x) - 1):
        old, middle, new = x[i - lag], (x[i - lag] + x[i - lag + 1]) / 2, x[i - lag + 1]
        a = slope(x[i], old)
        b = slope(x[i] + step / 2 * a, middle)
        c = slope(x[i] + step / 2 * b, middle)
        d = slope(x[i] + step * c, new)
        x[i + 1] = x[i] + step / 6 * (a + 2 * b + 2 * c + d)
    return x[lag + 500 * substeps :: substeps].astype("float32")


def network(width, spatial="involution", blocks=4):
    """From a series (B, length, 1) to what follows each value, seeing nothing after it."""
    layers = keras.layers
    x = inputs = keras.Input((None, 1))
    x = layers.Conv1D(width, 5, padding="causal")(x)
    for block in range(blocks):
        y = layers.BatchNormalization(momentum=0.9)(x)
        y = layers.Conv1D(width, 1, activation="relu")(y)
        rate = 2**block
        if spatial == "involution":
            # Only values before; kernels are generated from the middle one of each window.
            y = layers.ZeroPadding1D((4 * rate, 0))(y)
            y = Involution1D(
                5, padding="valid", dilation_rate=rate, group_channels=max(width // 4, 1)
            )(y)
        else:
            y = layers.Conv1D(width, 3, padding="causal", dilation_rate=rate)(y)
        y = layers.Conv1D(width, 1)(layers.ReLU()(y))
        x = layers.Add()([x, y])
    return keras.Model(inputs, layers.Conv1D(1, 1)(x), name=spatial)


def windows(series, random, count):
    starts = random.integers(0, len(series) - LENGTH - AHEAD, count)
    x = np.stack([series[s : s + LENGTH] for s in starts])
    y = np.stack([series[s + AHEAD : s + AHEAD + LENGTH] for s in starts])
    return x[..., None], y[..., None]


def main():
    options = common.arguments(__doc__, "series.png")
    count, epochs, width = (64, 1, 8) if options.quick else (2048, 40, 16)
    random = np.random.default_rng(options.seed)
    series = mackey_glass(4000)
    series = (series - series.mean()) / series.std()
    x, y = windows(series[:2500], random, count)
    x_test, y_test = windows(series[2500:], random, 256)
    keras.utils.set_random_seed(options.seed)
    first = network(width)
    second = common.nearest(first, lambda w: network(w, "convolution"), range(4, 2 * width))
    drawn, rows = {}, []
    for model in (first, second):
        common.train(model, x, y, "mean_squared_error", epochs, options.seed)
        # The first values have too little before them.
        guess = model.predict(x_test, verbose=0)[:, LENGTH // 2 :]
        error = np.sqrt(np.mean((guess - y_test[:, LENGTH // 2 :]) ** 2))
        rows.append((model.name, common.size(model), f"{error:.4f}"))
        drawn[model.name] = guess[0, :, 0]
    error = np.sqrt(np.mean((x_test - y_test) ** 2))
    common.table("relative error 20 units ahead", [("the last value", 0, f"{error:.4f}"), *rows])
    draw(drawn, y_test[0, LENGTH // 2 :, 0], options.output)


def draw(guesses, truth, file):
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    ax = figure.subplots()
    ax.plot(truth, color="black", label="the series")
    for (name, guess), color in zip(guesses.items(), ("#0072b2", "#d55e00"), strict=True):
        ax.plot(guess, color=color, linestyle="--", label=f"{name}, {AHEAD} units before")
    ax.set_xlabel("units of time")
    ax.legend()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
