"""NumPy reference in float64 of the networks of public checkpoints, to verify conversions.

It uses a checkpoint's tensors in their own layout and shares no code with the layers: images are
channels first, kernels (out, in, height, width), the channels of generated kernels group-major.
Image sizes must be divisible by the strides.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


class RedNet:
    """RedNet on the tensors of an official or a PaddleClas checkpoint.

    Args:
        tensors: Arrays by name, such as ``stem.0.conv.weight``.
        blocks: Number of blocks of each stage.
        statistics: Name suffixes of batch normalization's mean and variance.
        linear_transposed: Whether the classifier's matrix is (out, in), as in PyTorch.
    """

    def __init__(self, tensors, blocks, statistics, linear_transposed):
        self.tensors = tensors
        self.blocks = blocks
        self.statistics = statistics
        self.linear_transposed = linear_transposed

    def maps(self, x) -> list[np.ndarray]:
        """Feature maps (N, C, H, W) of all stages, for images (N, 3, H, W); 32 divides H and W."""
        x = self._relu_bn(self._convolution(x, "stem.0.conv", 2), "stem.0.bn")
        x = self._relu_bn(self._involution(x, "stem.1", 1), "stem.2")
        x = self._relu_bn(self._convolution(x, "stem.4.conv", 1), "stem.4.bn")
        x = windows(x, 3, 2, -np.inf).max(axis=(-2, -1))
        outputs = []
        for stage, blocks in enumerate(self.blocks, start=1):
            for block in range(blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                x = self._block(x, f"layer{stage}.{block}", stride, block == 0)
            outputs.append(x)
        return outputs

    def logits(self, x) -> np.ndarray:
        """Logits (N, classes)."""
        matrix = self._get("fc.weight")
        matrix = matrix.T if self.linear_transposed else matrix
        return self.maps(x)[-1].mean(axis=(2, 3)) @ matrix + self._get("fc.bias")

    def _get(self, name):
        return np.asarray(self.tensors[name], "float64")

    def _block(self, x, name, stride, first):
        y = self._relu_bn(self._convolution(x, f"{name}.conv1", 1), f"{name}.bn1")
        y = self._relu_bn(self._involution(y, f"{name}.conv2", stride), f"{name}.bn2")
        y = self._bn(self._convolution(y, f"{name}.conv3", 1), f"{name}.bn3")
        if first:
            x = self._convolution(x, f"{name}.downsample.0", stride)
            x = self._bn(x, f"{name}.downsample.1")
        return np.maximum(x + y, 0)

    def _involution(self, x, name, stride):
        n, channels, height, width = x.shape
        pooled = x.reshape(n, channels, height // stride, stride, width // stride, stride)
        hidden = self._convolution(pooled.mean(axis=(3, 5)), f"{name}.conv1.conv", 1)
        hidden = self._relu_bn(hidden, f"{name}.conv1.bn")
        kernel = self._convolution(hidden, f"{name}.conv2.conv", 1)
        kernel = kernel + self._get(f"{name}.conv2.conv.bias")[:, None, None]
        groups = channels // 16
        kernel = kernel.reshape(n, groups, -1, *kernel.shape[2:])
        size = int(kernel.shape[2] ** 0.5)
        patches = windows(x, size, stride).reshape(n, groups, 16, *kernel.shape[3:], size * size)
        return np.einsum("ngkhw,ngchwk->ngchw", kernel, patches).reshape(
            n, channels, *patches.shape[3:5]
        )

    def _convolution(self, x, name, stride):
        kernel = self._get(f"{name}.weight")
        patches = windows(x, kernel.shape[-1], stride)
        return np.moveaxis(np.tensordot(patches, kernel, ((1, 4, 5), (1, 2, 3))), -1, 1)

    def _bn(self, x, name):
        mean, variance = (self._get(f"{name}.{s}")[:, None, None] for s in self.statistics)
        scale, shift = (self._get(f"{name}.{s}")[:, None, None] for s in ("weight", "bias"))
        return (x - mean) / np.sqrt(variance + 1e-5) * scale + shift

    def _relu_bn(self, x, name):
        return np.maximum(self._bn(x, name), 0)


def windows(x, size, stride, value=0.0):
    """The windows of (N, C, H, W), symmetrically padded: (N, C, H', W', size, size)."""
    padding = ((0, 0), (0, 0), (size // 2,) * 2, (size // 2,) * 2)
    padded = np.pad(x, padding, constant_values=value)
    return sliding_window_view(padded, (size, size), (2, 3))[:, :, ::stride, ::stride]


def keras_io_kernels(layers, x) -> list[np.ndarray]:
    """The kernels (N, H, W, 9) of the keras.io example's three involutions.

    Args:
        layers: The arrays of each in Keras 2's order: kernel, bias, gamma, beta, second kernel,
            second bias, moving mean, moving variance.
        x: Images (N, H, W, 3) of sizes divisible by 4.
    """
    kernels = []
    for weights in layers:
        reduce, bias, gamma, beta, expand, expand_bias, mean, variance = (
            np.asarray(array, "float64") for array in weights
        )
        hidden = (x @ reduce[0, 0] + bias - mean) / np.sqrt(variance + 1e-3) * gamma + beta
        kernel = np.maximum(hidden, 0) @ expand[0, 0] + expand_bias
        kernels.append(kernel)
        patches = windows(np.moveaxis(x, -1, 1), 3, 1)
        y = np.einsum("nhwk,nchwk->nhwc", kernel, patches.reshape(*patches.shape[:4], 9))
        n, height, _, channels = y.shape
        y = np.maximum(y, 0).reshape(n, height // 2, 2, -1, 2, channels)
        x = y.max(axis=(2, 4)) if len(kernels) < len(layers) else x
    return kernels
