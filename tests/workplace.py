"""A user's folder: two checkpoints of a small network, the file that defines it, data, a recipe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

NET = """
from torch import nn

def net(num_classes=3, width=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, num_classes),
    )
"""
RECIPE = """\
model: net.py:net
models:
  - {name: cats, weights: a.pt, classes: [0, 1, 2]}
  - {name: dogs, weights: b.pt, classes: [3, 4]}
method: zip
data: x.npz
calibration: 24
"""


def workplace(folder: Path) -> Path:
    """Make it in `folder`."""
    (folder / "net.py").write_text(NET)
    (folder / "recipe.yaml").write_text(RECIPE)
    space: dict = {}
    exec(NET, space)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, classes in (("a", 3), ("b", 2)):
            torch.save(space["net"](classes).state_dict(), folder / f"{name}.pt")
    numbers = np.random.default_rng(0)
    np.savez(folder / "x.npz", x=numbers.standard_normal((30, 3, 8, 8)), y=np.arange(30) % 5)
    return folder
