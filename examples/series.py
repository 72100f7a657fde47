"""Time series forecasting by causal involutions and convolutions with equal parameter counts.

The Mackey-Glass equation, a standard benchmark: x' = 0.2 x(t - 17) / (1 + x(t - 17)^10) - 0.1 x.
From 128 values, one per unit of time, a causal network predicts the value 20 units after each of
them. Metric on a later part of the series: root mean square error relative to the standard
deviation.
"""

import common
import keras
import numpy as np
from matplotlib.figure import Figure

from involution import Involution1D

LENGTH, HORIZON = 128, 20


def mackey_glass(count, substeps=10, delay=17):
    """One value per unit of time, by the Runge-Kutta method with ten steps per unit."""
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
    """Maps a series (B, length, 1) causally to predictions of the same shape."""
    layers = keras.layers
    x = inputs = keras.Input((None, 1))
    x = layers.Conv1D(width, 5, padding="causal")(x)
    for block in range(blocks):
        y = layers.BatchNormalization(momentum=0.9)(x)
        y = layers.Conv1D(width, 1, activation="relu")(y)
        rate = 2**block
        if spatial == "involution":
            # Causal padding; kernels are generated from the center of each window.
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
    starts = random.integers(0, len(series) - LENGTH - HORIZON, count)
    x = np.stack([series[s : s + LENGTH] for s in starts])
    y = np.stack([series[s + HORIZON : s + HORIZON + LENGTH] for s in starts])
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
    predictions, rows = {}, []
    for model in (first, second):
        common.train(model, x, y, "mean_squared_error", epochs, options.seed)
        # The first half of the outputs has too little context.
        prediction = model.predict(x_test, verbose=0)[:, LENGTH // 2 :]
        error = np.sqrt(np.mean((prediction - y_test[:, LENGTH // 2 :]) ** 2))
        rows.append((model.name, common.size(model), f"{error:.4f}"))
        predictions[model.name] = prediction[0, :, 0]
    error = np.sqrt(np.mean((x_test - y_test) ** 2))
    common.table("relative RMSE 20 units ahead", [("last value", 0, f"{error:.4f}"), *rows])
    draw(predictions, y_test[0, LENGTH // 2 :, 0], options.output)


def draw(predictions, truth, file):
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    ax = figure.subplots()
    ax.plot(truth, color="black", label="series")
    for (name, prediction), color in zip(predictions.items(), ("#0072b2", "#d55e00"), strict=True):
        ax.plot(prediction, color=color, linestyle="--", label=f"{name}, {HORIZON} units ahead")
    ax.set_xlabel("time")
    ax.legend()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
