"""Small convolutional and recurrent nets with the structures that feature spaces have to get right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and running statistic a random value, scales near one; returns the model."""
    generator = torch.Generator().manual_seed(seed)

    def normal(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator)

    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.copy_(normal(p) * 1.4 / max(1, p[0].numel()) ** 0.5)
            elif abs(float(p.mean()) - 1) < 0.3 and "norm" in name:
                p.copy_(0.5 + torch.rand(p.shape, generator=generator))
            else:
                p.copy_(0.4 * normal(p) + 0.2)
        for name, b in model.named_buffers():
            if name.endswith("running_var"):
                b.copy_(0.5 + torch.rand(b.shape, generator=generator))
            elif name.endswith("running_mean"):
                b.copy_(0.3 * normal(b))
    return model


class Residual(nn.Module):
    """CIFAR ResNet block with the option-A shortcut: every second pixel, channels padded with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.norm1 = nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        x = F.relu(h + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class UNet(nn.Module):
    """One level down and up, skip by concatenation, GroupNorm across the seam."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.enc_norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.mid, self.mid_norm = nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.seam_norm = nn.GroupNorm(4, 16)
        self.dec, self.head = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.silu(self.enc_norm(self.enc(x)))
        b = F.silu(self.mid_norm(self.mid(F.max_pool2d(a, 2))))
        return self.head(F.relu(self.dec(self.seam_norm(torch.cat([a, self.up(b)], 1)))))


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.Module]) -> None:
        super().__init__()
        self.rnn, self.head = cell(5, 8, num_layers=2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class Reused(nn.Module):
    """One module, and one norm, applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.shared, self.norm, self.head = (
            nn.Linear(6, 8),
            nn.Linear(8, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        x = F.relu(self.norm(self.shared(x)))
        return self.head(F.relu(self.norm(self.shared(x))))


class GroupedBottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv1, self.norm1 = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.norm3 = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        h = F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        return self.head(F.relu(x + self.norm3(self.conv3(h))))


class InvertedBottleneck(nn.Module):
    """Expand, depthwise, squeeze-excite, project."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depth, self.norm2 = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.squeeze, self.excite = nn.Conv2d(12, 6, 1), nn.Conv2d(6, 12, 1)
        self.project, self.norm3 = nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.hardswish(self.norm2(self.depth(F.relu6(self.norm1(self.expand(x))))))
        h = h * F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(h, 1)))))
        return self.head(self.norm3(self.project(h)))


class ShuffleBlock(nn.Module):
    """Split, transform one half, concatenate, shuffle; twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 1)
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            a, b = x.chunk(2, 1)
            x = torch.cat([a, branch(b)], 1)
            x = x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
        return self.head(x)


class Dense(nn.Module):
    """Every layer reads the concatenation of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4 * i, 4, 3, padding=1) for i in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 * i) for i in range(1, 5))
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.convs[0](x)
        for conv, norm in zip(self.convs[1:], self.norms, strict=False):
            h = torch.cat([h, conv(F.relu(norm(h)))], 1)
        return self.head(F.relu(self.norms[-1](h)))


class Upscaler(nn.Module):
    """Sub-pixel convolution with PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.up = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.PReLU(8),
            nn.Conv2d(8, 32, 3, padding=1),
        )
        self.act2, self.head = nn.PReLU(8), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act2(F.pixel_shuffle(self.up(self.act(self.conv(x))), 2)))


class Volumes(nn.Module):
    """A 3d convolution, then time as a sequence for 1d convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(2, 8, (1, 3, 3)), nn.BatchNorm3d(8)
        self.time, self.head = nn.Conv1d(8, 12, 3, padding=1), nn.Linear(12 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x))).mean((3, 4))
        return self.head(F.relu(self.time(x)).flatten(1))


class Unknown(nn.Module):
    """A Fourier transform over the channels between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(5, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(F.relu(self.conv1(x)))
        return self.head(F.relu(self.conv3(torch.fft.rfft(x, dim=1).abs())))


def image() -> tuple[Tensor]:
    return (torch.randn(2, 3, 6, 6),)


def sequence() -> tuple[Tensor]:
    return (torch.randn(2, 5, 6),)


# name, module, inputs, the op that must be frozen
TOYS = [
    ("residual with a zero-padded shortcut", Residual, image, ""),
    ("u-net", UNet, image, ""),
    ("lstm", lambda: Recurrent(nn.LSTM), lambda: (torch.randn(2, 4, 5),), ""),
    ("gru", lambda: Recurrent(nn.GRU), lambda: (torch.randn(2, 4, 5),), ""),
    ("reused module", Reused, lambda: (torch.randn(2, 6),), ""),
    ("grouped bottleneck", GroupedBottleneck, image, ""),
    ("inverted bottleneck", InvertedBottleneck, image, ""),
    ("shuffle block", ShuffleBlock, image, ""),
    ("dense block", Dense, image, ""),
    ("sub-pixel convolution", Upscaler, image, ""),
    ("conv3d then conv1d", Volumes, lambda: (torch.randn(2, 2, 4, 5, 5),), ""),
    ("unknown op", Unknown, image, "fft"),
]
