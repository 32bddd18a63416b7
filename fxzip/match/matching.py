"""Matching: the merge and unmerge matrices M and U of one space, and what every matcher needs for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..measure.moments import SpaceMoments


@dataclass(frozen=True, eq=False)
class Matching:
    """Features f [Sn] of all models, concatenated: z = merge @ f, and f ~ unmerge @ z.

    merge: M, float64 [m, Sn]; unmerge: U, float64 [Sn, m]; sizes: n_i of every model.
    quality: mean correlation between matched features of different models, NaN when unknown;
    baseline: the same for the identity correspondence, that is for plain averaging.
    Raises InputError when the shapes do not fit or a value is not finite.

    >>> Matching(torch.full((1, 2), 0.5), torch.ones(2, 1), (1, 1)).blocks_merge(0)
    tensor([[0.5000]], dtype=torch.float64)
    """

    merge: Tensor
    unmerge: Tensor
    sizes: tuple[int, ...]
    quality: float = float("nan")
    baseline: float = float("nan")

    def __post_init__(self) -> None:
        width, total = len(self.merge), sum(self.sizes)
        if self.merge.shape != (width, total) or self.unmerge.shape != (total, width):
            raise InputError(
                f"Matching: sizes {self.sizes} need merge [m, {total}] and unmerge [{total}, m], "
                f"not {list(self.merge.shape)} and {list(self.unmerge.shape)}"
            )
        object.__setattr__(self, "merge", self.merge.double())
        object.__setattr__(self, "unmerge", self.unmerge.double())
        if not (self.merge.isfinite().all() and self.unmerge.isfinite().all()):
            raise InputError("Matching: NaN or Inf in merge or unmerge")

    @property
    def width(self) -> int:
        """m, the number of merged features."""
        return len(self.merge)

    def moved(self, move: Callable[[Tensor], Tensor]) -> Matching:
        """The same, M and U being what `move` makes of them: equal tensors elsewhere, not looked at again."""
        found = copy(self)
        for name in ("merge", "unmerge"):
            object.__setattr__(found, name, move(getattr(self, name)))
        return found

    def expanded(self, real: Sequence[np.ndarray], size: int) -> Matching:
        """The same over `size` features of every model, of which its own are `real[i]`; nothing is made of the others
        or read off for them.

        >>> m = Matching(torch.full((1, 2), 0.5), torch.ones(2, 1), (1, 1))
        >>> m.expanded([np.array([0]), np.array([1])], 2).merge
        tensor([[0.5000, 0.0000, 0.0000, 0.5000]], dtype=torch.float64)
        """
        places = torch.from_numpy(np.concatenate([r + i * size for i, r in enumerate(real)]))
        merge = torch.zeros(self.width, len(real) * size, dtype=torch.float64)
        unmerge = torch.zeros(len(real) * size, self.width, dtype=torch.float64)
        merge[:, places], unmerge[places] = self.merge, self.unmerge
        return replace(self, merge=merge, unmerge=unmerge, sizes=(size,) * len(real))

    def narrowed(self, real: Sequence[np.ndarray]) -> Matching:
        """What `expanded` was given."""
        places = torch.from_numpy(np.concatenate([r + o for r, o in zip(real, self._starts, strict=True)]))
        sizes = tuple(len(r) for r in real)
        return replace(self, merge=self.merge[:, places], unmerge=self.unmerge[places], sizes=sizes)

    def of_own(self, real: Sequence[np.ndarray]) -> Matching:
        """A permutation of as many features in every model, of those that are its own: what a merged feature counts
        for the others goes to them.

        >>> m = Matching(torch.full((1, 2), 0.5), torch.ones(2, 1), (1, 1))
        >>> m.of_own([np.array([0]), np.array([], int)]).merge
        tensor([[1.]], dtype=torch.float64)
        """
        found = self.narrowed(real)
        return replace(found, merge=found.merge / found.merge.sum(1, keepdim=True).clamp(min=1e-300))

    @property
    def _starts(self) -> list[int]:
        return np.cumsum((0, *self.sizes))[:-1].tolist()

    def blocks_merge(self, model: int) -> Tensor:
        """The columns of M for one model. [m, n_i]"""
        return self.merge.split(self.sizes, 1)[model]

    def weighted(self, shares: Sequence[float]) -> Matching:
        """The same correspondence, model i's features counting `shares[i]` in every mean. U stays.

        A merged feature keeps the sum of its weights: of features of one model alone nothing changes. Rows with
        negative entries ("cca") are sums over models, and get N shares[i] times each model's part.

        >>> Matching(torch.full((1, 2), 0.5), torch.ones(2, 1), (1, 1)).weighted([0.75, 0.25]).merge
        tensor([[0.7500, 0.2500]], dtype=torch.float64)
        """
        if len(set(shares)) == 1:
            return self
        parts = self.merge.split(self.sizes, 1)
        share = torch.tensor(shares, dtype=torch.float64)[:, None]  # [N, 1]
        mass = torch.stack([p.sum(1) for p in parts])  # [N, m]
        signed = (self.merge < 0).any(1)
        scale = mass.sum(0) / (share * mass).sum(0)
        scale = torch.where(signed | (mass.sum(0) == 0), torch.full_like(scale, len(parts)), scale) * share
        return replace(self, merge=torch.cat([p * s[:, None] for p, s in zip(parts, scale, strict=True)], 1))

    def blocks_unmerge(self, model: int) -> Tensor:
        """The rows of U for one model. [n_i, m]"""
        return self.unmerge.split(self.sizes, 0)[model]


class Matchings(dict[str, Matching]):
    """Space name -> Matching, with what the user should know of how they were found."""

    notices: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Affinity:
    """How alike features are where that is more than one correlation: inner products of weights, a mixture.

    sizes: n_i of every model; values: float64 [Sn, Sn], symmetric, of the order of 1.
    """

    sizes: tuple[int, ...]
    values: np.ndarray

    def restrict(self, features: Sequence[np.ndarray]) -> Affinity:
        """Of some features only: `features[i]` are indices into model i's own."""
        starts = np.cumsum((0, *self.sizes))
        index = np.concatenate([np.asarray(f, np.int64) + s for f, s in zip(features, starts, strict=False)])
        return Affinity(tuple(len(f) for f in features), self.values[np.ix_(index, index)])


TILE = 256  # rows of a matrix that are looked through at once
TIE, NEAR = 1e-5, 0.999  # `similarity` breaks ties among correlations above NEAR, by at most TIE
Correspondence = Literal["identity", "permutation", "free"]
Evidence = SpaceMoments | Affinity


@runtime_checkable
class Matcher(Protocol):
    """A frozen dataclass that turns moments into a Matching, and says where it comes from.

    correspondence: "identity" never moves a feature, "permutation" pairs whole features one to one,
    "free" may build any M and U (and is kept away from spaces that allow permutations only).
    needs (see `needs`; may be left out): what it looks at.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    correspondence: ClassVar[Correspondence]

    def __call__(self, moments: Any, width: int) -> Matching: ...


def needs(matcher: Matcher) -> frozenset[str]:
    """What a matcher looks at, by its attribute `needs`: "moments" of activations; "similarity", nothing of them
    but `similarity` (so that an Affinity will do); "weights" (see `SweepMatcher`); "readers" (see `Read`; moments
    alone will do). Default: moments.
    """
    return getattr(matcher, "needs", frozenset({"moments"}))


def widens(matcher: Matcher) -> bool:
    """Whether a matcher takes another width than the models', by its attribute `widens` (may be left out): by default
    what is free to build any M and U does."""
    return getattr(matcher, "widens", matcher.correspondence == "free")


def similarity(moments: Evidence) -> np.ndarray:
    """The correlation as matchers see it: dead features of two models with one constant value count as equal.

    Without that, matching a dead unit with its own copy would be worth nothing. Features that fire on a single
    sample all correlate perfectly: among (nearly) equal correlations the closer mean and deviation win.
    An Affinity says itself what it is. float64 [Sn, Sn], symmetric.
    """
    if isinstance(moments, Affinity):
        return moments.values
    result = moments.correlation().cpu().numpy()
    for start in range(0, len(result), TILE):  # where most are, their indices would take more than the matrix
        rows, columns = np.nonzero(result[start : start + TILE] > NEAR)
        result[rows + start, columns] -= TIE * _unlike(moments, rows + start, columns)
    dead = np.flatnonzero(moments.dead.cpu().numpy())
    value = moments.mean.cpu().numpy()[dead]
    model = model_of(moments.sizes)[dead]
    same = np.isclose(value[:, None], value[None, :], rtol=1e-5, atol=1e-12)
    rows, columns = np.nonzero(same & (model[:, None] != model[None, :]))
    result[dead[rows], dead[columns]] = 1
    return result


def _unlike(moments: SpaceMoments, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """In [0, 1]: relative difference of two features' second moments' roots. Indices [k] -> float64 [k]"""
    size = np.sqrt(np.maximum(moments.second.diagonal().cpu().numpy(), 0))
    total = size[rows] + size[columns]
    return np.abs(size[rows] - size[columns]) / np.where(total > 0, total, 1)


def model_of(sizes: Sequence[int]) -> np.ndarray:
    """The model every feature belongs to. int64 [Sn]"""
    return np.repeat(np.arange(len(sizes)), sizes)


def from_slots(
    slots: np.ndarray, width: int, sizes: Sequence[int], correlation: np.ndarray | None = None
) -> Matching:
    """The matching that averages all features with one slot: U is 0/1, M = U^T over the size of each group.

    slots: int [Sn], the merged feature of every feature; each of `width` slots is taken at least once.

    >>> from_slots(np.array([0, 1, 1, 0]), 2, (2, 2)).merge
    tensor([[0.5000, 0.0000, 0.0000, 0.5000],
            [0.0000, 0.5000, 0.5000, 0.0000]], dtype=torch.float64)
    """
    taken = np.bincount(slots, minlength=width)
    if len(taken) != width or not taken.all():
        raise InputError(f"from_slots: {width} slots need at least one feature each")
    unmerge = torch.zeros(len(slots), width, dtype=torch.float64)
    unmerge[torch.arange(len(slots)), torch.from_numpy(slots)] = 1
    merge = (unmerge / torch.from_numpy(taken)).T.contiguous()
    if correlation is None:
        return Matching(merge, unmerge, tuple(sizes))
    identity = np.concatenate([np.arange(n) for n in sizes])
    quality, baseline = (mean_correlation(s, sizes, correlation) for s in (slots, identity))
    return Matching(merge, unmerge, tuple(sizes), quality, baseline)


def mean_correlation(slots: np.ndarray, sizes: Sequence[int], correlation: np.ndarray) -> float:
    """Mean correlation over the pairs of features of different models in one slot; NaN without any."""
    model, order = model_of(sizes), np.argsort(slots, kind="stable")
    values = []
    for step in range(1, int(np.bincount(slots).max())):  # pairs `step` apart in a list sorted by slot
        a, b = order[:-step], order[step:]
        pair = (slots[a] == slots[b]) & (model[a] != model[b])
        values.append(correlation[a[pair], b[pair]])
    known = np.concatenate(values) if values else np.zeros(0)
    return float(known.mean()) if len(known) else float("nan")


def lossless(matching: Matching, moments: SpaceMoments) -> bool:
    """Whether U M f is f on the measured data, to 1e-3 of each space's root mean square: the models agree.

    >>> m = SpaceMoments((1, 1), 1.0, torch.zeros(2), torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
    >>> lossless(from_slots(np.array([0, 0]), 1, (1, 1)), m)
    True
    """
    if not matching.quality > NEAR:  # cheap, and nearly always the answer
        return False
    second = moments.second.cpu().double()
    merge, unmerge = matching.merge.to_sparse(), matching.unmerge.to_sparse()
    cross = merge @ second  # E[z f^T]  [m, Sn]
    energy = merge @ cross.T  # E[z z^T]  [m, m]
    lost = second.trace() - 2 * (matching.unmerge * cross.T).sum() + ((unmerge @ energy) * matching.unmerge).sum()
    return float(lost) <= 1e-6 * float(second.trace())  # moments are known to some 1e-7


def optimal_unmerge(
    merge: Tensor, moments: SpaceMoments, ridge: float = 1e-4, centred: bool = True
) -> Tensor:
    """The linear unmerge with the least squared error: U = S M^T (M S M^T + lam I)^-1. float64 [Sn, m]

    S is the covariance, or the second moment with centred=False: then also the means are fitted, which
    matters where no bias behind U can take up an offset. lam is `ridge` times the mean of the diagonal
    of M S M^T. Raises InputError when merge does not fit the moments.

    >>> m = SpaceMoments((1, 1), 1.0, torch.zeros(2), torch.tensor([[1.0, 2.0], [2.0, 4.0]]))
    >>> optimal_unmerge(torch.tensor([[1.0, 0.0]]), m, ridge=0.0).round(decimals=6)
    tensor([[1.],
            [2.]], dtype=torch.float64)
    """
    total = sum(moments.sizes)
    if merge.ndim != 2 or merge.shape[1] != total:
        raise InputError(f"optimal_unmerge: merge is {list(merge.shape)}, not [m, {total}]")
    merge = merge.to(moments.second)
    moment = moments.covariance() if centred else (moments.second + moments.second.T) / 2
    cross = moment @ merge.T  # [Sn, m]
    gram = merge @ cross
    gram = (gram + gram.T) / 2  # [m, m]
    # Below rounding the direction carries nothing: without the floor a dead merged feature is singular.
    floor = 1e-14 * float(gram.diagonal().max().clamp_min(1e-30))
    gram.diagonal().add_(max(ridge * float(gram.diagonal().mean()), floor))
    return torch.linalg.solve(gram, cross, left=False)
