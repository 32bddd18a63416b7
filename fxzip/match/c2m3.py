"""C2M3: permutations of many models into one universe, all spaces at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..infer.spaces import FeatureSpace
from .alignment import Layer, align
from .matching import Correspondence, Evidence, Matching, Matchings, from_slots
from .permute import Permute
from .weights import Weights

SETTLED = 1e-6  # of the objective: a smaller gain in one round ends the search
STEPS = np.linspace(0, 1, 101)  # candidates of the line search

Soft = dict[str, Tensor]  # space -> doubly stochastic [slots, n]


@dataclass(frozen=True)
class C2M3:
    """Permutes every model into a common universe so that the models' weights agree best; needs no data.

    Crisostomi et al., "C2M3: Cycle-Consistent Multi-Model Merging", NeurIPS 2024, algorithm 1: Frank-Wolfe on
    sum over pairs <P_a W_a, P_b W_b>, with P relaxed to doubly stochastic matrices in all spaces at once: the
    gradient in every space, the best permutation for it (heads and groups as blocks), a step by exact line search;
    at the end the nearest permutations. Cycle-consistent by construction. Here model by model, each given the
    others, as moving two models towards each other at once can make them trade places.
    rounds: over all models at most. Raises InputError for rounds < 1, or any width but the models'.
    """

    rounds: int = 30

    name: ClassVar[str] = "c2m3"
    paper: ClassVar[str] = "Crisostomi et al., C2M3: Cycle-Consistent Multi-Model Merging, NeurIPS 2024"
    correspondence: ClassVar[Correspondence] = "permutation"
    needs: ClassVar[frozenset[str]] = frozenset({"weights"})

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise InputError(f"C2M3: rounds must be 1 or more, not {self.rounds}")

    def __call__(self, moments: Evidence, width: int) -> Matching:
        """One space alone, by what it is given -> M [m, Sn], U [Sn, m]."""
        if width != max(moments.sizes):
            raise InputError(f"c2m3: the width must be {max(moments.sizes)}, the models' own, not {width}")
        return Permute()(moments, width)

    def joint(self, families: Sequence[Sequence[FeatureSpace]], weights: Weights, models: int, seed: int) -> Matchings:
        """All spaces (families: those with blocks in common, parents first) at once."""
        rng = np.random.default_rng(seed)
        every = [s for family in families for s in family]
        soft: list[Soft] = [{s.name: torch.eye(s.size, dtype=torch.float64) for s in every} for _ in range(models)]
        scale = max(weights.scale(), 1e-300)
        before = value = weights.agreement(_matchings(soft)) / scale
        done, gained = 0, 1.0
        while done < self.rounds and gained > SETTLED:
            last = value
            for model in rng.permutation(models):
                value = _step(families, weights, soft, int(model), value * scale) / scale
            gained, done = value - last, done + 1
        slots = [_rounded(families, p) for p in soft]
        first = slots[0]  # name slots by model 0's features
        result = Matchings()
        for s in every:
            new = np.empty(s.size, np.int64)
            new[first[s.name]] = np.arange(s.size)
            result[s.name] = from_slots(np.concatenate([new[p[s.name]] for p in slots]), s.size, (s.size,) * models)
        last = weights.agreement(result) / scale
        result.notices = (
            f"c2m3: weights agree to {last:.4f} (1: equal; in the models' own order {before:.4f}, relaxed "
            f"{value:.4f}) after {done} rounds{'' if gained <= SETTLED else f', not settled (rounds={self.rounds})'}",
        )
        return result


def _matchings(soft: Sequence[Soft]) -> dict[str, Matching]:
    """As Matchings, so that weights can be seen through them."""
    found = {}
    for name in soft[0]:
        parts = [p[name] for p in soft]
        sizes = tuple(p.shape[1] for p in parts)
        found[name] = Matching(torch.cat(parts, 1) / len(parts), torch.cat([p.T for p in parts]), sizes)
    return found


def _step(
    families: Sequence[Sequence[FeatureSpace]], weights: Weights, soft: list[Soft], model: int, start: float
) -> float:
    """Move one model along the best direction as far as it helps; agreement before -> agreement after."""
    now, direction = _matchings(soft), {}
    for family in families:
        scores = {}
        for space in family:
            moments = weights.moments(space, now)
            if moments is not None:
                products = (moments.second * moments.count).cpu()
                n, own = space.size, slice(model * space.size, (model + 1) * space.size)
                others = [j for j in range(len(soft)) if j != model]
                scores[space.name] = sum(soft[j][space.name] @ products[j * n : (j + 1) * n, own] for j in others)
        direction |= _best(family, scores)
    here = soft[model]

    def at(step: float) -> Soft:
        return {k: (1 - step) * here[k] + step * direction[k] for k in here}

    def value(step: float) -> float:
        return weights.agreement(_matchings([*soft[:model], at(step), *soft[model + 1 :]]))

    points = np.linspace(0, 1, weights.degree + 1)  # the agreement is a polynomial in the step
    line = np.polynomial.Polynomial.fit(points, [start, *map(value, points[1:])], weights.degree)
    step = float(STEPS[line(STEPS).argmax()])
    soft[model] = at(step)
    return float(line(step))


def _best(family: Sequence[FeatureSpace], scores: Mapping[str, Tensor]) -> Soft:
    """The element of the family's group with the largest sum of scores [slots, n], as matrices [slots, n]."""
    layers = []
    for space in family:
        given = scores.get(space.name)
        both = None
        if given is not None:
            score = (given / given.abs().max().clamp(min=1e-300)).numpy()
            zero = np.zeros_like(score)
            both = np.block([[zero, score], [score.T, zero]])
        parents = tuple((p.space, p.index) for p in space.parents)
        layers.append(Layer(space.name, space.size, (space.size, space.size), parents, both))
    eye = {s.name: torch.eye(s.size, dtype=torch.float64) for s in family}
    return {name: eye[name][:, torch.from_numpy(np.argsort(p))].T for name, p in align(layers)[1].items()}


def _rounded(families: Sequence[Sequence[FeatureSpace]], soft: Soft) -> dict[str, np.ndarray]:
    """The slot of every feature in the group elements nearest to the relaxed ones. space -> int [n]"""
    found = {}
    for family in families:
        best = _best(family, {s.name: soft[s.name] for s in family})
        found |= {name: matrix.argmax(0).numpy() for name, matrix in best.items()}
    return found
