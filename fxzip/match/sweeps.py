"""Matchings for all spaces: once from moments, or in sweeps over spaces where a matcher compares weights.

How alike two features' weights are depends on how the neighbouring spaces are matched. So spaces are matched
in turn, all others as they stand, until nothing changes: coordinate descent (Git Re-Basin, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch

from ..errors import InputError
from ..infer.spaces import FeatureSpace, Spaces
from ..measure.moments import SpaceMoments
from .average import Average
from .blocks import Reading, families, free, match_once
from .matching import Affinity, Matcher, Matching, Matchings, mean_correlation, needs, similarity
from .unmerge import Unmerge
from .weights import Weights

GAIN = 1e-9  # of the weights' norm: what a better agreement must gain at least


@runtime_checkable
class SweepMatcher(Matcher, Protocol):
    """A matcher that compares weights (`needs` has "weights").

    matcher: works on the affinities of one space; sweeps: how often over all spaces at most;
    start: "activations", "sorted" or "order" (see `match`); monotone: whether a step must raise the weights'
    agreement to be taken.
    """

    monotone: ClassVar[bool]

    @property
    def matcher(self) -> Matcher: ...
    @property
    def sweeps(self) -> int: ...
    @property
    def start(self) -> str: ...

    def affinity(self, weights: SpaceMoments | None, moments: SpaceMoments | None) -> Affinity | None: ...


@runtime_checkable
class JointMatcher(Matcher, Protocol):
    """A matcher of weights that finds the matchings of all spaces together."""

    def joint(
        self, families: Sequence[Sequence[FeatureSpace]], weights: Weights, models: int, seed: int
    ) -> Matchings: ...


def match(
    spaces: Spaces | Sequence[FeatureSpace],
    moments: Mapping[str, SpaceMoments],
    matcher: Matcher,
    widths: Mapping[str, int] | None = None,
    models: int | None = None,
    weights: Weights | None = None,
    seed: int = 0,
    shares: Sequence[float] = (),
    real: Mapping[str, Sequence[np.ndarray]] | None = None,
    keep: Callable[[Matching], Matching] = lambda matching: matching,
    reading: Reading = lambda _, seen: seen,
) -> Matchings:
    """One Matching per space, parents before children: see `match_once` for all arguments but the next three.

    weights: of all models, for a matcher that compares them; `seed` is for the order of its sweeps. Where they
    start: "activations" (their moments alone), "order" (features as they are), or "sorted": one pass in which
    weights are sorted along the axes of spaces that come later, which finds an exact copy at once. shares: what
    every model counts in the means (default: all alike); a least-squares unmerge comes after those. keep: where
    a matching goes once it is found, but for matchers that compare weights.
    `.notices` say how it went. Raises InputError when weights are needed and not given.
    """
    every = list(spaces)
    plain = matcher.matcher if isinstance(matcher, Unmerge) else matcher
    found = (
        _by_weights(every, moments, plain, widths, models, weights, seed, real or {})
        if "weights" in needs(plain)
        else Matchings(match_once(every, moments, plain, widths, models, real, keep, reading))
    )
    alike = len(set(shares)) < 2
    result = Matchings(found if alike else {name: keep(m.weighted(shares)) for name, m in found.items()})
    if isinstance(matcher, Unmerge):
        above = {p.space for s in every for p in s.parents}
        for s in every:
            if s.name in moments and free(s, above):
                result[s.name] = keep(matcher.inside(s, result[s.name], moments[s.name]))
    result.notices = found.notices
    return result


def _by_weights(
    every: list[FeatureSpace],
    moments: Mapping[str, SpaceMoments],
    matcher: Matcher,
    widths: Mapping[str, int] | None,
    models: int | None,
    weights: Weights | None,
    seed: int,
    real: Mapping[str, Sequence[np.ndarray]],
) -> Matchings:
    if weights is None:
        raise InputError(f"match: {matcher.name} compares weights; pass weights=Weights.of(states, spaces)")
    count = models or max((len(t) for t in weights.tensors.values()), default=0)
    if isinstance(matcher, JointMatcher):
        if widths:
            raise InputError(f"match: {matcher.name} keeps the models' widths; leave out widths, or use 'zip'")
        found = matcher.joint(families(every), weights, count, seed)
        result = Matchings({s: m.of_own(real[s]) if s in real else m for s, m in found.items()})
        result.notices = found.notices
        return result
    if not isinstance(matcher, SweepMatcher):
        raise InputError(f"match: {matcher.name} needs weights, but has neither `affinity` (SweepMatcher) nor `joint`")
    return _Sweeps(families(every), moments, matcher, widths or {}, count, weights, real).run(seed)


@dataclass
class _Sweeps:
    """families: spaces that are matched together, each list in order. real: as for `match`; while they are looked
    for, matchings are over as many features of every model as the widest has, as weights are."""

    families: Sequence[Sequence[FeatureSpace]]
    moments: Mapping[str, SpaceMoments]
    matcher: SweepMatcher
    widths: Mapping[str, int]
    models: int
    weights: Weights
    real: Mapping[str, Sequence[np.ndarray]]

    def run(self, seed: int) -> Matchings:
        rng = np.random.default_rng(seed)
        found, scale = self._start(), max(self.weights.scale(), 1e-300)
        before = self._figure(found, scale)
        done, changed = 0, True
        while changed and done < self.matcher.sweeps:
            order = rng.permutation(len(self.families))
            changed = any([self._step(self.families[k], found, scale) for k in order])
            done += 1
        result = Matchings({s.name: self._scored(s, found) for s in self._every()})
        end = f"{done} sweeps" if not changed else f"{done} sweeps, not settled (sweeps={self.matcher.sweeps})"
        after = self._figure(found, scale)
        if self.matcher.monotone:
            plain = self._figure(self._in_order(), scale)
            what = f"weights agree to {after:.4f} (1: equal; in the models' own order {plain:.4f}, at the start"
        else:
            what = f"merged features are alike by {after:.4f} (1: equal; at the start, by activations,"
        result.notices = (f"{self.matcher.name}: {what} {before:.4f}) after {end}",)
        return result

    def _figure(self, found: Mapping[str, Matching], scale: float) -> float:
        """How good matchings are: the weights' agreement if that is what must rise, else the mean quality."""
        if self.matcher.monotone:
            return self.weights.agreement(found) / scale
        known = [m.quality for m in found.values() if m.quality == m.quality]
        return float(np.mean(known)) if known else float("nan")

    def _scored(self, space: FeatureSpace, found: Mapping[str, Matching]) -> Matching:
        """With the correlation of weights as quality where the matcher saw inner products."""
        own = self.real.get(space.name)
        matching = found[space.name].narrowed(own) if own else found[space.name]
        moments = self._moments(space, found) if self.matcher.monotone else None
        if moments is None:
            return matching
        identity = np.concatenate(own or [np.arange(space.size)] * self.models)
        slots = matching.unmerge.argmax(1).numpy()
        scores = [mean_correlation(k, moments.sizes, similarity(moments)) for k in (slots, identity)]
        return replace(matching, quality=scores[0], baseline=scores[1])

    def _moments(self, space: FeatureSpace, found: Mapping[str, Matching]) -> SpaceMoments | None:
        """Of the weights of the models' own features."""
        seen, own = self.weights.moments(space, found), self.real.get(space.name)
        return seen.restrict(own) if seen is not None and own else seen

    def _in_order(self) -> dict[str, Matching]:
        return self._wide(match_once(self._every(), {}, Average(), models=self.models, real=self.real))

    def _wide(self, found: Mapping[str, Matching]) -> dict[str, Matching]:
        size = {s.name: s.size for s in self._every()}
        return {s: m.expanded(self.real[s], size[s]) if s in self.real else m for s, m in found.items()}

    def _every(self) -> list[FeatureSpace]:
        return [s for family in self.families for s in family]

    def _start(self) -> dict[str, Matching]:
        found: dict[str, Matching] = {}
        if self.matcher.start == "order":
            return self._in_order()
        for family in self.families:
            found |= self._matched(family, found if self.matcher.start == "sorted" else None)
        return found

    def _matched(self, family: Sequence[FeatureSpace], found: Mapping[str, Matching] | None) -> dict[str, Matching]:
        """A family, given the others as `found`; by activations alone if that is None."""
        alike = {}
        for space in family:
            seen = None if found is None else self._moments(space, found)
            affinity = self.matcher.affinity(seen, self.moments.get(space.name))
            if affinity is not None:
                alike[space.name] = affinity
        widths = {s.name: self.widths[s.name] for s in family if s.name in self.widths}
        return self._wide(match_once(family, alike, self.matcher.matcher, widths, self.models, self.real))

    def _step(self, family: Sequence[FeatureSpace], found: dict[str, Matching], scale: float) -> bool:
        """Match one family anew; whether that changed anything."""
        new = self._matched(family, found)
        if all(torch.equal(new[k].merge, found[k].merge) for k in new):
            return False
        if self.matcher.monotone:
            names = self.weights.parameters(family)
            gain = self.weights.agreement({**found, **new}, names) - self.weights.agreement(found, names)
            if gain <= GAIN * scale:
                return False
        found.update(new)
        return True
