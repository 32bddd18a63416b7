"""Networks that are hard to merge, or odd: what bad_inputs.py gives to `merge`, beside two good ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """Six numbers in, `classes` out, one hidden layer."""

    def __init__(self, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.fc1, self.head = nn.Linear(6, width), nn.Linear(width, classes)

    def hidden(self, x: Tensor) -> Tensor:
        return F.relu(self.fc1(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


class Counts(Net):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.hidden(x))


class Drifts(Net):
    """Changes a weight at every call."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.fc1.weight.mul_(0.9)
        return self.head(self.hidden(x))


class Remembers(Net):
    """Keeps a Python number, and uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        return self.head(self.hidden(x)) * self.step


class Noisy(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x) + torch.randn(x.shape[0], 8))


class DropsAlways(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.hidden(x), 0.5, training=True))


class InPlaceViews(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        h[:, :4].relu_()
        h.view(-1, 2, 4)[:, 1].mul_(2)
        return self.head(h)


class InPlaceInput(Net):
    """Overwrites the batch that it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x.mul_(2)))


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 2


class CustomGradient(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(Twice.apply(self.hidden(x)))


class Branches(Net):
    """Depends on a value of the data."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        return self.head(h if float(x.sum()) > 0 else -h)


class Fixed(Net):
    """Runs at a batch of two only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x.view(2, 6)))


class Cyclic(Net):
    """Holds a reference to itself, outside the module tree."""

    def __init__(self) -> None:
        super().__init__()
        self.me = [self]


class CyclicModules(Net):
    """Is its own grandchild."""

    def __init__(self) -> None:
        super().__init__()
        self.head.owner = self


class Lazy(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.LazyLinear(8)


class Empty(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) * 2


class NoOutput(Net):
    def forward(self, x: Tensor) -> None:
        self.hidden(x)


class Number(Net):
    def forward(self, x: Tensor) -> int:
        return 3


class Constant(Net):
    """Ignores its input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc1.bias).expand(x.shape[0], 3)


class Refuses(Net):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("not today")


class Overflows(Net):
    def hidden(self, x: Tensor) -> Tensor:
        return F.relu(self.fc1(x)) * 1e30 * 1e30


class NotCopied(Net):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot pickle a socket")


class Keyword(Net):
    def forward(self, *, x: Tensor) -> Tensor:
        return self.head(self.hidden(x))


class TwoInputs(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.hidden(x + y))


class Sparse(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.eye(8).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sparse.mm(self.mask, self.hidden(x).T).T)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.fc(self.embed(x))))
