"""What the sections of speed.py share: rows, clocks, networks and inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from nets import ResNet20
from torch import Tensor, nn

Row = dict[str, Any]
WHOLE = 2**30  # images: all that there are


def row(what: str, value: float, unit: str, aim: str = "", **more: Any) -> Row:
    """aim: "<= 1.3", as the issue asks for; "" where nothing is asked."""
    met = None
    if aim:
        sign, limit = aim.split()
        met = value <= float(limit) if sign == "<=" else value >= float(limit)
    return {"what": what, "value": value, "unit": unit, "aim": aim, "met": met, **more}


def seconds(run: Callable[[], Any], repeat: int = 1, clock: Callable[[], float] = time.process_time) -> float:
    """The best of `repeat` runs."""
    best = float("inf")
    for _ in range(repeat):
        start = clock()
        run()
        best = min(best, clock() - start)
    return best


def pair(name: str) -> list[nn.Module]:
    """Two networks with seeds of their own."""
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        if name.startswith("resnet20"):
            made.append(ResNet20(10, width=int(name.partition("x")[2])).eval())
        else:
            import torchvision

            made.append(torchvision.models.get_model(name, weights=None).eval())
    return made


def batches(size: int, count: int, batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 3, size, size, generator=generator) for _ in range(count // batch)]


def forwards(models: Sequence[nn.Module], data: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for model in models:
            for x in data:
                model(x)
