"""Matchings for all spaces of a graph: heads move with their dimensions, groups with their channels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from ..allocator import spare
from ..errors import FxzipError, InputError, SpaceError
from ..infer.spaces import FeatureSpace, Spaces
from .alignment import Layer, Slots, align
from .matching import Evidence, Matcher, Matching, from_slots, mean_correlation, similarity
from .permute import Permute

Reading = Callable[[str, Evidence], Evidence]


def match_once(
    spaces: Spaces | Sequence[FeatureSpace],
    moments: Mapping[str, Evidence],
    matcher: Matcher,
    widths: Mapping[str, int] | None = None,
    models: int | None = None,
    real: Mapping[str, Sequence[np.ndarray]] | None = None,
    keep: Callable[[Matching], Matching] = lambda matching: matching,
    reading: Reading = lambda _, seen: seen,
) -> dict[str, Matching]:
    """One Matching per space, parents before children, each an element of the space's own group structure.

    A space with neither parent nor child goes to `matcher` as it is (to Permute where it is
    `orthogonal_only`). In a family of spaces, blocks (features with equal parents) are paired by the best
    pairing of what they hold, then the matcher runs inside each set of matched blocks; spaces that have
    children, that are determined by their parents, or that allow permutations only are averaged under the
    permutation. A space without moments takes its order from its children, or else keeps the identity; its
    quality is then NaN.

    widths: merged width of spaces, default the widest model's; a space with blocks of one size may get
    (number of blocks) * (block width), if its blocks are contiguous. models: how many there are, needed only
    without any moments. real: where the models' widths differ, which of a space's features every model has; moments
    and matchings are of those. keep: where a matching goes once it is found. reading: what else a matcher is to see of
    a space, beside its moments; made when its turn comes, as it may be large. Raises SpaceError naming the space where
    a width or the models' sizes do not fit, InputError for unknown names.

    >>> from fxzip.measure import SpaceMoments
    >>> c = torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]])
    >>> m = {"s0": SpaceMoments((2, 2), 9.0, torch.zeros(4), c)}
    >>> match_once([FeatureSpace("s0", 2)], m, Permute())["s0"].merge
    tensor([[0.5000, 0.0000, 0.0000, 0.5000],
            [0.0000, 0.5000, 0.5000, 0.0000]], dtype=torch.float64)
    """
    every = list(spaces)
    known = {space.name for space in every}
    strange = [name for name in (*moments, *(widths or {})) if name not in known]
    if strange:
        raise InputError(f"match: no space {', '.join(map(repr, strange))}; there are {sorted(known)}")
    count = _count(moments, models)
    found: dict[str, Matching] = {}
    for family in families(every):
        own = {s.name: (real or {}).get(s.name, (np.arange(s.size),) * count) for s in family}
        sizes = {s.name: _sizes(moments.get(s.name), own[s.name]) for s in family}
        wanted = {s.name: (widths or {}).get(s.name, max(sizes[s.name])) for s in family}
        if len(family) == 1 and not family[0].parents:
            space = family[0]
            found[space.name] = keep(
                _plain(space, moments.get(space.name), matcher, wanted[space.name], own[space.name], reading)
            )
        else:
            found |= _Family(family, moments, sizes, wanted, own, reading).match(matcher, keep)
        spare()
    return {space.name: found[space.name] for space in every}


def _count(moments: Mapping[str, Evidence], models: int | None) -> int:
    counts = {len(m.sizes) for m in moments.values()} | ({models} if models else set())
    if len(counts) != 1:
        given = "none are known" if not counts else f"they differ: {sorted(counts)}"
        raise InputError(f"match: the number of models must come from the moments or `models`; {given}")
    return counts.pop()


def _sizes(moments: Evidence | None, own: Sequence[np.ndarray]) -> tuple[int, ...]:
    return moments.sizes if moments else tuple(len(o) for o in own)


def families(spaces: Sequence[FeatureSpace]) -> list[list[FeatureSpace]]:
    """Spaces connected by parent links, each family in the order given (parents first)."""
    found: list[list[FeatureSpace]] = []
    for space in spaces:
        near = {parent.space for parent in space.parents}
        joined = [f for f in found if any(s.name in near for s in f)]
        found = [f for f in found if f not in joined]
        found.append([s for f in joined for s in f] + [space])
    return found


def free(space: FeatureSpace, parents: Collection[str]) -> bool:
    """Whether any M and U fit inside its blocks. parents: the spaces that are any's parents."""
    loose = not space.parents or len(np.unique(space.blocks)) < space.size
    return loose and space.name not in parents and not space.orthogonal_only


def _plain(
    space: FeatureSpace,
    moments: Evidence | None,
    matcher: Matcher,
    width: int,
    own: Sequence[np.ndarray],
    reading: Reading,
) -> Matching:
    if moments is None:
        if width != space.size:
            raise SpaceError(f"{space.name}: without moments its width {space.size} cannot become {width}")
        return from_slots(np.concatenate(own), width, [len(o) for o in own])
    sizes = [len(o) for o in own]
    if matcher.correspondence == "identity" and len(set(sizes)) > 1:  # as they lie in the widest
        return from_slots(np.concatenate(own), width, sizes, similarity(moments))
    if space.orthogonal_only and matcher.correspondence == "free":
        matcher = Permute()
    return _run(space.name, matcher, reading(space.name, moments), width)


def _run(name: str, matcher: Matcher, moments: Evidence, width: int) -> Matching:
    try:
        return matcher(moments, width)
    except FxzipError as error:
        raise SpaceError(f"{name}: {error}") from error


class _Family:
    """Spaces that share blocks. Checks what is asked on construction, computes in `match`, where one space's matrices
    are held at a time."""

    def __init__(
        self,
        spaces: Sequence[FeatureSpace],
        moments: Mapping[str, Evidence],
        sizes: Mapping[str, tuple[int, ...]],
        widths: Mapping[str, int],
        own: Mapping[str, Sequence[np.ndarray]],
        reading: Reading,
    ) -> None:
        self.reading = reading
        self.spaces, self.moments, self.sizes, self.widths, self.own = spaces, moments, sizes, widths, own
        self.parents = {parent.space for space in spaces for parent in space.parents}
        for space in spaces:
            if sizes[space.name] != tuple(len(o) for o in own[space.name]):
                raise SpaceError(
                    f"{space.name}: the models have {sizes[space.name]} features here, but with blocks "
                    f"({space.structure}) every model needs {space.size}"
                )

    def match(self, matcher: Matcher, keep: Callable[[Matching], Matching]) -> dict[str, Matching]:
        slots = self._slots(matcher)
        return {space.name: keep(self._one(space, slots, matcher)) for space in self.spaces}

    def _slots(self, matcher: Matcher) -> list[Slots]:
        """Per model: the slot of every feature of every space."""
        count = len(self.sizes[self.spaces[0].name])
        if matcher.correspondence == "identity" or not any(s.name in self.moments for s in self.spaces):
            return [{space.name: np.arange(space.size) for space in self.spaces}] * count
        layers = [
            Layer(
                space.name,
                space.size,
                (space.size,) * count,
                tuple((parent.space, parent.index) for parent in space.parents),
                partial(self._wide, space) if space.name in self.moments else None,
            )
            for space in self.spaces
        ]
        return align(layers)

    def _wide(self, space: FeatureSpace) -> np.ndarray:
        return _spread(similarity(self.moments[space.name]), self.own[space.name], space.size)

    def _one(self, space: FeatureSpace, slots: list[Slots], matcher: Matcher) -> Matching:
        here = [s[space.name] for s in slots]
        width = self.widths[space.name]
        if matcher.correspondence == "free" and space.name in self.moments and free(space, self.parents):
            return self._inside(space, here, matcher, width)
        if width != space.size:
            why = "it groups other features" if space.name in self.parents else "only permutations fit here"
            raise SpaceError(f"{space.name}: its width {space.size} cannot become {width}: {why}")
        real = np.concatenate([s[o] for s, o in zip(here, self.own[space.name], strict=True)])
        known = similarity(self.moments[space.name]) if space.name in self.moments else None
        return from_slots(real, space.size, self.sizes[space.name], known)

    def _inside(self, space: FeatureSpace, slots: list[np.ndarray], matcher: Matcher, width: int) -> Matching:
        """Run the matcher within every set of matched blocks and put the pieces together."""
        members = _members(space.blocks)
        targets = _targets(space, members, width)
        sizes, own = self.sizes[space.name], self.own[space.name]
        starts = np.cumsum((0, *sizes))[:-1]
        merge = torch.zeros(width, sum(sizes), dtype=torch.float64)
        unmerge = merge.T.clone()
        quality, seen = [], self.reading(space.name, self.moments[space.name])
        for block, rows in zip(members, targets, strict=True):
            # Sorted by slot: the matcher sees every model in model 0's order.
            inside = [_among(o, np.argsort(s)[block]) for s, o in zip(slots, own, strict=True)]
            part = _run(space.name, matcher, seen.restrict(inside), len(rows))
            columns = torch.from_numpy(np.concatenate([f + o for f, o in zip(inside, starts, strict=True)]))
            merge[torch.from_numpy(rows)[:, None], columns] = part.merge
            unmerge[columns[:, None], torch.from_numpy(rows)] = part.unmerge
            quality.append((part.quality, len(block)))
        baseline = mean_correlation(np.concatenate(own), sizes, similarity(self.moments[space.name]))
        return Matching(merge, unmerge, sizes, _mean(quality), baseline)


def _spread(known: np.ndarray, own: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Similarities of the models' own features among `size` of each; the others are like none. [N size, N size]"""
    places = np.concatenate([o + i * size for i, o in enumerate(own)])
    if len(places) == len(own) * size:
        return known
    wide = np.zeros((len(own) * size,) * 2)
    wide[np.ix_(places, places)] = known
    return wide


def _among(own: np.ndarray, features: np.ndarray) -> np.ndarray:
    """The features that a model has, as indices into its own, in the order given."""
    rank = np.full(max(int(own.max(initial=-1)), int(features.max(initial=-1))) + 1, -1)
    rank[own] = np.arange(len(own))
    return rank[features][rank[features] >= 0]


def _members(blocks: np.ndarray) -> list[np.ndarray]:
    """The features of every block, in order."""
    order = np.argsort(blocks, kind="stable")
    return np.split(order, np.cumsum(np.bincount(blocks))[:-1])


def _targets(space: FeatureSpace, members: list[np.ndarray], width: int) -> list[np.ndarray]:
    """The merged features of every block: where model 0 has them, or contiguous blocks of a new width."""
    if width == space.size:
        return members
    inner, rest = divmod(width, len(members))
    contiguous = (np.diff(space.blocks) >= 0).all() and len({len(m) for m in members}) == 1
    if rest or not inner or not contiguous:
        raise SpaceError(
            f"{space.name}: {space.structure} cannot get width {width}: that takes contiguous blocks "
            f"of one size and a multiple of {len(members)}, the number of blocks"
        )
    return list(np.arange(width).reshape(len(members), inner))


def _mean(parts: Sequence[tuple[float, int]]) -> float:
    """Weighted mean of the known values; NaN without any."""
    values = [(value, weight) for value, weight in parts if value == value]
    return sum(v * w for v, w in values) / sum(w for _, w in values) if values else float("nan")
