"""LSNet in PyTorch, written from the paper, with the names of its checkpoints.

It shares no code with the package; the involution is computed by ``unfold``.
"""

import itertools

import torch
from torch import nn
from torch.nn import functional

VARIANTS = {
    "lsnet_t": ((64, 128, 256, 384), (0, 2, 8, 10)),
    "lsnet_s": ((96, 192, 320, 448), (1, 2, 8, 10)),
    "lsnet_b": ((128, 256, 384, 512), (4, 6, 8, 10)),
}
HEADS, KEY_CHANNELS, SIDE = 4, 16, 4


class ConvBN(nn.Module):
    def __init__(self, channels, filters, kernel_size=1, stride=1, groups=1):
        super().__init__()
        self.c = nn.Conv2d(
            channels, filters, kernel_size, stride, kernel_size // 2, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(filters)

    def forward(self, x):
        return self.bn(self.c(x))


def depthwise(channels, kernel_size, stride=1):
    return ConvBN(channels, channels, kernel_size, stride, channels)


class Local(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = depthwise(channels, 3)
        self.conv1 = depthwise(channels, 1)

    def forward(self, x):
        return self.conv(x) + self.conv1(x) + x


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        hidden = max(8, 8 * int(channels / 32 + 0.5))
        self.conv_reduce = nn.Conv2d(channels, hidden, 1)
        self.conv_expand = nn.Conv2d(hidden, channels, 1)

    def forward(self, x):
        gate = self.conv_reduce(x.mean((2, 3), keepdim=True)).relu()
        return x * self.conv_expand(gate).sigmoid()


class Perception(nn.Module):
    def __init__(self, channels):
        super().__init__()
        half, groups = channels // 2, channels // 8
        self.cv1 = ConvBN(channels, half)
        self.cv2 = depthwise(half, 7)
        self.cv3 = ConvBN(half, half)
        self.cv4 = nn.Conv2d(half, 9 * groups, 1)
        self.norm = nn.GroupNorm(groups, 9 * groups)

    def forward(self, x):
        x = self.cv3(self.cv2(self.cv1(x).relu())).relu()
        return self.norm(self.cv4(x))


class LSConv(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.lkp = Perception(channels)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        n, channels, height, width = x.shape
        groups = channels // 8
        kernels = self.lkp(x).reshape(n, 1, groups, 9, height, width)
        patches = functional.unfold(x, 3, padding=1).reshape(n, 8, groups, 9, height, width)
        return self.bn((kernels * patches).sum(3).reshape(x.shape)) + x


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        keys = HEADS * KEY_CHANNELS
        self.qkv = ConvBN(channels, 2 * keys + channels)
        self.dw = depthwise(keys, 3)
        self.proj = nn.Sequential(nn.ReLU(), ConvBN(channels, channels))
        self.attention_biases = nn.Parameter(torch.zeros(HEADS, SIDE * SIDE))
        positions = list(itertools.product(range(SIDE), range(SIDE)))
        indices = [[abs(a - c) * SIDE + abs(b - d) for c, d in positions] for a, b in positions]
        self.register_buffer("attention_bias_idxs", torch.tensor(indices))

    def forward(self, x):
        n, channels, height, width = x.shape
        keys = HEADS * KEY_CHANNELS
        q, k, v = self.qkv(x).split((keys, keys, channels), 1)
        q, k, v = (y.reshape(n, HEADS, -1, height * width) for y in (self.dw(q), k, v))
        scores = q.transpose(-1, -2) @ k * KEY_CHANNELS**-0.5
        weights = (scores + self.attention_biases[:, self.attention_bias_idxs]).softmax(-1)
        return self.proj((v @ weights.transpose(-1, -2)).reshape(n, channels, height, width))


class FFN(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.pw1 = ConvBN(channels, 2 * channels)
        self.pw2 = ConvBN(2 * channels, channels)

    def forward(self, x):
        return self.pw2(self.pw1(x).relu())


class Residual(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.m = m

    def forward(self, x):
        return x + self.m(x)


class Block(nn.Module):
    def __init__(self, channels, stage, index):
        super().__init__()
        self.se = nn.Identity()
        if index % 2 == 0:
            self.mixer = Local(channels)
            self.se = SqueezeExcite(channels)
        elif stage == 4:
            self.mixer = Residual(Attention(channels))
        else:
            self.mixer = LSConv(channels)
        self.ffn = Residual(FFN(channels))

    def forward(self, x):
        return self.ffn(self.se(self.mixer(x)))


class Head(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.bn = nn.BatchNorm1d(channels)
        self.l = nn.Linear(channels, classes)

    def forward(self, x):
        return self.l(self.bn(x))


class LSNet(nn.Module):
    def __init__(self, name, classes=7, distilled=False):
        super().__init__()
        widths, blocks = VARIANTS[name]
        first = widths[0]
        self.patch_embed = nn.Sequential(
            ConvBN(3, first // 4, 3, 2),
            nn.ReLU(),
            ConvBN(first // 4, first // 2, 3, 2),
            nn.ReLU(),
            ConvBN(first // 2, first, 3, 2),
        )
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True), start=1):
            before = widths[stage - 2]
            down = [] if stage == 1 else [depthwise(before, 3, 2), ConvBN(before, width)]
            own = [Block(width, stage, index) for index in range(count)]
            setattr(self, f"blocks{stage}", nn.Sequential(*down, *own))
        self.head = Head(widths[-1], classes)
        if distilled:
            self.head_dist = Head(widths[-1], classes)

    def forward(self, x):
        for part in (self.patch_embed, self.blocks1, self.blocks2, self.blocks3, self.blocks4):
            x = part(x)
        x = x.mean((2, 3))
        return (
            (self.head(x) + self.head_dist(x)) / 2 if hasattr(self, "head_dist") else self.head(x)
        )


def network(name, seed=0, **options):
    """A network with random weights and statistics, in inference, in float64."""
    torch.manual_seed(seed)
    model = LSNet(name, **options).double().eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith(("running_var", "norm.weight")):
                tensor.uniform_(0.8, 1.2)
            elif key.endswith(("running_mean", "bias")):
                tensor.uniform_(-0.2, 0.2)
            elif key.endswith("bn.weight"):
                tensor.uniform_(0.4, 0.8)
            elif key.endswith("attention_biases"):
                tensor.normal_(0, 1)
    return model
