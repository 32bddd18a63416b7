"""First and second moments of every feature space, jointly over all models: what matchers see of the data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError
from .example import Form
from .gram import add_gram, finite, mirrored

DEAD = 1e-12  # a feature whose variance is below this share of its power is constant in float32
ROWS = 1 << 15  # rows multiplied at once
FORMAT = "fxzip moments 1"


@dataclass(frozen=True, eq=False)
class SpaceMoments:
    """Moments of one space over the features of all models, concatenated in model order (Sn = sum n_i).

    sizes: n_i of every model; count: rows seen; mean: E[f], float64 [Sn]; second: E[f f^T], float64 [Sn, Sn].
    Raises InputError when the shapes do not fit or a value is not finite.

    >>> m = SpaceMoments((1, 1), 4.0, torch.zeros(2), torch.tensor([[1.0, 0.5], [0.5, 4.0]]))
    >>> m.correlation()
    tensor([[1.0000, 0.2500],
            [0.2500, 1.0000]], dtype=torch.float64)
    """

    sizes: tuple[int, ...]
    count: float
    mean: Tensor
    second: Tensor

    def __post_init__(self) -> None:
        total = sum(self.sizes)
        if self.mean.shape != (total,) or self.second.shape != (total, total):
            raise InputError(
                f"SpaceMoments: sizes {self.sizes} need a mean of [{total}] and a second moment of "
                f"[{total}, {total}], not {list(self.mean.shape)} and {list(self.second.shape)}"
            )
        object.__setattr__(self, "mean", self.mean.double())
        object.__setattr__(self, "second", self.second.double())
        if not (finite(self.mean) and finite(self.second)):
            raise InputError("SpaceMoments: NaN or Inf in the moments; check models and data")

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each model's features start, and the end: (0, n_0, n_0 + n_1, ...)."""
        return tuple(np.cumsum((0, *self.sizes)).tolist())

    @property
    def dead(self) -> Tensor:
        """bool [Sn]: features that never change on the data (dead ReLU units, constants)."""
        power = self.second.diagonal()
        return (power - self.mean.square()) <= DEAD * power.clamp_min(torch.finfo(torch.float64).tiny / DEAD)

    def covariance(self) -> Tensor:
        """E[f f^T] - E[f] E[f]^T, exactly symmetric, zero for dead features. [Sn, Sn]"""
        covariance = torch.outer(self.mean, self.mean)
        torch.sub(self.second, covariance, out=covariance)
        _symmetrise(covariance)
        dead = self.dead
        covariance[dead] = 0
        covariance[:, dead] = 0
        return covariance

    def correlation(self) -> Tensor:
        """In [-1, 1]; a dead feature has 0 with every other and 1 with itself, never NaN. [Sn, Sn]"""
        covariance = self.covariance()
        scale = covariance.diagonal().clamp_min(0).sqrt()
        scale[self.dead] = 1
        return covariance.div_(scale).div_(scale[:, None]).clamp_(-1, 1).fill_diagonal_(1)

    def moved(self, move: Callable[[Tensor], Tensor]) -> SpaceMoments:
        """The same, its second moment being what `move` makes of it: an equal tensor elsewhere, not looked at again."""
        found = copy(self)
        object.__setattr__(found, "second", move(self.second))
        return found

    def restrict(self, features: Sequence[np.ndarray]) -> SpaceMoments:
        """The moments of some features only: `features[i]` are indices into model i's own features.

        >>> SpaceMoments((2, 1), 1.0, torch.arange(3.0), torch.eye(3)).restrict([[1], [0]]).mean
        tensor([1., 2.], dtype=torch.float64)
        """
        chosen = [np.asarray(f, np.int64) + start for f, start in zip(features, self.offsets, strict=False)]
        index = torch.from_numpy(np.concatenate(chosen)).to(self.mean.device)
        sizes = tuple(len(f) for f in chosen)
        return SpaceMoments(sizes, self.count, self.mean[index], self.second[index][:, index])


def _symmetrise(matrix: Tensor, tile: int = 256) -> None:
    """The mean of a matrix and its transpose, in place; by tiles, as a column of a large matrix misses every cache."""
    starts = range(0, len(matrix), tile)
    for i, j in ((i, j) for i in starts for j in starts if i <= j):
        one, other = matrix[i : i + tile, j : j + tile], matrix[j : j + tile, i : i + tile].T
        mean = (one + other) / 2
        one.copy_(mean)
        other.copy_(mean)


class Accumulator:
    """Streams rows of features into a SpaceMoments: float64 sums, updated in place.

    `total` [Sn] and `gram` [Sn, Sn] (see `add_gram`: not all of it is filled) are plain sums over `count` rows, so
    that a distributed run may all-reduce the three of them before calling `moments`.

    >>> a = Accumulator((1, 1)); a.add(torch.tensor([[1.0, 2.0], [3.0, 4.0]])); a.moments().mean
    tensor([2., 3.], dtype=torch.float64)
    """

    def __init__(self, sizes: Sequence[int], device: torch.device | str = "cpu") -> None:
        width = sum(sizes)
        self.sizes = tuple(sizes)
        self.count = 0.0
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, rows: Tensor, source: str = "", weight: float = 1.0) -> None:
        """Add rows [r, Sn] of any real dtype, each counting as `weight` rows; `source` names where they come
        from in errors.

        Raises InputError for a wrong width, or for NaN or Inf (nothing is added then).
        """
        where = f" at {source}" if source else ""
        if rows.ndim != 2 or rows.shape[1] != len(self.total):
            raise InputError(f"moments{where}: rows are {list(rows.shape)}, not [r, {len(self.total)}]")
        if not finite(rows):
            column = int((~rows.isfinite()).any(0).nonzero()[0])
            model = int(np.searchsorted(np.cumsum(self.sizes), column, side="right"))
            raise InputError(
                f"moments{where}: NaN or Inf in model {model}; its activations overflow on this data, "
                "check the model and the loader (dtype, normalisation)"
            )
        for part in rows.to(self.total.device).split(ROWS):
            self.total.add_(part.sum(0, dtype=torch.float64), alpha=weight)
            add_gram(self.gram, part, weight)
        self.count += weight * len(rows)

    def moments(self, spent: bool = False) -> SpaceMoments:
        """The moments so far, copied; in place of the sums, where these are `spent`. Raises InputError when no row was
        seen."""
        if not self.count:
            raise InputError("moments: no rows were seen; is the loader empty?")
        second = self.gram.div_(self.count) if spent else self.gram / self.count
        return SpaceMoments(self.sizes, self.count, self.total / self.count, mirrored(second))


def balanced(parts: Sequence[SpaceMoments]) -> SpaceMoments:
    """Pool the moments of several data sets with equal weight each, however many rows each had.

    Raises InputError when they are not of one space.

    >>> a = SpaceMoments((1,), 9.0, torch.zeros(1), torch.ones(1, 1))
    >>> b = SpaceMoments((1,), 1.0, torch.ones(1), torch.ones(1, 1))
    >>> balanced([a, b]).mean
    tensor([0.5000], dtype=torch.float64)
    """
    if not parts or any(p.sizes != parts[0].sizes for p in parts):
        raise InputError(f"balanced: moments of one space are needed, got sizes {[p.sizes for p in parts]}")
    mean = torch.stack([p.mean for p in parts]).mean(0)
    second = sum((p.second for p in parts[1:]), parts[0].second) / len(parts)
    return SpaceMoments(parts[0].sizes, sum(p.count for p in parts), mean, second)


@dataclass(frozen=True, eq=False)
class Moments(Mapping[str, SpaceMoments]):
    """Space name -> SpaceMoments. Saved without pickle, as one safetensors file.

    form: what the inputs looked like (see `form_of`), so that `merge(models, moments=...)` needs no loader.
    of: a SHA-256 of every model's tensors, so that it does not take those of others; (): not known.
    """

    spaces: Mapping[str, SpaceMoments]
    form: Form | None = None
    of: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> SpaceMoments:
        return self.spaces[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.spaces)

    def __len__(self) -> int:
        return len(self.spaces)

    def save(self, path: str | Path) -> None:
        """Write to one file; bit-exact when loaded again."""
        tensors, facts = {}, {}
        for name, m in self.spaces.items():
            tensors[f"mean/{name}"] = m.mean.cpu().contiguous()
            tensors[f"second/{name}"] = m.second.cpu().contiguous()
            facts[name] = {"sizes": m.sizes, "count": m.count}
        notes = {"spaces": json.dumps(facts), "form": json.dumps(self.form), "of": json.dumps(self.of)}
        save_file(tensors, str(path), {"format": FORMAT, **notes})

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        """Read what `save` wrote. Raises InputError when the file is missing or is something else."""
        if not Path(path).is_file():
            raise InputError(f"Moments.load: no file {str(path)!r}")
        try:
            with safe_open(str(path), "pt") as file:
                facts = file.metadata() or {}
                if facts.get("format") != FORMAT:
                    raise InputError(f"Moments.load: {str(path)!r} was not written by Moments.save")
                return cls(
                    {
                        name: SpaceMoments(
                            tuple(fact["sizes"]),
                            fact["count"],
                            file.get_tensor(f"mean/{name}"),
                            file.get_tensor(f"second/{name}"),
                        )
                        for name, fact in json.loads(facts["spaces"]).items()
                    },
                    form if (form := json.loads(facts.get("form", "null"))) is None else tuple(form),
                    tuple(map(str, json.loads(facts.get("of", "[]")))),
                )
        except InputError:
            raise
        except SafetensorError as error:
            raise InputError(f"Moments.load: {str(path)!r} is not a safetensors file ({error})") from error
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"Moments.load: {str(path)!r} holds no moments ({reason})") from error
