"""The data and loaders that bad_inputs.py gives to `merge`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(24) % 3
TOKENS = torch.arange(20).reshape(4, 5) % 10


def failing() -> Iterator[Tensor]:
    yield X[:8]
    raise OSError("disk on fire")


def endless() -> Iterator[Tensor]:
    while True:
        yield X


class Rows(Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, k: int) -> Tensor:
        if k >= 16:
            raise KeyError(f"sample {k} is missing")
        return X[k]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(X)


def with_value(value: float, at: int = 0) -> list[Tensor]:
    """Two batches, the one `at` spoiled."""
    batches = [X[:12].clone(), X[12:].clone()]
    batches[at][3, 2] = value
    return batches
