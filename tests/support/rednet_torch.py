"""RedNet in PyTorch, implemented from the paper, with the tensor names of the official checkpoints.

It shares no code with the package: involution by unfold, channels first, contiguous groups. Partial
pooling windows average only values inside the input.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

BLOCKS = {26: (1, 2, 4, 1), 38: (2, 3, 5, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
BLOCKS[152] = (3, 8, 36, 3)


def named(**modules):
    """A Sequential of named modules."""
    sequence = nn.Sequential()
    for name, module in modules.items():
        sequence.add_module(name, module)
    return sequence


def conv_bn(inputs, outputs, size, stride=1):
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return named(conv=conv, bn=nn.BatchNorm2d(outputs), activate=nn.ReLU())


class Involution(nn.Module):
    def __init__(self, channels, size, stride):
        super().__init__()
        self.size, self.stride, self.groups = size, stride, channels // 16
        self.conv1 = conv_bn(channels, channels // 4, 1)
        self.conv2 = named(conv=nn.Conv2d(channels // 4, size**2 * self.groups, 1))

    def forward(self, x):
        pooled = F.avg_pool2d(x, self.stride, ceil_mode=True) if self.stride > 1 else x
        kernel = self.conv2(self.conv1(pooled))
        n, _, height, width = kernel.shape
        kernel = kernel.reshape(n, self.groups, 1, self.size**2, height, width)
        patches = F.unfold(x, self.size, padding=self.size // 2, stride=self.stride)
        patches = patches.reshape(n, self.groups, 16, self.size**2, height, width)
        return (kernel * patches).sum(3).reshape(n, -1, height, width)


class Block(nn.Module):
    def __init__(self, inputs, width, stride, first):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = Involution(width, 7, stride), nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        if first:
            shortcut = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class Backbone(nn.Module):
    def __init__(self, depth, stem_size=3):
        super().__init__()
        self.stem = nn.Sequential(
            conv_bn(3, 32, 3, stride=2),
            Involution(32, stem_size, 1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            conv_bn(32, 64, 3),
        )
        inputs = 64
        for stage, count in enumerate(BLOCKS[depth]):
            width, blocks = 64 * 2**stage, []
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(Block(inputs, width, stride, block == 0))
                inputs = 4 * width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))

    def forward(self, x):
        x = F.max_pool2d(self.stem(x), 3, stride=2, padding=1)
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps


class Classifier(nn.Module):
    """With the tensor names of mmclassification: ``backbone.`` and ``head.fc.``."""

    def __init__(self, depth, classes, stem_size=3):
        super().__init__()
        self.backbone = Backbone(depth, stem_size)
        self.head = named(fc=nn.Linear(2048, classes))

    def forward(self, x):
        return self.head(self.backbone(x)[-1].mean((2, 3)))


def network(depth, classes=5, stem_size=3, seed=0):
    """A float64 classifier in inference mode, with random weights, biases and statistics, scaled so
    that the logits differ clearly."""
    generator = np.random.default_rng(seed)
    with torch.device("meta"):
        model = Classifier(depth, classes, stem_size)
    # Allocates float64 tensors once, without PyTorch's initialization.
    model = model.to_empty(device="cpu").double().eval()
    for name, tensor in model.state_dict().items():
        values = generator.normal(size=tuple(tensor.shape))
        if name.endswith("num_batches_tracked"):
            values = np.array(7)
        elif "running_var" in name:
            values = np.abs(values) + 0.5
        elif tensor.ndim > 1:
            values *= (1.4 / tensor[0].numel()) ** 0.5
        elif "weight" in name:
            # Involution is quadratic in its input: without the smaller scale of bn3, 20 blocks
            # overflow float64.
            values = (0.7 + 0.2 * values) * (0.3 if "bn3" in name else 1)
        else:
            values *= 0.2
        tensor.copy_(torch.as_tensor(values))
    return model


def logits(model, images):
    """Logits of images (N, H, W, 3), NumPy arrays."""
    with torch.no_grad():
        return model(torch.tensor(np.moveaxis(images, -1, 1))).numpy()


def paddle_names(state):
    """A classifier's state dict in PaddleClas's format: NumPy arrays with other names, and a
    transposed linear layer."""
    arrays = {}
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        array = tensor.numpy()
        plain = name.removeprefix("backbone.").removeprefix("head.")
        plain = plain.replace("running_mean", "_mean").replace("running_var", "_variance")
        arrays[plain] = np.ascontiguousarray(array.T) if plain == "fc.weight" else array
    return arrays
