"""What tests of whole merges share: a small residual net and its twins, every structure, merges, distances."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import toy_attention
import toys
from torch import Tensor, nn
from toys import randomise

import fxzip
from examples import EXAMPLES, Example
from fxzip.rewrite import recompute_statistics

DATA = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
STRUCTURES = [e for e in EXAMPLES if e.name in {t[0] for t in [*toys.TOYS, *toy_attention.TOYS]}]


class Digits(nn.Module):
    """A stem and two residual blocks with batch norm, for 8 x 8 digits."""

    def __init__(self, classes: int = 10, width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.block1, self.block2 = self._block(width), self._block(width)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(width, classes)

    @staticmethod
    def _block(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(width, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True),
            nn.Conv2d(12, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.block1(x))
        x = F.relu(x + self.block2(x))
        return self.fc(self.drop(x.mean((2, 3))))


def digits(seed: int = 0, classes: int = 10) -> Digits:
    """A random net whose batch-norm statistics are those of DATA, as a merge recomputes them."""
    model = Digits(classes)
    randomise(model, seed).eval()
    recompute_statistics(model, [DATA], lambda batch: (batch,))
    return model


def twins(classes: int = 10) -> tuple[Digits, nn.Module]:
    """A net, and another with the same function on other coordinates."""
    model = digits(classes=classes)
    return model, fxzip.scramble(model, DATA[:2], seed=3)


def merge(models: Any, loader: Any = (DATA,), method: Any = "permute", **options: Any) -> Any:
    return fxzip.merge(models, loader, method=method, **{"progress": False, "verify": False, **options})


def outputs(module: nn.Module, *inputs: Any) -> Any:
    with torch.no_grad():
        return module(*(inputs or (DATA,)))


def far(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def same_bytes(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(torch.equal(left[k], right[k]) for k in left)


def scrambled(example: Example) -> tuple[nn.Module, nn.Module, list[tuple]]:
    """A model, its scrambled copy, and two batches of 24 whose statistics its batch norms have."""
    model = example.make()
    torch.manual_seed(3)
    columns = [torch.cat(c) for c in zip(*(example.data() for _ in range(24)), strict=True)]
    batches = [tuple(c[:24] for c in columns), tuple(c[24:] for c in columns)]
    recompute_statistics(model, batches, lambda batch: batch)
    return model, fxzip.scramble(model, batches[0]), batches
