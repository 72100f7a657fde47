"""NumPy reference in float64 of LSNet, to verify conversions: see ``numpy_reference``."""

import numpy as np

from involution.models.numpy_reference import windows


class LSNet:
    """LSNet on the tensors of a published checkpoint.

    Args:
        tensors: Arrays by name, such as ``patch_embed.0.c.weight``.
        blocks: Number of blocks of each stage.
        heads: Heads of the attention.
        key_channels: Channels of a head's queries and keys.
    """

    def __init__(self, tensors, blocks, heads, key_channels):
        self.tensors = tensors
        self.blocks = blocks
        self.heads = heads
        self.key_channels = key_channels

    def logits(self, x) -> np.ndarray:
        """Logits (N, classes) for images (N, 3, 224, 224), for which the attention has biases."""
        pooled = self.features(x).mean(axis=(2, 3))
        heads = [head for head in ("head", "head_dist") if f"{head}.l.weight" in self.tensors]
        return np.mean([self._head(pooled, name) for name in heads], axis=0)

    def features(self, x) -> np.ndarray:
        """The last feature map (N, C, 4, 4)."""
        for i in (0, 2, 4):
            x = self._conv_bn(x, f"patch_embed.{i}", 2)
            x = np.maximum(x, 0) if i < 4 else x
        for stage, blocks in enumerate(self.blocks, start=1):
            first = 0
            if stage > 1:
                x = self._conv_bn(x, f"blocks{stage}.0", 2)
                x = self._conv_bn(x, f"blocks{stage}.1")
                first = 2
            for block in range(blocks):
                x = self._block(x, f"blocks{stage}.{first + block}", stage, block)
        return x

    def _block(self, x, name, stage, index):
        if index % 2 == 0:
            x = self._conv_bn(x, f"{name}.mixer.conv") + self._conv_bn(x, f"{name}.mixer.conv1") + x
            gate = x.mean(axis=(2, 3), keepdims=True)
            gate = np.maximum(self._convolution(gate, f"{name}.se.conv_reduce"), 0)
            x = x / (1 + np.exp(-self._convolution(gate, f"{name}.se.conv_expand")))
        elif stage == len(self.blocks):
            x = x + self._attention(x, f"{name}.mixer.m")
        else:
            x = x + self._bn(self._involution(x, f"{name}.mixer"), f"{name}.mixer.bn")
        y = np.maximum(self._conv_bn(x, f"{name}.ffn.m.pw1"), 0)
        return x + self._conv_bn(y, f"{name}.ffn.m.pw2")

    def _involution(self, x, name):
        y = np.maximum(self._conv_bn(x, f"{name}.lkp.cv1"), 0)
        y = self._conv_bn(y, f"{name}.lkp.cv2")
        y = np.maximum(self._conv_bn(y, f"{name}.lkp.cv3"), 0)
        kernel = self._convolution(y, f"{name}.lkp.cv4")
        n, channels, height, width = x.shape
        groups = channels // 8
        grouped = kernel.reshape(n, groups, -1)
        mean, variance = (f(axis=2, keepdims=True) for f in (grouped.mean, grouped.var))
        kernel = ((grouped - mean) / np.sqrt(variance + 1e-5)).reshape(kernel.shape)
        scale, shift = (
            self._get(f"{name}.lkp.norm.{s}")[:, None, None] for s in ("weight", "bias")
        )
        kernel = (kernel * scale + shift).reshape(n, groups, 9, height, width)
        patches = windows(x, 3, 1).reshape(n, channels // groups, groups, height, width, 9)
        return np.einsum("ngkhw,ncghwk->ncghw", kernel, patches).reshape(x.shape)

    def _attention(self, x, name):
        n, channels, height, width = x.shape
        count = self.heads * self.key_channels
        qkv = self._conv_bn(x, f"{name}.qkv")
        queries = self._conv_bn(qkv[:, :count], f"{name}.dw")
        queries, keys, values = (
            part.reshape(n, self.heads, -1, height * width)
            for part in (queries, qkv[:, count : 2 * count], qkv[:, 2 * count :])
        )
        scores = np.einsum("nhcq,nhck->nhqk", queries, keys) * self.key_channels**-0.5
        rows, columns = np.divmod(np.arange(height * width), width)
        offsets = np.abs(rows[:, None] - rows) * width + np.abs(columns[:, None] - columns)
        scores = scores + self._get(f"{name}.attention_biases")[:, offsets]
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        y = np.einsum("nhqk,nhck->nhcq", weights, values).reshape(n, channels, height, width)
        return self._conv_bn(np.maximum(y, 0), f"{name}.proj.1")

    def _head(self, x, name):
        y = self._bn(x[:, :, None, None], f"{name}.bn")[:, :, 0, 0]
        return y @ self._get(f"{name}.l.weight").T + self._get(f"{name}.l.bias")

    def _get(self, name):
        return np.asarray(self.tensors[name], "float64")

    def _conv_bn(self, x, name, stride=1):
        return self._bn(self._convolution(x, f"{name}.c", stride), f"{name}.bn")

    def _convolution(self, x, name, stride=1):
        kernel = self._get(f"{name}.weight")
        patches = windows(x, kernel.shape[-1], stride)
        if kernel.shape[1] == 1 < x.shape[1]:
            y = np.einsum("nchwij,cij->nchw", patches, kernel[:, 0])
        else:
            y = np.moveaxis(np.tensordot(patches, kernel, ((1, 4, 5), (1, 2, 3))), -1, 1)
        if f"{name}.bias" in self.tensors:
            y = y + self._get(f"{name}.bias")[:, None, None]
        return y

    def _bn(self, x, name):
        mean, variance, scale, shift = (
            self._get(f"{name}.{s}")[:, None, None]
            for s in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / np.sqrt(variance + 1e-5) * scale + shift
