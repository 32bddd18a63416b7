"""What a random network is; random_graphs.py builds them.

A net is a list of steps on a growing list of values, all of one layout: images [b, c, 4, 4] or tokens [b, 5, c].
`str(net)` is its program, to reproduce a failure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Pick = Callable[[int], int]
WIDTHS = (4, 6, 8, 12)
SIDE, LENGTH = 4, 5


@dataclass(frozen=True)
class Step:
    """text: as printed; run: (net, values) -> value; width: channels of the result."""

    text: str
    run: Callable[[RandomNet, list[Tensor]], Tensor]
    width: int


class RandomNet(nn.Module):
    """See above. image: the layout; steps run in order, then a head reads the last value."""

    def __init__(self, image: bool) -> None:
        super().__init__()
        self.image, self.axis = image, 1 if image else -1
        self.layers = nn.ModuleList()
        self.steps: list[Step] = []
        self.widths = [3 if image else 6]
        self.linear: list[tuple[int, int, int]] = []  # (layer, channels in, channels out), to reuse and tie

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            values.append(step.run(self, values))
        return values[-1]

    def __str__(self) -> str:
        lines = [f"v{k + 1} [{s.width}] = {s.text}" for k, s in enumerate(self.steps)]
        return "\n".join([f"v0 [{self.widths[0]}] = {'image' if self.image else 'tokens'}", *lines])

    def inputs(self, rows: int, seed: int = 1) -> Tensor:
        """float64 [rows, 3, 4, 4] or [rows, 5, 6]"""
        shape = (3, SIDE, SIDE) if self.image else (LENGTH, 6)
        return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed)).double()

    # ------------------------------------------------------------------------------------ what builders use

    def own(self, layer: nn.Module) -> int:
        self.layers.append(layer)
        return len(self.layers) - 1

    def dense(self, i: int, o: int, kernel: int = 1, bias: bool = True, groups: int = 1) -> int:
        """A layer that mixes channels: a convolution, or a linear layer for tokens."""
        layer = nn.Conv2d(i, o, kernel, padding=kernel // 2, bias=bias, groups=groups)
        index = self.own(layer if self.image else nn.Linear(i, o, bias=bias))
        if groups == 1 and kernel == 1:
            self.linear.append((index, i, o))
        return index

    def per_channel(self, vector: Tensor) -> Tensor:
        return vector[:, None, None] if self.image else vector

    def add(self, text: str, width: int, run: Callable[[RandomNet, list[Tensor]], Tensor]) -> int:
        self.steps.append(Step(text, run, width))
        self.widths.append(width)
        return len(self.widths) - 1
