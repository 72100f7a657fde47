"""NumPy references, float64 and channels last, for the layer of the keras.io example and that of
the paper's code, and the tables that the example prints. They share no code with the package.

``example`` is the layer of the keras.io example, ``paper`` that of the paper's code. Both originals
reject sizes that the stride does not divide; there the references follow the package: ceil(n /
stride) positions, and partial pooling windows average only values inside the input.
"""

import numpy as np


def relative_error(got, want):
    """The largest difference relative to the largest value."""
    return np.abs(np.asarray(got, "float64") - want).max() / np.abs(want).max()


def randomize(layer, seed=0):
    """Sets random weights; moving variances are positive."""
    rng = np.random.default_rng(seed)
    for weight in layer.weights:
        values = rng.normal(size=tuple(weight.shape))
        weight.assign(np.abs(values) + 0.5 if "variance" in weight.path else values)


def pooled(x, stride, before):
    """Means over stride x stride windows that start at -before, of the values inside the input."""
    _, height, width, channels = x.shape
    rows, columns = -(-height // stride), -(-width // stride)
    y = np.empty((len(x), rows, columns, channels))
    for i, j in np.ndindex(rows, columns):
        top, left = i * stride - before[0], j * stride - before[1]
        window = x[:, max(top, 0) : top + stride, max(left, 0) : left + stride]
        y[:, i, j] = window.mean(axis=(1, 2))
    return y


def generated(x, reduce, reduce_bias, gamma, beta, mean, variance, expand, expand_bias, epsilon):
    """1x1 convolution, batch normalization in inference mode, ReLU, 1x1 convolution."""
    hidden = x @ reduce[0, 0] + reduce_bias
    hidden = (hidden - mean) / np.sqrt(variance + epsilon) * gamma + beta
    return np.maximum(hidden, 0) @ expand[0, 0] + expand_bias


def summed(x, kernel, size, stride, before, group_of):
    """The involution with kernel (B, H', W', taps, G); windows start at -before."""
    _, rows, columns, taps, _ = kernel.shape
    after = size + stride
    padded = np.pad(x, ((0, 0), (before[0], after), (before[1], after), (0, 0)))
    y = np.zeros((*kernel.shape[:3], x.shape[-1]))
    for tap in range(taps):
        i, j = divmod(tap, size)
        patch = padded[:, i : i + rows * stride : stride, j : j + columns * stride : stride]
        y += kernel[:, :, :, tap, group_of] * patch
    return y


def example(x, weights, size, stride, groups):
    """(output, kernel) of the example's layer, from its weights in Keras's order."""
    x, weights = np.float64(x), [np.float64(w) for w in weights]
    window_before = [max((-(-n // stride) - 1) * stride + size - n, 0) // 2 for n in x.shape[1:3]]
    pool_before = [(-n % stride) // 2 for n in x.shape[1:3]]
    kernel = generated(pooled(x, stride, pool_before), *weights, epsilon=1e-3)
    kernel = kernel.reshape(*kernel.shape[:3], size * size, groups)
    group_of = np.arange(x.shape[-1]) % groups
    return summed(x, kernel, size, stride, window_before, group_of), kernel[..., None, :]


def paper(x, weights, size, stride, groups):
    """(output, kernel) of the paper's layer, from weights in the order of ``example`` without the
    first bias, and with the last layer's channels group-major: group * taps + tap."""
    x, (reduce, *others) = np.float64(x), [np.float64(w) for w in weights]
    kernel = generated(pooled(x, stride, (0, 0)), reduce, 0.0, *others, epsilon=1e-5)
    kernel = kernel.reshape(*kernel.shape[:3], groups, size * size).swapaxes(3, 4)
    group_of = np.arange(x.shape[-1]) // (x.shape[-1] // groups)
    return summed(x, kernel, size, stride, (size // 2,) * 2, group_of), kernel


# Rows of the example's summaries: name, class, output shape, parameters.
CNN = [
    ("conv2d_6", "Conv2D", (None, 32, 32, 32), 896),
    ("relu1", "ReLU", (None, 32, 32, 32), 0),
    ("max_pooling2d", "MaxPooling2D", (None, 16, 16, 32), 0),
    ("conv2d_7", "Conv2D", (None, 16, 16, 64), 18_496),
    ("relu2", "ReLU", (None, 16, 16, 64), 0),
    ("max_pooling2d_1", "MaxPooling2D", (None, 8, 8, 64), 0),
    ("conv2d_8", "Conv2D", (None, 8, 8, 64), 36_928),
    ("relu3", "ReLU", (None, 8, 8, 64), 0),
    ("flatten", "Flatten", (None, 4096), 0),
    ("dense", "Dense", (None, 64), 262_208),
    ("dense_1", "Dense", (None, 10), 650),
]
INN = [
    ("input_layer_4", "InputLayer", (None, 32, 32, 3), 0),
    ("inv_1", "Involution", [(None, 32, 32, 3), (None, 32, 32, 9, 1, 1)], 26),
    ("re_lu_4", "ReLU", (None, 32, 32, 3), 0),
    ("max_pooling2d_2", "MaxPooling2D", (None, 16, 16, 3), 0),
    ("inv_2", "Involution", [(None, 16, 16, 3), (None, 16, 16, 9, 1, 1)], 26),
    ("re_lu_6", "ReLU", (None, 16, 16, 3), 0),
    ("max_pooling2d_3", "MaxPooling2D", (None, 8, 8, 3), 0),
    ("inv_3", "Involution", [(None, 8, 8, 3), (None, 8, 8, 9, 1, 1)], 26),
    ("re_lu_8", "ReLU", (None, 8, 8, 3), 0),
    ("flatten_1", "Flatten", (None, 192), 0),
    ("dense_2", "Dense", (None, 64), 12_352),
    ("dense_3", "Dense", (None, 10), 650),
]
# Parameter counts below the tables: total, trainable, non-trainable, optimizer.
CNN_TOTALS = ["957,536 (3.65 MB)", "319,178 (1.22 MB)", "0 (0.00 B)", "638,358 (2.44 MB)"]
INN_TOTALS = ["39,230 (153.25 KB)", "13,074 (51.07 KB)", "6 (24.00 B)", "26,150 (102.15 KB)"]


def rows(model):
    """The rows of a model's summary, in the form of ``CNN``."""
    return [
        (
            layer.name,
            type(layer).__name__,
            [tuple(t.shape) for t in layer.output]
            if isinstance(layer.output, (list, tuple))
            else tuple(layer.output.shape),
            layer.count_params(),
        )
        for layer in model.layers
    ]


def totals(model):
    """The parameter counts below a model's summary, in the form of ``CNN_TOTALS``."""
    printed = []
    model.summary(print_fn=printed.append)
    return [line.split(":")[1].strip() for line in printed[0].splitlines() if " params:" in line]
