"""The networks of the benchmarks, for images of 28 or 32 pixels, written as anybody would write them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer


def group_norm(channels: int) -> nn.Module:
    """Eight channels to a group."""
    return nn.GroupNorm(channels // 8, channels)


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = norm(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet20(nn.Module):
    """He et al. 2016, for CIFAR: `width` times 16, 32, 64 channels, `blocks` blocks each (1: a ResNet-8)."""

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        width: int = 1,
        blocks: int = 3,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ):
        super().__init__()
        c = 16 * width
        self.conv1 = nn.Conv2d(channels, c, 3, 1, 1, bias=False)
        self.bn1 = norm(c)
        self.layer1 = _stage(c, c, 1, blocks, norm)
        self.layer2 = _stage(c, 2 * c, 2, blocks, norm)
        self.layer3 = _stage(2 * c, 4 * c, 2, blocks, norm)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(4 * c, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.avgpool(x).flatten(1))


def _stage(
    inputs: int, outputs: int, stride: int, blocks: int, norm: Callable[[int], nn.Module]
) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride, norm)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1, norm) for _ in range(blocks - 1)))


class VGG11(nn.Module):
    """Simonyan and Zisserman 2015, configuration A from `width` channels on, four pools, one hidden layer."""

    def __init__(self, classes: int, channels: int = 3, width: int = 32, batch_norm: bool = False):
        super().__init__()
        layers: list[nn.Module] = []
        for times in (1, 0, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8):
            if not times:
                layers.append(nn.MaxPool2d(2))
                continue
            layers.append(nn.Conv2d(channels, times * width, 3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(times * width))
            layers.append(nn.ReLU(inplace=True))
            channels = times * width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(channels, channels), nn.ReLU(inplace=True), nn.Linear(channels, classes)
        )
        for m in self.modules():  # without batch norm, PyTorch's default start is too small to train
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(m.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


class MLP(nn.Module):
    """Four hidden layers and no norms."""

    def __init__(self, classes: int, inputs: int, width: int = 128):
        super().__init__()
        sizes = [inputs, *[width] * 4]
        layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
        self.hidden, self.head = nn.Sequential(nn.Flatten(), *layers), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)  # [n, heads, tokens, dim / heads]
        return self.out(y.transpose(1, 2).reshape(n, tokens, dim))


class Encoder(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TinyViT(nn.Module):
    """Dosovitskiy et al. 2021, small: patches of 4 pixels, learned positions, mean over the tokens."""

    def __init__(
        self, classes: int, channels: int = 3, size: int = 32, dim: int = 64, depth: int = 4, heads: int = 4
    ):
        super().__init__()
        self.patch = nn.Conv2d(channels, dim, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // 4) ** 2, dim))
        self.blocks = nn.Sequential(*(Encoder(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.expand = nn.Linear(dim, 4 * dim)
        self.project = nn.Linear(4 * dim, dim)
        self.scale = nn.Parameter(0.1 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.project(F.gelu(self.expand(y)))
        return x + y.permute(0, 3, 1, 2)


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of [n, c, h, w]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TinyConvNeXt(nn.Module):
    """Liu et al. 2022, small: two stages of two blocks, patches of 2 pixels, depthwise 5 x 5, LayerScale."""

    def __init__(self, classes: int, channels: int = 3, dim: int = 48, depth: int = 2):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, dim, 2, 2), LayerNorm2d(dim, eps=1e-6))
        self.stage1 = nn.Sequential(*(ConvNeXtBlock(dim) for _ in range(depth)))
        self.down = nn.Sequential(LayerNorm2d(dim, eps=1e-6), nn.Conv2d(dim, 2 * dim, 2, 2))
        self.stage2 = nn.Sequential(*(ConvNeXtBlock(2 * dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(2 * dim, eps=1e-6)
        self.head = nn.Linear(2 * dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.down(self.stage1(self.stem(x))))
        return self.head(self.norm(x.mean((2, 3))))


def tiny_swin(classes: int, channels: int = 3, size: int = 32, dim: int = 32) -> nn.Module:
    """torchvision's Swin (Liu et al. 2021), small: patches of 2 pixels, two stages of two blocks, shifted windows."""
    window = next(w for w in (7, 4) if size // 2 % w == 0 and size // 4 % w == 0)
    net = SwinTransformer([2, 2], dim, [2, 2], [2, 4], [window, window], stochastic_depth_prob=0.0, num_classes=classes)
    net.features[0][0] = nn.Conv2d(channels, dim, 2, 2)  # type: ignore[index]
    return net
